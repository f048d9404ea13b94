"""`torchrun -m a3q`: files of several processes beside those of one, and runs that end early."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import a3q
from a3q import InputError, convert
from a3q.cli import app
from a3q.model import Model
from a3q.perplexity import compare, logits_of
from converters.open import open_model
from tests.pico import VOCAB, corpus, write_model

CPU = torch.device("cpu")
IDS = torch.randint(VOCAB, (4, 64), generator=torch.Generator().manual_seed(1))
RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "layers weighed, rounded": (2, {"quant": "q4_0", "calib": "self", "calib_tokens": 512}),
    "candidates tried, f32": (2, {"quant": "f32", "ranks": "uniform", "ratio": 0.2, "calib_tokens": 1024}),
    "more processes than sequences and heads, f16": (3, {"quant": "f16", "calib_tokens": 128}),
    "healed, f32": (2, {"quant": "f32", "heal": "both", "heal_tokens": 2048, "calib_tokens": 512}),
    "healed, rounded": (
        3,
        {"quant": "q4_0", "heal": "full", "heal_tokens": 2048, "heal_quant": True, "calib_tokens": 512},
    ),
    "types chosen": (2, {"bits": 5.0, "ratio": 0.0, "calib_tokens": 512}),
}
"""Number of processes, and options of `convert`."""
KILLER = """
import os, signal, sys
from a3q import reduce
from a3q.cli import main

rank, layer = sys.argv.pop(1), int(sys.argv.pop(1))
work = reduce._Run.layer

def layer_or_death(run, i, *rest):
    if i == layer and os.environ.get("RANK", "0") == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    return work(run, i, *rest)

reduce._Run.layer = layer_or_death
main()
"""


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    code: int
    out: str
    err: str

    @property
    def told(self) -> list[str]:
        """What a3q says."""
        return [line for line in self.err.splitlines() if line.startswith(("a3q:", "a3q ("))]

    @property
    def traced(self) -> bool:
        """Whether a traceback of a3q is in what was printed; torchrun prints one of its own."""
        return f'File "{Path(a3q.__file__).parent}' in self.err + self.out


def torchrun(processes: int, folder: Path, *arguments: object, script: tuple[object, ...] = ("-m", "a3q")) -> Outcome:
    """Runs a3q in some processes, with nothing that was kept by others before."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)),
            *map(str, (*script, *arguments)),
        ],
        capture_output=True,
        text=True,
        cwd=Path(a3q.__file__).parents[1],
        env=environment(folder),
        timeout=120,
        check=False,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def environment(folder: Path) -> dict[str, str]:
    own = {"HF_HUB_OFFLINE": "1", "COLUMNS": "200", "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder / "cache")}
    return {**os.environ, **own}


def options(**given: Any) -> list[str]:
    """As the command line takes them."""
    words = []
    for name, value in given.items():
        words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return words


QUIET = ("--device", "cpu", "--no-verify", "--no-report")


@pytest.fixture(scope="module")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("torchrun") / "pico"
    return write_model(folder, hidden_size=128, intermediate_size=128, num_hidden_layers=3, max_position_embeddings=64)


@pytest.fixture(scope="module")
def text(pico: Path) -> Path:
    path = pico.with_name("text.txt")
    path.write_text("\n".join(corpus(200, seed=3)))
    return path


def check_alike(several: Path, alone: Path, original: Path) -> None:
    """The same file up to rounding.

    A code that is another one for the last bit of a sum moves all that is fitted behind it: quantized files only come
    equally close to the original, and closer to one another.
    """
    ours, theirs, source = (open_model(path) for path in (several, alone, original))
    assert ours.config == theirs.config
    assert ours.source.stored == theirs.source.stored
    assert ours.metadata.keys() == theirs.metadata.keys()
    before, first, second = (logits_of(model, IDS, CPU) for model in (source, theirs, ours))
    rounded = not set(ours.source.stored.values()) <= {"F32", "F16"}
    assert changed(before, second) == pytest.approx(changed(before, first), rel=0.1 if rounded else 1e-2)
    assert changed(first, second) < (0.6 if rounded else 1e-3) * changed(before, first)


def changed(before: Any, after: Any) -> float:
    kl: float = compare(before, {"after": after}, IDS)["after"].mean_kl
    return kl


def distances(several: Path, alone: Path) -> list[float]:
    """Relative distance of every weight of the layers."""

    def layers(path: Path) -> list[torch.Tensor]:
        model: Model = open_model(path)
        return [weight for layer in model.layers for weight in layer.values()]

    return [float((a - b).norm() / b.norm()) for a, b in zip(layers(several), layers(alone), strict=True)]


@pytest.mark.parametrize("name", RUNS)
def test_the_file_is_that_of_one_process(name: str, pico: Path, text: Path, tmp_path: Path) -> None:
    processes, given = RUNS[name]
    given = {"calib": str(text), **given}
    several, alone = tmp_path / "several.gguf", tmp_path / "alone.gguf"
    outcome = torchrun(processes, tmp_path, "convert", pico, "-o", several, *QUIET, *options(**given))
    assert outcome.code == 0, outcome.err
    assert outcome.told == [] and outcome.out.count(f"wrote {several}") == 1
    # One process alone shows how far it is.
    assert outcome.err.count("read calibration text") <= 1
    result = convert(pico, output=alone, device="cpu", verify_file=False, **given)
    assert (len(result.job.tried) > 1) == ("tried" in name)
    check_alike(several, alone, pico)
    if "f32" in name:
        assert max(distances(several, alone)) < 1e-3


def test_bad_input_is_told_once(pico: Path, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.gguf"
    outcome = torchrun(2, tmp_path, "convert", tmp_path / "none", "-o", output, *QUIET)
    assert outcome.code != 0 and not outcome.traced
    assert outcome.told == [f"a3q (process 0): {tmp_path / 'none'}: no such file or folder"]
    # Only the first process opens the work folder.
    given = options(calib=text, work=text.parent)
    outcome = torchrun(2, tmp_path, "convert", pico, "-o", output, *QUIET, *given)
    assert outcome.code != 0 and not outcome.traced
    assert len(outcome.told) == 1
    assert outcome.told[0].startswith(f"a3q (process 0): {text.parent}: holds ")
    assert not output.exists()


def test_a_model_that_breaks_on_all_of_them(pico: Path, text: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in pico.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0] = 1e38
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    given = options(ranks="uniform", calib=text, calib_tokens=512)
    outcome = torchrun(2, tmp_path, "convert", broken, "-o", tmp_path / "out.gguf", *QUIET, *given)
    assert outcome.code != 0 and not outcome.traced
    assert outcome.told and all(f"{broken}: layer 1" in line for line in outcome.told)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken"]


def test_commands_that_one_process_does_are_refused(pico: Path) -> None:
    error = CliRunner().invoke(app, ["inspect", str(pico)], env={"WORLD_SIZE": "2"}).exception
    assert isinstance(error, InputError)
    assert str(error) == "inspect: works in one process; start it without torchrun"


@pytest.mark.parametrize("dying", [0, 1])
def test_a_process_that_dies_ends_all_and_one_can_go_on(dying: int, pico: Path, text: Path, tmp_path: Path) -> None:
    script, output, alone = tmp_path / "killer.py", tmp_path / "out.gguf", tmp_path / "alone.gguf"
    script.write_text(KILLER)
    given: dict[str, Any] = {"quant": "f16", "ranks": "uniform", "calib": str(text), "calib_tokens": 512}
    arguments = ("convert", pico, "-o", output, "--work", tmp_path / "work", *QUIET, *options(**given))
    start = time.monotonic()
    outcome = torchrun(2, tmp_path, *arguments, script=(script, dying, 2))
    assert time.monotonic() - start < 30
    assert outcome.code != 0 and not outcome.traced
    # torchrun may end the other one before that sees for itself.
    assert "SIGKILL" in outcome.err or "exitcode  : -9" in outcome.err
    assert all("another of the 2 processes has ended" in line for line in outcome.told)
    assert not output.exists()
    finished = sorted((tmp_path / "work").glob("layers-*/0*"))
    assert [path.stem for path in finished] == ["00000", "00001"]
    known = {path: path.stat().st_mtime_ns for path in finished}

    convert(pico, output=output, device="cpu", verify_file=False, work=tmp_path / "work", **given)
    assert {path: path.stat().st_mtime_ns for path in finished} == known
    convert(pico, output=alone, device="cpu", verify_file=False, **given)
    check_alike(output, alone, pico)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith((".", "out"))) == ["out.gguf"]


def test_several_go_on_where_one_was_killed(pico: Path, text: Path, tmp_path: Path) -> None:
    script, output, alone = tmp_path / "killer.py", tmp_path / "out.gguf", tmp_path / "alone.gguf"
    script.write_text(KILLER)
    given: dict[str, Any] = {"quant": "q8_0", "ranks": "uniform", "calib": str(text), "calib_tokens": 512}
    arguments = ("convert", pico, "-o", output, "--work", tmp_path / "work", *QUIET, *options(**given))
    command = [sys.executable, script, "0", "1", *arguments]
    root = str(Path(a3q.__file__).parents[1])
    killed = subprocess.run(
        list(map(str, command)), env={**environment(tmp_path), "PYTHONPATH": root}, capture_output=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    first = next((tmp_path / "work").glob("layers-*/00000*"))
    known = first.stat().st_mtime_ns
    outcome = torchrun(3, tmp_path, *arguments)
    assert outcome.code == 0, outcome.err
    assert first.stat().st_mtime_ns == known
    convert(pico, output=alone, device="cpu", verify_file=False, **given)
    check_alike(output, alone, pico)
