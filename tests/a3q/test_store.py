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


def test_what_stays_in_memory_is_the_layer_itself() -> None:
    given = items(1)
    assert filled(10**6, given)[0] is given[0]
