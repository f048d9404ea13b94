"""Whole conversions of tiny models: what the written file computes and says, and what a failure leaves behind."""

from __future__ import annotations

import hashlib
import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor

from a3q import InputError, Result, VerifyError, __version__, convert, pipeline, reduce_to_folder, runtime, to_gguf
from a3q.dimensions import Request
from a3q.forward import hidden_states, output_logits
from a3q.gguf_types import TypeRequest
from a3q.model import Layer, Model
from a3q.runtime import LlamaRuntime
from a3q.to_gguf import default_name
from converters.gguf_reader import open_gguf
from converters.gguf_writer import GGUFStream, write_gguf
from converters.hf_reader import open_huggingface
from converters.open import open_model
from converters.types import resolve_quant
from tests.a3q.stages import Recorded
from tests.pico import LLAMA3_ROPE, Kind, corpus, write_model

CPU = torch.device("cpu")
SIZE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "dtype": torch.float16}
"""Heads of size 32, so that a quarter is on the grid of every type: 24, and 192 MLP units."""
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied-scaled": {"tied": True, "rope": LLAMA3_ROPE},
    "qwen2": {"kind": "qwen2"},
    "qwen2-tied": {"kind": "qwen2", "tied": True},
    # Not called after its kind: a model named phi3 llama.cpp takes for one with Phi 3's tokens.
    "phee": {"kind": "phi3"},
}
RUNS = [
    ("llama", "self", "uniform"),
    ("llama", "text", "mixed"),
    ("llama-tied-scaled", "text", "uniform"),
    ("llama-tied-scaled", "self", "mixed"),
    ("qwen2", "text", "uniform"),
    ("qwen2-tied", "self", "uniform"),
    ("qwen2-tied", "text", "mixed"),
    ("phee", "text", "uniform"),
    ("phee", "text", "mixed"),
]
CALIB_TOKENS = 1024
needs_llama_cpp = pytest.mark.skipif(not runtime.available(), reason="llama.cpp is not installed")


@dataclass(frozen=True)
class Run:
    """A conversion, what it was made from, and the stages it went through."""

    source: Path
    calib: str | list[str]
    ranks: str
    result: Result
    stages: Recorded


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    (folder / "text.txt").write_text("\n".join(corpus(400, seed=7)))
    return {name: write_model(folder / name, **SIZE, **options) for name, options in KINDS.items()}


@pytest.fixture(scope="module")
def text(sources: dict[str, Path]) -> Path:
    return sources["llama"].with_name("text.txt")


@pytest.fixture(scope="module", params=RUNS, ids="-".join)
def run(
    request: pytest.FixtureRequest,
    sources: dict[str, Path],
    text: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Run:
    """A quarter taken away, written as F16."""
    kind, calib, ranks = request.param
    path = tmp_path_factory.mktemp("out") / "m.gguf"
    with pytest.MonkeyPatch.context() as patch:
        # Every stage is seen, whatever ran before.
        patch.setenv("XDG_CACHE_HOME", str(path.with_name("cache")))
        return reduced(sources[kind], path, "self" if calib == "self" else str(text), ranks=ranks)


def reduced(
    source: Path, output: Path, calib: str | list[str] = "self", *, ranks: str = "uniform", **options: Any
) -> Run:
    stages = Recorded()
    given: dict[str, Any] = {"ratio": 0.25, "quant": "f16", "calib_tokens": CALIB_TOKENS, "device": "cpu"}
    result = convert(source, output=output, calib=calib, ranks=ranks, stages=stages, **(given | options))
    return Run(source, calib, ranks, result, stages)


def sizes(model: Model) -> list[tuple[int, int, int]]:
    """Inner sizes of each layer."""
    return [(shape.qk_head_dim, shape.v_head_dim, shape.intermediate_size) for shape in model.config.layers]


def rounded(model: Model) -> object:
    """Its configuration without what float32 rounds in a file."""
    layers = tuple(replace(shape, frequencies=()) for shape in model.config.layers)
    return replace(model.config, layers=layers, norm_eps=0)


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
    assert (result.reduced, result.job.plan.achieved, result.job.tried) == (result.original, 0, ())
    stages.check_totals()
    assert value(result.path, "a3q.ratio") == 0
    assert not {"a3q.qk_head_dim", "a3q.calibration.source", "general.base_model.count"} & set(
        gguf.GGUFReader(result.path).fields
    )


def test_nothing_is_calibrated_that_serves_nothing(sources: dict[str, Path], tmp_path: Path) -> None:
    run = reduced(sources["llama"], tmp_path / "m.gguf", ratio=0, verify_file=False)
    assert run.stages.titles == ["hash the source", "write"]
    assert run.result.verification is None
    for mine, theirs in zip(open_gguf(run.result.path).layers, open_model(run.source).layers, strict=True):
        assert all(torch.equal(mine[role], theirs[role]) for role in theirs)


# A reduced file


def test_file_is_the_model_in_memory(run: Run) -> None:
    written = open_model(run.result.written.path)
    assert run.result.path == run.result.written.path
    model = run.result.reduced
    assert sizes(written) == sizes(model)
    if run.ranks == "uniform":
        assert sizes(model) == [(24, 24, 192)] * 2
    else:
        assert len({(qk, v) for qk, v, _ in sizes(model)}) == 1
        assert run.result.job.plan.achieved == pytest.approx(0.25, abs=0.07)
        assert run.result.job.plan.achieved >= 0.25
    assert rounded(written) == replace(rounded(model), tie_word_embeddings=written.config.tie_word_embeddings)
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
    original, plan = run.result.original, run.result.job.plan
    heads, _, _ = sizes(run.result.reduced)[0]
    units = [one for _, _, one in sizes(run.result.reduced)]
    same = len(set(units)) == 1
    architecture = "llama" if same else "deci"
    assert fields["general.architecture"] == architecture
    assert {key.partition(".")[2]: fields[key] for key in fields if key.startswith(f"{architecture}.")} == {
        "block_count": 2,
        "context_length": 256,
        "embedding_length": 128,
        "feed_forward_length": units[0] if same else units,
        "vocab_size": 512,
        "attention.head_count": 4 if same else [4, 4],
        "attention.head_count_kv": 2 if same else [2, 2],
        "attention.key_length": heads,
        "attention.value_length": heads,
        "attention.layer_norm_rms_epsilon": pytest.approx(original.config.norm_eps),
        "rope.dimension_count": heads,
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
    assert {key: fields[key] for key in fields if key.startswith("a3q.")} == {
        "a3q.version": __version__,
        "a3q.ratio": 0.25,
        "a3q.ratio_achieved": pytest.approx(plan.achieved),
        "a3q.method": "a3q",
        "a3q.ranks": run.ranks,
        "a3q.components": ["qk", "ov", "mlp"],
        "a3q.quantization": "f16",
        "a3q.quantizer": "plain",
        "a3q.source.name": name,
        "a3q.source.files": [weights.name],
        "a3q.source.sha256": [hashlib.sha256(weights.read_bytes()).hexdigest()],
        "a3q.qk_head_dim": heads,
        "a3q.v_head_dim": heads,
        "a3q.intermediate_size": units[0] if same else units,
        "a3q.calibration.source": "self" if run.calib == "self" else "text.txt",
        "a3q.calibration.tokens": CALIB_TOKENS,
        "a3q.calibration.seed": 0,
    }


def test_stages_advance_by_their_total(run: Run) -> None:
    text_stage = "write calibration text" if run.calib == "self" else "read calibration text"
    weighing = ["weigh the layers"] if run.ranks == "mixed" else []
    expected = ["hash the source", text_stage, *weighing, "reduce", "write", "verify in llama.cpp"]
    assert run.stages.titles == expected[: None if runtime.available() else -1]
    assert list(run.result.seconds) == run.stages.titles
    run.stages.check_totals()


def test_provenance_survives_a_second_conversion(sources: dict[str, Path], tmp_path: Path) -> None:
    """A reduced GGUF as the source: read as any other; the record of its reduction stays, since it is still true."""
    first = reduced(sources["qwen2"], tmp_path / "first.gguf", verify_file=False).result
    second = convert(first.path, ratio=0, quant="q8_0", output=tmp_path / "second.gguf", device="cpu").path
    assert open_gguf(second).config == open_gguf(first.path).config
    assert value(second, "a3q.source.sha256") == list(first.written.sha256)
    assert value(second, "a3q.quantization") == "q8_0"
    for key in ("ratio", "ratio_achieved", "qk_head_dim", "calibration.tokens"):
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
    assert run.result.job.calibration is not None
    for part in ("2 × 256 tokens that the model wrote itself", "2 × 256 tokens of text.txt"):
        assert part in run.result.job.calibration.description
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
    unchecked = reduced(run.source, tmp_path / "m.gguf", run.calib, ranks=run.ranks, verify_file=False)
    assert unchecked.result.verification is None
    assert unchecked.stages.titles[-1] == "write"
    assert unchecked.result.path.read_bytes() == run.result.path.read_bytes()
    path = unchecked.result.path
    assert unchecked.result.written == replace(run.result.written, path=path, files=(path,))


# Choices


def test_candidates_are_tried(tmp_path: Path) -> None:
    """Head size 16 cannot lose a quarter on the grid of 8: either the MLP loses it, or the heads lose half."""
    run = reduced(write_model(tmp_path / "pico", intermediate_size=320), tmp_path / "m.gguf", quant="q4_0")
    result = run.result
    tried = {(p.dimensions[0].qk_head_dim, p.dimensions[0].intermediate_size) for p, _ in result.job.tried}
    assert tried == {(16, 224), (8, 256)}
    assert "choose dimensions" in run.stages.titles
    assert result.job.plan == min(result.job.tried, key=lambda pair: pair[1])[0]
    assert all(kl > 0 for _, kl in result.job.tried)
    assert sizes(open_gguf(result.path)) == sizes(result.reduced)
    run.stages.check_totals()


def test_shortfall_is_said(sources: dict[str, Path], tmp_path: Path) -> None:
    result = reduced(sources["llama"], tmp_path / "m.gguf", ratio=0.9, verify_file=False).result
    assert result.job.plan.achieved < 0.89
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
        ("Llama-3.2-1B.Q4_1.gguf", 0.25, "4bit", "Llama-3.2-1B-a3q25-Q4_K_M.gguf"),
        ("smol-F16.gguf", 0.1, "f16", "smol-a3q10-F16.gguf"),
        ("smol-Q4_K_M.gguf", 0, "8bit", "smol-Q8_0.gguf"),
        ("plain.gguf", 0, "bf16", "plain-BF16.gguf"),
    ],
)
def test_default_name(sources: dict[str, Path], source: str, ratio: float, quant: str, name: str) -> None:
    model, request = open_model(sources["llama"]), TypeRequest(resolve_quant(quant))
    named = replace(model, source=replace(model.source, path=Path("some") / source, format="gguf"))
    asked = Request(ratio)
    assert default_name(named, asked, request) == name
    assert default_name(model, asked, request).startswith("llama-")
    cached = Path("hub") / "models--org--Smol-135M" / "snapshots" / "0123abcd"
    model = replace(model, source=replace(model.source, path=cached))
    assert default_name(model, asked, request).startswith("Smol-135M-")
    assert "-a3qkv50-" in default_name(model, Request(0.0, kv=0.5), request)


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
        monkeypatch.setattr("converters.gguf_writer.write_at", fail)
    else:
        monkeypatch.setattr(to_gguf if where == "verify" else pipeline, where, fail)
        monkeypatch.setattr(runtime, "available", lambda: True)
    expected = InputError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected) as caught:
        reduced(sources["llama"], path, force=True)
    assert len(reached) == 1
    # There was something to clean up.
    assert any("m.gguf." in name for name in reached[0])
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

    write_layer = GGUFStream.write_layer

    def write_other(stream: GGUFStream, i: int, _layer: Layer, packed: Any = None) -> None:
        write_layer(stream, i, other.layers[i], packed)

    monkeypatch.setattr(GGUFStream, "write_layer", write_other)
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
        ({"ranks": "some"}, "--ranks some"),
        ({"method": "svd"}, "--method svd"),
        ({"own_ratios": {"OV": 1.5}}, r"--ratio-ov 1\.5"),
        ({"calib_tokens": 0}, "--calib-tokens 0"),
        ({"calib_tokens": -5}, "--calib-tokens -5"),
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
    monkeypatch.setattr(to_gguf, "open_model", lambda *_: pytest.fail("the model was opened"))
    with pytest.raises(InputError, match=message):
        convert("model", **options)
    assert not list(tmp_path.iterdir())


def test_one_calibration_token_is_one_window(sources: dict[str, Path], tmp_path: Path) -> None:
    result = reduced(sources["llama"], tmp_path / "m.gguf", calib_tokens=1, verify_file=False).result
    assert value(result.path, "a3q.calibration.tokens") == 256


# Mixed sizes, other families, other sources


def test_layers_of_different_sizes(sources: dict[str, Path], text: Path, tmp_path: Path) -> None:
    """The file is deci's, and a conversion of it is one again."""
    run = reduced(sources["llama"], tmp_path / "m.gguf", str(text), ranks="mixed", components={"MLP"}, ratio=0.3)
    units = [one for _, _, one in sizes(run.result.reduced)]
    assert len(set(units)) > 1
    assert (value(run.result.path, "general.architecture"), value(run.result.path, "a3q.components")) == (
        "deci",
        ["mlp"],
    )
    again = convert(run.result.path, ratio=0, quant="8bit", output=tmp_path / "again.gguf", device="cpu")
    assert value(again.path, "deci.feed_forward_length") == units
    smaller = reduced(run.result.path, tmp_path / "smaller.gguf", str(text), ranks="mixed", components={"MLP"})
    assert smaller.result.job.plan.achieved >= 0.25
    assert all(0 < n <= m for (_, _, n), m in zip(sizes(smaller.result.reduced), units, strict=True))


@pytest.mark.parametrize("quant", ["4bit", "8bit", "bf16", "q4_1"])
def test_mixed_in_every_type(sources: dict[str, Path], text: Path, tmp_path: Path, quant: str) -> None:
    result = reduced(sources["llama"], tmp_path / "m.gguf", str(text), ranks="mixed", quant=quant).result
    assert sizes(open_gguf(result.path)) == sizes(result.reduced)
    assert all(n % 32 == 0 for size in sizes(result.reduced) for n in size[2:])
    assert result.type_name == resolve_quant(quant).name.upper()
    if result.verification is not None:
        assert result.verification.kl_to_reduced < {"8bit": 0.02, "bf16": 0.01}.get(quant, 0.5)


@pytest.mark.parametrize("kind", ["qwen3", "gemma3", "olmo2", "gpt_neox", "gpt2", "mpt"])
def test_families_of_which_only_the_mlp_shrinks(tmp_path: Path, text: Path, kind: Kind) -> None:
    options = {} if kind == "mpt" else {"intermediate_size": 256}
    source = write_model(tmp_path / kind, kind, **options)
    run = reduced(source, tmp_path / "m.gguf", str(text), ranks="mixed")
    before = sizes(run.result.original)
    assert sizes(run.result.reduced) == [(qk, v, 192) for qk, v, _ in before]
    assert run.result.job.plan.per_component == {"QK": 0, "OV": 0, "MLP": 0.25}
    assert [note for note in run.result.notes if f"runs {kind} only with heads as they are" in note]
    assert value(run.result.path, "a3q.components") == ["mlp"]
    assert value(run.result.path, "general.architecture") == run.result.original.family.gguf.writes  # type: ignore[union-attr]
    assert "weigh the layers" not in run.stages.titles
    if run.result.verification is not None:
        assert run.result.verification.kl_to_reduced < 1e-3
    run.stages.check_totals()
    with pytest.raises(
        InputError, match=rf"cannot hold qk of {kind} reduced; take --components mlp, or .* a3q reduce$"
    ):
        reduced(source, tmp_path / "n.gguf", str(text), components={"QK", "MLP"})


def test_opt_has_no_gguf(tmp_path: Path) -> None:
    source = write_model(tmp_path / "opt", "opt")
    for ratio in (0, 0.25):
        stages = Recorded()
        with pytest.raises(InputError, match=r"^[^\n]*no architecture for opt[^\n]* a3q reduce$"):
            convert(source, ratio=ratio, output=tmp_path / "m.gguf", device="cpu", stages=stages)
        # Before any work is done.
        assert stages.seen == []


@pytest.mark.parametrize("options", [{}, {"components": {"QK"}}, {"components": {"MLP"}, "own_ratios": {"QK": 0.5}}])
def test_paper_qk_fits_no_gguf(sources: dict[str, Path], tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"^--method paper: .*; take --components mlp, or .* a3q reduce$"):
        reduced(sources["llama"], tmp_path / "m.gguf", method="paper", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ranks", ["mixed", "uniform"])
def test_paper_of_the_mlp(sources: dict[str, Path], text: Path, tmp_path: Path, ranks: str) -> None:
    run = reduced(sources["llama"], tmp_path / "m.gguf", str(text), method="paper", ranks=ranks, components={"MLP"})
    assert value(run.result.path, "a3q.method") == "paper"
    assert run.result.job.plan.achieved == pytest.approx(0.25, abs=0.07)
    ours = reduced(sources["llama"], tmp_path / "a3q.gguf", str(text), ranks=ranks, components={"MLP"})
    if run.result.verification is not None and ours.result.verification is not None:
        assert run.result.verification.reduced.kl != ours.result.verification.reduced.kl


@pytest.mark.parametrize(
    "options", [{"components": {"QK"}}, {"own_ratios": {"QK": 0.5}}, {"components": {"OV", "MLP"}, "ranks": "mixed"}]
)
def test_keys_and_values_have_one_size(sources: dict[str, Path], tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"one size for keys and values .* reduce QK and OV alike"):
        reduced(sources["llama"], tmp_path / "m.gguf", **options)
    assert list(tmp_path.iterdir()) == []


def test_ratios_of_their_own(sources: dict[str, Path], text: Path, tmp_path: Path) -> None:
    own = {"QK": 0.5, "OV": 0.5, "MLP": 0.25}
    result = reduced(sources["llama"], tmp_path / "m.gguf", str(text), ratio=0, own_ratios=own).result
    assert sizes(result.reduced) == [(16, 16, 192)] * 2
    assert value(result.path, "a3q.ratio") == pytest.approx(result.job.plan.asked)
    assert value(result.path, "general.name") == f"Llama A3Q {result.job.plan.asked:.0%}"


def folder(source: Path, output: Path, text: Path, **options: Any) -> Path:
    given: dict[str, Any] = {"calib": str(text), "calib_tokens": CALIB_TOKENS, "device": "cpu", "verify_output": False}
    return reduce_to_folder(source, output=output, **(given | options)).path


def test_shared_frequencies_fit_a_gguf(sources: dict[str, Path], text: Path, tmp_path: Path) -> None:
    path = folder(sources["llama"], tmp_path / "shared", text, frequencies="shared", ranks="uniform", dtype="f32")
    result = convert(path, ratio=0, quant="f16", output=tmp_path / "m.gguf", device="cpu")
    assert sizes(open_gguf(result.path)) == sizes(open_model(path)) == [(24, 24, 192)] * 2
    if result.verification is not None:
        assert result.verification.kl_to_reduced < 1e-4
    # MLPs of different sizes too.
    path = folder(sources["llama"], tmp_path / "mlp", text, components={"MLP"}, ratio=0.4)
    result = convert(path, ratio=0, quant="f16", output=tmp_path / "mlp.gguf", device="cpu")
    assert sizes(open_gguf(result.path)) == sizes(open_model(path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": "uniform"}, r"has RoPE frequencies for each key head; .*--frequencies shared"),
        ({"components": {"QK"}}, "has heads of size .*; reduce with a3q reduce --frequencies shared"),
        ({"own_ratios": {"OV": 0.5}, "ranks": "uniform"}, "has heads of size 16 to 24, not of"),
    ],
)
def test_what_no_gguf_holds(
    sources: dict[str, Path], text: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    path = folder(sources["llama"], tmp_path / "folder", text, **options)
    stages = Recorded()
    with pytest.raises(
        InputError, match=f"folder: llama.cpp's llama cannot hold this model, which {message}"
    ) as caught:
        convert(path, ratio=0, output=tmp_path / "m.gguf", device="cpu", stages=stages)
    assert "\n" not in str(caught.value)
    assert stages.seen == []
