"""Work on calibration sequences in batches that fit the device's memory, smaller ones when it runs out."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch

from a3q.errors import InputError
from a3q.forward import batch_size
from a3q.model import ModelConfig


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
