"""The transform that is free inside a head: it must change nothing, and make what is rounded alike in size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from a3q.components import even_heads
from a3q.forward import attention
from a3q.model import Layer, Model
from a3q.solve.rotate import key_scales, spreading, value_transforms
from converters.hf_reader import open_huggingface
from tests.pico import write_model

CPU = torch.device("cpu")
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"kind": "qwen2"},
    "gpt_neox": {"kind": "gpt_neox"},
    "qwen3": {"kind": "qwen3"},
    "gpt2": {"kind": "gpt2"},
    "mpt": {"kind": "mpt"},
    "head of 24": {"head_dim": 24},
}


@pytest.mark.parametrize("n", [8, 64, 48, 40, 1])
def test_spreading_is_orthogonal_and_flat(n: int) -> None:
    Q = spreading(n, CPU)
    torch.testing.assert_close(Q @ Q.T, torch.eye(n), rtol=0, atol=1e-5)
    # √2 is what the cosine transform has over a Hadamard matrix.
    assert float(Q.abs().max()) <= (2 / n) ** 0.5 + 1e-6


@pytest.mark.parametrize("d", [16, 24])
def test_value_transforms_undo_each_other_and_even_out(d: int) -> None:
    generator = torch.Generator().manual_seed(0)
    energy = torch.rand(3, d, generator=generator) ** 4 + 1e-3
    norms = torch.rand(3, d, generator=generator) + 0.1
    T, inverse = value_transforms(energy, norms)
    torch.testing.assert_close(T @ inverse, torch.eye(d).expand(3, d, d), rtol=0, atol=1e-4)
    after = (T.square() * energy[:, :, None]).sum(1)
    assert bool((after.amax(1) / after.amin(1) < 0.1 * energy.amax(1) / energy.amin(1)).all())


@pytest.mark.parametrize("energy", [0.0, float("inf"), 1e-30])
def test_awkward_energies_give_finite_transforms(energy: float) -> None:
    E, norms = torch.ones(2, 8), torch.ones(2, 8)
    E[0, 3], norms[1, 2] = energy, 0.0
    T, inverse = value_transforms(E, norms)
    assert T.isfinite().all() and inverse.isfinite().all()
    torch.testing.assert_close(T @ inverse, torch.eye(8).expand(2, 8, 8), rtol=0, atol=1e-4)
    assert key_scales(E, 4).isfinite().all() and bool((key_scales(E, 4) > 0).all())


def test_a_dead_head_is_left_as_it_is() -> None:
    assert torch.equal(key_scales(torch.zeros(2, 8), 4), torch.ones(2, 8))


@pytest.mark.parametrize("pairs", [0, 4, 8])
def test_key_scales(pairs: int) -> None:
    """Both parts of a pair have one; the root of sizes, so that energies end up at their roots; mean 1."""
    energy = torch.rand(3, 16, generator=torch.Generator().manual_seed(0)) + 0.1
    scales = key_scales(energy, pairs)
    assert torch.equal(scales[:, :pairs], scales[:, pairs : 2 * pairs])
    torch.testing.assert_close(scales.mean(1), torch.ones(3))
    joint = energy.clone()
    joint[:, :pairs] = joint[:, pairs : 2 * pairs] = (energy[:, :pairs] + energy[:, pairs : 2 * pairs]) / 2
    ratio = scales**4 / joint
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Model:
    return open_huggingface(write_model(tmp_path / "m", **MODELS[request.param]))


def uneven(model: Model) -> Layer:
    """The first layer with keys and values of very unequal rows, and key biases that exceed those."""
    w = {role: weight.clone() for role, weight in model.layers[0].items()}
    for role in ("k", "v"):
        w[role] *= torch.logspace(-1, 1, len(w[role]))[torch.randperm(len(w[role]))][:, None]
    if "k_bias" in w:
        w["k_bias"] = 20 * torch.randn_like(w["k_bias"])
    return w


def test_attention_stays_the_same(model: Model) -> None:
    torch.manual_seed(0)
    config, shape = model.config, model.config.layers[0]
    x = torch.randn(3, 40, config.hidden_size) + 0.5
    rows, old = x.flatten(0, 1), uneven(model)
    new = dict(old)
    even_heads(config, shape, new, rows.T @ rows / len(rows), rows.mean(0))
    one, other = attention(config, shape, old, x), attention(config, shape, new, x)
    assert float((one - other).norm() / one.norm()) < 1e-4
    assert new.keys() == old.keys()
    for role in old:
        assert new[role].shape == old[role].shape and new[role].is_contiguous()
    assert torch.equal(new["k"], old["k"]) is (config.qk_norm is not None)
    changed = {role for role in old if not torch.equal(new[role], old[role])}
    assert {"v", "o"} <= changed <= {"q", "k", "v", "o", "q_bias", "k_bias", "v_bias"}


def test_keys_and_values_become_alike_in_size(model: Model) -> None:
    torch.manual_seed(0)
    config, shape = model.config, model.config.layers[0]
    x = torch.randn(3, 40, config.hidden_size) + 0.5
    rows, w = x.flatten(0, 1), uneven(model)

    def spread(role: str) -> float:
        """Largest over mean energy of a head's dimensions, mean of the heads."""
        y = torch.nn.functional.linear(rows, w[role], w.get(f"{role}_bias"))
        energy = y.square().mean(0).view(config.num_key_value_heads, -1)
        return float((energy.amax(1) / energy.mean(1)).mean())

    before = {role: spread(role) for role in ("k", "v")}
    even_heads(config, shape, w, rows.T @ rows / len(rows), rows.mean(0))
    assert spread("v") < 0.7 * before["v"]
    if config.qk_norm is None:
        # By the root of their sizes only.
        assert spread("k") < 0.8 * before["k"]
