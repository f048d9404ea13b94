"""The benchmark of healing, on a model and times that take seconds."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import healing
from benchmarks.common import perplexity, windows
from converters.open import open_model
from tests.pico import corpus, write_model

CPU = torch.device("cpu")


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
