"""The choice of inner dimensions: known models, and what must hold for every model, ratio, grid and block."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from a3q.dimensions import (
    ALL,
    MOST_TRIED,
    NEAR,
    Grid,
    Plan,
    Request,
    folder_grid,
    gguf_grid,
    make_plan,
    mixed,
    settle,
    size_of,
    uniform,
    unit_costs,
    unreduced,
)
from a3q.errors import InputError
from a3q.families import COMPONENTS, FAMILIES, Component, Family, family_for_hf
from a3q.model import LayerShape, ModelConfig, plain_frequencies
from a3q.sensitivity import Sensitivity

LLAMA = family_for_hf("llama", "test")
QWEN3 = family_for_hf("qwen3", "test")
GPT2 = family_for_hf("gpt2", "test")
OPT = family_for_hf("opt", "test")
BLOCKS = (1, 32, 256)
RATIOS = (0.01, 0.05, 0.1, 0.2, 0.25, 0.3, 1 / 3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9)
HEADS: frozenset[Component] = frozenset(("QK", "OV"))
MLP: frozenset[Component] = frozenset(("MLP",))


def config(hidden: int, heads: int, kv_heads: int, head_dim: int, *units: int) -> ModelConfig:
    """Layers with MLPs of these sizes; two alike if there is one."""
    frequencies = (plain_frequencies(10000.0, head_dim),)
    layers = tuple(LayerShape(head_dim, head_dim, n, frequencies) for n in (units * 2 if len(units) == 1 else units))
    return ModelConfig(layers, hidden, heads, kv_heads, 1000, 2048, 1e-5, True)


CONFIGS = {
    "smollm2-135m": config(576, 9, 3, 64, 1536),
    "qwen2-0.5b": config(896, 14, 2, 64, 4864),
    "tinyllama-1.1b": config(2048, 32, 4, 64, 5632),
    "llama-2-7b": config(4096, 32, 32, 128, 11008),
    "llama-3.1-8b": config(4096, 32, 8, 128, 14336),
    "twelve-heads": config(1536, 12, 2, 128, 8192),
    "odd-mlp": config(896, 14, 2, 64, 4871),
    "tiny": config(64, 4, 2, 16, 96),
    "smallest": config(16, 2, 1, 8, 24),
}
REAL = ["smollm2-135m", "qwen2-0.5b", "tinyllama-1.1b", "llama-2-7b", "llama-3.1-8b"]


def sizes(plans: Sequence[Plan]) -> list[tuple[int, int, int]]:
    """The sizes of plans whose layers are all alike."""
    assert all(len(set(plan.dimensions)) == 1 for plan in plans)
    firsts = [plan.dimensions[0] for plan in plans]
    return [(one.qk_head_dim, one.v_head_dim, one.intermediate_size) for one in firsts]


def column(plan: Plan, component: Component) -> list[int]:
    """Sizes of a component, layer by layer."""
    names = {"QK": "qk_head_dim", "OV": "v_head_dim", "MLP": "intermediate_size"}
    return [getattr(one, names[component]) for one in plan.dimensions]


def evenly(of: ModelConfig, ratio: float, block: int, **request: object) -> list[Plan]:
    return uniform(LLAMA, of, gguf_grid(LLAMA, of, block), replace(Request(ratio), **request))  # type: ignore[arg-type]


# What is asked


def test_groups() -> None:
    assert Request(0.25).groups() == [(ALL, 0.25)]
    assert Request(0.0).groups() == []
    assert Request(0.0).reduced == frozenset()
    assert Request(0.5, MLP).groups() == [(MLP, 0.5)]
    apart = Request(0.25, ALL, {"MLP": 0.5})
    assert apart.groups() == [(HEADS, 0.25), (MLP, 0.5)]
    assert apart.reduced == ALL
    assert Request(0.0, ALL, {"MLP": 0.5}).reduced == MLP
    assert Request(0.25, ALL, {"MLP": 0.0}).reduced == HEADS
    assert Request(0.25, MLP, {"MLP": 0.3}).groups() == [(MLP, 0.3)]


def test_settle_takes_what_the_output_can_hold() -> None:
    grid = gguf_grid(LLAMA, CONFIGS["tiny"], 32)
    for request in (Request(0.25), Request(0.25, MLP), Request(0.25, ALL, {"MLP": 0.5}), Request(0.3, HEADS)):
        assert settle(request, grid, LLAMA, True) == (request, None)
    for family in FAMILIES:
        request = Request(0.25, ALL, {"QK": 0.1, "OV": 0.5})
        assert settle(request, folder_grid(CONFIGS["tiny"]), family, True) == (request, None)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family.gguf and family.gguf.reduces != ALL])
def test_settle_leaves_heads_that_cannot_shrink(family: Family) -> None:
    grid = gguf_grid(family, CONFIGS["tiny"], 32)
    request, note = settle(Request(0.25), grid, family, False)
    assert request == Request(0.25, MLP)
    assert note is not None
    for part in (family.name, "OV and QK stay", "the ratio is of MLP", "a3q reduce"):
        assert part in note
    # Nothing is said where nothing was asked of them.
    assert settle(Request(0.25, MLP), grid, family, True) == (Request(0.25, MLP), None)
    assert settle(Request(0.0), grid, family, False) == (Request(0.0), None)
    request, _ = settle(Request(0.25, ALL, {"MLP": 0.5}), grid, family, False)
    assert request.groups() == [(MLP, 0.5)]


@pytest.mark.parametrize(
    ("family", "request_", "parts"),
    [
        (QWEN3, Request(0.25, HEADS), ("cannot hold ov and qk of qwen3 reduced", "--components mlp", "a3q reduce")),
        (QWEN3, Request(0.25), ("cannot hold ov and qk of qwen3 reduced", "--components mlp")),
        (GPT2, Request(0.25, frozenset(("QK",))), ("cannot hold qk of gpt2 reduced", "--components mlp")),
    ],
)
def test_settle_refuses_what_was_named(family: Family, request_: Request, parts: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as caught:
        settle(request_, gguf_grid(family, CONFIGS["tiny"], 32), family, True)
    assert all(part in str(caught.value) for part in parts)
    assert "\n" not in str(caught.value)


def test_heads_with_a_norm_stay_unless_asked() -> None:
    grid = folder_grid(CONFIGS["tiny"])
    request, note = settle(Request(0.25), grid, QWEN3, False)
    assert request.reduced == {"OV", "MLP"}
    assert note is not None and "QK stays" in note and "--components qk,ov,mlp" in note
    assert settle(Request(0.25), grid, QWEN3, True) == (Request(0.25), None)
    own = Request(0.25, ALL, {"QK": 0.1})
    assert settle(own, grid, QWEN3, False) == (own, None)
    assert settle(Request(0.25), grid, LLAMA, False) == (Request(0.25), None)


def test_settle_refuses_a_ratio_for_what_cannot_shrink() -> None:
    with pytest.raises(InputError, match="cannot hold qk of qwen3"):
        settle(Request(0.25, MLP | {"QK"}, {"QK": 0.3}), gguf_grid(QWEN3, CONFIGS["tiny"], 1), QWEN3, False)


def test_settle_without_a_gguf_architecture() -> None:
    for explicit in (False, True):
        with pytest.raises(InputError, match=r"of opt reduced; write a Hugging Face folder with a3q reduce$"):
            settle(Request(0.25), gguf_grid(OPT, CONFIGS["tiny"], 1), OPT, explicit)


@pytest.mark.parametrize(
    ("request_", "asked"),
    [
        (Request(0.25, frozenset(("QK", "MLP"))), "OV 0, QK 0.25"),
        (Request(0.25, frozenset(("OV",))), "OV 0.25, QK 0"),
        (Request(0.25, ALL, {"QK": 0.5}), "OV 0.25, QK 0.5"),
        (Request(0.25, ALL, {"QK": 0.5, "OV": 0.3}), "OV 0.3, QK 0.5"),
        (Request(0.25, ALL, {"OV": 0.0}), "OV 0, QK 0.25"),
    ],
)
def test_settle_wants_one_head_size(request_: Request, asked: str) -> None:
    grid = gguf_grid(LLAMA, CONFIGS["tiny"], 1)
    with pytest.raises(InputError, match=re.escape(f"one size for keys and values ({asked}); reduce QK and OV alike")):
        settle(request_, grid, LLAMA, False)
    same = Request(0.25, ALL, {"QK": 0.4, "OV": 0.4})
    assert settle(same, grid, LLAMA, False) == (same, None)
    # Where only one was named, with the ratio of the rest, the other must not be weighed against the MLP.
    for named in HEADS:
        settled, _ = settle(Request(0.25, ALL, {named: 0.25}), grid, LLAMA, False)
        assert settled == Request(0.25, ALL, {"QK": 0.25, "OV": 0.25})


# Grids


def test_head_sizes() -> None:
    def heads(name: str, block: int) -> tuple[int, ...]:
        of = CONFIGS[name]
        found = {gguf_grid(LLAMA, of, block).sizes(of, of.layers[0], c) for c in HEADS}
        assert len(found) == 1
        return found.pop()

    assert heads("smollm2-135m", 1) == (8, 16, 24, 32, 40, 48, 56, 64)
    assert heads("smollm2-135m", 32) == (32, 64)
    # Super-blocks are out of the question: rows of 576 do not divide into them.
    assert heads("smollm2-135m", 256) == (32, 64)
    # Each key head serves several query heads; rows are as wide as all of the latter.
    assert heads("tinyllama-1.1b", 256) == (8, 16, 24, 32, 40, 48, 56, 64)
    assert heads("smallest", 1) == (8,)
    # 12 heads: the few sizes that would give rows of whole super-blocks are worth less than a finer choice.
    assert heads("twelve-heads", 256) == heads("twelve-heads", 32) == tuple(range(8, 129, 8))


def test_mlp_sizes() -> None:
    of = CONFIGS["odd-mlp"]
    for block in (1, 32, 256):
        # Rows of 896 do not divide into super-blocks, so those of the MLP need not either.
        assert gguf_grid(LLAMA, of, block).sizes(of, of.layers[0], "MLP")[-3:] == (4832, 4864, 4871)
    of = CONFIGS["twelve-heads"]
    assert gguf_grid(LLAMA, of, 256).sizes(of, of.layers[0], "MLP") == tuple(range(256, 8193, 256))
    # Seven sizes in all would be too few.
    of = config(1536, 12, 2, 128, 7 * 256)
    assert gguf_grid(LLAMA, of, 256).sizes(of, of.layers[0], "MLP") == tuple(range(32, 7 * 256 + 1, 32))


@pytest.mark.parametrize("of", [*CONFIGS.values(), config(36, 3, 3, 12, 50), config(80, 1, 1, 80, 600)])
def test_folder_sizes(of: ModelConfig) -> None:
    grid = folder_grid(of)
    assert (grid.components, grid.block, grid.one_head_size, grid.mixed_units) == (ALL, 1, False, True)
    for component in COMPONENTS:
        found = grid.sizes(of, of.layers[0], component)
        assert found[-1] == size_of(of.layers[0], component)
        assert list(found) == sorted(set(found))
        # RoPE turns pairs, and kernels like even numbers.
        assert all(size % 2 == 0 and size > 0 for size in found[:-1])
        assert len(found) >= 3


# All layers alike


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
    found = evenly(CONFIGS[name], 0.25, block)
    assert sizes(found) == expected
    assert [plan.achieved for plan in found] == pytest.approx([0.25] * len(found), abs=1e-12)
    assert all(plan.asked == 0.25 and plan.predicted_kl is None for plan in found)


def neighbours(of: ModelConfig, ratio: float, grid: Grid) -> list[Plan]:
    """Everything on the grid whose head size is next to the even split's."""
    shape = of.layers[0]
    wanted = shape.qk_head_dim * (1 - ratio)
    options = grid.sizes(of, shape, "QK")
    heads = {
        min(r for r in options if r >= wanted),
        max([r for r in options if r <= wanted], default=options[0]),
    }
    every = itertools.product(heads, grid.sizes(of, shape, "MLP"))
    return [
        make_plan(LLAMA, of, Request(ratio), [{"QK": r, "OV": r, "MLP": n}] * of.num_hidden_layers) for r, n in every
    ]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("of", CONFIGS.values(), ids=CONFIGS)
def test_what_holds_for_every_candidate(of: ModelConfig, block: int) -> None:
    grid, shape = gguf_grid(LLAMA, of, block), of.layers[0]
    costs = unit_costs(LLAMA, of)
    total = sum(costs[c] * size_of(shape, c) for c in COMPONENTS)
    step = max(32, grid.unit_block) * costs["MLP"] / total
    for ratio in RATIOS:
        found = evenly(of, ratio, block)
        assert 1 <= len(found) <= 2
        assert len({plan.dimensions for plan in found}) == len(found)
        for plan in found:
            r, v, n = sizes([plan])[0]
            assert r == v
            assert r in grid.sizes(of, shape, "QK")
            assert n in grid.sizes(of, shape, "MLP")
            assert abs(plan.achieved - ratio) <= max(0.01, step) or len(found) == 1
            asked = [dict(zip(COMPONENTS, (r, v, n), strict=True))] * of.num_hidden_layers
            assert plan == make_plan(LLAMA, of, Request(ratio), asked)
        nearest = min(abs(plan.achieved - ratio) for plan in neighbours(of, ratio, grid))
        if len(found) == 1:
            assert abs(found[0].achieved - ratio) <= nearest + 1e-12, (ratio, found)


@pytest.mark.parametrize("name", REAL)
def test_real_models_reach_what_is_asked(name: str) -> None:
    """Up to the ratio where the grid of 32 ends, within a step of it."""
    for ratio in (0.05, 0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75):
        for plan in evenly(CONFIGS[name], ratio, 32):
            assert plan.achieved == pytest.approx(ratio, abs=0.011), (ratio, plan)


def test_mlp_that_is_no_multiple_of_the_block() -> None:
    """The even size is off the grid, so the MLP goes to the multiple next to what is missing."""
    of = config(1024, 16, 2, 64, 4871)
    for block in (32, 256):
        for plan in evenly(of, 0.25, block):
            assert plan.dimensions[0].intermediate_size % block == 0
            assert plan.achieved == pytest.approx(0.25, abs=0.03)
    # Almost nothing asked: the original size stays, odd as it is.
    assert sizes(evenly(of, 1e-6, 256))[0] == (64, 64, 4871)


def test_components_that_are_not_asked_stay() -> None:
    of = CONFIGS["llama-3.1-8b"]
    assert sizes(evenly(of, 0.25, 1, components=MLP)) == [(128, 128, 10752)]
    [heads] = evenly(of, 0.25, 1, components=HEADS)
    assert sizes([heads]) == [(96, 96, 14336)]
    assert (heads.asked, heads.achieved) == (0.25, 0.25)
    assert heads.per_component == {"QK": 0.25, "OV": 0.25, "MLP": 0.0}
    # Without the MLP to make up for it, the nearest size, and that is said.
    [off] = evenly(CONFIGS["smollm2-135m"], 0.3, 32, components=HEADS)
    assert sizes([off]) == [(32, 32, 1536)]
    assert off.achieved == 0.5


def test_ratios_of_their_own() -> None:
    of = CONFIGS["llama-3.1-8b"]
    [plan] = evenly(of, 0.25, 1, own={"MLP": 0.5})
    assert sizes([plan]) == [(96, 96, 7168)]
    costs = unit_costs(LLAMA, of)
    weights = {c: costs[c] * size_of(of.layers[0], c) for c in COMPONENTS}
    expected = (0.25 * (weights["QK"] + weights["OV"]) + 0.5 * weights["MLP"]) / sum(weights.values())
    assert plan.asked == pytest.approx(expected)
    assert plan.achieved == pytest.approx(expected)
    free = Grid(ALL, 8, 32)
    [plan] = uniform(LLAMA, of, free, Request(0.0, ALL, {"QK": 0.5, "OV": 0.25}))
    assert sizes([plan]) == [(64, 96, 14336)]


def test_layers_that_differ_already() -> None:
    """Each loses the same share of what it has."""
    of = config(576, 9, 3, 64, 1536, 1024, 512)
    [plan] = evenly(of, 0.25, 1)
    assert column(plan, "MLP") == [1152, 768, 384]
    assert column(plan, "QK") == column(plan, "OV") == [48] * 3
    assert plan.achieved == 0.25
    narrow = replace(of.layers[1], qk_head_dim=32, v_head_dim=48)
    of = replace(of, layers=(of.layers[0], narrow, of.layers[2]))
    [plan] = uniform(LLAMA, of, Grid(ALL, 4, 32), Request(0.25))
    assert (column(plan, "QK"), column(plan, "OV")) == ([48, 24, 48], [48, 36, 48])
    for ratio in RATIOS:
        for plan in uniform(LLAMA, of, Grid(ALL, 4, 32), Request(ratio)):
            assert plan.achieved == pytest.approx(ratio, abs=0.03)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_shares_per_component(family: Family) -> None:
    of = CONFIGS["smollm2-135m"]
    gate = any(role.name == "gate" for role in family.layer)
    assert unit_costs(family, of) == {"QK": 576 * 12, "OV": 576 * 12, "MLP": (2 + gate) * 576}
    plan = make_plan(family, of, Request(0.3), [{"QK": 48, "OV": 32, "MLP": 1152}] * 2)
    assert plan.per_component == pytest.approx({"QK": 0.25, "OV": 0.5, "MLP": 0.25})
    heads = 2 * 576 * 12 * 64
    mlp = (2 + gate) * 576 * 1536
    assert plan.achieved == pytest.approx((0.375 * heads + 0.25 * mlp) / (heads + mlp))
    nothing = unreduced(family, of, Request(0.0))
    assert (nothing.asked, nothing.achieved) == (0, 0)
    assert sizes([nothing]) == [(64, 64, 1536)]


# By what each matters


def curve(grid: Grid, of: ModelConfig, shape: LayerShape, component: Component, kl: float) -> Sensitivity:
    """A loss that grows with the square of what is gone; `kl` where half is gone."""
    every = replace(grid, block=1, unit_block=1).sizes(of, shape, component)
    size = every[-1]
    probed = min(every, key=lambda n: abs(n - size / 2))
    return Sensitivity(every, tuple((1 - n / size) ** 2 for n in every), probed, kl)


def sensitivities(
    grid: Grid, of: ModelConfig, kl: Callable[[int, Component], float] = lambda i, c: 0.1
) -> list[dict[Component, Sensitivity]]:
    return [{c: curve(grid, of, shape, c, kl(i, c)) for c in COMPONENTS} for i, shape in enumerate(of.layers)]


def uneven(i: int, component: Component) -> float:
    return (0.3, 0.02, 0.1, 0.05)[i % 4] * {"QK": 0.5, "OV": 1.5, "MLP": 1.0}[component]


FOUR = {
    "smollm2-135m": config(576, 9, 3, 64, 1536, 1536, 1536, 1536),
    "llama-3.1-8b": config(4096, 32, 8, 128, 14336, 14336, 14336, 14336),
    "unlike": config(576, 9, 3, 64, 1536, 1024, 512, 768),
}


def weights(of: ModelConfig, components: frozenset[Component] = ALL) -> int:
    costs = unit_costs(LLAMA, of)
    return sum(costs[c] * size_of(shape, c) for shape in of.layers for c in components)


@pytest.mark.parametrize("output", ["folder", "gguf-1", "gguf-32", "gguf-256"])
@pytest.mark.parametrize("of", FOUR.values(), ids=FOUR)
def test_mixed_keeps_to_the_budget(of: ModelConfig, output: str) -> None:
    grid = folder_grid(of) if output == "folder" else gguf_grid(LLAMA, of, int(output.removeprefix("gguf-")))
    known = sensitivities(grid, of, uneven)
    costs = unit_costs(LLAMA, of)
    # The step of the MLP; a hull may leave out more than one.
    step = max(grid.unit_step, grid.unit_block) * costs["MLP"] / weights(of)
    for ratio in (0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9):
        plan = mixed(LLAMA, of, grid, Request(ratio), known)[0]
        for component in COMPONENTS:
            for shape, size in zip(of.layers, column(plan, component), strict=True):
                assert size in grid.sizes(of, shape, component)
        if grid.one_head_size:
            assert len({*column(plan, "QK"), *column(plan, "OV")}) == 1
        least = make_plan(
            LLAMA, of, Request(ratio), [{c: grid.sizes(of, shape, c)[0] for c in COMPONENTS} for shape in of.layers]
        )
        if least.achieved < ratio:
            # The grid has nothing so small.
            assert plan.dimensions == least.dimensions
            continue
        assert plan.achieved >= ratio - 1e-9
        assert plan.achieved == pytest.approx(ratio, abs=max(0.01, step)), (ratio, plan)
        assert plan.predicted_kl is not None
        assert plan.predicted_kl > 0


def test_exact_budgets_are_used_up() -> None:
    """1 - 0.9 is less than a tenth by a hair, which must not cost a step."""
    of = config(64, 4, 4, 16, 640)
    grid = Grid(ALL, 2, 32)
    plan = mixed(LLAMA, of, grid, Request(0.9, MLP), sensitivities(grid, of))[0]
    assert column(plan, "MLP") == [64, 64]
    assert plan.achieved == pytest.approx(0.9, abs=1e-12)


@pytest.mark.parametrize("output", ["folder", "gguf"])
def test_what_matters_keeps_more(output: str) -> None:
    of = FOUR["smollm2-135m"]
    grid = folder_grid(of) if output == "folder" else gguf_grid(LLAMA, of, 1)
    plan = mixed(LLAMA, of, grid, Request(0.25), sensitivities(grid, of, lambda i, c: (0.3, 0.02, 0.1, 0.05)[i]))[0]
    first, second, third, fourth = column(plan, "MLP")
    assert first > third > fourth > second
    if output == "folder":
        first, second, third, fourth = column(plan, "OV")
        assert first >= third >= fourth >= second
        assert first > second
    # One component that matters more in every layer.
    plan = mixed(LLAMA, of, grid, Request(0.25), sensitivities(grid, of, lambda i, c: 1.0 if c == "MLP" else 0.01))[0]
    assert plan.per_component["MLP"] < 0.15 < plan.per_component["QK"]


def test_head_sizes_predicted_nearly_alike_are_all_returned() -> None:
    of = FOUR["smollm2-135m"]
    grid = gguf_grid(LLAMA, of, 1)
    plans = mixed(LLAMA, of, grid, Request(0.25), sensitivities(grid, of))
    losses = [plan.predicted_kl or 0.0 for plan in plans]
    assert losses == sorted(losses)
    assert len(plans) <= MOST_TRIED
    assert losses[-1] <= (1 + NEAR) * losses[0]
    assert len({plan.dimensions[0].qk_head_dim for plan in plans}) == len(plans)
    # Where heads are dear beyond doubt, there is nothing to try.
    [only] = mixed(LLAMA, of, grid, Request(0.25), sensitivities(grid, of, lambda i, c: 0.01 if c == "MLP" else 9.0))
    assert column(only, "QK")[0] == 64


def test_alike_where_all_matter_alike() -> None:
    of = FOUR["llama-3.1-8b"]
    grid = gguf_grid(LLAMA, of, 32)
    plan = mixed(LLAMA, of, grid, Request(0.25), sensitivities(grid, of))[0]
    assert max(column(plan, "MLP")) - min(column(plan, "MLP")) <= 32
    assert plan.achieved == pytest.approx(0.25, abs=1e-3)


def test_prediction_is_the_sum_of_the_curves() -> None:
    of = FOUR["smollm2-135m"]
    grid = folder_grid(of)
    known = sensitivities(grid, of, uneven)
    plan = mixed(LLAMA, of, grid, Request(0.3), known)[0]
    costs = unit_costs(LLAMA, of)
    expected = sum(known[i][c].curve(costs[c]).loss_at(column(plan, c)[i]) for i in range(4) for c in COMPONENTS)
    assert plan.predicted_kl == pytest.approx(expected)
    # No better way was there among those with all layers alike.
    for other in uniform(LLAMA, of, grid, Request(0.3)):
        loss = sum(known[i][c].curve(costs[c]).loss_at(column(other, c)[i]) for i in range(4) for c in COMPONENTS)
        assert plan.predicted_kl < loss


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5])
def test_mixed_with_ratios_of_their_own(ratio: float) -> None:
    of = FOUR["smollm2-135m"]
    grid = folder_grid(of)
    known = sensitivities(grid, of, uneven)
    plan = mixed(LLAMA, of, grid, Request(ratio, ALL, {"QK": 0.5, "MLP": 0.3}), known)[0]
    # Steps of a head are a sixteenth of a fourth of the layers.
    assert plan.per_component == pytest.approx({"QK": 0.5, "OV": ratio, "MLP": 0.3}, abs=0.016)
    assert plan.per_component["QK"] >= 0.5
    assert len(set(column(plan, "QK"))) > 1
    alone = mixed(LLAMA, of, grid, Request(ratio, MLP), known)[0]
    assert alone.per_component == pytest.approx({"QK": 0, "OV": 0, "MLP": ratio}, abs=0.006)
    assert alone.achieved == alone.per_component["MLP"]
    grid = gguf_grid(LLAMA, of, 1)
    plan = mixed(LLAMA, of, grid, Request(0.25, ALL, {"MLP": ratio}), sensitivities(grid, of, uneven))[0]
    assert plan.per_component == pytest.approx({"QK": 0.25, "OV": 0.25, "MLP": ratio}, abs=0.006)
    plan = mixed(LLAMA, of, grid, Request(0.3, HEADS), sensitivities(grid, of, uneven))[0]
    assert column(plan, "QK") == column(plan, "OV") == [48] * 4


def test_layers_keep_something() -> None:
    """A layer that seems not to matter at all keeps a quarter; predictions so far off are worth little."""
    of = FOUR["smollm2-135m"]
    grid = folder_grid(of)
    plan = mixed(LLAMA, of, grid, Request(0.4), sensitivities(grid, of, lambda i, c: 0.0 if i == 1 else 1.0))[0]
    assert column(plan, "MLP")[1] == 384
    assert column(plan, "QK")[1] == column(plan, "OV")[1] == 16


def test_more_than_the_grid_has() -> None:
    """The smallest sizes, as for layers that are all alike; the pipeline says what was achieved."""
    of = CONFIGS["tiny"]
    for grid in (gguf_grid(LLAMA, of, 32), gguf_grid(LLAMA, of, 256)):
        plan = mixed(LLAMA, of, grid, Request(0.9), sensitivities(grid, of))[0]
        shape = of.layers[0]
        assert sizes([plan]) == [tuple(grid.sizes(of, shape, c)[0] for c in COMPONENTS)]
    only: frozenset[Component] = frozenset(("QK",))
    plan = mixed(LLAMA, of, folder_grid(of), Request(0.9, only), sensitivities(folder_grid(of), of))[0]
    assert sizes([plan]) == [(2, 16, 96)]


# The cache


def test_groups_with_a_share_of_the_cache() -> None:
    assert Request(0.0, kv=0.5).groups() == [(HEADS, 0.5)]
    assert Request(0.25, kv=0.5).groups() == [(MLP, 0.25), (HEADS, 0.5)]
    assert Request(0.25, HEADS, kv=0.5).groups() == [(HEADS, 0.5)]
    assert Request(0.25, kv=0.0).groups() == [(MLP, 0.25)]
    assert Request(0.0, ALL, {"MLP": 0.3}, kv=0.5).groups() == [(HEADS, 0.5), (MLP, 0.3)]
    assert Request(0.0, ALL, {"QK": 0.1}, kv=0.5).groups() == [(frozenset(("OV",)), 0.5), (frozenset(("QK",)), 0.1)]
    request = Request(0.25, kv=0.5)
    assert [request.share_of(c) for c in COMPONENTS] == [0.5, 0.5, 0.25]
    assert (request.largest, request.reduced) == (0.5, ALL)
    assert Request(0.0).largest == 0


@pytest.mark.parametrize(
    ("request_", "alone"),
    [
        (Request(0.0, kv=0.5), True),
        (Request(0.25, HEADS, kv=0.5), True),
        (Request(0.0, ALL, {"MLP": 0.0}, kv=0.5), True),
        (Request(0.25, kv=0.5), False),
        (Request(0.0, ALL, {"MLP": 0.1}, kv=0.5), False),
        (Request(0.25, HEADS), False),
        (Request(0.25), False),
    ],
)
def test_whether_only_the_cache_shrinks(request_: Request, alone: bool) -> None:
    assert request_.cache_only == alone


def test_head_sizes_of_a_quantized_cache() -> None:
    shape = LayerShape(80, 80, 256)
    of = ModelConfig((shape,), 320, 4, 2, 1000, 2048, 1e-5, True)
    assert gguf_grid(LLAMA, of, 1, "q8_0").sizes(of, shape, "QK") == (32, 64)
    assert gguf_grid(LLAMA, of, 1).sizes(of, shape, "OV")[-2:] == (72, 80)
    whole = replace(shape, qk_head_dim=128, v_head_dim=128)
    assert gguf_grid(LLAMA, of, 1, "q4_0").sizes(of, whole, "OV") == (32, 64, 96, 128)
    # Where no smaller one is possible, it stays, and llama.cpp will not start.
    small = replace(shape, qk_head_dim=24, v_head_dim=24)
    assert gguf_grid(LLAMA, of, 1, "q8_0").sizes(of, small, "QK") == (24,)
    assert gguf_grid(LLAMA, of, 1, "q8_0").sizes(of, shape, "MLP") == gguf_grid(LLAMA, of, 1).sizes(of, shape, "MLP")


def test_head_size_that_is_settled() -> None:
    of = CONFIGS["llama-3.1-8b"]
    grid = replace(gguf_grid(LLAMA, of, 1), head_size=96)
    shape = of.layers[0]
    assert grid.sizes(of, shape, "QK") == grid.sizes(of, shape, "OV") == (96,)
    assert len(grid.sizes(of, shape, "MLP")) > 1
    assert len(replace(grid, head_size=97).sizes(of, shape, "QK")) > 1
    known = sensitivities(gguf_grid(LLAMA, of, 1), of)
    for plan in (*uniform(LLAMA, of, grid, Request(0.25)), *mixed(LLAMA, of, grid, Request(0.25), known)):
        assert {one.qk_head_dim for one in plan.dimensions} == {96}
        assert plan.achieved == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize("head_dim", [24, 48, 64, 80, 96, 120, 128, 256])
@pytest.mark.parametrize("block", BLOCKS)
def test_cache_of_any_type_has_a_plan(head_dim: int, block: int) -> None:
    of = config(1024, 8, 2, head_dim, 4096)
    grid = gguf_grid(LLAMA, of, block, "q8_0")
    known = sensitivities(gguf_grid(LLAMA, of, 1), of)
    for ratio, kv in itertools.product((0.0, 0.1, 0.25, 0.5, 0.9), (None, 0.05, 0.25, 0.5, 0.9)):
        request = Request(ratio, kv=kv)
        if not request.groups():
            continue
        for plan in (*uniform(LLAMA, of, grid, request), *mixed(LLAMA, of, grid, request, known)):
            heads = {size for one in plan.dimensions for size in (one.qk_head_dim, one.v_head_dim)}
            assert len(heads) == 1
            assert heads <= set(grid.sizes(of, of.layers[0], "QK"))
            if kv is not None:
                wanted = (1 - kv) * head_dim
                options = [n for n in grid.sizes(of, of.layers[0], "QK") if n >= head_dim * min(0.25, (1 - kv) / 2)]
                assert abs(max(heads) - wanted) == min(abs(n - wanted) for n in options or heads)
                if ratio == 0:
                    assert {one.intermediate_size for one in plan.dimensions} == {4096}


def test_folder_shares_the_cache_among_keys_and_values() -> None:
    of = CONFIGS["qwen2-0.5b"]
    grid = folder_grid(of)
    known = sensitivities(grid, of, uneven)
    for kv in (0.1, 0.3, 0.5, 0.75):
        [plan] = mixed(LLAMA, of, grid, Request(0.0, kv=kv), known)
        before = sum(shape.qk_head_dim + shape.v_head_dim for shape in of.layers)
        after = sum(one.qk_head_dim + one.v_head_dim for one in plan.dimensions)
        assert (1 - kv) * before - grid.head_step < after <= (1 - kv) * before
        assert {one.intermediate_size for one in plan.dimensions} == {4864}


@pytest.mark.parametrize("family", [QWEN3, GPT2])
def test_cache_that_llama_cpp_cannot_shrink(family: Family) -> None:
    grid = gguf_grid(family, CONFIGS["tiny"], 32)
    for request in (Request(0.0, kv=0.5), Request(0.25, kv=0.5)):
        with pytest.raises(InputError, match=r"--kv-ratio: stock llama.cpp cannot hold ov and qk") as refused:
            settle(request, grid, family, False)
        assert "a3q reduce" in str(refused.value)
    # Nothing of it is asked to go.
    request, note = settle(Request(0.25, kv=0.0), grid, family, False)
    assert (request.reduced, note) == (MLP, None)


def test_cache_with_a_norm_shrinks_when_asked() -> None:
    grid = folder_grid(CONFIGS["tiny"])
    assert settle(Request(0.0, kv=0.5), grid, QWEN3, False) == (Request(0.0, kv=0.5), None)
