"""What a call of one of a3q's functions works: floating-point operations and bytes, from its arguments.

Arithmetic is what the task needs, from the shapes that a function is given: `2 m n k` for a product, a symmetric one in
full though half of it would do, `n³ / 3` for a Cholesky factor, `2 n³ / 3` with its inverse. GPTQ's is the factor and
each error's way to the columns behind it, `rows · n²`; the search for scales is left out. Of solvers without a figure
here only the time is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def moment_flops(_: Any, x: Tensor, y: Tensor | None = None) -> float:
    """Of `Moment.add`."""
    return 2.0 * x.numel() * (x if y is None else y).shape[-1]


def linear_flops(rows: int, *weights: Tensor) -> float:
    """Of `rows` rows through all `weights`."""
    return sum(2.0 * rows * weight.numel() for weight in weights)


def row_count(x: Tensor) -> int:
    """Of activations `[…, n]`."""
    return x.numel() // x.shape[-1]


def attention_inner_flops(config: Any, shape: Any, w: Any, x: Tensor, *_: Any, **__: Any) -> float:
    """Of `a3q.forward.attention_inner`: projections, and scores and values under the causal mask."""
    batch, length = x.shape[0], x.shape[1]
    inner = config.num_attention_heads * (shape.qk_head_dim + shape.v_head_dim)
    return linear_flops(row_count(x), w["q"], w["k"], w["v"]) + batch * length * length * inner


def attention_flops(config: Any, shape: Any, w: Any, x: Tensor, *_: Any, **__: Any) -> float:
    """Of `a3q.forward.attention`."""
    return attention_inner_flops(config, shape, w, x) + linear_flops(row_count(x), w["o"])


def mlp_inner_flops(_: Any, w: Any, x: Tensor) -> float:
    """Of `a3q.forward.mlp_inner`."""
    return linear_flops(row_count(x), *(w[role] for role in ("gate", "up") if role in w))


def mlp_flops(config: Any, w: Any, x: Tensor, *_: Any, **__: Any) -> float:
    """Of `a3q.forward.mlp`."""
    return mlp_inner_flops(config, w, x) + linear_flops(row_count(x), w["down"])


def refit_flops(_: Any, w: Any, role: str, kept: Tensor | None = None) -> float:
    """Of `OutputFit.apply`: a factor, and two triangular solves for each output."""
    outputs, n = w[role].shape
    n = n if kept is None else len(kept)
    return n**3 / 3 + 2.0 * n * n * outputs


def select_flops(w: Any, _: Any, keep: int, *__: Any, **___: Any) -> float:
    """Of `reduce_mlp`: the refit to the units that stay."""
    return keep**3 / 3 + 2.0 * keep * keep * len(w["down"])


def rounding_flops(rounding: Any, w: Any, roles: Sequence[str], gram: Any, *_: Any, **__: Any) -> float:
    """Of `LayerRounding.apply`; roles of one type are rounded together."""
    own = [role for role in roles if role in w and role in rounding.grids]
    n = w[roles[0]].shape[1]
    factors = len({rounding.grids[role] for role in own})
    return factors * 2 * n**3 / 3 + sum(float(w[role].shape[0]) * n * n for role in own)


# Bytes of a call, by what it gave and its arguments


def layer_bytes(layer: Any, *_: Any) -> float:
    """Of a layer that a function gave."""
    return sum(weight.nbytes for weight in layer.values()) if isinstance(layer, dict) else 0.0


def array_bytes(array: Any, *_: Any, **__: Any) -> float:
    """Of an array that a function gave."""
    return float(array.nbytes)
