"""The text that a reduced model is healed on: what the original writes itself, or a user's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from a3q.calibration import HELD_OUT, HELD_OUT_LENGTH, SELF, Calibration, OnTokens, calibration_tokens
from a3q.errors import InputError
from a3q.heal.own_text import LENGTH, own_texts
from a3q.model import Model

_APART = 1 << 30
"""Between the seeds of calibration text and of this, so that the one is no part of the other. A CPU's generator takes
the lowest 32 bits of a seed only."""
_SAME = 32
"""Tokens in a row that only the same place of a text has in common with another."""
_FACTOR = 6364136223846793005
_ROWS = 1024


def healing_text(
    model: Model,
    sources: Sequence[str],
    tokens: int,
    length: int,
    *,
    seed: int,
    device: torch.device,
    on_tokens: OnTokens = lambda _: None,
    over: Callable[[], bool] = lambda: False,
) -> Tensor:
    """About `tokens` tokens, an equal share of each of `sources`, shuffled: int64 `[N, length]` (CPU).

    Sources are those of `calibration_tokens`; of a short text there are fewer sequences. `on_tokens` is told of all
    that are there. The model's own texts are short, several to a sequence; they end early, with
    some of each kind at least, when time is `over`.
    """
    count = max(1, -(-tokens // (len(sources) * length)))
    parts: list[Tensor] = []
    # Those that are read first: they take no time, and what is left of it is for the model's own.
    for source in sorted(sources, key=lambda source: source == SELF):
        if source == SELF:
            stream = _written(model, count * length, length, seed + _APART, device, on_tokens, over)
            parts.append(stream[: len(stream) // length * length].view(-1, length))
        else:
            part = calibration_tokens(model, source, count, length, seed=seed, device=device).tokens
            # The windows of a short text are shorter, mostly by a little: they begin again.
            part = part.repeat(1, -(-length // part.shape[1]))[:, :length]
            on_tokens(part.numel())
            parts.append(part)
    text = torch.cat(parts)
    return text[torch.randperm(len(text), generator=torch.Generator().manual_seed(seed + _APART))]


def own_calibration(
    model: Model, count: int, length: int, *, seed: int, device: torch.device, on_tokens: OnTokens = lambda _: None
) -> Calibration:
    """`count` sequences of the model's own short texts to measure and train layers on, and others to check with."""
    checked = min(HELD_OUT_LENGTH, length)
    stream = _written(model, count * length + HELD_OUT * checked, length, seed, device, on_tokens)
    tokens, held_out = stream[: count * length], stream[count * length :]
    description = f"{count} × {length} tokens that the model wrote itself, in short texts"
    return Calibration(tokens.view(count, length), held_out.view(HELD_OUT, checked), SELF, description)


def _written(
    model: Model,
    tokens: int,
    length: int,
    seed: int,
    device: torch.device,
    on_tokens: OnTokens,
    over: Callable[[], bool] = lambda: False,
) -> Tensor:
    """`tokens` of the model's own texts, of `length` at most, one behind another, so that sequences cut from them have
    late positions too; fewer when time is `over`."""
    own = min(LENGTH, length)
    texts = own_texts(model, -(-tokens // own), own, seed=seed, device=device, on_tokens=on_tokens, over=over)
    shuffled = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))
    return texts[shuffled].flatten()[:tokens]


def without(text: Tensor, held_out: Tensor) -> Tensor:
    """Those rows of `text` `[N, T]` that have no `_SAME` tokens in a row in common with rows of `held_out` `[n, T']`.

    InputError where none are left.
    """
    size = min(_SAME, text.shape[1], held_out.shape[1])
    known = _hashes(held_out, size)
    rows = (text[start : start + _ROWS] for start in range(0, len(text), _ROWS))
    kept = torch.cat([~torch.isin(_hashes(part, size), known).any(1) for part in rows])
    if not kept.any():
        raise InputError(
            "--heal: all of the text is held out to check the result with; give more text (--calib), or several sources"
        )
    return text[kept]


def _hashes(ids: Tensor, size: int) -> Tensor:
    """A number for each `size` consecutive tokens of each row of `[N, T]`; in practice another for others."""
    count = ids.shape[1] - size + 1
    found = torch.zeros(len(ids), count, dtype=torch.int64)
    for i in range(size):
        # Wraps around.
        found = found * _FACTOR + ids[:, i : i + count] + 1
    return found
