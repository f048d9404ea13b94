"""The tokenizer files of a Hugging Face folder as a vocabulary, special tokens and a chat template.

Everything read here is untrusted: JSON only, checked before use, no code of the folder is run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from gguf import SpecialVocab, TokenType

from a3q.errors import InputError
from converters.pretokenizers import canonical
from converters.sentencepiece_vocab import SentencePieceModel
from converters.vocabulary import reason

FETCH = "fetch the folder's tokenizer files again"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; InputError when it cannot be read or is something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({reason(error)}); {FETCH}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds no JSON object; {FETCH}")
    return value


def read_optional_json(path: Path) -> dict[str, Any]:
    """A JSON object, empty when there is no such file."""
    return read_json(path) if path.is_file() else {}


@dataclass(frozen=True)
class Added:
    """A token added to a base vocabulary."""

    text: str
    special: bool

    @property
    def type(self) -> TokenType:
        """Special tokens are read only where asked for; the others always."""
        return TokenType.CONTROL if self.special else TokenType.USER_DEFINED


def read_added_tokens(folder: Path) -> dict[int, Added]:
    """Added tokens by id from all files that may state them; what tokenizer.json says counts most."""
    plain = read_optional_json(folder / "added_tokens.json")
    decoder = read_optional_json(folder / "tokenizer_config.json").get("added_tokens_decoder")
    listed = read_optional_json(folder / "tokenizer.json").get("added_tokens")
    entries: list[tuple[str, Any, Any]] = [("added_tokens.json", i, {"content": text}) for text, i in plain.items()]
    if isinstance(decoder, dict):
        entries += [("tokenizer_config.json", i, entry) for i, entry in decoder.items()]
    if isinstance(listed, list):
        entries += [("tokenizer.json", e.get("id") if isinstance(e, dict) else None, e) for e in listed]
    added: dict[int, Added] = {}
    for name, i, entry in entries:
        text = entry.get("content") if isinstance(entry, dict) else None
        number = int(i) if isinstance(i, str) and i.isdecimal() else i
        if not isinstance(text, str) or not isinstance(number, int) or number < 0:
            raise InputError(f"{folder / name}: added token {str(i)[:40]!r} has no id or no text; {FETCH}")
        added[number] = Added(text, bool(entry.get("special", False)))
    return added


@dataclass
class TokenList:
    """Tokens in the making, by id; gaps are filled at the end."""

    origin: Path
    vocab_size: int
    tokens: dict[int, str]
    scores: dict[int, float]
    types: dict[int, int]

    @classmethod
    def from_json(cls, path: Path, description: Mapping[str, Any], vocab_size: int) -> TokenList:
        """The base vocabulary of a tokenizer.json, all tokens normal."""
        model = description.get("model")
        vocab = model.get("vocab") if isinstance(model, Mapping) else None
        if not isinstance(vocab, dict) or not all(type(i) is int and i >= 0 for i in vocab.values()):
            raise InputError(f"{path}: model.vocab is not a table of tokens and ids; {FETCH}")
        tokens = {i: text for text, i in vocab.items()}
        if len(tokens) != len(vocab):
            raise InputError(f"{path}: two tokens of model.vocab have the same id; {FETCH}")
        return cls(path, vocab_size, tokens, {}, dict.fromkeys(tokens, int(TokenType.NORMAL)))

    @classmethod
    def from_sentencepiece(cls, path: Path, model: SentencePieceModel, vocab_size: int) -> TokenList:
        """The pieces of a tokenizer.model."""
        tokens, scores, types = (
            dict(enumerate(model.tokens)),
            dict(enumerate(model.scores)),
            dict(enumerate(model.types)),
        )
        return cls(path, vocab_size, tokens, scores, types)

    def add(self, added: Mapping[int, Added]) -> None:
        """Set the texts and types of `added`; unknown, control and byte tokens keep their type."""
        kept = (TokenType.UNKNOWN, TokenType.CONTROL, TokenType.BYTE)
        for i, token in added.items():
            self.tokens[i] = token.text
            if self.types.get(i) not in kept:
                self.types[i] = int(token.type)

    def spell_spaces(self) -> None:
        """Write user-defined pieces with spaces for ▁: llama.cpp finds them in the text as it was given."""
        present = set(self.tokens.values())
        for i, text in self.tokens.items():
            if self.types[i] == TokenType.USER_DEFINED and text.replace("▁", " ") not in present:
                self.tokens[i] = text.replace("▁", " ")

    def filled(self) -> tuple[list[str], list[float], list[int]]:
        """Lists of `vocab_size` items, ids without a token padded; InputError when an id is beyond that."""
        size, beyond = self.vocab_size, [i for i in self.tokens if i >= self.vocab_size]
        if beyond:
            raise InputError(
                f"{self.origin}: token {self.tokens[beyond[0]]!r} has id {beyond[0]}, but the model embeds only {size} "
                f"tokens (vocab_size in config.json); use the tokenizer files that belong to the weights"
            )
        present = set(self.tokens.values())
        for i in range(size):
            if i not in self.tokens:
                text = f"[PAD{i}]"
                while text in present:  # llama.cpp aborts on a token that is there twice
                    text += "_"
                self.tokens[i], self.types[i] = text, int(TokenType.UNUSED)
        ids = range(size)
        return [self.tokens[i] for i in ids], [self.scores.get(i, 0.0) for i in ids], [self.types[i] for i in ids]


def pieces_from_json(path: Path, description: Mapping[str, Any], merges: list[str], vocab_size: int) -> TokenList:
    """SentencePiece pieces of a BPE tokenizer.json with byte fallback (Llama 2 without its tokenizer.model).

    The scores there once were are gone, but only their order matters: the rank of the merge that makes a token.
    """
    pieces = TokenList.from_json(path, description, vocab_size)
    ids = {text: i for i, text in pieces.tokens.items()}
    for rank, merge in enumerate(merges):
        i = ids.get(merge.replace(" ", "", 1))
        if i is not None:
            pieces.scores.setdefault(i, -float(rank))
    for text, i in ids.items():
        if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            pieces.types[i] = int(TokenType.BYTE)
        elif len(text) > 1:  # made by no merge: last of all
            pieces.scores.setdefault(i, -float(len(merges)))
    unknown = description["model"].get("unk_token")
    unknown_id = ids.get(unknown if isinstance(unknown, str) else "<unk>")
    if unknown_id is not None:
        pieces.types[unknown_id] = int(TokenType.UNKNOWN)
    return pieces


def space_prefix(path: Path, description: Mapping[str, Any]) -> bool:
    """Whether a SentencePiece-like tokenizer.json puts a space in front; InputError when it does what llama.cpp cannot.

    Known are a normalizer that replaces spaces by ▁ (behind a Prepend or not), and Metaspace without splitting (which,
    unlike SentencePiece and llama.cpp, adds no space to a text that begins with one).
    """
    node = description.get("normalizer")
    inner = node.get("normalizers") if isinstance(node, Mapping) and node.get("type") == "Sequence" else [node]
    prefix = False
    for step in inner if isinstance(inner, list) else [inner]:
        match step:
            case None | {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}:
                pass
            case {"type": "Prepend", "prepend": "▁"}:
                prefix = True
            case _:
                kind = step.get("type") if isinstance(step, Mapping) else step
                raise InputError(
                    f"{path}: llama.cpp has no normalizer {kind!r} for SentencePiece BPE; a3q cannot use it"
                )
    for step in canonical(description.get("pre_tokenizer")):
        match step:
            case {"type": "Metaspace", "replacement": "▁", "split": False}:
                prefix = prefix or step.get("prepend_scheme") != "never"
            case _:
                raise InputError(
                    f"{path}: llama.cpp splits no SentencePiece BPE text by {step.get('type')!r}; a3q cannot use it"
                )
    return prefix


def read_special(folder: Path, load_merges: bool) -> SpecialVocab:
    """Special token ids, add_bos and the like, merges and chat template, by gguf's own reader."""
    try:
        special = SpecialVocab(folder, load_merges=load_merges)
        if special.chat_template is None and (folder / "chat_template.jinja").is_file():
            special.chat_template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    # It checks nothing: whatever is wrong in the JSON comes out as one of these.
    except (OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise InputError(f"{folder}: the tokenizer files are broken ({reason(error)}); {FETCH}") from error
    return special


def hf_tokenizer(path: Path) -> tokenizers.Tokenizer:
    """The tokenizer.json as it is, without truncation or padding."""
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust side raises plain Exception
        raise InputError(f"{path}: cannot be loaded ({reason(error)}); {FETCH}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
