"""`LayerStore` in memory and on disk."""

from __future__ import annotations

import gc
import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from a3q.solve.gptq import nearest
from a3q.solve.grid import GRIDS, Blocks
from a3q.store import LayerStore

Item = dict[str, Tensor]
BYTES = 6 * 4 + 2 * 4


def items(count: int = 4) -> list[Item]:
    # Transposed on purpose: safetensors takes only contiguous tensors.
    return [{"a": torch.randn(3, 2).T, "b": torch.full((2,), float(i))} for i in range(count)]


@pytest.fixture
def temp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def filled(budget: int, given: list[Item]) -> LayerStore:
    store = LayerStore(budget)
    for item in given:
        store.append(item)
    return store


@pytest.mark.parametrize(("budget", "on_disk"), [(10**6, 0), (4 * BYTES, 0), (2 * BYTES + 1, 2), (0, 4)])
def test_gives_back_what_it_was_given(temp: Path, budget: int, on_disk: int) -> None:
    given = items()
    store = filled(budget, given)
    assert len(list(temp.rglob("*.safetensors"))) == on_disk
    assert len(store) == 4
    for item, expected in zip(store, given, strict=True):
        assert item.keys() == expected.keys()
        assert all(torch.equal(item[name], expected[name]) for name in item)
    assert torch.equal(store[-1]["b"], given[3]["b"])
    assert [float(item["b"][0]) for item in store[1:]] == [1, 2, 3]
    assert [float(item["b"][0]) for item in store[::-2]] == [3, 1]
    assert store[4:] == []
    with pytest.raises(IndexError):
        store[4]


def test_a_small_item_still_fits_after_a_large_one_went_to_disk(temp: Path) -> None:
    large = {"a": torch.zeros(100)}
    store = filled(2 * BYTES, [items()[0], large, items()[1]])
    assert len(list(temp.rglob("*.safetensors"))) == 1
    assert [sorted(item) for item in store] == [["a", "b"], ["a"], ["a", "b"]]


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_the_folder_goes_away_with_the_store(temp: Path) -> None:
    store = filled(0, items())
    assert len(list(temp.iterdir())) == 1
    del store
    gc.collect()
    assert list(temp.iterdir()) == []


def test_no_folder_while_everything_fits(temp: Path) -> None:
    store = filled(10**6, items())
    assert len(store) == 4 and list(temp.iterdir()) == []


def test_what_stays_in_memory_is_the_weights_themselves() -> None:
    given = items(1)
    store = filled(10**6, given)
    assert all(store[0][name] is given[0][name] for name in given[0])


def rounded() -> tuple[Item, dict[str, Blocks]]:
    """A layer of which `q` and `down` are rounded; `q_bias` begins like one of them."""
    weights = {role: torch.randn(5, 256) for role in ("q", "k", "down")}
    blocks = {
        role: nearest(weights[role], GRIDS[name], torch.ones(256)) for role, name in (("q", "q4_k"), ("down", "q4_1"))
    }
    return weights | {role: one.dequantize() for role, one in blocks.items()} | {"q_bias": torch.randn(5)}, blocks


@pytest.mark.parametrize("budget", [10**6, 0])
def test_rounded_weights_are_kept_as_blocks(temp: Path, budget: int) -> None:
    store, given = LayerStore(budget), [rounded() for _ in range(2)]
    for layer, blocks in given:
        store.append(layer, blocks)
    store.append(given[0][0])
    assert len(list(temp.rglob("*.safetensors"))) == (0 if budget else 3)
    for i, (layer, blocks) in enumerate(given):
        assert store[i].keys() == layer.keys()
        assert all(torch.equal(store[i][role], layer[role]) for role in layer)
        found = store.blocks(i)
        assert found.keys() == blocks.keys()
        for role, one in blocks.items():
            assert found[role].grid is one.grid and found[role].tensors().keys() == one.tensors().keys()
            for name, field in one.tensors().items():
                assert torch.equal(found[role].tensors()[name], field)
                assert found[role].tensors()[name].dtype == field.dtype
    assert store.blocks(2) == {} and torch.equal(store[2]["q"], given[0][0]["q"])


def test_blocks_take_the_room_of_blocks(temp: Path) -> None:
    """The budget of a layer in full is that of more than one rounded."""
    layer, blocks = rounded()
    store = LayerStore(sum(weight.nbytes for weight in layer.values()))
    store.append(layer, blocks)
    store.append({}, blocks)
    assert list(temp.iterdir()) == []
    store.append(layer)
    assert len(list(temp.rglob("*.safetensors"))) == 1
