"""The processes that work on one model together, started by torchrun: thin wrappers of torch.distributed.

Every process (rank) has a share of the calibration sequences. Where there is one process only, nothing here does
anything. Sums over ranks come out the same on all of them, so that all take the same decisions.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from a3q.errors import InputError, LostError

_T = TypeVar("_T")
_TIMEOUT = timedelta(hours=6)
"""Others wait while the first rank writes calibration text or measures. torchrun sees at once where a process died."""


class ToldError(InputError):
    """An InputError of the first rank, raised on the others: the first one tells the user."""


class Helped(Exception):  # noqa: N818 (no error)
    """Raised on every rank but the first when the rest, writing and checking, is the first one's alone."""


@contextmanager
def joined() -> Iterator[None]:
    """Join the processes that torchrun started; does nothing outside of it. LostError where one of them dies."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        # With more processes than GPUs, NCCL refuses to serve two on one.
        if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) <= torch.cuda.device_count():
            backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=_TIMEOUT)
    try:
        yield
    except dist.DistError as error:
        raise LostError(_lost()) from error
    except RuntimeError as error:
        # gloo has no type of error of its own.
        if any(mark in str(error) for mark in ("gloo", "Connection closed", "Connection reset", "NCCL")):
            raise LostError(_lost()) from error
        raise
    finally:
        dist.destroy_process_group()


def _lost() -> str:
    return (
        f"another of the {count()} processes has ended or cannot be reached; its own message or torchrun's tells why. "
        "With --work FOLDER the same command continues after the last finished layer, with any number of processes"
    )


def _alone() -> bool:
    # Some builds of PyTorch have nothing of this package.
    return not dist.is_available() or not dist.is_initialized()


def count() -> int:
    """Number of processes."""
    return 1 if _alone() else dist.get_world_size()


def neighbours() -> int:
    """Number of processes that share this one's machine and its memory, itself included."""
    return 1 if _alone() else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def rank() -> int:
    """Which of them this is, from 0."""
    return 0 if _alone() else dist.get_rank()


def first() -> bool:
    """Whether this process reads what is not shared, writes, and talks to the user."""
    return rank() == 0


def share(items: int) -> slice:
    """The part of `items` that is this rank's; it may be empty."""
    return slice(items * rank() // count(), items * (rank() + 1) // count())


def meet() -> None:
    """Wait until all ranks are here and done with what they exchanged: after this, any of them may end."""
    if count() > 1:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        dist.all_reduce(torch.zeros(1))


def add_up(*tensors: Tensor) -> None:
    """Replace tensors by their sums over the ranks, in place."""
    if count() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def agreed(decided: Tensor) -> Tensor:
    """The first rank's `decided`, of one shape on all: where two choices are close, machines may differ."""
    if count() > 1:
        decided = decided.contiguous()
        dist.broadcast(decided, 0)
    return decided


def joined_rows(part: Tensor, rows: int, own: slice | None = None) -> Tensor:
    """`[rows, …]` out of every rank's `own` of it, `share(rows)` unless told."""
    if count() == 1:
        return part
    whole = torch.zeros(rows, *part.shape[1:], dtype=part.dtype, device=part.device)
    whole[share(rows) if own is None else own] = part
    # Zeros but for one rank's part: an exact sum, and shares need not be equal as they must be to be gathered.
    dist.all_reduce(whole)
    return whole


def same(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The first rank's `tensors`, on `device`; what the others give does not matter."""
    if count() == 1:
        return {name: tensor.to(device) for name, tensor in tensors.items()}
    known = same_object([(name, tuple(x.shape), x.dtype) for name, x in tensors.items()])
    found = {}
    for name, shape, dtype in known:
        found[name] = tensors[name].to(device) if first() else torch.empty(shape, dtype=dtype, device=device)
        found[name] = found[name].contiguous()
        dist.broadcast(found[name], 0)
    return found


def same_object(content: _T) -> _T:
    """The first rank's `content`: plain values and types, which travel between the processes of one run only."""
    if count() == 1:
        return content
    box = [content]
    dist.broadcast_object_list(box, 0)
    return box[0]


def alone(work: Callable[[], _T]) -> _T | None:
    """`work` on the first rank only, which has what it gives; its InputError is `ToldError` on the others."""
    if count() == 1:
        return work()
    found: _T | None = None
    failed: InputError | None = None
    if first():
        try:
            found = work()
        except InputError as error:
            failed = error
    message = same_object(None if failed is None else str(failed))
    if failed is not None:
        raise failed
    if message is not None:
        raise ToldError(message)
    return found


def by_first(work: Callable[[], _T]) -> _T:
    """What `work` gives on the first rank, which alone does it; its InputError is `ToldError` on the others."""
    return same_object(alone(work))  # type: ignore[return-value]  # the first rank's own, which may well be None


def first_before_others(work: Callable[[], _T]) -> _T:
    """`work` on all ranks: what the first has downloaded is there for the others, and errors are told once."""
    found = alone(work)
    return found if first() else work()  # type: ignore[return-value]  # see `by_first`
