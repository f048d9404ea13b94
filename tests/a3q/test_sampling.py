"""Self-written text: seeds, prompts, greedy limits and the distribution of draws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from a3q.forward import hidden_states, output_logits
from a3q.model import Model
from a3q.sampling import pick, sample
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
