"""Settings for every test."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

# Tiny tensors gain nothing from threads, and threads that wait for a busy core made these tests fifty times slower.
torch.set_num_threads(1)

_LONGEST = ("test_resume.py", "test_demo_model.py", "test_torchrun.py", "test_faults.py")
"""In the order in which they begin: where processes share the tests, none is left with one of these at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest first."""
    items.sort(key=lambda item: _LONGEST.index(item.path.name) if item.path.name in _LONGEST else len(_LONGEST))


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What a3q keeps between runs stays out of the user's cache; processes that tests start inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
