"""Run the written file in llama.cpp and compare it with the model it was written from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from gguf.constants import GGMLQuantizationType
from torch import Tensor

from a3q.errors import VerifyError
from a3q.model import Model, Tokenizer, free_memory
from a3q.perplexity import LogitsOf, Perplexity, compare, logits_of
from a3q.runtime import LlamaRuntime
from a3q.samples import TOKENIZER_SAMPLE
from converters.open import open_model

MAX_KL_F16 = 1e-3
"""Mean KL in nats that rounding to float16 and the runtime's float16 cache may cost; more is a wrong file."""
MAX_KL_ROUNDED = 0.1
"""The same where the weights in memory are already those of the file: with quantized weights the runtime rounds the
activations too, to 8 bits; measured are 0.003 to 0.02."""
_EXACT = (GGMLQuantizationType.F32, GGMLQuantizationType.F16)


def allowed_kl(kinds: Iterable[GGMLQuantizationType], rounded: bool) -> float | None:
    """Mean KL in nats that a file with tensors of these types may have from the model in memory; None: any.

    `rounded`: the weights in memory are those of the file, so that writing it rounds next to nothing.
    """
    if all(kind in _EXACT for kind in kinds):
        return MAX_KL_F16
    return MAX_KL_ROUNDED if rounded else None


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
    runtime: str
    """What ran it."""


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
    allowed: float | None,
    sequences: Tensor,
    device: torch.device,
    on_progress: Callable[[float], None] = lambda _: None,
) -> Verification:
    """Load `path` in llama.cpp and compare, on held-out `sequences` `[B, T]`, positions from T / 2 on.

    `allowed`: mean KL in nats from `reduced` that the file may have, see `allowed_kl`. `on_progress` hears of every
    layer, and of every sequence as one unit. VerifyError: the file does not load, splits text differently, or predicts
    otherwise than allowed.
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

        found = _compared(source, memory, written, sequences, "llama.cpp")
    # Written so that a NaN fails too.
    if allowed is not None and not found.kl_to_reduced <= allowed:
        raise VerifyError(
            f"{path}: llama.cpp's predictions are {found.kl_to_reduced:.2g} nats from the model that was written (at "
            f"most {allowed:g} is its own rounding); this is a defect of a3q or of this llama.cpp, please report it"
        )
    return found


def _compared(
    original: LogitsOf, reduced: LogitsOf, written: LogitsOf, sequences: Tensor, runtime: str
) -> Verification:
    """The three models on `sequences` `[B, T]`, positions from T / 2 on."""
    first = sequences.shape[1] // 2
    to_original = compare(original, {"reduced": reduced, "written": written}, sequences, first)
    to_reduced = compare(reduced, {"written": written}, sequences, first)["written"].mean_kl
    return Verification(
        original=Quality(to_original["written"].reference_perplexity, None),
        reduced=Quality(to_original["reduced"].perplexity, to_original["reduced"].mean_kl),
        written=Quality(to_original["written"].perplexity, to_original["written"].mean_kl),
        kl_to_reduced=to_reduced,
        scored_tokens=to_original["written"].perplexity.tokens_scored,
        runtime=runtime,
    )


def verify_folder(
    path: Path,
    original: Model,
    reduced: Model,
    dtype: torch.dtype,
    sequences: Tensor,
    device: torch.device,
    on_progress: Callable[[float], None] = lambda _: None,
    gptq: bool = False,
) -> Verification:
    """Load the folder `path` in transformers and compare, on held-out `sequences` `[B, T]`, positions from T / 2 on.

    Transformers is left out where the model does not fit into memory, and with `gptq` (its matrices are quantized, in
    `reduced` too) where `gptq_runs` says no. `on_progress` hears of every layer of three models, and of transformers as
    one unit. VerifyError: transformers does not load it or predicts otherwise than a3q does with the same weights, or
    the weights are not those that were meant.
    """
    first = sequences.shape[1] // 2

    def in_memory(model: Model) -> LogitsOf:
        return logits_of(model, sequences, device, first, lambda: on_progress(1))

    source = in_memory(original)
    memory = source if reduced is original else in_memory(reduced)
    if reduced is original:
        on_progress(original.config.num_hidden_layers)
    written = in_memory(open_model(path))
    place = None if gptq and not gptq_runs() else _place(reduced, device)
    found = _compared(source, memory, written, sequences, "a3q" if place is None else "transformers")
    apart = 0.0
    if place is not None:
        transformed = _transformers_logits(path, place, torch.float16 if gptq else torch.float32)
        logits = {"transformers": lambda ids: transformed(ids)[first:]}
        apart = compare(written, logits, sequences[:1], first)["transformers"].mean_kl
    on_progress(1)
    # Only the matrices of a quantized folder are stored as they are in memory.
    exact = dtype is torch.float32 or (gptq and dtype is torch.float16)
    if not apart <= MAX_KL_F16 or (exact and not found.kl_to_reduced <= MAX_KL_F16):
        tried = f"transformers predicts {apart:.2g} nats from a3q with the same weights, which"
        raise VerifyError(
            f"{path}: {'its weights' if place is None else tried} are {found.kl_to_reduced:.2g} nats from the model in "
            f"memory (at most {MAX_KL_F16:g} is rounding); this is a defect of a3q or of this transformers, please "
            "report it"
        )
    return found


def gptq_runs() -> bool:
    """Whether transformers can load GPTQ folders here."""
    return all(find_spec(package) is not None for package in ("gptqmodel", "optimum"))


def _place(model: Model, device: torch.device) -> torch.device | None:
    """Where transformers can hold the whole model in float32, with as much again for its work; None: nowhere.

    A model may be larger than memory, since a3q itself reads it layer by layer.
    """
    needed = 8 * model.parameters()
    if device.type == "cuda" and needed < free_memory(device):
        return device
    return torch.device("cpu") if needed < free_memory() else None


def _transformers_logits(path: Path, device: torch.device, dtype: torch.dtype) -> LogitsOf:
    """Logits of a token sequence in transformers.

    `dtype` is float32, so that only a mistake can make a difference, where kernels know it: GPTQ's want float16.
    """
    import transformers
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # a3q shows its own
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise VerifyError(f"{path}: transformers does not load the folder: {' '.join(str(error).split())}") from error
    finally:
        if bars:
            logging.enable_progress_bar()
    model = model.to(device).eval()

    @torch.inference_mode()
    def logits(ids: Tensor) -> Tensor:
        found: Tensor = model(ids[None].to(device), use_cache=False).logits[0]
        return found.float()

    return logits
