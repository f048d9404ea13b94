"""Whole conversions of tiny models: what the written file computes and says, and what a failure leaves behind."""

from __future__ import annotations

import hashlib
import io
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from rich.console import Console
from torch import Tensor

from a3q import ConvertResult, InputError, VerifyError, __version__, convert, pipeline, runtime
from a3q.forward import hidden_states, output_logits
from a3q.model import Model
from a3q.pipeline import default_name
from a3q.progress import Advance
from a3q.report import render
from a3q.runtime import LlamaRuntime
from converters.gguf_reader import open_gguf
from converters.gguf_writer import write_gguf
from converters.hf_reader import open_huggingface
from converters.open import open_model
from converters.types import resolve_quant
from tests.pico import LLAMA3_ROPE, corpus, write_model

CPU = torch.device("cpu")
SIZE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 128, "dtype": torch.float16}
"""Heads of size 32, so that a quarter is on the grid of every type: 24, and 96 MLP units."""
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied-scaled": {"tied": True, "rope": LLAMA3_ROPE},
    "qwen2": {"kind": "qwen2"},
    "qwen2-tied": {"kind": "qwen2", "tied": True},
}
CALIB_TOKENS = 1024
needs_llama_cpp = pytest.mark.skipif(not runtime.available(), reason="llama.cpp is not installed")


class Recorded:
    """Stages with their total and what they were advanced by."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, float, float]] = []

    @contextmanager
    def __call__(self, title: str, total: float) -> Iterator[Advance]:
        done: list[float] = []
        yield done.append
        assert all(step > 0 for step in done)
        self.seen.append((title, total, sum(done)))

    @property
    def titles(self) -> list[str]:
        return [title for title, _, _ in self.seen]

    def check_totals(self) -> None:
        """Each stage did the work that it announced; tokens of a file are had at once."""
        for title, total, done in self.seen:
            if title != "read calibration text":
                assert done == pytest.approx(total), title


@dataclass(frozen=True)
class Run:
    """A conversion, what it was made from, and the stages it went through."""

    source: Path
    calib: str | list[str]
    result: ConvertResult
    stages: Recorded


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    (folder / "text.txt").write_text("\n".join(corpus(400, seed=7)))
    return {name: write_model(folder / name, **SIZE, **options) for name, options in KINDS.items()}


@pytest.fixture(scope="module")
def text(sources: dict[str, Path]) -> Path:
    return sources["llama"].with_name("text.txt")


@pytest.fixture(scope="module", params=[(kind, calib) for kind in KINDS for calib in ("self", "text")], ids="-".join)
def run(
    request: pytest.FixtureRequest,
    sources: dict[str, Path],
    text: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Run:
    """A quarter taken away, written as F16."""
    kind, calib = request.param
    return reduced(sources[kind], tmp_path_factory.mktemp("out") / "m.gguf", "self" if calib == "self" else str(text))


def reduced(source: Path, output: Path, calib: str | list[str] = "self", **options: Any) -> Run:
    stages = Recorded()
    given: dict[str, Any] = {"ratio": 0.25, "quant": "f16", "calib_tokens": CALIB_TOKENS, "device": "cpu"}
    result = convert(source, output=output, calib=calib, stages=stages, **(given | options))
    return Run(source, calib, result, stages)


def logits(model: Model, ids: Tensor) -> Tensor:
    return output_logits(model, hidden_states(model, ids, CPU), CPU)


def some_ids(model: Model, count: int = 100) -> Tensor:
    return torch.randint(2, model.config.vocab_size, (1, count), generator=torch.Generator().manual_seed(1))


def exact_llama_cpp(path: Path, ids: Tensor) -> Tensor:
    """llama.cpp's logits with a float32 cache, so that nothing is rounded to float16."""
    import llama_cpp

    options: dict[str, Any] = {"type_k": 0, "type_v": 0, "flash_attn": False, "logits_all": True, "verbose": False}
    opened = llama_cpp.Llama(str(path), n_ctx=ids.numel(), n_threads=1, **options)
    opened.eval(ids[0].tolist())
    result = torch.from_numpy(opened.scores[: ids.numel()].copy()).float()
    opened.close()
    return result


def value(path: Path, key: str) -> Any:
    return gguf.GGUFReader(path).fields[key].contents()


def tensor_bytes(path: Path) -> dict[str, bytes]:
    return {tensor.name: tensor.data.tobytes() for tensor in gguf.GGUFReader(path).tensors}


# Plain conversion


@needs_llama_cpp
@pytest.mark.parametrize("source_format", ["hf", "gguf"])
@pytest.mark.parametrize("kind", KINDS)
def test_plain_conversion_computes_the_same(
    sources: dict[str, Path], tmp_path: Path, kind: str, source_format: str
) -> None:
    source = sources[kind]
    if source_format == "gguf":
        source = write_gguf(open_huggingface(source), resolve_quant("f32"), tmp_path / "source.gguf").path
    original = open_huggingface(sources[kind])
    ids = some_ids(original)
    ours = logits(original, ids)[0]
    assert ours.std() > 1
    exact = convert(source, ratio=0, quant="f32", output=tmp_path / "exact.gguf", device="cpu", verify_file=False)
    assert (exact_llama_cpp(exact.path, ids) - ours).abs().max() < 1e-3
    stages = Recorded()
    result = convert(source, ratio=0, quant="f16", output=tmp_path / "out.gguf", device="cpu", stages=stages)
    with LlamaRuntime(result.path, 128, n_threads=1) as opened:
        theirs = torch.from_numpy(opened.logits(ids[0].tolist()))
    # The weights are float16 already; llama.cpp rounds its cache and the activations in front of them too.
    assert (theirs - ours).square().mean().sqrt() < 4e-3
    check = result.verification
    assert check is not None
    assert check.kl_to_reduced == check.written.kl < 1e-5
    assert (result.reduced, result.choice.achieved, result.calibration) == (result.original, 0, None)
    stages.check_totals()
    assert value(result.path, "a3q.ratio") == 0
    assert not {"a3q.head_dim", "a3q.calibration.source", "general.base_model.count"} & set(
        gguf.GGUFReader(result.path).fields
    )


def test_nothing_is_calibrated_that_serves_nothing(sources: dict[str, Path], tmp_path: Path) -> None:
    run = reduced(sources["llama"], tmp_path / "m.gguf", ratio=0, verify_file=False)
    assert run.stages.titles == ["hash the source", "quantize and write"]
    assert run.result.verification is None
    for mine, theirs in zip(open_gguf(run.result.path).layers, open_model(run.source).layers, strict=True):
        assert all(torch.equal(mine[role], theirs[role]) for role in theirs)


# A reduced file


def test_file_is_the_model_in_memory(run: Run) -> None:
    written = open_model(run.result.written.path)
    assert run.result.path == run.result.written.path
    model = run.result.reduced
    assert (written.config.head_dim, written.config.v_head_dim, written.config.intermediate_size) == (24, 24, 96)
    assert replace(written.config, frequencies=(), rms_norm_eps=0) == replace(
        model.config, frequencies=(), rms_norm_eps=0
    )
    assert written.layers[0].keys() == model.layers[0].keys() == run.result.original.layers[0].keys()
    for mine, theirs in zip(written.layers, model.layers, strict=True):
        for role, weight in theirs.items():
            assert torch.equal(mine[role], weight.half().float() if weight.ndim == 2 else weight), role
    ids = some_ids(model)
    expected = logits(model, ids)
    assert (logits(written, ids) - expected).square().mean().sqrt() < 4e-3
    # The comparison can tell: the original is far from both.
    assert (logits(run.result.original, ids) - expected).square().mean().sqrt() > 0.5


def test_reduction_keeps_most_of_the_predictions(run: Run) -> None:
    check = run.result.verification
    if check is None:
        pytest.skip("llama.cpp is not installed")
    assert check.kl_to_reduced < 1e-4
    assert check.written.kl == pytest.approx(check.reduced.kl, rel=0.02)
    assert 0 < check.reduced.kl < check.original.perplexity.value
    assert check.reduced.perplexity.tokens_scored == check.scored_tokens > 100
    assert all(math.isfinite(one.perplexity.value) for one in (check.original, check.reduced, check.written))


def test_metadata(run: Run) -> None:
    fields = {key: field.contents() for key, field in gguf.GGUFReader(run.result.path).fields.items()}
    original, choice = run.result.original, run.result.choice
    assert fields["general.architecture"] == "llama"
    assert {key.partition(".")[2]: fields[key] for key in fields if key.startswith("llama.")} == {
        "block_count": 2,
        "context_length": 256,
        "embedding_length": 128,
        "feed_forward_length": 96,
        "vocab_size": 512,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 24,
        "attention.value_length": 24,
        "attention.layer_norm_rms_epsilon": pytest.approx(original.config.rms_norm_eps),
        "rope.dimension_count": 24,
        "rope.freq_base": 10000.0,
    }
    kept = {key: fields[key] for key in fields if key.startswith("tokenizer.")}
    assert kept == {key: entry.value for key, entry in original.tokenizer.metadata.items()}
    name = original.metadata["general.name"].value
    assert fields["general.name"] == f"{name} A3Q 25%"
    for key, entry in original.metadata.items():
        assert key == "general.name" or fields[key] == entry.value
    assert fields["general.base_model.0.name"] == name

    weights = run.source / "model.safetensors"
    kept_frequencies = fields.pop("a3q.frequencies_kept")
    assert sorted(set(kept_frequencies)) == kept_frequencies
    assert [original.config.frequencies[i] for i in kept_frequencies] == list(run.result.reduced.config.frequencies)
    assert {key: fields[key] for key in fields if key.startswith("a3q.")} == {
        "a3q.version": __version__,
        "a3q.ratio": 0.25,
        "a3q.ratio_achieved": pytest.approx(choice.achieved),
        "a3q.quantization": "f16",
        "a3q.source.name": name,
        "a3q.source.files": [weights.name],
        "a3q.source.sha256": [hashlib.sha256(weights.read_bytes()).hexdigest()],
        "a3q.head_dim": 24,
        "a3q.intermediate_size": 96,
        "a3q.calibration.source": "self" if run.calib == "self" else "text.txt",
        "a3q.calibration.tokens": CALIB_TOKENS,
        "a3q.calibration.seed": 0,
    }


def test_stages_advance_by_their_total(run: Run) -> None:
    text_stage = "write calibration text" if run.calib == "self" else "read calibration text"
    expected = ["hash the source", text_stage, "reduce", "quantize and write", "verify in llama.cpp"]
    assert run.stages.titles == expected[: None if runtime.available() else -1]
    assert list(run.result.seconds) == run.stages.titles
    run.stages.check_totals()


def table(result: ConvertResult) -> str:
    """What is printed, every white space one space."""
    console = Console(file=io.StringIO(), width=160, record=True)
    console.print(render(result))
    return " ".join(console.export_text().split())


def test_table(run: Run) -> None:
    result, shown = run.result, table(run.result)
    for part in (str(result.path), "32", "24", "128", "96", "25.0%", f"{result.reduced.parameters():,}"):
        assert part in shown, part
    assert str(result.calibration) in shown
    if result.verification is not None:
        assert f"{result.verification.written.perplexity.value:.2f}" in shown
    assert "None" not in shown


def test_provenance_survives_a_second_conversion(sources: dict[str, Path], tmp_path: Path) -> None:
    """A reduced GGUF as the source: read as any other; the record of its reduction stays, since it is still true."""
    first = reduced(sources["qwen2"], tmp_path / "first.gguf", verify_file=False).result
    second = convert(first.path, ratio=0, quant="q8_0", output=tmp_path / "second.gguf", device="cpu").path
    assert open_gguf(second).config == open_gguf(first.path).config
    assert value(second, "a3q.source.sha256") == [first.written.sha256]
    assert value(second, "a3q.quantization") == "q8_0"
    for key in ("ratio", "ratio_achieved", "head_dim", "calibration.tokens"):
        assert value(second, f"a3q.{key}") == value(first.path, f"a3q.{key}") > 0
    third = convert(second, ratio=0.1, quant="f16", output=tmp_path / "third.gguf", device="cpu", verify_file=False)
    assert value(third.path, "a3q.ratio") == pytest.approx(0.1)


def test_sharded_source_has_a_digest_for_each_file(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "shards", sharded=True, **SIZE)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 1
    path = reduced(folder, tmp_path / "m.gguf", ratio=0, verify_file=False).result.path
    digests = dict(zip(value(path, "a3q.source.files"), value(path, "a3q.source.sha256"), strict=True))
    assert digests == {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_sources_share_the_tokens(sources: dict[str, Path], text: Path, tmp_path: Path) -> None:
    run = reduced(sources["llama"], tmp_path / "m.gguf", ["self", str(text)], verify_file=False)
    assert run.stages.titles[1:3] == ["write calibration text", "read calibration text"]
    run.stages.check_totals()
    assert value(run.result.path, "a3q.calibration.source") == "self + text.txt"
    assert value(run.result.path, "a3q.calibration.tokens") == CALIB_TOKENS
    for part in ("2 × 256 tokens that the model wrote itself", "2 × 256 tokens of text.txt"):
        assert part in table(run.result)
    alone = reduced(sources["llama"], tmp_path / "alone.gguf", str(text), verify_file=False)
    assert tensor_bytes(alone.result.path) != tensor_bytes(run.result.path)


# The same again


def test_same_seed_same_bytes(sources: dict[str, Path], text: Path, tmp_path: Path) -> None:
    def file(name: str, **options: Any) -> Path:
        return reduced(sources["llama"], tmp_path / name, verify_file=False, **options).result.path

    first = file("first.gguf")
    assert file("again.gguf").read_bytes() == first.read_bytes()
    # Layers that wait on disk are the same layers.
    assert file("disk.gguf", memory_budget=0).read_bytes() == first.read_bytes()
    other = tensor_bytes(file("other.gguf", seed=1))
    differing = {name for name, content in tensor_bytes(first).items() if other[name] != content}
    assert {"blk.0.attn_q.weight", "blk.0.attn_v.weight", "blk.1.ffn_down.weight"} <= differing
    assert not {"token_embd.weight", "blk.0.attn_norm.weight", "rope_freqs.weight"} & differing
    assert value(tmp_path / "other.gguf", "a3q.calibration.seed") == 1


def test_checking_changes_nothing(run: Run, tmp_path: Path) -> None:
    unchecked = reduced(run.source, tmp_path / "m.gguf", run.calib, verify_file=False)
    assert unchecked.result.verification is None
    assert unchecked.stages.titles[-1] == "quantize and write"
    assert unchecked.result.path.read_bytes() == run.result.path.read_bytes()
    assert unchecked.result.written == replace(run.result.written, path=unchecked.result.path)


# Choices


def test_candidates_are_tried(tmp_path: Path) -> None:
    """Head size 16 cannot lose a quarter on the grid of 8: either the MLP loses it, or the heads lose half."""
    run = reduced(write_model(tmp_path / "pico", intermediate_size=320), tmp_path / "m.gguf", quant="q4_0")
    result = run.result
    assert {(c.dimensions.head_dim, c.dimensions.intermediate_size) for c, _ in result.tried} == {(16, 224), (8, 256)}
    assert "choose dimensions" in run.stages.titles
    best = min(result.tried, key=lambda pair: pair[1])
    assert result.choice == best[0]
    assert all(kl > 0 for _, kl in result.tried)
    assert open_gguf(result.path).config.intermediate_size == result.choice.dimensions.intermediate_size
    run.stages.check_totals()
    for choice, kl in result.tried:
        verdict = "chosen" if choice == result.choice else "not chosen"
        assert f"MLP size {choice.dimensions.intermediate_size}: KL {kl:.3f} in a trial, {verdict}" in table(result)


def test_shortfall_is_said(sources: dict[str, Path], tmp_path: Path) -> None:
    result = reduced(sources["llama"], tmp_path / "m.gguf", ratio=0.9, verify_file=False).result
    assert result.choice.achieved < 0.89
    assert any(note.startswith("asked for 90.0%, achieved ") for note in result.notes)


def test_without_llama_cpp(sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "available", lambda: False)
    result = reduced(sources["llama"], tmp_path / "m.gguf").result
    assert result.path.is_file()
    assert result.verification is None
    assert any('pip install "a3q[verify]"' in note for note in result.notes)


@pytest.mark.parametrize(
    ("source", "ratio", "quant", "name"),
    [
        ("Llama-3.2-1B.Q4_1.gguf", 0.25, "4bit", "Llama-3.2-1B-a3q25-Q4_0.gguf"),
        ("smol-F16.gguf", 0.1, "f16", "smol-a3q10-F16.gguf"),
        ("smol-Q4_K_M.gguf", 0, "8bit", "smol-Q8_0.gguf"),
        ("plain.gguf", 0, "bf16", "plain-BF16.gguf"),
    ],
)
def test_default_name(sources: dict[str, Path], source: str, ratio: float, quant: str, name: str) -> None:
    model = open_model(sources["llama"])
    named = replace(model, source=replace(model.source, path=Path("some") / source, format="gguf"))
    assert default_name(named, ratio, resolve_quant(quant)) == name
    assert default_name(model, ratio, resolve_quant(quant)).startswith("llama-")


def test_default_output_is_in_the_current_folder(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    convert(sources["llama"], ratio=0, quant="f16", verify_file=False)
    assert [path.name for path in tmp_path.iterdir()] == ["llama-F16.gguf"]
    with pytest.raises(InputError, match=r"llama-F16\.gguf: exists already; use --force"):
        convert(sources["llama"], ratio=0, quant="f16", verify_file=False)


def test_output_in_place_of_its_source(sources: dict[str, Path], tmp_path: Path) -> None:
    """With force, the file that is being read may be the one that is replaced."""
    source = tmp_path / "m.gguf"
    write_gguf(open_huggingface(sources["llama"]), resolve_quant("f32"), source)
    expected = reduced(shutil.copy(source, tmp_path / "copy.gguf"), tmp_path / "out.gguf", verify_file=False).result
    replaced = reduced(source, source, verify_file=False, force=True).result
    assert tensor_bytes(replaced.path) == tensor_bytes(expected.path)


# Failures


FAILURES: dict[str, tuple[str, BaseException]] = {
    "check fails": ("verify", VerifyError("it is wrong")),
    "check is interrupted": ("verify", KeyboardInterrupt()),
    "check breaks": ("verify", RuntimeError("a defect")),
    "writer is interrupted": ("writer", KeyboardInterrupt()),
    "writer has no disk": ("writer", OSError(28, "No space left on device")),
    "reduction is interrupted": ("reduce", KeyboardInterrupt()),
}


@pytest.mark.parametrize("old", [None, b"old"])
@pytest.mark.parametrize(("where", "error"), FAILURES.values(), ids=FAILURES)
def test_failures_leave_what_was_there(
    sources: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    error: BaseException,
    old: bytes | None,
) -> None:
    path = tmp_path / "m.gguf"
    if old is not None:
        path.write_bytes(old)
    reached: list[list[str]] = []

    def fail(*_: object, **__: object) -> None:
        reached.append([entry.name for entry in tmp_path.iterdir()])
        raise error

    if where == "writer":
        monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", fail)
    else:
        monkeypatch.setattr(pipeline, where, fail)
        monkeypatch.setattr(runtime, "available", lambda: True)
    expected = InputError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected) as caught:
        reduced(sources["llama"], path, force=True)
    assert len(reached) == 1
    # There was something to clean up.
    assert any("m.gguf." in name for name in reached[0]) == (where != "reduce")
    assert [(entry.name, entry.read_bytes()) for entry in tmp_path.iterdir()] == (
        [] if old is None else [("m.gguf", old)]
    )
    assert ".unverified" not in str(caught.value)
    assert ".part" not in str(caught.value)


@needs_llama_cpp
def test_failed_check_names_the_output(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong weights get into the file: the check in llama.cpp finds them, and the file does not get its name."""
    other = open_model(write_model(tmp_path / "other", seed=1, **SIZE))

    def write_other(_model: Model, *args: Any, **options: Any) -> Any:
        return write_gguf(other, *args, **options)

    monkeypatch.setattr(pipeline, "write_gguf", write_other)
    path = tmp_path / "m.gguf"
    with pytest.raises(VerifyError) as caught:
        reduced(sources["llama"], path, ratio=0)
    assert str(caught.value).startswith(f"{path}: llama.cpp's predictions are ")
    assert [entry.name for entry in tmp_path.iterdir()] == ["other"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": -0.1}, r"--ratio -0\.1"),
        ({"ratio": 0.91}, r"--ratio 0\.91"),
        ({"ratio": math.nan}, "--ratio nan"),
        ({"quant": "q9"}, "'q9'"),
        ({"device": "abacus"}, "--device abacus"),
        ({"device": "cuda:99"}, "--device cuda:99"),
        ({"seed": -1}, "--seed -1"),
        ({"seed": 2**32}, "--seed 4294967296"),
        ({"output": "."}, "is a folder"),
        ({"output": "absent/m.gguf"}, "absent"),
    ],
)
def test_bad_options_are_refused_before_the_model_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipeline, "open_model", lambda *_: pytest.fail("the model was opened"))
    with pytest.raises(InputError, match=message):
        convert("model", **options)
    assert not list(tmp_path.iterdir())


def test_calibration_tokens_must_be_positive(sources: dict[str, Path], tmp_path: Path) -> None:
    for count in (0, -5):
        with pytest.raises(InputError, match=f"--calib-tokens {count}: "):
            reduced(sources["llama"], tmp_path / "m.gguf", calib_tokens=count)
    assert not list(tmp_path.iterdir())


def test_one_calibration_token_is_one_window(sources: dict[str, Path], tmp_path: Path) -> None:
    result = reduced(sources["llama"], tmp_path / "m.gguf", calib_tokens=1, verify_file=False).result
    assert value(result.path, "a3q.calibration.tokens") == 256
