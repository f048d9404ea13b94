"""Work on a step's sequences in portions that fit the device's memory, smaller ones when it runs out."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from a3q import ranks
from a3q.batching import out_of_memory
from a3q.errors import InputError


def discard(parameters: Iterable[Tensor]) -> None:
    """Give up the parameters' gradients."""
    for parameter in parameters:
        parameter.grad = None


class Portions:
    """How much is computed at once; `notes` says what a user should know of it."""

    def __init__(self, size: int, device: torch.device, recomputes: bool, advice: str) -> None:
        """`size`: sequences at first. `recomputes`: whether there is a slower way that takes less memory. `advice`: the
        end of the message for the user where nothing helps."""
        self.recompute = False
        self.notes: list[str] = []
        self._size, self._device, self._recomputes, self._advice = size, device, recomputes, advice

    def of(self, tokens: Tensor) -> Iterator[Tensor]:
        """The portions of `[B, …]`; none of no sequences."""
        return (tokens[start : start + self._size] for start in range(0, len(tokens), self._size))

    def run(self, work: Callable[[], Tensor], discard: Callable[[], None]) -> Tensor:
        """What `work` gives, which begins anew with less at once where memory runs out; `discard` what it has made."""
        while True:
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
            # Out of the handler of the error, which holds on to what was computed.
            discard()
            self._take_less()

    def gradients(self, parameters: Sequence[Tensor], sequences: Tensor, add: Callable[[Tensor], Tensor]) -> Tensor:
        """The sum of a loss over the portions of all processes' `sequences`, with its gradient in the parameters.

        `add` gives the loss of a portion and adds its gradient to what the parameters have. Every process has the
        parameters in the same order; one may have no sequences.
        """

        def all_portions() -> Tensor:
            discard(parameters)
            total = torch.zeros((), device=self._device)
            for part in self.of(sequences):
                total += add(part)
            return total

        total = self.run(all_portions, lambda: discard(parameters))
        found = [torch.zeros_like(one) if one.grad is None else one.grad for one in parameters]
        ranks.add_up(total, *found)
        for parameter, gradient in zip(parameters, found, strict=True):
            parameter.grad = gradient
        return total

    def _take_less(self) -> None:
        if self._size > 1:
            self._size = -(-self._size // 2)
        elif self._recomputes and not self.recompute:
            self.recompute = True
        else:
            raise InputError(f"--heal: out of memory on {self._device} with one sequence at a time; {self._advice}")
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        how = "every layer computed twice" if self.recompute else f"{self._size} sequences at once"
        self.notes = [f"memory ran out on {self._device} while healing: went on with {how}"]
