"""The benchmark of the KV cache on tiny models."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest

from a3q.perplexity import evaluate_runtime
from a3q.runtime import LlamaRuntime
from benchmarks.kv_cache import Bucket, Row, Sizes, by_position, caches_table, measure, positions_table, write_results
from converters.gguf_writer import write_gguf
from converters.hf_reader import open_huggingface
from converters.types import resolve_quant
from tests.pico import corpus, write_model

pytest.importorskip("llama_cpp")
SIZES = Sizes((64, 128), 256, fill=40, generate=2, rounds=1, window=300, windows=2)
TEXT = "\n".join(corpus(100, seed=5))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("kv")
    found = {}
    for name, head in (("original", 32), ("reduced", 16)):
        model = write_model(folder / name, head_dim=head, max_position_embeddings=512)
        found[name] = write_gguf(open_huggingface(model), resolve_quant("f16"), folder / f"{name}.gguf").path
    return found


def test_rows(files: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    rows = measure(files, TEXT, SIZES, 1)
    assert [(row.file, row.head, row.cache) for row in rows] == [
        (name, head, cache) for cache in ("f16", "q8_0", "q4_0") for name, head in (("original", 32), ("reduced", 16))
    ]
    assert [bool(row.error) for row in rows] == [False, False, False, True, False, True]
    assert rows[3].error.startswith("K cache type q8_0 with block size 32 does not divide")
    for row, bits in ((rows[0], 16), (rows[2], 8.5), (rows[4], 4.5)):
        # Of so small a cache, the two decimals of llama.cpp's MiB are a few percent.
        assert row.bytes_per_token == pytest.approx(2 * 2 * 2 * 32 * bits / 8, rel=0.15)
        assert row.empty_speed > 0
        assert row.filled_speed > 0
    with LlamaRuntime(files["reduced"], 128, 1) as runtime:
        expected = tuple(evaluate_runtime(runtime, TEXT, n, 256 // n).value for n in (64, 128))
    assert rows[1].perplexity == pytest.approx(expected, rel=1e-3)
    assert rows[2].perplexity == pytest.approx(rows[0].perplexity, rel=0.02)


def test_positions(files: dict[str, Path]) -> None:
    buckets = by_position(files, TEXT, SIZES, 1)
    assert [(bucket.begin, bucket.end) for bucket in buckets] == [(0, 256), (256, 300)] * 2
    with LlamaRuntime(files["reduced"], 300, 1) as runtime:
        tokens = runtime.tokenize(TEXT)
        windows = [tokens[:300], tokens[300:600]]
        if runtime.add_bos:
            assert runtime.bos_id is not None
            stream = [runtime.bos_id, *tokens]
            windows = [stream[:300], [runtime.bos_id, *stream[301:600]]]
        losses = []
        for window in windows:
            logits = runtime.logits(window).astype(np.float64)
            logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            losses.append([-logp[i - 1, window[i]] for i in range(256, 300)])
    assert math.log(buckets[3].perplexity) == pytest.approx(np.mean(losses), rel=1e-3)
    assert all(bucket.ratio == 1 and bucket.ratio_error == 0 for bucket in buckets[:2])
    assert buckets[3].ratio == pytest.approx(buckets[3].perplexity / buckets[1].perplexity)
    assert buckets[3].ratio_error > 0


def test_results(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        Row("original", 64, "f16", 200.0, (10.0, 8.0), 100.0, 50.0),
        Row("25 %", 48, "f16", 150.0, (11.0, 9.0), 110.0, 60.0),
        Row("original", 64, "q8_0", 106.0, (10.1, 8.1), 90.0, 40.0),
        Row("25 %", 48, "q8_0", error="48 does not divide"),
    ]
    buckets = [Bucket("original", 0, 256, 9.0, 1.0, 0.0), Bucket("25 %", 0, 256, 9.9, 1.1, 0.01)]
    text = write_results(tmp_path, rows, buckets, SIZES, "Some model.")
    assert "| 25 % | 48 | f16 | 150 (75%) | 11.000 (1.1000×) | 9.000 (1.1250×) | 110.0 (1.10×) | 60.0 (1.20×) |" in text
    assert (
        "| original | 64 | q8_0 | 106 (53%) | 10.100 (1.0100×) | 8.100 (1.0125×) | 90.0 (1.00×) | 40.0 (1.00×) |"
        in text
    )
    assert "| 25 % | 48 | q8_0 | does not start: 48 does not divide |" in text
    assert "| 0 to 256 | 9.000 | 9.900 (1.1000 ± 0.0100×) |" in text
    assert len({line.count("|") for line in caches_table(rows, SIZES)}) == 1
    assert len(list(positions_table(buckets))) == 3
    assert (tmp_path / "kv_cache.md").read_text(encoding="utf-8") == text
    table = list(csv.DictReader((tmp_path / "kv_cache.csv").open(encoding="utf-8")))
    assert [row["perplexity_128"] for row in table] == ["8.0", "9.0", "8.1", ""]
    assert len(list(csv.DictReader((tmp_path / "kv_cache-positions.csv").open(encoding="utf-8")))) == 2
    assert (tmp_path / "kv_cache.png").read_bytes().startswith(b"\x89PNG")
