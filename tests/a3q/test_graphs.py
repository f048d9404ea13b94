"""What can be tried of recording without a GPU: garbage is collected before it and not meanwhile."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from a3q.graphs import recording


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def graph(_: object) -> Iterator[None]:
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", graph)


def test_no_graph_ends_while_another_is_recorded() -> None:
    ended: list[bool] = []

    class Loop:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            ended.append(gc.isenabled())

    Loop()
    with recording():
        assert ended == [True]
        assert not gc.isenabled()
    assert gc.isenabled()


@pytest.mark.parametrize("collects", [True, False])
def test_collection_is_as_before_also_after_an_error(collects: bool) -> None:
    if not collects:
        gc.disable()
    try:
        with pytest.raises(RuntimeError, match="not permitted"), recording():
            raise RuntimeError("operation not permitted when stream is capturing")
        assert gc.isenabled() == collects
    finally:
        gc.enable()
