"""What a model writes itself to be healed on: freely, on request and as conversations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from a3q import calibration
from a3q.errors import InputError
from a3q.heal import own_text
from a3q.heal.own_text import GENRES, conversation, own_texts, request
from a3q.model import Model
from a3q.pieces import Pieces, pieces, using
from a3q.sampling import sample
from tests.a3q.heal.chatty import TEMPLATE, begins, runs
from tests.pico import VOCAB

CPU = torch.device("cpu")
BOS, EOS = 0, 1


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch, chat: Model) -> None:
    """Four sequences of 32 tokens at a time."""
    monkeypatch.setattr(calibration, "CACHE_BYTES", int(4 * 32 * chat.config.kv_bytes_per_token(4)))


def written(model: Model, count: int, length: int, seed: int = 0, **options: Any) -> Tensor:
    return own_texts(model, count, length, seed=seed, device=CPU, **options)


def with_template(model: Model, template: str | None, **fields: Any) -> Model:
    return replace(model, tokenizer=replace(model.tokenizer, chat_template=template, **fields))  # type: ignore[type-var]


def first_end(row: list[int], start: int) -> int | None:
    return next((i for i in range(start, len(row)) if row[i] == EOS), None)


def asked(text: Tensor, ask: tuple[list[int], list[int]]) -> Tensor:
    """Which rows begin with that request, whatever it is about, `[N]`."""
    before, after = ask
    return begins(text, before) & begins(text[:, len(before) + 2 :], after)


def test_kinds_have_their_shares(chat: Model) -> None:
    text = written(chat, 256, 96)
    assert text.shape == (256, 96) and text.dtype == torch.int64
    assert text.min() >= 0 and text.max() < VOCAB
    tokenizer = chat.tokenizer
    asks = [request(tokenizer, genre) for genre in GENRES]
    # Rounds of 32, 128 and the 96 that are left, each with all kinds.
    of_genre = torch.stack([asked(text, ask) for ask in asks if ask is not None])
    assert of_genre.sum() == 96 and (of_genre.sum(1) >= 8).all()
    assert [int(part.sum()) for part in of_genre.any(0).split([32, 128, 96])] == [12, 48, 36]
    subjects = torch.cat(
        [text[rows][:, len(ask[0]) : len(ask[0]) + 2] for rows, ask in zip(of_genre, asks, strict=True) if ask]
    )
    assert subjects.unique().numel() > 60
    on_request = of_genre.any(0)
    prompt, header = tokenizer.encode("<s>[user]", special=True), tokenizer.encode("\n[me]")
    is_chat = begins(text, prompt) & ~on_request
    assert [int(part.sum()) for part in is_chat.split([32, 128, 96])] == [4, 16, 12]
    answered = 0
    for row in text[is_chat].tolist():
        end = first_end(row, len(prompt))
        if end is not None:
            answered += 1
            assert row[end + 1 : end + 1 + len(header)] == header[: len(row) - end - 1]
    assert answered
    # The others begin as calibration text does, and nothing is put into them.
    others = text[~is_chat & ~on_request]
    assert (others[:, 0] == BOS).all() == tokenizer.add_bos
    assert others[:, int(tokenizer.add_bos)].unique().numel() > 30
    assert not runs(others, len(header) + 1) & {(EOS, *header)}


def test_only_rounds_of_the_largest_size_use_kernels_made_for_it(chat: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[tuple[int, bool]] = []
    other = Pieces(add=lambda x, y: x + y)

    def noted(model: Model, prompts: Tensor, *args: Any, **named: Any) -> Tensor:
        used.append((len(prompts), pieces() is other))
        return sample(model, prompts, *args, **named)

    monkeypatch.setattr(calibration, "sample", noted)
    monkeypatch.setattr(own_text, "_AT_ONCE", {"cpu": 32})
    with using(other):
        assert len(written(chat, 80, 24)) == 80
        assert pieces() is other
    assert used == [(10, False), (32, True), (32, True), (6, False)]


@pytest.mark.parametrize(
    "template",
    [
        "{% for %}",
        "{{ raise_exception('no') }}",
        "{{ 1 / 0 }}",
        "{{ bos_token }}{{ eos_token }}",
        "{{ bos_token }}{{ messages[0].content | upper }}{{ eos_token }}",
        "{{ bos_token }}{{ messages[0].content * 2 }}{{ eos_token }}",
        "{{ bos_token * 32 }}{{ messages[0].content }}{{ eos_token }}",
    ],
)
def test_template_that_makes_no_conversation_is_left_out(plain: Model, template: str) -> None:
    text = written(with_template(plain, template), 8, 32)
    assert torch.equal(text, written(plain, 8, 32))
    assert text.shape == (8, 32)


def test_template_for_requests_alone(plain: Model) -> None:
    """One that puts nothing before a user's message makes no conversation, but takes a wish."""
    model = with_template(plain, "{{ messages[0].content }}</s>a", add_bos=False)
    assert conversation(model.tokenizer) is None
    ask = request(model.tokenizer, GENRES[0])
    assert ask is not None
    encode = model.tokenizer.encode
    assert ask == (encode("Write an encyclopedia article about"), encode(".</s>a", special=True))
    text = written(model, 8, 96)
    assert sum(int(asked(text, one).sum()) for genre in GENRES if (one := request(model.tokenizer, genre))) == 3


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize(
    ("template", "before", "end", "header"),
    [
        (TEMPLATE, "<s>[user]", "</s>", "\n[me]"),
        ("[Q]  {{ messages[0].content }} \n</s>[A] ", "[Q]", "</s>", "[A] "),
        ("a\n{{ messages[0].content }}</s>", "a\n", "</s>", ""),
        ("{{ messages[0].content }}</s>a", "", "</s>", "a"),
        # As Llama 2 has it: no control tokens.
        ("[{{ messages[0].content }} ]a", "[", "]", "a"),
    ],
)
def test_conversation_is_cut_out_of_the_template(
    plain: Model, add_bos: bool, template: str, before: str, end: str, header: str
) -> None:
    encode = plain.tokenizer.encode
    found = conversation(with_template(plain, template, add_bos=add_bos).tokenizer)
    expected = encode(before, special=True)
    if add_bos and not before.startswith("<s>"):
        expected = [BOS, *expected]
    if not expected:
        assert found is None
        return
    assert found is not None
    prompt, following = found
    assert prompt == expected
    assert [*following.ends, *following.ids] == encode(end + header, special=True)
    assert len(following.ends) == 1


def test_tokenizer_that_cannot_encode_needs_no_template(chat: Model, plain: Model) -> None:
    def refuse(text: str, special: bool) -> list[int]:
        raise InputError("unknown pre-tokenizer")

    assert torch.equal(written(with_template(chat, TEMPLATE, _encode=refuse), 6, 16), written(plain, 6, 16))


def test_seed_decides(chat: Model, plain: Model) -> None:
    for model in (chat, plain):
        one = written(model, 24, 48)
        assert torch.equal(one, written(model, 24, 48))
        assert not set(map(tuple, one.tolist())) & set(map(tuple, written(model, 24, 48, seed=1).tolist()))
        assert len(one.unique(dim=0)) == 24
    assert not runs(one) & runs(written(plain, 24, 48, seed=1))


def after(calls: int) -> Callable[[], bool]:
    """Time is up at that call, the first being 1."""
    left = calls

    def is_over() -> bool:
        nonlocal left
        left -= 1
        return left <= 0

    return is_over


@pytest.mark.usefixtures("small_batches")
def test_time_ends_the_text_between_batches(chat: Model) -> None:
    whole = written(chat, 64, 32)
    assert len(whole.unique(dim=0)) == 64
    # The first round of 8 is always there; time is looked at before the second and behind each of its batches.
    for calls in range(1, 5):
        seen: list[int] = []
        text = written(chat, 64, 32, over=after(calls), on_tokens=seen.append)
        assert text.shape == (8 + 4 * (calls - 1), 32)
        assert sum(seen) == text.numel()
        assert set(map(tuple, text.tolist())) <= set(map(tuple, whole.tolist()))
    assert torch.equal(written(chat, 64, 32, over=lambda: False), whole)


@pytest.mark.parametrize("count", [1, 7, 8, 63, 64, 100, 1000, 9000])
@pytest.mark.parametrize("most", [64, 4096])
def test_rounds_grow(count: int, most: int) -> None:
    rounds = list(own_text._rounds(count, most))
    assert sum(rounds) == count and min(rounds) > 0 and max(rounds) <= most
    assert rounds[0] <= own_text._FIRST
    assert len(rounds) >= min(count // 8, 3)
    assert all(later <= own_text._GROWTH * earlier for earlier, later in pairwise(rounds))
