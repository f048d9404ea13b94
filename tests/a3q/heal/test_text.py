"""Text to heal on: the model's own, half of it conversations, and a user's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from a3q import calibration
from a3q.calibration import self_text
from a3q.errors import InputError
from a3q.heal.text import conversation, healing_text, without
from a3q.model import Model
from converters.hf_reader import open_huggingface
from tests.a3q.test_calibration import Numbers, numbers
from tests.pico import VOCAB, corpus, write_model

CPU = torch.device("cpu")
BOS, EOS = 0, 1
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[me]{% endif %}"
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return open_huggingface(write_model(tmp_path_factory.mktemp("plain")))


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = write_model(tmp_path_factory.mktemp("chat"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return open_huggingface(folder)


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch, chat: Model) -> None:
    """Four sequences of 32 tokens at a time."""
    monkeypatch.setattr(calibration, "CACHE_BYTES", int(4 * 32 * chat.config.kv_bytes_per_token(4)))


def written(model: Model, count: int, length: int, *sources: str, seed: int = 0, **options: Any) -> Tensor:
    return healing_text(model, sources or ["self"], count * length, length, seed=seed, device=CPU, **options)


def with_template(model: Model, template: str | None, **fields: Any) -> Model:
    return replace(model, tokenizer=replace(model.tokenizer, chat_template=template, **fields))  # type: ignore[type-var]


def begins(text: Tensor, prompt: list[int]) -> Tensor:
    """Which rows do, `[N]`."""
    return (text[:, : len(prompt)] == torch.tensor(prompt)).all(1)


def first_end(row: list[int], start: int) -> int | None:
    return next((i for i in range(start, len(row)) if row[i] == EOS), None)


def runs(text: Tensor, size: int = 8) -> set[tuple[int, ...]]:
    """All runs of tokens in the rows."""
    return {tuple(run) for row in text.tolist() for run in zip(*(row[i:] for i in range(size)), strict=False)}


# The model itself


def test_half_are_conversations(chat: Model) -> None:
    text = written(chat, 129, 96)
    assert text.shape == (129, 96) and text.dtype == torch.int64
    assert text.min() >= 0 and text.max() < VOCAB
    tokenizer = chat.tokenizer
    prompt, header = tokenizer.encode("<s>[user]", special=True), tokenizer.encode("\n[me]")
    is_chat = begins(text, prompt)
    assert is_chat.sum() == 64
    answered = 0
    for row in text[is_chat].tolist():
        end = first_end(row, len(prompt))
        if end is not None:
            answered += 1
            assert row[end + 1 : end + 1 + len(header)] == header[: len(row) - end - 1]
    assert answered > 8
    # Both kinds are everywhere.
    assert 4 < is_chat[:16].sum() < 12
    # The others begin as calibration text does, and nothing is put into them.
    others = text[~is_chat]
    assert (others[:, 0] == BOS).all() == tokenizer.add_bos
    assert others[:, int(tokenizer.add_bos)].unique().numel() > 40
    assert not runs(others, len(header) + 1) & {(EOS, *header)}


@pytest.mark.parametrize(
    "template",
    [
        "{% for %}",
        "{{ raise_exception('no') }}",
        "{{ 1 / 0 }}",
        "{{ bos_token }}{{ eos_token }}",
        "{{ bos_token }}{{ messages[0].content | upper }}{{ eos_token }}",
        "{{ bos_token }}{{ messages[0].content * 2 }}{{ eos_token }}",
        "{{ bos_token }}{{ messages[0].content }}",
        "{{ bos_token * 32 }}{{ messages[0].content }}{{ eos_token }}",
    ],
)
def test_template_that_makes_no_conversation_is_left_out(plain: Model, template: str) -> None:
    text = written(with_template(plain, template), 8, 32)
    assert torch.equal(text, written(plain, 8, 32))
    assert text.shape == (8, 32)


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


def test_seed_decides_and_calibration_text_is_not_repeated(chat: Model) -> None:
    one, again, other = written(chat, 24, 48), written(chat, 24, 48), written(chat, 24, 48, seed=1)
    assert torch.equal(one, again)
    assert not runs(one) & runs(other)
    for seed in range(3):
        # The same draws give the same text only side by side with as many others.
        for count in (12, 24):
            assert not runs(one) & runs(self_text(chat, count, 48, seed, CPU))
    assert len(one.unique(dim=0)) == 24


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
    whole = written(chat, 24, 32)
    prompt = chat.tokenizer.encode("<s>[user]", special=True)
    assert len(whole.unique(dim=0)) == 24
    for calls in range(1, 7):
        seen: list[int] = []
        text = written(chat, 24, 32, deadline=after(calls), on_tokens=seen.append)
        assert text.shape == (4 * calls, 32)
        assert sum(seen) == text.numel()
        assert begins(text, prompt).sum() == 4 * (calls // 2)
        assert set(map(tuple, text.tolist())) <= set(map(tuple, whole.tolist()))
    assert torch.equal(written(chat, 24, 32, deadline=lambda: False), whole)


# A user's text


def test_file_is_cut_into_windows(plain: Model, tmp_path: Path) -> None:
    model = replace(plain, tokenizer=Numbers())
    path = str(numbers(tmp_path / "a.txt", 20_000))
    seen: list[int] = []
    text = written(model, 60, 256, path, on_tokens=seen.append, deadline=lambda: True)
    assert text.shape == (60, 256) and text.dtype == torch.int64
    assert sum(seen) == text.numel()
    assert (text.diff(dim=1) == 1).all()
    assert len(text.unique()) == text.numel()
    # Shuffled, and always the same.
    assert not (text[:, 0].diff() > 0).all()
    assert torch.equal(text, written(model, 60, 256, path))
    assert not torch.equal(text, written(model, 60, 256, path, seed=1))


@pytest.mark.parametrize("available", [1024, 1500, 5000, 15_000])
def test_short_text_gives_what_there_is(plain: Model, tmp_path: Path, available: int) -> None:
    model = replace(plain, tokenizer=Numbers())
    text = written(model, 60, 512, str(numbers(tmp_path / "a.txt", available)))
    assert 2 <= len(text) < 60
    assert text.shape[1] == 512
    # A window begins again where it ends; nothing is in two rows.
    assert 0.75 * available < len(text.unique()) <= available
    assert sum(len(row.unique()) for row in text) == len(text.unique())
    steps = text.diff(dim=1)
    assert ((steps == 1) | (text[:, 1:] == text[:, :1])).all()


def test_sources_have_equal_shares(chat: Model, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n".join(corpus(1500)))
    ids = chat.tokenizer.encode(path.read_text())
    seen: list[int] = []
    text = written(chat, 61, 64, "self", str(path), on_tokens=seen.append)
    assert text.shape == (62, 64)
    assert sum(seen) == text.numel()
    known = runs(torch.tensor([ids]))
    of_file = torch.tensor([bool(runs(row[None]) & known) for row in text])
    assert of_file.sum() == 31
    assert 3 < of_file[:16].sum() < 13
    is_chat = begins(text, chat.tokenizer.encode("<s>[user]", special=True))
    assert is_chat.sum() == 15
    assert not (is_chat & of_file).any()


def test_too_little_text_is_an_error(plain: Model, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("little")
    with pytest.raises(InputError, match="only"):
        written(plain, 4, 64, str(path))
    with pytest.raises(InputError, match="no such file"):
        written(plain, 4, 64, str(tmp_path / "none.txt"))


def test_text_to_check_with_is_left_out() -> None:
    """Wherever it lies in a row, also a part of it; a row that only shares words stays."""
    text = torch.randint(5000, (2100, 128), generator=torch.Generator().manual_seed(0))
    held_out = torch.stack([text[3, 20:84], text[2000, 64:], torch.arange(64)])
    mixed = torch.cat([held_out[0, 40:], held_out[1, :20], held_out[2, :20], held_out[0, :31], held_out[1, 31:64]])[
        :128
    ]
    text[7, :40] = held_out[1, 10:50]
    text[11] = mixed
    found = without(text, held_out)
    kept = [i for i in range(len(text)) if i not in (3, 7, 11, 2000)]
    assert torch.equal(found, text[kept])
    spread = mixed.clone()
    spread[::31] = 9
    assert len(without(torch.stack([text[0], spread]), held_out)) == 2
    with pytest.raises(InputError, match="all of the text is held out"):
        without(text[3:4], held_out)
