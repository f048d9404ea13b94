"""Text that a model writes itself, for calibration and healing without data: they need activations, not labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from a3q.batching import out_of_memory
from a3q.forward import Attend, KeyValueCache, block, compute_dtype, embed, lowered, norm, only_causal, to_device
from a3q.graphs import BEFORE, recording
from a3q.model import Model, ModelConfig
from a3q.pieces import pieces

OPEN = -1
"""In prompts: what comes here is the model's to say. Only behind a prompt's end, where others are longer."""
_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Without cuDNN, which plans anew for every length: 10 ms a layer and token on an H200, of which the rest of the layer
takes 0.7."""
_WINDOW = 128
"""Positions that one CUDA graph serves where attention in it looks at all keys up to the last of them."""
_ALIGNED = 8
"""Keys in all that attention looks at are a multiple of this, as its kernels need it of a mask."""
_BLOCK = 256
"""Tokens whose probabilities are summed up together."""
_TOLD = 16
"""Steps on a GPU after which it is waited for, so that progress tells what is done."""


@dataclass(frozen=True)
class Following:
    """What comes next in a row, once, when the model has written an end of turn there, whatever it would say itself.

    So a chat template's text between a question and its answer gets into a conversation that the model writes alone.
    """

    ends: tuple[int, ...]
    """Tokens that each end a turn."""
    ids: tuple[int, ...]


class Given:
    """Follows the rows of a batch and puts what `following` says in place of what was chosen, in those it is for.

    The same tensor operations for every token, on state that stays where it is, as a CUDA graph needs it.
    """

    def __init__(self, following: Following, rows: Tensor) -> None:
        """`rows` `[B]`, bool: those it is for."""
        self._rows = rows
        self._ends = torch.tensor(following.ends, dtype=torch.int64, device=rows.device)
        # Nothing is given before and behind.
        self._ids = torch.tensor([OPEN, *following.ids, OPEN], dtype=torch.int64, device=rows.device)
        self._next = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
        """Of `_ids`, for each row: at the first until an end is written, at the last when all was given."""

    def __call__(self, chosen: Tensor, free: Tensor) -> Tensor:
        """The next token of each row, `[B]`, where the model chose `chosen`; an end counts where rows are `free`."""
        given = self._ids.index_select(0, self._next)
        ended = (chosen[:, None] == self._ends).any(-1) & free & self._rows
        self._next.add_(ended | (self._next > 0)).clamp_max_(len(self._ids) - 1)
        return torch.where(given == OPEN, chosen, given)


def shortest(prompts: Tensor) -> int:
    """Tokens that all of `prompts` `[B, P]` have."""
    return int((prompts != OPEN).sum(1).min())


def pick(logits: Tensor, temperature: float, top_p: float, drawn: Tensor) -> Tensor:
    """Token ids `[B]` for logits `[B, vocab]`, the tail beyond probability mass `top_p` left out.

    `drawn` `[B]`: uniform random numbers below 1, float64. By the inverse of the distribution function one is enough; a
    race of all tokens needs as many as there are tokens, which took half as long as the model itself.
    """
    scaled = logits if temperature == 1 else logits.float() / temperature
    if top_p < 1:
        ordered, order = F.softmax(scaled, dim=-1, dtype=torch.float32).sort(dim=-1, descending=True)
        out = ordered.cumsum(-1) - ordered > top_p
        scaled = scaled.masked_fill(torch.zeros_like(out).scatter_(-1, order, out), -math.inf)
    return _reached(scaled, drawn)


def _reached(logits: Tensor, share: Tensor) -> Tensor:
    """The first index of each row of `[B, n]` at which the sum of `exp(logits)` so far is above that `share` `[B]`,
    below 1, of it all.

    Sums of blocks first, then those in the one block that matters: half the time of all of them in float64.
    """
    count = logits.shape[-1]
    most = logits.amax(-1, keepdim=True).float()
    padded = F.pad(logits, (0, -count % _BLOCK), value=-math.inf) if count % _BLOCK else logits
    blocks = padded.view(len(logits), -1, _BLOCK)
    sums = pieces().block_sums(blocks, most[..., None]).cumsum(-1, dtype=torch.float64)
    wanted = share[:, None] * sums[:, -1:]
    block = torch.searchsorted(sums, wanted, right=True).clamp_max(sums.shape[-1] - 1)
    one = blocks.gather(1, block[..., None].expand(-1, -1, _BLOCK))[:, 0]
    inside = (one.float() - most).exp().cumsum(-1, dtype=torch.float64)
    # By rounding it could be outside of the block, where a weight may be 0.
    rest = (wanted - sums.gather(1, block) + inside[:, -1:]).clamp_min(0)
    rest = torch.minimum(rest, torch.nextafter(inside[:, -1:], torch.zeros_like(rest)))
    found: Tensor = block * _BLOCK + torch.searchsorted(inside, rest, right=True)
    return found.squeeze(-1).clamp_max(count - 1)


@torch.inference_mode()
def sample(
    model: Model,
    prompts: Tensor,
    length: int,
    *,
    temperature: float,
    top_p: float,
    seed: int,
    device: torch.device,
    on_tokens: Callable[[int], None] = lambda _: None,
    following: Following | None = None,
    followed: Tensor | None = None,
) -> Tensor:
    """Continue `prompts` `[B, P]` to `[B, length]` token ids (CPU). All layers are held in memory meanwhile.

    Shorter prompts end in `OPEN`; what they have beyond the shortest is read token by token with what others write.
    `following` changes nothing in front of where it is given, no other row, and none that `followed` `[B]` leaves out.
    """
    config = model.config
    B, P = len(prompts), shortest(prompts)
    dtype = compute_dtype(device, config.hidden_size)
    layers = [lowered(to_device(layer, device), dtype) for layer in model.layers]
    caches = [KeyValueCache(config, shape, B, length, device, dtype) for shape in config.layers]
    model = replace(model, top=to_device(model.top, device))
    # Turning the output weight into float32 for every token would take longer than a large model's layers.
    output = model.output.to(device, dtype)
    generator = torch.Generator(device).manual_seed(seed)
    drawn = torch.rand(length, B, dtype=torch.float64, device=device, generator=generator)
    ids = torch.full((B, length), OPEN, dtype=torch.int64, device=device)
    ids[:, : prompts.shape[1]] = prompts.to(device)
    rows = torch.ones(B, dtype=torch.bool) if followed is None else followed
    given = None if following is None else Given(following, rows.to(device))

    def read(tokens: Tensor, start: int | Tensor) -> Tensor:
        """Hidden states behind `tokens`, which are `start` and later."""
        x = embed(model, tokens, start)
        with sdpa_kernel(_KERNELS):
            for shape, w, cache in zip(config.layers, layers, caches, strict=True):
                x = block(config, shape, w, x, cache)
        return x

    def choose(x: Tensor, drawn: Tensor, known: Tensor) -> Tensor:
        """What comes behind the last of hidden states `[B, T, hidden]`: `known` `[B]` unless `OPEN`."""
        logits = F.linear(norm(config, model.top, "final_norm", x[:, -1]).to(dtype), output)
        chosen, free = pick(logits, temperature, top_p, drawn), known == OPEN
        return torch.where(free, chosen if given is None else given(chosen, free), known)

    x = read(ids[:, :P], 0)
    on_tokens(P * B)
    if length == P:
        return ids.cpu()
    ids[:, P] = choose(x, drawn[P], ids[:, P])
    on_tokens(B)
    if device.type != "cuda":
        for end in range(P + 1, length):
            ids[:, end] = choose(read(ids[:, end - 1 : end], end - 1), drawn[end], ids[:, end])
            on_tokens(B)
        return ids

    position = torch.full((1,), P, device=device)

    def step() -> None:
        x, behind = read(ids.index_select(1, position), position), position + 1
        chosen = choose(x, drawn.index_select(0, behind)[0], ids.index_select(1, behind)[:, 0])
        ids.index_copy_(1, behind, chosen[:, None])
        position.add_(1)

    causal = all(only_causal(config, shape, length) for shape in config.layers)
    attend = kernel(config, caches, position) if causal else None
    window = _WINDOW if attend is None else length
    # The last token is not read: nothing comes behind it.
    for start in range(P, length - 1, window):
        end = min(start + window, length - 1)
        for cache in caches:
            cache.follow(position, min(length, -(-end // _ALIGNED) * _ALIGNED), attend)
        for _ in _repeated(step, end - start):
            on_tokens(B)
    return ids.cpu()


def kernel(config: ModelConfig, caches: Sequence[KeyValueCache], position: Tensor) -> Attend | None:
    """Attention of a single position over what `caches` have, tried out; None where Triton cannot make it."""
    try:
        from a3q.decode_triton import attend

        for cache in caches:
            B, groups, _, size = cache.keys.shape
            attend(cache.keys.new_zeros(B, groups, config.queries_per_group, size), cache.keys, cache.values, position)
    except Exception as error:  # no Triton, or whatever it does without a compiler, or with heads too large for it
        if out_of_memory(error):
            raise
        return None
    return attend


def _repeated(step: Callable[[], None], count: int) -> Iterator[None]:
    """`step` on the GPU `count` times, most of them as a recorded graph.

    Starting a small model's kernels one by one takes longer than their work: 21 ms a token of SmolLM2-135M on an H100.
    """
    recorded: torch.cuda.CUDAGraph | None = None
    for i in range(count):
        if i < BEFORE:
            step()
        else:
            if recorded is None:
                with recording() as recorded:
                    step()
            recorded.replay()
        if i % _TOLD == 0:
            torch.cuda.synchronize()
        yield
