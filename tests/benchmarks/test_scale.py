"""The benchmark of real sizes, on a size that takes seconds."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import a3q.statistics
from a3q.forward import attention, hidden_states, mlp, output_logits
from a3q.statistics import Moment
from benchmarks import limits, scale, scale_tables
from benchmarks.limits import run_watched
from benchmarks.random_words import random_text
from benchmarks.scale import Job, estimates, run_timed
from benchmarks.scale_extrapolation import extrapolate, per_layer
from benchmarks.scale_stages import STAGES, Section, Stage, Timers
from benchmarks.scale_work import attention_flops, mlp_flops, refit_flops, rounding_flops
from benchmarks.shapes import SHAPES, tensor_shapes, weight_bytes, write_shape
from converters.open import open_model

CPU = torch.device("cpu")
TOKENS = 2048


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shape("tiny", tmp_path_factory.mktemp("shape") / "tiny", shard_bytes=1 << 20)


@pytest.fixture(scope="module")
def text(folder: Path) -> Path:
    path = folder.parent / "text.txt"
    path.write_text(random_text(2 * TOKENS, 1024), encoding="utf-8")
    return path


def test_folder(folder: Path) -> None:
    model = open_model(folder)
    assert model.config.num_hidden_layers == 3
    assert len(model.source.weight_files) > 2
    assert model.source.file_size > weight_bytes("tiny") == 2 * model.parameters()
    layer = model.layers[1]
    for role, std in (("q", 0.02), ("up", 0.02), ("o", 0.02 / 6**0.5), ("down", 0.02 / 6**0.5)):
        assert float(layer[role].std()) == pytest.approx(std, rel=0.02)
    assert bool((layer["mlp_norm"] == 1).all())
    ids = model.tokenizer.encode(random_text(500, 1024))
    assert 500 <= len(ids) <= 505
    assert len(set(ids)) > 200
    tokens = torch.tensor(ids[:64])[None]
    ours = output_logits(model, hidden_states(model, tokens, CPU), CPU)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
    assert torch.allclose(ours, theirs, atol=1e-3)
    assert AutoTokenizer.from_pretrained(folder)(random_text(9, 1024)).input_ids


def test_weights_are_reproducible(folder: Path, tmp_path: Path) -> None:
    same, other = (open_model(write_shape("tiny", tmp_path / str(seed), 1, seed)) for seed in (0, 1))
    first = open_model(folder)
    assert torch.equal(first.layers[0]["q"], same.layers[0]["q"])
    assert not torch.equal(first.layers[0]["q"], other.layers[0]["q"])
    w = same.layers[0]
    assert torch.linalg.matrix_rank(torch.cat([w["q"], w["k"], w["gate"], w["up"]])[:256]) == 256


@pytest.mark.parametrize(
    ("name", "weights"),
    [("llama-3.1-8b", 8_030_261_248), ("llama-3.1-70b", 70_553_706_496), ("qwen2.5-1.5b", 1_543_714_304)],
)
def test_real_shapes(name: str, weights: int) -> None:
    """The numbers of weights that the models are published with."""
    assert weight_bytes(name) == 2 * weights
    assert len(tensor_shapes(name, 2)) < 30


def test_figures() -> None:
    w = {role: torch.zeros(rows, columns) for role, rows, columns in (("q", 8, 16), ("k", 4, 16), ("v", 4, 16))}
    w |= {"o": torch.zeros(16, 8), "gate": torch.zeros(24, 16), "up": torch.zeros(24, 16), "down": torch.zeros(16, 24)}
    config, shape = SimpleNamespace(num_attention_heads=4), SimpleNamespace(qk_head_dim=2, v_head_dim=2)
    x = torch.zeros(3, 10, 16)
    projections, scores = 2 * 30 * 16 * (8 + 4 + 4 + 8), 3 * 4 * (2 * 10 * 10 // 2) * (2 + 2)
    assert attention_flops(config, shape, w, x) == projections + scores
    assert mlp_flops(config, w, x) == 2 * 30 * 16 * 24 * 3
    assert refit_flops(None, w, "down") == 24**3 / 3 + 2 * 24**2 * 16
    assert refit_flops(None, w, "down", torch.arange(12)) == 12**3 / 3 + 2 * 12**2 * 16
    rounding = SimpleNamespace(grids={"q": "a", "k": "a", "v": "b"})
    assert rounding_flops(rounding, w, ("q", "k", "v"), None) == 2 * (2 * 16**3 / 3) + (8 + 4 + 4) * 16**2
    assert rounding_flops(rounding, w, ("o",), None) == 0


def test_timers_count_a_known_product() -> None:
    add, timers = Moment.add, Timers(CPU)
    with timers.installed(), timers.stages("some stage", 1.0) as advance:
        moment = Moment(8, 8, device=CPU)
        moment.add(torch.ones(100, 8))
        moment.add(torch.ones(50, 8))
        Moment(2, 8, 4, device=CPU).add(torch.ones(2, 10, 8), torch.ones(2, 10, 4))
        worker = threading.Thread(target=Moment(8, 8, device=CPU).add, args=(torch.ones(7, 8),))
        worker.start()
        worker.join()
        advance(1.0)
    assert a3q.statistics.Moment.add is add
    assert float(moment.mean()[0, 0]) == 1
    ours, beside = timers.tallies["some stage", "moments", False], timers.tallies["some stage", "moments", True]
    assert (ours.calls, ours.flops) == (3, 2 * 150 * 8 * 8 + 2 * 2 * 10 * 8 * 4)
    assert (beside.calls, beside.flops) == (1, 2 * 7 * 8 * 8)
    section = timers.sections["some stage"]
    assert 0 < timers.own_seconds("some stage") <= section.advances[0] <= section.seconds


def test_timers_count_a_call_inside_another_once() -> None:
    timers = Timers(CPU)
    inner = timers.timed(Stage("a", "m", "f", flops=lambda n: n), lambda n: n)
    other = timers.timed(Stage("b", "m", "g", flops=lambda n: n, bytes=lambda found, n: found + n), inner)
    outer = timers.timed(Stage("a", "m", "h", flops=lambda n: 10 * n), lambda n: other(n) + inner(n))
    assert outer(2) == 4
    assert timers.tallies["", "a", False].calls == 1
    assert timers.tallies["", "a", False].flops == 20
    assert (timers.tallies["", "b", False].flops, timers.tallies["", "b", False].bytes) == (2, 4)
    changed = timers.timed(Stage("c", "m", "f", flops=lambda: 1.0), lambda n: n)
    assert changed(3) == 3
    assert list(timers.misread) == ["m.f"]


def test_timed_pass(folder: Path, text: Path, tmp_path: Path) -> None:
    job = Job(folder, 0.25, "Q4_K_M", str(text), TOKENS, "cpu")
    timers, missing, _ = run_timed(job, tmp_path / "out.gguf")
    assert open_model(tmp_path / "out.gguf").config.num_hidden_layers == 3
    assert not timers.misread
    assert {f"{stage.module}.{stage.attribute}" for stage in STAGES} > set(missing)
    names = {name for _, name, _ in timers.tallies}
    assert {"read layer", "forward", "moments", "solve QK", "solve OV", "solve MLP", "refit", "GPTQ", "pack"} <= names
    assert "reduce and quantize" in timers.sections
    for title, section in timers.sections.items():
        assert timers.own_seconds(title) <= section.seconds * 1.001
    busy = timers.sections["reduce and quantize"]
    assert timers.own_seconds("reduce and quantize") > busy.seconds / 2
    assert len(busy.advances) == 3
    model, tokens = open_model(folder), torch.zeros(2, 8, dtype=torch.int64)
    forward = Timers(CPU)
    with forward.installed():
        hidden_states(model, tokens, CPU)
    tally = forward.tallies["", "forward", False]
    x, w, config = torch.zeros(2, 8, 256), model.layers[0], model.config
    assert attention(config, config.layers[0], w, x).shape == mlp(config, w, x).shape == x.shape
    each = attention_flops(config, config.layers[0], w, x) + mlp_flops(config, w, x)
    assert tally.flops == 3 * each


def test_extrapolation() -> None:
    sections = {
        "hash the source": Section(2.0),
        "weigh the layers": Section(4.0, [1.0, 4.0]),
        # 3 s until the first layer ends, then 2 s each.
        "reduce and quantize": Section(10.0, [3.0, 5.0, 7.0, 9.0]),
        "something new": Section(5.0),
    }
    assert per_layer(sections["reduce and quantize"]) == 2
    found = {title: one.whole for title, one in extrapolate(sections, 4, 16, 3.0).items()}
    assert found == {
        "hash the source": 6.0,
        "weigh the layers": 64.0,
        "reduce and quantize": 10.0 + 12 * 2.0,
        "something new": 5.0,
    }
    whole = {title: one.whole for title, one in extrapolate(sections, 4, 4, 1.0).items()}
    assert whole == {title: section.seconds for title, section in sections.items()}
    # Proportions from one run, times from another.
    scaled = extrapolate(sections, 4, 16, 3.0, {"reduce and quantize": 20.0})["reduce and quantize"]
    assert (scaled.measured, scaled.whole) == (20.0, pytest.approx(68.0))


def test_a_line_is_continued() -> None:
    """Layer i takes 1 + i / 2 s here, whatever comes before the first's end and after the last's."""
    ends = [10 + sum(1 + i / 2 for i in range(1, n + 1)) for n in range(5)]
    found = extrapolate({"weigh the layers": Section(ends[-1] + 3, ends)}, 5, 20, 1.0)["weigh the layers"]
    assert found.whole == pytest.approx(10 + 3 + sum(1 + i / 2 for i in range(1, 20)))


def test_extrapolation_of_the_command() -> None:
    timers = Timers(CPU)
    timers.sections = {"reduce and quantize": Section(20.0, [10.0, 20.0]), "write": Section(0.3)}
    found = estimates(timers, "tiny", 1, (50.0, {"reduce and quantize": 30.0, "write": 0.0}))
    assert found["write"].measured == 0.3
    assert found["write"].whole == pytest.approx(0.3 * weight_bytes("tiny") / weight_bytes("tiny", 1))
    assert found["rest"].measured == found["rest"].whole == pytest.approx(50 - 30 - 0.3)
    assert sum(one.measured for one in found.values()) == pytest.approx(50)
    assert SHAPES["tiny"].layers == 3


def test_watched_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import time; a = bytearray(b'1') * (300 << 20); time.sleep(0.8)"
    usage = run_watched([sys.executable, "-c", script], tmp_path / "log")
    assert usage.code == 0
    assert usage.seconds > 0.8
    assert usage.resident >= usage.anonymous > 300 << 20
    assert usage.limited_by is None
    monkeypatch.setattr(limits, "_parents", lambda: iter(()))
    with pytest.raises(SystemExit, match="no control group can be made here"):
        run_watched([sys.executable, "-c", script], tmp_path / "log", 100 << 20)


def test_limited_command(tmp_path: Path) -> None:
    with limits.memory_group(1 << 30) as group:
        if group is None:
            pytest.skip("no control group can be made here")
    script = "a = bytearray(b'1') * (300 << 20)"
    limited = run_watched([sys.executable, "-c", script], tmp_path / "log", 100 << 20)
    assert limited.code != 0
    assert limited.out_of_memory
    assert run_watched([sys.executable, "-c", script], tmp_path / "log", 600 << 20).code == 0


def test_a_smaller_gpu_is_imitated(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, GB = 80 << 30, 1 << 30
    taken = {"by PyTorch": 0, "by others": 0}
    fractions: list[float] = []
    told: list[tuple[int, int]] = []

    def look() -> None:
        assert sys.argv == ["a3q", "convert", "model", "--ratio", "0"]
        properties = torch.cuda.get_device_properties("cuda:0")
        assert (properties.name, properties.total_memory) == ("a card", torch.cuda.mem_get_info()[1])
        for own, others in ((0, 0), (15, 0), (25, 0), (1, 70)):
            taken.update({"by PyTorch": own * GB, "by others": others * GB})
            told.append(torch.cuda.mem_get_info("cuda:0"))

    card = SimpleNamespace(name="a card", total_memory=whole)
    fakes: dict[str, Any] = {
        "is_available": lambda: True,
        "get_device_properties": lambda _=None: card,
        "mem_get_info": lambda _=None: (whole - sum(taken.values()), whole),
        "memory_reserved": lambda _=None: taken["by PyTorch"],
        "set_per_process_memory_fraction": fractions.append,
    }
    monkeypatch.setattr("a3q.cli.main", look)
    for size in ("20GiB", "100GiB"):
        taken.update(dict.fromkeys(taken, 0))
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(sys, "argv", ["limits", "--gpu-memory", size, "convert", "model", "--ratio", "0"])
        limits.main()
    assert fractions == [0.25, 1.0]
    assert told[:4] == [(free * GB, 20 * GB) for free in (20, 5, 0, 9)]
    assert told[4:] == [(free * GB, whole) for free in (80, 65, 55, 9)]


def test_command(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = {"matmul float32": 1e11, "write a file": 1e9}
    monkeypatch.setattr(scale, "reference_rates", lambda *_: rates)
    arguments = ["tiny", "--layers", "2", "--calib-tokens", "1024", "--device", "cpu"]
    path = tmp_path / "results.json"
    monkeypatch.setattr(sys, "argv", ["scale", *arguments, "--ratio", "0", "-o", str(path)])
    scale.main()
    shown = capsys.readouterr().out
    assert "tiny, 2 of 3 layers" in shown
    assert "Extrapolated from 2 of 3 layers" in shown
    found = json.loads(path.read_text())
    assert found["command"]["code"] == 0
    assert found["command"]["anonymous"] > 50 << 20
    assert "quantize" in found["command"]["stages"]
    assert found["sections"].keys() <= found["extrapolated"].keys()
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]
    scale_tables.show(found)
    assert capsys.readouterr().out == shown
