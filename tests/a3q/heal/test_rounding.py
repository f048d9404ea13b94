"""Training with the rounding in the loop: exact at the start and when packed, true gradients, and that it learns."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from gguf import quants
from gguf.constants import GGMLQuantizationType
from torch import Tensor

from a3q.forward import block, embed
from a3q.heal.rounding import RoundedStudent, RoundedWeight
from a3q.heal.student import FullStudent, Student
from a3q.model import Model
from a3q.solve.gptq import nearest, quantize
from a3q.solve.grid import GRIDS, Blocks, Grid
from converters.ggml_pack import pack
from converters.gptq import gptq_grid
from converters.hf_reader import open_huggingface
from tests.pico import write_model

CPU = torch.device("cpu")
FOLDER = [
    gptq_grid(bits, size, symmetric) for bits, size in ((2, 128), (4, 32), (8, 128)) for symmetric in (False, True)
]
ALL = [*GRIDS.values(), *FOLDER]
EVERY = pytest.mark.parametrize("grid", ALL, ids=lambda grid: f"{grid.name}-{grid.block}{'-zero' * grid.zero}")
FEW = pytest.mark.parametrize("name", ["q4_0", "q5_1", "iq4_nl", "q2_k", "q3_k", "q4_k"])


def numbers(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def rounded(grid: Grid, seed: int = 0) -> Blocks:
    """A matrix `[6, 512]` with a block of zeros, and a half of one, at least."""
    weight = numbers(6, 512, seed=seed) * 0.05 + 0.02
    weight[1, :256] = 0
    weight[2, :32] = 0
    return nearest(weight, grid, torch.rand(512, generator=torch.Generator().manual_seed(seed)) + 0.1)


def leaves(one: RoundedWeight) -> list[Tensor]:
    return [one.weight, *one.scales]


@torch.no_grad()
def move(one: RoundedWeight, weights: float, scales: float, seed: int = 1) -> None:
    """Move everything at random, by so much on average; no weight to where two levels are equally near."""
    one.weight.add_(((numbers(*one.weight.shape, seed=seed) * weights * 512).round() + 0.5) / 512)
    for i, leaf in enumerate(one.scales):
        leaf.add_(numbers(*leaf.shape, seed=seed + 1 + i) * scales)


def bits(x: Tensor) -> Tensor:
    """For comparisons in which 0 and −0 differ."""
    return x.detach().view(torch.int32)


@EVERY
def test_nothing_changes_at_the_start(grid: Grid) -> None:
    blocks = rounded(grid)
    one = RoundedWeight(blocks, CPU)
    assert torch.equal(bits(one.value()), bits(blocks.dequantize()))
    again = one.blocks().tensors()
    assert again.keys() == blocks.tensors().keys()
    for name, field in blocks.tensors().items():
        assert torch.equal(again[name], field) and again[name].dtype == field.dtype, name
        assert not again[name].requires_grad


def test_steps_may_be_negative_and_bases_far_larger() -> None:
    assert bool((rounded(GRIDS["q4_0"]).d < 0).any()) and bool((rounded(GRIDS["q3_k"]).d < 0).any())
    blocks = rounded(GRIDS["q4_1"])
    assert blocks.m is not None
    blocks = replace(blocks, m=torch.full_like(blocks.m, 60000.0))
    assert torch.equal(RoundedWeight(blocks, CPU).blocks().codes, blocks.codes)


@pytest.mark.parametrize("far", [0.3, 3.0, 300.0])
@EVERY
def test_what_is_packed_is_the_value(grid: Grid, far: float) -> None:
    blocks = rounded(grid)
    one = RoundedWeight(blocks, CPU)
    move(one, far, far / 3)
    packed, value = one.blocks(), one.value()
    assert bool(torch.isfinite(value).all())
    assert torch.equal(bits(packed.dequantize()), bits(value))
    assert not torch.equal(packed.codes, blocks.codes) and not torch.equal(packed.d, blocks.d)
    assert int(packed.codes.min()) >= grid.spare and int(packed.codes.max()) < 1 << grid.bits
    for name, field in blocks.tensors().items():
        assert packed.tensors()[name].dtype == field.dtype
    for name in ("scales", "mins"):
        assert (kept := getattr(blocks, name)) is None or torch.equal(getattr(packed, name), kept)
    if grid.name not in GRIDS:
        return
    read = quants.dequantize(pack(packed), GGMLQuantizationType[grid.name.upper()])
    np.testing.assert_array_equal(read.view(np.int32), bits(value).numpy())


def test_scales_stay_finite_half_floats() -> None:
    one = RoundedWeight(rounded(GRIDS["q4_1"]), CPU)
    with torch.no_grad():
        for leaf in one.scales:
            leaf.fill_(1e12)
    packed = one.blocks()
    assert packed.m is not None and packed.d.max() == packed.m.max() == 65504
    assert torch.equal(packed.dequantize(), one.value())


@EVERY
def test_blocks_without_a_step_stay(grid: Grid) -> None:
    blocks = rounded(grid)
    still = blocks.d == 0
    assert bool(still.any())
    one = RoundedWeight(blocks, CPU)
    move(one, 3.0, 1.0)
    one.value().square().sum().backward()
    assert all(leaf.grad is not None and bool(torch.isfinite(leaf.grad).all()) for leaf in leaves(one))
    where = still.repeat_interleave(grid.block, dim=1)
    assert torch.equal(one.value()[where], blocks.dequantize()[where])
    assert one.weight.grad is not None and not one.weight.grad[where].any()
    assert one.d.grad is not None and not one.d.grad[still].any()


class Straight(torch.autograd.Function):
    """The nearest half float, with a gradient as if it were not."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.float().half().double()

    @staticmethod
    def backward(ctx: object, *by: Tensor) -> Tensor:
        return by[0]


def reference(blocks: Blocks, moved: list[Tensor]) -> Tensor:
    """The same in float64, its gradient by torch from the words of the module: rounding adds a constant."""
    grid = blocks.grid
    table = torch.tensor(grid.levels or range(grid.lowest, grid.highest + 1), dtype=torch.float64)
    distance = float(table[-1] - table[0]) / (len(table) - 1)
    per, size = grid.block // grid.sub, blocks.d.double()

    def wide(x: Tensor, count: int) -> Tensor:
        return x.repeat_interleave(count, dim=1)

    step = wide(Straight.apply(blocks.d.double() * (1 + moved[1])), per)
    base = torch.zeros_like(step)
    if blocks.scales is not None:
        step = step * blocks.scales
    if blocks.m is not None:
        base = wide(Straight.apply(blocks.m.double() + moved[2] * size * grid.highest / 2), per)
        base = base if blocks.mins is None else base * blocks.mins
    if grid.zero:
        assert blocks.mins is not None
        base = step * blocks.mins
    codes = blocks.codes.long()
    start = table[codes] if grid.levels else codes - grid.offset
    latent = start + moved[0] * distance
    latent = latent.clamp(float(table[0]) - distance / 2, float(table[-1]) + distance / 2)
    level = table[(latent.detach()[..., None] - table).abs().argmin(-1)]
    return wide(step, grid.sub) * (latent + (level - latent).detach()) - wide(base, grid.sub)


@EVERY
def test_gradients_are_those_of_torch(grid: Grid) -> None:
    blocks = rounded(grid)
    one = RoundedWeight(blocks, CPU)
    move(one, 1.0, 0.1)
    by_value = numbers(6, 512, seed=9)
    value = one.value()
    (value * by_value).sum().backward()
    moved = [leaf.detach().double().requires_grad_() for leaf in leaves(one)]
    expected = reference(blocks, moved)
    (expected * by_value.double()).sum().backward()
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-7)
    for leaf, other in zip(leaves(one), moved, strict=True):
        assert leaf.grad is not None and other.grad is not None and bool(leaf.grad.any())
        torch.testing.assert_close(leaf.grad.double(), other.grad, rtol=1e-4, atol=1e-6)


@EVERY
def test_gradients_by_the_scales_are_differences_of_values(grid: Grid) -> None:
    """While no level changes, which no scale makes them do."""
    blocks, by_value = rounded(grid), numbers(6, 512, seed=9)
    one = RoundedWeight(blocks, CPU)
    move(one, 1.0, 0.0)
    (one.value() * by_value).sum().backward()
    for leaf, name in zip(one.scales, ("d", "m"), strict=False):
        sums, halves = [], []
        for shift in (0.25, -0.25):
            with torch.no_grad():
                leaf.fill_(shift)
            packed = one.blocks()
            sums.append((packed.dequantize() * by_value).double().view(6, -1, grid.block).sum(-1))
            halves.append(packed.tensors()[name].double())
            with torch.no_grad():
                leaf.zero_()
        usable = halves[0] != halves[1]
        assert bool(usable.any()) and leaf.grad is not None
        unit = blocks.d.double() if name == "d" else blocks.d.double() * grid.highest / 2
        found = (sums[0] - sums[1]) / (halves[0] - halves[1]) * unit
        torch.testing.assert_close(leaf.grad.double()[usable], found[usable], rtol=1e-3, atol=1e-4)


@EVERY
def test_weights_out_of_reach_have_no_gradient_and_those_at_the_end_have(grid: Grid) -> None:
    blocks = rounded(grid)
    one = RoundedWeight(blocks, CPU)
    codes = blocks.codes.int()
    level, distance = codes.float() - grid.offset, 1.0
    if grid.levels:
        level, distance = torch.tensor(grid.levels)[codes].float(), (grid.highest - grid.lowest) / 15
    step = blocks.steps()[0].repeat_interleave(grid.sub, dim=1) * distance
    for end, code, outwards in ((grid.lowest, grid.spare, -1), (grid.highest, (1 << grid.bits) - 1, 1)):
        for beyond, reached in ((0.0, True), (0.4, True), (0.6, False)):
            with torch.no_grad():
                one.weight.copy_((end - level) / distance + outwards * beyond)
            one.weight.grad = None
            one.value().sum().backward()
            assert one.weight.grad is not None
            torch.testing.assert_close(one.weight.grad, step if reached else torch.zeros_like(step))
            assert bool((one.blocks().codes == code).all())


def test_equal_moves_count_alike_whatever_the_size() -> None:
    """A matrix a thousand times larger learns the same with the same learning rates."""
    for name in ("q4_0", "q4_1", "q4_k"):
        blocks = rounded(GRIDS[name])
        large = replace(blocks, d=blocks.d * 1024, m=None if blocks.m is None else blocks.m * 1024)
        values = []
        for one, size in ((RoundedWeight(blocks, CPU), 1), (RoundedWeight(large, CPU), 1024)):
            optimizer = torch.optim.AdamW(leaves(one), lr=0.02, eps=1e-20)
            for step in range(40):
                optimizer.zero_grad()
                (one.value() * numbers(6, 512, seed=step) / size).sum().backward()
                optimizer.step()
            values.append(one.value() / size)
        assert not torch.equal(values[0], blocks.dequantize())
        # Half floats below 6e-5 have fewer bits.
        torch.testing.assert_close(values[0], values[1], rtol=1e-2, atol=1e-4)


def inputs() -> Tensor:
    """Correlated, `[4096, 256]`."""
    return numbers(4096, 256, seed=5) @ (numbers(256, 256, seed=6) * torch.linspace(0.05, 1, 256)) / 16


def learned(blocks: Blocks, wanted: Tensor, rates: tuple[float, float]) -> tuple[float, float, RoundedWeight]:
    """Share of the energy of the outputs that is lost before and after training on some at a time."""
    one, x = RoundedWeight(blocks, CPU), inputs()

    def loss(weight: Tensor, x: Tensor) -> Tensor:
        return (x @ (weight - wanted).T).square().sum() / (x @ wanted.T).square().sum()

    groups = [
        {"params": [one.weight], "lr": rates[0], "weight_decay": 0.5},
        {"params": one.scales, "lr": rates[1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-15)
    steps = 120
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for step in range(steps):
        optimizer.zero_grad()
        loss(one.value(), x[step % 16 :: 16]).backward()
        optimizer.step()
        decay.step()
    return float(loss(blocks.dequantize(), x)), float(loss(one.blocks().dequantize(), x)), one


@FEW
def test_training_follows_outputs_that_the_blocks_were_not_made_for(name: str) -> None:
    """As in a model, whose predictions want other weights than each layer's outputs do."""
    weight = numbers(16, 256) * 0.05
    x = inputs()
    blocks = quantize(weight + 0.02 * numbers(16, 256, seed=3), x.T @ x / len(x), GRIDS[name]).blocks
    before, after, one = learned(blocks, weight, (0.02, 1e-3))
    assert after < (0.7 if GRIDS[name].bits == 2 else 0.5) * before
    assert 0.01 < float((one.blocks().codes != blocks.codes).float().mean()) < 0.7


@FEW
def test_scales_alone_improve_blocks_that_gptq_has_left(name: str) -> None:
    weight = numbers(16, 256) * 0.05
    x = inputs()
    for blocks in (nearest(weight, GRIDS[name], torch.ones(256)), quantize(weight, x.T @ x, GRIDS[name]).blocks):
        before, after, one = learned(blocks, weight, (0.0, 1e-3))
        assert after < 0.9995 * before
        assert torch.equal(one.blocks().codes, blocks.codes)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """With biases."""
    return open_huggingface(write_model(tmp_path_factory.mktemp("rounding"), "qwen2"))


GRID_OF = {"q": "q4_0", "v": "q5_1", "o": "q8_0", "gate": "q4_1", "up": "iq4_nl"}


def on_grids(model: Model) -> tuple[Model, list[dict[str, Blocks]]]:
    """`model` rounded in part, and its rounded weights."""
    layers, blocks = [], []
    for i, layer in enumerate(model.layers):
        roles = [role for role in GRID_OF if i == 0 or role != "q"]
        known = {role: nearest(layer[role], GRIDS[GRID_OF[role]], torch.ones(layer[role].shape[1])) for role in roles}
        blocks.append(known)
        layers.append({**layer, **{role: one.dequantize() for role, one in known.items()}})
    return replace(model, layers=layers), blocks


def student(model: Model, dtype: torch.dtype = torch.float32) -> RoundedStudent:
    return RoundedStudent(*on_grids(model), CPU, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_student_is_the_rounded_model_at_first(model: Model, dtype: torch.dtype) -> None:
    ours: Student = student(model, dtype)
    full = FullStudent(on_grids(model)[0], CPU, dtype)
    for i in range(len(model.layers)):
        for mine, other in ((ours.layer(i), full.layer(i)), (ours.finished(i), full.finished(i))):
            assert mine.keys() == other.keys()
            for role, weight in other.items():
                assert torch.equal(mine[role], weight) and mine[role].dtype == weight.dtype
        assert not any(weight.requires_grad for weight in ours.finished(i).values())


def test_a_student_trains_what_is_on_grids_and_no_more(model: Model) -> None:
    ours = student(model)
    weights, scales = ours.groups()
    assert len(weights) == 9 and len(scales) == 9 + 2 * 2  # q5_1 and q4_1 have bases
    parameters = ours.parameters()
    assert {id(one) for one in parameters} == {id(one) for one in (*weights, *scales)}
    assert len(parameters) == len(weights) + len(scales)
    for i, layer in enumerate(model.layers):
        trained = {role for role, weight in ours.layer(i).items() if weight.requires_grad}
        assert trained == on_grids(model)[1][i].keys() and ours.layer(i).keys() == layer.keys()


def test_the_order_of_roles_does_not_matter(model: Model) -> None:
    reduced, blocks = on_grids(model)
    turned = [dict(reversed(known.items())) for known in blocks]
    one, other = (RoundedStudent(reduced, known, CPU, torch.float32) for known in (blocks, turned))
    with torch.no_grad():
        for i, (leaf, copy) in enumerate(zip(one.parameters(), other.parameters(), strict=True)):
            leaf.add_(numbers(*leaf.shape, seed=i))
            copy.copy_(leaf)
    for i in range(len(blocks)):
        for role, weight in one.finished(i).items():
            assert torch.equal(other.finished(i)[role], weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_student_has_learned_is_what_it_writes(model: Model, dtype: torch.dtype) -> None:
    ours = student(model, dtype)
    weights, scales = ours.groups()
    optimizer = torch.optim.AdamW([{"params": weights, "lr": 0.2}, {"params": scales, "lr": 0.01}], eps=1e-15)
    tokens = torch.randint(512, (2, 20), generator=torch.Generator().manual_seed(0))
    for _ in range(5):
        optimizer.zero_grad()
        x = embed(model, tokens)
        for i, shape in enumerate(model.config.layers):
            x = block(model.config, shape, ours.layer(i), x)
        (x * numbers(*x.shape)).sum().backward()
        optimizer.step()
    assert all(one.grad is not None and bool(one.grad.any()) for one in ours.parameters())
    for i, before in enumerate(on_grids(model)[1]):
        packed, finished = ours.rounded(i), ours.finished(i)
        assert packed.keys() == before.keys()
        for role, one in packed.items():
            assert one.grid == before[role].grid and not torch.equal(one.codes, before[role].codes)
            assert torch.equal(one.dequantize(), finished[role])
            assert torch.equal(one.dequantize().to(dtype), ours.layer(i)[role])
        for role, weight in finished.items():
            assert role in packed or torch.equal(weight, model.layers[i][role])


def test_every_layer_needs_its_blocks(model: Model) -> None:
    reduced, blocks = on_grids(model)
    with pytest.raises(ValueError, match="shorter"):
        RoundedStudent(reduced, blocks[:1], CPU, torch.float32)
