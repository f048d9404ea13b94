"""What the benchmarks share: token windows as in the project's measurements, and perplexity over all positions.

Perplexity here is over every position of the first windows of a text, as in the A3 paper's tables; `a3q eval` scores
the second half of each window as llama-perplexity does, and gives other figures.
"""

from __future__ import annotations

import math
import resource
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from a3q.forward import hidden_states, output_logits
from a3q.model import Model


def windows(model: Model, text: Path, count: int, length: int = 1024) -> Tensor:
    """The first `count` windows of `length` tokens of a text, `[count, length]`; line ends become `\\n`."""
    # Ten characters a token are more than any text here needs; a whole corpus would take long to tokenize.
    ids = model.tokenizer.encode(text.read_text(encoding="utf-8")[: 10 * count * length])
    if len(ids) < count * length:
        sys.exit(f"{text}: {len(ids)} tokens, {count * length} are wanted")
    return torch.tensor(ids[: count * length]).view(count, length)


def perplexity(model: Model, tokens: Tensor, device: torch.device) -> float:
    """exp of the mean negative log-likelihood of every token but each window's first."""
    return perplexity_of(model, hidden_states(model, tokens, device), tokens, device)


def perplexity_of(model: Model, hidden: Tensor, tokens: Tensor, device: torch.device) -> float:
    """Perplexity of `tokens` `[B, T]` from final hidden states `[B, T, hidden]` and the model's output matrix."""
    nll = 0.0
    for states, ids in zip(hidden, tokens, strict=True):
        logits = output_logits(model, states[:-1], device)
        nll += float(F.cross_entropy(logits, ids[1:].to(device), reduction="sum"))
    return math.exp(nll / (tokens.shape[0] * (tokens.shape[1] - 1)))


def peak_memory(who: int = resource.RUSAGE_SELF) -> float:
    """Largest resident size so far in GiB."""
    return resource.getrusage(who).ru_maxrss / 2**20
