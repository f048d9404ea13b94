"""Settings for every test."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

# Tiny tensors gain nothing from threads, and threads that wait for a busy core made these tests fifty times slower.
torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What a3q keeps between runs stays out of the user's cache; processes that tests start inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
