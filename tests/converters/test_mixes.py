"""Types of a file's tensors: llama.cpp's rule, substitutes where rows do not fit, and bytes that come ready."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import quants
from gguf.constants import GGMLQuantizationType, LlamaFileType
from numpy.typing import NDArray

from a3q.errors import InputError, VerifyError
from a3q.model import LayerShape, Model, plain_frequencies
from converters import ggml_encode
from converters.assignment import Types, assign
from converters.entries import Entry, entries
from converters.gguf_target import target_for
from converters.gguf_writer import write_gguf
from converters.hf_reader import open_huggingface
from converters.mixes import MIXES
from converters.types import BITS, block_size, resolve_quant
from tests import pico

T = GGMLQuantizationType

# What `llama-quantize --dry-run` of llama-cpp-python 0.3.36's llama.cpp says of llamas of hidden and MLP
# size 256, by layers and queries per key: the type of attn_v, attn_output and ffn_down in each layer, or in all alike.
DRY_RUN: dict[tuple[int, int], dict[str, tuple[str, str, str]]] = {
    (10, 1): {
        "Q5_K_M": ("6556556566", "5", "6556556566"),
        "Q4_K_M": ("6446446466", "4", "6446446466"),
        "Q4_K_S": ("5555444444", "4", "5444444444"),
        "IQ4_NL": ("n", "n", "5nnnnnnnnn"),
        "Q3_K_L": ("5", "5", "5"),
        "Q3_K_M": ("5544444444", "4", "4"),
        "Q2_K": ("3", "3", "3"),
        "Q2_K_S": ("2", "2", "4222222222"),
    },
    (10, 4): {
        "Q5_K_M": ("6556556566", "5", "6556556566"),
        "Q4_K_M": ("6446446466", "4", "6446446466"),
        "Q4_K_S": ("5555444444", "4", "5444444444"),
        "IQ4_NL": ("5", "n", "5nnnnnnnnn"),
        "Q3_K_L": ("5", "5", "5"),
        "Q3_K_M": ("5544444444", "4", "4"),
        "Q2_K": ("4", "3", "3"),
        "Q2_K_S": ("4", "2", "4222222222"),
    },
    (20, 1): {
        "Q5_K_M": ("66556556556556556666", "5", "66556556556556556666"),
        "Q4_K_M": ("66446446446446446666", "4", "66446446446446446666"),
        "Q4_K_S": ("55554444444444444444", "4", "55444444444444444444"),
        "IQ4_NL": ("n", "n", "55nnnnnnnnnnnnnnnnnn"),
        "Q3_K_L": ("5", "5", "5"),
        "Q3_K_M": ("55444444444444444444", "4", "54444444444444444444"),
        "Q2_K": ("3", "3", "3"),
        "Q2_K_S": ("2", "2", "44222222222222222222"),
    },
    (20, 4): {
        "Q5_K_M": ("66556556556556556666", "5", "66556556556556556666"),
        "Q4_K_M": ("66446446446446446666", "4", "66446446446446446666"),
        "Q4_K_S": ("55554444444444444444", "4", "55444444444444444444"),
        "IQ4_NL": ("5", "n", "55nnnnnnnnnnnnnnnnnn"),
        "Q3_K_L": ("5", "5", "5"),
        "Q3_K_M": ("55444444444444444444", "4", "54444444444444444444"),
        "Q2_K": ("4", "3", "3"),
        "Q2_K_S": ("4", "2", "44222222222222222222"),
    },
}
LETTERS = {T.Q2_K: "2", T.Q3_K: "3", T.Q4_K: "4", T.Q5_K: "5", T.Q6_K: "6", T.IQ4_NL: "n"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return open_huggingface(pico.write_model(tmp_path_factory.mktemp("mixes") / "llama"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return open_huggingface(pico.write_model(tmp_path_factory.mktemp("mixes") / "tied", tied=True))


def sized(model: Model, layers: int = 2, group: int = 2, hidden: int = 256, units: int | list[int] = 256) -> Model:
    """`model` with the dimensions of another, and its own weights: only names and shapes are needed."""
    head, sizes = hidden // 4, units if isinstance(units, list) else [units] * layers
    shapes = tuple(LayerShape(head, head, size, (plain_frequencies(10000.0, head),)) for size in sizes)
    config = replace(model.config, layers=shapes, hidden_size=hidden, num_key_value_heads=4 // group)
    return replace(model, config=config)


def assigned(
    model: Model,
    quant: str,
    error: Callable[[Entry, GGMLQuantizationType], float] | None = None,
    strict: bool = False,
    output_type: str | None = None,
    embed_type: str | None = None,
) -> Types:
    target = target_for(model)
    plan = resolve_quant(quant).with_overrides(output_type, embed_type)
    return assign(plan, entries(model, target), model.config, target.tied, error, strict)


def kinds_of(types: Types, part: str, layers: int) -> list[GGMLQuantizationType]:
    return [types.kinds[f"blk.{i}.{part}.weight"] for i in range(layers)]


@pytest.mark.parametrize(("layers", "group"), DRY_RUN)
@pytest.mark.parametrize("name", MIXES)
def test_layers_are_llama_quantizes(llama: Model, name: str, layers: int, group: int) -> None:
    types = assigned(sized(llama, layers, group), name)
    matrix = MIXES[name].matrix
    plain = LETTERS.get(matrix, "")
    for part, wanted in zip(
        ("attn_v", "attn_output", "ffn_down"),
        DRY_RUN[layers, group].get(name, (plain, plain, plain)),
        strict=True,
    ):
        found = kinds_of(types, part, layers)
        if wanted:
            letters = "".join(LETTERS[kind] for kind in found)
            assert letters == wanted or letters == wanted * layers, part
        else:
            assert found == [matrix] * layers
    for part in ("attn_q", "attn_k", "ffn_gate", "ffn_up"):
        assert kinds_of(types, part, layers) == [matrix] * layers
    assert kinds_of(types, "attn_norm", layers) == [T.F32] * layers
    assert not types.substitutions


@pytest.mark.parametrize("name", MIXES)
def test_ends_are_llama_quantizes(llama: Model, tied: Model, name: str) -> None:
    """Also from dry runs: an output is Q6_K whatever the layers are, and Q8_0 where its rows do not fit."""
    matrix = MIXES[name].matrix
    floats = name in ("F32", "F16", "BF16")
    for hidden, output in ((256, T.Q8_0 if name == "Q8_0" else T.Q6_K), (96, T.Q8_0)):
        own, shared = (assigned(sized(model, hidden=hidden), name).kinds for model in (llama, tied))
        assert own["output.weight"] == shared["token_embd.weight"] == (matrix if floats else output)
        assert "output.weight" not in shared
        if hidden == 256:
            assert own["token_embd.weight"] == matrix
    assert resolve_quant(name).file_type == LlamaFileType["ALL_F32" if name == "F32" else f"MOSTLY_{name}"]


def test_seventy_billions(llama: Model) -> None:
    """As a dry run of 80 layers says: values that queries share are never below Q5_K."""
    for name, wanted in (("Q4_K_S", {T.Q5_K}), ("Q3_K_S", {T.Q5_K}), ("Q2_K", {T.Q5_K}), ("Q4_K_M", {T.Q5_K, T.Q6_K})):
        assert set(kinds_of(assigned(sized(llama, 80, 4), name), "attn_v", 80)) == wanted
        assert set(kinds_of(assigned(sized(llama, 80, 1), name), "attn_v", 80)) != wanted


QUANTIZE = os.environ.get("A3Q_LLAMA_QUANTIZE")


@pytest.mark.skipif(QUANTIZE is None, reason="A3Q_LLAMA_QUANTIZE does not name llama.cpp's llama-quantize")
@pytest.mark.parametrize(
    "options",
    [
        {"num_hidden_layers": 10, "num_key_value_heads": 4},
        {"num_hidden_layers": 20, "num_key_value_heads": 1, "tied": True},
        {"num_hidden_layers": 80, "num_key_value_heads": 1},
        {"num_hidden_layers": 16, "kind": "mpt"},
        {"hidden_size": 96, "intermediate_size": 72},
    ],
)
def test_against_llama_quantize_itself(tmp_path: Path, options: dict[str, object]) -> None:
    sizes = {"hidden_size": 256} if options.get("kind") else {"hidden_size": 256, "intermediate_size": 256}
    model = open_huggingface(pico.write_model(tmp_path / "m", **{**sizes, **options}))  # type: ignore[arg-type]
    path = write_gguf(model, resolve_quant("f16"), tmp_path / "m.gguf").path
    for name in MIXES:
        done = subprocess.run([str(QUANTIZE), "--dry-run", path, name], capture_output=True, text=True, check=True)
        lines = re.findall(r"\] (\S+) .* type = +(\w+), size = .*?(?:\((\w+)\))?$", done.stdout + done.stderr, re.M)
        theirs = {tensor: (new or old).upper() for tensor, old, new in lines}
        assert {tensor: kind.name for tensor, kind in assigned(model, name).kinds.items()} == theirs, name


def test_names() -> None:
    assert {name: resolve_quant(name.upper()).name.upper() for name in BITS} == BITS
    assert BITS["4bit"] == "Q4_K_M"
    for alias, name in (("Q4_K", "q4_k_m"), ("q5_k", "q5_k_m"), ("q3_k", "q3_k_m"), ("fp16", "f16"), ("FP32", "f32")):
        assert resolve_quant(alias).name == name
    for name in MIXES:
        assert resolve_quant(name.lower()) == resolve_quant(name)
    assert resolve_quant("4bit").matrix == T.Q4_K
    assert resolve_quant("4bit").file_type == LlamaFileType.MOSTLY_Q4_K_M
    assert resolve_quant("f32").file_type == LlamaFileType.ALL_F32
    for name in ("iq2_xxs", "tq1_0", "mxfp4", "", "int8", "q4"):
        with pytest.raises(InputError, match=f"'{name}'.*4bit.*q8_0.*q4_k_m.*llama-quantize"):
            resolve_quant(name)


def test_the_ends_as_the_user_wants_them(llama: Model, tied: Model) -> None:
    own = assigned(sized(llama), "4bit", output_type="Q8_0", embed_type="f16").kinds
    assert (own["output.weight"], own["token_embd.weight"]) == (T.Q8_0, T.F16)
    # As in llama.cpp, a tied embedding is an output unless it is named itself.
    assert assigned(sized(tied), "4bit", output_type="q5_k").kinds["token_embd.weight"] == T.Q5_K
    both = assigned(sized(tied), "4bit", output_type="q5_k", embed_type="q4_0").kinds
    assert both["token_embd.weight"] == T.Q4_0
    assert kinds_of(assigned(sized(tied), "4bit", output_type="q5_k"), "attn_q", 2) == [T.Q4_K] * 2
    for options in ({"output_type": "q4_k_m"}, {"embed_type": "4bit"}):
        option = "--output-tensor-type" if "output_type" in options else "--token-embedding-type"
        with pytest.raises(InputError, match=f"{option} .*bit|{option} .*q8_0"):
            assigned(llama, "4bit", **options)


def test_bits_per_weight(llama: Model) -> None:
    model = sized(llama)
    found = entries(model, target_for(model))
    assert assigned(model, "f32").bits_per_weight(found) == 32
    sizes = {entry.name: entry.weights for entry in found}
    norms = sum(size for name, size in sizes.items() if "norm" in name)
    total = sum(sizes.values())
    assert assigned(model, "q8_0").bits_per_weight(found) == pytest.approx((8.5 * (total - norms) + 32 * norms) / total)


# Rows that do not fit


def test_without_errors_llama_cpps_substitutes_are_taken(llama: Model) -> None:
    """They are those of dry runs of a llama of hidden size 96."""
    for quant, wanted in (
        ("q2_k", "Q4_0"),
        ("q3_k_s", "Q4_0"),
        ("q4_k_s", "Q5_0"),
        ("q5_k_s", "Q5_1"),
        ("q6_k", "Q8_0"),
    ):
        types = assigned(sized(llama, hidden=96), quant)
        assert kinds_of(types, "attn_q", 2) == [T[wanted]] * 2
    assert types.notes[0] == (
        "token_embd, attn_q, attn_k, attn_v, attn_output, ffn_gate, ffn_up (13 tensors): rows of 96 do not divide into "
        "Q6_K's super-blocks of 256; stored as Q8_0, 8.50 bits per weight instead of 6.56"
    )


def errors(
    values: dict[GGMLQuantizationType, float], calls: list[tuple[str, GGMLQuantizationType]]
) -> Callable[..., float]:
    def error(entry: Entry, kind: GGMLQuantizationType) -> float:
        calls.append((entry.name, kind))
        return values[kind]

    return error


# At equal bytes all of these are alike.
EVEN = {kind: 4.0**-bits for kind, bits in {T.Q4_0: 4.5, T.IQ4_NL: 4.5, T.Q4_1: 5, T.Q5_0: 5.5, T.Q5_1: 6}.items()}


@pytest.mark.parametrize(
    ("quant", "better", "taken", "tried"),
    [
        ("q4_k_s", T.Q5_0, T.Q5_0, {T.Q4_0, T.IQ4_NL, T.Q4_1, T.Q5_0}),
        ("q4_k_s", T.IQ4_NL, T.IQ4_NL, {T.Q4_0, T.IQ4_NL, T.Q4_1, T.Q5_0}),
        ("q5_k_s", T.Q4_1, T.Q4_1, {T.Q4_0, T.IQ4_NL, T.Q4_1, T.Q5_0, T.Q5_1}),
        # Nothing is as small as these two.
        ("q3_k_s", T.IQ4_NL, T.IQ4_NL, {T.Q4_0, T.IQ4_NL}),
        ("q2_k_s", T.Q5_0, T.Q4_0, {T.Q4_0, T.IQ4_NL}),
        ("q6_k", T.Q4_0, T.Q5_1, {T.Q5_1}),
    ],
)
def test_the_least_error_at_equal_bytes_is_taken(
    llama: Model,
    quant: str,
    better: GGMLQuantizationType,
    taken: GGMLQuantizationType,
    tried: set[GGMLQuantizationType],
) -> None:
    calls: list[tuple[str, GGMLQuantizationType]] = []
    types = assigned(sized(llama, 7, hidden=96), quant, errors(EVEN | {better: 0.99 * EVEN[better]}, calls))
    assert set(kinds_of(types, "attn_q", 7)) == {taken}
    # Once for all layers, on the middle one.
    mine = [kind for name, kind in calls if "attn_q" in name]
    assert set(mine) == tried and len(mine) == len(tried)
    assert {name for name, _ in calls if "attn_q" in name} == {"blk.3.attn_q.weight"}


def test_substitutions_are_grouped(llama: Model) -> None:
    layers, hidden, units = 8, 96, 160
    types = assigned(sized(llama, layers, hidden=hidden, units=units), "q4_k_m", errors(EVEN | {T.Q5_0: 1e-9}, []))
    found = {
        (one.wanted, one.taken, one.row_lengths, one.kinds_of_tensors): len(one.tensors) for one in types.substitutions
    }
    assert found == {
        (T.Q4_K, T.Q5_0, (96,), ("token_embd", "attn_q", "attn_k", "attn_output", "ffn_gate", "ffn_up", "attn_v")): 45,
        (T.Q4_K, T.Q5_0, (160,), ("ffn_down",)): 4,
        (T.Q6_K, T.Q5_1, (96,), ("attn_v",)): 4,
        (T.Q6_K, T.Q5_1, (160,), ("ffn_down",)): 4,
    }
    assert types.kinds["output.weight"] == T.Q8_0


def test_layers_of_several_sizes_take_one_type(llama: Model) -> None:
    model = sized(llama, 3, units=[288, 320, 352])
    types = assigned(model, "q4_k_s", errors(EVEN | {T.IQ4_NL: 1e-9}, []))
    assert [(one.row_lengths, one.taken) for one in types.substitutions] == [((288, 320, 352), T.IQ4_NL)]
    assert types.notes == (
        "ffn_down (3 tensors): rows of 288 to 352 do not divide into Q4_K's super-blocks of 256; "
        "stored as IQ4_NL, 4.50 bits per weight instead of 4.50",
    )


@pytest.mark.parametrize("measured", [False, True])
def test_odd_rows_are_f16(llama: Model, measured: bool) -> None:
    for quant in ("q4_k_m", "q8_0"):
        types = assigned(sized(llama, units=33), quant, errors(EVEN, []) if measured else None)
        assert kinds_of(types, "ffn_down", 2) == [T.F16] * 2
        wanted = max((one.wanted for one in types.substitutions), key=block_size)
        assert f"rows of 33 do not divide into {wanted.name}'s" in types.notes[0]
        assert "stored as F16, 16.00 bits per weight instead of" in types.notes[0]


def test_strict(llama: Model) -> None:
    assert not assigned(sized(llama), "q4_k_m", strict=True).substitutions
    with pytest.raises(InputError) as caught:
        assigned(sized(llama, units=288), "q4_k_s", strict=True)
    message = str(caught.value)
    assert "--strict: q4_k_s" in message
    assert "ffn_down (2 tensors): rows of 288 do not divide into Q4_K's super-blocks of 256" in message
    assert "Leave out --strict, or choose a type that fits: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0" in message
    with pytest.raises(InputError, match=r"output \(1 tensor\): rows of 96 .*Leave out --strict$"):
        assigned(sized(llama, hidden=96, units=96), "q8_0", strict=True, output_type="q6_k")


# Writing


def read(path: Path) -> dict[str, tuple[GGMLQuantizationType, bytes]]:
    return {tensor.name: (tensor.tensor_type, tensor.data.tobytes()) for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("options", [{}, {"tied": True}, {"kind": "mpt"}, {"kind": "qwen3"}], ids=str)
def test_packed_bytes_are_written_as_they_are(tmp_path: Path, options: dict[str, object]) -> None:
    """q and k interleaved, fused tensors put together: the file is the one that the weights themselves make."""
    model = open_huggingface(pico.write_model(tmp_path / "m", **options))  # type: ignore[arg-type]
    asked = []

    def packed(layer: int | None, role: str) -> NDArray[np.uint8] | None:
        asked.append((layer, role))
        weights = model.top if layer is None else model.layers[layer]
        if role == "up":
            return None
        data: NDArray[np.uint8] = quants.quantize(weights[role].numpy(), T.Q8_0)
        return data

    plain = write_gguf(model, resolve_quant("8bit"), tmp_path / "a.gguf", name="m")
    ready = write_gguf(model, resolve_quant("8bit"), tmp_path / "b.gguf", name="m", packed=packed)
    assert plain.sha256 == ready.sha256
    assert {(None, "embed"), (0, "q"), (1, "k"), (1, "v"), (1, "down"), (1, "up")} <= set(asked)
    assert not any("norm" in role for _, role in asked)


def test_packed_bytes_are_not_encoded_again(llama: Model, tmp_path: Path) -> None:
    rows, size = 64, 64 // 32 * 34
    marked = np.arange(rows * size, dtype=np.uint32).astype(np.uint8).reshape(rows, size)
    marked.setflags(write=False)
    path = write_gguf(
        llama, resolve_quant("8bit"), tmp_path / "m.gguf", packed=lambda _, role: marked if role in "qo" else None
    ).path
    tensors = read(path)
    assert tensors["blk.1.attn_output.weight"][1] == marked.tobytes()
    order = np.arange(64).reshape(4, 2, 8).transpose(0, 2, 1).ravel()
    assert tensors["blk.1.attn_q.weight"][1] == marked[order].tobytes()


def test_packed_bytes_of_another_type(llama: Model, tmp_path: Path) -> None:
    with pytest.raises(
        VerifyError, match=r"token_embd.weight: the encoded embed is \[512, 36\], Q8_0 asks for \[512, 68"
    ):
        write_gguf(
            llama,
            resolve_quant("8bit"),
            tmp_path / "m.gguf",
            packed=lambda layer, _: np.zeros((512, 36), np.uint8) if layer is None else None,
        )
    assert not list(tmp_path.iterdir())


def test_given_types_are_written(llama: Model, tmp_path: Path) -> None:
    target = target_for(llama)
    found = entries(llama, target)
    types = assign(resolve_quant("q4_0"), found, llama.config, target.tied)
    mixed = replace(types, kinds={**types.kinds, "blk.1.attn_q.weight": T.Q5_1})
    written = write_gguf(llama, resolve_quant("q4_0"), tmp_path / "m.gguf", types=mixed)
    assert {name: kind for name, (kind, _) in read(written.path).items()} == mixed.kinds
    assert written.tensor_types["Q5_1"] == 64 * 64


@pytest.mark.skipif(not ggml_encode.available(), reason="llama-cpp-python is not installed")
def test_k_quants_are_ggmls(tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    model = open_huggingface(pico.write_model(tmp_path / "m", **sizes))
    tensors = read(write_gguf(model, resolve_quant("4bit"), tmp_path / "m.gguf").path)
    kind, data = tensors["blk.0.ffn_gate.weight"]
    assert kind == T.Q4_K
    assert data == ggml_encode.encode(model.layers[0]["gate"].numpy(), T.Q4_K, None).tobytes()
    assert tensors["output.weight"][0] == T.Q6_K
