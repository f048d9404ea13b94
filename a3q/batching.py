"""Work on calibration sequences in batches that fit the device's memory, smaller ones when it runs out."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import torch

from a3q.errors import InputError
from a3q.model import ModelConfig

BATCH_BYTES = 256 * 2**20
"""Activation bytes that one batch of sequences may take inside a layer on a CPU."""
_CPU = torch.device("cpu")
_GPU_SHARE = 24
"""Part of a GPU's memory that they may take there: large matrices keep it busy."""


def batch_size(config: ModelConfig, length: int, device: torch.device) -> int:
    """Sequences of `length` tokens whose widest activations inside a layer may be in memory together.

    The same on the same device whatever is free: sums depend on it, and a run that is continued must equal one that
    was not interrupted.
    """
    room = BATCH_BYTES
    if device.type == "cuda":
        room = torch.cuda.get_device_properties(device).total_memory // _GPU_SHARE
    widest = config.widest
    per_token = 3 * widest.intermediate_size + 4 * config.num_attention_heads * widest.qk_head_dim
    if config.alibi_slopes:
        per_token += length * config.num_attention_heads
    return max(1, room // (4 * length * per_token))


def batches(config: ModelConfig, count: int, length: int, device: torch.device = _CPU) -> Iterator[slice]:
    """Slices of `count` sequences of `length` tokens, `batch_size` of them each."""
    size = batch_size(config, length, device)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


class Batches:
    """Hands out slices of sequences; `notes` says what a user should know about their size."""

    def __init__(self, config: ModelConfig, length: int, device: torch.device) -> None:
        self._size = batch_size(config, length, device)
        self._length, self._device = length, device
        self.notes: list[str] = []

    def each(self, count: int, work: Callable[[slice], None]) -> None:
        """`work` on all of `count` sequences, batch by batch.

        Where memory runs out, the same batch is taken again in halves, and so are all that follow: `work` must change
        nothing before all that it needs memory for is computed. InputError where one sequence is too much.
        """
        start = 0
        while start < count:
            part = slice(start, min(start + self._size, count))
            if self._fits(work, part):
                start = part.stop
            else:
                self._halve(part.stop - part.start)

    def _fits(self, work: Callable[[slice], None], part: slice) -> bool:
        try:
            work(part)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            return False
        return True

    def _halve(self, size: int) -> None:
        """Out of the handler of the error, which holds on to what was computed."""
        if size == 1:
            raise InputError(
                f"out of memory on {self._device}: one sequence of {self._length} calibration tokens does not fit "
                "beside a layer; free some memory, give less text in shorter windows, or use --device cpu"
            )
        self._size = max(1, size // 2)
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        self.notes = [f"memory ran out on {self._device}: went on with batches of {self._size} sequences"]
