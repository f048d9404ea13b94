"""The watchdog: each fault is driven into a run, which says clearly what happened, damages nothing, and can go on."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import a3q.reduce
from a3q import InputError, convert
from a3q.batching import Batches
from a3q.components import Method
from a3q.model import Model, Source
from a3q.pipeline import hash_source
from a3q.progress import silent
from a3q.quantize import LayerRounding, Quantization
from a3q.reduce import reduce
from a3q.reduce_layer import Dimensions
from a3q.solve.grid import GRIDS
from converters.gguf_reader import open_gguf
from converters.gguf_writer import write_gguf
from converters.hf_reader import open_huggingface
from converters.types import resolve_quant
from tests.inside import batches_of, beside, both, cut, file_size_limit, limited, nothing, raising, unreadable, waiting
from tests.pico import Kind, corpus, write_model
from tests.processes import Ended, done, start

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="has no such signals and limits")

PLAIN: tuple[object, ...] = (
    "--calib", "text.txt", "--calib-tokens", 1024, "--device", "cpu", "--ranks", "uniform", "--no-report",
    "--no-verify", "--quant", "q4_0", "-o", "m.gguf",
)  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in many files, and a text."""
    folder = tmp_path_factory.mktemp("source")
    write_model(folder / "model", hidden_size=128, intermediate_size=128, num_hidden_layers=4, sharded=True)
    (folder / "text.txt").write_text("\n".join(corpus(200, seed=3)))
    return folder


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What a run writes that nothing happens to."""
    folder = copied(source, tmp_path_factory.mktemp("expected") / "run")
    ended = done("convert", "model", *PLAIN, cwd=folder)
    assert ended.code == 0, ended.said
    return (folder / "m.gguf").read_bytes()


@pytest.fixture
def place(source: Path, tmp_path: Path) -> Path:
    return copied(source, tmp_path / "run")


def copied(source: Path, folder: Path) -> Path:
    return shutil.copytree(source, folder)


def shards(place: Path) -> list[Path]:
    return sorted((place / "model").glob("*.safetensors"))


def middle(place: Path) -> Path:
    """A file of the third layer."""
    where = json.loads((place / "model" / "model.safetensors.index.json").read_text())["weight_map"]
    return place / "model" / where["model.layers.2.mlp.up_proj.weight"]


def failed(ended: Ended, place: Path, *parts: str, code: int = 2, work: bool = False) -> None:
    """One line that holds `parts`, no half-written file, and no layer that is not whole."""
    assert ended.code == code, ended.said
    (message,) = ended.messages()
    for part in parts:
        assert part in message, message
    assert "Traceback" not in ended.said
    left = {path.name for path in place.iterdir()} - {"model", "text.txt"}
    assert left == ({"w"} if work else set())
    assert not [path for path in place.rglob("*") if path.name.endswith(".part")]


def goes_on(place: Path, expected: bytes, *options: object) -> None:
    """The same command, without the fault, comes to the same bytes."""
    ended = done("convert", "model", *PLAIN, "--work", "w", *options, cwd=place)
    assert ended.code == 0, ended.said
    assert (place / "m.gguf").read_bytes() == expected
    assert {path.name for path in place.iterdir()} == {"model", "text.txt", "w", "m.gguf"}


# The disk is full

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
NO_ROOM: dict[str, tuple[Callable[[], None], tuple[object, ...], str]] = {
    "file": (partial(raising, FULL, "converters.gguf_writer", "write_at", 12), (), "m.gguf: disk full: "),
    "header": (partial(raising, FULL, "converters.gguf_writer", "allocate"), (), "m.gguf: disk full: "),
    "end": (partial(raising, FULL, "converters.gguf_writer", "sync_and_hash"), (), "m.gguf: disk full: "),
    "layer": (
        partial(raising, FULL, "a3q.files", "os.fsync", 11),
        (),
        "layers-reduce-and-quantize: disk full: 00001.safetensors cannot be written; make room there, then give the "
        "same command again",
    ),
    "states": (
        partial(raising, FULL, "a3q.room", "_reserve", 2),
        ("--memory", 0),
        "bytes are needed for hidden states beyond --memory",
    ),
    "in a thread": (
        partial(both, beside, partial(raising, FULL, "converters.gguf_writer", "write_at", 12)),
        (),
        "m.gguf: disk full: ",
    ),
}


@pytest.mark.parametrize("name", NO_ROOM)
def test_disk_full(place: Path, expected: bytes, name: str) -> None:
    fault, options, message = NO_ROOM[name]
    failed(
        done("convert", "model", *PLAIN, *options, "--work", "w", cwd=place, prepare=fault), place, message, work=True
    )
    goes_on(place, expected)


@pytest.mark.parametrize("size", [30_000, 90_000, 200_000])
def test_files_that_cannot_grow(place: Path, expected: bytes, size: int) -> None:
    """The system itself says so, in the middle: the layers are 110 kB, the hidden states 500, the GGUF is 290."""
    limit = partial(file_size_limit, size)
    options = ("--memory", 0) if size == 200_000 else ()
    ended = done("convert", "model", *PLAIN, "--work", "w", *options, cwd=place, prepare=limit)
    failed(ended, place, "File too large", work=True)
    goes_on(place, expected)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 250 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    options = ("-t", "tmpfs", "-o", "size=250k", "none", str(folder))
    if shutil.which("mount") is None or subprocess.run(["mount", *options], capture_output=True).returncode:
        pytest.skip("may not mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_small_disk_for_the_work(place: Path, expected: bytes, small_disk: Path) -> None:
    """Layers and the rounded embedding are 0.4 MB."""
    (small_disk / "w").mkdir()
    (place / "w").symlink_to(small_disk / "w")
    ended = done("convert", "model", *PLAIN, "--work", "w", cwd=place)
    failed(ended, place, "w/layers-reduce-and-quantize: disk full: ", work=True)
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    goes_on(place, expected)


# The model cannot be read


def test_a_file_that_was_cut(place: Path) -> None:
    shard = middle(place)
    os.truncate(shard, shard.stat().st_size - 100)
    failed(done("convert", "model", *PLAIN, cwd=place), place, f"{shard.name}: is truncated or damaged", "download")


@pytest.mark.parametrize(("call", "threads"), [(1, nothing), (2, nothing), (1, beside)])
def test_a_file_that_is_cut_meanwhile(place: Path, expected: bytes, call: int, threads: Callable[[], None]) -> None:
    """It is memory-mapped: what lies behind its end would kill the process."""
    shard = middle(place)
    saved = shutil.copy2(shard, place.with_name("saved"))
    fault = partial(both, threads, partial(cut, shard, "a3q.reduce", "_Run.layer", call))
    ended = done("convert", "model", *PLAIN, "--work", "w", cwd=place, prepare=fault)
    failed(ended, place, f"{shard.name}: was changed or cut while it was read", work=True)
    shutil.copy2(saved, shard)
    goes_on(place, expected)


@pytest.mark.parametrize("what", ["cut", "changed", "gone"])
def test_a_gguf_that_becomes_another(source: Path, tmp_path: Path, what: str) -> None:
    path = write_gguf(open_huggingface(source / "model"), resolve_quant("q8_0"), tmp_path / "in.gguf").path
    model = open_gguf(path)
    first = model.layers[0]
    if what == "cut":
        os.truncate(path, path.stat().st_size // 2)
    elif what == "changed":
        os.utime(path, ns=(0, 0))
    else:
        path.unlink()
    message = "cannot be read any more" if what == "gone" else "was changed or cut while it was read"
    for read in (lambda: model.layers[3], lambda: model.layers.blocks(3), lambda: model.layers.top_blocks()):  # type: ignore[attr-defined]
        with pytest.raises(InputError, match=f"in.gguf: {message}"):
            read()
    assert torch.isfinite(first["q"]).all()


def test_a_disk_that_cannot_be_read(place: Path) -> None:
    shard = middle(place)
    ended = done("convert", "model", *PLAIN, cwd=place, prepare=partial(unreadable, shard.name, errno.EIO))
    failed(ended, place, f"{shard.name}: cannot be read: Input/output error; copy or download it again")


def test_a_file_that_may_not_be_read(place: Path) -> None:
    shard = middle(place)
    shard.chmod(0)
    if os.access(shard, os.R_OK):
        pytest.skip("may read everything")
    failed(done("convert", "model", *PLAIN, cwd=place), place, f"{shard.name}: cannot be read: Permission denied")


def test_no_file_is_read_on_once_one_has_failed(tmp_path: Path) -> None:
    files = tmp_path / "missing", Path("/dev/zero")
    with pytest.raises(InputError, match="missing: cannot be read"):
        hash_source(Source(tmp_path, "huggingface", 1, files), silent)


# Memory runs out


def test_smaller_batches_when_memory_runs_out(place: Path) -> None:
    ended = done("convert", "model", *PLAIN, "--work", "w", cwd=place, prepare=partial(limited, 1))
    assert ended.code == 0, ended.said
    assert "note: memory ran out on cpu: went on with batches of 1 sequences" in ended.said
    found = (place / "m.gguf").read_bytes()
    ended = done("convert", "model", *PLAIN, "--force", cwd=place, prepare=partial(batches_of, 1))
    assert ended.code == 0, ended.said
    assert "note: memory" not in ended.said
    assert (place / "m.gguf").read_bytes() == found


def test_memory_that_is_not_enough(place: Path, expected: bytes) -> None:
    ended = done("convert", "model", *PLAIN, "--work", "w", cwd=place, prepare=partial(limited, 0))
    message = "out of memory on cpu: one sequence of 256 calibration tokens does not fit beside a layer; free some"
    failed(ended, place, message, "--device cpu", work=True)
    goes_on(place, expected)


NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore text.")
PLACES = {
    "solver": (
        partial(raising, NO_MEMORY, "a3q.reduce_layer", "reduce_qk"),
        "layer 0: out of memory on cpu: its",
    ),
    "rounding": (partial(raising, NO_MEMORY, "a3q.quantize", "quantize", 9), "layer 1: out of memory on cpu: its"),
    "host": (
        partial(raising, MemoryError(), "a3q.reduce_layer", "OutputFit", 4),
        "layer 1: out of memory on cpu: its moments and solvers do not fit",
    ),
    "elsewhere": (
        partial(raising, NO_MEMORY, "a3q.reduce", "to_device", 1),
        "a3q: out of memory: CUDA out of memory. Tried to allocate 2.00 GiB.; free some memory, or use --device cpu",
    ),
}


@pytest.mark.parametrize("name", PLACES)
def test_memory_runs_out_elsewhere(place: Path, expected: bytes, name: str) -> None:
    fault, message = PLACES[name]
    failed(done("convert", "model", *PLAIN, "--work", "w", cwd=place, prepare=fault), place, message, work=True)
    goes_on(place, expected)


class Allocations(TorchDispatchMode):
    """Counts the operations that need memory, of which one fails."""

    def __init__(self, fails: int | None) -> None:
        super().__init__()
        self.fails, self.seen = fails, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        in_place = func._schema.name.endswith("_") or "out" in (kwargs or {})
        if not in_place and not func.is_view:
            self.seen += 1
            if self.seen == self.fails:
                raise torch.OutOfMemoryError("no memory")
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    folder = tmp_path_factory.mktemp("tiny")
    size: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    kinds: tuple[Kind, ...] = ("llama", "gpt_neox")
    return {kind: open_huggingface(write_model(folder / kind, kind, **size)) for kind in kinds}


@pytest.mark.parametrize(
    ("kind", "method", "rounds"), [("llama", "a3q", True), ("llama", "paper", False), ("gpt_neox", "a3q", False)]
)
def test_no_batch_counts_twice(
    tiny: dict[str, Model], monkeypatch: pytest.MonkeyPatch, kind: str, method: str, rounds: bool
) -> None:
    """Wherever inside a batch memory runs out, the result is that of smaller batches."""
    model = tiny[kind]
    (shape,) = model.config.layers
    dimensions = [Dimensions(shape.qk_head_dim - 2, shape.v_head_dim - 2, 32)]
    tokens = torch.randint(2, 512, (4, 16), generator=torch.Generator().manual_seed(0))
    # All is measured that rounding needs; rounding itself would make much of the last bits.
    quantization = Quantization([{"gate": GRIDS["q8_0"]}]) if rounds else None
    monkeypatch.setattr(LayerRounding, "apply", lambda *_: None)
    monkeypatch.setattr("a3q.batching.batch_size", lambda *_: 2)
    monkeypatch.setattr("a3q.batching.gc.collect", lambda: 0)
    really = Batches.each

    def each(batches: Batches, count: int, work: Callable[[slice], None]) -> None:
        def watched(part: slice) -> None:
            with mode if part.start == 0 else nullcontext():
                work(part)

        really(batches, count, watched)

    monkeypatch.setattr(Batches, "each", each)

    def run() -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
        found = reduce(model, tokens, dimensions, CPU, 1 << 30, Method(method, "shared"), quantization=quantization)
        return found.model.layers[0], found.notes

    mode = Allocations(None)
    run()  # Frequencies are computed once.
    mode = Allocations(None)
    expected, notes = run()
    assert notes == ()
    total = mode.seen
    assert total > 50
    for fails in range(1, total + 1):
        mode = Allocations(fails)
        found, notes = run()
        assert notes == ("memory ran out on cpu: went on with batches of 1 sequences",)
        for role, weight in expected.items():
            apart = (found[role] - weight).norm() / weight.norm()
            assert apart < 1e-4, f"{role}: {apart:.1e} where operation {fails} of {total} failed"


# Activations that are no numbers


def spoiled(place: Path, name: str, factor: float) -> None:
    """Multiply a weight."""
    for shard in shards(place):
        weights = load_file(shard)
        if name in weights:
            weights[name] *= factor
            save_file(weights, shard, metadata={"format": "pt"})
            return
    raise AssertionError(name)


SPOILED = {
    "model.layers.1.mlp.up_proj.weight": "layer 1: the MLP's inner activations",
    "model.layers.2.self_attn.q_proj.weight": "layer 2: the queries",
    "model.layers.2.self_attn.v_proj.weight": "layer 2: the values",
    "model.layers.3.input_layernorm.weight": "layer 3: the attention's input",
}


@pytest.mark.parametrize("name", SPOILED)
def test_numbers_that_overflow(place: Path, name: str) -> None:
    spoiled(place, name, 1e30)
    ended = done("convert", "model", *PLAIN, "--work", "w", cwd=place)
    failed(ended, place, f"model: {SPOILED[name]} ", "values that are no numbers (NaN or infinite)", work=True)


UNTOUCHED: list[tuple[object, ...]] = [
    ("convert", "model", *PLAIN, "--quant", "f16", "--kv-ratio", 0.25),
    ("reduce", "model", *PLAIN[:-4], "--method", "paper", "--components", "ov", "-o", "m"),
]


@pytest.mark.parametrize("command", UNTOUCHED, ids=lambda command: command[0])
def test_numbers_that_overflow_where_nothing_is_reduced(place: Path, command: tuple[object, ...]) -> None:
    spoiled(place, "model.layers.1.mlp.up_proj.weight", 1e30)
    spoiled(place, "model.layers.1.mlp.down_proj.weight", 1e30)
    ended = done(*command, cwd=place)
    failed(ended, place, "model: layer 1: the MLP's output hold", "values that are no numbers")


# The user, or the system, ends it

MOMENTS = {
    "hash": ("a3q.to_gguf", "hash_source", 1),
    "calibration": ("a3q.pipeline", "calibrate", 1),
    "layer": ("a3q.reduce_layer", "_fit_mlp", 3),
    "store": ("a3q.store", "write_tensors", 3),
    "write": ("converters.gguf_writer", "write_at", 15),
    "end": ("converters.gguf_writer", "sync_and_hash", 1),
}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", MOMENTS)
def test_ended_from_outside(place: Path, expected: bytes, moment: str, number: signal.Signals) -> None:
    here = place.with_name("here")
    fault = partial(waiting, here, *MOMENTS[moment])
    work = () if moment == "write" else ("--work", "w")
    process = start("convert", "model", *PLAIN, *work, cwd=place, prepare=fault)
    while not here.exists():
        assert process.running(0.02)
    process.send(number)
    message = "the same command goes on after the last finished layer, which w keeps" if work else "nothing was written"
    kept = bool(work) and moment != "hash"
    failed(process.ended(), place, f"stopped; {message}", code=130, work=kept)
    goes_on(place, expected)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_process_of_its_own(place: Path, expected: bytes, number: signal.Signals) -> None:
    """As a shell starts it, at a moment of chance."""
    arguments = ["convert", "model", *map(str, PLAIN), "--work", "w"]
    for _ in range(10):
        process = subprocess.Popen(
            [sys.executable, "-m", "a3q", *arguments],
            cwd=place,
            # Whoever waits for the moment comes first on a busy machine.
            preexec_fn=partial(os.nice, 19),
            text=True,
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        while not (place / "w" / "calibration.safetensors").exists():
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(number)
        out, said = process.communicate(timeout=60)
        if process.returncode != 0:
            break
        # On a busy machine it was done before the signal was sent.
        (place / "m.gguf").unlink()
        shutil.rmtree(place / "w")
    failed(Ended(process.returncode, said), place, "stopped; the same command goes on", code=130, work=True)
    assert out == ""
    goes_on(place, expected)


# Threads beside the work of a GPU


def test_threads_change_nothing(place: Path, expected: bytes) -> None:
    ended = done("convert", "model", *PLAIN, cwd=place, prepare=beside)
    assert ended.code == 0, ended.said
    assert (place / "m.gguf").read_bytes() == expected


BROKEN = {
    "reader": partial(raising, InputError("the reader broke"), "converters.hf_weights", "Stored.read", 25),
    "writer": partial(raising, InputError("the writer broke"), "converters.gguf_writer", "GGUFStream.write_layer", 2),
    "writer of the last": partial(
        raising, InputError("the writer broke"), "converters.gguf_writer", "GGUFStream.write_layer", 4
    ),
    "store": partial(raising, InputError("the store broke"), "a3q.store", "LayerStore.append", 3),
}


@pytest.mark.parametrize("name", BROKEN)
def test_errors_in_threads(place: Path, expected: bytes, name: str) -> None:
    fault = partial(both, beside, BROKEN[name])
    ended = done("convert", "model", *PLAIN, "--work", "w", cwd=place, prepare=fault)
    failed(ended, place, f"a3q: the {name.split()[0]} broke", work=True)
    goes_on(place, expected)


def test_a_caller_is_told(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The note about smaller batches is in the result."""
    monkeypatch.chdir(place)
    really = a3q.reduce.Batches.each
    halved: list[int] = []

    def each(batches: Batches, count: int, work: Callable[[slice], None]) -> None:
        def watched(part: slice) -> None:
            if part.stop - part.start > 2:
                halved.append(part.stop)
                raise MemoryError
            work(part)

        really(batches, count, watched)

    monkeypatch.setattr(Batches, "each", each)
    result = convert("model", quant="f16", calib="text.txt", calib_tokens=1024, device="cpu", verify_file=False)
    assert "memory ran out on cpu: went on with batches of 2 sequences" in result.notes
    assert halved
