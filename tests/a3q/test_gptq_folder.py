"""Folders in GPTQ's layout: what `a3q reduce --quant` writes, what it refuses, and what `a3q convert` makes of them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from a3q import InputError, Result, VerifyError, convert, reduce_to_folder, to_folder
from a3q.cli import app
from a3q.dimensions import folder_grid
from a3q.forward import hidden_states, output_logits
from a3q.gptq_folder import FolderQuant
from a3q.inspect import inspect_file
from a3q.model import Layer
from a3q.report import render
from converters.gguf_reader import open_gguf
from converters.gptq import fits
from converters.hf_reader import open_huggingface
from converters.hf_writer import write_huggingface
from converters.open import open_model
from converters.tensors import LazyLayers
from tests.a3q.stages import Recorded
from tests.pico import Kind, corpus, write_model

SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 192}
MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
FAMILIES: list[Kind] = ["llama", "qwen2", "phi3", "gpt_neox"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    (folder / "text.txt").write_text("\n".join(corpus(400, seed=7)))
    return {kind: write_model(folder / kind, kind, **SIZES) for kind in FAMILIES}


def reduced(source: Path, output: Path | None, **options: Any) -> Result:
    given = {"ratio": 0.0, "quant": "4bit", "group_size": 32, "calib_tokens": 1024, "device": "cpu"}
    return reduce_to_folder(source, output=output, calib=str(source.with_name("text.txt")), **(given | options))


@pytest.fixture(scope="module")
def rewritten(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Result:
    """The llama, quantized alone."""
    return reduced(sources["llama"], tmp_path_factory.mktemp("out") / "m")


def config(folder: Path) -> dict[str, Any]:
    content = json.loads((folder / "config.json").read_text())
    assert isinstance(content, dict)
    return content


def same_matrices(mine: Layer, theirs: Layer) -> bool:
    return all(torch.equal(mine[role], theirs[role]) for role in MATRICES if role in mine)


def check_read(result: Result) -> None:
    """The folder has the model in memory: quantized weights bit for bit, the others in float16."""
    read = open_model(result.path)
    assert read.config == result.reduced.config
    assert isinstance(read.layers, LazyLayers)
    assert result.job.reduction.layers is not None
    quantized = 0
    for i, (mine, theirs) in enumerate(zip(read.layers, result.reduced.layers, strict=True)):
        assert mine.keys() == theirs.keys()
        blocks = read.layers.blocks(i)
        assert blocks.keys() == result.job.reduction.layers.blocks(i).keys()
        quantized += len(blocks)
        for role, weight in theirs.items():
            meant = weight if role in blocks else weight.half().float()
            assert torch.equal(mine[role], meant), role
    assert quantized > 0


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("ratio", [0.0, 0.4])
@pytest.mark.parametrize("kind", FAMILIES)
def test_the_folder_is_the_model_in_memory(
    sources: dict[str, Path], tmp_path: Path, kind: str, ratio: float, symmetric: bool
) -> None:
    result = reduced(sources[kind], tmp_path / "m", ratio=ratio, symmetric=symmetric)
    check_read(result)
    found = config(result.path)
    assert found["model_type"] == (kind if ratio == 0 and kind != "gpt_neox" else "a3q")
    assert found["dtype"] == "float16"
    described = found["quantization_config"]
    assert (described["bits"], described["group_size"], described["sym"]) == (4, 32, symmetric)
    assert result.type_name == "GPTQ 4bit g32"
    assert result.verification is not None
    assert result.verification.runtime == "a3q"
    assert result.verification.kl_to_reduced < 1e-4
    assert result.verification.reduced.kl is not None
    assert result.verification.reduced.kl > 1e-4
    blocks = [result.job.reduction.blocks(i, "down") for i in range(2)]
    assert all(one is not None for one in blocks), "sizes are chosen so that they fit"
    shapes = result.reduced.config.layers
    for shape in shapes:
        assert [4 * shape.qk_head_dim % 32, 4 * shape.v_head_dim % 32, shape.intermediate_size % 32] == [0, 0, 0]
    if ratio:
        assert result.job.plan.achieved == pytest.approx(ratio, abs=0.1)


@pytest.mark.parametrize(("bits", "group"), [(2, 32), (4, 64), (4, 128), (8, 32)])
def test_bits_and_groups(sources: dict[str, Path], tmp_path: Path, bits: int, group: int) -> None:
    result = reduced(sources["llama"], tmp_path / "m", quant=f"{bits}BIT", format="GPTQ", group_size=group)
    check_read(result)
    assert result.type_name == f"GPTQ {bits}bit g{group}"
    assert result.rounding is not None
    assert result.rounding.quantizer == "gptq"
    assert bits < result.rounding.bits_per_weight < 16
    assert set(result.rounding.losses) == set(MATRICES) - ({"down"} if group == 128 else set())
    assert 0 < result.rounding.losses["o"] < 4.0 ** -(bits - 2)
    record = config(result.path)["reduction"]
    assert {key: record[key] for key in ("quantizer", "bits", "group_size")} == {
        "quantizer": "gptq", "bits": bits, "group_size": group
    }  # fmt: skip


def test_error_feedback_is_better_than_the_nearest(sources: dict[str, Path], tmp_path: Path) -> None:
    found = {
        quantizer: reduced(sources["llama"], tmp_path / quantizer, quantizer=quantizer, calib_tokens=4096)
        for quantizer in ("gptq", "rtn")
    }
    kl = {}
    for quantizer, result in found.items():
        check_read(result)
        assert result.verification is not None
        assert result.verification.written.kl is not None
        assert result.rounding is not None
        assert result.rounding.quantizer == config(result.path)["reduction"]["quantizer"] == quantizer
        kl[quantizer] = result.verification.written.kl
    assert kl["gptq"] < 0.9 * kl["rtn"]


@pytest.mark.parametrize("options", [{"ranks": "uniform"}, {"method": "paper"}, {"frequencies": "shared"}])
def test_other_reductions(sources: dict[str, Path], tmp_path: Path, options: dict[str, Any]) -> None:
    result = reduced(sources["llama"], tmp_path / "m", ratio=0.4, memory_budget=0, **options)
    check_read(result)
    assert result.reduced.parameters() < result.original.parameters()


def test_all_layers_alike_stay_a_llama(sources: dict[str, Path], tmp_path: Path) -> None:
    result = reduced(sources["llama"], tmp_path / "m", components={"MLP"}, ratio=0.3, ranks="uniform", dtype="bf16")
    found = config(result.path)
    assert (found["model_type"], found["intermediate_size"], found["dtype"]) == ("llama", 128, "bfloat16")
    assert found["reduction"]["ratio"] == 0.3
    card = (result.path / "README.md").read_text()
    assert "made smaller with" in card and "import a3q" not in card


def test_model_card(rewritten: Result, sources: dict[str, Path], tmp_path: Path) -> None:
    card = (rewritten.path / "README.md").read_text()
    assert "pip install gptqmodel optimum" in card and "auto-gptq, which is unmaintained" in card
    assert "made smaller" not in card and "import a3q" not in card and "quantized with" in card
    small = (reduced(sources["llama"], tmp_path / "m", ratio=0.4).path / "README.md").read_text()
    assert "made smaller with [A3](https://arxiv.org/abs/2505.12942) and quantized with" in small
    assert "import a3q" in small
    plain = write_huggingface(rewritten.original, tmp_path / "plain").path
    card = (plain / "README.md").read_text()
    assert "`Llama`, written by a3q" in card and "gptqmodel" not in card and "import a3q" in card


def test_weights_of_odd_sizes_stay_plain(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n".join(corpus(100, seed=7)))
    source = write_model(tmp_path / "llama", hidden_size=128, intermediate_size=200)
    result = reduced(source, tmp_path / "m")
    check_read(result)
    assert [note for note in result.notes if note.startswith("not quantized")] == [
        "not quantized: gate of all layers: 200 rows are no multiple of 32, which kernels want",
        "not quantized: up of all layers: 200 rows are no multiple of 32, which kernels want",
        "not quantized: down of all layers: 200 inputs are no whole groups of 32",
    ]
    described = config(result.path)["quantization_config"]
    assert "model.layers.0.self_attn.q_proj" in described["modules_in_block_to_quantize"][0]
    assert next(iter(described["dynamic"])).startswith("-:")
    # Reduced, they get sizes that fit.
    small = reduced(source, tmp_path / "small", components={"MLP"}, ranks="uniform", ratio=0.25)
    assert not any(note.startswith("not quantized") for note in small.notes)
    assert {shape.intermediate_size for shape in small.reduced.config.layers} == {160}


def test_stages_and_what_is_said(rewritten: Result, sources: dict[str, Path], tmp_path: Path) -> None:
    stages = Recorded()
    result = reduced(sources["llama"], tmp_path / "m", stages=stages)
    assert stages.titles == ["hash the source", "read calibration text", "quantize", "write", "verify"]
    stages.check_totals()
    shown = io.StringIO()
    Console(file=shown, width=200).print(render(result))
    text = shown.getvalue()
    assert "GPTQ 4bit g32" in text
    assert "Not tried in transformers; as a3q reads it back" in text
    assert "runs GPTQ folders through gptqmodel and optimum" in text
    assert "too large" not in text
    assert (result.path / "model.safetensors").read_bytes() == (rewritten.path / "model.safetensors").read_bytes()


def test_default_name(sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    reduced(sources["llama"], None, verify_output=False)
    assert [path.name for path in tmp_path.iterdir()] == ["llama-GPTQ-4bit-g32"]


def test_inspect(rewritten: Result) -> None:
    one = inspect_file(rewritten.path)
    assert one.parameters == rewritten.reduced.parameters()
    assert {total.type for total in one.types} == {"GPTQ 4bit g32", "F16"}
    quantized = next(total for total in one.types if total.type.startswith("GPTQ"))
    assert quantized.tensors == 14
    assert quantized.parameters == 2 * (128 * (128 + 64 + 64 + 128) + 3 * 128 * 192)
    # Codes, scales and zero points of groups of 32, and an index for each input.
    assert 4 + 16 / 32 + 4 / 32 < 8 * quantized.bytes / quantized.parameters < 5.1
    tensor = next(one for one in one.tensors if one.name == "model.layers.1.mlp.down_proj.weight")
    assert tensor.shape == (128, 192)
    stored = load_file(rewritten.path / "model.safetensors")
    assert one.weight_bytes == sum(tensor.nbytes for tensor in stored.values())


# In transformers


def test_transformers_is_tried_where_it_can(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPTQModel itself is no part of the tests; a3q's weights stand in for what it would load."""
    asked: list[torch.dtype] = []

    def logits(path: Path, device: torch.device, dtype: torch.dtype) -> Any:
        asked.append(dtype)
        model = open_model(sources["llama"] if "n" in path.name.split(".") else path)
        return lambda ids: output_logits(model, hidden_states(model, ids[None], device), device)[0]

    for where in ("a3q.verify.gptq_runs", "a3q.to_folder.gptq_runs"):
        monkeypatch.setattr(where, lambda: True)
    monkeypatch.setattr("a3q.verify._transformers_logits", logits)
    result = reduced(sources["llama"], tmp_path / "m", quant="8bit", quantizer="rtn")
    assert asked == [torch.float16]
    assert result.verification is not None
    assert result.verification.runtime == "transformers"
    assert "verify in transformers" in result.seconds
    assert not any("gptqmodel" in note for note in result.notes)
    with pytest.raises(VerifyError, match="transformers predicts"):
        reduced(sources["llama"], tmp_path / "n", quant="2bit")


def test_wrong_weights_are_found(sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_other(*args: Any, **options: Any) -> Any:
        right = options["quantized"]

        def wrong(i: int, role: str) -> Any:
            return (
                None
                if (blocks := right(i, role)) is None
                else type(blocks).of(blocks.grid, blocks.tensors() | {"codes": blocks.codes.flip(0)})
            )

        return write_huggingface(*args, **(options | {"quantized": wrong}))

    monkeypatch.setattr(to_folder, "write_huggingface", write_other)
    with pytest.raises(VerifyError, match=r"m: its weights are .* nats from the model in memory"):
        reduced(sources["llama"], tmp_path / "m")
    assert not (tmp_path / "m").exists()


# Refusals

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"quant": "q4_0"}, "--quant q4_0: a folder is quantized with 2bit, 4bit, 8bit; a3q convert has"),
    ({"quant": "4bit", "format": "awq"}, "--format awq: quantized folders are written as gptq"),
    ({"quant": "4bit", "group_size": 48}, "--group-size 48: give 128, 64, 32"),
    ({"quant": "4bit", "quantizer": "plain"}, "--quantizer plain: a folder is rounded by gptq or rtn"),
    ({"quant": "4bit", "dtype": "f32"}, "--dtype f32: GPTQ's kernels compute in 16 bits"),
    ({"format": "gptq"}, "--format gptq: nothing is quantized; give --quant 4bit"),
    ({"group_size": 64}, "--group-size 64: nothing is quantized"),
    ({"symmetric": False}, "--asym: nothing is quantized"),
    ({"quantizer": "rtn"}, "--quantizer rtn: nothing is quantized"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_bad_options_are_refused_before_the_model_is_read(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(to_folder, "open_model", lambda *_: pytest.fail("the model was opened"))
    with pytest.raises(InputError, match=message):
        reduce_to_folder("model", **options)


def test_sizes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    stages = Recorded()
    for hidden, group, message in (
        (192, 128, "the hidden size of 192 is no multiple of --group-size 128; take --group-size 32 or 64$"),
        (96, 64, "--group-size 64; take --group-size 32$"),
        (72, 32, "GPTQ's kernels want multiples of 32, and the hidden size is 72; leave --quant out"),
    ):
        source = write_model(tmp_path / str(hidden), hidden_size=hidden)
        with pytest.raises(InputError, match=message):
            reduce_to_folder(source, quant="4bit", group_size=group, output=tmp_path / "m", device="cpu", stages=stages)
    assert stages.seen == []


def test_nothing_that_fits_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n".join(corpus(100, seed=7)))
    source = write_model(
        tmp_path / "llama",
        hidden_size=96,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=12,
        intermediate_size=100,
    )
    with pytest.raises(InputError, match="no weight of its layers can be stored as GPTQ 4bit g32: 36 rows are no"):
        reduced(source, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_sizes_to_choose_from(tmp_path: Path) -> None:
    model = open_huggingface(write_model(tmp_path / "llama", hidden_size=96, head_dim=64, num_attention_heads=6))
    for group, heads in ((32, [16, 32, 48, 64]), (64, [32, 64]), (128, [64])):
        request = FolderQuant.of("4bit", "gptq", group, True, None)
        assert request is not None
        sizes = request.sizes(model.config, folder_grid(model.config))
        shape = model.config.layers[0]
        assert list(sizes.sizes(model.config, shape, "OV")) == heads
        *smaller, _ = sizes.sizes(model.config, shape, "MLP")
        for units in smaller:
            assert fits(64, units, request.grid)


def test_command_line(sources: dict[str, Path], tmp_path: Path) -> None:
    text = str(sources["llama"].with_name("text.txt"))
    done = CliRunner().invoke(
        app,
        ["reduce", str(sources["llama"]), "--ratio", "0", "--quant", "8bit", "--format", "gptq", "--group-size", "64",
         "--asym", "--quantizer", "rtn", "--calib", text, "--calib-tokens", "512", "-o", str(tmp_path / "m"),
         "--device", "cpu", "--no-verify"],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    described = config(tmp_path / "m")["quantization_config"]
    assert (described["bits"], described["group_size"], described["sym"]) == (8, 64, False)
    assert config(tmp_path / "m")["reduction"]["quantizer"] == "rtn"


# To a GGUF


def gguf_types(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


def converted(folder: Path, path: Path, **options: Any) -> Result:
    given = {"ratio": 0, "quant": "q4_0", "device": "cpu", "verify_file": False, "calib_tokens": 512}
    return convert(folder, output=path, **(given | options))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "phi3"])
def test_repacked_without_loss(sources: dict[str, Path], tmp_path: Path, kind: str) -> None:
    folder = reduced(sources[kind], tmp_path / "m", verify_output=False).path
    result = converted(folder, tmp_path / "m.gguf")
    types = gguf_types(result.path)
    assert {types[name] for name in types if name.startswith("blk.") and "norm" not in name and "bias" not in name} == {
        "Q4_0"
    }
    for mine, theirs in zip(open_gguf(result.path).layers, open_model(folder).layers, strict=True):
        assert same_matrices(mine, theirs)


def test_a_reduced_folder_is_repacked_too(sources: dict[str, Path], tmp_path: Path) -> None:
    options: dict[str, Any] = {"ratio": 0.4, "frequencies": "shared", "verify_output": False}
    folder = reduced(sources["llama"], tmp_path / "m", **options).path
    result = converted(folder, tmp_path / "m.gguf", verify_file=True)
    for mine, theirs in zip(open_gguf(result.path).layers, open_model(folder).layers, strict=True):
        assert same_matrices(mine, theirs)


def test_zero_points_become_offsets(sources: dict[str, Path], tmp_path: Path) -> None:
    folder = reduced(sources["llama"], tmp_path / "m", symmetric=False, verify_output=False).path
    result = converted(folder, tmp_path / "m.gguf")
    assert "Q4_1" in gguf_types(result.path).values()
    source = open_model(folder)
    assert isinstance(source.layers, LazyLayers)
    for i, mine in enumerate(open_gguf(result.path).layers):
        theirs, blocks = source.layers[i], source.layers.blocks(i)
        for role in MATRICES:
            steps = blocks[role].d.float().abs().repeat_interleave(32, dim=1)
            assert bool(((mine[role] - theirs[role]).abs() <= steps * 15 / 2048 + 1e-7).all()), role


def test_other_groups_are_quantized_as_usual(sources: dict[str, Path], tmp_path: Path) -> None:
    """In act order, which no block format has, and with other bits than asked for."""
    folder = reduced(sources["llama"], tmp_path / "m", verify_output=False).path
    other = converted(folder, tmp_path / "other.gguf", quant="q8_0", quantizer="plain")
    assert "Q8_0" in gguf_types(other.path).values()
    path = folder / "model.safetensors"
    content = load_file(path)
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in content if name.endswith(".g_idx")]:
        content[name] = content[name][torch.randperm(len(content[name]), generator=generator)]
    save_file(content, path)
    source = open_model(folder)
    assert isinstance(source.layers, LazyLayers) and source.layers.blocks(0) == {}
    result = converted(folder, tmp_path / "m.gguf", calib=str(sources["llama"].with_name("text.txt")))
    assert result.rounding is not None
    assert result.rounding.quantizer == "gptq"
    assert "Q4_0" in gguf_types(result.path).values()
    for mine, theirs in zip(open_gguf(result.path).layers, source.layers, strict=True):
        assert not same_matrices(mine, theirs)
        assert (mine["q"] - theirs["q"]).norm() < 0.2 * theirs["q"].norm()


def test_reduced_from_a_gptq_folder(rewritten: Result, sources: dict[str, Path], tmp_path: Path) -> None:
    text = str(sources["llama"].with_name("text.txt"))
    result = converted(rewritten.path, tmp_path / "m.gguf", ratio=0.25, calib=text, verify_file=True)
    assert result.job.plan.achieved == pytest.approx(0.25, abs=0.1)
    assert result.verification is not None
    again = reduced(sources["llama"], tmp_path / "n")
    small = reduce_to_folder(again.path, ratio=0.25, output=tmp_path / "small", calib=text, calib_tokens=512)
    assert "quantization_config" not in config(small.path)
    assert not {"bits", "group_size"} & config(small.path)["reduction"].keys()
