"""Text to heal on: the model's own, put together to sequences, and a user's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from a3q.calibration import self_text
from a3q.errors import InputError
from a3q.heal import text as heal_text
from a3q.heal.own_text import own_texts
from a3q.heal.text import healing_text, own_calibration, without
from a3q.model import Model
from tests.a3q.heal.chatty import begins, runs
from tests.a3q.test_calibration import Numbers, numbers
from tests.pico import corpus

CPU = torch.device("cpu")


def written(model: Model, count: int, length: int, *sources: str, seed: int = 0, **options: Any) -> Tensor:
    return healing_text(model, sources or ["self"], count * length, length, seed=seed, device=CPU, **options)


# The model itself


def test_own_texts_are_put_together(chat: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heal_text, "LENGTH", 32)
    seen: list[int] = []
    text = written(chat, 10, 96, on_tokens=seen.append)
    assert text.shape == (10, 96) and sum(seen) == text.numel()
    texts = own_texts(chat, 30, 32, seed=heal_text._APART, device=CPU)
    # All of them, in another order, so that kinds are everywhere.
    found = list(map(tuple, text.view(30, 32).tolist()))
    known = list(map(tuple, texts.tolist()))
    assert sorted(found) == sorted(known) and found != known
    assert torch.equal(text, written(chat, 10, 96))
    assert not runs(text) & runs(written(chat, 10, 96, seed=1))
    # What is left of the last one is no sequence.
    assert written(chat, 3, 80).shape == (3, 80)


def test_calibration_text_is_not_repeated(chat: Model) -> None:
    text = written(chat, 24, 48)
    for seed in range(3):
        # The same draws give the same text only side by side with as many others.
        for count in (4, 8, 12, 24):
            assert not runs(text) & runs(self_text(chat, count, 48, seed, CPU))


def test_what_layers_are_trained_on(chat: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heal_text, "LENGTH", 32)
    found = own_calibration(chat, 12, 96, seed=0, device=CPU)
    assert found.tokens.shape == (12, 96) and found.held_out.shape == (4, 96)
    assert found.source == "self" and "short texts" in found.description
    assert len(torch.cat([found.tokens, found.held_out]).view(-1, 32).unique(dim=0)) == 48
    assert not set(map(tuple, found.tokens.view(-1, 32).tolist())) & set(
        map(tuple, written(chat, 12, 96).view(-1, 32).tolist())
    )


# A user's text


def test_file_is_cut_into_windows(plain: Model, tmp_path: Path) -> None:
    model = replace(plain, tokenizer=Numbers())
    path = str(numbers(tmp_path / "a.txt", 20_000))
    seen: list[int] = []
    text = written(model, 60, 256, path, on_tokens=seen.append, over=lambda: True)
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
    assert is_chat.sum() > 10
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
