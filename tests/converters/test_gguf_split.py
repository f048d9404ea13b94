"""A GGUF in several files: as llama.cpp's own splitter makes it, and never half in place."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFValueType

from a3q import runtime
from a3q.errors import InputError
from a3q.model import Layer, Model
from converters import gguf_split
from converters.draft import write_at
from converters.entries import Entry
from converters.gguf_reader import open_gguf
from converters.gguf_split import SMALLEST, existing, names, place, plan
from converters.gguf_writer import check_output, write_gguf
from converters.hf_reader import open_huggingface
from converters.tensors import LazyLayers
from converters.types import resolve_quant
from tests import pico

F16 = resolve_quant("f16")
LIMIT = 1_300_000


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """4.5 MB as F16, so large that the smallest limit splits it."""
    folder = tmp_path_factory.mktemp("split") / "pico-llama"
    return open_huggingface(pico.write_model(folder, hidden_size=256, intermediate_size=1024))


@pytest.fixture(scope="module")
def whole(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(model, F16, tmp_path_factory.mktemp("whole") / "m.gguf").path


@pytest.fixture(scope="module")
def shards(model: Model, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    return write_gguf(model, F16, tmp_path_factory.mktemp("shards") / "m.gguf", split_max_size=LIMIT).files


def listing(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def contents(paths: Iterator[Path] | tuple[Path, ...]) -> list[tuple[str, int, bytes]]:
    return [(t.name, t.tensor_type, t.data.tobytes()) for path in paths for t in gguf.GGUFReader(path).tensors]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([40, 60], [[40, 60]]),
        ([40, 61], [[40], [61]]),
        ([50, 50, 50], [[50, 50], [50]]),
        ([500, 10, 500, 500, 10, 10], [[500], [10], [500], [500], [10, 10]]),
    ],
)
def test_plan(sizes: list[int], expected: list[list[int]]) -> None:
    tensors = [Entry(f"t{i}", (), (1,), None) for i in range(len(sizes))]
    by_name = dict(zip((tensor.name for tensor in tensors), sizes, strict=True))
    planned = plan(tensors, by_name, 100)
    assert [[by_name[tensor.name] for tensor in shard] for shard in planned] == expected
    assert [tensor for shard in planned for tensor in shard] == tensors


def test_as_many_shards_as_their_count_can_say() -> None:
    tensors = [Entry(f"t{i}", (), (1,), None) for i in range(0x10000)]
    sizes = {tensor.name: 100 for tensor in tensors}
    assert len(plan(tensors[:-1], sizes, 100)) == 0xFFFF
    with pytest.raises(InputError, match=r"--split-max-size: 100 bytes makes 65,536 files.*larger"):
        plan(tensors, sizes, 100)


@pytest.mark.parametrize("limit", [-1, 0, 4, SMALLEST - 1])
def test_limits_that_make_no_sense(model: Model, tmp_path: Path, limit: int) -> None:
    with pytest.raises(InputError, match=r"--split-max-size: .* too small .* 1M or more"):
        write_gguf(model, F16, tmp_path / "m.gguf", split_max_size=limit)
    assert not list(tmp_path.iterdir())


def test_names() -> None:
    assert names(Path("a/m.v2.gguf"), 2) == ["m.v2-00001-of-00002.gguf", "m.v2-00002-of-00002.gguf"]
    assert names(Path("m.v2"), 1) == ["m.v2-00001-of-00001.gguf"]


def test_shards(model: Model, whole: Path, tmp_path: Path) -> None:
    loads: list[int] = []
    calls: list[tuple[int, int]] = []

    def load(i: int) -> Layer:
        loads.append(i)
        return model.layers[i]

    written = write_gguf(
        replace(model, layers=LazyLayers(len(model.layers), load)),
        F16,
        tmp_path / "m.gguf",
        progress=lambda *at: calls.append(at),
        split_max_size=LIMIT,
    )
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == [f"m-0000{i}-of-00005.gguf" for i in (1, 2, 3, 4, 5)]
    assert written.files == tuple(files)
    assert written.path == files[0]
    assert written.size == sum(file.stat().st_size for file in files)
    assert written.sha256 == tuple(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)
    assert loads == [0, 1]
    assert contents(iter(files)) == contents((whole,))
    bytes_in_all = sum(int(t.n_bytes) for t in gguf.GGUFReader(whole).tensors)
    assert calls[-1] == (bytes_in_all, bytes_in_all)
    assert calls == sorted(calls)

    readers = [gguf.GGUFReader(file) for file in files]
    sizes = [[-(-int(t.n_bytes) // 32) * 32 for t in reader.tensors] for reader in readers]
    for this, following in pairwise(sizes):
        assert sum(this) <= LIMIT < sum(this) + following[0]
    original = gguf.GGUFReader(whole)
    for i, reader in enumerate(readers):
        found = {key: (f.types, f.contents()) for key, f in reader.fields.items() if not key.startswith("GGUF.")}
        said = {
            "split.no": ([GGUFValueType.UINT16], i),
            "split.count": ([GGUFValueType.UINT16], 5),
            "split.tensors.count": ([GGUFValueType.INT32], len(original.tensors)),
        }
        if i == 0:
            said |= {k: (f.types, f.contents()) for k, f in original.fields.items() if not k.startswith("GGUF.")}
        assert found == said


def test_reads_as_the_unsplit_file(whole: Path, shards: tuple[Path, ...]) -> None:
    mine, theirs = open_gguf(shards[0]), open_gguf(whole)
    assert mine.config == theirs.config
    assert mine.metadata == theirs.metadata
    assert mine.source.weight_files == shards
    for one, other in zip([mine.top, *mine.layers], [theirs.top, *theirs.layers], strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[role], other[role]) for role in one)


@pytest.mark.parametrize("limit", [SMALLEST, 1 << 30])
def test_runs_as_the_unsplit_file(model: Model, whole: Path, tmp_path: Path, limit: int) -> None:
    if not runtime.available():
        pytest.skip("llama-cpp-python is not installed")
    written = write_gguf(model, F16, tmp_path / "m.gguf", split_max_size=limit)
    tokens = np.random.default_rng(0).integers(2, pico.VOCAB, 40).tolist()
    logits = []
    for path in (whole, written.path):
        with runtime.LlamaRuntime(path, 64, 1) as loaded:
            logits.append(loaded.logits(tokens))
    np.testing.assert_array_equal(logits[1], logits[0])
    assert np.ptp(logits[0]) > 1


def test_one_shard_is_marked_too(model: Model, whole: Path, tmp_path: Path) -> None:
    written = write_gguf(model, F16, tmp_path / "m.gguf", split_max_size=1 << 30)
    assert [file.name for file in tmp_path.iterdir()] == ["m-00001-of-00001.gguf"]
    assert gguf.GGUFReader(written.path).fields["split.count"].contents() == 1
    assert torch.equal(open_gguf(written.path).layers[1]["down"], open_gguf(whole).layers[1]["down"])
    assert contents(written.files) == contents((whole,))


def test_a_tensor_above_the_limit_is_alone(model: Model, tmp_path: Path) -> None:
    written = write_gguf(model, resolve_quant("f32"), tmp_path / "m.gguf", split_max_size=SMALLEST)
    sizes = [[int(t.n_bytes) for t in gguf.GGUFReader(file).tensors] for file in written.files]
    assert sizes.count([1 << 20]) == 6  # gate, up and down of two layers
    assert all(len(shard) == 1 or sum(shard) <= SMALLEST for shard in sizes)


def test_padding_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_split, "SMALLEST", 1)
    model = open_huggingface(pico.write_model(tmp_path / "m", bias=True, head_dim=6))
    path = write_gguf(model, F16, tmp_path / "m.gguf").path
    sizes = [int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors]
    padded = sum(-(-size // 32) * 32 for size in sizes)
    assert sum(sizes) < padded
    for limit, count in ((padded, 1), (padded - 1, 2)):
        assert len(write_gguf(model, F16, path, split_max_size=limit).files) == count


SPLITTER = os.environ.get("A3Q_LLAMA_GGUF_SPLIT")


@pytest.mark.skipif(SPLITTER is None, reason="A3Q_LLAMA_GGUF_SPLIT does not name llama.cpp's llama-gguf-split")
@pytest.mark.parametrize("quant", ["f16", "q4_0"])
@pytest.mark.parametrize("limit", [1, 2, 1000])
def test_against_llama_gguf_split_itself(model: Model, tmp_path: Path, quant: str, limit: int) -> None:
    """The same bytes in the same files; and it merges ours."""
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    mine.mkdir()
    theirs.mkdir()
    whole = write_gguf(model, resolve_quant(quant), tmp_path / "m.gguf").path
    written = write_gguf(model, resolve_quant(quant), mine / "m.gguf", split_max_size=limit * 10**6)
    split = [str(SPLITTER), "--split", "--split-max-size", f"{limit}M", whole, theirs / "m"]
    subprocess.run(split, capture_output=True, check=True)
    assert listing(mine) == listing(theirs)
    merged = tmp_path / "merged.gguf"
    subprocess.run([str(SPLITTER), "--merge", written.path, merged], capture_output=True, check=True)
    assert contents((merged,)) == contents((whole,))
    assert open_gguf(merged).metadata == open_gguf(whole).metadata


def test_existing_shards(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    for other in ("m.gguf", "m-1-of-2.gguf", "mm-00001-of-00002.gguf", "m-x-00001-of-00002.gguf", "m-00001-of-00002"):
        (tmp_path / other).write_text("other")
    check_output(path, split=True)
    (tmp_path / "m-00002-of-00003.gguf").write_text("precious")
    with pytest.raises(InputError, match=r"m-00002-of-00003\.gguf: exists already; use --force"):
        check_output(path, split=True)
    check_output(path, force=True, split=True)
    path.unlink()
    check_output(path)


def test_old_shards_are_replaced(model: Model, shards: tuple[Path, ...], tmp_path: Path) -> None:
    kept = ["m-x-00001-of-00002.gguf", "m.gguf"]
    old = [name for count in (2, 5, 6) for name in names(tmp_path / "m.gguf", count)]
    for name in kept + old:
        (tmp_path / name).write_text("old")
    written = write_gguf(model, F16, tmp_path / "m.gguf", split_max_size=LIMIT)
    found = listing(tmp_path)
    assert [found.pop(name) for name in kept] == [b"old", b"old"]
    assert found == {file.name: file.read_bytes() for file in shards}
    assert sorted(found) == [file.name for file in written.files]


FAILURES: list[tuple[BaseException, type[BaseException], str]] = [
    (OSError(errno.ENOSPC, "No space left on device"), InputError, r"m\.gguf: disk full: [\d,]+ bytes are needed"),
    (OSError("4096 requested and 0 written"), InputError, r"m\.gguf: disk full"),
    (OSError(errno.EIO, "Input/output error"), InputError, r"m\.gguf: cannot be written: Input/output error"),
    (KeyboardInterrupt("stop"), KeyboardInterrupt, "stop"),
]


@pytest.mark.parametrize(("raised", "expected", "part"), FAILURES)
@pytest.mark.parametrize("where", ["tensor", "read", "place"])
def test_failures_leave_what_was_there(
    model: Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    raised: BaseException,
    expected: type[BaseException],
    part: str,
) -> None:
    """Whether they come in a later shard's tensors, when all is read back, or between two moves into place."""
    for count in (3, 5):
        for name in names(tmp_path / "m.gguf", count):
            (tmp_path / name).write_text(name)
    before = listing(tmp_path)
    calls = 0

    def failing(original: Any, at: int) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at:
                raise raised
            return original(*args, **options)

        return call

    if where == "tensor":
        monkeypatch.setattr("converters.gguf_writer.write_at", failing(write_at, 15))
    elif where == "read":
        monkeypatch.setattr("converters.gguf_writer.check_gguf", failing(None, 1))
    else:
        monkeypatch.setattr(Path, "replace", failing(Path.replace, 8))
    with pytest.raises(expected, match=part):
        write_gguf(model, F16, tmp_path / "m.gguf", split_max_size=LIMIT)
    assert calls >= 1
    assert listing(tmp_path) == before


def test_no_room(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 2_000_000))
    with pytest.raises(InputError, match=r"disk full: [\d,]{9,} bytes are needed and 2,000,000 are free"):
        write_gguf(model, F16, tmp_path / "m.gguf", split_max_size=SMALLEST)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("counts", [(), (3,), (2, 3, 4)])
def test_placing_never_mixes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counts: tuple[int, ...]) -> None:
    """Wherever the process is killed, a first shard that stands there has its own others, old or new."""
    path = tmp_path / "m.gguf"
    for count in counts:
        for name in names(path, count):
            (tmp_path / name).write_text("old")
    folder = tmp_path / "parts"
    folder.mkdir()
    parts = [folder / name for name in names(path, 3)]
    for part in parts:
        part.write_text("new")

    def check() -> None:
        for count in (2, 3, 4):
            files = [tmp_path / name for name in names(path, count)]
            if files[0].exists():
                assert {file.read_text() for file in files if file.exists()} == {files[0].read_text()}
                assert all(file.exists() for file in files)

    moves = 0

    def watched(original: Any) -> Any:
        def call(self: Path, *args: Any) -> Any:
            nonlocal moves
            moves += 1
            done = original(self, *args)
            check()
            return done

        return call

    monkeypatch.setattr(Path, "replace", watched(Path.replace))
    monkeypatch.setattr(Path, "unlink", watched(Path.unlink))
    files = place(parts, path)
    assert moves == 3 + sum(counts)
    assert [file.read_text() for file in files] == ["new"] * 3
    assert existing(path) == list(files)


@pytest.mark.parametrize("stop", range(1, 7))
@pytest.mark.parametrize("done", [False, True])
def test_interrupted_placing_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int, done: bool) -> None:
    """At every one of the moves, before or just after it."""
    path = tmp_path / "m.gguf"
    for count in (2, 3):
        for name in names(path, count):
            (tmp_path / name).write_text(f"old {name}")
    folder = tmp_path / "parts"
    folder.mkdir()
    parts = [folder / name for name in names(path, 3)]
    for part in parts:
        part.write_text("new")
    before = {file: file.read_text() for file in existing(path)}
    original, calls = Path.replace, 0

    def move(self: Path, target: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls != stop or done:
            original(self, target)
        if calls == stop:
            raise KeyboardInterrupt
        return target

    monkeypatch.setattr(Path, "replace", move)
    with pytest.raises(KeyboardInterrupt):
        place(parts, path)
    assert {file: file.read_text() for file in existing(path)} == before
    assert [part.read_text() for part in parts] == ["new"] * 3
