"""The text that a reduced model is healed on: what the original writes itself, or a user's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from a3q.calibration import SELF, OnTokens, Writer, calibration_tokens, first_tokens
from a3q.errors import InputError
from a3q.model import Model, Tokenizer
from a3q.sampling import Following
from converters.chat_template import compile_template

_APART = 1 << 30
"""Between the seeds of calibration text and of this, so that the one is no part of the other. A CPU's generator takes
the lowest 32 bits of a seed only."""
_SAME = 32
"""Tokens in a row that only the same place of a text has in common with another."""
_FACTOR = 6364136223846793005
_ROWS = 1024
_AT_ONCE = {"cpu": 16, "cuda": 1024}
"""Sequences in a batch where time counts: the deadline is looked at between them."""
_QUESTION = "a3qquestion"
"""Stands in a rendered chat template for what the user says."""


def healing_text(
    model: Model,
    sources: Sequence[str],
    tokens: int,
    length: int,
    *,
    seed: int,
    device: torch.device,
    on_tokens: OnTokens = lambda _: None,
    deadline: Callable[[], bool] | None = None,
) -> Tensor:
    """About `tokens` tokens, an equal share of each of `sources`, shuffled: int64 `[N, length]` (CPU).

    Sources are those of `calibration_tokens`; of a short text there are fewer sequences. `on_tokens` is told of all
    that are there. The model ends its text early, with one batch at least, when it is past the `deadline`.
    """
    count = max(1, -(-tokens // (len(sources) * length)))
    parts: list[Tensor] = []
    # Those that are read first: they take no time, and what is left of it is for the model's own.
    for source in sorted(sources, key=lambda source: source == SELF):
        if source == SELF:
            parts += _written(model, count, length, seed + _APART, device, on_tokens, deadline)
        else:
            part = calibration_tokens(model, source, count, length, seed=seed, device=device).tokens
            # The windows of a short text are shorter, mostly by a little: they begin again.
            part = part.repeat(1, -(-length // part.shape[1]))[:, :length]
            on_tokens(part.numel())
            parts.append(part)
    text = torch.cat(parts)
    return text[torch.randperm(len(text), generator=torch.Generator().manual_seed(seed + _APART))]


def conversation(tokenizer: Tokenizer) -> tuple[list[int], Following] | None:
    """Tokens in front of a user's first message, and what follows the end of it, by the chat template.

    With the first, a model that was trained on conversations writes a user's message (Magpie, arXiv 2406.08464); what
    follows lets it answer. None where there is no template that does this.
    """
    try:
        template = compile_template(tokenizer)
        messages = [{"role": "user", "content": _QUESTION}]
        text = template.render(messages=messages, add_generation_prompt=True, tools=None, documents=None)
        before, after = text.split(_QUESTION)
        # Space around the message is the model's to write: it is often one token with a word.
        prompt = tokenizer.encode(before.rstrip(" "), special=True)
        end, *header = tokenizer.encode(after.lstrip(), special=True)
    except Exception:  # whatever a stranger's template does
        return None
    if tokenizer.add_bos and tokenizer.bos_id is not None and prompt[:1] != [tokenizer.bos_id]:
        prompt = [tokenizer.bos_id, *prompt]
    return (prompt, Following((end,), tuple(header))) if prompt else None


def _written(
    model: Model,
    count: int,
    length: int,
    seed: int,
    device: torch.device,
    on_tokens: OnTokens,
    deadline: Callable[[], bool] | None,
) -> list[Tensor]:
    """Batches of text by the model, `count` in all: half of them conversations where it has a template for them."""
    writer = Writer(model, length, device, on_tokens)
    most = None if deadline is None else _AT_ONCE[device.type]
    chat = conversation(model.tokenizer)
    chats = count // 2 if chat is not None and len(chat[0]) < length else 0
    plain = count - chats
    kinds: list[Iterator[Tensor]] = [writer.batches(first_tokens(model, plain, seed), seed + 1, most=most)]
    if chat is not None and chats:
        prompt, following = chat
        kinds.append(writer.batches(torch.tensor([prompt]).expand(chats, -1), seed + 1 + plain, following, most))
    parts: list[Tensor] = []
    # In turn, so that there are some of each kind whenever time is up.
    while kinds and not (parts and deadline is not None and deadline()):
        kind = kinds.pop(0)
        if (part := next(kind, None)) is not None:
            parts.append(part)
            kinds.append(kind)
    return parts


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
