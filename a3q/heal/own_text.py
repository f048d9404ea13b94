"""Texts that a model writes itself to be healed on: freely, on request, and as conversations.

At temperature 1 a small model's text is soon only lists and noise, so that many short texts teach more than few long
ones. SmolLM2-135M at 25 %, perplexity of WikiText-2 and of Python's documentation: 52.7 and 23.9 when reduced, after
2.4M tokens 45.5 and 20.6 from texts of 1024 tokens, 43.9 and 19.7 from texts of 256, 44.0 and 18.8 where a third of
these were asked for through the chat template. Conversations alone were worst to calibrate on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from a3q.calibration import OnTokens, Writer, first_tokens
from a3q.model import Model, Tokenizer
from a3q.pieces import Pieces, using
from a3q.sampling import OPEN, Following
from converters.chat_template import compile_template

LENGTH = 256
"""Tokens of a text, at most."""
GENRES = (
    "an encyclopedia article",
    "a news report",
    "a short story",
    "a textbook chapter",
    "a how-to guide",
    "a blog post",
    "a technical manual",
    "a biography",
)
"""What the model is asked to write, in turn, each time about `_SUBJECT` tokens drawn at random."""
_REQUEST = "Write {} about {}."
_SUBJECT = 2
_ASKED = 3 / 8
"""Of all texts, where the model has a chat template that allows it."""
_CONVERSATIONS = 1 / 8
_FIRST = 64
"""Texts of the first round, of few an eighth; a round has some of every kind."""
_GROWTH = 4
_AT_ONCE = {"cpu": 256, "cuda": 8192}
"""Texts of a round at most: each has `_GROWTH` times as many as the one before. All of a round are written side by
side, since a token takes nearly as long for one as for many: 192 texts of SmolLM2 300 s kind by kind, 129 s together
(2 cores); 4096 on an H200 167k tokens a second, 8192 181k."""
_MARK = "a3qsubject"
"""Stands in a rendered chat template for what is put in its place."""

Request = tuple[list[int], list[int]]
"""Tokens before and after what a text is asked about."""


def own_texts(
    model: Model,
    count: int,
    length: int,
    *,
    seed: int,
    device: torch.device,
    on_tokens: OnTokens = lambda _: None,
    over: Callable[[], bool] = lambda: False,
) -> Tensor:
    """`count` texts of `length` tokens, int64 `[count, length]` (CPU); fewer, but a round, when time is `over`."""
    writer = Writer(model, length, device, on_tokens)
    asks = [ask for genre in GENRES if (ask := request(model.tokenizer, genre)) is not None]
    asks = [ask for ask in asks if sum(map(len, ask)) + _SUBJECT < length]
    chat, following = conversation(model.tokenizer) or ([], None)
    if len(chat) >= length:
        chat = []
    parts: list[Tensor] = []
    most = _AT_ONCE[device.type]
    for i, size in enumerate(_rounds(count, most)):
        if i > 0 and over():
            break
        prompts, chats = _prompts(model, size, asks, chat, seed)
        # Kernels that are in use are made anew for every size: only for the one of most rounds.
        with nullcontext() if size == most else using(Pieces()):
            # What is drawn and how it is shuffled have seeds of their own: they must not decide what is written.
            for part in writer.batches(prompts, seed + 2, following, chats):
                parts.append(part)
                if i > 0 and over():
                    return torch.cat(parts)
        seed += 2 + size
    return torch.cat(parts)


def _rounds(count: int, most: int) -> Iterator[int]:
    """Texts of each round."""
    size = min(_FIRST, max(count // len(GENRES), len(GENRES)))
    while count > 0:
        yield min(size, count)
        count -= size
        size = min(_GROWTH * size, most)


def _prompts(model: Model, count: int, asks: list[Request], chat: list[int], seed: int) -> tuple[Tensor, Tensor]:
    """Prompts of a round `[count, P]` as `sample` takes them, shuffled, and which begin a conversation, `[count]`.

    Without `asks`, or with `chat` empty, there is free text instead.
    """
    asked = round(_ASKED * count) if asks else 0
    chats = round(_CONVERSATIONS * count) if chat else 0
    plain = count - asked - chats
    drawn = first_tokens(model, plain + _SUBJECT * asked, seed)
    subjects = drawn[plain:, -1].view(asked, _SUBJECT).tolist()
    # A small round's first genre is another each time.
    requests = [
        [*before, *subject, *after]
        for i, subject in enumerate(subjects, seed)
        for before, after in [asks[i % len(asks)]]
    ]
    rows = [torch.tensor(ids) for ids in [*drawn[:plain].tolist(), *requests, *[chat] * chats]]
    shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(seed + 1))
    return pad_sequence(rows, batch_first=True, padding_value=OPEN)[shuffled], shuffled >= plain + asked


def conversation(tokenizer: Tokenizer) -> tuple[list[int], Following] | None:
    """Tokens in front of a user's first message, and what follows the end of it, by the chat template.

    With the first, a model that was trained on conversations writes a user's message (Magpie, arXiv 2406.08464); what
    follows lets it answer. None where there is no template that does this.
    """
    found = _around(tokenizer, _MARK)
    if found is None or not found[0] or not found[1]:
        return None
    end, *header = found[1]
    return found[0], Following((end,), tuple(header))


def request(tokenizer: Tokenizer, genre: str) -> Request | None:
    """A user's wish for a text, by the chat template; None where it has none."""
    return _around(tokenizer, _REQUEST.format(genre, _MARK))


def _around(tokenizer: Tokenizer, message: str) -> tuple[list[int], list[int]] | None:
    """Tokens before and after `_MARK` in a user's first `message`, and the header of the answer."""
    try:
        template = compile_template(tokenizer)
        messages = [{"role": "user", "content": message}]
        text = template.render(messages=messages, add_generation_prompt=True, tools=None, documents=None)
        before, after = text.split(_MARK)
        # Space around the mark is the model's to write: it is often one token with a word.
        prompt = tokenizer.encode(before.rstrip(" "), special=True)
        rest = tokenizer.encode(after.lstrip(), special=True)
    except Exception:  # whatever a stranger's template does
        return None
    if tokenizer.add_bos and tokenizer.bos_id is not None and prompt[:1] != [tokenizer.bos_id]:
        prompt = [tokenizer.bos_id, *prompt]
    return prompt, rest
