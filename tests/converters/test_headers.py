"""Models from headers alone: the same facts whatever is given, and no weight read."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from a3q.asked import Asked
from a3q.choice import described
from a3q.errors import InputError
from a3q.forecast import Forecast
from a3q.gguf_types import TypeRequest
from a3q.to_folder import reduce_to_folder
from converters.gguf_writer import write_gguf
from converters.headers import Header, open_header
from converters.hf_reader import open_huggingface
from converters.open import open_model
from converters.types import resolve_quant
from tests.pico import KINDS, LLAMA3_ROPE, Kind, corpus, write_model

IN_GGUF = [kind for kind in KINDS if kind != "opt"]


@pytest.fixture(autouse=True)
def nothing_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder without weights is not known again, and would be planned by rule where the whole one is not."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def no_weight_is_read(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Whatever reads a weight, or a layer, fails; tests that write models take `weights`."""
    if "weights" in request.fixturenames:
        return

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("a weight was read")

    for reader in (
        "converters.gguf_reader.GGUFHeader.weight",
        "converters.gguf_reader.GGUFHeader.layer",
        "converters.hf_weights.Weights.read",
        "converters.hf_weights.Stored.read",
        "converters.hf_weights.Stored.load",
        "converters.hf_weights.StoredLinear.read",
        "converters.tensors.LazyLayers.__getitem__",
    ):
        monkeypatch.setattr(reader, forbidden)


@pytest.fixture
def weights() -> None:
    """Weights may be read."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("headers")
    found = {kind: write_model(root / kind, kind) for kind in KINDS}
    found["llama with biases"] = write_model(root / "biases", bias=True, head_dim=32)
    found["llama, tied and scaled"] = write_model(root / "tied", tied=True, rope=LLAMA3_ROPE)
    return found


@pytest.fixture(scope="module")
def ggufs(folders: dict[str, Path]) -> dict[str, Path]:
    return {
        kind: write_gguf(open_huggingface(folders[kind]), resolve_quant("f32"), folders[kind] / "m.gguf").path
        for kind in IN_GGUF
    }


def planned(model: Path | None, **options: object) -> tuple[Header, Forecast]:
    asked = Asked(**options)  # type: ignore[arg-type]
    header = open_header(model)
    return header, asked.forecast(header, TypeRequest(asked.quant_plan()), asked.settings())


def config_of(folder: Path, to: Path, *, tokenizer: bool = True) -> Path:
    """A folder of the same name, by which the model goes, with no more than what describes it."""
    to /= folder.name
    to.mkdir(parents=True)
    for path in (*folder.glob("*.json"), *folder.glob("*.md")):
        if tokenizer or "token" not in path.name:
            shutil.copy(path, to)
    return to


CASES = [*KINDS, "llama with biases", "llama, tied and scaled"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("given", ["file", "folder"])
def test_config_alone_describes_the_folder(folders: dict[str, Path], tmp_path: Path, case: str, given: str) -> None:
    folder = config_of(folders[case], tmp_path / "config")
    whole, alone = open_header(folders[case]), open_header(folder / "config.json" if given == "file" else folder)
    assert whole.has_weights
    assert not alone.has_weights
    for one in (whole, alone):
        assert all(weight.is_meta for weight in one.model.top.values())
    assert alone.model.config == whole.model.config
    assert alone.model.layer_roles == whole.model.layer_roles
    assert {role: tuple(w.shape) for role, w in alone.model.top.items()} == {
        role: tuple(w.shape) for role, w in whole.model.top.items()
    }
    assert alone.model.parameters() == whole.model.parameters()
    # opt's file has two rows of positions that no token has.
    mine, theirs = ({one.name: one for one in header.tensors} for header in (alone, whole))
    if case == "opt":
        assert mine.keys() == theirs.keys()
    else:
        assert mine == theirs
        assert 0 < whole.file_bytes - alone.file_bytes < 20_000
    assert alone.fields.keys() == whole.fields.keys()


@pytest.mark.parametrize("case", [case for case in CASES if case != "opt"])
@pytest.mark.parametrize("quant", ["q8_0", "4bit"])
def test_config_alone_gives_the_same_plan(folders: dict[str, Path], tmp_path: Path, case: str, quant: str) -> None:
    folder = config_of(folders[case], tmp_path / "config")
    _, whole = planned(folders[case], quant=quant)
    _, alone = planned(folder / "config.json", quant=quant)
    assert alone.plan == whole.plan
    assert alone.after == whole.after
    assert replace(alone.before, file_bytes=whole.before.file_bytes) == whole.before
    assert alone.prediction == whole.prediction


@pytest.mark.parametrize("kind", IN_GGUF)
def test_gguf_gives_the_plan_of_its_folder(folders: dict[str, Path], ggufs: dict[str, Path], kind: Kind) -> None:
    _, folder = planned(folders[kind], quant="q4_0")
    header, gguf = planned(ggufs[kind], quant="q4_0")
    assert header.has_weights
    assert gguf.plan.dimensions == folder.plan.dimensions
    assert gguf.after.types == folder.after.types
    assert gguf.after.kv_bytes == folder.after.kv_bytes
    assert gguf.after.file_bytes == pytest.approx(folder.after.file_bytes, abs=2000)
    assert gguf.after.prompt_flops == folder.after.prompt_flops
    assert gguf.after.generation_bytes == folder.after.generation_bytes


def test_family_without_a_gguf(folders: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="no architecture for opt"):
        planned(folders["opt"])


def test_split_gguf(weights: None, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plan = open_huggingface(folders["llama"]), resolve_quant("f16")
    monkeypatch.setattr("converters.gguf_split.SMALLEST", 1)
    single = write_gguf(model, plan, tmp_path / "m.gguf")
    split = write_gguf(model, plan, tmp_path / "s.gguf", split_max_size=60_000)
    assert len(split.files) > 2
    monkeypatch.setattr("converters.gguf_reader.GGUFHeader.weight", None)
    one, several = planned(single.path), planned(split.files[0])
    assert several[0].file_bytes == split.size > single.size
    assert several[0].tensors == one[0].tensors
    # Its longer name is in the file.
    assert replace(several[1].after, file_bytes=one[1].after.file_bytes) == one[1].after
    assert several[1].plan == one[1].plan


def test_sharded_folder(tmp_path: Path) -> None:
    single, sharded = write_model(tmp_path / "one" / "m"), write_model(tmp_path / "more" / "m", sharded=True)
    assert len(list(sharded.glob("*.safetensors"))) > 1
    one, more = planned(single), planned(sharded)
    assert {tensor.name: tensor for tensor in one[0].tensors} == {tensor.name: tensor for tensor in more[0].tensors}
    assert one[1].after == more[1].after


def test_a3q_folder(weights: None, tmp_path: Path) -> None:
    """What a3q wrote itself, whose layers differ."""
    (tmp_path / "text.txt").write_text("\n".join(corpus(100)))
    source = write_model(tmp_path / "pico", head_dim=32)
    options = {"calib": str(tmp_path / "text.txt"), "calib_tokens": 512, "device": "cpu", "verify_output": False}
    path = reduce_to_folder(source, output=tmp_path / "m", frequencies="shared", **options).path  # type: ignore[arg-type]
    config = config_of(path, tmp_path / "config")
    whole, alone = open_header(path), open_header(config)
    assert whole.model.config == open_model(path).config == alone.model.config
    assert {one.name: one for one in whole.tensors} == {one.name: one for one in alone.tensors}
    assert planned(path, quant="q8_0")[1].after == planned(config, quant="q8_0")[1].after


def test_without_a_tokenizer(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = config_of(folders["llama"], tmp_path / "config", tokenizer=False)
    header, forecast = planned(folder / "config.json")
    assert header.model.tokenizer.vocab_size == 512
    for use in (header.model.tokenizer.encode, header.model.tokenizer.decode):
        with pytest.raises(InputError, match="no tokenizer"):
            use("")  # type: ignore[operator]
    assert any("no tokenizer is there" in note for note in forecast.notes)
    assert any("no weights are there" in note for note in forecast.notes)
    assert json.loads(json.dumps(described(forecast)))["after"]["file_bytes"] == forecast.after.file_bytes
    _, whole = planned(folders["llama"])
    assert forecast.after.file_bytes == pytest.approx(whole.after.file_bytes, rel=0.2)
    assert not any("is there" in note for note in whole.notes)


def test_layers_of_a_config_alone_are_refused(weights: None, folders: dict[str, Path], tmp_path: Path) -> None:
    header = open_header(config_of(folders["llama"], tmp_path / "config"))
    with pytest.raises(InputError, match="has no weights beside it"):
        _ = header.model.layers[0]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtype_of_the_config(folders: dict[str, Path], tmp_path: Path, dtype: str) -> None:
    folder = config_of(folders["llama"], tmp_path / "config")
    path = folder / "config.json"
    content = json.loads(path.read_text())
    path.write_text(
        json.dumps({key: value for key, value in content.items() if key != "dtype"} | {"torch_dtype": dtype})
    )
    header = open_header(path)
    assert {tensor.type for tensor in header.tensors} == {
        {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
    }
    assert header.file_bytes == header.model.parameters() * (4 if dtype == "float32" else 2)


def test_config_of_another_name(folders: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "some-model.json"
    shutil.copy(folders["qwen2"] / "config.json", path)
    assert open_header(path).model.config == open_header(folders["qwen2"]).model.config


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"model_type": "mamba"}, "'mamba'"),
        ({"model_type": None}, "model_type"),
        ({"hidden_size": "many"}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_attention_heads": 3}, ""),
        ({"hidden_act": "swishy"}, "swishy"),
    ],
)
def test_config_that_is_none(folders: dict[str, Path], tmp_path: Path, change: dict[str, object], part: str) -> None:
    path = tmp_path / "config.json"
    content = json.loads((folders["llama"] / "config.json").read_text())
    path.write_text(json.dumps(content | change))
    with pytest.raises(InputError, match=r"config\.json") as refused:
        open_header(path)
    assert part in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"model_type": "llama"}'])
def test_json_that_is_no_config(tmp_path: Path, content: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(InputError, match=r"config\.json"):
        open_header(path)


def test_weights_are_needed_no_more_than_their_header(ggufs: dict[str, Path], tmp_path: Path) -> None:
    """NaN in every weight does not matter to a plan."""
    path = tmp_path / "m.gguf"
    content = bytearray(ggufs["llama"].read_bytes())
    start = len(content) - sum(tensor.bytes for tensor in open_header(ggufs["llama"]).tensors)
    content[start + 4096 :] = b"\xff" * (len(content) - start - 4096)
    path.write_bytes(content)
    assert planned(path)[1].after == planned(ggufs["llama"])[1].after
