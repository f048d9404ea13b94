"""GPTQ's layout: bit by bit, in folders that are written and read, and damaged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from a3q.errors import InputError
from a3q.model import LayerShape, Model
from a3q.solve.grid import GRIDS, Blocks
from converters.gptq import Form, dequantize, fits, gptq_grid, pack, to_ggml, unpack, zero_points
from converters.hf_plain import plain_config
from converters.hf_reader import open_huggingface
from converters.hf_weights import StoredLinear, open_weights
from converters.hf_writer import write_huggingface
from converters.tensors import LazyLayers
from tests.pico import LLAMA3_ROPE, VOCAB, write_model

SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 192}


def random_blocks(
    rows: int, n: int, bits: int = 4, group: int = 32, symmetric: bool = True, seed: int = 0, least: int = 1
) -> Blocks:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, n), generator=generator, dtype=torch.uint8)
    d = (0.01 + 0.05 * torch.rand(rows, n // group, generator=generator)).half()
    zeros = torch.randint(least, 1 << bits, d.shape, generator=generator, dtype=torch.uint8)
    return Blocks(gptq_grid(bits, group, symmetric), codes, d, None, None, None if symmetric else zeros)


def same(one: Blocks | None, other: Blocks) -> bool:
    return (
        one is not None
        and one.grid == other.grid
        and torch.equal(one.codes, other.codes)
        and torch.equal(one.d, other.d)
        and torch.equal(zero_points(one), zero_points(other))
    )


def by_hand(tensors: dict[str, Tensor], bits: int, v2: bool) -> Tensor:
    """The weights number by number, as the layout is described."""
    words, zeros, scales = (tensors[name].tolist() for name in ("qweight", "qzeros", "scales"))
    per, top = 32 // bits, (1 << bits) - 1
    rows, n = tensors["scales"].shape[1], len(tensors["g_idx"])
    weight = torch.zeros(rows, n)
    for i in range(n):
        group = int(tensors["g_idx"][i])
        for row in range(rows):
            code = (words[i // per][row] >> bits * (i % per)) & top
            zero = (zeros[group][row // per] >> bits * (row % per)) & top
            weight[row, i] = scales[group][row] * (code - zero - (0 if v2 else 1))
    return weight


@pytest.mark.parametrize("v2", (False, True))
@pytest.mark.parametrize("symmetric", (True, False))
@pytest.mark.parametrize(("bits", "group"), ((2, 16), (4, 32), (4, 64), (8, 32)))
def test_pack_and_unpack(bits: int, group: int, symmetric: bool, v2: bool) -> None:
    blocks = random_blocks(24, 64, bits, group, symmetric)
    tensors, form = pack(blocks, v2), Form(bits, group, v2)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == form.shapes(24, 64)
    assert [tensors[name].dtype for name in ("qweight", "qzeros", "scales", "g_idx")] == [
        torch.int32, torch.int32, torch.float16, torch.int32
    ]  # fmt: skip
    expected = by_hand(tensors, bits, v2)
    assert torch.equal(dequantize(tensors, form, "here"), expected)
    assert torch.equal(blocks.dequantize(), expected)
    assert same(unpack(tensors, form, "here").blocks(), blocks)


def test_words_that_are_known() -> None:
    codes = torch.zeros(8, 32, dtype=torch.uint8)
    codes[0, :8] = torch.arange(8)
    codes[3, 31] = 15
    blocks = Blocks(gptq_grid(4, 32, True), codes, torch.ones(8, 1).half(), None, None, None)
    tensors = pack(blocks)
    assert tensors["qweight"][0, 0] == 0x76543210
    assert tensors["qweight"][3, 3] == -0x10000000
    assert tensors["qzeros"].tolist() == [[0x77777777]]
    assert pack(blocks, v2=True)["qzeros"].tolist() == [[0x88888888 - (1 << 32)]]
    assert tensors["g_idx"].tolist() == [0] * 32


@pytest.mark.parametrize("bits", (4, 8))
def test_rows_that_do_not_fill_a_word(bits: int) -> None:
    blocks = random_blocks(21, 64, bits, symmetric=False)
    assert same(unpack(pack(blocks), Form(bits, 32), "here").blocks(), blocks)


def test_zero_point_of_zero() -> None:
    blocks = random_blocks(16, 32, symmetric=False, least=0)
    assert blocks.mins is not None
    blocks.mins[5, 0] = 0
    with pytest.raises(InputError, match="gptq_v2"):
        pack(blocks)
    tensors = pack(blocks, v2=True)
    assert same(unpack(tensors, Form(4, 32, True), "here").blocks(), blocks)
    # GPTQModel takes ones away from the word as a whole.
    tensors["qzeros"] -= 0x11111111
    assert same(unpack(tensors, Form(4, 32), "here").blocks(), blocks)


def test_act_order() -> None:
    tensors, form = pack(random_blocks(16, 128, symmetric=False)), Form(4, 32)
    tensors["g_idx"] = tensors["g_idx"][torch.randperm(128, generator=torch.Generator().manual_seed(1))]
    assert torch.equal(dequantize(tensors, form, "here"), by_hand(tensors, 4, False))
    assert unpack(tensors, form, "here").blocks() is None


def test_one_group_for_all_inputs() -> None:
    blocks = random_blocks(16, 96, group=96)
    assert same(unpack(pack(blocks), Form(4, -1), "here").blocks(), blocks)


DAMAGED = {
    "g_idx too high": ("g_idx", lambda t: t + 4, "here.g_idx holds 4 to 7, but there are 4 groups"),
    "g_idx negative": ("g_idx", lambda t: t - 1, "here.g_idx holds -1"),
    "NaN": ("scales", lambda t: t * float("nan"), "here.scales holds values that are not finite"),
    "infinite": ("scales", lambda t: t * float("inf"), "here.scales holds values that are not finite"),
    "whole scales": ("scales", lambda t: t.int(), "here.scales holds values that are not finite"),
    "short": ("qweight", lambda t: t[:-1], r"here.qweight has shape \[15, 16\].* asks for \[16, 16\]"),
    "narrow": ("qzeros", lambda t: t[:, :-1], r"here.qzeros has shape \[4, 1\]"),
    "few groups": ("scales", lambda t: t[:-1], r"here.scales has shape \[3, 16\]"),
    "flat": ("scales", lambda t: t.flatten(), r"here.scales has shape \[64\]"),
    "empty": ("g_idx", lambda t: t[:0], r"here.g_idx has shape \[0\]"),
    "other type": ("qweight", lambda t: t.long(), "here.qweight holds torch.int64"),
}


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_tensors(name: str, damage: Any, message: str) -> None:
    tensors = pack(random_blocks(16, 128))
    tensors[name] = damage(tensors[name])
    with pytest.raises(InputError, match=message):
        unpack(tensors, Form(4, 32), "here")


@pytest.mark.parametrize(("bits", "group", "name"), ((4, 32, "q4_0"), (4, 128, "q4_0"), (8, 64, "q8_0")))
def test_repacked_for_ggml(bits: int, group: int, name: str) -> None:
    blocks = random_blocks(16, 128, bits, group)
    blocks.codes.clamp_(min=1)
    packed = to_ggml(blocks)
    assert packed is not None and packed.grid is GRIDS[name]
    assert torch.equal(packed.dequantize(), blocks.dequantize())
    assert torch.equal(packed.d, blocks.d.repeat_interleave(group // 32, dim=1))


def test_repacked_for_ggml_with_zero_points() -> None:
    blocks = random_blocks(16, 128, symmetric=False)
    # Four digits times four digits fit into a float16, eleven do not.
    exact = replace(blocks, d=(torch.randint(8, 16, blocks.d.shape) / 256).half())
    packed = to_ggml(exact)
    assert packed is not None and packed.grid is GRIDS["q4_1"]
    assert torch.equal(packed.dequantize(), exact.dequantize())
    packed = to_ggml(blocks)
    assert packed is not None and packed.grid is GRIDS["q4_1"]
    step, zero = (one.float().repeat_interleave(32, dim=1) for one in (blocks.d, zero_points(blocks)))
    error = (packed.dequantize() - blocks.dequantize()).abs()
    # Beside the offset's own rounding there is that of the difference in float32.
    assert bool((error <= step * zero / 2048 + 1e-6).all()) and bool((error > 0).any())
    assert to_ggml(replace(blocks, d=torch.full_like(blocks.d, 60000.0))) is None
    assert to_ggml(random_blocks(16, 128, 2, 32)) is None
    assert to_ggml(random_blocks(16, 128, 4, 16)) is None
    assert to_ggml(random_blocks(16, 128, 8, 32)) is None  # q8_0 does without the lowest code


def test_rows_are_taken() -> None:
    blocks, rows = random_blocks(16, 64, symmetric=False), torch.tensor([3, 1, 15])
    assert torch.equal(blocks.rows(rows).dequantize(), blocks.dequantize()[rows])


def test_what_fits() -> None:
    assert fits(64, 96, gptq_grid(4, 32, True)) and fits(64, 96, GRIDS["q4_0"])
    assert not fits(48, 96, gptq_grid(4, 32, True)) and not fits(64, 80, gptq_grid(4, 16, True))
    assert not fits(64, 96, gptq_grid(4, 64, True)) and not fits(64, 256, GRIDS["q4_k"])


# Folders.


class Rounded:
    """Random codes for every matrix of a model, but for those that do not fit."""

    def __init__(self, model: Model, bits: int = 4, group: int = 32, symmetric: bool = True) -> None:
        self.blocks: dict[tuple[int, str], Blocks] = {}
        for i, shape in enumerate(model.config.layers):
            for role in model.family.layer:
                size = role.expected_shape(model.config, shape)
                if len(size) == 2 and fits(size[0], size[1], gptq_grid(bits, group, symmetric)):
                    seed = len(self.blocks)
                    self.blocks[i, role.name] = random_blocks(*size, bits, group, symmetric, seed, least=0)

    def __call__(self, i: int, role: str) -> Blocks | None:
        return self.blocks.get((i, role))


def shrunk(model: Model) -> Model:
    """`model` with other sizes in every layer, the last MLP too odd for kernels."""
    shapes = [replace(shape, intermediate_size=160 + 24 * i) for i, shape in enumerate(model.config.layers)]
    shapes[0] = LayerShape(24, 24, 192, ((1.0, 0.5, 0.25),))
    config = replace(model.config, layers=tuple(shapes))
    roles = [role for role in model.family.layer if role.name in model.layer_roles]
    layers = [{role.name: torch.randn(role.expected_shape(config, shape)) for role in roles} for shape in shapes]
    return replace(model, config=config, layers=layers)


def check_read(folder: Path, rounded: Rounded, model: Model) -> Model:
    """The folder's model, whose weights must be those of `rounded`, else those of `model` in float16."""
    read = open_huggingface(folder)
    assert read.config == model.config and read.layer_roles == model.layer_roles
    layers = read.layers
    assert isinstance(layers, LazyLayers)
    for i in range(len(layers)):
        layer, found = layers[i], layers.blocks(i)
        assert {(i, role) for role in found} == {key for key in rounded.blocks if key[0] == i}
        for role, weight in layer.items():
            blocks = rounded(i, role)
            if blocks is None:
                torch.testing.assert_close(weight, model.layers[i][role], atol=2e-3, rtol=1e-3)
            else:
                assert torch.equal(weight, blocks.dequantize()) and same(found[role], blocks)
    return read


@pytest.mark.parametrize(("bits", "group", "symmetric"), ((4, 32, True), (4, 64, False), (8, 32, False)))
@pytest.mark.parametrize("kind", ("llama", "phi3", "gpt2", "gpt_neox"))
def test_a3q_folder(tmp_path: Path, kind: Any, bits: int, group: int, symmetric: bool) -> None:
    model = open_huggingface(write_model(tmp_path / "source", kind, **SIZES))
    model = shrunk(model) if kind == "llama" else model
    rounded = Rounded(model, bits, group, symmetric)
    settings = {"damp_percent": 0.01}
    written = write_huggingface(
        model, tmp_path / "out", dtype=torch.float16, quantized=rounded, quantization=settings, shard_bytes=1 << 16
    )
    assert len(written.weight_files) > 1
    check_read(written.path, rounded, model)
    config = json.loads((written.path / "config.json").read_text())["quantization_config"]
    assert config["checkpoint_format"] == ("gptq" if symmetric else "gptq_v2") and config["damp_percent"] == 0.01
    assert (config["bits"], config["group_size"], config["sym"]) == (bits, group, symmetric)
    if kind == "llama":
        (pattern,) = config["dynamic"]
        assert "model\\.layers\\.1\\.mlp\\.down_proj" in pattern
        (names,) = config["modules_in_block_to_quantize"]
        assert "model.layers.0.mlp.down_proj" in names and "model.layers.1.mlp.down_proj" not in names
    else:
        assert "dynamic" not in config


@pytest.mark.parametrize("kind", ("llama", "qwen2", "qwen3", "phi3", "gemma3", "olmo2"))
def test_plain_folder(tmp_path: Path, kind: Any) -> None:
    more = {"query_pre_attn_scalar": 16} if kind == "gemma3" else {}
    source = write_model(tmp_path / "source", kind, **SIZES, **more)
    model = open_huggingface(source)
    assert plain_config(model) is not None
    folder = write_huggingface(model, tmp_path / "plain", dtype=torch.float32, plain=True).path
    tokens = torch.randint(2, VOCAB, (1, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one, two = (AutoModelForCausalLM.from_pretrained(path) for path in (source, folder))
        assert type(one) is type(two)
        torch.testing.assert_close(two(tokens).logits, one(tokens).logits, atol=1e-5, rtol=0)
    rounded = Rounded(model)
    check_read(
        write_huggingface(model, tmp_path / "gptq", dtype=torch.float16, quantized=rounded, plain=True).path,
        rounded,
        model,
    )


def test_what_is_plain(tmp_path: Path) -> None:
    model = open_huggingface(write_model(tmp_path / "llama", "llama", bias=True, rope=LLAMA3_ROPE, **SIZES))
    config = plain_config(model)
    assert config is not None and config["attention_bias"] and config["mlp_bias"]
    shapes = model.config.layers
    narrow = replace(model.config, layers=tuple(replace(shape, intermediate_size=96) for shape in shapes))
    assert (plain_config(replace(model, config=narrow)) or {})["intermediate_size"] == 96
    for other in (
        replace(shapes[0], intermediate_size=96),
        replace(shapes[0], v_head_dim=16),
        replace(shapes[0], frequencies=((1.0,) * shapes[0].pairs,)),
    ):
        changed = replace(model, config=replace(model.config, layers=(other, *shapes[1:])))
        assert plain_config(changed) is None
    assert plain_config(replace(model, layer_roles=model.layer_roles - {"o_bias"})) is None
    with pytest.raises(InputError, match="write it as a3q"):
        write_huggingface(changed, tmp_path / "out", plain=True)
    written = write_huggingface(model, tmp_path / "a3q")
    assert plain_config(open_huggingface(written.path)) is None


@pytest.fixture
def gptq_folder(tmp_path: Path) -> Path:
    model = open_huggingface(write_model(tmp_path / "source", "llama", **SIZES))
    return write_huggingface(model, tmp_path / "gptq", dtype=torch.float16, quantized=Rounded(model), plain=True).path


def change(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text())
    content["quantization_config"] |= fields
    path.write_text(json.dumps(content))


CONFIGS = {
    "awq": ({"quant_method": "awq"}, r"already quantized \(awq\).* gptq only"),
    "no method": ({"quant_method": None}, "already quantized"),
    "3 bits": ({"bits": 3}, "bits must be 2 or 4 or 8, found 3"),
    "no number": ({"bits": "4"}, "bits must be"),
    "group": ({"group_size": 0}, "group_size must be positive or -1"),
    "other group": ({"group_size": 64}, r"down_proj.qzeros has shape \[6, 16\].* asks for \[3, 16\]"),
    "other bits": ({"bits": 8}, r"down_proj.qweight has shape \[24, 128\].* asks for \[48, 128\]"),
    "marlin": ({"checkpoint_format": "marlin"}, "checkpoint_format must be gptq or gptq_v2"),
    "words": ({"pack_dtype": "int64"}, "pack_dtype must be int32"),
}


@pytest.mark.parametrize(("fields", "message"), CONFIGS.values(), ids=CONFIGS)
def test_configurations_that_are_refused(gptq_folder: Path, fields: dict[str, Any], message: str) -> None:
    change(gptq_folder, **fields)
    with pytest.raises(InputError, match=message) as caught:
        open_huggingface(gptq_folder)
    assert str(gptq_folder) in str(caught.value) and "\n" not in str(caught.value)


Q = "model.layers.0.self_attn.q_proj"
FILES = {
    "lost": ({f"{Q}.g_idx": None}, f"{Q}.g_idx is missing"),
    "twice": ({f"{Q}.weight": torch.ones(128, 128)}, f"{Q}.weight and {Q}.qweight are both there"),
    "left over": ({f"{Q}.qweight": None}, f"tensor {Q}.* has dtype I32"),
    "short words": ({f"{Q}.qweight": torch.zeros(16, 128, dtype=torch.int16)}, f"{Q}.qweight has dtype I16"),
    "other matrix": (
        {f"{Q}.{name}": tensor for name, tensor in pack(random_blocks(64, 128)).items()},
        rf"{Q}.weight has shape \[64, 128\]",
    ),
}


@pytest.mark.parametrize(("tensors", "message"), FILES.values(), ids=FILES)
def test_files_that_are_refused(gptq_folder: Path, tensors: dict[str, Tensor | None], message: str) -> None:
    path = gptq_folder / "model.safetensors"
    content = load_file(path) | tensors
    save_file({name: tensor for name, tensor in content.items() if tensor is not None}, path)
    with pytest.raises(InputError, match=message) as caught:
        open_huggingface(gptq_folder)
    assert str(gptq_folder) in str(caught.value)


def test_damage_that_shows_when_a_layer_is_read(gptq_folder: Path) -> None:
    path = gptq_folder / "model.safetensors"
    content = load_file(path)
    content[f"{Q}.g_idx"][3] = 99
    save_file(content, path)
    model = open_huggingface(gptq_folder)
    assert model.layers[1]
    with pytest.raises(InputError, match=f"model.safetensors: tensor {Q}.g_idx holds 0 to 99"):
        _ = model.layers[0]


def test_quantized_output_act_order_and_bias(tmp_path: Path) -> None:
    source = write_model(tmp_path / "llama", "llama", bias=True, **SIZES)
    expected, path = load_file(source / "model.safetensors"), source / "model.safetensors"
    content = dict(expected)
    for seed, module in enumerate(("lm_head", Q)):
        rows, n = content.pop(f"{module}.weight").shape
        tensors = pack(random_blocks(rows, n, symmetric=False, seed=seed))
        tensors["g_idx"] = tensors["g_idx"].flip(0)
        expected[f"{module}.weight"] = by_hand(tensors, 4, False)
        content |= {f"{module}.{name}": tensor for name, tensor in tensors.items()}
    save_file(content, path)
    config = json.loads((source / "config.json").read_text())
    # Old names and defaults.
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}
    (source / "config.json").write_text(json.dumps(config))
    model = open_huggingface(source)
    assert torch.equal(model.output, expected["lm_head.weight"])
    assert torch.equal(model.layers[0]["q"], expected[f"{Q}.weight"])
    assert torch.equal(model.layers[0]["q_bias"], expected[f"{Q}.bias"])
    assert isinstance(model.layers, LazyLayers) and model.layers.blocks(0) == {}
    assert "GPTQ 4 bits" in model.source.tensor_types


def test_transposed_and_heads_together(tmp_path: Path) -> None:
    """GPTQ's own layout is the same for families that store plain matrices in another."""
    for kind, module in (
        ("gpt2", "transformer.h.0.attn.c_attn"),
        ("gpt_neox", "gpt_neox.layers.0.attention.query_key_value"),
    ):
        source = write_model(tmp_path / kind, kind, **SIZES)  # type: ignore[arg-type]
        path = source / "model.safetensors"
        content = load_file(path)
        del content[f"{module}.weight"]
        blocks = random_blocks(384, 128)
        save_file(content | {f"{module}.{name}": tensor for name, tensor in pack(blocks).items()}, path)
        config = json.loads((source / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
        (source / "config.json").write_text(json.dumps(config))
        linear = open_weights(source, Form(4, 32)).tensors[f"{module}.weight"]
        assert isinstance(linear, StoredLinear) and linear.shape == (384, 128)
        model = open_huggingface(source)
        rows = blocks.dequantize()
        q = rows[:128] if kind == "gpt2" else rows.view(4, 3, 32, 128)[:, 0].reshape(128, 128)
        assert torch.equal(model.layers[0]["q"], q)
        assert isinstance(model.layers, LazyLayers)
        assert torch.equal(model.layers.blocks(0)["q"].dequantize(), q)


def test_matrices_that_cannot_be_written(tmp_path: Path) -> None:
    model = open_huggingface(write_model(tmp_path / "phi3", "phi3", **SIZES))

    def refused(message: str, blocks: dict[tuple[int, str], Blocks], dtype: torch.dtype = torch.float16) -> None:
        with pytest.raises(InputError, match=message):
            write_huggingface(model, tmp_path / "out", dtype=dtype, quantized=lambda i, role: blocks.get((i, role)))
        assert not (tmp_path / "out").exists()

    refused("q, k, v are one tensor", {(0, "q"): random_blocks(128, 128)})
    refused("32 bits|one number of bits", {(0, "o"): random_blocks(128, 128), (1, "o"): random_blocks(128, 128, 8)})
    refused("leave it plain", {(0, "o"): Blocks(GRIDS["q4_1"], *[torch.zeros(128, 128)] * 3, None, None)})
    refused("weights are float16, bfloat16", {}, torch.float32)
