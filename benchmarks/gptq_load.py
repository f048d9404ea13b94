"""GPTQ folders of a3q in transformers and in GPTQModel, and GPTQModel's in a3q: do they compute the same?

They want a newer PyTorch with CUDA libraries, several GB, so they get an environment of their own:

    python3.11 -m venv gptq-env
    gptq-env/bin/pip install setuptools wheel ninja packaging
    gptq-env/bin/pip install --no-build-isolation gptqmodel==7.7.0 optimum transformers accelerate
    gptq-env/bin/pip install gguf sentencepiece protobuf wrapt jinja2 rich typer
    OMP_NUM_THREADS=1 GPTQMODEL_CPU_WORKERS=2 gptq-env/bin/python -m benchmarks.gptq_load

All is random and tiny, on the CPU. Each line has the largest difference of a logit from that of the weights written
out, computed in float32, and what replaced the linear layers.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gptqmodel import GPTQModel, QuantizeConfig
from torch import Tensor
from transformers import AutoModelForCausalLM

import a3q
from a3q.model import LayerShape, Model
from a3q.solve.grid import Blocks
from converters.gptq import fits, gptq_grid
from converters.gptq_config import read_form
from converters.hf_reader import open_huggingface
from converters.hf_weights import open_weights, read_json
from converters.hf_writer import write_huggingface
from tests.pico import VOCAB, corpus, write_model

TOKENS = torch.randint(2, VOCAB, (2, 48), generator=torch.Generator().manual_seed(0))
SIZES: dict[str, Any] = {
    "hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 512,
    "initializer_range": 0.05,
}  # fmt: skip


def nearest(weight: Tensor, bits: int, group: int, symmetric: bool) -> Blocks | None:
    """`weight` `[rows, n]` rounded to the nearest; None where no kernel takes its size."""
    rows, n = weight.shape
    grid, top = gptq_grid(bits, group, symmetric), (1 << bits) - 1
    if not fits(rows, n, grid):
        return None
    w = weight.view(rows, -1, group)
    low, high = w.amin(2), w.amax(2)
    d = (2 * torch.maximum(high, -low) / top if symmetric else (high - low) / top).half()
    zero = torch.full_like(low, grid.offset) if symmetric else (-low / d.float()).round().clamp(0, top)
    codes = ((w / d.float()[..., None]).round() + zero[..., None]).clamp(0, top).to(torch.uint8).view(rows, n)
    return Blocks(grid, codes, d, None, None, None if symmetric else zero.to(torch.uint8))


def reduced(model: Model) -> Model:
    """`model` with smaller layers, no two alike; the second's MLP is too odd for kernels."""
    shapes = [
        LayerShape(24, 16, 384, tuple(shape.frequencies[0][i : i + 12] for i in range(4)))
        if i == 0
        else replace(shape, intermediate_size=400)
        for i, shape in enumerate(model.config.layers)
    ]
    config, generator = replace(model.config, layers=tuple(shapes)), torch.Generator().manual_seed(0)
    layers = [
        {
            role.name: 0.05 * torch.randn(role.expected_shape(config, shape), generator=generator)
            + float(role.name.endswith("norm"))
            for role in model.family.layer
            if role.name in model.layer_roles
        }
        for shape in shapes
    ]
    return replace(model, config=config, layers=layers)


@torch.no_grad()
def compare(name: str, folder: Path, load: Callable[[Path], Any]) -> None:
    """Print how `load`'s model differs from the weights that a3q reads in `folder`."""
    own = open_huggingface(folder)
    plain = write_huggingface(own, folder.with_name(f"{folder.name}-plain"), dtype=torch.float32, force=True).path
    expected = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)(TOKENS).logits
    model = load(folder)
    logits = model(TOKENS).logits.float()
    kinds = Counter(type(module).__name__ for module in model.modules() if "Linear" in type(module).__name__)
    error = (logits - expected).abs().max().item()
    print(f"RESULT {name}: {error:.4f} of {expected.abs().max().item():.2f}; {dict(kinds)}", flush=True)


def in_transformers(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def in_gptqmodel(folder: Path) -> Any:
    return GPTQModel.load(str(folder), device="cpu", dtype=torch.float16, backend="torch").model


@torch.no_grad()
def compare_weights(folder: Path) -> None:
    """Whether every matrix that GPTQModel takes apart is a3q's, rounded to float16 as its products are."""
    path = folder / "config.json"
    weights, model = open_weights(folder, read_form(read_json(path), path)), in_gptqmodel(folder)
    packed = {name: module for name, module in model.named_modules() if hasattr(module, "qweight")}
    same = [torch.equal(m.dequantize_weight().T, weights.read(f"{n}.weight").half()) for n, m in packed.items()]
    print(f"RESULT {folder.name}: {sum(same)} of {len(same)} matrices are the same", flush=True)


def main() -> None:
    print(f"a3q {a3q.__version__}")
    root = Path(tempfile.mkdtemp())
    # GPTQModel leaves its logs where it runs.
    os.chdir(root)
    original = open_huggingface(write_model(root / "llama", "llama", **SIZES))
    small = reduced(original)
    for bits, group, symmetric in ((4, 32, True), (4, 128, False), (8, 32, True), (2, 64, True)):
        for model in (original, small):
            kind = "a3q" if model is small else "llama"
            name = f"{kind}-{bits}-{group}-{'sym' if symmetric else 'asym'}"

            def quantized(
                i: int,
                role: str,
                model: Model = model,
                rounding: tuple[int, int, bool] = (bits, group, symmetric),
            ) -> Blocks | None:
                return nearest(model.layers[i][role], *rounding)

            folder = write_huggingface(
                model, root / name, dtype=torch.float16, quantized=quantized, plain=model is original
            ).path
            compare(f"{name} in transformers", folder, in_transformers)
            if model is original:
                compare(f"{name} in GPTQModel", folder, in_gptqmodel)
                compare_weights(folder)
    for group, act in ((128, True), (32, False)):
        model = GPTQModel.load(str(root / "llama"), QuantizeConfig(bits=4, group_size=group, desc_act=act))
        model.quantize(corpus(64), batch_size=2)
        folder = root / f"gptqmodel-{group}-{'desc_act' if act else 'plain'}"
        model.save(str(folder))
        compare(f"{folder.name} in GPTQModel", folder, in_gptqmodel)
        compare_weights(folder)


if __name__ == "__main__":
    main()
