"""The forward pass against transformers, and its own ways of running against each other."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import embedding, linear
from transformers import AutoModelForCausalLM

from a3q import forward
from a3q.forward import KeyValueCache, Rope, batches, block, hidden_states, output_logits, rms_norm
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
    rope = Rope(config.frequencies, 24, CPU)
    caches = [KeyValueCache(config, 3, 24, CPU) for _ in model.layers]
    states = []
    for start, end in [(0, prompt), *((i, i + 1) for i in range(prompt, 24))]:
        x = embedding(ids[:, start:end], model.embed)
        for w, cache in zip(model.layers, caches, strict=True):
            x = block(config, w, x, rope.window(start, end), cache=cache)
        states.append(rms_norm(x, model.final_norm, config.rms_norm_eps))
    torch.testing.assert_close(torch.cat(states, 1), hidden_states(model, ids, CPU), rtol=1e-4, atol=1e-4)
    assert [cache.length for cache in caches] == [24, 24]


def test_many_small_batches_equal_one(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = tokens(5, 30)
    assert len(list(batches(model.config, 5, 30))) == 1
    whole = hidden_states(model, ids, CPU)
    for limit in (1, 2 * 4 * 30 * (3 * 96 + 4 * 64)):
        monkeypatch.setattr(forward, "BATCH_BYTES", limit)
        assert len(list(batches(model.config, 5, 30))) == (5 if limit == 1 else 3)
        torch.testing.assert_close(hidden_states(model, ids, CPU), whole, rtol=1e-5, atol=1e-5)


def test_batches_cover_every_sequence_once(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "BATCH_BYTES", 3 * 4 * 10 * (3 * 96 + 4 * 64))
    slices = list(batches(model.config, 8, 10))
    assert slices == [slice(0, 3), slice(3, 6), slice(6, 8)]
    assert list(batches(model.config, 0, 10)) == []


def test_observer_sees_what_the_projections_take_in(model: Model) -> None:
    """`o` and `m` are the inputs of the output and down projections; `q` and `k` come before RoPE."""
    w, config = model.layers[0], model.config
    x = embedding(tokens(2, 9), model.embed)
    seen: dict[str, Tensor] = {}
    out = block(config, w, x, Rope(config.frequencies, 9, CPU), seen.__setitem__)
    assert sorted(seen) == ["k", "m", "o", "q"]
    after = x + linear(seen["o"].transpose(1, 2).flatten(2), w["o"])
    torch.testing.assert_close(out, after + linear(seen["m"], w["down"]))
    normed = rms_norm(x, w["attn_norm"], config.rms_norm_eps)
    torch.testing.assert_close(seen["q"].transpose(1, 2).flatten(2), linear(normed, w["q"], w["q_bias"]))
    torch.testing.assert_close(seen["k"].transpose(1, 2).flatten(2), linear(normed, w["k"], w["k_bias"]))


def test_value_heads_may_differ_in_size(model: Model) -> None:
    """Value heads with further dimensions that the output projection ignores give the same logits, cached or not."""
    config = dataclasses.replace(model.config, v_head_dim=20)

    def widen(w: Layer) -> Layer:
        v = torch.cat((w["v"].view(2, 16, 64), torch.randn(2, 4, 64)), 1).reshape(40, 64)
        bias = torch.cat((w["v_bias"].view(2, 16), torch.randn(2, 4)), 1).reshape(40)
        o = torch.cat((w["o"].view(64, 4, 16), torch.zeros(64, 4, 4)), 2).reshape(64, 80)
        return w | {"v": v, "v_bias": bias, "o": o}

    wide = dataclasses.replace(model, config=config, layers=[widen(w) for w in model.layers])
    ids = tokens(2, 12)
    torch.testing.assert_close(logits(wide, ids), logits(model, ids), rtol=1e-4, atol=1e-4)
    x = embedding(ids[:, :1], model.embed)
    rope = Rope(config.frequencies, 1, CPU)
    cached = block(config, wide.layers[0], x, rope, cache=KeyValueCache(config, 2, 4, CPU))
    torch.testing.assert_close(cached, block(config, wide.layers[0], x, rope))


def test_rope_turns_pairs_and_windows_keep_positions() -> None:
    frequencies = (1.0, 0.1)
    x = torch.randn(1, 1, 7, 4, generator=torch.Generator().manual_seed(0))
    rope = Rope(frequencies, 7, CPU)
    turn = torch.exp(1j * torch.outer(torch.arange(7.0), torch.tensor(frequencies)))
    expected = torch.complex(*x.chunk(2, -1)) * turn
    torch.testing.assert_close(rope(x), torch.cat((expected.real, expected.imag), -1))
    torch.testing.assert_close(rope.window(2, 5)(x[:, :, 2:5]), rope(x)[:, :, 2:5])


def test_progress_is_reported_once_a_layer(model: Model) -> None:
    calls: list[int] = []
    hidden_states(model, tokens(1, 4), CPU, lambda: calls.append(1))
    assert len(calls) == model.config.num_hidden_layers
