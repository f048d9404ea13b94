"""Whole runs with a work folder that are killed at any moment: the same command goes on, and the bytes are the same."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from a3q import runtime
from a3q.work import draft_of
from tests.inside import killed_at_changes, killed_in, killed_in_the_middle_of_a_write, noted, nothing, often_kept
from tests.pico import corpus, write_model
from tests.processes import Ended, done, start

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="has no such signals")
needs_llama_cpp = pytest.mark.skipif(not runtime.available(), reason="llama.cpp is not installed")

QUICK = ("--calib", "text.txt", "--calib-tokens", 1024, "--device", "cpu")
PLAIN = ("--ranks", "uniform", "--no-report", "--no-verify")
HEALED = ("--heal", "both", "--heal-tokens", 4096)
WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}


@dataclass(frozen=True)
class Case:
    """A model and what is asked of it."""

    options: tuple[object, ...]
    kept: frozenset[str]
    """Names in the work folder after the end, beside the layers."""
    model: dict[str, Any] = field(default_factory=dict)
    command: str = "convert"
    output: str = "m.gguf"


INPUT, OUTPUT = frozenset(("top-embed",)), frozenset(("top-output",))
CASES = {
    # The input embedding is rounded before the layers.
    "gptq": Case(("--quant", "q4_0", *PLAIN), INPUT),
    # Tied, it is rounded after them.
    "tied": Case(("--quant", "q4_0", "--output-tensor-type", "q4_0", *PLAIN), INPUT, {"tied": True}),
    "mix": Case(
        ("--quant", "q4_k_m", "--output-tensor-type", "q4_k", "--ratio", 0.5, *PLAIN),
        INPUT | OUTPUT,
        {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3},
    ),
    "f16": Case(("--quant", "f16", "--memory", 0, *PLAIN), frozenset()),
    "paper": Case(("--quant", "q4_0", "--method", "paper", "--components", "mlp", *PLAIN), INPUT),
    "neox": Case(("--quant", "q4_0", *PLAIN), INPUT, {"kind": "gpt_neox"}),
    "qwen3": Case(("--quant", "q4_0", *PLAIN), INPUT, {"kind": "qwen3"}),
    "split": Case(("--quant", "f32", "--split-max-size", "1M", *PLAIN), frozenset()),
    "folder": Case(("--dtype", "f32", *PLAIN), frozenset(), command="reduce", output="m"),
    "healed": Case(("--quant", "q4_0", *HEALED, "--heal-quant", *PLAIN), INPUT, {"num_hidden_layers": 2}),
    "healed folder": Case(("--dtype", "f32", *HEALED, *PLAIN), frozenset(), {"kind": "gpt_neox"}, "reduce", "m"),
    "heads": Case(("--dtype", "f32", *PLAIN), frozenset(), {"kind": "qwen3"}, "reduce", "m"),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    (folder / "text.txt").write_text("\n".join(corpus(200, seed=3)))
    return folder


class Place:
    """An empty folder with a model and a text in it, where one command is given again and again."""

    def __init__(self, sources: Path, folder: Path, case: Case) -> None:
        model = sources / "-".join(["model", *(f"{k}-{v}" for k, v in sorted(case.model.items()))])
        if not model.exists():
            write_model(model, **(WIDE | case.model))
        folder.mkdir()
        (folder / "model").symlink_to(model)
        shutil.copy(sources / "text.txt", folder)
        self.folder, self.case = folder, case
        self.work, self.output = folder / "w", folder / case.output
        self.log = folder.with_name(f"{folder.name}.log")

    @property
    def command(self) -> tuple[object, ...]:
        return (self.case.command, "model", *QUICK, *self.case.options, "-o", self.case.output)

    def result(self) -> dict[str, bytes]:
        """What was written, by name, of reports only that they are there; nothing else lies beside it."""
        known = {"model", "text.txt", "w"}
        found = {path.name: path for path in self.folder.iterdir() if path.name not in known}
        assert all(name.startswith(self.case.output.removesuffix(".gguf")) for name in found), found
        files = [file for path in found.values() for file in ([path] if path.is_file() else path.rglob("*"))]
        # A report tells times.
        return {
            str(file.relative_to(self.folder)): b"" if ".report." in file.name else file.read_bytes()
            for file in files
            if file.is_file()
        }

    def layers(self) -> set[str]:
        """Layers that are finished."""
        return {
            str(path.relative_to(self.folder).with_suffix("")) for path in self.work.glob("layers-*/0*.safetensors")
        }

    def attempt(self, prepare: Callable[[], None], kill_after: float | None = None) -> Ended:
        """Give the command; no layer that is finished is reduced again."""
        before = self.layers()
        self.log.write_text("")
        process = start(*self.command, "--work", "w", cwd=self.folder, prepare=partial(noted, self.log, prepare))
        if kill_after is not None and process.running(kill_after):
            process.send(signal.SIGKILL)
        ended = process.ended()
        reduced = self.log.read_text().split()
        assert len(reduced) == len(set(reduced))
        assert not before & set(reduced)
        assert before <= self.layers()
        assert ended.code in (0, -signal.SIGKILL), ended.said
        return ended


def once(place: Place) -> dict[str, bytes]:
    """What an uninterrupted run writes, with and without a work folder."""
    ended = done(*place.command, cwd=place.folder)
    assert ended.code == 0, ended.said
    plain = place.result()
    assert plain
    clear(place)
    assert place.attempt(nothing).code == 0
    assert place.result() == plain
    tops = {path.stem for path in place.work.glob("layers-*/top-*")}
    assert tops == place.case.kept
    clear(place)
    return plain


def clear(place: Place) -> None:
    for path in place.folder.iterdir():
        if path.name not in ("model", "text.txt"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def killed_everywhere(place: Place, which: str) -> tuple[list[str], dict[str, bytes]]:
    """Kill at each change of a file that matches, one after another, until a run comes through."""
    told = place.folder.with_name(f"{place.folder.name}.told")
    told.touch()
    while place.attempt(partial(killed_at_changes, told, which)).code != 0:
        pass
    return told.read_text().splitlines(), place.result()


def test_killed_at_every_change_of_a_file(sources: Path, tmp_path: Path) -> None:
    options = ("--quant", "q4_0", "--no-verify")
    place = Place(sources, tmp_path / "run", Case(options, INPUT))
    expected = once(place)
    assert sorted(expected) == ["m.gguf", "m.report.html", "m.report.json"]
    labels, found = killed_everywhere(place, "")
    assert found == expected
    for part in (
        "open w/lock", "rename w/.run.json", "rename w/.plan.json", "rename w/.calibration.safetensors",
        "mkdir w/layers-reduce-and-quantize", "00000.safetensors", "00003.safetensors", "top-embed.safetensors",
        "unverified/m.gguf", "m.gguf m.gguf", "w/.output.json", "rename .m.report.html.part", "rename .m.report.json",
    ):  # fmt: skip
        assert any(part in label for label in labels), (part, labels)
    assert len(labels) > 25


@pytest.mark.parametrize("name", CASES)
def test_killed_at_every_new_name(sources: Path, tmp_path: Path, name: str) -> None:
    place = Place(sources, tmp_path / "run", CASES[name])
    expected = once(place)
    labels, found = killed_everywhere(place, "rename")
    assert found == expected
    assert len(labels) >= 6


@pytest.mark.parametrize("phase", [1, 2])
def test_killed_between_two_steps_of_healing(sources: Path, tmp_path: Path, phase: int) -> None:
    """Everything is kept from time to time, here after every second step, and a run goes on after the last time."""
    options = ("--quant", "q4_0", "--heal", "full", "--heal-tokens", 65536, "--heal-quant", *PLAIN)
    place = Place(sources, tmp_path / "run", Case(options, INPUT, {"num_hidden_layers": 2}))
    expected = once(place)
    assert place.attempt(partial(often_kept, phase, 3)).code == -signal.SIGKILL
    kept = {path.name for path in place.work.glob("heal*.safetensors")}
    assert kept == {
        "healing-text.safetensors",
        "heal.safetensors",
        *(["heal-rounded.safetensors"] if phase == 2 else []),
    }
    assert place.attempt(nothing).code == 0
    assert place.result() == expected


POINTS: list[Callable[[], None]] = [
    partial(killed_in, "a3q.to_gguf", "hash_source"),
    partial(killed_in, "a3q.pipeline", "calibrate", after=True),
    partial(killed_in, "a3q.pipeline", "choose"),
    partial(killed_in, "a3q.store", "LayerStore.append"),
    partial(killed_in, "a3q.store", "LayerStore.append", after=True),
    # Between storing and writing, and then with three layers to pass through again.
    partial(killed_in, "converters.gguf_writer", "GGUFStream.write_layer", 3),
    partial(killed_in_the_middle_of_a_write, 20),
    partial(killed_in, "a3q.reduce", "_Run.pass_through", 3),
    partial(killed_in, "a3q.reduce", "_Run.finish"),
    partial(killed_in, "converters.gguf_writer", "GGUFStream.write_top"),
    partial(killed_in, "converters.gguf_writer", "sync_and_hash", after=True),
    partial(killed_in, "a3q.to_gguf", "_verify"),
    partial(killed_in, "a3q.verify", "_compared", after=True),
    partial(killed_in, "a3q.work", "WorkFolder.keep_output", after=True),
    partial(killed_in, "a3q.to_gguf", "_footprints"),
    partial(killed_in, "a3q.to_gguf", "write_reports"),
    partial(killed_in, "a3q.work", "WorkFolder.keep_output", after=True),
    partial(killed_in, "a3q.to_gguf", "write_reports"),
    partial(killed_in, "a3q.report", "render"),
]


@needs_llama_cpp
def test_killed_at_certain_moments(sources: Path, tmp_path: Path) -> None:
    options = ("--quant", "q4_0", "--ranks", "uniform", "--output-tensor-type", "q4_0")
    place = Place(sources, tmp_path / "run", Case(options, INPUT | OUTPUT))
    expected = once(place)
    for point in POINTS:
        assert place.attempt(point).code == -signal.SIGKILL, point
    # The last one came when everything was done.
    assert place.result() == expected
    assert place.attempt(nothing).code == 0
    assert place.result() == expected


@pytest.mark.parametrize("name", ["paper", "folder"])
def test_killed_at_random_moments(sources: Path, tmp_path: Path, name: str) -> None:
    rng, place = random.Random(name), Place(sources, tmp_path / "run", CASES[name])
    expected = once(place)
    start = time.monotonic()
    assert place.attempt(nothing).code == 0
    seconds = time.monotonic() - start
    kills, in_a_row, most = 0, 0, 0
    while kills < 12 or in_a_row:
        if not in_a_row:
            clear(place)
        # A run that goes on takes less and less.
        ended = place.attempt(nothing, rng.uniform(0.1, 1.1) * seconds if kills < 12 else None)
        if ended.code == 0:
            assert place.result() == expected
            in_a_row = 0
        else:
            kills, in_a_row = kills + 1, in_a_row + 1
            most = max(most, in_a_row)
    assert most > 1


def refused(place: Place, command: tuple[object, ...], *parts: str) -> None:
    """One line that holds `parts`, and nothing is changed."""
    before = snapshot(place.folder)
    ended = done(*command, "--work", "w", cwd=place.folder)
    assert ended.code == 2, ended.said
    (message,) = ended.messages()
    for part in ("a3q: ", *parts):
        assert part in message
    assert snapshot(place.folder) == before


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_another_run_is_refused_by_name(sources: Path, tmp_path: Path) -> None:
    place = Place(sources, tmp_path / "run", CASES["gptq"])
    expected = once(place)
    write_model(place.folder / "other", **WIDE, seed=1)
    assert place.attempt(partial(killed_in, "a3q.store", "LayerStore.append", 3)).code == -signal.SIGKILL
    command, other = place.command, "w: is the work folder of another run: "
    for changed, part in {
        ("--ratio", 0.5): "--ratio was 0.25 and is 0.5 now",
        ("--quant", "q8_0"): "--quant was q4_0 and is q8_0 now",
        ("--seed", 1): "--seed was 0 and is 1 now",
        ("--calib-tokens", 2048): "--calib-tokens was 1024 and is 2048 now",
        ("--method", "paper", "--components", "mlp"): "--components was not given and is mlp now",
        ("--kv-type", "q8_0"): "--kv-type was f16 and is q8_0 now",
        ("--quantizer", "gptq"): "--quantizer was not given and is gptq now",
    }.items():
        refused(place, (*command, *changed), other, part)
    refused(place, (command[0], "other", *command[2:]), other, "the model was sha256 ", "; give another folder")
    refused(place, ("reduce", "model", *QUICK, "--ranks", "uniform", "-o", "r"), other)
    text = (place.folder / "text.txt").read_text()
    (place.folder / "text.txt").write_text(f"{text}More.")
    refused(place, command, other, "--calib was text.txt (sha256 ")
    (place.folder / "text.txt").write_text(text)
    told = place.work / "run.json"
    about = told.read_text()
    told.write_text(json.dumps(json.loads(about) | {"a3q": "0.0.9"}))
    refused(place, command, other, "a3q was 0.0.9 and is ")
    told.write_text(about)
    # Memory and disk do not matter to the result.
    assert done(*command, "--work", "w", "--memory", 0, cwd=place.folder).code == 0
    shutil.rmtree(place.folder / "other")
    assert place.result() == expected


def test_a_file_of_others_is_not_replaced(sources: Path, tmp_path: Path) -> None:
    """It took the name after the run was killed that had placed its own; its own file is."""
    options = ("--quant", "q4_0", "--ranks", "uniform", "--no-verify")
    place = Place(sources, tmp_path / "run", Case(options, INPUT))
    expected = once(place)
    killed = partial(killed_in, "a3q.to_gguf", "write_reports")
    assert place.attempt(killed).code == -signal.SIGKILL
    mine = place.output.read_bytes()
    assert mine == expected["m.gguf"]
    place.output.write_bytes(b"precious")
    refused(place, place.command, "m.gguf: exists already; use --force")
    place.output.unlink()
    assert place.attempt(killed).code == -signal.SIGKILL
    assert place.attempt(nothing).code == 0
    assert place.result() == expected
    os.utime(place.output)
    refused(place, place.command, "m.gguf: exists already; use --force")


def test_killed_while_a_folder_is_replaced(sources: Path, tmp_path: Path) -> None:
    """The one that was there is out of the way already; it comes back, and is replaced."""
    case = Case((*CASES["folder"].options, "--force"), frozenset(), command="reduce", output="m")
    place = Place(sources, tmp_path / "run", case)
    assert done("reduce", "model", *QUICK, *PLAIN, "--ratio", 0.5, "-o", "m", cwd=place.folder).code == 0
    before = place.result()
    told = place.folder.with_name("told")
    told.touch()
    killed = partial(killed_at_changes, told, r"rename .*unverified m$")
    assert place.attempt(killed).code == -signal.SIGKILL
    assert not place.output.exists()
    assert place.attempt(partial(killed_in, "converters.hf_writer", "write_files")).code == -signal.SIGKILL
    assert {name: file.read_bytes() for name in before if (file := place.folder / name).exists()} == before
    assert place.attempt(nothing).code == 0
    assert place.result().keys() == before.keys()
    assert place.result() != before


@pytest.mark.parametrize("name", ["gptq", "folder"])
def test_a_damaged_layer_is_named(sources: Path, tmp_path: Path, name: str) -> None:
    place = Place(sources, tmp_path / "run", CASES[name])
    assert place.attempt(partial(killed_in, "a3q.store", "LayerStore.append", 4)).code == -signal.SIGKILL
    # What lies beside the output goes whatever happens.
    shutil.rmtree(draft_of(place.output, place.work), ignore_errors=True)
    layer = sorted(place.work.glob("layers-*/0*"))[1]
    os.truncate(layer, layer.stat().st_size // 2)
    refused(place, place.command, f"{layer.name}: is damaged; delete the work folder and start again")
