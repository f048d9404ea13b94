"""What a GPU computes in bfloat16 against the CPU's float32, and what becomes of its memory; skipped without one."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from a3q.components import Method
from a3q.forward import compute_dtype, hidden_states, output_logits
from a3q.model import Model
from a3q.perplexity import compare
from a3q.quantize import Quantization
from a3q.reduce import Reduction, _Run, _Task, reduce
from a3q.reduce_layer import Dimensions
from a3q.room import Room
from a3q.sampling import sample
from a3q.solve.grid import GRIDS
from a3q.store import LayerStore
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


@contextmanager
def gpu_memory(size: int) -> Iterator[None]:
    """At most `size` bytes of the GPU for this process."""
    gc.collect()
    # What the allocator keeps for later counts as well.
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(size / torch.cuda.get_device_properties("cuda").total_memory)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        gc.collect()
        torch.cuda.empty_cache()


@needs_gpu
def test_smaller_batches_where_memory_runs_out(tmp_path: Path) -> None:
    """Of 400 MB that this reduction takes, most are activations of the one batch that it begins with.

    A token takes 6 KB in the MLP, of 1024 units in bfloat16 three times, and 1 KB of what is kept of all sequences; a
    moment of the units takes 4 MB, the solvers several times that.
    """
    device = torch.device("cuda")
    model = open_huggingface(write_model(tmp_path / "m", "llama", intermediate_size=1024))
    shape = model.config.layers[0]
    tokens = torch.randint(model.config.vocab_size, (400 + 8, 128), generator=torch.Generator().manual_seed(0))
    sizes = [Dimensions(shape.qk_head_dim, shape.v_head_dim, 768)] * 2

    def run() -> Reduction:
        return reduce(model, tokens[:400], sizes, device, 1 << 30)

    # Once before, so that what CUDA's libraries take and keep is there.
    run()
    torch.cuda.reset_peak_memory_stats()
    whole = run()
    assert whole.notes == ()
    peak = torch.cuda.max_memory_allocated()
    for share in (0.9, 0.8, 0.7, 0.6):
        # Less than was in use at a time, so that giving back what is not in use cannot be enough.
        with gpu_memory(int(share * peak)):
            limited = run()
        if limited.notes:
            break
    assert [note.partition(":")[0] for note in limited.notes] == ["memory ran out on cuda"]
    costs = [kl(model, found.model, tokens[400:]) for found in (whole, limited)]
    # Smaller batches only change the order of sums: 1e-5 on a CPU.
    assert costs[1] == pytest.approx(costs[0], rel=0.01)


def test_memory_is_left_for_the_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a third of a GPU free, all that is kept of all sequences goes to main memory; this needs no GPU."""
    device, total = torch.device("cuda"), 3 << 30
    card = SimpleNamespace(total_memory=total, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (total // 3, total))
    model = open_huggingface(write_model(tmp_path / "m", "gpt_neox"))
    nothing = Quantization([{}] * model.config.num_hidden_layers)
    run = _Run(_Task(model, model.config, Method(), nothing), device, Room(1 << 30, device))
    run.begin(torch.zeros(4, 16, dtype=torch.int64), LayerStore(1 << 30))
    streams = run._streams
    assert streams is not None
    kept = [streams.outputs, streams.attended]
    for stream in (streams.reference, streams.reduced):
        assert stream.entry is not None
        kept += [stream.x, stream.entry]
    assert all(tensor.device == CPU for tensor in kept)


def test_memory_that_pytorch_keeps_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """What earlier stages have given back to PyTorch, not to the device, can hold hidden states; this needs no GPU."""
    total = 24 << 30
    free = [total // 4]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=total))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free[0], total))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: free.__setitem__(0, total))
    devices = []
    monkeypatch.setattr(torch, "empty", lambda shape, device=CPU: devices.append(device))
    Room(0, torch.device("cuda")).empty(4, 16)
    assert devices == [torch.device("cuda")]
