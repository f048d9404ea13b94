"""The tokenizer files of a written Hugging Face folder: the source's own, or made from the vocabulary of a GGUF."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from gguf import TokenType
from gguf.gguf_writer import GGUFValue
from tokenizers import AddedToken, decoders, models, normalizers, processors

from a3q.errors import InputError
from a3q.model import Model
from a3q.samples import TOKENIZER_SAMPLE
from converters import pretokenizers
from converters.hf_vocabulary import read_optional_json
from converters.vocabulary import Vocabulary, reason

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
_ANY_CLASS = "PreTrainedTokenizerFast"
"""Loads a tokenizer.json as it is."""
_KEY = "tokenizer.ggml."


def write_tokenizer(model: Model, folder: Path) -> list[str]:
    """Write the files into `folder`; notes on what a user should know."""
    from_folder, path = model.source.format == "huggingface", folder / "tokenizer_config.json"
    config: dict[str, Any] = {}
    if from_folder:
        for name in FILES:
            if (model.source.path / name).is_file():
                shutil.copyfile(model.source.path / name, folder / name)
        config = read_optional_json(path)
    else:
        config["model_max_length"] = model.config.max_position_embeddings
        if model.tokenizer.chat_template is not None:
            (folder / "chat_template.jinja").write_text(model.tokenizer.chat_template, encoding="utf-8")
    notes = [] if (folder / "tokenizer.json").is_file() else _make(model, folder)
    if (folder / "tokenizer.json").is_file():
        # The classes of the models build a tokenizer anew from its vocabulary, and lose steps of the file (SmolLM2's
        # digits); this one takes the file as it is, but knows no special tokens of its own.
        config["tokenizer_class"] = _ANY_CLASS
        config.pop("auto_map", None)
        config.setdefault("model_input_names", ["input_ids", "attention_mask"])
        config.setdefault("clean_up_tokenization_spaces", False)
        named = read_optional_json(folder / "special_tokens_map.json")
        for name, token in _special_tokens(model).items():
            if name not in config and name not in named:
                config[name] = token
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return notes


def eos_ids(model: Model) -> int | list[int] | None:
    """Tokens that end a text: EOS, and the ends of a turn and of a message where the GGUF has them."""
    metadata = model.tokenizer.metadata
    keys = (f"{_KEY}eot_token_id", f"{_KEY}eom_token_id")
    ends = [model.tokenizer.eos_id, *(int(metadata[key].value) for key in keys if key in metadata)]
    found = list(dict.fromkeys(i for i in ends if i is not None))
    return found[0] if len(found) == 1 else found or None


def pad_id(model: Model) -> int | None:
    """The padding token where there is one."""
    value = model.tokenizer.metadata.get(f"{_KEY}padding_token_id")
    return None if value is None else int(value.value)


def _special_tokens(model: Model) -> dict[str, str]:
    """Texts of the special tokens that the model has."""
    metadata, tokenizer = model.tokenizer.metadata, model.tokenizer
    ids = {
        "bos_token": tokenizer.bos_id,
        "eos_token": tokenizer.eos_id,
        "unk_token": _id(metadata, "unknown"),
        "pad_token": pad_id(model),
    }
    texts = metadata[f"{_KEY}tokens"].value
    return {name: texts[i] for name, i in ids.items() if i is not None}


def _make(model: Model, folder: Path) -> list[str]:
    """Write a tokenizer.json from the keys that describe the tokenizer in a GGUF."""
    metadata, origin, notes = model.tokenizer.metadata, model.source.path, []
    bos_id = model.tokenizer.bos_id if model.tokenizer.add_bos else None
    try:
        tokenizer = build(metadata, origin, bos_id)
        checked = build(metadata, origin, bos_id, runtime=True)
    except InputError as error:
        return [f"no tokenizer was written: {error}; copy the original model's tokenizer files into the folder"]
    checked.encode_special_tokens = True
    if checked.encode(TOKENIZER_SAMPLE, add_special_tokens=False).ids != model.tokenizer.encode(TOKENIZER_SAMPLE):
        notes.append(
            "tokenizer.json, made from the vocabulary, splits a3q's sample text differently from llama.cpp; "
            "replace the tokenizer files by the original model's"
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    return notes


def build(
    metadata: Mapping[str, GGUFValue], origin: object, bos_id: int | None, *, runtime: bool = False
) -> tokenizers.Tokenizer:
    """A `tokenizers.Tokenizer` from `tokenizer.*` keys; `bos_id` is what it puts in front of a text.

    Where llama.cpp only approximates the original's expression, `runtime` takes its own.
    """
    byte_level = metadata[f"{_KEY}model"].value == "gpt2"
    vocabulary = Vocabulary.from_gguf(metadata, byte_level, origin)
    try:
        tokenizer = _byte_level(metadata, vocabulary, origin, runtime) if byte_level else _pieces(metadata, vocabulary)
    except InputError:
        raise
    except Exception as error:  # the Rust side raises plain Exception
        raise InputError(f"{origin}: its merges do not fit its tokens ({reason(error)})") from error
    hidden = vocabulary.of_type(TokenType.CONTROL, TokenType.UNKNOWN)
    added = sorted(hidden | vocabulary.of_type(TokenType.USER_DEFINED))
    tokenizer.add_tokens([AddedToken(vocabulary.tokens[i], normalized=False, special=i in hidden) for i in added])
    eos_id = _id(metadata, "eos") if _flag(metadata, "add_eos_token", False) else None
    if bos_id is not None or eos_id is not None:
        front, back = ([] if i is None else [vocabulary.tokens[i]] for i in (bos_id, eos_id))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*front, "$A", *back],
            pair=[*front, "$A", *back, *front, "$B", *back],
            special_tokens=[(vocabulary.tokens[i], i) for i in {bos_id, eos_id} if i is not None],
        )
    return tokenizer


def _byte_level(
    metadata: Mapping[str, GGUFValue], vocabulary: Vocabulary, origin: object, runtime: bool
) -> tokenizers.Tokenizer:
    pre = metadata.get(f"{_KEY}pre")
    known = pretokenizers.pre_tokenizer_named("default" if pre is None else str(pre.value), origin)
    merges = metadata[f"{_KEY}merges"].value if f"{_KEY}merges" in metadata else []
    cuts = ((merge, merge.find(" ", 1)) for merge in merges)
    pairs = list(dict.fromkeys((merge[:cut], merge[cut + 1 :]) for merge, cut in cuts if cut > 0))
    # The loader wants this field, which changes no id.
    chosen = (known.runtime if runtime else None) or known.steps
    steps = [{**step, "trim_offsets": False} if step["type"] == "ByteLevel" else step for step in chosen]
    empty = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "model": {"type": "BPE", "vocab": {}, "merges": []},
    }
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(empty))
    tokenizer.model = models.BPE(vocabulary.ids, pairs, ignore_merges=known.ignore_merges)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pieces(metadata: Mapping[str, GGUFValue], vocabulary: Vocabulary) -> tokenizers.Tokenizer:
    """SentencePiece BPE as transformers writes it: merges ranked by the score of what they make."""
    ids = vocabulary.ids
    unmerged = vocabulary.of_type(TokenType.BYTE, TokenType.CONTROL, TokenType.UNKNOWN)
    ranked: list[tuple[float, int, int, int, str, str]] = []
    for i, token in enumerate(vocabulary.tokens):
        if i in unmerged:
            continue
        for cut in range(1, len(token)):
            left, right = ids.get(token[:cut]), ids.get(token[cut:])
            if left is not None and right is not None and not unmerged & {left, right}:
                ranked.append((-vocabulary.scores[i], i, left, right, token[:cut], token[cut:]))
    merges = [(left, right) for *_, left, right in sorted(ranked)]
    unknown = _id(metadata, "unknown")
    unknown = next(iter(sorted(vocabulary.of_type(TokenType.UNKNOWN))), 0) if unknown is None else unknown
    fallback = len(vocabulary.of_type(TokenType.BYTE)) == 256
    tokenizer = tokenizers.Tokenizer(
        models.BPE(ids, merges, unk_token=vocabulary.tokens[unknown], fuse_unk=True, byte_fallback=fallback)
    )
    prefix = _flag(metadata, "add_space_prefix", True)
    front: list[Any] = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*front, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _id(metadata: Mapping[str, GGUFValue], name: str) -> int | None:
    value = metadata.get(f"{_KEY}{name}_token_id")
    return None if value is None else int(value.value)


def _flag(metadata: Mapping[str, GGUFValue], name: str, default: bool) -> bool:
    value = metadata.get(f"{_KEY}{name}")
    return default if value is None else bool(value.value)
