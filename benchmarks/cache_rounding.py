"""What the free transform inside each head gains when the key/value cache is rounded.

    python -m benchmarks.cache_rounding [MODEL] --text valid.txt

For every layer the share of energy that rounding the cache to q4_0 and q8_0 costs: of the values as the output
projection sees them, and of the keys as the queries do. As the model is, and with `a3q.components.even_heads`, which
a3q applies wherever it reduces or rounds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, quants
from torch import Tensor

from a3q.components import even_heads
from a3q.forward import block, embed, norm, rope
from a3q.model import Layer, LayerShape, ModelConfig
from benchmarks.common import windows
from converters.open import open_model
from converters.rope import to_interleaved

TYPES = ("Q4_0", "Q8_0")


def rounded(x: Tensor, kind: str) -> Tensor:
    """`x` `[…, head size]` as a cache of this type holds it; half of a block is filled up where heads are small."""
    flat = x.reshape(-1, x.shape[-1])
    data = np.pad(flat.numpy(), ((0, 0), (0, -flat.shape[-1] % 32)))
    found = quants.dequantize(quants.quantize(data, GGMLQuantizationType[kind]), GGMLQuantizationType[kind])
    return torch.from_numpy(found[:, : x.shape[-1]].copy()).view(x.shape)


def costs(config: ModelConfig, shape: LayerShape, w: Layer, x: Tensor) -> dict[tuple[str, str], float]:
    """Share of energy lost, by `keys` or `values` and type, for hidden states `x` `[B, T, hidden]`."""
    seen: dict[str, Tensor] = {}
    block(config, shape, w, x, observe=seen.__setitem__)
    G, shared = config.num_key_value_heads, config.queries_per_group
    turn = rope(shape.frequencies, x.shape[1], x.device)
    q, k, v = turn(seen["q"]), turn(seen["k"]), seen["v"]
    columns = w["o"].view(-1, G, shared, shape.v_head_dim)
    q = q.unflatten(1, (G, shared))
    metrics = {
        "keys": torch.einsum("bgitd,bgite->gde", q, q),
        "values": torch.einsum("ogid,ogie->gde", columns, columns),
    }
    # The runtime keeps the pairs of a head side by side.
    order = to_interleaved(torch.arange(shape.qk_head_dim), 1)
    found = {}
    for name, cached in (("keys", k), ("values", v)):
        for kind in TYPES:
            back = rounded(cached[..., order], kind)[..., order.argsort()] if name == "keys" else rounded(cached, kind)
            lost, whole = (float(torch.einsum("bgtd,gde,bgte->", y, metrics[name], y)) for y in (back - cached, cached))
            found[name, kind] = lost / whole
    return found


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--text", type=Path, required=True)
    args = parser.parse_args()
    model = open_model(args.model)
    config = model.config
    x = embed(model, windows(model, args.text, 2, 512))
    before: list[dict[tuple[str, str], float]] = []
    after: list[dict[tuple[str, str], float]] = []
    for shape, w in zip(config.layers, model.layers, strict=True):
        h = norm(config, w, "attn_norm", x).flatten(0, 1)
        evened = dict(w)
        even_heads(config, shape, evened, h.T @ h / len(h), h.mean(0))
        before.append(costs(config, shape, w, x))
        after.append(costs(config, shape, evened, x))
        x = block(config, shape, w, x)
    for key in before[0]:
        was, now = (sum(one[key] for one in all_) / len(all_) for all_ in (before, after))
        print(f"{key[0]} in {key[1]}: {was:.2e} of the energy lost, evened {now:.2e} ({now / was - 1:+.0%})")


if __name__ == "__main__":
    main()
