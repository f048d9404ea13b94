"""`LayerStore` in memory and on disk."""

from __future__ import annotations

import gc
import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

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


def filled(budget: int, given: list[Item]) -> LayerStore[Item]:
    store: LayerStore[Item] = LayerStore(budget, lambda item: item, lambda tensors: tensors)
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


def test_pack_and_unpack_only_on_the_way_to_disk() -> None:
    """An item of any type, stored as tensors; what stays in memory is the item itself."""
    store: LayerStore[tuple[Tensor, str]] = LayerStore(
        8, lambda item: {item[1]: item[0]}, lambda tensors: next((value, name) for name, value in tensors.items())
    )
    kept, spilled = (torch.ones(2), "kept"), (torch.zeros(3), "spilled")
    store.append(kept)
    store.append(spilled)
    assert store[0] is kept
    assert store[1][1] == "spilled" and torch.equal(store[1][0], spilled[0])
