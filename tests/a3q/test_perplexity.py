"""Windowing, perplexity and divergence, against small references written out by hand and against llama.cpp."""

from __future__ import annotations

import math
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from a3q.errors import InputError
from a3q.forward import hidden_states, output_logits
from a3q.model import Model
from a3q.perplexity import (
    LikelihoodSum,
    Perplexity,
    chunk_tokens,
    compare,
    evaluate,
    evaluate_runtime,
    first_scored,
    kl_divergence,
    logits_of,
    read_text,
    token_nll,
)
from a3q.runtime import LlamaRuntime
from converters.hf_reader import open_huggingface
from tests.a3q.test_runtime import demo_gguf
from tests.pico import KINDS, Kind, corpus, write_model
from tests.reduced import reduced

CPU = torch.device("cpu")
SEED = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return open_huggingface(write_model(tmp_path_factory.mktemp("pico")))


def llama_cpp_windows(text: list[int], n_ctx: int, bos: int | None) -> list[tuple[list[int], list[int], list[int]]]:
    """Per chunk: what llama.cpp decodes, the positions it reads logits of, and the tokens it looks up in them."""
    tokens = ([] if bos is None else [bos]) + text
    windows = []
    for i in range(len(tokens) // n_ctx):
        start = i * n_ctx
        decoded = tokens[start : start + n_ctx]
        if bos is not None:
            decoded[0] = bos
        first = n_ctx // 2
        positions = list(range(first, first + n_ctx - 1 - first))
        windows.append((decoded, positions, [tokens[start + j + 1] for j in positions]))
    return windows


@pytest.mark.parametrize("bos", [None, 99])
@pytest.mark.parametrize(("length", "n_ctx"), [(40, 8), (39, 8), (41, 8), (29, 7), (8, 8), (5, 3)])
def test_chunks_are_llama_cpps(length: int, n_ctx: int, bos: int | None) -> None:
    text = list(range(1, length + 1))
    windows = llama_cpp_windows(text, n_ctx, bos)
    chunks = chunk_tokens(text, n_ctx, bos)
    assert chunks.tolist() == [decoded for decoded, _, _ in windows]
    for chunk, (_, positions, targets) in zip(chunks, windows, strict=True):
        assert list(range(first_scored(n_ctx), n_ctx - 1)) == positions
        assert chunk[first_scored(n_ctx) + 1 :].tolist() == targets


def test_short_text_says_what_it_has_and_needs() -> None:
    with pytest.raises(InputError, match=r"has 7 tokens.* needs at least 8"):
        chunk_tokens(range(6), 8, 0)
    with pytest.raises(InputError, match="smallest is 3"):
        chunk_tokens(range(6), 2, 0)


def test_text_is_read_as_llama_cpp_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes("one\r\ntwö\n\n".encode())
    assert read_text(path) == "one\r\ntwö\n"
    path.write_bytes(b"ab\xff")
    with pytest.raises(InputError, match=r"not UTF-8 text \(byte 2\)"):
        read_text(path)
    with pytest.raises(InputError, match="No such file"):
        read_text(tmp_path / "none")


def test_error_of_the_mean_is_carried_to_the_perplexity() -> None:
    nll = torch.tensor([1.0, 2.0, 4.0, 5.0], dtype=torch.float64)
    sums = LikelihoodSum()
    sums.add(nll[:3])
    sums.add(nll[3:])
    result = sums.result()
    assert result.value == pytest.approx(math.exp(3))
    # The standard error with the deviation over n, as llama.cpp has it: sqrt(2.5 / 3).
    assert result.stderr == pytest.approx(math.exp(3) * math.sqrt(2.5 / 3))
    assert result.tokens_scored == 4


def test_no_spread_and_no_finite_value() -> None:
    sums = LikelihoodSum()
    sums.add(torch.tensor([2.0]))
    assert sums.result() == Perplexity(math.exp(2), 0.0, 1, 0)
    sums.add(torch.tensor([5000.0]))
    assert sums.result().value == math.inf


def naive_perplexity(model: Model, chunks: Tensor) -> float:
    n_ctx = chunks.shape[1]
    logits = output_logits(model, hidden_states(model, chunks, CPU), CPU).double()
    losses = [
        -logits[b, t].log_softmax(0)[chunks[b, t + 1]] for b in range(len(chunks)) for t in range(n_ctx // 2, n_ctx - 1)
    ]
    return float(torch.stack(losses).mean().exp())


def test_evaluate_equals_a_full_computation(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(corpus(12, seed=SEED))
    bos = model.tokenizer.bos_id if model.tokenizer.add_bos else None
    chunks = chunk_tokens(model.tokenizer.encode(text), 32, bos)
    assert len(chunks) > 3
    seen: list[tuple[int, int]] = []
    whole = evaluate(model, text, 32, device=CPU, on_progress=lambda so_far, of: seen.append((so_far.chunks, of)))
    assert whole.value == pytest.approx(naive_perplexity(model, chunks), rel=1e-5)
    assert whole.chunks == len(chunks)
    assert whole.tokens_scored == len(chunks) * 15
    assert seen == [(i + 1, len(chunks)) for i in range(len(chunks))]

    # Batches of one chunk and pieces of a few positions change nothing.
    monkeypatch.setattr("a3q.perplexity._HIDDEN_BYTES", 1)
    monkeypatch.setattr("a3q.perplexity._LOGITS_BYTES", 4 * 8 * model.config.vocab_size)
    pieces = evaluate(model, text, 32, device=CPU)
    assert pieces.value == pytest.approx(whole.value, rel=1e-6)
    assert pieces.stderr == pytest.approx(whole.stderr, rel=1e-6)

    two = evaluate(model, text, 32, 2, device=CPU)
    assert two.chunks == 2
    assert two.value == pytest.approx(naive_perplexity(model, chunks[:2]), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_whole_and_reduced(kind: Kind, tmp_path: Path) -> None:
    text = " ".join(corpus(6, seed=SEED))
    whole = open_huggingface(write_model(tmp_path / "m", kind))
    values = []
    for one in (whole, reduced(whole)):
        chunks = chunk_tokens(one.tokenizer.encode(text), 32, one.tokenizer.bos_id if one.tokenizer.add_bos else None)
        values.append(evaluate(one, text, 32, device=CPU).value)
        assert values[-1] == pytest.approx(naive_perplexity(one, chunks), rel=1e-5)
    assert values[0] != pytest.approx(values[1], rel=1e-3)


def test_windows_end_where_learned_positions_do(tmp_path: Path) -> None:
    of, text = open_huggingface(write_model(tmp_path, "gpt2", max_position_embeddings=32)), " ".join(corpus(20))
    assert evaluate(of, text, 32, 1, device=CPU).chunks == 1
    with pytest.raises(InputError, match="--ctx 33: the model has learned 32 positions"):
        evaluate(of, text, 33, 1, device=CPU)


def test_logits_of_sequences_are_computed_together(model: Model) -> None:
    sequences = torch.randint(model.config.vocab_size, (3, 20), generator=torch.Generator().manual_seed(SEED))
    calls: list[int] = []
    expected = output_logits(model, hidden_states(model, sequences, CPU), CPU)
    for first in (0, 7):
        known = logits_of(model, sequences, CPU, first, lambda: calls.append(1))
        for i in (2, 0, 1):
            torch.testing.assert_close(known(sequences[i]), expected[i, first:])
    assert len(calls) == 2 * model.config.num_hidden_layers
    with pytest.raises(KeyError):
        known(sequences[0].flip(0))
    same = compare(logits_of(model, sequences, CPU), {"same": logits_of(model, sequences, CPU, 5)}, sequences, 5)[
        "same"
    ]
    assert same.mean_kl < 1e-9
    assert same.top1_agreement == 1


def test_divergence() -> None:
    log_p = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]]).log()
    log_q = torch.tensor([[0.25, 0.25, 0.5], [0.2, 0.3, 0.5]]).log()
    torch.testing.assert_close(kl_divergence(log_p, log_q), torch.tensor([math.log(2), 0.0], dtype=torch.float64))
    assert kl_divergence(log_q, log_p)[0] == math.inf
    assert kl_divergence(log_p, log_p).tolist() == [0.0, 0.0]


def test_tiny_divergence_is_not_lost_in_rounding() -> None:
    torch.manual_seed(SEED)
    logits = torch.randn(1, 50_000, dtype=torch.float64)
    step = 1e-5 * torch.randn_like(logits)
    log_p, log_q = logits.log_softmax(-1), (logits + step).log_softmax(-1)
    p = log_p.exp()
    half_variance = 0.5 * ((p * step.square()).sum(-1) - (p * step).sum(-1).square())
    torch.testing.assert_close(kl_divergence(log_p, log_q), half_variance, rtol=1e-3, atol=0.0)


def test_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(SEED)
    sequences = torch.randint(11, (3, 9))
    tables = {name: torch.randn(11, 11) for name in ("reference", "other")}

    def bigram(name: str) -> Tensor:
        return tables[name][sequences]

    def broken(sequence: Tensor) -> Tensor:
        return tables["reference"][sequence] * math.nan

    monkeypatch.setattr("a3q.perplexity._LOGITS_BYTES", 2 * 8 * 11)
    result = compare(
        lambda sequence: tables["reference"][sequence],
        {
            "same": lambda sequence: tables["reference"][sequence],
            "other": lambda sequence: tables["other"][sequence],
            # Positions before the compared ones may be left out.
            "tail": lambda sequence: tables["other"][sequence][4:],
            "broken": broken,
        },
        sequences,
        first=4,
    )
    p, q = (bigram(name)[:, 4:-1].double().log_softmax(-1) for name in ("reference", "other"))
    kl = (p.exp() * (p - q)).sum(-1)
    other = result["other"]
    assert other.mean_kl == pytest.approx(float(kl.mean()))
    assert other.max_kl == pytest.approx(float(kl.max()))
    assert other.top1_agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    nll = -q.gather(-1, sequences[:, 5:, None])
    assert other.perplexity.value == pytest.approx(float(nll.mean().exp()))
    assert other.perplexity.tokens_scored == 12
    assert other.perplexity.chunks == 3
    assert result["tail"] == other

    same = result["same"]
    assert (same.mean_kl, same.max_kl, same.top1_agreement) == (0.0, 0.0, 1.0)
    assert same.perplexity == same.reference_perplexity == other.reference_perplexity
    assert math.isnan(result["broken"].mean_kl)
    assert math.isnan(result["broken"].max_kl)


def test_compare_needs_a_position() -> None:
    with pytest.raises(ValueError, match="no position"):
        compare(lambda sequence: sequence, {}, torch.zeros(2, 5, dtype=torch.int64), first=4)


def test_llama_cpp_through_the_runtime() -> None:
    pytest.importorskip("llama_cpp")
    text = " ".join(corpus(20, seed=SEED))
    with LlamaRuntime(demo_gguf(), 80, n_threads=1) as runtime:
        chunks = chunk_tokens(runtime.tokenize(text), 80, runtime.bos_id if runtime.add_bos else None)[:2]
        nll = [token_nll(torch.from_numpy(runtime.logits(c.tolist()))[40:79], c[41:]) for c in chunks]
        measured = evaluate_runtime(runtime, text, 80, max_chunks=2)
        assert measured.chunks == 2
        assert measured.value == pytest.approx(float(torch.cat(nll).mean().exp()), rel=1e-5)

        def logits(sequence: Tensor) -> Tensor:
            return torch.from_numpy(runtime.logits(sequence.tolist()))

        same = compare(logits, {"same": logits}, chunks, first=40)["same"]
    assert (same.mean_kl, same.max_kl, same.top1_agreement) == (0.0, 0.0, 1.0)


def test_figure_is_that_of_llama_cpps_own_program(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    program = os.environ.get("A3Q_LLAMA_PERPLEXITY")
    if not program:
        pytest.skip("A3Q_LLAMA_PERPLEXITY does not name a llama-perplexity")
    path = tmp_path / "text"
    path.write_bytes("\r\n".join([*corpus(40, seed=SEED), ""]).encode())
    command = [program, "-m", str(demo_gguf()), "-f", str(path), "-c", "128", "--chunks", "4", "-t", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    match = re.search(r"Final estimate: PPL = ([\d.]+) \+/- ([\d.]+)", done.stdout + done.stderr)
    assert match is not None
    with LlamaRuntime(demo_gguf(), 128, n_threads=1) as runtime:
        measured = evaluate_runtime(runtime, read_text(path), 128, max_chunks=4)
    assert measured.value == pytest.approx(float(match[1]), rel=1e-4)
    assert measured.stderr == pytest.approx(float(match[2]), rel=1e-3)
