"""A GGUF written as layers become ready: the same bytes in any order, all room taken at once, nothing left behind."""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFValueType, quants
from gguf.constants import GGMLQuantizationType
from gguf.gguf_writer import GGUFValue

from a3q.errors import InputError, VerifyError
from a3q.model import LayerShape, Model
from converters.draft import allocate, write_at
from converters.gguf_reader import open_gguf
from converters.gguf_writer import GGUFStream, WrittenFile, write_gguf
from converters.hf_reader import open_huggingface
from converters.types import resolve_quant
from tests import pico

F16 = resolve_quant("f16")
LIMIT = 1_000_000
SAID = {"a3q.source": GGUFValue("here", GGUFValueType.STRING)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """4.5 MB as F16, so large that it can be split; with biases, whose ends need padding, and RoPE factors."""
    folder = tmp_path_factory.mktemp("stream") / "pico-llama"
    options: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 1024, "head_dim": 18, "bias": True}
    return open_huggingface(pico.write_model(folder, rope=pico.LLAMA3_ROPE, **options))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return open_huggingface(pico.write_model(tmp_path_factory.mktemp("stream") / "pico-small"))


def listing(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def backwards(stream: GGUFStream, model: Model) -> WrittenFile:
    """Last layer first, what is outside the layers at the end."""
    for i in reversed(range(len(model.layers))):
        stream.write_layer(i, model.layers[i])
    stream.write_top(model)
    return stream.finish(model)


@pytest.mark.parametrize("limit", [None, LIMIT])
@pytest.mark.parametrize("quant", ["f32", "f16", "bf16", "q8_0", "q4_0"])
def test_order_does_not_matter(model: Model, tmp_path: Path, quant: str, limit: int | None) -> None:
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    mine.mkdir()
    theirs.mkdir()
    options: dict[str, Any] = {"name": "Tiny", "provenance": SAID, "split_max_size": limit}
    expected = write_gguf(model, resolve_quant(quant), theirs / "m.gguf", **options)
    with GGUFStream(model, resolve_quant(quant), mine / "m.gguf", **options) as stream:
        assert stream.written == 0
        size, total = stream.size, stream.total
        [folder] = mine.iterdir()
        # The room is taken before the first layer is there.
        assert sum(file.stat().st_size for file in folder.iterdir()) == size
        written = backwards(stream, model)
        assert (stream.size, stream.written, stream.total) == (size, total, total)
    assert listing(mine) == listing(theirs)
    assert sum(file.stat().st_size for file in mine.iterdir()) == size == written.size
    files = tuple(mine / file.name for file in expected.files)
    assert written == replace(expected, path=files[0], files=files)
    assert len(files) == 1 if limit is None else len(files) > 1


def test_layers_may_come_from_another_thread(model: Model, tmp_path: Path) -> None:
    expected = write_gguf(model, F16, tmp_path / "one.gguf", name="Tiny").path.read_bytes()

    def write(i: int) -> None:
        with torch.inference_mode():
            layer = {role: weight.clone() for role, weight in model.layers[i].items()}
        stream.write_layer(i, layer)

    with GGUFStream(model, F16, tmp_path / "m.gguf", name="Tiny") as stream, ThreadPoolExecutor(1) as pool:
        list(pool.map(write, range(len(model.layers))))
        stream.write_top(model)
        assert stream.finish(model).path.read_bytes() == expected


def test_a_layer_written_again_counts_once(small: Model, tmp_path: Path) -> None:
    with GGUFStream(small, F16, tmp_path / "m.gguf") as stream:
        stream.write_layer(0, {role: torch.zeros_like(weight) for role, weight in small.layers[0].items()})
        before = stream.written
        stream.write_layer(0, small.layers[0])
        assert 0 < stream.written == before < stream.total
        path = backwards(stream, small).path
    assert path.read_bytes() == write_gguf(small, F16, tmp_path / "m.gguf").path.read_bytes()


def test_encoded_before(small: Model, tmp_path: Path) -> None:
    """Tensors are written from what was encoded, and their weights need not be there."""
    kind = GGMLQuantizationType.Q4_0
    path = tmp_path / "m.gguf"
    with GGUFStream(small, resolve_quant("q4_0"), path) as stream:
        for i in range(len(small.layers)):
            layer = small.layers[i]
            ready = {role: layer.pop(role) for role in ("q", "k", "v", "o", "down")}
            encoded = {role: quants.quantize(weight.numpy(), kind) for role, weight in ready.items()}
            stream.write_layer(i, layer, encoded.get)
        with pytest.raises(VerifyError, match=r"token_embd.*encoded embed is \[1, 1\]"):
            stream.write_top(small, lambda _: np.zeros((1, 1), np.uint8))
        stream.write_top(small)
        stream.finish(small)
    assert path.read_bytes() == write_gguf(small, resolve_quant("q4_0"), path).path.read_bytes()


CHOSEN = (1.0, 0.31, 0.05, 0.001)
PLAIN = tuple(10000.0 ** (-i / 4) for i in range(4))


@pytest.mark.parametrize("final", [CHOSEN, PLAIN], ids=["chosen", "plain"])
def test_frequencies_come_last(small: Model, tmp_path: Path, final: tuple[float, ...]) -> None:
    """Only their number is known when the file is begun; that they are the plain ones after all is no harm."""
    torch.manual_seed(0)

    def with_frequencies(frequencies: tuple[float, ...]) -> Model:
        shape = LayerShape(8, 8, 64, (frequencies,))
        return replace(small, config=replace(small.config, layers=(shape, shape)))

    planned, done = with_frequencies(small.config.layers[0].frequencies[0][:4]), with_frequencies(final)
    roles = [role for role in small.family.layer if role.name in small.layer_roles]
    shape = done.config.layers[0]
    layers = [{role.name: torch.randn(role.expected_shape(done.config, shape)) for role in roles} for _ in range(2)]
    done = replace(done, layers=layers)
    with GGUFStream(planned, F16, tmp_path / "m.gguf") as stream:
        path = backwards(stream, done).path
    found = open_gguf(path).config.layers[0]
    np.testing.assert_allclose(found.frequencies[0], final, rtol=1e-6)
    if final is CHOSEN:
        assert path.read_bytes() == write_gguf(done, F16, path).path.read_bytes()


def test_what_is_missing_is_named(small: Model, tmp_path: Path) -> None:
    with GGUFStream(small, F16, tmp_path / "m.gguf") as stream:
        stream.write_top(small)
        stream.write_layer(0, small.layers[0])
        with pytest.raises(ValueError, match=r"m\.gguf: tensor blk\.1\..* was not written"):
            stream.finish(small)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("scratch", [None, ".m.gguf.part"])
@pytest.mark.parametrize("raised", [RuntimeError("stop"), KeyboardInterrupt("stop")])
def test_nothing_is_left_behind(small: Model, tmp_path: Path, raised: BaseException, scratch: str | None) -> None:
    path = tmp_path / "m.gguf"
    path.write_text("old")
    folder = None if scratch is None else tmp_path / scratch
    with pytest.raises(type(raised), match="stop"), GGUFStream(small, F16, path, scratch=folder) as stream:
        stream.write_layer(1, small.layers[1])
        assert len(list(tmp_path.iterdir())) == 2
        raise raised
    assert listing(tmp_path) == {"m.gguf": b"old"}


def test_left_over_drafts_are_removed(small: Model, tmp_path: Path) -> None:
    scratch = tmp_path / ".m.gguf.part"
    (scratch / "replaced").mkdir(parents=True)
    for name in ("m.gguf", "other", "replaced/m.gguf"):
        (scratch / name).write_text("left over")
    with GGUFStream(small, F16, tmp_path / "m.gguf", scratch=scratch) as stream:
        assert [file.name for file in scratch.iterdir()] == ["m.gguf"]
        path = backwards(stream, small).path
    assert [file.name for file in tmp_path.iterdir()] == ["m.gguf"]
    assert path.read_bytes() == write_gguf(small, F16, path).path.read_bytes()


def test_scratch_must_not_hold_the_output(small: Model, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    with pytest.raises(ValueError, match="lies in"):
        GGUFStream(small, F16, tmp_path / "m.gguf", scratch=tmp_path)
    assert listing(tmp_path) == {"precious": b"precious"}
    scratch = tmp_path / "precious"
    with pytest.raises(InputError, match="cannot be written"):
        GGUFStream(small, F16, tmp_path / "m.gguf", scratch=scratch)
    assert listing(tmp_path) == {"precious": b"precious"}


@pytest.mark.parametrize("limit", [None, LIMIT])
@pytest.mark.parametrize("scratch", [None, ".m.gguf.part"])
def test_full_disk_shows_at_once(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int | None, scratch: str | None
) -> None:
    calls = 0

    def full(fd: int, offset: int, size: int) -> None:
        nonlocal calls
        calls += 1
        # Split files are made one after another, the last of which finds no room.
        if limit is None or calls == 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    folder = None if scratch is None else tmp_path / scratch
    with pytest.raises(InputError, match=r"m\.gguf: disk full: [\d,]{9,} bytes are needed; make room"):
        GGUFStream(model, F16, tmp_path / "m.gguf", split_max_size=limit, scratch=folder)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("answer", [errno.EOPNOTSUPP, errno.EINVAL, None])
def test_where_room_cannot_be_set_aside(
    small: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: int | None
) -> None:
    expected = write_gguf(small, F16, tmp_path / "m.gguf").path.read_bytes()

    def refuse(*_: int) -> None:
        assert answer is not None
        raise OSError(answer, os.strerror(answer))

    if answer is None:
        monkeypatch.delattr(os, "posix_fallocate")
    else:
        monkeypatch.setattr(os, "posix_fallocate", refuse)
    assert write_gguf(small, F16, tmp_path / "m.gguf").path.read_bytes() == expected


def test_writes_that_stop_short_go_on(small: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = write_gguf(small, F16, tmp_path / "m.gguf").path.read_bytes()
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:1000]))
    assert write_gguf(small, F16, tmp_path / "m.gguf").path.read_bytes() == expected


def test_elements_go_where_they_belong(tmp_path: Path) -> None:
    path = tmp_path / "draft"
    path.write_bytes(b"header")
    allocate(path, 40)
    write_at(path, 32, np.array([[1, 3], [2, 4]], ">i2").T)
    assert path.read_bytes() == b"header" + bytes(26) + bytes((1, 0, 2, 0, 3, 0, 4, 0))


FAILURES: list[tuple[OSError, str]] = [
    (OSError(errno.ENOSPC, "No space left on device"), r"m\.gguf: disk full: [\d,]{7,} bytes are needed; make room"),
    (OSError(errno.EIO, "Input/output error"), r"m\.gguf: cannot be written: Input/output error"),
]


@pytest.mark.parametrize(("raised", "message"), FAILURES)
@pytest.mark.parametrize("where", ["layer", "top", "sync"])
def test_errors_of_the_system(
    small: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, raised: OSError, message: str
) -> None:
    def fail(*_: Any) -> None:
        raise raised

    path = tmp_path / "m.gguf"
    path.write_text("old")
    with GGUFStream(small, F16, path) as stream:
        if where == "sync":
            stream.write_top(small)
            stream.write_layer(0, small.layers[0])
            stream.write_layer(1, small.layers[1])
            monkeypatch.setattr(os, "fsync", fail)
        else:
            monkeypatch.setattr(os, "write", fail)
        with pytest.raises(InputError, match=message):
            if where == "layer":
                stream.write_layer(1, small.layers[1])
            elif where == "top":
                stream.write_top(small)
            else:
                stream.finish(small)
        monkeypatch.undo()
    assert listing(tmp_path) == {"m.gguf": b"old"}


def test_a_model_that_became_another(small: Model, tmp_path: Path) -> None:
    """The final configuration is what the file must read back as."""
    with GGUFStream(small, F16, tmp_path / "m.gguf") as stream:
        with pytest.raises(VerifyError, match=r"attn_q.*the weight is \[8, 64\]"):
            stream.write_layer(0, {**small.layers[0], "q": torch.zeros(8, 64)})
        with pytest.raises(VerifyError, match="dimensions"):
            backwards(stream, replace(small, config=replace(small.config, max_position_embeddings=512)))
    assert not list(tmp_path.iterdir())
