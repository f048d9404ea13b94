"""The benchmark of healing, on a model and times that take seconds."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from a3q.heal.stage import HealJob
from benchmarks import healing
from benchmarks.common import perplexity, windows
from converters.open import open_model
from tests.pico import corpus, write_model

CPU = torch.device("cpu")


def test_shorter_runs_get_less_of_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written for the longest, once, is shared out by the minutes of training."""
    text, asked = torch.arange(80).view(40, 2), []

    def written(job: HealJob) -> Tensor:
        asked.append(job.healing.minutes)
        return text

    monkeypatch.setattr(healing, "healing_text", written)
    bench = object.__new__(healing.Bench)
    bench.args = Namespace(minutes=[2.0, 10.0], rounded_minutes=1.0)
    bench._written = None
    stages, job = healing._Clock(), HealJob(*[None] * 9)  # type: ignore[arg-type]
    assert torch.equal(bench.text(job, 2.0, stages), text[:8])
    assert torch.equal(bench.text(job, 10.0, stages), text)
    longest = stages.seconds["write healing text"]
    assert len(bench.text(job, 0.01, stages)) == 2
    assert stages.seconds["write healing text"] == pytest.approx(longest / 1000)
    assert asked == [10.0]


def test_rows_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rounded model's file is the one whose figures stand in its row."""
    folder = write_model(tmp_path / "m", tied=True, initializer_range=0.2, max_position_embeddings=1024)
    text = tmp_path / "text.txt"
    text.write_text("\n".join(corpus(2000)))
    out = tmp_path / "out"
    options = {"--model": folder, "--eval": text, "--ratios": 0.25, "--modes": "both", "--minutes": 0.05,
               "--rounded-minutes": 0.02, "--calib-tokens": 2048, "--embedding": "q4_0", "--out": out,
               "--device": "cpu"}  # fmt: skip
    argv = [str(part) for option in options.items() for part in option]
    monkeypatch.setattr(sys, "argv", ["healing", "--keep", *argv])
    healing.main()
    rows = json.loads((out / "healing.json").read_text())
    assert [(row["mode"], row["rounded"]) for row in rows] == [
        ("original", ""), ("both", ""), ("both", "q4_0"), ("both", "q4_0, in the loop"),
    ]  # fmt: skip
    assert all(len(row["answers"]) == 12 for row in rows)
    assert rows[1]["tokens"] > 0 and rows[1]["curve"] and rows[3]["curve"]
    files = sorted(out.glob("*.gguf"))
    assert [path.name for path in files] == ["25-both-0.05-q4_0-in-the-loop.gguf", "25-both-0.05-q4_0.gguf"]
    for path, row in zip(files, (rows[3], rows[2]), strict=True):
        model = open_model(path)
        found = perplexity(model, windows(model, text, 8), CPU)
        assert found == pytest.approx(row["perplexity"]["eval"], rel=1e-4)
    assert "**What is the capital of France?**" in (out / "healing.md").read_text()
    assert (out / "healing.png").stat().st_size > 1000
