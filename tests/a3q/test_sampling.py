"""Self-written text: seeds, prompts, greedy limits, what follows an end of turn, and the distribution of draws."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from a3q.forward import KeyValueCache, hidden_states, output_logits
from a3q.model import Model
from a3q.sampling import OPEN, Following, Given, _reached, kernel, pick, sample, shortest
from converters.hf_reader import open_huggingface
from tests.pico import VOCAB, write_model
from tests.reduced import reduced

CPU = torch.device("cpu")
LENGTH = 20


@pytest.fixture(scope="module", params=["llama", "gemma3", "gpt2", "gpt_neox", "mpt", "llama-reduced", "qwen3-reduced"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Windows, learned positions, partial RoPE, slopes, and layers of different sizes: all go through the cache."""
    kind, _, form = request.param.partition("-")
    model = open_huggingface(write_model(tmp_path_factory.mktemp("sampling"), kind, initializer_range=0.2))
    return reduced(model) if form else model


PROMPTS = torch.randint(VOCAB, (3, 4), generator=torch.Generator().manual_seed(0))


def write(model: Model, **options: Any) -> Tensor:
    chosen: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "seed": 0, "device": CPU} | options
    return sample(model, chosen.pop("prompts", PROMPTS), LENGTH, **chosen)


def uniform(count: int) -> Tensor:
    return torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def greedy(model: Model) -> Tensor:
    """The likeliest next token each time, by whole passes without a cache."""
    ids = PROMPTS
    while ids.shape[1] < LENGTH:
        logits = output_logits(model, hidden_states(model, ids, CPU)[:, -1], CPU)
        ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), 1)
    return ids


def test_seed_decides_and_prompts_stay(model: Model) -> None:
    one, again, other = write(model), write(model), write(model, seed=1)
    assert torch.equal(one, again)
    assert (one[:, 4:] != other[:, 4:]).float().mean() > 0.5
    for ids in (one, other):
        assert ids.shape == (3, LENGTH) and ids.dtype == torch.int64
        assert torch.equal(ids[:, :4], PROMPTS)
        assert ids.min() >= 0 and ids.max() < VOCAB
    assert not torch.equal(one[0, 4:], one[1, 4:])


@pytest.mark.parametrize("limit", [{"temperature": 1e-4}, {"top_p": 1e-9}])
def test_greedy_limits(model: Model, limit: dict[str, float]) -> None:
    """A vanishing temperature and a vanishing top-p both take the likeliest token, through the cache."""
    expected = greedy(model)
    assert torch.equal(write(model, **limit), expected)
    assert not torch.equal(write(model), expected)


def test_full_prompts_come_back_and_tokens_are_counted(model: Model) -> None:
    counts: list[int] = []
    write(model, on_tokens=counts.append)
    assert counts == [3 * 4] + [3] * (LENGTH - 4)
    full = torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    assert torch.equal(write(model, prompts=full), full)


# What follows an end of turn


def followed(chosen: list[int], following: Following) -> list[int]:
    """A row of what comes out where the model chooses `chosen`, whatever came before."""
    row: list[int] = []
    left: list[int] | None = None
    for token in chosen:
        row.append(left.pop(0) if left else token)
        if left is None and token in following.ends:
            left = list(following.ids)
    return row


def slowly(model: Model, following: Following, prompts: Tensor = PROMPTS, followed: Tensor | None = None) -> Tensor:
    """The same text by whole passes, row by row."""
    drawn = torch.rand(LENGTH, len(prompts), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = []
    for b, prompt in enumerate(prompts):
        ids = prompt[prompt != OPEN]
        left: list[int] | None = None if followed is None or followed[b] else []
        while len(ids) < LENGTH:
            logits = output_logits(model, hidden_states(model, ids[None], CPU)[:, -1], CPU)
            chosen = pick(logits, 1.0, 1.0, drawn[len(ids), b : b + 1])
            if left:
                chosen[0] = left.pop(0)
            elif left is None and int(chosen) in following.ends:
                left = list(following.ids)
            ids = torch.cat([ids, chosen])
        rows.append(ids)
    return torch.stack(rows)


@pytest.mark.parametrize("ids", [(), (7,), (300, 1, 300, 2)])
def test_text_follows_the_first_end_of_each_row(model: Model, ids: tuple[int, ...]) -> None:
    """The model reads what is given; the given ends again end nothing, nor do those it writes later."""
    following = Following(tuple(range(0, VOCAB, 4)), ids)
    text = write(model, following=following)
    assert torch.equal(text, slowly(model, following))
    assert torch.equal(text, write(model)) == (not ids)
    assert torch.equal(text, write(model, following=following))


def test_rows_that_do_not_end_stay_as_they_are(model: Model) -> None:
    plain = write(model)
    here = next(i for i in range(8, LENGTH) if plain[1, i] not in torch.cat([plain[0], plain[2], plain[1, 4:i]]))
    text = write(model, following=Following((VOCAB + 1, int(plain[1, here])), (3, 5)))
    assert torch.equal(text[[0, 2]], plain[[0, 2]])
    assert torch.equal(text[1, : here + 1], plain[1, : here + 1])
    assert text[1, here + 1 : here + 3].tolist() == [3, 5][: LENGTH - here - 1]
    # Ends in a prompt are none.
    only_in_prompts = tuple(set(PROMPTS.flatten().tolist()) - set(plain[:, 4:].flatten().tolist()))
    assert only_in_prompts
    assert torch.equal(write(model, following=Following(only_in_prompts, (3, 5))), plain)


@pytest.mark.parametrize("ids", [(), (5,), (2, 1, 0, 1)])
def test_what_is_given_by_the_rule_for_one_row(ids: tuple[int, ...]) -> None:
    following = Following((1, 2), ids)
    chosen = torch.randint(6, (30, 50), generator=torch.Generator().manual_seed(0))
    chosen[:, 0] = 0  # this row never ends
    # Rows are free from different places on, and some are left out.
    start, rows = torch.arange(50) % 7, torch.arange(50) % 5 > 0
    given = Given(following, rows)
    text = torch.stack([given(tokens, start <= i) for i, tokens in enumerate(chosen)])
    for row, first, out, takes_part in zip(chosen.T.tolist(), start.tolist(), text.T.tolist(), rows, strict=True):
        assert out[:first] == row[:first]
        assert out[first:] == (followed(row[first:], following) if takes_part else row[first:])


def test_nothing_is_asked_of_the_numbers_themselves() -> None:
    """On the meta device there are none: a branch on one, or a shape by one, is an error, as in a CUDA graph."""
    meta = torch.device("meta")
    given = Given(Following((1, 2), (3, 4)), torch.ones(5, dtype=torch.bool, device=meta))
    free = torch.empty(5, dtype=torch.bool, device=meta)
    assert given(torch.empty(5, dtype=torch.int64, device=meta), free).shape == (5,)


# Prompts of different lengths


UNEVEN = torch.tensor([[5, 9, 2, 7, 11, 3], [4, 8, OPEN, OPEN, OPEN, OPEN], [6, 1, 12, OPEN, OPEN, OPEN]])


def test_prompts_of_all_lengths_are_kept(model: Model) -> None:
    """What is written behind each is what whole passes over its row alone say, also where text follows an end."""
    assert shortest(UNEVEN) == 2 and shortest(PROMPTS) == PROMPTS.shape[1]
    counts: list[int] = []
    text = write(model, prompts=UNEVEN, on_tokens=counts.append)
    assert torch.equal(torch.where(UNEVEN == OPEN, OPEN, text[:, : UNEVEN.shape[1]]), UNEVEN)
    assert torch.equal(text, slowly(model, Following((), ()), UNEVEN))
    assert sum(counts) == text.numel()
    following = Following(tuple(range(0, VOCAB, 3)), (300, 1))
    followed = torch.tensor([True, True, False])
    mixed = write(model, prompts=UNEVEN, following=following, followed=followed)
    assert torch.equal(mixed, slowly(model, following, UNEVEN, followed))
    assert torch.equal(mixed[2], text[2]) and not torch.equal(mixed[:2], text[:2])


PROBABILITIES = torch.tensor([0.02, 0.4, 0.08, 0.25, 0.05, 0.2])


@pytest.mark.parametrize(
    ("temperature", "top_p", "expected"),
    [
        (1.0, 1.0, PROBABILITIES),
        (0.5, 1.0, PROBABILITIES.square() / PROBABILITIES.square().sum()),
        (2.0, 1.0, PROBABILITIES.sqrt() / PROBABILITIES.sqrt().sum()),
        # 0.4 + 0.25 do not reach 0.7, 0.4 + 0.25 + 0.2 do.
        (1.0, 0.7, torch.tensor([0, 0.4, 0, 0.25, 0, 0.2]) / 0.85),
    ],
)
def test_draws_follow_the_distribution(temperature: float, top_p: float, expected: Tensor) -> None:
    count = 20_000
    logits = (PROBABILITIES.log() + 3).expand(count, -1)
    drawn = pick(logits, temperature, top_p, uniform(count))
    seen = torch.bincount(drawn, minlength=6)
    assert (seen[expected == 0] == 0).all()
    likely = expected > 0
    expectation = count * expected[likely]
    # Above 20.5 in one of a thousand seeds, with five degrees of freedom.
    assert ((seen[likely] - expectation).square() / expectation).sum() < 20.5


def test_rows_are_drawn_independently() -> None:
    logits = torch.tensor([[0.0, 50.0, 0.0], [50.0, 0.0, 0.0], [0.0, 0.0, 50.0]])
    assert pick(logits, 1.0, 0.9, uniform(3)).tolist() == [1, 0, 2]


@pytest.mark.parametrize("error", [None, RuntimeError("out of resource: shared memory"), torch.OutOfMemoryError()])
def test_attention_of_one_position_is_tried_out(
    model: Model, monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    """On keys and values of every layer's size; where there is no kernel for them PyTorch's are left."""
    config, tried = model.config, []

    def attend(q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
        tried.append((q.shape[1] * q.shape[2], q.shape[3], v.shape[3], k.shape[2], int(position)))
        if error is not None:
            raise error
        return q

    monkeypatch.setitem(sys.modules, "a3q.decode_triton", SimpleNamespace(attend=attend))
    caches = [KeyValueCache(config, shape, 2, LENGTH, CPU) for shape in config.layers]
    start = torch.zeros(1, dtype=torch.int64)
    if isinstance(error, torch.OutOfMemoryError):
        with pytest.raises(torch.OutOfMemoryError):
            kernel(config, caches, start)
    elif error is not None:
        assert kernel(config, caches, start) is None
    else:
        assert kernel(config, caches, start) is attend
        heads = config.num_attention_heads
        assert tried == [(heads, shape.qk_head_dim, shape.v_head_dim, LENGTH, 0) for shape in config.layers]
    monkeypatch.setitem(sys.modules, "a3q.decode_triton", None)
    assert kernel(config, caches, start) is None


@pytest.mark.parametrize("count", [1, 255, 256, 257, 1000])
def test_what_is_reached_is_found_by_blocks(count: int) -> None:
    """As by the sums of all, and never where there is nothing."""
    generator = torch.Generator().manual_seed(count)
    weights = torch.rand(64, count, generator=generator).pow(8)
    weights[:, ::3] = 0
    weights[:, -1] = 1e-3
    weights[1, :-1] = 0
    share = torch.rand(64, dtype=torch.float64, generator=generator)
    share[:4] = torch.tensor([0.0, 0.0, 1 - 2**-53, 0.5], dtype=torch.float64)
    found = _reached(weights.log(), share)
    sums = weights.double().cumsum(-1)
    known = (sums <= share[:, None] * sums[:, -1:]).sum(-1)
    assert (weights.gather(1, found[:, None]) > 0).all()
    # Of ties only the last bits decide.
    assert (found == known).sum() >= 62
    assert ((sums.gather(1, found[:, None])[:, 0] / sums[:, -1] - share) > -1e-6).all()
