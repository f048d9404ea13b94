"""Reading and writing beside the work of a GPU: the next item is fetched, and the last one put away, meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

_T = TypeVar("_T")


def fetched(loads: Iterable[Callable[[], _T]], beside: bool) -> Iterator[_T]:
    """What each of `loads` gives, in order; with `beside` one ahead, in a thread."""
    if not beside:
        for load in loads:
            yield load()
        return
    with ThreadPoolExecutor(1, "a3q-read") as pool:
        waiting: Future[_T] | None = None
        for load in loads:
            following = pool.submit(load)
            if waiting is not None:
                yield waiting.result()
            waiting = following
        if waiting is not None:
            yield waiting.result()


class Behind:
    """Does one piece of work after another in a thread, and holds no more than one that waits."""

    def __init__(self, beside: bool) -> None:
        self._pool = ThreadPoolExecutor(1, "a3q-write") if beside else None
        self._running: Future[None] | None = None

    def __call__(self, work: Callable[[], None]) -> None:
        """Begin `work` once all before it is done; an error of that is raised here."""
        if self._pool is None:
            work()
            return
        self.wait()
        self._running = self._pool.submit(work)

    def wait(self) -> None:
        """Return when all is done; raises its error."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def close(self) -> None:
        """End the thread, after what it is doing."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def behind(beside: bool) -> Iterator[Behind]:
    """A `Behind` whose last work is done on leaving; without `beside`, work is done at once."""
    worker = Behind(beside)
    try:
        yield worker
        worker.wait()
    finally:
        worker.close()
