"""The forward pass against transformers, and its own ways of running against each other."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM

from a3q import batching
from a3q.batching import batches
from a3q.forward import KeyValueCache, attention, block, embed, hidden_states, mlp, norm, output_logits, rope
from a3q.model import Layer, Model
from converters.hf_reader import open_huggingface
from tests.pico import LLAMA3_ROPE, VOCAB, write_model

CPU = torch.device("cpu")
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied": {"tied": True},
    "llama3-rope": {"rope": LLAMA3_ROPE},
    "biases-small-heads": {"bias": True, "head_dim": 8},
    "wide-heads": {"head_dim": 32},
    "no-groups": {"num_key_value_heads": 4},
    "one-key-head": {"num_key_value_heads": 1},
    "qwen2": {"kind": "qwen2"},
    "qwen2-tied": {"kind": "qwen2", "tied": True},
    "mistral": {"kind": "mistral"},
}


def tokens(count: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (count, length), generator=torch.Generator().manual_seed(seed))


def logits(model: Model, ids: Tensor) -> Tensor:
    return output_logits(model, hidden_states(model, ids, CPU), CPU)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Sharp attention and biases, so that positions and heads matter."""
    return open_huggingface(write_model(tmp_path_factory.mktemp("forward"), "qwen2", initializer_range=0.25))


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "pico", **(VARIANTS[name] | {"initializer_range": 0.2}))
    ids = tokens(2, 100)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
    ours = logits(open_huggingface(folder), ids)
    assert (ours - expected).abs().max() < 1e-4 * expected.abs().max()


def test_positions_and_order_matter(model: Model) -> None:
    """Guards the comparison above: its models do tell positions apart, and never look ahead."""
    ids = tokens(1, 40)
    swapped = ids.clone()
    swapped[0, [3, 20]] = ids[0, [20, 3]]
    here, there = logits(model, ids), logits(model, swapped)
    torch.testing.assert_close(here[:, :3], there[:, :3])
    assert (here[:, -1] - there[:, -1]).abs().max() > 1e-2 * here.abs().max()


@pytest.mark.parametrize("prompt", [1, 2, 7, 24])
def test_cached_decoding_equals_the_whole_pass(model: Model, prompt: int) -> None:
    """Prompt at once, then token by token through the cache: the hidden states of one pass over all of them."""
    ids, config = tokens(3, 24), model.config
    caches = [KeyValueCache(config, shape, 3, 24, CPU) for shape in config.layers]
    states = []
    for start, end in [(0, prompt), *((i, i + 1) for i in range(prompt, 24))]:
        x = embed(model, ids[:, start:end], start)
        for shape, w, cache in zip(config.layers, model.layers, caches, strict=True):
            x = block(config, shape, w, x, cache)
        states.append(norm(config, model.top, "final_norm", x))
    torch.testing.assert_close(torch.cat(states, 1), hidden_states(model, ids, CPU), rtol=1e-4, atol=1e-4)
    assert [cache.start for cache in caches] == [24, 24]


def test_many_small_batches_equal_one(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = tokens(5, 30)
    assert len(list(batches(model.config, 5, 30))) == 1
    whole = hidden_states(model, ids, CPU)
    for limit in (1, 2 * 4 * 30 * (3 * 96 + 4 * 64)):
        monkeypatch.setattr(batching, "BATCH_BYTES", limit)
        assert len(list(batches(model.config, 5, 30))) == (5 if limit == 1 else 3)
        torch.testing.assert_close(hidden_states(model, ids, CPU), whole, rtol=1e-5, atol=1e-5)


def test_batches_cover_every_sequence_once(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "BATCH_BYTES", 3 * 4 * 10 * (3 * 96 + 4 * 64))
    slices = list(batches(model.config, 8, 10))
    assert slices == [slice(0, 3), slice(3, 6), slice(6, 8)]
    assert list(batches(model.config, 0, 10)) == []


def test_observer_sees_what_the_projections_take_in(model: Model) -> None:
    """`o` and `m` are the inputs of the output and down projections; `q` and `k` come before RoPE, `v` as projected."""
    w, config = model.layers[0], model.config
    shape = config.layers[0]
    x = embed(model, tokens(2, 9))
    seen: dict[str, Tensor] = {}
    normed = norm(config, w, "attn_norm", x)
    attended = attention(config, shape, w, normed, seen.__setitem__)
    inner = mlp(config, w, norm(config, w, "mlp_norm", x + attended), seen.__setitem__)
    assert sorted(seen) == ["k", "m", "o", "q", "v"]
    torch.testing.assert_close(attended, linear(seen["o"].transpose(1, 2).flatten(2), w["o"]))
    torch.testing.assert_close(inner, linear(seen["m"], w["down"]))
    torch.testing.assert_close(block(config, shape, w, x), x + attended + inner)
    torch.testing.assert_close(seen["q"].transpose(1, 2).flatten(2), linear(normed, w["q"], w["q_bias"]))
    torch.testing.assert_close(seen["k"].transpose(1, 2).flatten(2), linear(normed, w["k"], w["k_bias"]))
    torch.testing.assert_close(seen["v"].transpose(1, 2).flatten(2), linear(normed, w["v"], w["v_bias"]))


def test_value_heads_may_differ_in_size(model: Model) -> None:
    """Value heads with further dimensions that the output projection ignores give the same logits, cached or not."""
    shape = dataclasses.replace(model.config.layers[0], v_head_dim=20)
    config = dataclasses.replace(model.config, layers=(shape,) * 2)

    def widen(w: Layer) -> Layer:
        v = torch.cat((w["v"].view(2, 16, 64), torch.randn(2, 4, 64)), 1).reshape(40, 64)
        bias = torch.cat((w["v_bias"].view(2, 16), torch.randn(2, 4)), 1).reshape(40)
        o = torch.cat((w["o"].view(64, 4, 16), torch.zeros(64, 4, 4)), 2).reshape(64, 80)
        return w | {"v": v, "v_bias": bias, "o": o}

    wide = dataclasses.replace(model, config=config, layers=[widen(w) for w in model.layers])
    ids = tokens(2, 12)
    torch.testing.assert_close(logits(wide, ids), logits(model, ids), rtol=1e-4, atol=1e-4)
    x = embed(model, ids[:, :1])
    cached = block(config, shape, wide.layers[0], x, KeyValueCache(config, shape, 2, 4, CPU))
    torch.testing.assert_close(cached, block(config, shape, wide.layers[0], x))


def test_rope_turns_pairs_and_windows_keep_positions() -> None:
    frequencies = (1.0, 0.1)
    x = torch.randn(1, 1, 7, 4, generator=torch.Generator().manual_seed(0))
    turned = rope((frequencies,), 7, CPU)
    turn = torch.exp(1j * torch.outer(torch.arange(7.0), torch.tensor(frequencies)))
    expected = torch.complex(*x.chunk(2, -1)) * turn
    torch.testing.assert_close(turned(x), torch.cat((expected.real, expected.imag), -1))
    torch.testing.assert_close(turned.window(2, 3)(x[:, :, 2:5]), turned(x)[:, :, 2:5])


def test_rope_lists_for_each_key_head_and_dimensions_that_stay() -> None:
    """Two key heads, each with its list for two query heads; the fifth dimension is not turned."""
    lists = ((1.0, 0.1), (0.5, 0.02))
    x = torch.randn(1, 4, 7, 5, generator=torch.Generator().manual_seed(0))
    found = rope(lists, 7, CPU)(x)
    for head in range(4):
        alone = rope((lists[head // 2],), 7, CPU)(x[:, head : head + 1, :, :4])
        torch.testing.assert_close(found[:, head : head + 1, :, :4], alone)
    assert torch.equal(found[..., 4], x[..., 4])
    assert torch.equal(rope((), 7, CPU)(x), x)


def test_progress_is_reported_once_a_layer(model: Model) -> None:
    calls: list[int] = []
    hidden_states(model, tokens(1, 4), CPU, lambda: calls.append(1))
    assert len(calls) == model.config.num_hidden_layers
