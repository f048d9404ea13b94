"""A vocabulary as a GGUF file states it, and what follows from it alone: splitting text at special tokens and decoding.

The rules are llama.cpp's (src/llama-vocab.cpp), since it is what runs the written model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from gguf import TokenType
from gguf.gguf_writer import GGUFValue

from a3q.errors import InputError

TOKENS, SCORES, TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.scores", "tokenizer.ggml.token_type"

Fragment = str | int
"""Text still to be tokenized, or the id of a special token."""

# llama.cpp takes tokens with these texts for control tokens whatever the file says of them.
_CONTROL_TEXTS = (
    "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s> <|eom_id|> "
    "<EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response> <｜end▁of▁sentence｜> "
    "[e~[ <|fim_prefix|> <fim-prefix> <fim_prefix> <｜fim▁begin｜> <PRE> ▁<PRE> <|code_prefix|> <|prefix|> "
    "<|fim_suffix|> <fim-suffix> <fim_suffix> <｜fim▁hole｜> <SUF> ▁<SUF> <|code_suffix|> <|suffix|> <|fim_middle|> "
    "<fim-middle> <fim_middle> <｜fim▁end｜> <MID> ▁<MID> <|code_middle|> <|middle|> <|fim_pad|> <fim-pad> <fim_pad> "
    "<PAD> [PAD] <|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame> <|file_sep|>"
)
_ALWAYS_CONTROL = frozenset(_CONTROL_TEXTS.split())
# ... and these always for text that the user may write (gpt-oss).
_ALWAYS_USER_DEFINED = frozenset(("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"))


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id, with their scores and types."""

    tokens: list[str]
    scores: list[float]
    types: list[int]
    byte_level: bool
    """Texts of normal tokens are written in GPT-2's byte alphabet (`gpt2`), else with ▁ for a space (`llama`)."""

    @classmethod
    def from_gguf(cls, fields: Mapping[str, GGUFValue], byte_level: bool, origin: object) -> Vocabulary:
        """Read and check the arrays; InputError when one is absent, of another type or too short."""
        if TOKENS not in fields:
            raise InputError(f"{origin}: no {TOKENS}, so the file holds no vocabulary; use a complete model file")
        tokens = _list_of(fields[TOKENS].value, (str,))
        if not tokens:
            raise InputError(f"{origin}: {TOKENS} is not a list of strings; the file is damaged, fetch it again")
        # llama.cpp names an empty token so.
        texts = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
        arrays: list[list[Any]] = []
        for key, kinds, default in ((SCORES, (int, float), 0.0), (TYPES, (int,), int(TokenType.NORMAL))):
            values = _list_of(fields[key].value, kinds) if key in fields else [default] * len(texts)
            if values is None or len(values) < len(texts):
                raise InputError(
                    f"{origin}: {key} is not a list of {len(texts)} numbers, one a token; "
                    f"the file is damaged, fetch it again"
                )
            arrays.append(values[: len(texts)])
        vocabulary = cls(texts, [float(s) for s in arrays[0]], [int(t) for t in arrays[1]], byte_level)
        vocabulary.check_unique(origin)
        return vocabulary

    def check_unique(self, origin: object) -> None:
        """llama.cpp aborts on a token that is there twice."""
        if len(self.ids) != len(self.tokens):
            twice = next(text for i, text in enumerate(self.tokens) if self.ids[text] != i)
            raise InputError(f"{origin}: token {twice!r} is in the vocabulary twice, which llama.cpp cannot load")

    @cached_property
    def ids(self) -> dict[str, int]:
        """Token text → id."""
        return {text: i for i, text in enumerate(self.tokens)}

    def of_type(self, *types: TokenType) -> frozenset[int]:
        """Ids of the tokens that llama.cpp takes for one of `types`."""
        return frozenset(i for i in range(len(self.tokens)) if self._effective_type(i) in types)

    def _effective_type(self, i: int) -> int:
        if self.tokens[i] in _ALWAYS_CONTROL:
            return int(TokenType.CONTROL)
        return int(TokenType.USER_DEFINED) if self.tokens[i] in _ALWAYS_USER_DEFINED else self.types[i]

    @cached_property
    def _hidden(self) -> frozenset[int]:
        return self.of_type(TokenType.CONTROL, TokenType.UNKNOWN)

    @cached_property
    def _longest_first(self) -> list[int]:
        special = self._hidden | self.of_type(TokenType.USER_DEFINED)
        return sorted(special, key=lambda i: -len(self.tokens[i].encode()))

    def fragments(self, text: str, special: bool, unsplit: Collection[int] = ()) -> list[Fragment]:
        """`text` cut at its special tokens, the longest token first; `unsplit` tokens are left in the text."""
        fragments: list[Fragment] = [text] if text else []
        for i in self._longest_first:
            token = self.tokens[i]
            if token in text and i not in unsplit and (special or i not in self._hidden):
                fragments = [piece for part in fragments for piece in _cut(part, token, i)]
        return fragments

    @cached_property
    def _bytes(self) -> list[bytes]:
        """What each token adds to decoded text; control tokens add nothing."""
        verbatim = self.of_type(TokenType.USER_DEFINED)
        pieces = []
        for i, token in enumerate(self.tokens):
            if i in self._hidden:
                pieces.append(b"")
            elif i in verbatim:
                pieces.append(token.encode())
            elif self.byte_level:
                pieces.append(b"".join(_BYTE_OF.get(c, c.encode()) for c in token))
            elif self.types[i] == TokenType.BYTE:
                pieces.append(bytes([int(token[3:5], 16)]))
            else:
                pieces.append(token.replace("▁", " ").encode())
        return pieces

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(self._bytes[i] for i in ids).decode("utf-8", errors="replace")


def reason(error: BaseException) -> str:
    """What another library says is wrong, short and on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."


def _list_of(value: object, kinds: tuple[type, ...]) -> list[Any] | None:
    """`value` as a list when it is a sequence whose items are all of `kinds`."""
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(item, kinds) for item in value):
        return None
    return list(value)


def _cut(part: Fragment, token: str, i: int) -> Iterator[Fragment]:
    if isinstance(part, int):
        yield part
        return
    first, *rest = part.split(token)
    if first:
        yield first
    for piece in rest:
        yield i
        if piece:
            yield piece


def _byte_alphabet() -> dict[str, bytes]:
    """GPT-2's character for each byte: printable Latin-1 stands for itself, the others follow from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (b for b in range(256) if b not in printable)
    return {chr(b): bytes([b]) for b in printable} | {chr(256 + n): bytes([b]) for n, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()
