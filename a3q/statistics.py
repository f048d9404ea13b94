"""The small second moments that A3 needs, accumulated over batches of activations.

Written with `R = E[xᵀx]` (`hidden × hidden`), A3 needs large square roots. Seen through the old weights, everything it
uses lives in moments of size `head_dim × head_dim` and `intermediate × intermediate`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from a3q import ranks
from a3q.forward import rope, score_bias
from a3q.model import LayerShape, ModelConfig

DISTANCE_SEQUENCES = 16
"""Sequences whose attention is laid open for the distances; a histogram over so many pairs is exact enough."""


_BLOCK_BYTES = 128 << 20
_BLOCK_ROWS = 256
_BLOCKS = 4
"""Size of the blocks of a moment, what their rows are a multiple of, and how many there are at least: of a symmetric
one, little more than half is then computed. F = 14336 on an H100: 3.0 ms for 8192 rows in blocks of 2048, 5.3 in one,
8.1 in blocks of 1170."""


def _rounded(rows: int) -> int:
    return max(1, round(rows / _BLOCK_ROWS)) * _BLOCK_ROWS


class Moment:
    """Running `E[xᵀy]` over rows: x `[…, rows, n]`, y `[…, rows, k]` to `[…, n, k]`, on the rows' device.

    Products are summed in float32, also those of 16-bit rows. Over several processes the mean is that of all rows.
    """

    def __init__(self, *shape: int, device: torch.device) -> None:
        self._total = torch.zeros(shape, device=device)
        *heads, n, k = shape
        self._step = n if heads else min(n, _rounded(min(_BLOCK_BYTES // (4 * k), -(-n // _BLOCKS))))
        # Taken beforehand, so that memory cannot run out when a part of the rows is already in.
        self._room = torch.empty(*heads, self._step, k, device=device) if device.type == "cuda" else None
        self._halved = False
        self._rows = 0
        self._done = False

    def add(self, x: Tensor, y: Tensor | None = None) -> None:
        """Take in more rows; y is x unless given, and of the same type. Not after `mean`."""
        if self._done:
            raise ValueError("rows after the mean was asked for")
        if self._room is None:
            # Only GPUs sum 16-bit products in float32 by themselves.
            x, y = x.float(), None if y is None else y.float()
        self._rows += x.shape[-2]
        if x.dim() > 2:
            self._multiply(self._total, x.mT, x if y is None else y)
            return
        for start in range(0, x.shape[1], self._step):
            rows = slice(start, start + self._step)
            # Of a symmetric moment, what lies left of the block is the mirror image of what is there.
            columns = slice(start if y is None else 0, None)
            self._multiply(self._total[rows, columns], x[:, rows].T, (x if y is None else y)[:, columns])
        self._halved = y is None

    def _multiply(self, total: Tensor, a: Tensor, b: Tensor) -> None:
        if a.dtype == torch.float32:
            (total.addmm_ if a.dim() == 2 else total.baddbmm_)(a, b)
            return
        multiply = torch.mm if a.dim() == 2 else torch.bmm
        assert self._room is not None
        room = self._room.flatten()[: total.numel()].view(total.shape)
        total += multiply(a, b, out_dtype=torch.float32, out=room)

    def mean(self) -> Tensor:
        """The moment over all rows."""
        if not self._done:
            self._done, self._room = True, None
            # A process without rows does not know that the others' are halved.
            seen = torch.tensor([self._rows, self._halved], device=self._total.device)
            ranks.add_up(self._total, seen)
            self._rows, halved = (int(one) for one in seen.tolist())
            self._total /= max(1, self._rows)
            if halved:
                n = len(self._total)
                for start in range(0, n, self._step):
                    below = slice(start + self._step, n)
                    self._total[below, start : start + self._step] = self._total[start : start + self._step, below].T
        return self._total


class AttentionStatistics:
    """What QK and OV need of one layer; an observer of `a3q.forward.attention`."""

    def __init__(
        self,
        config: ModelConfig,
        shape: LayerShape,
        length: int,
        device: torch.device,
        earlier: int = 0,
        distances: bool = True,
    ) -> None:
        """`earlier`: calibration sequences that come before those seen here, in other processes. `distances`: whether
        they will be asked for, which takes longer than all moments."""
        H, G, d = config.num_attention_heads, config.num_key_value_heads, shape.qk_head_dim
        self.q = Moment(H, d, d, device=device)
        """E[qᵀq] of each query head before RoPE."""
        self.k = Moment(G, d, d, device=device)
        """E[kᵀk] of each key head before RoPE."""
        self.o = Moment(H, shape.v_head_dim, shape.v_head_dim, device=device)
        """E[oᵀo] at the output projection's input, each head's slice."""
        self.v = Moment(G, shape.v_head_dim, shape.v_head_dim, device=device)
        """E[vᵀv] of each value head."""
        self._mass = torch.zeros(H, length, device=device)
        self._config, self._shape = config, shape
        self._wanted = distances
        self._left = max(0, DISTANCE_SEQUENCES - earlier) if shape.pairs and distances else 0
        self._seen: dict[str, Tensor] = {}
        self._summed = False

    def __call__(self, name: str, x: Tensor) -> None:
        """See `q`, `k`, `v` or `o` of a batch, `[B, heads, T, size]`."""
        self._seen[name] = x

    def take_in(self) -> None:
        """Count the batch that was seen last."""
        q, k = self._seen["q"], self._seen["k"]
        mass = None
        if self._left > 0:
            few = q[: self._left].float(), k[: self._left].float()
            mass = attention_distances(self._config, self._shape, *few)
        rows = {name: x.transpose(0, 1).flatten(1, 2) for name, x in self._seen.items()}
        # Whatever may run out of memory is behind us.
        if mass is not None:
            self._mass += mass
            self._left -= len(q)
        for name, x in rows.items():
            getattr(self, name).add(x)
        self._seen = {}

    def distances(self) -> Tensor:
        """`[heads, T]`: share of attention that falls on a key Δ positions back; rows sum to 1."""
        if not self._wanted:
            raise ValueError("distances were not to be measured")
        if not self._summed:
            ranks.add_up(self._mass)
            self._summed = True
        return self._mass / self._mass.sum(-1, keepdim=True)


def attention_distances(config: ModelConfig, shape: LayerShape, q: Tensor, k: Tensor) -> Tensor:
    """Attention mass by distance, `[H, T]`, summed over queries: q `[B, H, T, d]`, k `[B, G, T, d]` before RoPE."""
    B, H, T, d = q.shape
    turn = rope(shape.frequencies, T, q.device)
    q, k = turn(q), turn(k).repeat_interleave(H // k.shape[1], dim=1)
    bias = score_bias(config, shape, 0, T, T, q.device)
    if bias is None:
        bias = torch.zeros(T, T, device=q.device).masked_fill_(
            torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1), -math.inf
        )
    mass = torch.zeros(H, T, device=q.device)
    for b in range(B):
        scores = q[b] @ k[b].mT / math.sqrt(d)
        probabilities = scores.add_(bias).softmax(-1)
        # Flipped along the keys and padded by T zeros a row, the flat array read with rows one shorter lines up the
        # diagonals as columns: column c then holds distance c - (T - 1) of every query.
        skewed = F.pad(probabilities.flip(-1), (0, T)).flatten(1)[:, : T * (2 * T - 1)].view(H, T, 2 * T - 1)
        mass += skewed.sum(1)[:, T - 1 :]
    return mass
