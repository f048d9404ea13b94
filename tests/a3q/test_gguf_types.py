"""Which types a file's tensors get and what of them is rounded in the calibration pass, before any of it is done."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gguf.constants import GGMLQuantizationType

from a3q.errors import InputError
from a3q.gguf_types import TypeRequest, TypeSettler
from a3q.model import Model
from a3q.settings import parse_size
from a3q.solve.grid import GRIDS
from converters import ggml_encode
from converters.budget import Limit
from converters.gguf_writer import header_size
from converters.hf_reader import open_huggingface
from converters.types import resolve_quant
from tests.pico import Kind, write_model

T = GGMLQuantizationType


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return pico(tmp_path_factory.mktemp("types") / "llama", tied=False)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return pico(tmp_path_factory.mktemp("types") / "tied", tied=True)


def pico(folder: Path, kind: Kind = "llama", **options: Any) -> Model:
    return open_huggingface(write_model(folder, kind, hidden_size=256, intermediate_size=512, **options))


def request(quant: str, output: str | None = None, embed: str | None = None, **options: Any) -> TypeRequest:
    return TypeRequest(resolve_quant(quant).with_overrides(output, embed), **options)


def settler(model: Model, asked: TypeRequest, reducing: bool = False) -> TypeSettler:
    return TypeSettler(model, asked, reducing, header_size)


def settled(model: Model, asked: TypeRequest, calibrated: bool = True) -> TypeSettler:
    """Types for the dimensions that the model has; nothing of the calibration is looked at without a limit."""
    found = settler(model, asked)
    some: Any = object()
    found(model.config, some if calibrated else None)
    return found


# What is asked


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("80MB", 80_000_000), ("80mb", 80_000_000), ("80 M", 80_000_000), ("1.5GiB", 3 << 29), ("1.5G", 1_500_000_000),
        ("12345", 12345), ("12345B", 12345), ("2kib", 2048), (".5k", 500), (" 7 KB ", 7000), ("3Mi", 3 << 20),
    ],
)  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert parse_size("--size", text) == size


@pytest.mark.parametrize("text", ["", "MB", "-5MB", "1e6", "1,5GB", "80 TB", "80 ib", "80i", "nan", "1.2.3k", "8 0"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(InputError, match=rf"^--size {re.escape(text)}: give a size such as 80MB or 1\.5GiB$"):
        parse_size("--size", text)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (request("q4_0", quantizer="awq"), "--quantizer awq: give gptq, rtn, plain"),
        (request("q4_0", limit=Limit(bits=0.0)), "--bits 0 bits per weight: give a positive size"),
        (request("q4_0", limit=Limit(bits=float("nan"))), "--bits nan bits per weight: give a positive size"),
        (request("q4_0", limit=Limit(bits=float("inf"))), "--bits inf bits per weight: give a positive size"),
        (request("q4_0", limit=Limit(size=0)), "--size 0 MB: give a positive size"),
        (request("q4_0", limit=Limit(size=10**6), strict=True), "--bits and --size choose .* leave out --strict"),
        (request("q4_0", "q8_0", limit=Limit(bits=4.0)), "--bits and --size choose .* --output-tensor-type"),
        (request("q4_0", None, "q8_0", limit=Limit(bits=4.0)), "--bits and --size choose .* --token-embedding-type"),
    ],
)
def test_what_cannot_be_asked(asked: TypeRequest, message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}"):
        asked.check()


def test_rtn_needs_ggml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ggml_encode, "available", lambda: False)
    for quantizer in (None, "gptq", "plain"):
        request("q4_k_m", quantizer=quantizer).check()
    with pytest.raises(InputError, match=r'^--quantizer rtn .* take --quantizer gptq, or pip install "a3q\[verify\]"$'):
        request("q4_k_m", quantizer="rtn").check()


@pytest.mark.parametrize(
    ("quant", "options", "needed"),
    [
        ("4bit", {}, True),
        ("6bit", {}, True),
        ("8bit", {}, False),
        ("f16", {}, False),
        ("8bit", {"quantizer": "gptq"}, True),
        ("8bit", {"quantizer": "rtn"}, True),
        ("2bit", {"quantizer": "plain"}, False),
        ("f16", {"limit": Limit(bits=8.5)}, True),
        ("2bit", {"quantizer": "plain", "limit": Limit(bits=8.5)}, True),
        ("8bit", {"embed": "q4_0"}, True),
        ("f16", {"quantizer": "gptq"}, False),
        ("bf16", {"quantizer": "gptq", "output": "q8_0"}, True),
    ],
)
def test_who_needs_calibration(llama: Model, quant: str, options: dict[str, Any], needed: bool) -> None:
    assert settler(llama, request(quant, **options)).needs_calibration == needed


# What is rounded in the pass


def test_layers_and_what_is_coarse_outside_them(llama: Model) -> None:
    found = settled(llama, request("q4_k_m")).settled
    assert found is not None and found.quantization is not None
    assert found.quantizer == "gptq"
    for layer in found.quantization.layers:
        assert layer.keys() == {"q", "k", "v", "o", "gate", "up", "down"}
        assert {layer[role].name for role in ("q", "k", "o", "gate", "up")} == {"q4_k"}
    assert [layer["v"].name for layer in found.quantization.layers] == ["q4_k", "q6_k"]
    # The layers are fitted to the embedding that the file will have; six bits of the output round next to nothing.
    assert found.quantization.top == {"embed": GRIDS["q4_k"]}
    assert found.types.kinds["output.weight"] is T.Q6_K
    assert found.rounded
    assert found.quantization.nearest is None


def test_a_tied_embedding_of_six_bits_is_left(tied: Model) -> None:
    found = settled(tied, request("q4_k_m")).settled
    assert found is not None and found.quantization is not None
    assert found.quantization.top == {}
    assert found.types.kinds["token_embd.weight"] is T.Q6_K
    assert found.rounded


@pytest.mark.parametrize(
    ("which", "output", "embed", "top"),
    [
        ("llama", "q4_0", None, {"embed": "q5_0", "output": "q4_0"}),
        ("llama", None, "q3_k", {"embed": "q3_k"}),
        ("llama", "q5_k", "q8_0", {"embed": "q8_0", "output": "q5_k"}),
        ("llama", "f16", "bf16", {}),
        ("tied", "q4_0", None, {"embed": "q4_0"}),
        ("tied", None, "q4_1", {"embed": "q4_1"}),
        ("tied", "q4_0", "iq4_nl", {"embed": "iq4_nl"}),
    ],
)
def test_ends_as_the_user_wants_them(
    request: pytest.FixtureRequest, which: str, output: str | None, embed: str | None, top: dict[str, str]
) -> None:
    asked = TypeRequest(resolve_quant("q5_0").with_overrides(output, embed))
    found = settled(request.getfixturevalue(which), asked).settled
    assert found is not None and found.quantization is not None
    assert {role: grid.name for role, grid in found.quantization.top.items()} == top
    assert found.rounded


def test_one_matrix_that_the_file_holds_twice(tmp_path: Path) -> None:
    """llama.cpp's olmo2 has an output of its own: two grids for what is one matrix in memory."""
    found = settled(pico(tmp_path / "olmo2", "olmo2", tied=True), request("q4_0")).settled
    assert found is not None and found.quantization is not None
    assert (found.types.kinds["token_embd.weight"], found.types.kinds["output.weight"]) == (T.Q4_0, T.Q6_K)
    assert found.quantization.top == {}
    assert not found.rounded


def test_parts_of_a_fused_tensor_share_its_grid(tmp_path: Path) -> None:
    found = settled(pico(tmp_path / "neox", "gpt_neox"), request("q3_k_m")).settled
    assert found is not None and found.quantization is not None
    for i, layer in enumerate(found.quantization.layers):
        kind = found.types.kinds[f"blk.{i}.attn_qkv.weight"].name.lower()
        assert {layer[role].name for role in ("q", "k", "v")} == {kind} == {"q5_k"}


@pytest.mark.parametrize(
    ("options", "calibrated"),
    [
        ({"quantizer": "plain"}, True),
        ({}, False),
        ({"quant": "f16"}, True),
        ({"quant": "f16", "quantizer": "gptq"}, True),
    ],
)
def test_nothing_to_round(llama: Model, options: dict[str, Any], calibrated: bool) -> None:
    found = settled(llama, request(**({"quant": "q4_0"} | options)), calibrated).settled
    assert found is not None
    assert (found.quantizer, found.quantization, found.rounded) == ("plain", None, False)


def test_rtn_is_ggmls(llama: Model) -> None:
    if not ggml_encode.available():
        pytest.skip("llama.cpp is not installed")
    found = settled(llama, request("q4_0", quantizer="rtn")).settled
    assert found is not None and found.quantization is not None
    assert found.quantizer == "rtn"
    assert found.quantization.nearest is not None


def test_types_are_settled_for_the_reduced_dimensions(llama: Model) -> None:
    shapes = [
        replace(shape, intermediate_size=size) for shape, size in zip(llama.config.layers, (256, 288), strict=True)
    ]
    one = settler(llama, request("q4_k_m"), reducing=True)
    some: Any = object()
    one(replace(llama.config, layers=tuple(shapes)), some)
    assert one.settled is not None
    kinds = one.settled.types.kinds
    assert kinds["blk.0.ffn_down.weight"] is T.Q4_K
    assert kinds["blk.1.ffn_down.weight"] not in (T.Q4_K, T.Q6_K)
    [note] = one.settled.types.notes
    assert re.fullmatch(
        r"ffn_down \(1 tensor\): rows of 288 do not divide into Q6_K's super-blocks of 256; stored as \w+, "
        r"\d\.\d\d bits per weight instead of 6\.56",
        note,
    )
    assert one.settled.quantization is not None
    assert one.settled.quantization.layers[1]["down"].block == 32


def test_strict_refuses(llama: Model, tmp_path: Path) -> None:
    settled(llama, request("q4_k_m", strict=True))
    small = open_huggingface(write_model(tmp_path / "small"))
    with pytest.raises(
        InputError, match=r"^--strict: q4_k_m does not fit .* or choose a type that fits: .*q4_0"
    ) as caught:
        settled(small, request("q4_k_m", strict=True))
    assert "\n" not in str(caught.value)
