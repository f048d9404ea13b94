"""Types under a limit of size: against every possible assignment, to the byte, and in a written file."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from gguf.constants import GGMLQuantizationType

from a3q.errors import InputError
from a3q.families import FAMILIES, Role
from a3q.model import Model
from a3q.noise import Costs, matrices_of, rounding_error
from a3q.solve.grid import GRIDS
from converters import budget
from converters.assignment import RoundingError
from converters.budget import Chosen, Limit, SampledError, choose
from converters.entries import Entry, entries
from converters.gguf_target import target_for
from converters.gguf_writer import write_gguf
from converters.hf_reader import open_huggingface
from converters.types import bits_per_weight, block_size, resolve_quant
from tests.pico import write_model

T = GGMLQuantizationType
ROLES = {role.name: role for family in FAMILIES[::-1] for role in (*family.layer, *family.top)}
"""Named as the first family, llama, has them."""
SMALL = [T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q8_0, T.IQ4_NL, T.F16]
"""What rows of 32 divide into."""


def entry(role: str, rows: int, n: int, layer: int | None = 0) -> Entry:
    found: Role = ROLES[role]
    return Entry(found.gguf.format(i=layer), (found,), (rows, n), layer)


def norm(layer: int = 0) -> Entry:
    return Entry(f"blk.{layer}.attn_norm.weight", (ROLES["attn_norm"],), (96,), layer)


def halving(_: Entry, kind: GGMLQuantizationType) -> float:
    """Each bit divides the squared error by four; at equal bytes iq4_nl is the best and q4_0 the worst."""
    return float(4.0 ** -bits_per_weight(kind)) * (0.7 if kind is T.IQ4_NL else 1.0)


def stored(entries: Sequence[Entry], types: Chosen) -> int:
    return sum(-(-one.bytes(types.kinds[one.name]) // 32) * 32 for one in entries)


CASE = [entry("q", 3, 32), entry("k", 5, 96), entry("down", 7, 32, 1), norm()]
COSTS = Costs(({"q": 3.0, "k": 1.0}, {"down": 10.0}), {})


def every_way() -> list[tuple[int, int, float]]:
    """Bytes in a file, bytes without padding, and predicted KL of all assignments of `CASE`."""
    found = []
    free = CASE[:3]
    for kinds in itertools.product(SMALL, repeat=3):
        pairs = list(zip(free, kinds, strict=True))
        exact = sum(one.bytes(kind) for one, kind in pairs)
        padded = sum(-(-one.bytes(kind) // 32) * 32 for one, kind in pairs) + 384
        loss = 0.0
        for one, kind in pairs:
            if kind is not T.F16:
                loss += COSTS.of(one.layer, [one.roles[0].name]) * halving(one, kind)
        found.append((padded, exact, loss))
    return found


def test_no_worse_than_the_best_but_for_one_step() -> None:
    """All sizes from the least to the most, in steps of a byte: within it, and nearly as good as can be."""
    ways, overhead = every_way(), 1000
    least, most = min(size for size, _, _ in ways), max(size for size, _, _ in ways)
    step = max(COSTS.of(one.layer, [one.roles[0].name]) * halving(one, T.IQ4_NL) for one in CASE[:3])
    exact = 0
    sizes = range(least, most + 40, 7)
    for size in sizes:
        types = choose(CASE, COSTS, halving, Limit(size=size + overhead), overhead)
        assert stored(CASE, types) <= size
        best = min(loss for bytes_, _, loss in ways if bytes_ <= size)
        assert best - 1e-12 <= types.predicted_kl <= best + step
        exact += types.predicted_kl <= best * 1.001
    assert exact > len(sizes) / 2
    with pytest.raises(InputError, match=r"--size .* MB: the smallest possible file has 0\.1 MB"):
        choose(CASE, COSTS, halving, Limit(size=least + overhead - 1), overhead)


@pytest.mark.parametrize("bits", [4.5, 4.75, 5.0, 5.5, 6.3, 8.5, 12.0, 15.99])
def test_bits_are_kept(bits: float) -> None:
    types = choose(CASE, COSTS, halving, Limit(bits=bits))
    free = CASE[:3]
    weights = sum(one.weights for one in free)
    assert types.kinds[CASE[3].name] is T.F32
    assert 8 * sum(one.bytes(types.kinds[one.name]) for one in free) / weights <= bits
    best = min(loss for _, exact, loss in every_way() if 8 * exact / weights <= bits)
    assert best - 1e-12 <= types.predicted_kl <= best + 10 * halving(CASE[0], T.IQ4_NL)


def test_the_least_that_is_named_can_be_had() -> None:
    with pytest.raises(InputError, match=r"--bits 3: the smallest possible is 4\.5 bits per weight"):
        choose(CASE, COSTS, halving, Limit(bits=3))
    assert {choose(CASE, COSTS, halving, Limit(bits=4.5)).kinds[one.name] for one in CASE[:3]} == {T.IQ4_NL}
    mixed = [entry("q", 3, 32), entry("k", 300, 256)]
    for bits in (1.0, 2.5):
        with pytest.raises(InputError) as caught:
            choose(mixed, COSTS, halving, Limit(bits=bits))
        least = float(str(caught.value).split("possible is ")[1].split()[0])
        choose(mixed, COSTS, halving, Limit(bits=least))
        with pytest.raises(InputError):
            choose(mixed, COSTS, halving, Limit(bits=least - 0.01))


def test_room_enough_is_f16_throughout() -> None:
    for limit in (Limit(bits=16), Limit(bits=99), Limit(size=10**6)):
        types = choose(CASE, COSTS, halving, limit)
        assert [types.kinds[one.name] for one in CASE] == [T.F16, T.F16, T.F16, T.F32]
        assert types.predicted_kl == 0.0
    assert types.notes == ("types under 1 MB: f16 3 tensors",)


def test_bytes_go_where_they_count() -> None:
    """Tensors of one size by falling cost; one without any still gets its share at the end."""
    layers = [entry("down", 64, 256, i) for i in range(6)]
    costs = Costs(tuple({"down": cost} for cost in (0.0, 1.0, 8.0, 0.1, 40.0, 2.0)), {})
    for bits in (2.7, 3.0, 4.5, 6.0):
        kinds = choose(layers, costs, halving, Limit(bits=bits)).kinds
        by_cost = [bits_per_weight(kinds[f"blk.{i}.ffn_down.weight"]) for i in (0, 3, 1, 5, 2, 4)]
        assert by_cost == sorted(by_cost)
    assert set(choose(layers, costs, halving, Limit(bits=16)).kinds.values()) == {T.F16}


def test_rows_decide_what_can_be_had() -> None:
    odd, wide = entry("q", 4, 80), entry("k", 4, 512)
    kinds = choose([odd, wide], COSTS, halving, Limit(bits=6)).kinds
    assert kinds[odd.name] is T.F16
    assert block_size(kinds[wide.name]) == 256
    positions = Entry("position_embd.weight", (ROLES["positions"],), (8, 64), None)
    assert choose([positions, *CASE], COSTS, halving, Limit(bits=5)).kinds[positions.name] is T.F32


def test_error_of_each_tensor_counts() -> None:
    """Of equal bytes the type that rounds this tensor better."""

    def error(one: Entry, kind: GGMLQuantizationType) -> float:
        better = T.Q4_0 if one.name == CASE[0].name else T.IQ4_NL
        return halving(one, T.Q4_0) * (0.5 if kind is better else 1.0)

    kinds = choose(CASE, COSTS, error, Limit(bits=4.5)).kinds
    assert [kinds[one.name] for one in CASE[:3]] == [T.Q4_0, T.IQ4_NL, T.IQ4_NL]


def test_notes_count_the_types() -> None:
    types = choose(CASE, COSTS, halving, Limit(bits=4.5))
    assert types.notes == ("types under 4.5 bits per weight: iq4_nl 3 tensors",)
    rng = random.Random(0)
    many = [entry("down", 8, 256, i) for i in range(20)]
    costs = Costs(tuple({"down": rng.uniform(1, 20)} for _ in many), {})
    [note] = choose(many, costs, halving, Limit(bits=4.25)).notes
    counts = [int(part.split()[1]) for part in note.split(": ")[1].split(", ")]
    assert counts == sorted(counts, reverse=True) and sum(counts) == 20


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """gpt2 has q, k and v in one tensor."""
    return open_huggingface(write_model(tmp_path_factory.mktemp("budget") / request.param, request.param))


def test_a_written_file_has_the_size(model: Model, tmp_path: Path) -> None:
    target = target_for(model)
    found = entries(model, target)
    layer = dict.fromkeys(matrices_of(model), 1.0)
    costs = Costs((layer,) * 2, {"embed": 1.0} if target.tied else {"embed": 1.0, "output": 9.0})
    error: RoundingError = SampledError(model)
    plan, path = resolve_quant("q8_0"), tmp_path / "m.gguf"
    plain = choose(found, costs, error, Limit(bits=16))
    overhead = write_gguf(model, plan, path, types=plain).size - stored(found, plain)
    size = overhead + stored(found, choose(found, costs, error, Limit(bits=6.5))) + 100
    types = choose(found, costs, error, Limit(size=size), overhead)
    assert len(set(types.kinds.values())) > 1
    assert 0.97 * size < write_gguf(model, plan, path, types=types).size <= size


def test_sampled_error_is_near_that_of_all_rows(model: Model) -> None:
    error = SampledError(model)
    for one in entries(model, target_for(model)):
        if len(one.shape) == 2 and all(role.name != "positions" for role in one.roles):
            top = {**model.top, "output": model.output}
            weights = top if one.layer is None else model.layers[one.layer]
            whole = torch.cat([weights[role.name] for role in one.roles])
            assert error(one, T.Q4_0) == pytest.approx(rounding_error(whole, GRIDS["q4_0"]), rel=0.15)


def test_weights_that_will_move_leave_their_lattice(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_huggingface(write_model(tmp_path_factory.mktemp("budget") / "llama"))
    layers = [{**w, "down": (w["down"] * 20).round() / 20} for w in model.layers]
    lattice = Model(**{**model.__dict__, "layers": layers})
    down = entry("down", 64, 96, 1)
    assert SampledError(lattice)(down, T.Q8_0) < 1e-4
    there, moved = SampledError(lattice)(down, T.Q4_0), SampledError(lattice, frozenset({"down"}))(down, T.Q4_0)
    assert there == SampledError(lattice, frozenset({"up"}))(down, T.Q4_0)
    assert moved != there
    monkeypatch.setattr(budget, "_ROWS", 10**6)
    assert SampledError(lattice)(down, T.Q4_0) == pytest.approx(rounding_error(layers[1]["down"], GRIDS["q4_0"]))
