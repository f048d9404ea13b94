"""The choice of inner dimensions: known models, and what must hold for every model, ratio and block."""

from __future__ import annotations

import itertools

import pytest

from a3q.dimensions import HEAD_STEP, UNIT_STEP, Choice, candidates, component_parameters, head_grid, make_choice
from a3q.families import FAMILIES, Family, family_for_hf
from a3q.model import ModelConfig
from a3q.reduce import Dimensions

LLAMA = family_for_hf("llama", "test")
BLOCKS = (1, 32, 256)
RATIOS = (0.01, 0.05, 0.1, 0.2, 0.25, 0.3, 1 / 3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9)


def config(hidden: int, heads: int, kv_heads: int, head_dim: int, intermediate: int) -> ModelConfig:
    frequencies = tuple(10000.0 ** (-2 * i / head_dim) for i in range(head_dim // 2))
    return ModelConfig(
        num_hidden_layers=2,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        v_head_dim=head_dim,
        vocab_size=1000,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        frequencies=frequencies,
        tie_word_embeddings=True,
    )


CONFIGS = {
    "smollm2-135m": config(576, 9, 3, 64, 1536),
    "qwen2-0.5b": config(896, 14, 2, 64, 4864),
    "tinyllama-1.1b": config(2048, 32, 4, 64, 5632),
    "llama-2-7b": config(4096, 32, 32, 128, 11008),
    "llama-3.1-8b": config(4096, 32, 8, 128, 14336),
    "odd-mlp": config(896, 14, 2, 64, 4871),
    "tiny": config(64, 4, 2, 16, 96),
    "smallest": config(16, 2, 1, 8, 24),
}


def sizes(choices: list[Choice]) -> list[tuple[int, int, int]]:
    return [(d.head_dim, d.v_head_dim, d.intermediate_size) for d in (choice.dimensions for choice in choices)]


@pytest.mark.parametrize(
    ("name", "block", "expected"),
    [
        ("smollm2-135m", 1, [(48, 48, 1152)]),
        # 9 heads: only head sizes that are multiples of 32 themselves give rows of whole blocks.
        ("smollm2-135m", 32, [(64, 64, 1024), (32, 32, 1280)]),
        ("llama-3.1-8b", 1, [(96, 96, 10752)]),
        ("llama-3.1-8b", 32, [(96, 96, 10752)]),
        ("llama-3.1-8b", 256, [(96, 96, 10752)]),
        ("tinyllama-1.1b", 32, [(48, 48, 4224)]),
        ("qwen2-0.5b", 32, [(48, 48, 3648)]),
    ],
)
def test_a_quarter_of_known_models(name: str, block: int, expected: list[tuple[int, int, int]]) -> None:
    found = candidates(LLAMA, CONFIGS[name], 0.25, block)
    assert sizes(found) == expected
    assert [choice.achieved for choice in found] == pytest.approx([0.25] * len(found), abs=1e-12)
    assert all(choice.asked == 0.25 for choice in found)


def all_choices(of: ModelConfig, ratio: float, block: int) -> list[Choice]:
    """Everything on the grid whose head size is next to the uniform one."""
    step = max(UNIT_STEP, block)
    units = {of.intermediate_size, *range(step, of.intermediate_size + 1, step)}
    wanted = of.head_dim * (1 - ratio)
    above = [r for r in head_grid(of, block) if r >= wanted]
    below = [r for r in head_grid(of, block) if r <= wanted] or [min(head_grid(of, block))]
    heads = {min(above), max(below)}
    return [make_choice(LLAMA, of, Dimensions(r, r, n), ratio) for r, n in itertools.product(heads, units)]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("of", CONFIGS.values(), ids=CONFIGS)
def test_what_holds_for_every_candidate(of: ModelConfig, block: int) -> None:
    parameters = component_parameters(LLAMA, of)
    step = max(UNIT_STEP, block) / of.intermediate_size * parameters["MLP"] / sum(parameters.values())
    for ratio in RATIOS:
        found = candidates(LLAMA, of, ratio, block)
        assert 1 <= len(found) <= 2
        assert len({choice.dimensions for choice in found}) == len(found)
        for choice in found:
            r, v, n = sizes([choice])[0]
            assert r == v
            assert r == of.head_dim or (0 < r < of.head_dim and r % HEAD_STEP == 0)
            assert r == of.head_dim or of.num_attention_heads * r % block == 0
            assert n == of.intermediate_size or (0 < n < of.intermediate_size and n % max(UNIT_STEP, block) == 0)
            assert abs(choice.achieved - ratio) <= max(0.01, step) or len(found) == 1
            assert choice == make_choice(LLAMA, of, choice.dimensions, ratio)
        nearest = min(abs(choice.achieved - ratio) for choice in all_choices(of, ratio, block))
        if len(found) == 1:
            assert abs(found[0].achieved - ratio) <= nearest + 1e-12, (ratio, found)


@pytest.mark.parametrize("name", ["smollm2-135m", "qwen2-0.5b", "tinyllama-1.1b", "llama-2-7b", "llama-3.1-8b"])
def test_real_models_reach_what_is_asked(name: str) -> None:
    """Up to the ratio where the grid of 32 ends, within a step of it."""
    for ratio in (0.05, 0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75):
        for choice in candidates(LLAMA, CONFIGS[name], ratio, 32):
            assert choice.achieved == pytest.approx(ratio, abs=0.011), (ratio, choice)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_shares_per_component(family: Family) -> None:
    of = CONFIGS["smollm2-135m"]
    assert component_parameters(family, of) == {
        "QK": 576 * 64 * (9 + 3),
        "OV": 576 * 64 * (9 + 3),
        "MLP": 3 * 576 * 1536,
    }
    choice = make_choice(family, of, Dimensions(48, 32, 1152), 0.3)
    assert choice.per_component == pytest.approx({"QK": 0.25, "OV": 0.5, "MLP": 0.25})
    assert choice.achieved == pytest.approx(0.25 + 0.25 * 442368 / 3538944)
    assert make_choice(family, of, Dimensions.of(of), 0.0).achieved == 0


def test_mlp_that_is_no_multiple_of_the_block() -> None:
    """The uniform size is off the grid, so the MLP goes to the multiple next to what is missing."""
    of = CONFIGS["odd-mlp"]
    for block in (32, 256):
        for choice in candidates(LLAMA, of, 0.25, block):
            assert choice.dimensions.intermediate_size % block == 0
            assert choice.achieved == pytest.approx(0.25, abs=0.03)
    # Almost nothing asked: the original size stays, odd as it is.
    assert sizes(candidates(LLAMA, of, 1e-6, 256)) == [(64, 64, 4871)]


def test_head_grid() -> None:
    assert head_grid(CONFIGS["smollm2-135m"], 1) == [64, 56, 48, 40, 32, 24, 16, 8]
    assert head_grid(CONFIGS["smollm2-135m"], 32) == [64, 32]
    assert head_grid(CONFIGS["smollm2-135m"], 256) == [64]
    # Each key head serves several query heads; rows are as wide as all of the latter.
    assert head_grid(CONFIGS["tinyllama-1.1b"], 256) == [64, 56, 48, 40, 32, 24, 16, 8]
    assert head_grid(CONFIGS["smallest"], 1) == [8]
