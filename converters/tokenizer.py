"""Tokenizers from a GGUF file or a Hugging Face folder: one class, and the GGUF keys that describe it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
from gguf import GGUFWriter, TokenType
from gguf.gguf_writer import GGUFValue

from a3q.errors import InputError
from a3q.model import Tokenizer
from converters import pretokenizers
from converters.hf_vocabulary import (
    FETCH,
    TokenList,
    hf_tokenizer,
    pieces_from_json,
    read_added_tokens,
    read_json,
    read_optional_json,
    read_special,
    space_prefix,
)
from converters.pretokenizers import PreTokenizer
from converters.sentencepiece_vocab import Encode, encoder, processor_for, read_sentencepiece
from converters.vocabulary import Vocabulary, reason

MODEL, PRE, MERGES = "tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.ggml.merges"
ADD_BOS, ADD_SPACE_PREFIX = "tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_space_prefix"
CHAT_TEMPLATE = "tokenizer.chat_template"

_DEFAULT_IDS = {"llama": (1, 2), "gpt2": (11, 11)}
"""BOS and EOS that llama.cpp takes when the file names none."""


@dataclass
class ModelTokenizer:
    """`a3q.model.Tokenizer` over a vocabulary and a way to encode."""

    metadata: dict[str, GGUFValue]
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    add_bos: bool
    chat_template: str | None
    _space_prefix: bool
    _vocabulary: Vocabulary = field(repr=False)
    _encode: Encode = field(repr=False)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of `text`, no BOS or EOS added; `special` reads control tokens written out in the text."""
        return self._encode(text, special)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, control tokens left out, as is the space that encoding put in front."""
        text = self._vocabulary.decode(ids)
        return text.removeprefix(" ") if self._space_prefix else text


def tokenizer_from_gguf(fields: Mapping[str, GGUFValue], origin: Path) -> Tokenizer:
    """The tokenizer of a GGUF file from its `tokenizer.*` keys, which are all kept as they are.

    A pre-tokenizer that a3q does not know is an InputError only when text is encoded.
    """
    metadata = {key: value for key, value in fields.items() if key.startswith("tokenizer.")}
    model = _value(metadata, MODEL, str, origin, None)
    if model not in _DEFAULT_IDS:
        raise InputError(
            f"{origin}: tokenizer model {model!r} ({MODEL}) is not supported; "
            f"those that work: gpt2 (byte-level BPE), llama (SentencePiece BPE)"
        )
    vocabulary = Vocabulary.from_gguf(metadata, model == "gpt2", origin)
    if model == "llama":
        processor = processor_for(vocabulary, _special_id(metadata, "unknown", len(vocabulary.tokens), origin), origin)
        prefix = " " if _space_prefix(metadata, origin) else ""
        return _assemble(metadata, vocabulary, encoder(vocabulary, processor, prefix), True, origin)
    name = _value(metadata, PRE, str, origin, None) or "default"
    merges = _merges(metadata, origin)
    try:
        known = pretokenizers.pre_tokenizer_named(name, origin)
    except InputError as error:
        return _assemble(metadata, vocabulary, _refuse(str(error)), False, origin)
    encode = _byte_level_encoder(vocabulary, merges, known, origin)
    return _assemble(metadata, vocabulary, encode, known.add_bos, origin)


def tokenizer_from_hf(folder: Path, vocab_size: int, pre: str | None = None) -> Tokenizer:
    """The tokenizer of a Hugging Face folder, with GGUF keys for exactly `vocab_size` tokens.

    `pre` names llama.cpp's pre-tokenizer for a byte-level tokenizer whose own is not recognised; text is always encoded
    as the folder's files say.
    """
    if pre is not None:
        pretokenizers.check_override(pre)
    path, piece_path = folder / "tokenizer.json", folder / "tokenizer.model"
    description = read_json(path) if path.is_file() else None
    model = {} if description is None else description.get("model")
    if not isinstance(model, dict):
        raise InputError(f"{path}: has no model; {FETCH}")
    is_bpe = model.get("type") == "BPE" or (model.get("type") is None and "merges" in model)
    if description is not None and is_bpe and not model.get("byte_fallback"):
        return _byte_level_from_hf(path, description, vocab_size, pre)
    if pre is not None:
        raise InputError(
            f"--pre {pre}: {folder} holds no byte-level BPE tokenizer, so there is nothing to name; leave it out"
        )
    if piece_path.is_file():
        return _pieces_from_hf(piece_path, vocab_size)
    if description is None:
        raise InputError(
            f"{folder}: no tokenizer.json or tokenizer.model; copy there what the original model's "
            f"tokenizer.save_pretrained() writes"
        )
    if not is_bpe:
        raise InputError(f"{path}: a {model.get('type')!r} tokenizer is not supported; a3q reads BPE tokenizers")
    return _pieces_from_hf_json(path, description, vocab_size)


def _byte_level_from_hf(path: Path, description: dict[str, Any], vocab_size: int, pre: str | None) -> Tokenizer:
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if description["model"].get(key):
            raise InputError(
                f"{path}: model.{key} is set, which llama.cpp does not know; a3q cannot use this tokenizer"
            )
    tokens = TokenList.from_json(path, description, vocab_size)
    encode = _hf_encoder(path)
    name = pre or pretokenizers.recognise(description, path)
    tokens.add(read_added_tokens(path.parent))
    metadata = _gguf_keys(path.parent, "gpt2", name, tokens, default_bos=False)
    return _from_hf(metadata, True, encode, path)


def _pieces_from_hf_json(path: Path, description: dict[str, Any], vocab_size: int) -> Tokenizer:
    encode = _hf_encoder(path)
    prefix = space_prefix(path, description)
    merges = read_special(path.parent, load_merges=True).merges
    if not merges:
        raise InputError(f"{path}: model.merges is absent or empty; {FETCH}")
    tokens = pieces_from_json(path, description, merges, vocab_size)
    tokens.add(read_added_tokens(path.parent))
    tokens.spell_spaces()
    metadata = _gguf_keys(path.parent, "llama", "default", tokens, default_bos=False, space_prefix=prefix)
    return _from_hf(metadata, False, encode, path)


def _pieces_from_hf(path: Path, vocab_size: int) -> Tokenizer:
    model = read_sentencepiece(path)
    tokens = TokenList.from_sentencepiece(path, model, vocab_size)
    tokens.add(read_added_tokens(path.parent))
    tokens.spell_spaces()
    default_bos = not (path.parent / "tokenizer.json").is_file()  # which says so in its post-processor
    metadata = _gguf_keys(
        path.parent, "llama", "default", tokens,
        default_bos=default_bos, space_prefix=model.add_space_prefix, special_ids=model.special_ids(),
    )  # fmt: skip
    vocabulary = Vocabulary.from_gguf(metadata, False, path)
    # The processor finds its own user-defined pieces, without a space in front of what follows (llama.cpp adds one).
    own = frozenset(i for i, kind in enumerate(model.types) if kind == TokenType.USER_DEFINED)
    return _assemble(metadata, vocabulary, encoder(vocabulary, model.processor, "", own), default_bos, path)


def _gguf_keys(
    folder: Path, model: str, pre: str, tokens: TokenList, *,
    default_bos: bool, space_prefix: bool | None = None, special_ids: Mapping[str, int] | None = None,
) -> dict[str, GGUFValue]:  # fmt: skip
    """All `tokenizer.*` keys, as gguf's own writer types them; nothing is written."""
    special = read_special(folder, load_merges=model == "gpt2")
    texts, scores, types = tokens.filled()
    config = read_optional_json(folder / "tokenizer_config.json")
    ids = special.special_token_ids
    by_text = {text: i for i, text in enumerate(texts)}
    for name in ("bos", "eos", "unk", "pad"):
        entry = config.get(f"{name}_token")
        text = entry.get("content") if isinstance(entry, dict) else entry
        # SpecialVocab looks a text up in tokenizer.json's added tokens only.
        if isinstance(text, str) and text in by_text and (name not in ids or not (folder / "tokenizer.json").is_file()):
            ids[name] = by_text[text]
        if special_ids and name in special_ids:
            ids.setdefault(name, special_ids[name])
    for name in [name for name, i in ids.items() if i >= len(texts)]:
        if name in ("bos", "eos"):
            raise InputError(
                f"{folder}: {name}_token has id {ids[name]}, but the model has only {len(texts)} tokens; "
                f"correct {name}_token_id in config.json"
            )
        del ids[name]  # as llama.cpp ignores it; a pad id just beyond the vocabulary is common
    for name, default in (("bos", default_bos), ("eos", False)):
        if special.add_special_token.setdefault(name, default) and name not in ids:
            raise InputError(
                f"{folder}: a {name.upper()} token is to be added to every text, but {name}_token is no token of the "
                f"vocabulary; correct it in tokenizer_config.json"
            )
    if model == "gpt2" and not special.merges:
        raise InputError(f"{tokens.origin}: model.merges is absent or empty, and there is no merges.txt; {FETCH}")

    writer = GGUFWriter(None, "llama")
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(texts)
    if model == "llama":
        writer.add_token_scores(scores)
    writer.add_token_types(types)
    if space_prefix is not None:
        writer.add_add_space_prefix(space_prefix)
    special.add_to_gguf(writer, quiet=True)
    return {key: value for key, value in writer.kv_data[0].items() if key.startswith("tokenizer.")}


def _hf_encoder(path: Path) -> Encode:
    tokenizer = hf_tokenizer(path)

    def encode(text: str, special: bool) -> list[int]:
        tokenizer.encode_special_tokens = not special
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    return encode


def _from_hf(metadata: dict[str, GGUFValue], byte_level: bool, encode: Encode, path: Path) -> Tokenizer:
    return _assemble(metadata, Vocabulary.from_gguf(metadata, byte_level, path), encode, False, path)


def _byte_level_encoder(vocabulary: Vocabulary, merges: list[str], known: PreTokenizer, origin: object) -> Encode:
    # The first space not at the start divides a merge; the first of two equal merges counts.
    cuts = ((merge, merge.find(" ", 1)) for merge in merges)
    pairs = list(dict.fromkeys((merge[:cut], merge[cut + 1 :]) for merge, cut in cuts if cut > 0))
    # The loader wants this field, which changes no id.
    steps = [{**s, "trim_offsets": False} if s["type"] == "ByteLevel" else s for s in known.runtime or known.steps]
    splitter = {"type": "Sequence", "pretokenizers": steps}
    empty = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": splitter,
        "model": {"type": "BPE", "vocab": {}, "merges": []},
    }
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(empty))
    try:
        tokenizer.model = tokenizers.models.BPE(vocabulary.ids, pairs, ignore_merges=known.ignore_merges)
    except Exception as error:  # the Rust side raises plain Exception
        raise InputError(f"{origin}: {MERGES} do not fit the tokens ({reason(error)}); fetch the file again") from error

    def encode(text: str, special: bool) -> list[int]:
        ids: list[int] = []
        for part in vocabulary.fragments(text, special):
            ids.extend([part] if isinstance(part, int) else tokenizer.encode(part, add_special_tokens=False).ids)
        return ids

    return encode


def _refuse(message: str) -> Callable[[str, bool], list[int]]:
    def encode(text: str, special: bool) -> list[int]:
        raise InputError(message)

    return encode


def _assemble(
    metadata: dict[str, GGUFValue], vocabulary: Vocabulary, encode: Encode, default_bos: bool, origin: object
) -> Tokenizer:
    size = len(vocabulary.tokens)
    for key, value in metadata.items():
        if key.endswith("_token_id") and not (isinstance(value.value, int) and 0 <= value.value < size):
            raise InputError(
                f"{origin}: {key} is {value.value!r}, but the vocabulary has {size} tokens; fetch the file again"
            )
    add_bos = bool(_value(metadata, ADD_BOS, bool, origin, default_bos))
    bos, eos = (_special_id(metadata, name, size, origin) for name in ("bos", "eos"))
    default = _DEFAULT_IDS[metadata[MODEL].value]
    # Without the keys, byte-level BPE has no BOS or EOS worth the name; only where one is added does it matter.
    if not vocabulary.byte_level or add_bos:
        bos = default[0] if bos is None and default[0] < size else bos
    if not vocabulary.byte_level:
        eos = default[1] if eos is None and default[1] < size else eos
    template = _value(metadata, CHAT_TEMPLATE, str, origin, None)
    strip = not vocabulary.byte_level and _space_prefix(metadata, origin)
    return ModelTokenizer(metadata, size, bos, eos, add_bos, template, strip, vocabulary, encode)


def _space_prefix(metadata: Mapping[str, GGUFValue], origin: object) -> bool:
    return bool(_value(metadata, ADD_SPACE_PREFIX, bool, origin, True))


def _value(metadata: Mapping[str, GGUFValue], key: str, kind: type, origin: object, default: Any) -> Any:
    """Value of `key`, or `default`; InputError when it is not of `kind`."""
    if key not in metadata:
        return default
    value = metadata[key].value
    if not isinstance(value, kind):
        raise InputError(f"{origin}: {key} is not of type {kind.__name__}; the file is damaged, fetch it again")
    return value


def _special_id(metadata: Mapping[str, GGUFValue], name: str, size: int, origin: object) -> int | None:
    value = _value(metadata, f"tokenizer.ggml.{name}_token_id", int, origin, None)
    return value if value is not None and 0 <= value < size else None


def _merges(metadata: Mapping[str, GGUFValue], origin: object) -> list[str]:
    merges = metadata[MERGES].value if MERGES in metadata else None
    if isinstance(merges, str) or not isinstance(merges, Sequence) or not all(isinstance(m, str) for m in merges):
        raise InputError(f"{origin}: {MERGES} is absent or not a list of strings; the file is damaged, fetch it again")
    return list(merges)
