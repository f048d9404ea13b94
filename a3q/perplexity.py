"""How well a model predicts a text: perplexity exactly as llama.cpp's own program measures it, and KL divergence.

Both come from logits, whoever computed them: a3q's forward pass or llama.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from a3q.errors import InputError
from a3q.forward import hidden_states, output_logits, to_device
from a3q.model import Model, ModelConfig
from a3q.runtime import LlamaRuntime

_LOGITS_BYTES = 64 << 20
_HIDDEN_BYTES = 1 << 30


@dataclass(frozen=True)
class Perplexity:
    """`exp` of the mean negative log-likelihood, and the standard error of that value."""

    value: float
    stderr: float
    tokens_scored: int
    chunks: int


@dataclass
class LikelihoodSum:
    """Running sums, in float64, over the negative log-likelihoods of scored tokens."""

    total: float = 0.0
    total_squares: float = 0.0
    count: int = 0
    chunks: int = 0

    def add(self, nll: Tensor) -> None:
        """Add the negative log-likelihoods (nats) of tokens, any shape."""
        nll = nll.double()
        self.total += float(nll.sum())
        self.total_squares += float(nll.square().sum())
        self.count += nll.numel()

    def result(self) -> Perplexity:
        """Perplexity so far; the error of the mean is carried over to its `exp` to first order, as llama.cpp does."""
        mean = self.total / self.count
        variance = self.total_squares / self.count - mean * mean
        error = math.sqrt(variance / (self.count - 1)) if variance > 0 and self.count > 1 else 0.0
        value = math.exp(mean) if mean < 700 else math.inf  # a broken model's; `exp` would raise
        return Perplexity(value, value * error, self.count, self.chunks)


Progress = Callable[[Perplexity, int], None]
"""Called after each chunk with the result so far and the number of chunks in all."""


def first_scored(n_ctx: int) -> int:
    """First position of a chunk whose prediction counts; the last position of a chunk predicts nothing in it."""
    return n_ctx // 2


def chunk_tokens(tokens: Sequence[int], n_ctx: int, bos_id: int | None, max_chunks: int | None = None) -> Tensor:
    """Cut the tokens of a text, BOS not among them, into llama.cpp's chunks: int64 `[chunks, n_ctx]`.

    With a `bos_id` the text starts with it, and it overwrites the first token of every later chunk. What does not fill
    a chunk is left out. InputError when not even one is filled.
    """
    if n_ctx - first_scored(n_ctx) < 2:
        raise InputError(f"a context of {n_ctx} tokens leaves none to score; the smallest is 3")
    if max_chunks is not None and max_chunks < 1:
        raise InputError(f"--chunks {max_chunks}: give a positive number of windows")
    stream = [*([] if bos_id is None else [bos_id]), *tokens]
    count = len(stream) // n_ctx
    if count == 0:
        raise InputError(
            f"the text has {len(stream)} tokens, and perplexity with a context of {n_ctx} needs at least {n_ctx}; "
            "give a longer text or a shorter context"
        )
    chunks = torch.tensor(stream[: count * n_ctx], dtype=torch.int64).view(count, n_ctx)
    if bos_id is not None:
        chunks[:, 0] = bos_id
    return chunks[:max_chunks]


def read_text(path: Path) -> str:
    """Text of a file as llama.cpp's `-f` reads it, so that figures are the same; InputError when it is not UTF-8 text.

    Line ends stay as they are, since `\\r\\n` and `\\n` are different tokens; one newline at the end is dropped.
    """
    try:
        return path.read_bytes().decode().removesuffix("\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text (byte {error.start}); convert it to UTF-8") from error


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood in nats, float64 `[n]`, of `targets` `[n]` under `logits` `[n, vocab]`."""
    picked = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return torch.logsumexp(logits.double(), dim=-1) - picked.double()


def _row_slices(rows: int, vocab_size: int) -> Iterator[slice]:
    """Slices of positions whose logits stay within a memory budget in float64."""
    step = max(1, _LOGITS_BYTES // (8 * vocab_size))
    return (slice(begin, min(rows, begin + step)) for begin in range(0, rows, step))


def _chunks_per_batch(config: ModelConfig, n_ctx: int) -> int:
    """How many chunks go through the layers together: as many as a memory budget takes, counting the hidden states
    three times, since a layer that is loaded lazily is then read once for all of them."""
    return max(1, _HIDDEN_BYTES // (3 * 4 * n_ctx * config.hidden_size))


def evaluate(
    model: Model,
    text: str,
    n_ctx: int = 512,
    max_chunks: int | None = None,
    *,
    device: torch.device,
    on_progress: Progress | None = None,
) -> Perplexity:
    """Perplexity of `model` on `text` in a3q's own forward pass; InputError: text too short, windows too long."""
    positions = model.top.get("positions")
    if positions is not None and n_ctx > len(positions):
        raise InputError(f"--ctx {n_ctx}: the model has learned {len(positions)} positions; give at most that")
    tokenizer = model.tokenizer
    bos_id = tokenizer.bos_id if tokenizer.add_bos else None
    chunks = chunk_tokens(tokenizer.encode(text), n_ctx, bos_id, max_chunks)
    sums = LikelihoodSum()
    first = first_scored(n_ctx)
    # Moved once, not for every piece of logits.
    head = replace(model, top=to_device(model.top, device))
    size = _chunks_per_batch(model.config, n_ctx)
    for batch in (chunks[begin : begin + size] for begin in range(0, len(chunks), size)):
        hidden = hidden_states(model, batch[:, :-1], device)[:, first:]
        for states, targets in zip(hidden, batch[:, first + 1 :].to(device), strict=True):
            for rows in _row_slices(len(targets), model.config.vocab_size):
                sums.add(token_nll(output_logits(head, states[rows], device), targets[rows]))
            _chunk_done(sums, len(chunks), on_progress)
    return sums.result()


def evaluate_runtime(
    runtime: LlamaRuntime,
    text: str,
    n_ctx: int = 512,
    max_chunks: int | None = None,
    *,
    on_progress: Progress | None = None,
) -> Perplexity:
    """Perplexity of a GGUF file on `text` in llama.cpp; the runtime's context must hold `n_ctx` tokens."""
    bos_id = runtime.bos_id if runtime.add_bos else None
    chunks = chunk_tokens(runtime.tokenize(text), n_ctx, bos_id, max_chunks)
    sums = LikelihoodSum()
    first = first_scored(n_ctx)
    for chunk in chunks:
        targets = chunk[first + 1 :]
        # The last token is only predicted; given to llama.cpp, it would cost a row of logits for nothing.
        for piece in runtime.logits_chunks(chunk[:-1].tolist(), first):
            sums.add(token_nll(torch.from_numpy(piece), targets[: len(piece)]))
            targets = targets[len(piece) :]
        _chunk_done(sums, len(chunks), on_progress)
    return sums.result()


def _chunk_done(sums: LikelihoodSum, of: int, on_progress: Progress | None) -> None:
    sums.chunks += 1
    if on_progress is not None:
        on_progress(sums.result(), of)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """`Σ p (log p − log q)` in nats over the last dimension, float64; both are normalized log-probabilities.

    Where `p` is zero the term is zero, even with `log p = −∞`; where only `q` is zero the divergence is infinite.
    """
    log_p, log_q = log_p.double(), log_q.double()
    p = log_p.exp()
    # Rounding can leave the sum a hair below zero, the least that a divergence can be.
    # Asked as `p == 0`, so that a NaN stays one.
    return torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(-1).clamp_min(0.0)


@dataclass(frozen=True)
class Comparison:
    """A candidate against the reference on the same tokens."""

    mean_kl: float
    """Mean `KL(reference ‖ candidate)` in nats."""
    max_kl: float
    top1_agreement: float
    """Part of the positions where both think the same token the most likely."""
    perplexity: Perplexity
    reference_perplexity: Perplexity


@dataclass
class _Comparing:
    """Sums of one candidate's comparison."""

    likelihood: LikelihoodSum = field(default_factory=LikelihoodSum)
    kl: float = 0.0
    max_kl: float = 0.0
    agreed: int = 0

    def add(self, reference: Tensor, candidate: Tensor, targets: Tensor) -> None:
        log_p, log_q = (logits.double().log_softmax(-1) for logits in (reference, candidate))
        kl = kl_divergence(log_p, log_q)
        self.kl += float(kl.sum())
        # `max` would pass over a NaN, which must not look like a good result.
        self.max_kl = float(torch.maximum(torch.tensor(self.max_kl, dtype=kl.dtype), kl.max().cpu()))
        self.agreed += int((reference.argmax(-1) == candidate.argmax(-1)).sum())
        self.likelihood.add(token_nll(candidate, targets))


_ROWS = 512
"""Positions whose logits are held at a time where many models are compared."""
LogitsAt = Callable[[slice], Tensor]
"""Positions → their logits `[positions, vocab]`."""


def mean_divergences(reference: LogitsAt, others: Sequence[LogitsAt], positions: int) -> list[float]:
    """Mean `KL(reference ‖ other)` in nats over `positions`, of each of `others`; of a few rows at a time."""
    totals = torch.zeros(len(others), dtype=torch.float64)
    for start in range(0, positions, _ROWS):
        rows = slice(start, start + _ROWS)
        log_p = reference(rows).log_softmax(-1)
        p = log_p.exp()
        for i, other in enumerate(others):
            # Both from one function, whose error in float32 is nearly the same for both. A dot product `p · z` is not
            # exact enough in its place: over 49152 tokens it was off by more than the KL.
            totals[i] += float((p * (log_p - other(rows).log_softmax(-1))).sum(-1).double().sum())
    return (totals / positions).clamp_min(0).tolist()


LogitsOf = Callable[[Tensor], Tensor]
"""Token ids `[T]` → logits `[T, vocab]`, or of the last positions only, as many as are compared."""


def compare(
    reference: LogitsOf, candidates: Mapping[str, LogitsOf], sequences: Tensor, first: int = 0
) -> dict[str, Comparison]:
    """Compare each candidate's predictions with the reference's on `sequences` `[B, T]`.

    Positions `first … T − 2` of each sequence count, those whose next token is known. At any time the logits of one
    sequence are held of the reference and of one candidate.
    """
    scored = sequences.shape[1] - 1 - first
    if first < 0 or scored < 1 or len(sequences) == 0:
        raise ValueError(f"no position to compare in sequences of shape {tuple(sequences.shape)} from {first} on")
    expected = LikelihoodSum()
    running = {name: _Comparing() for name in candidates}

    def scored_logits(model: LogitsOf, sequence: Tensor) -> Tensor:
        # The logits end with those of the last position, whose next token is unknown.
        return model(sequence)[-scored - 1 : -1]

    for sequence in sequences:
        known = scored_logits(reference, sequence)
        slices = list(_row_slices(scored, known.shape[-1]))
        targets = sequence[first + 1 :].to(known.device)
        for rows in slices:
            expected.add(token_nll(known[rows], targets[rows]))
        expected.chunks += 1
        for name, candidate in candidates.items():
            logits = scored_logits(candidate, sequence).to(known.device)
            for rows in slices:
                running[name].add(known[rows], logits[rows], targets[rows])
            running[name].likelihood.chunks += 1

    return {
        name: Comparison(
            mean_kl=one.kl / one.likelihood.count,
            max_kl=one.max_kl,
            top1_agreement=one.agreed / one.likelihood.count,
            perplexity=one.likelihood.result(),
            reference_perplexity=expected.result(),
        )
        for name, one in running.items()
    }


def logits_of(
    model: Model,
    sequences: Tensor,
    device: torch.device,
    first: int = 0,
    on_layer: Callable[[], None] | None = None,
) -> LogitsOf:
    """Logits from position `first` on of any of `sequences` `[B, T]`; each layer is loaded once for all of them."""
    hidden = hidden_states(model, sequences, device, on_layer)
    states = {sequence.numpy().tobytes(): state[first:] for sequence, state in zip(sequences, hidden, strict=True)}
    return lambda sequence: output_logits(model, states[sequence.numpy().tobytes()], device)
