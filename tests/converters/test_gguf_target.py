"""Each family as llama.cpp holds it: what is written reads back, llama.cpp predicts the same, the rest is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from a3q import runtime
from a3q.errors import InputError
from a3q.families import FAMILIES
from a3q.forward import hidden_states, output_logits
from a3q.model import LayerShape, Model, plain_frequencies
from converters import rope
from converters.gguf_graphs import GRAPHS, alibi_slopes
from converters.gguf_reader import open_gguf
from converters.gguf_target import check_runtime
from converters.gguf_writer import write_gguf
from converters.hf_reader import open_huggingface
from converters.tensors import LazyLayers
from converters.types import resolve_quant
from tests import pico

CPU = torch.device("cpu")
LINEAR = {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0}
LOCAL = {"rope_type": "default", "rope_theta": 5e4}

Change = Callable[[Model], Model]


def reshaped(model: Model, shapes: Sequence[LayerShape]) -> Model:
    """`model` with random weights in layers of these shapes."""
    config = replace(model.config, layers=tuple(shapes))
    roles = [role for role in model.family.layer if role.name in model.layer_roles]
    noise = torch.Generator().manual_seed(0)
    layers = [
        {
            role.name: float("norm" in role.name and "bias" not in role.name)
            + 0.15 * torch.randn(role.expected_shape(config, shape), generator=noise)
            for role in roles
        }
        for shape in shapes
    ]
    return replace(model, config=config, layers=layers)


def mlp_sizes(*sizes: int) -> Change:
    def change(model: Model) -> Model:
        pairs = zip(model.config.layers, sizes, strict=True)
        return reshaped(model, [replace(shape, intermediate_size=size) for shape, size in pairs])

    return change


def heads(qk: int, v: int, *lists: tuple[float, ...]) -> Change:
    """Heads of other sizes; frequencies left out are kept."""

    def change(model: Model) -> Model:
        return reshaped(
            model,
            [
                replace(one, qk_head_dim=qk, v_head_dim=v, frequencies=lists or one.frequencies)
                for one in model.config.layers
            ],
        )

    return change


def one_after_another(*changes: Change) -> Change:
    def change(model: Model) -> Model:
        for step in changes:
            model = step(model)
        return model

    return change


CHOSEN = (1.0, 0.31, 0.05, 0.001)

WRITTEN: dict[str, tuple[dict[str, Any], Change | None, str]] = {
    "qwen3": ({"kind": "qwen3"}, mlp_sizes(64, 64), "qwen3"),
    "qwen3-tied": ({"kind": "qwen3", "tied": True, "head_dim": 32}, None, "qwen3"),
    "qwen3-linear": ({"kind": "qwen3", "rope": LINEAR}, None, "qwen3"),
    "gemma3": ({"kind": "gemma3"}, mlp_sizes(64, 64, 64), "gemma3"),
    "gemma3-linear": (
        {
            "kind": "gemma3",
            "num_hidden_layers": 7,
            "layer_types": None,
            "rope_parameters": {"full_attention": LINEAR, "sliding_attention": LOCAL},
        },
        None,
        "gemma3",
    ),
    "olmo2": ({"kind": "olmo2"}, mlp_sizes(64, 64), "olmo2"),
    "olmo2-tied": ({"kind": "olmo2", "tied": True}, None, "olmo2"),
    "gpt_neox": ({"kind": "gpt_neox"}, mlp_sizes(64, 64), "gptneox"),
    "gpt_neox-sequential": ({"kind": "gpt_neox", "use_parallel_residual": False, "tied": True}, None, "gptneox"),
    "gpt2": ({"kind": "gpt2"}, mlp_sizes(64, 64), "gpt2"),
    "gpt2-tied": ({"kind": "gpt2", "tied": True}, None, "gpt2"),
    "mpt": ({"kind": "mpt"}, mlp_sizes(64, 64), "mpt"),
    "mpt-three-heads": ({"kind": "mpt", "hidden_size": 48, "num_attention_heads": 3}, None, "mpt"),
    "phi3": ({"kind": "phi3"}, None, "llama"),
    "phi3-reduced": ({"kind": "phi3"}, one_after_another(mlp_sizes(64, 64), heads(8, 8, CHOSEN)), "llama"),
    "phi3-mixed": ({"kind": "phi3"}, mlp_sizes(64, 96), "deci"),
    "llama-mixed": ({"bias": True}, one_after_another(mlp_sizes(64, 96), heads(8, 8, CHOSEN)), "deci"),
    "llama-mixed-scaled": ({"rope": pico.LLAMA3_ROPE, "tied": True}, mlp_sizes(96, 32), "deci"),
    "qwen2-mixed": ({"kind": "qwen2"}, mlp_sizes(64, 96), "deci"),
}


def build(folder: Path, options: dict[str, Any], change: Change | None) -> Model:
    # Not called after its kind: a model named phi3 llama.cpp takes for one with Phi 3's tokens.
    model = open_huggingface(pico.write_model(folder / "pico", **options))
    return model if change is None else change(model)


def logits(model: Model, tokens: list[int]) -> Tensor:
    return output_logits(model, hidden_states(model, torch.tensor([tokens]), CPU), CPU)[0].log_softmax(-1)


@pytest.mark.parametrize("case", WRITTEN.values(), ids=WRITTEN)
def test_what_is_written(tmp_path: Path, case: tuple[dict[str, Any], Change | None, str]) -> None:
    options, change, architecture = case
    model = build(tmp_path, options, change)
    path = write_gguf(model, resolve_quant("f32"), tmp_path / "m.gguf").path
    assert gguf.GGUFReader(path).fields["general.architecture"].contents() == architecture
    back = open_gguf(path)
    assert back.layer_roles == model.layer_roles
    assert [replace(one, frequencies=()) for one in back.config.layers] == [
        replace(one, frequencies=()) for one in model.config.layers
    ]
    for found, meant in zip(back.config.layers, model.config.layers, strict=True):
        np.testing.assert_allclose(found.frequencies, meant.frequencies, rtol=1e-6)
    for mine, theirs in zip(back.layers, model.layers, strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[role], weight) for role, weight in theirs.items())
    assert model.top.keys() <= back.top.keys()
    assert all(torch.equal(back.top[role], weight) for role, weight in model.top.items())
    again = open_gguf(write_gguf(back, resolve_quant("f32"), tmp_path / "again.gguf").path)
    assert again.config == back.config
    assert {key: one.value for key, one in again.metadata.items()} == {
        key: one.value for key, one in back.metadata.items()
    }


@pytest.mark.skipif(not runtime.available(), reason="llama.cpp is not installed")
@pytest.mark.parametrize("quant", ["f32", "f16"])
@pytest.mark.parametrize("case", WRITTEN.values(), ids=WRITTEN)
def test_llama_cpp_predicts_the_same(
    tmp_path: Path, case: tuple[dict[str, Any], Change | None, str], quant: str
) -> None:
    model = build(tmp_path, *case[:2])
    path = write_gguf(model, resolve_quant(quant), tmp_path / "m.gguf").path
    tokens = [0, *np.random.default_rng(0).integers(2, pico.VOCAB, 119).tolist()]
    with runtime.LlamaRuntime(path, 128, 1) as llama:
        theirs = torch.from_numpy(llama.logits(tokens)).log_softmax(-1)
    ours = logits(model, tokens)
    divergence = (ours.exp() * (ours - theirs)).sum(-1)
    # Around 3e-7 in float32, 3e-6 in float16. gpt_neox and mpt have the exact GELU, of which llama.cpp computes the
    # usual approximation; with the small activations here that is lost in the rounding.
    assert divergence.mean() < 1e-5
    # Far tokens are what tells frequencies, slopes and windows apart.
    assert divergence[-20:].mean() < 1e-5
    assert ours.exp().max(-1).values.mean() > 10 / pico.VOCAB  # the model says something


@pytest.mark.skipif(not runtime.available(), reason="llama.cpp is not installed")
def test_the_scale_of_the_largest_gemma3(tmp_path: Path) -> None:
    """llama.cpp knows it by its 62 layers, and divides scores by the root of hidden size over heads there."""
    options = {"kind": "gemma3", "num_hidden_layers": 62, "layer_types": None, "head_dim": 32}
    model = build(tmp_path, options, None)
    path = write_gguf(model, resolve_quant("f32"), tmp_path / "m.gguf").path
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    q_norm = model.layers[3]["q_norm"]
    np.testing.assert_allclose(stored["blk.3.attn_q_norm.weight"] * 2**0.5, q_norm, rtol=1e-6)
    torch.testing.assert_close(open_gguf(path).layers[3]["q_norm"], q_norm, rtol=1e-6, atol=0)
    tokens = [0, *np.random.default_rng(0).integers(2, pico.VOCAB, 63).tolist()]
    with runtime.LlamaRuntime(path, 64, 1) as llama:
        theirs = torch.from_numpy(llama.logits(tokens)).log_softmax(-1)
    ours = logits(model, tokens)
    assert (ours.exp() * (ours - theirs)).sum(-1).mean() < 1e-5


@pytest.mark.parametrize(("kind", "quant"), [("gpt_neox", "q8_0"), ("gpt2", "q4_0"), ("mpt", "bf16")])
def test_quantized_fused_tensors(tmp_path: Path, kind: pico.Kind, quant: str) -> None:
    model = build(tmp_path, {"kind": kind}, None)
    written = write_gguf(model, resolve_quant(quant), tmp_path / "m.gguf")
    tensors = {tensor.name: tensor.tensor_type.name.lower() for tensor in gguf.GGUFReader(written.path).tensors}
    assert tensors["blk.0.attn_qkv.weight"] == quant
    assert tensors.get("position_embd.weight", "f32") == "f32"
    assert not written.notes
    for mine, theirs in zip(open_gguf(written.path).layers, model.layers, strict=True):
        for role in "qkv":
            assert (mine[role] - theirs[role]).abs().max() <= 0.1 * theirs[role].abs().max()


def test_an_output_that_must_not_be_tied(tmp_path: Path) -> None:
    model = build(tmp_path, {"kind": "gpt_neox", "tied": True}, None)
    written = write_gguf(model, resolve_quant("f32"), tmp_path / "m.gguf")
    assert written.notes == ("output: llama.cpp's gptneox needs one of its own; the embedding is stored twice",)
    assert torch.equal(open_gguf(written.path).top["output"], model.embed)


def with_form(**fields: Any) -> Change:
    return lambda model: replace(model, config=replace(model.config, **fields))


def with_windows(*windows: int | None) -> Change:
    def change(model: Model) -> Model:
        pairs = zip(model.config.layers, windows, strict=True)
        return with_form(layers=tuple(replace(one, sliding_window=window) for one, window in pairs))(model)

    return change


def without(*roles: str) -> Change:
    return lambda model: replace(model, layer_roles=model.layer_roles - set(roles))


def slower(model: Model) -> Model:
    """Frequencies in the second layer that are not the first's."""
    first, *others = model.config.layers
    lists = tuple(tuple(0.5 * omega for omega in one) for one in first.frequencies)
    return with_form(layers=(first, *(replace(one, frequencies=lists) for one in others)))(model)


def chosen_locally(model: Model) -> Model:
    """Frequencies of one's own in the layers with a window."""
    pairs = model.config.layers[0].pairs
    lists = (tuple(1 / (1 + i) for i in range(pairs)),)
    return with_form(
        layers=tuple(replace(one, frequencies=lists) if one.sliding_window else one for one in model.config.layers)
    )(model)


REFUSED: dict[str, tuple[dict[str, Any], Change | None, str]] = {
    "opt": ({"kind": "opt"}, None, "no architecture for opt"),
    "mixed heads": ({}, lambda m: reshaped(m, [m.config.layers[0], LayerShape(8, 8, 96, (CHOSEN,))]), "8 to 16"),
    "values apart": ({}, heads(16, 8), "8 to 16, not of one size; reduce with a3q reduce --frequencies shared"),
    "values apart, gpt_neox": ({"kind": "gpt_neox"}, heads(16, 8), "8 to 16, not of one size; reduce only MLP"),
    "mixed MLP, qwen3": ({"kind": "qwen3"}, mlp_sizes(64, 96), "64 to 96"),
    "mixed MLP, gpt2": ({"kind": "gpt2"}, mlp_sizes(64, 96), "64 to 96"),
    "list for each head": ({}, heads(8, 8, CHOSEN, CHOSEN[::-1]), "for each key head"),
    "list for each layer": ({}, slower, "differ between layers"),
    "gpt2 heads": (
        {"kind": "gpt2"},
        heads(8, 8),
        "4 heads of size 8, not as wide as the hidden size 64; reduce only MLP",
    ),
    "mpt heads": ({"kind": "mpt"}, heads(8, 8), "hidden size 64"),
    "gpt_neox heads": ({"kind": "gpt_neox"}, heads(8, 8), "hidden size 64"),
    "olmo2 heads": ({"kind": "olmo2"}, heads(8, 8, CHOSEN), "hidden size 64"),
    "qwen3 heads": ({"kind": "qwen3"}, heads(8, 8, CHOSEN), "follow from no base; leave QK as it is"),
    "qwen3 norm": ({"kind": "qwen3"}, with_form(qk_norm="heads"), "has a norm with a weight for each head of"),
    "llama norm": (
        {},
        with_form(qk_norm="all"),
        "a norm over all heads of queries and keys where no norm is",
    ),
    "gemma3 local": ({"kind": "gemma3"}, chosen_locally, "no base in layers with a window"),
    "gemma3 windows": ({"kind": "gemma3"}, with_windows(12, None, 16), "windows that differ"),
    "qwen3 scaling": ({"kind": "qwen3", "rope": pico.LLAMA3_ROPE}, None, "follow from no base"),
    "partial": ({}, heads(16, 16, CHOSEN), "8 of the 16 dimensions"),
    "phi3 partial": ({"kind": "phi3", "rope": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, None, "8 of the 16"),
    "no RoPE": ({}, heads(16, 16, ()), "0 of the 16"),
    "gpt2 RoPE": ({"kind": "gpt2"}, heads(16, 16, CHOSEN), "uses RoPE"),
    "mistral window": ({"kind": "mistral", "sliding_window": 12}, None, "uses a sliding attention window (12)"),
    "qwen3 window": ({"kind": "qwen3"}, with_windows(None, 7), "uses a sliding attention window (7)"),
    "activation": ({"hidden_act": "gelu"}, None, "uses gelu in its MLP, not silu"),
    "norms": ({}, with_form(norm="layer"), "of kind layer, not rms"),
    "parallel": ({}, with_form(parallel_residual=True), "side by side"),
    "slopes": ({"kind": "mpt"}, with_form(alibi_slopes=(0.5, 0.25, 0.2, 0.1)), "ALiBi"),
    "slopes of llama": ({}, with_form(alibi_slopes=alibi_slopes(8.0, 4)), "ALiBi"),
    "embedding": ({}, with_form(embedding_scale=8.0), "scales its embedding by 8"),
    "biases": ({"kind": "qwen3", "bias": True}, None, "without a place there: o_bias"),
    "no biases": ({"kind": "gpt_neox"}, without("q_bias", "k_bias", "v_bias"), "needed there: k_bias, q_bias, v_bias"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_llama_cpp_cannot_hold(tmp_path: Path, case: tuple[dict[str, Any], Change | None, str]) -> None:
    options, change, part = case
    model = build(tmp_path, options, change)

    def no_weights(_: int) -> Any:
        raise AssertionError("a weight was read")

    with pytest.raises(InputError) as caught:
        check_runtime(replace(model, layers=LazyLayers(len(model.layers), no_weights)))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'pico'}: llama.cpp")
    assert part in message
    assert "\n" not in message
    with pytest.raises(InputError):
        write_gguf(model, resolve_quant("f32"), tmp_path / "m.gguf")
    assert not list(tmp_path.glob("*.gguf"))


def test_every_architecture_has_a_graph() -> None:
    forms = [family.gguf for family in FAMILIES if family.gguf is not None]
    named = {name for form in forms for name in (*form.reads, form.writes, form.mixed) if name is not None}
    assert named == GRAPHS.keys()
    assert all(GRAPHS[form.mixed].mixed for form in forms if form.mixed is not None)


def test_slopes_are_those_of_the_runtime() -> None:
    """Powers of two first; then every other one of twice as many heads, as MPT itself has them."""
    assert alibi_slopes(8.0, 4) == (0.25, 0.0625, 0.015625, 0.00390625)
    assert alibi_slopes(8.0, 6) == (*alibi_slopes(8.0, 4), *alibi_slopes(8.0, 8)[:4:2])
    assert alibi_slopes(0.0, 4) == ()


def test_bases_and_factors_are_found() -> None:
    plain = plain_frequencies(5e5, 16)
    assert rope.base_and_factor(plain, 5e5) == (5e5, 1.0)
    assert rope.base_and_factor(tuple(omega / 8 for omega in plain), 1e4) == pytest.approx((5e5, 8.0))
    for odd in (CHOSEN, (1.0, *[1e-12] * 40), (1e-12, 1.0)):
        assert rope.base_and_factor(odd, 1e4) is None
