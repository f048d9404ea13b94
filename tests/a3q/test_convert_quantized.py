"""Whole conversions that quantize: each type is packed as llama.cpp reads it, and a file is the model in memory."""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from a3q import InputError, Result, convert, runtime
from a3q.model import Model
from a3q.perplexity import compare, logits_of
from a3q.runtime import LlamaRuntime
from a3q.solve.grid import GRIDS
from converters import ggml_encode
from converters.assignment import assign
from converters.entries import entries
from converters.gguf_target import target_for
from converters.gguf_writer import write_gguf
from converters.open import open_model
from converters.types import resolve_quant
from tests.a3q.stages import Recorded
from tests.pico import corpus, write_model

CPU = torch.device("cpu")
BIG: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "dtype": torch.float16}
"""Rows that divide into super-blocks."""
MIXES = ("q4_0", "q4_k_m", "q2_k", "q3_k_m", "q6_k")
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {"tied": True},
    "qwen2": {"kind": "qwen2"},
    "phee": {"kind": "phi3"},
    "gpt2": {"kind": "gpt2"},
    "gpt_neox": {"kind": "gpt_neox"},
    "gemma3": {"kind": "gemma3"},
    "olmo2": {"kind": "olmo2"},
}
needs_llama_cpp = pytest.mark.skipif(not runtime.available(), reason="llama.cpp is not installed")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """llama.cpp's threads wait for each other in loops, which is slow where other work takes a core."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LlamaRuntime, "__init__", partialmethod(LlamaRuntime.__init__, n_threads=1))
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Writes a model of `KINDS`, or a small one, once."""
    folder = tmp_path_factory.mktemp("sources")
    (folder / "text.txt").write_text("\n".join(corpus(400, seed=7)))

    def of(name: str) -> Path:
        path = folder / name
        if not path.exists():
            options = {"hidden_size": 128, "intermediate_size": 256} if name == "small" else {**BIG, **KINDS[name]}
            write_model(path, **options)
        return path

    return of


Source = Callable[[str], Path]


def quantized(source: Path, output: Path, stages: Recorded | None = None, **options: Any) -> Result:
    """Nothing reduced, calibrated on 1024 tokens."""
    given: dict[str, Any] = {"ratio": 0, "calib": str(source.with_name("text.txt")), "calib_tokens": 1024}
    done = convert(source, output=output, device="cpu", stages=stages or Recorded(), **(given | options))
    return done


def types(path: Path) -> dict[str, str]:
    """Type of each tensor in a file."""
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


def check_same(written: Model, memory: Model, roles: Sequence[str] = ()) -> None:
    """Every weight of the layers, and these outside them, are the same bit for bit."""
    for mine, theirs in zip(written.layers, memory.layers, strict=True):
        assert mine.keys() == theirs.keys()
        for role, weight in theirs.items():
            # A float32 file would hold them all; positions and norms are.
            assert torch.equal(mine[role], weight), role
    for role in roles:
        assert torch.equal(written.top[role], memory.top[role]), role


# Every family, every type


EVERY = [*(("llama", mix) for mix in MIXES), *((kind, ("q4_0", "q3_k_m")[i % 2]) for i, kind in enumerate(KINDS) if i)]


@pytest.mark.parametrize(("kind", "quant"), EVERY)
def test_file_is_the_model_in_memory(source: Source, tmp_path: Path, kind: str, quant: str) -> None:
    stages = Recorded()
    result = quantized(source(kind), tmp_path / f"{quant}.gguf", stages, quant=quant)
    written, plan = open_model(result.path), resolve_quant(quant)
    top = result.job.reduction.top
    check_same(written, result.reduced, tuple(top))
    assert top.keys() == (set() if written.config.tie_word_embeddings else {"embed"})
    target = target_for(result.original)
    tensors = entries(result.original, target)
    wanted = assign(plan, tensors, result.original.config, target.tied).kinds
    fits = {entry.name for entry in tensors if wanted[entry.name] is plan.matrix or entry.shape[-1] % 256 == 0}
    found = types(result.path)
    assert found.keys() == wanted.keys()
    assert {name: found[name] for name in fits} == {name: wanted[name].name for name in fits}
    assert value(result.path, "a3q.quantizer") == "gptq"
    assert value(result.path, "general.file_type") == plan.file_type
    assert result.rounding is not None
    assert result.rounding.losses.keys() == {
        role.name for entry in tensors if entry.layer is not None and len(entry.shape) > 1 for role in entry.roles
    }
    # Eight bits lose 0.001 %, two bits a tenth.
    assert all(1e-5 < loss < 0.15 for loss in result.rounding.losses.values())
    if result.verification is not None:
        # A tied embedding of six bits is rounded when it is written.
        assert result.verification.kl_to_reduced < (0.1 if written.config.tie_word_embeddings else 0.03)
    stages.check_totals()


def value(path: Path, key: str) -> Any:
    return gguf.GGUFReader(path).fields[key].contents()


@needs_llama_cpp
@pytest.mark.parametrize(
    ("name", "quantizer"), [*((name, "gptq") for name in GRIDS), ("q4_k", "rtn"), ("iq4_nl", "rtn"), ("q3_k", "plain")]
)
def test_llama_cpp_reads_what_was_packed(source: Source, tmp_path: Path, name: str, quantizer: str) -> None:
    """Logits of llama.cpp and of a3q's forward pass over the weights that a3q reads back from the file."""
    mix = {"q2_k": "q2_k_s", "q3_k": "q3_k_s", "q4_k": "q4_k_s", "q5_k": "q5_k_s"}.get(name, name)
    options: dict[str, Any] = {"quant": mix, "quantizer": quantizer, "verify_file": False}
    result = quantized(
        source("llama"), tmp_path / "m.gguf", output_tensor_type=name, token_embedding_type=name, **options
    )
    assert list(types(result.path).values()).count(name.upper()) >= 13
    written = open_model(result.path)
    ids = torch.randint(2, written.config.vocab_size, (1, 64), generator=torch.Generator().manual_seed(1))
    ours, original = (logits_of(model, ids, CPU, 0) for model in (written, result.original))
    with LlamaRuntime(result.path, 64) as opened:

        def theirs(sequence: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(opened.logits(sequence.tolist()))

        kl = compare(ours, {"llama.cpp": theirs}, ids, 0)["llama.cpp"].mean_kl
    # llama.cpp rounds activations to 8 bits; one wrong plane of bits would be whole nats.
    assert 0 < kl < 0.03
    assert compare(original, {"written": ours}, ids, 0)["written"].mean_kl > (0.002 if name == "q8_0" else kl)


@pytest.mark.parametrize("quant", ["q4_0", "q2_k"])
def test_error_feedback_helps(source: Source, tmp_path: Path, quant: str) -> None:
    """Held-out text of the same kind; the random model's predictions are softened so that its KL says something."""
    kl = {}
    for quantizer in ("gptq", "plain"):
        result = quantized(
            soft(source), tmp_path / f"{quantizer}.gguf", quant=quant, quantizer=quantizer, verify_file=False,
            calib_tokens=4096, output_tensor_type="q8_0", token_embedding_type="q8_0",
        )  # fmt: skip
        text = corpus(60, seed=11)
        ids = torch.tensor([result.original.tokenizer.encode(" ".join(text))[:256]])
        original, written = (logits_of(model, ids, CPU, 0) for model in (result.original, open_model(result.path)))
        kl[quantizer] = compare(original, {"written": written}, ids, 0)["written"].mean_kl
    assert kl["gptq"] < 0.9 * kl["plain"], kl


def soft(source: Source) -> Path:
    """A model whose layers add little to what they get, as those of trained ones do."""
    folder = source("small").with_name("soft")
    if not folder.exists():
        write_model(folder, **{**BIG, "initializer_range": 0.04})
    return folder


# Quantizers


def test_without_llama_cpp(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """a3q's own rounding stands in for ggml's."""
    monkeypatch.setattr(ggml_encode, "available", lambda: False)
    monkeypatch.setattr(runtime, "available", lambda: False)
    result = quantized(source("llama"), tmp_path / "m.gguf", quant="q4_k_m", quantizer="plain")
    assert types(result.path)["blk.0.attn_q.weight"] == "Q4_K"
    assert any("not verified" in note for note in result.notes)
    for mine, theirs in zip(open_model(result.path).layers, result.original.layers, strict=True):
        for role in ("q", "v", "down"):
            error = (mine[role] - theirs[role]).square().sum() / theirs[role].square().sum()
            assert 1e-5 < error < 0.01, role
    for quant in ("q4_k_m", "q8_0"):
        with pytest.raises(InputError, match=r"^--quantizer rtn "):
            quantized(source("llama"), tmp_path / "n.gguf", quant=quant, quantizer="rtn")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    # The default needs nothing of it.
    quantized(source("llama"), tmp_path / "gptq.gguf", quant="q4_k_m")


STAGES: list[tuple[dict[str, Any], list[str]]] = [
    ({"quant": "4bit"}, ["read calibration text", "quantize", "write"]),
    ({"quant": "4bit", "quantizer": "plain"}, ["write"]),
    ({"quant": "8bit"}, ["write"]),
    ({"quant": "8bit", "quantizer": "gptq"}, ["read calibration text", "quantize", "write"]),
    ({"quant": "f16", "quantizer": "gptq"}, ["write"]),
    ({"bits": 5.0}, ["read calibration text", "weigh the matrices", "quantize", "write"]),
    ({"bits": 5.0, "quantizer": "plain"}, ["read calibration text", "weigh the matrices", "write"]),
    ({"ratio": 0.25}, ["read calibration text", "weigh the layers", "reduce and quantize", "write"]),
    ({"ratio": 0.25, "quantizer": "plain"}, ["read calibration text", "weigh the layers", "reduce", "write"]),
    (
        {"ratio": 0.25, "size": 400_000},
        ["read calibration text", "weigh the layers", "weigh the matrices", "reduce and quantize", "write"],
    ),
    (
        {"ratio": 0.25, "method": "paper", "components": {"MLP"}},
        ["read calibration text", "reduce", "quantize", "write"],
    ),
]


@pytest.mark.parametrize(("options", "expected"), STAGES, ids=[str(options) for options, _ in STAGES])
def test_stages(
    source: Source,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    expected: list[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    stages = Recorded()
    result = quantized(source("small"), tmp_path / "m.gguf", stages, verify_file=False, **options)
    assert stages.titles == ["hash the source", *expected]
    stages.check_totals()
    if options.get("quantizer") == "plain" and "ratio" not in options:
        assert result.reduced is result.original
    assert (result.rounding is None) == (options.get("quant") == "f16")


@pytest.mark.parametrize("options", [{}, {"method": "paper"}])
def test_reduced_and_quantized(source: Source, tmp_path: Path, options: dict[str, Any]) -> None:
    """In one pass, and in two after the paper's method."""
    result = quantized(
        source("llama"), tmp_path / "m.gguf", ratio=0.25, components={"MLP"}, ranks="uniform", quant="4bit", **options
    )
    check_same(open_model(result.path), result.reduced)
    assert {shape.intermediate_size for shape in result.reduced.config.layers} == {384}
    assert value(result.path, "a3q.method") == options.get("method", "a3q")
    assert value(result.path, "a3q.quantizer") == "gptq"
    assert all(loss.mlp > 0 for loss in result.job.reduction.losses)
    # 384 is no multiple of 256.
    assert [note for note in result.notes if note.startswith("ffn_down (1 tensor): rows of 384 do not divide")]
    if result.verification is not None:
        assert result.verification.kl_to_reduced < 0.03


# Types


def test_substitutions_are_said(source: Source, tmp_path: Path) -> None:
    stages = Recorded()
    result = quantized(source("small"), tmp_path / "m.gguf", stages, quant="q4_k_m", verify_file=False)
    found = types(result.path)
    assert found["blk.0.attn_q.weight"] in ("Q4_0", "Q4_1", "Q5_0", "IQ4_NL")
    said = [note for note in result.notes if "super-blocks of 256" in note]
    for part in ("attn_q", "attn_k", "attn_output", "rows of 128", "stored as", "bits per weight instead of 4.50"):
        assert any(part in note for note in said), part
    # Rows of 256 fit.
    assert found["blk.0.ffn_down.weight"] == "Q4_K"
    with pytest.raises(InputError, match=r"^--strict: q4_k_m does not fit .* rows of 128 .*q8_0.*q4_0"):
        quantized(source("small"), tmp_path / "n.gguf", stages, quant="q4_k_m", strict=True)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    quantized(source("small"), tmp_path / "n.gguf", quant="q4_0", strict=True, verify_file=False)


@pytest.mark.parametrize("options", [{}, {"quantizer": "plain"}, {"ratio": 0.25}])
@pytest.mark.parametrize("size", [700_000, 1_000_000])
def test_files_of_a_size(source: Source, tmp_path: Path, size: int, options: dict[str, Any]) -> None:
    result = quantized(source("llama"), tmp_path / "m.gguf", size=size, verify_file=False, **options)
    assert result.path.stat().st_size == result.written.size <= size
    # Not much room is left, but for what the header might have taken.
    assert result.written.size > 0.9 * size
    assert result.type_name == "mixed"
    assert value(result.path, "a3q.quantization") == "mixed"
    assert any(note.startswith(f"types under {size / 1e6:g} MB: ") for note in result.notes)
    assert len(set(types(result.path).values()) - {"F32"}) > 1
    if "quantizer" not in options:
        check_same(open_model(result.path), result.reduced, tuple(result.job.reduction.top))


def test_files_of_so_many_bits(source: Source, tmp_path: Path) -> None:
    losses = []
    for bits in (2.7, 4.25, 8.0):
        result = quantized(source("llama"), tmp_path / f"{bits}.gguf", bits=bits)
        tensors = [tensor for tensor in gguf.GGUFReader(result.path).tensors if len(tensor.shape) > 1]
        stored = 8 * sum(tensor.n_bytes for tensor in tensors) / sum(tensor.n_elements for tensor in tensors)
        assert 0.97 * bits < stored <= bits
        assert result.type_name == f"{bits:g}bpw"
        if result.verification is not None:
            losses.append(result.verification.written.kl or 0.0)
    # More room is less loss.
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 100_000}, r"^--size 0\.1 MB: the smallest possible file has \d+(\.\d)? MB$"),
        ({"bits": 2.0}, r"^--bits 2: the smallest possible is 2\.63 bits per weight with the rows of this model$"),
        ({"bits": 4.0, "size": 10**6}, "^--bits and --size: give one of the two$"),
        ({"bits": 4.0, "strict": True}, "^--bits and --size choose .* leave out --strict"),
    ],
)
def test_limits_that_cannot_be_kept(source: Source, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        quantized(source("llama"), tmp_path / "m.gguf", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "output", "embed", "found"),
    [
        ("llama", "q4_0", "q5_k", {"token_embd.weight": "Q5_K", "output.weight": "Q4_0"}),
        ("llama", "bf16", "f32", {"token_embd.weight": "F32", "output.weight": "BF16"}),
        ("llama-tied", "q4_k", None, {"token_embd.weight": "Q4_K"}),
        ("llama-tied", "q8_0", "q3_k", {"token_embd.weight": "Q3_K"}),
    ],
)
def test_types_of_the_ends(
    source: Source, tmp_path: Path, kind: str, output: str, embed: str | None, found: dict[str, str]
) -> None:
    result = quantized(
        source(kind), tmp_path / "m.gguf", quant="q4_0", output_tensor_type=output, token_embedding_type=embed
    )
    written = types(result.path)
    assert {name: written[name] for name in ("token_embd.weight", "output.weight") if name in written} == found
    assert {written[name] for name in written if name.endswith(("_q.weight", "_down.weight"))} == {"Q4_0"}
    coarse = [name for name, kind in found.items() if kind.lower() in GRIDS]
    assert result.job.reduction.top.keys() == {"embed" if "embd" in name else "output" for name in coarse}
    check_same(open_model(result.path), result.reduced, tuple(result.job.reduction.top))
    if result.verification is not None:
        assert result.verification.kl_to_reduced < 0.03


def test_a_gptq_output_is_fitted_to_what_reaches_it(source: Source, tmp_path: Path) -> None:
    """Error feedback in the output, alone and tied, leaves less of its energy than rounding to the nearest."""
    for kind in ("llama", "llama-tied"):
        losses = {}
        for quantizer in ("gptq", "plain"):
            result = quantized(
                source(kind), tmp_path / f"{kind}-{quantizer}.gguf", quant="q8_0", output_tensor_type="q4_0",
                token_embedding_type=None if kind == "llama-tied" else "f16", quantizer=quantizer, verify_file=False,
            )  # fmt: skip
            ids = torch.randint(2, 512, (2, 128), generator=torch.Generator().manual_seed(2))
            written = open_model(result.path)
            # Only the output differs from the original's.
            output = replace(result.original, top={**result.original.top, "output": written.output})
            mine, theirs = (logits_of(model, ids, CPU, 0) for model in (untied(output), untied(result.original)))
            losses[quantizer] = sum(float((mine(one) - theirs(one)).square().mean()) for one in ids)
        assert losses["gptq"] < losses["plain"], kind


def untied(model: Model) -> Model:
    """The same with an output of its own."""
    config = replace(model.config, tie_word_embeddings=False)
    return replace(model, config=config, top={"output": model.output, **model.top})


# Eight bits and more


def test_eight_bits_are_rounded_as_ever(source: Source, tmp_path: Path) -> None:
    result = quantized(source("small"), tmp_path / "m.gguf", quant="q8_0", verify_file=False)
    plain = write_gguf(result.original, resolve_quant("q8_0"), tmp_path / "plain.gguf").path
    check_same(open_model(result.path), open_model(plain), ("embed", "output"))
    assert result.rounding is not None
    assert (result.rounding.quantizer, result.rounding.losses) == ("plain", {})
    assert result.reduced is result.original


def test_float16_is_left_alone(source: Source, tmp_path: Path) -> None:
    for quantizer in (None, "gptq", "plain"):
        path = tmp_path / f"{quantizer}.gguf"
        result = quantized(source("llama"), path, quant="f16", quantizer=quantizer, verify_file=False)
        check_same(open_model(result.path), result.original, ("embed", "output"))
        assert result.rounding is None


# Weights that cannot be stored


WHERE = {
    "model.layers.1.mlp.up_proj.weight": ("blk.1.ffn_up.weight", "layer 1, gate, up"),
    "model.layers.0.self_attn.o_proj.weight": ("blk.0.attn_output.weight", "layer 0, o"),
    "model.embed_tokens.weight": ("token_embd.weight", "embed"),
    "lm_head.weight": ("output.weight", "output"),
}
"""What a tensor may be called when it cannot be stored."""


# Values take over what is large in an output projection, so that it can be stored after all.
BAD = [
    (name, number, quantizer)
    for name, number, quantizer in itertools.product(WHERE, (math.nan, math.inf, 1e5), ("gptq", "plain"))
    if not (number == 1e5 and "o_proj" in name and quantizer == "gptq")
]


@pytest.mark.parametrize(("name", "number", "quantizer"), BAD)
def test_weights_that_cannot_be_stored(
    source: Source, tmp_path: Path, name: str, number: float, quantizer: str
) -> None:
    folder = shutil.copytree(source("small"), tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights[name][3, 4] = number
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    text = str(source("small").with_name("text.txt"))
    # A reduction may spread a large weight over many.
    for ratio in (0,) if number == 1e5 else (0, 0.25):
        with pytest.raises(InputError) as caught:
            quantized(
                folder, tmp_path / "m.gguf", quant="q4_0", quantizer=quantizer, calib=text, verify_file=False,
                ratio=ratio, ranks="uniform",
            )  # fmt: skip
        message = str(caught.value)
        assert ("too large for" if number == 1e5 else "NaN") in message
        assert "\n" not in message
        assert any(part in message for part in (name, *WHERE[name])), message
        assert [path.name for path in tmp_path.iterdir()] == ["model"]
