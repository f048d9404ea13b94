"""SentencePiece BPE (`llama` in GGUF): a processor built from a vocabulary, and a vocabulary read from a model file."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import TokenType
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

from a3q.errors import InputError
from converters.vocabulary import Vocabulary, reason

_BPE = 2
"""TrainerSpec.ModelType."""

Encode = Callable[[str, bool], list[int]]
"""Token ids of a text; the flag reads control tokens written out in it."""


def processor_for(vocabulary: Vocabulary, unknown_id: int | None, origin: object) -> Any:
    """A SentencePieceProcessor that tokenizes plain text as llama.cpp does with this vocabulary.

    llama.cpp merges into any token, control and unused ones as well, so all of those become normal pieces here.
    SentencePiece wants exactly one unknown piece and byte pieces it does not merge into: text that spells out `<unk>`
    or `<0x0A>` is the one place where the two may differ.
    """
    types = [t if t == TokenType.BYTE else int(TokenType.NORMAL) for t in vocabulary.types]
    unknown = [i for i, t in enumerate(vocabulary.types) if t == TokenType.UNKNOWN]
    unknown = unknown or [0 if unknown_id is None else unknown_id]
    types[unknown[0]] = int(TokenType.UNKNOWN)
    byte_tokens = {token for token, t in zip(vocabulary.tokens, types, strict=True) if t == TokenType.BYTE}
    if strange := [token for token in byte_tokens if not re.fullmatch("<0x[0-9A-F]{2}>", token)]:
        raise InputError(f"{origin}: byte token {strange[0]!r} is not of the form <0x0A>; fetch the file again")

    proto = sentencepiece_model_pb2.ModelProto()
    proto.trainer_spec.model_type = _BPE
    proto.trainer_spec.byte_fallback = len(byte_tokens) == 256
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = False
    proto.normalizer_spec.remove_extra_whitespaces = False
    proto.normalizer_spec.escape_whitespaces = True
    try:
        for token, score, kind in zip(vocabulary.tokens, vocabulary.scores, types, strict=True):
            proto.pieces.add(piece=token, score=score, type=kind)
        return SentencePieceProcessor(model_proto=proto.SerializeToString())
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"{origin}: SentencePiece refuses the vocabulary ({reason(error)}); fetch the file again"
        ) from error


def encoder(vocabulary: Vocabulary, processor: Any, prefix: str, unsplit: Collection[int] = ()) -> Encode:
    """Encode the text between special tokens piece by piece, each piece behind `prefix`, as llama.cpp does.

    Hugging Face puts that space at the start of a text only, and SentencePiece none after its user-defined pieces.
    """

    def encode(text: str, special: bool) -> list[int]:
        ids: list[int] = []
        for part in vocabulary.fragments(text, special, unsplit):
            ids.extend([part] if isinstance(part, int) else processor.encode(prefix + part))
        return ids

    return encode


@dataclass(frozen=True)
class SentencePieceModel:
    """A `tokenizer.model`: its pieces and its own processor, which adds the space in front by itself."""

    tokens: list[str]
    scores: list[float]
    types: list[int]
    add_space_prefix: bool
    processor: Any

    def special_ids(self) -> dict[str, int]:
        """Ids of bos, eos, unk and pad as far as the model has them."""
        found = {name: int(getattr(self.processor, f"{name}_id")()) for name in ("bos", "eos", "unk", "pad")}
        return {name: i for name, i in found.items() if i >= 0}


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Read `path`; InputError when it is no SentencePiece model or not of type BPE."""
    proto = sentencepiece_model_pb2.ModelProto()
    try:
        content = path.read_bytes()
        proto.ParseFromString(content)
        processor = SentencePieceProcessor(model_proto=content)
    except Exception as error:  # the errors of protobuf and of SentencePiece have no base in common
        raise InputError(f"{path}: not a SentencePiece model ({reason(error)}); fetch the file again") from error
    if proto.trainer_spec.model_type != _BPE:
        raise InputError(
            f"{path}: SentencePiece model of another type than BPE, which llama.cpp's `llama` tokenizer would split "
            f"differently; a3q reads BPE models only"
        )
    # A normalizer other than identity (NFKC, or runs of spaces folded) is left out by llama.cpp. Plain text is the
    # same with and without, so such a model is read; the verify stage shows what differs.
    return SentencePieceModel(
        tokens=[piece.piece for piece in proto.pieces],
        scores=[piece.score for piece in proto.pieces],
        types=[int(piece.type) for piece in proto.pieces],  # numbered as in GGUF
        add_space_prefix=bool(proto.normalizer_spec.add_dummy_prefix),
        processor=processor,
    )
