"""What a GPU computes in bfloat16 against the CPU's float32; skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from a3q.components import Method
from a3q.forward import compute_dtype, hidden_states, output_logits
from a3q.model import Model
from a3q.perplexity import compare
from a3q.quantize import Quantization
from a3q.reduce import reduce
from a3q.reduce_layer import Dimensions
from a3q.sampling import sample
from a3q.solve.grid import GRIDS
from converters.hf_reader import open_huggingface
from tests.pico import write_model

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is here")
TOLERANCE = 0.05
"""Of the KL divergence that reduction and rounding cost, between the two: as README says."""


def kl(model: Model, other: Model, tokens: torch.Tensor) -> float:
    def logits(m: Model, ids: torch.Tensor) -> torch.Tensor:
        return output_logits(m, hidden_states(m, ids[None], CPU), CPU)[0]

    found = compare(lambda ids: logits(model, ids), {"other": lambda ids: logits(other, ids)}, tokens)
    return found["other"].mean_kl


@needs_gpu
@pytest.mark.parametrize("rounded", [False, True], ids=["f32", "q4_0"])
def test_reduction_costs_the_same_as_on_the_cpu(tmp_path: Path, rounded: bool) -> None:
    model = open_huggingface(write_model(tmp_path / "m", "llama", num_hidden_layers=3))
    shape = model.config.layers[0]
    tokens = torch.randint(model.config.vocab_size, (32, 64), generator=torch.Generator().manual_seed(0))
    sizes = [Dimensions(shape.qk_head_dim, shape.v_head_dim, shape.intermediate_size * 3 // 4 // 32 * 32)] * 3
    grids = Quantization([dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down"), GRIDS["q4_0"])] * 3)
    costs = {}
    for name in ("cpu", "cuda"):
        device = torch.device(name)
        found = reduce(model, tokens[:24], sizes, device, 1 << 30, Method(), quantization=grids if rounded else None)
        costs[name] = kl(model, found.model, tokens[24:])
    assert costs["cuda"] == pytest.approx(costs["cpu"], rel=TOLERANCE)


@needs_gpu
def test_text_is_written_in_the_type_that_is_fast(tmp_path: Path) -> None:
    """The model's own predictions for what it wrote on the GPU, one position at a time, are those of the CPU."""
    device = torch.device("cuda")
    model = open_huggingface(write_model(tmp_path / "m", "llama", num_hidden_layers=3))
    assert compute_dtype(device, model.config.hidden_size) is torch.bfloat16
    prompts = torch.arange(16)[:, None]
    text = sample(model, prompts, 48, temperature=0.01, top_p=1.0, seed=0, device=device)
    logits = output_logits(model, hidden_states(model, text, CPU), CPU)
    agreed = (logits.argmax(-1)[:, :-1] == text[:, 1:]).float().mean()
    assert agreed > 0.9
