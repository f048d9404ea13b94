"""Run the written file in llama.cpp and compare it with the model it was written from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from gguf.constants import GGMLQuantizationType
from torch import Tensor

from a3q.errors import VerifyError
from a3q.model import Model, Tokenizer
from a3q.perplexity import LogitsOf, Perplexity, compare, logits_of
from a3q.runtime import LlamaRuntime
from a3q.samples import TOKENIZER_SAMPLE
from converters.types import QuantPlan

MAX_KL_F16 = 1e-3
"""Mean KL in nats that rounding to float16 and the runtime's float16 cache may cost; more is a wrong file."""
_EXACT = (GGMLQuantizationType.F32, GGMLQuantizationType.F16)


@dataclass(frozen=True)
class Quality:
    """Perplexity on the held-out text, and mean KL divergence from the original in nats (None: is the original)."""

    perplexity: Perplexity
    kl: float | None


@dataclass(frozen=True)
class Verification:
    """What the runtime makes of the written file."""

    original: Quality
    reduced: Quality
    written: Quality
    kl_to_reduced: float
    """Mean KL of the written file from the model in memory that it was written from."""
    scored_tokens: int


def check_tokenizer(runtime: LlamaRuntime, tokenizer: Tokenizer, path: Path) -> None:
    """VerifyError unless the runtime splits a hard multilingual text as the source's tokenizer does."""
    for special in (False, True):
        ours = tokenizer.encode(TOKENIZER_SAMPLE, special=special)
        theirs = runtime.tokenize(TOKENIZER_SAMPLE, parse_special=special)
        if ours != theirs:
            at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), 0)
            raise VerifyError(
                f"{path}: llama.cpp splits text otherwise than the source's tokenizer, first after "
                f"{tokenizer.decode(ours[max(0, at - 5) : at])!r}; name the right pre-tokenizer with --pre, or "
                "skip this check with --no-verify"
            )


def verify(
    path: Path,
    original: Model,
    reduced: Model,
    plan: QuantPlan,
    sequences: Tensor,
    device: torch.device,
    on_progress: Callable[[float], None] = lambda _: None,
) -> Verification:
    """Load `path` in llama.cpp and compare, on held-out `sequences` `[B, T]`, positions from T / 2 on.

    `on_progress` hears of every layer, and of every sequence as one unit. VerifyError: the file does not load, splits
    text differently, or, where nothing was quantized, predicts differently.
    """
    first = sequences.shape[1] // 2

    def in_memory(model: Model) -> LogitsOf:
        return logits_of(model, sequences, device, first, lambda: on_progress(1))

    source = in_memory(original)
    memory = source if reduced is original else in_memory(reduced)
    with LlamaRuntime(path, n_ctx=sequences.shape[1]) as runtime:
        check_tokenizer(runtime, original.tokenizer, path)

        def written(sequence: Tensor) -> Tensor:
            on_progress(1)
            return torch.cat([torch.from_numpy(chunk) for chunk in runtime.logits_chunks(sequence.tolist(), first)])

        to_original = compare(source, {"reduced": memory, "written": written}, sequences, first)
        to_reduced = compare(memory, {"written": written}, sequences, first)["written"].mean_kl
    # Written so that a NaN fails too.
    if plan.matrix in _EXACT and not to_reduced <= MAX_KL_F16:
        raise VerifyError(
            f"{path}: llama.cpp's predictions are {to_reduced:.2g} nats from the model that was written (at most "
            f"{MAX_KL_F16:g} is rounding); this is a defect of a3q or of this llama.cpp, please report it"
        )
    return Verification(
        original=Quality(to_original["written"].reference_perplexity, None),
        reduced=Quality(to_original["reduced"].perplexity, to_original["reduced"].mean_kl),
        written=Quality(to_original["written"].perplexity, to_original["written"].mean_kl),
        kl_to_reduced=to_reduced,
        scored_tokens=to_original["written"].perplexity.tokens_scored,
    )
