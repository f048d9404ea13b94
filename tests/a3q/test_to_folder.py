"""Reduction to a Hugging Face folder: what transformers makes of it, what it says of itself, what failures leave."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from a3q import InputError, Result, VerifyError, __version__, convert, reduce_to_folder, to_folder
from a3q.forward import hidden_states, output_logits
from a3q.model import Model
from a3q.report import render
from converters.gguf_reader import open_gguf
from converters.gguf_writer import write_gguf
from converters.hf_writer import write_huggingface
from converters.open import open_model
from converters.types import resolve_quant
from tests.a3q.stages import Recorded
from tests.pico import Kind, corpus, write_model

CPU = torch.device("cpu")
RUNS: list[tuple[Kind, str, str]] = [
    ("llama", "mixed", "f32"),
    ("llama", "uniform", "bf16"),
    ("gpt2", "mixed", "f32"),
    ("gpt_neox", "mixed", "f32"),
    ("qwen3", "mixed", "f32"),
    ("qwen3", "uniform", "f16"),
    ("gemma3", "mixed", "f32"),
    ("mpt", "mixed", "f32"),
    ("opt", "mixed", "f32"),
]
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Run:
    """A reduction, what it was made from, and the stages it went through."""

    source: Path
    ranks: str
    dtype: str
    result: Result
    stages: Recorded


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    (folder / "text.txt").write_text("\n".join(corpus(400, seed=7)))
    return {kind: write_model(folder / kind, kind) for kind in dict.fromkeys(kind for kind, _, _ in RUNS)}


@pytest.fixture(scope="module")
def text(sources: dict[str, Path]) -> Path:
    return sources["llama"].with_name("text.txt")


@pytest.fixture(scope="module", params=RUNS, ids="-".join)
def run(
    request: pytest.FixtureRequest, sources: dict[str, Path], text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Run:
    kind, ranks, dtype = request.param
    path = tmp_path_factory.mktemp("out") / "m"
    with pytest.MonkeyPatch.context() as patch:
        # Every stage is seen, whatever ran before.
        patch.setenv("XDG_CACHE_HOME", str(path.with_name("cache")))
        return reduced(sources[kind], path, text, ranks=ranks, dtype=dtype)


def reduced(source: Path, output: Path | None, text: Path, **options: Any) -> Run:
    stages = Recorded()
    given: dict[str, Any] = {"ratio": 0.25, "calib": str(text), "calib_tokens": 1024, "device": "cpu", "dtype": "f32"}
    given = {"ranks": "mixed"} | given | options
    result = reduce_to_folder(source, output=output, stages=stages, **given)
    return Run(source, given["ranks"], given["dtype"], result, stages)


def logits(model: Model, ids: Tensor) -> Tensor:
    return output_logits(model, hidden_states(model, ids, CPU), CPU)


def some_ids() -> Tensor:
    return torch.randint(2, 512, (1, 64), generator=torch.Generator().manual_seed(1))


def config(folder: Path) -> dict[str, Any]:
    content = json.loads((folder / "config.json").read_text())
    assert isinstance(content, dict)
    return content


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


# A reduced folder


@torch.no_grad()
def test_transformers_computes_what_is_in_memory(run: Run) -> None:
    opened = AutoModelForCausalLM.from_pretrained(run.result.path, dtype=torch.float32)
    ids = some_ids()
    ours, theirs = logits(run.result.reduced, ids), opened(ids).logits
    difference = (theirs - ours).square().mean().sqrt()
    assert difference < {"f32": 1e-4, "f16": 2e-2, "bf16": 0.2}[run.dtype]
    # The comparison can tell: the original is far from both.
    assert (theirs - logits(run.result.original, ids)).square().mean().sqrt() > 0.1
    generated = opened.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    assert generated.shape[1] <= 72
    assert "quick" in AutoTokenizer.from_pretrained(run.result.path).decode(
        AutoTokenizer.from_pretrained(run.result.path)("the quick fox").input_ids
    )


def test_verification(run: Run) -> None:
    check = run.result.verification
    assert check is not None
    assert check.runtime == "transformers"
    assert check.kl_to_reduced < {"f32": 1e-9, "f16": 1e-5, "bf16": 1e-3}[run.dtype]
    assert check.written.kl == pytest.approx(check.reduced.kl, rel=0.02)
    assert check.reduced.kl is not None
    assert check.reduced.kl > 0
    assert check.original.kl is None
    assert check.scored_tokens > 100
    assert check.written.perplexity.value == pytest.approx(check.reduced.perplexity.value, rel=1e-2)


def test_sizes(run: Run) -> None:
    plan, shapes = run.result.job.plan, run.result.reduced.config.layers
    assert plan.achieved == pytest.approx(0.25, abs=0.03)
    found = config(run.result.path)
    assert found["qk_head_dim"] == [shape.qk_head_dim for shape in shapes]
    assert found["v_head_dim"] == [shape.v_head_dim for shape in shapes]
    assert found["intermediate_size"] == [shape.intermediate_size for shape in shapes]
    assert found["dtype"] == str(DTYPES[run.dtype]).removeprefix("torch.")
    assert run.result.type_name == run.dtype.upper()
    assert open_model(run.result.path).config == run.result.reduced.config
    if run.ranks == "uniform":
        # Queries and keys that pass a norm stay unless they are asked for.
        qk = 12 if "QK" in plan.request.reduced else 16
        assert {(one.qk_head_dim, one.v_head_dim, one.intermediate_size) for one in shapes} == {(qk, 12, 72)}


def test_keys_keep_frequencies_of_their_own(sources: dict[str, Path], text: Path, tmp_path: Path) -> None:
    for frequencies, lists in (("per_head", 2), ("shared", 1)):
        path = reduced(
            sources["llama"],
            tmp_path / frequencies,
            text,
            ranks="uniform",
            frequencies=frequencies,
            verify_output=False,
        ).result.path
        assert [len(layer) for layer in config(path)["frequencies"]] == [lists] * 2
    with pytest.raises(InputError, match=r"--frequencies shared: .* for each key head already; reduce the original"):
        reduced(tmp_path / "per_head", tmp_path / "again", text, frequencies="shared")


def test_provenance(run: Run) -> None:
    plan, weights = run.result.job.plan, run.source / "model.safetensors"
    record = config(run.result.path)["reduction"]
    sizes = {key: record.pop(key) for key in ("qk_head_dim", "v_head_dim", "intermediate_size")}
    assert record == {
        "version": __version__,
        "source.name": run.result.original.metadata["general.name"].value,
        "source.files": ["model.safetensors"],
        "source.sha256": [hashlib.sha256(weights.read_bytes()).hexdigest()],
        "ratio": 0.25,
        "ratio_achieved": plan.achieved,
        "method": "a3q",
        "ranks": run.ranks,
        "components": [c.lower() for c in ("QK", "OV", "MLP") if c in plan.request.reduced],
        "calibration.source": "text.txt",
        "calibration.tokens": 1024,
        "calibration.seed": 0,
    }
    for key, size in sizes.items():
        meant = [getattr(shape, key) for shape in run.result.reduced.config.layers]
        assert size in (meant, meant[0])


def test_stages_advance_by_their_total(run: Run) -> None:
    weighing = ["weigh the layers"] if run.ranks == "mixed" else []
    trying = ["choose dimensions"] if run.result.job.tried else []
    expected = ["hash the source", "read calibration text", *weighing, *trying, "reduce", "write"]
    assert run.stages.titles == [*expected, "verify in transformers"]
    assert list(run.result.seconds) == run.stages.titles
    run.stages.check_totals()


def test_no_bar_but_those_of_a3q(
    sources: dict[str, Path], text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()
    reduced(sources["llama"], tmp_path / "m", text)
    assert capfd.readouterr() == ("", "")


def test_shared_frequencies_make_a_folder_that_converts(sources: dict[str, Path], text: Path, tmp_path: Path) -> None:
    """With sizes that differ between layers as well, since only the MLP's may."""
    path = reduced(sources["llama"], tmp_path / "m", text, frequencies="shared", ratio=0.4).result.path
    config_ = open_model(path).config
    assert len({(one.qk_head_dim, one.v_head_dim, one.frequencies) for one in config_.layers}) == 1
    converted = convert(path, ratio=0, quant="f16", output=tmp_path / "m.gguf", device="cpu", verify_file=False)
    assert converted.reduced.config == config_


def test_the_paper_reduces_all_layers_alike(sources: dict[str, Path], text: Path, tmp_path: Path) -> None:
    result = reduced(sources["llama"], tmp_path / "m", text, method="paper", ranks=None).result
    assert config(result.path)["reduction"]["ranks"] == "uniform"
    shapes = result.reduced.config.layers
    assert {(one.qk_head_dim, one.v_head_dim, one.intermediate_size) for one in shapes} == {(12, 12, 72)}
    with pytest.raises(InputError, match="--frequencies shared: the paper's method selects them"):
        reduced(sources["llama"], tmp_path / "n", text, method="paper", frequencies="shared")


def test_a_model_too_large_for_memory_is_not_given_to_transformers(
    sources: dict[str, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("a3q.verify.free_memory", lambda: 1 << 19)
    monkeypatch.setattr("a3q.verify._transformers_logits", None)
    result = reduced(sources["llama"], tmp_path / "m", text, dtype="f32").result
    assert result.verification is not None
    assert result.verification.runtime == "a3q"
    assert result.verification.kl_to_reduced < 1e-4
    shown = io.StringIO()
    Console(file=shown, width=200).print(render(result))
    assert "too large for transformers" in shown.getvalue()


# Options


@pytest.mark.parametrize(("dtype", "size"), [("f32", 4), ("f16", 2), ("bf16", 2)])
def test_types(sources: dict[str, Path], text: Path, tmp_path: Path, dtype: str, size: int) -> None:
    result = reduced(sources["llama"], tmp_path / "m", text, dtype=dtype, verify_output=False).result
    assert result.verification is None
    assert sum(file.stat().st_size for file in result.path.glob("*.safetensors")) == pytest.approx(
        size * result.reduced.parameters(), abs=8192
    )
    assert result.written.size == sum(file.stat().st_size for file in result.path.iterdir())


@pytest.mark.parametrize("method", ["a3q", "paper"])
def test_any_components(sources: dict[str, Path], text: Path, tmp_path: Path, method: str) -> None:
    result = reduced(
        sources["llama"], tmp_path / "m", text, components={"OV"}, own_ratios={"QK": 0.5}, method=method
    ).result
    assert result.job.plan.per_component == pytest.approx({"QK": 0.5, "OV": 0.25, "MLP": 0}, abs=0.07)
    assert config(result.path)["reduction"]["components"] == ["qk", "ov"]
    assert config(result.path)["reduction"]["method"] == method


def test_nothing_reduced_is_the_original(sources: dict[str, Path], tmp_path: Path) -> None:
    for kind in ("llama", "gemma3"):
        stages = Recorded()
        result = reduce_to_folder(
            sources[kind], ratio=0, dtype="f32", output=tmp_path / kind, device="cpu", stages=stages
        )
        assert result.verification is not None
        assert result.verification.kl_to_reduced < 1e-9
        assert stages.titles == ["hash the source", "write calibration text", "write", "verify in transformers"]
        stages.check_totals()
        for mine, theirs in zip(open_model(result.path).layers, result.original.layers, strict=True):
            assert all(torch.equal(mine[role], theirs[role]) for role in theirs)


def test_same_seed_same_bytes(sources: dict[str, Path], text: Path, tmp_path: Path) -> None:
    paths = [
        reduced(sources["llama"], tmp_path / name, text, verify_output=False, **options).result.path
        for name, options in (("m", {}), ("n", {"memory_budget": 0}))
    ]
    weights = [(path / "model.safetensors").read_bytes() for path in paths]
    assert weights[0] == weights[1]


def test_default_output_is_in_the_current_folder(
    sources: dict[str, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    reduced(sources["llama"], None, text, verify_output=False)
    reduced(sources["llama"], None, text, verify_output=False, components={"MLP"}, own_ratios={"MLP": 0.4})
    assert names(tmp_path) == ["llama-a3q25", "llama-a3q40"]
    monkeypatch.chdir(sources["llama"].parent)
    with pytest.raises(InputError, match="llama: is the model that is read; give another folder"):
        reduce_to_folder("llama", ratio=0, verify_output=False)


def test_a_gguf_is_a_source_too(sources: dict[str, Path], text: Path, tmp_path: Path) -> None:
    path = write_gguf(open_model(sources["llama"]), resolve_quant("f32"), tmp_path / "m.gguf").path
    result = reduced(path, tmp_path / "m", text).result
    assert result.verification is not None
    assert config(result.path)["reduction"]["source.files"] == ["m.gguf"]
    direct = reduced(sources["llama"], tmp_path / "n", text, verify_output=False).result
    for mine, theirs in zip(open_model(result.path).layers, open_model(direct.path).layers, strict=True):
        assert all(mine[role].shape == theirs[role].shape for role in theirs)


def test_record_survives_a_rewrite(sources: dict[str, Path], text: Path, tmp_path: Path) -> None:
    """Folder → folder → GGUF → folder, unreduced from the second on: the record stays, since it is still true."""
    first = reduced(sources["llama"], tmp_path / "first", text, components={"MLP"}, seed=5, verify_output=False).result
    options: dict[str, Any] = {"ratio": 0, "device": "cpu"}
    second = reduce_to_folder(first.path, output=tmp_path / "second", verify_output=False, **options)
    third = convert(second.path, output=tmp_path / "third.gguf", quant="8bit", verify_file=False, **options)
    fourth = reduce_to_folder(third.path, output=tmp_path / "fourth", verify_output=False, **options)
    record = config(first.path)["reduction"]
    assert record["calibration.seed"] == 5
    assert {key.removeprefix("a3q."): one.value for key, one in open_gguf(third.path).metadata.items()}.items() >= {
        "quantization": "q8_0", "calibration.seed": 5, "ranks": "mixed"
    }.items()  # fmt: skip
    for path in (second.path, fourth.path):
        again = config(path)["reduction"]
        assert again.keys() == record.keys()
        for key, value in again.items():
            if not key.startswith("source."):
                # A GGUF holds float32.
                meant = pytest.approx(record[key], rel=1e-6) if isinstance(value, float) else record[key]
                assert value == meant, key


def test_reduced_again(run: Run, text: Path, tmp_path: Path) -> None:
    """An a3q folder as the source, its layers unlike each other already."""
    result = reduced(run.result.path, tmp_path / "again", text, ranks=run.ranks, ratio=0.2).result
    assert result.job.plan.achieved == pytest.approx(0.2, abs=0.04)
    assert result.verification is not None
    assert result.reduced.parameters() < run.result.reduced.parameters()
    assert result.reduced.family.name == run.result.reduced.family.name


def test_converted_afterwards(run: Run, tmp_path: Path) -> None:
    """A GGUF where llama.cpp can hold it; otherwise one line that says why."""
    with pytest.raises(InputError, match=r"no architecture for opt|cannot hold this model, which ") as caught:
        convert(run.result.path, ratio=0, quant="f16", output=tmp_path / "m.gguf", device="cpu")
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == []


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "gpt_neox"])
def test_mlp_alone_converts_afterwards(sources: dict[str, Path], text: Path, tmp_path: Path, kind: Kind) -> None:
    path = reduced(
        sources[kind], tmp_path / "m", text, components={"MLP"}, ranks="uniform", verify_output=False
    ).result.path
    result = convert(path, ratio=0, quant="f16", output=tmp_path / "m.gguf", device="cpu")
    assert [shape.intermediate_size for shape in open_gguf(result.path).config.layers] == [72, 72]
    if result.verification is not None:
        assert result.verification.kl_to_reduced < 1e-4


# Failures


def test_existing_folder(sources: dict[str, Path], text: Path, tmp_path: Path) -> None:
    path = tmp_path / "m"
    for _ in range(2):
        reduced(sources["llama"], path, text, verify_output=False, force=path.exists())
    before = (path / "model.safetensors").read_bytes()
    stages = Recorded()
    with pytest.raises(InputError, match=r"m: exists already; use --force to replace it"):
        reduce_to_folder(sources["llama"], output=path, device="cpu", stages=stages)
    assert stages.seen == []
    reduced(sources["llama"], path, text, force=True, ratio=0.5, verify_output=False)
    assert (path / "model.safetensors").read_bytes() != before
    (path / "thesis.odt").write_text("years of work")
    with pytest.raises(InputError, match=r"m: holds thesis\.odt, so a3q does not replace it"):
        reduced(sources["llama"], path, text, force=True)
    assert names(tmp_path) == ["m"]


FAILURES: dict[str, tuple[str, Callable[[object], BaseException]]] = {
    "check fails": ("a3q.to_folder.verify_folder", lambda folder: VerifyError(f"{folder}: it is wrong")),
    "check cannot read it": ("a3q.to_folder.verify_folder", lambda folder: InputError(f"{folder}/config.json: is odd")),
    "check is interrupted": ("a3q.to_folder.verify_folder", lambda _: KeyboardInterrupt()),
    "check breaks": ("a3q.to_folder.verify_folder", lambda _: RuntimeError("a defect")),
    "writer is interrupted": ("converters.hf_writer.write_files", lambda _: KeyboardInterrupt()),
    "writer has no disk": ("converters.hf_writer.write_files", lambda _: OSError(28, "No space left on device")),
    "reduction is interrupted": ("a3q.pipeline.reduce", lambda _: KeyboardInterrupt()),
}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(("where", "error"), FAILURES.values(), ids=FAILURES)
def test_failures_leave_what_was_there(
    sources: dict[str, Path],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    error: Callable[[object], BaseException],
    old: bool,
) -> None:
    path = tmp_path / "m"
    if old:
        reduced(sources["llama"], path, text, verify_output=False)
    before = {name: (path / name).read_bytes() for name in names(path)} if old else {}
    reached: list[list[str]] = []

    def fail(folder: object, /, *_: object, **__: object) -> None:
        reached.append(names(tmp_path))
        raise error(folder)

    monkeypatch.setattr(where, fail)
    meant = type(error(path))
    with pytest.raises(InputError if meant is OSError else meant) as caught:
        reduced(sources["llama"], path, text, force=True)
    assert len(reached) == 1
    assert any(".part" in name for name in reached[0]) == (not where.endswith("reduce"))
    assert names(tmp_path) == (["m"] if old else [])
    assert before == ({name: (path / name).read_bytes() for name in names(path)} if old else {})
    assert ".part" not in str(caught.value)
    if meant in (InputError, VerifyError):
        assert str(caught.value).startswith(str(path))


def test_wrong_weights_are_found(
    sources: dict[str, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other weights get into the folder: the check finds them, and it does not get its name."""
    other = open_model(write_model(tmp_path / "other", seed=1))

    def write_other(_model: Model, *args: Any, **options: Any) -> Any:
        return write_huggingface(other, *args, **options)

    monkeypatch.setattr(to_folder, "write_huggingface", write_other)
    path = tmp_path / "m"
    with pytest.raises(VerifyError) as caught:
        reduced(sources["llama"], path, text, ratio=0)
    assert str(caught.value).startswith(f"{path}: transformers predicts ")
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["other"]


def test_what_transformers_does_not_load(
    sources: dict[str, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError("no such\nmodel")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", fail)
    path = tmp_path / "m"
    with pytest.raises(VerifyError) as caught:
        reduced(sources["llama"], path, text)
    assert str(caught.value) == f"{path}: transformers does not load the folder: no such model"
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "q4_0"}, "--dtype q4_0: give bf16, f16, f32"),
        ({"frequencies": "own"}, "--frequencies own: give per_head or shared"),
        ({"ratio": 1}, "--ratio 1 is out of range"),
        ({"ranks": "x"}, "--ranks x"),
        ({"device": "abacus"}, "--device abacus"),
        ({"output": "absent/m"}, "create absent"),
        ({"output": "file"}, "is there and no folder"),
    ],
)
def test_bad_options_are_refused_before_the_model_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(to_folder, "open_model", lambda *_: pytest.fail("the model was opened"))
    with pytest.raises(InputError, match=message):
        reduce_to_folder("model", **options)
    assert names(tmp_path) == ["file"]
