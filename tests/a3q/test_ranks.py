"""Processes that work together: what they share out and put together, and that the result is that of one alone."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, multiprocessing

from a3q import InputError, ranks, reduce_to_folder, statistics
from a3q.components import Method
from a3q.quantize import Encoder, LayerRounding, Quantization
from a3q.reduce import Reduction, reduce
from a3q.reduce_layer import Dimensions
from a3q.sensitivity import Sizes, measure
from a3q.solve.grid import GRIDS
from a3q.statistics import Moment
from converters import ggml_encode
from converters.hf_reader import open_huggingface
from converters.nearest import nearest
from converters.open import open_model
from tests.pico import VOCAB, Kind, corpus, write_model

CPU = torch.device("cpu")
WORLD = 3
"""More processes than the models have key heads, and than there are sequences."""
KINDS: tuple[Kind, ...] = ("llama", "opt", "gpt_neox", "qwen3")
METHODS = {"paper": Method("paper", "per_head"), "per head": Method("a3q", "per_head"), "shared": Method()}
ENCODERS: dict[str, Encoder | None] = {"gptq": None} | ({"ggml": nearest} if ggml_encode.available() else {})
FOLDER: dict[str, Any] = {"ratio": 0.25, "calib_tokens": 2048, "device": "cpu", "verify_output": False}

Found = dict[str, Any]


def rows_of(tensor: Tensor) -> Tensor:
    """This process's rows of a tensor, cut as sequences are."""
    return tensor[ranks.share(len(tensor))]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def raised(work: Callable[[], object]) -> tuple[str, str]:
    """Type and message of the error that `work` ends with."""
    with pytest.raises(InputError) as error:
        work()
    return type(error.value).__name__, str(error.value)


def refuse() -> None:
    raise InputError(f"process {ranks.rank()} cannot")


def exchanged(_folder: Path) -> Found:
    rank = ranks.rank()
    parts = {
        f"{dtype}, {rows} rows": rows_of((torch.arange(2 * rows) - 3).view(rows, 2).to(dtype))
        for dtype in (torch.float32, torch.float64, torch.float16, torch.int8, torch.uint8, torch.int64)
        for rows in (7, 2)
    }
    one, other = torch.full((2,), float(rank)), torch.tensor(rank)
    ranks.add_up(one, other)
    order: list[str] = []
    given = {"a": torch.arange(6).view(2, 3).T, "b": torch.ones(2, dtype=torch.float16)} if rank == 0 else {}
    return {
        "place": (ranks.rank(), ranks.count(), ranks.first(), ranks.neighbours()),
        "shares": [range(items)[ranks.share(items)] for items in (7, 2, 0)],
        "rows": {name: ranks.joined_rows(part, int(name.split()[1])) for name, part in parts.items()},
        "sums": (one, other),
        "same": ranks.same(given, CPU),
        "object": ranks.same_object({"rank": rank}),
        "agreed": ranks.agreed(torch.tensor([rank + 4, 8 * rank])),
        "alone": ranks.alone(lambda: order.append("alone") or rank),
        "by first": ranks.by_first(lambda: order.append("by first") or 10 + rank),
        "told": raised(lambda: ranks.by_first(refuse)),
        "told before": raised(lambda: ranks.first_before_others(refuse)),
        "each": ranks.first_before_others(lambda: order.append("each") or rank),
        "order": order,
    }


def moments(_folder: Path) -> Found:
    """Of rows that only the first two have, in blocks that are mirrored."""
    statistics._BLOCK_BYTES = 1
    x = random(2, 300)
    symmetric, crossed = Moment(300, 300, device=CPU), Moment(300, 5, device=CPU)
    if len(own := rows_of(x)):
        symmetric.add(own)
        crossed.add(own, own[:, :5])
    return {"gram": symmetric.mean(), "cross": crossed.mean()}


def rounded(_folder: Path) -> Found:
    """Weights of 40 rows in all, and of 2."""
    found: Found = {}
    inputs = random(100, 256, seed=1)
    gram = inputs.T @ inputs / 100
    for name, encoder in ENCODERS.items():
        for grid in ("q4_0", "q4_k", "q8_0"):
            w = {"q": random(33, 256, seed=2), "k": random(7, 256, seed=3), "o": random(2, 256, seed=4)}
            rounding = LayerRounding(dict.fromkeys(w, GRIDS[grid]), encoder, "here")
            rounding.apply(w, ("q", "k"), gram)
            rounding.apply(w, ("o",), gram)
            found[f"{name} {grid}"] = w, {role: one.tensors() for role, one in rounding.blocks.items()}, rounding.losses
    return found


def reduced(folder: Path) -> Found:
    """Of two sequences."""
    found: Found = {}
    tokens = torch.randint(VOCAB, (2, 256), generator=torch.Generator().manual_seed(0))
    for kind in KINDS:
        model = open_huggingface(folder / kind)
        sizes = [Dimensions(12 if kind == "qwen3" else 10, 12, 72), Dimensions(12, 16, 64)]
        for name, method in METHODS.items():
            found[f"{kind} {name}"] = known(reduce(model, tokens, sizes, CPU, 10**9, method))
    model = open_huggingface(folder / "llama")
    layers = [dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down"), GRIDS["q8_0"])] * 2
    grids = Quantization(layers, {"embed": GRIDS["q8_0"], "output": GRIDS["q8_0"]})
    same = [Dimensions.of(shape) for shape in model.config.layers]
    found["rounded"] = known(reduce(model, tokens, same, CPU, 10**9, quantization=grids))
    return found


def known(reduction: Reduction) -> Found:
    """What all processes have of a reduction, and the first alone."""
    model = reduction.model
    found = {"shapes": model.config.layers, "losses": reduction.losses, "top": dict(model.top)}
    return found | ({"layers": list(model.layers)} if ranks.first() else {})


def weighed(folder: Path) -> Found:
    """Sensitivities, with one probe; QK of more sizes than there are processes, of fewer, and of none but the last."""
    tokens = torch.randint(VOCAB, (2, 256), generator=torch.Generator().manual_seed(0))
    grids = {"llama": ([4, 6, 8, 12, 16], [12, 16]), "opt": ([8, 12, 16], [16]), "qwen3": ([4, 6, 8, 12, 16], [12, 16])}
    found: Found = {}
    for kind, of_layers in grids.items():
        sizes: list[Sizes] = [{"QK": grid, "OV": [8, 12, 16], "MLP": [48, 72, 96]} for grid in of_layers]
        model = open_huggingface(folder / kind)
        found[kind] = measure(model, tokens, tokens[:1], sizes, 0.25, CPU, Method())
    return found


def in_two_passes(folder: Path) -> Found:
    """The paper's method fits nothing, so that what it leaves is rounded in a pass of its own."""
    output = folder / ("alone" if ranks.count() == 1 else "together")
    try:
        reduce_to_folder(
            folder / "llama",
            output=output,
            method="paper",
            quant="8bit",
            group_size=32,
            calib=str(folder / "text.txt"),
            **FOLDER,
        )
    except ranks.Helped:
        assert not ranks.first()
    return {}


STEPS = (exchanged, moments, rounded, reduced, weighed, in_two_passes)


def work(rank: int, folder: Path, port: int) -> None:
    """One process, started as torchrun does it."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(WORLD),
        "LOCAL_WORLD_SIZE": str(WORLD),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    with ranks.joined():
        found = {step.__name__: step(folder) for step in STEPS}
        ranks.meet()
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    for kind in KINDS:
        # Biases, and heads that do not divide evenly among the processes.
        write_model(folder / kind, kind, **({"bias": True} if kind == "llama" else {}))
    (folder / "text.txt").write_text("\n".join(corpus(100, seed=7)))
    return folder


@pytest.fixture(scope="module")
def together(folder: Path) -> Sequence[Mapping[str, Found]]:
    """What each of the processes has found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(work, (folder, port), WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


def check_close(actual: object, expected: object, rtol: float, where: str = "") -> None:
    """Nested values: tensors and floats up to rounding, all else exactly."""
    if isinstance(expected, Tensor):
        assert isinstance(actual, Tensor) and actual.shape == expected.shape and actual.dtype == expected.dtype, where
        error = (actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-9)
        assert error <= rtol, (where, float(error))
    elif isinstance(expected, float):
        assert actual == pytest.approx(expected, rel=max(rtol, 1e-12), abs=1e-9), where
    elif isinstance(expected, Mapping):
        assert isinstance(actual, Mapping) and actual.keys() == expected.keys(), where
        for key in expected:
            check_close(actual[key], expected[key], rtol, f"{where} {key}")
    elif isinstance(expected, (list, tuple)):
        assert isinstance(actual, (list, tuple)) and len(actual) == len(expected), where
        for i, (mine, theirs) in enumerate(zip(actual, expected, strict=True)):
            check_close(mine, theirs, rtol, f"{where} {i}")
    elif hasattr(expected, "__dataclass_fields__"):
        check_close(vars(actual), vars(expected), rtol, where)
    else:
        assert actual == expected, where


def test_one_process_alone_has_all(folder: Path) -> None:
    found = exchanged(folder)
    assert found["place"] == (0, 1, True, 1)
    assert found["shares"] == [range(7), range(2), range(0)]
    assert found["told"] == found["told before"] == ("InputError", "process 0 cannot")
    assert found["order"] == ["alone", "by first", "each"]
    ranks.meet()
    with ranks.joined():
        assert ranks.count() == 1


def test_every_process_has_its_share(together: Sequence[Mapping[str, Found]]) -> None:
    found = [one["exchanged"] for one in together]
    assert [one["place"] for one in found] == [(i, WORLD, i == 0, WORLD) for i in range(WORLD)]
    for i, items in enumerate((7, 2, 0)):
        shares = [one["shares"][i] for one in found]
        assert [item for share in shares for item in share] == list(range(items))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_rows_are_put_together(folder: Path, together: Sequence[Mapping[str, Found]]) -> None:
    expected = exchanged(folder)["rows"]
    for one in together:
        check_close(one["exchanged"]["rows"], expected, rtol=0.0)


def test_sums_are_the_same_on_all(together: Sequence[Mapping[str, Found]]) -> None:
    for one in together:
        check_close(one["exchanged"]["sums"], (torch.full((2,), 3.0), torch.tensor(3)), rtol=0.0)


def test_all_have_what_the_first_has(folder: Path, together: Sequence[Mapping[str, Found]]) -> None:
    expected = exchanged(folder)
    for rank, one in enumerate(together):
        found = one["exchanged"]
        for name in ("same", "object", "agreed", "by first"):
            check_close(found[name], expected[name], rtol=0.0, where=name)
        assert found["alone"] == (0 if rank == 0 else None)
        assert found["each"] == rank
        assert found["order"] == (["alone", "by first", "each"] if rank == 0 else ["each"])


def test_an_error_of_the_first_is_raised_on_all(together: Sequence[Mapping[str, Found]]) -> None:
    for rank, one in enumerate(together):
        kind = "InputError" if rank == 0 else "ToldError"
        assert one["exchanged"]["told"] == one["exchanged"]["told before"] == (kind, "process 0 cannot")


def test_moments_are_those_of_all_rows(together: Sequence[Mapping[str, Found]]) -> None:
    x = random(2, 300)
    for one in together:
        torch.testing.assert_close(one["moments"]["gram"], x.T @ x / 2)
        torch.testing.assert_close(one["moments"]["cross"], x.T @ x[:, :5] / 2)


def test_rounding_rows_apart_changes_nothing(folder: Path, together: Sequence[Mapping[str, Found]]) -> None:
    expected = rounded(folder)
    for one in together:
        for name, (weights, blocks, losses) in expected.items():
            found = one["rounded"][name]
            for role, fields in blocks.items():
                # Products of fewer rows may be summed in another order; the nearest of 8 bits is soon another.
                equal = found[1][role]["codes"] == fields["codes"]
                assert float(equal.float().mean()) > 0.9, (name, role)
            check_close(found[0], weights, rtol=0.01, where=name)
            check_close(found[2], losses, rtol=0.01, where=name)


def test_the_reduction_is_that_of_one_process(folder: Path, together: Sequence[Mapping[str, Found]]) -> None:
    expected = reduced(folder)
    for rank, one in enumerate(together):
        assert one["reduced"].keys() == expected.keys()
        for name, alone in expected.items():
            found = one["reduced"][name]
            assert ("layers" in found) == (rank == 0)
            for part in found:
                check_close(found[part], alone[part], 0.05 if name == "rounded" else 3e-3, f"{name} {part}")


def test_sensitivities_are_those_of_one_process(folder: Path, together: Sequence[Mapping[str, Found]]) -> None:
    expected = weighed(folder)
    for one in together:
        check_close(one["weighed"], expected, rtol=1e-3)


def test_a_second_pass_has_the_layers_of_the_first(folder: Path, together: Sequence[Mapping[str, Found]]) -> None:
    in_two_passes(folder)
    alone, several = (open_model(folder / name) for name in ("alone", "together"))
    assert alone.config.layers == several.config.layers
    for i, (mine, theirs) in enumerate(zip(several.layers, alone.layers, strict=True)):
        check_close(mine, theirs, rtol=0.05, where=f"layer {i}")
