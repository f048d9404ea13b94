"""Time of rounding one matrix by GPTQ, a3q's and GPTQModel's, on the same weights and inputs.

    python -m benchmarks.gptq_speed [--rows 4096 --columns 14336 --types q4_k q4_0 --device cuda]

GPTQModel is timed where it is installed (see `benchmarks/gptq_load.py` for its environment), at 4 bits and group size
128 as it is by default. Times are of what each does from weights and Hessian to rounded weights; a3q's first run on a
GPU, in which kernels are compiled and CUDA graphs recorded, is shown apart.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from a3q.solve.gptq import kernels, quantize
from a3q.solve.grid import GRIDS


def timed(run: Callable[[], Tensor], device: torch.device) -> tuple[float, Tensor]:
    """Wall time of `run` in seconds, and what it returns."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    found = run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, found


def loss(weight: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    """Share of the output energy that rounding costs."""
    left = weight - rounded
    return float((left @ hessian * left).sum() / (weight @ hessian * weight).sum())


def gptqmodel(weight: Tensor, inputs: Tensor) -> Callable[[], Tensor] | None:
    """GPTQModel's rounding of `weight` `[rows, columns]` for `inputs` `[n, columns]`; None where it is missing."""
    try:
        from gptqmodel.quantization.config import QuantizeConfig
        from gptqmodel.quantization.gptq import GPTQ
    except ImportError:
        return None
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device)
    linear.weight.data = weight.clone()
    solver = GPTQ(linear, QuantizeConfig(bits=4, group_size=128, desc_act=False, act_group_aware=False))
    solver.quantizer.configure(perchannel=True)
    for part in inputs.split(2048):
        solver.add_batch(part[None], linear(part[None]))
    return lambda: solver.quantize(blocksize=128)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=14336)
    parser.add_argument("--types", nargs="+", choices=GRIDS, default=["q4_k", "q4_0"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.manual_seed(0)
    weight = torch.randn(args.rows, args.columns, device=device) * 0.02
    # Columns of very different size, as the inputs of a down projection are.
    inputs = torch.randn(16384, args.columns, device=device) * torch.randn(args.columns, device=device).exp()
    hessian = inputs.T @ inputs / len(inputs)
    print(f"{args.rows} × {args.columns} on {torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'}")
    if device.type == "cuda":
        print("with Triton kernels" if kernels() is not None else "without Triton kernels")
    for name in args.types:
        for run in ("first", "next") if device.type == "cuda" else ("",):
            took, found = timed(lambda grid=GRIDS[name]: quantize(weight, hessian, grid).weight, device)
            print(f"a3q {name} {run}: {took:.2f} s, loss {loss(weight, found, hessian):.3e}", flush=True)
    if (other := gptqmodel(weight, inputs)) is None:
        print("GPTQModel is not installed here")
        return
    took, found = timed(other, device)
    print(f"GPTQModel 4 bits, groups of 128: {took:.2f} s, loss {loss(weight, found.float(), hessian):.3e}")


if __name__ == "__main__":
    main()
