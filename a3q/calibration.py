"""Where calibration tokens come from: the model itself, a text file, a .jsonl file or a named data set."""

from __future__ import annotations

import codecs
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import jinja2
import torch
from torch import Tensor

from a3q.errors import InputError
from a3q.forward import compute_dtype
from a3q.model import Model, Tokenizer, free_memory
from a3q.perplexity import read_text
from a3q.sampling import Following, sample, shortest
from converters.chat_template import compile_template

SELF = "self"
"""The source that needs no data."""
HELD_OUT = 4
HELD_OUT_LENGTH = 512
MINIMUM_TOKENS = 1024
"""Less text than this is refused."""
MINIMUM_LENGTH = 128
"""Windows of a short text are made shorter, but not shorter than this."""

CACHE_BYTES = 3 << 29
"""Key/value cache of the sequences that a model writes side by side on a CPU."""
_LOGIT_BYTES = 24
"""For each entry of the vocabulary and sequence on a GPU: logits, probabilities and their sums."""
_READ_BYTES = 24
"""For each dimension of a layer, inside and out, and token of a prompt on a GPU; more than a layer's tensors take."""

_WHOLE_FILE = 4 << 20
"""Bytes of a file that is always tokenized whole; a larger one only if it has few bytes for the tokens wanted."""
_BYTES_PER_TOKEN = 16
"""More than nearly all text needs; a quarter is usual."""
_LINE_LIMIT = 64 << 20
_ROW_CHARACTERS = 1 << 16
_HUB_TIMEOUT_S = 5.0
_ALL = 1 << 60
_NORMAL = 1
"""`tokenizer.ggml.token_type` of a token that is a piece of text."""
_USE_FILE = "pass a text file instead"

OnTokens = Callable[[int], None]


@dataclass(frozen=True)
class Calibration:
    """Token windows to measure a model on, and others of the same source that are kept for checking."""

    tokens: Tensor
    """int64 `[B, length]`"""
    held_out: Tensor
    """int64 `[b, length']`; no position of the text is in both."""
    source: str
    """For provenance: `self`, the file's name or the data set's."""
    description: str
    """One line for the summary."""


def calibration_tokens(
    model: Model,
    source: str,
    count: int,
    length: int,
    *,
    seed: int,
    device: torch.device,
    on_tokens: OnTokens = lambda _: None,
) -> Calibration:
    """`count` windows of `length` tokens from `source`: `self`, a file, or a data set as `name[:config[:split]]`.

    A short text gives fewer and shorter windows, which `description` says; InputError below `MINIMUM_TOKENS`.
    """
    if source == SELF:
        ids = self_text(model, count + HELD_OUT, length, seed, device, on_tokens)
        description = f"{count} × {length} tokens that the model wrote itself"
        return Calibration(ids[:count], ids[count:, :HELD_OUT_LENGTH].contiguous(), SELF, description)
    name, stream = _read(source, _Rows(model.tokenizer), [size for size, _ in _windows(_ALL, count, length)])
    if len(stream) < MINIMUM_TOKENS:
        raise InputError(
            f"{source}: only {len(stream)} tokens of text; calibration needs at least {MINIMUM_TOKENS}; "
            f"give more text or use --calib {SELF}"
        )
    tokens, held_out = _cut(stream, _windows(len(stream), count, length), model.tokenizer)
    description = f"{tokens.shape[0]} × {tokens.shape[1]} tokens of {name}"
    if tokens.shape != (count, length):
        description += f", which has no more ({count} × {length} wanted)"
    return Calibration(tokens, held_out, name, description)


def mixed(parts: Sequence[Calibration]) -> Calibration:
    """Several sources as one: windows cut to the shortest length, the held-out ones shared out evenly."""
    if len(parts) == 1:
        return parts[0]
    length = min(part.tokens.shape[1] for part in parts)
    held_length = min(part.held_out.shape[1] for part in parts)
    share = max(1, HELD_OUT // len(parts))
    same = all(part.tokens.shape[1] == length for part in parts)
    return Calibration(
        torch.cat([part.tokens[:, :length] for part in parts]),
        torch.cat([part.held_out[:share, :held_length] for part in parts]),
        " + ".join(part.source for part in parts),
        " and ".join(part.description for part in parts) + ("" if same else f", all cut to {length} tokens"),
    )


def self_text(
    model: Model, count: int, length: int, seed: int, device: torch.device, on_tokens: OnTokens = lambda _: None
) -> Tensor:
    """Text that the model writes after a first token drawn uniformly from the normal ones: int64 `[count, length]`."""
    writer = Writer(model, length, device, on_tokens)
    # The drawn tokens must not decide what is drawn next, so sampling has seeds of its own.
    return torch.cat(list(writer.batches(first_tokens(model, count, seed), seed + 1)))


def first_tokens(model: Model, count: int, seed: int) -> Tensor:
    """Beginnings of texts, `[count, 1 or 2]`: BOS if the tokenizer adds it, and a token drawn from the normal ones."""
    tokenizer = model.tokenizer
    types = tokenizer.metadata.get("tokenizer.ggml.token_type")
    kinds = [_NORMAL] * tokenizer.vocab_size if types is None else types.value
    normal = torch.tensor([i for i, kind in enumerate(kinds[: model.config.vocab_size]) if kind == _NORMAL])
    generator = torch.Generator().manual_seed(seed)
    tokens = normal[torch.randint(len(normal), (count, 1), generator=generator)]
    if tokenizer.add_bos and tokenizer.bos_id is not None:
        tokens = torch.cat([torch.full_like(tokens, tokenizer.bos_id), tokens], dim=1)
    return tokens


class Writer:
    """A model that writes texts of `length` tokens, as many side by side as memory allows.

    InputError where the model does not go into memory.
    """

    def __init__(self, model: Model, length: int, device: torch.device, on_tokens: OnTokens = lambda _: None) -> None:
        self._model, self._length, self._device, self._on_tokens = model, length, device, on_tokens
        self._free = _room(model, device)

    def batches(
        self, prompts: Tensor, seed: int, following: Following | None = None, followed: Tensor | None = None
    ) -> Iterator[Tensor]:
        """Texts that begin with the rows of `prompts` `[count, P]`, as `sample` takes them: int64 `[b, length]` (CPU).

        As many seeds are used up as there are prompts.
        """
        batch = min(self._side_by_side(shortest(prompts)), len(prompts))
        for start in range(0, len(prompts), batch):
            these = slice(start, start + batch)
            yield sample(
                self._model,
                prompts[these],
                self._length,
                temperature=1.0,
                top_p=1.0,
                seed=seed + start,
                device=self._device,
                on_tokens=self._on_tokens,
                following=following,
                followed=None if followed is None else followed[these],
            )

    def _side_by_side(self, prompt: int) -> int:
        """Sequences that are written at the same time: the more the faster, as far as their caches, their logits and
        the reading of `prompt` tokens go in."""
        config, device, length = self._model.config, self._device, self._length
        if device.type != "cuda":
            return max(1, CACHE_BYTES // int(length * config.kv_bytes_per_token(4)))
        cache = int(length * config.kv_bytes_per_token(compute_dtype(device, config.hidden_size).itemsize))
        read = prompt * _READ_BYTES * (config.hidden_size + config.widest.intermediate_size)
        return max(1, self._free // 4 * 3 // (cache + read + _LOGIT_BYTES * config.vocab_size))


def _room(model: Model, device: torch.device) -> int:
    """Bytes free beside the whole model; InputError where it, which is only ever read layer by layer otherwise, is too
    large to write text."""
    outside = sum(weight.numel() for weight in model.top.values())
    layers = model.parameters() - outside
    needed = 4 * outside + compute_dtype(device, model.config.hidden_size).itemsize * layers
    free = free_memory(device)
    if needed > free:
        raise InputError(
            f"--calib {SELF}: the model needs {needed / 1e9:.1f} GB of memory on {device} to write text itself and "
            f"{free / 1e9:.1f} GB are free; give a text file (--calib FILE), with which one layer at a time is enough"
        )
    return free - needed


# Windows of a stream of tokens


_Window = tuple[int, bool]
"""Length, and whether it is held out."""


def _windows(available: int, count: int, length: int) -> list[_Window]:
    """Windows that `available` tokens allow, in the order of the text, those held out spread among the others.

    A fifth of a short text is held out; the rest becomes at least two windows where two are asked for.
    """
    spare = max(available // 5, available - count * length)
    held_length = min(HELD_OUT_LENGTH, max(MINIMUM_LENGTH, spare // HELD_OUT))
    held = min(HELD_OUT, spare // held_length)
    rest = available - held * held_length
    # As many windows as use up the text, each shortened a little, unless that makes them too short.
    used = min(count, max(2, min(math.ceil(rest / length), rest // min(length, MINIMUM_LENGTH))))
    total = used + held
    kept = {(2 * i + 1) * total // (2 * held) for i in range(held)}
    shortened = min(length, rest // used)
    return [(held_length, True) if j in kept else (shortened, False) for j in range(total)]


def _cut(stream: Sequence[int], windows: list[_Window], tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """The windows, evenly spaced over `stream`: the calibration's and those held out."""
    ids = torch.tensor(stream, dtype=torch.int64)
    gaps, start = len(stream) - sum(size for size, _ in windows), 0
    parts: dict[bool, list[Tensor]] = {False: [], True: []}
    for j, (size, is_held_out) in enumerate(windows):
        here = start + gaps * j // max(1, len(windows) - 1)
        parts[is_held_out].append(ids[here : here + size])
        start += size
    tokens, held_out = torch.stack(parts[False]), torch.stack(parts[True])
    if tokenizer.add_bos and tokenizer.bos_id is not None:
        # In front of each window but not in addition, as llama.cpp's perplexity does.
        tokens[:, 0] = held_out[:, 0] = tokenizer.bos_id
    return tokens, held_out


# Streams of tokens from files


def _read(source: str, reader: _Rows, lengths: list[int]) -> tuple[str, list[int]]:
    """Name and tokens of a source, not many more than windows of `lengths` need if there is plenty."""
    path = Path(source).expanduser()
    try:
        if path.is_dir():
            raise InputError(f"{source}: is a folder; pass a text file")
        if path.exists():
            return path.name, _read_file(path, reader, lengths)
        if _looks_like_path(source):
            raise InputError(f"{source}: no such file")
    except OSError as error:
        raise InputError(f"{source}: cannot be read: {error.strerror or error}") from error
    return source, _join(_data_set(source), sum(lengths), reader)


def _looks_like_path(source: str) -> bool:
    """Whether `source` can only be meant as a path: names on the Hub may have one `/` and dots in version numbers."""
    path = Path(source)
    return (
        source.startswith((".", "/", "~"))
        or "\\" in source
        or len(path.parts) > 2
        or (len(path.parts) == 2 and path.parent.is_dir())
        or re.fullmatch(r"\.[A-Za-z]\w*", path.suffix) is not None
    )


def _read_file(path: Path, reader: _Rows, lengths: list[int]) -> list[int]:
    size, wanted = path.stat().st_size, sum(lengths)
    is_rows = path.suffix.lower() == ".jsonl"
    whole = size <= max(_WHOLE_FILE, _BYTES_PER_TOKEN * wanted)
    if whole and not is_rows:
        return reader.encode(read_text(path), path)

    def excerpt(file: BinaryIO, begin: int, end: int, need: int) -> list[int]:
        if is_rows:
            return _join(_json_rows(file, path, begin, end), need, reader)[:need]
        return _text_excerpt(file, path, begin, end, need, reader)

    with path.open("rb") as file:
        if whole:
            return excerpt(file, 0, size, _ALL)
        # One excerpt for each window, so that windows are text in one piece; what one lacks, the next makes up for.
        ids: list[int] = []
        bounds = [size * j // len(lengths) for j in range(len(lengths) + 1)]
        for j, (begin, end) in enumerate(itertools.pairwise(bounds)):
            ids += excerpt(file, begin, end, sum(lengths[: j + 1]) - len(ids))
        # Few very long lines, or little text in them.
        return ids if len(ids) == wanted else excerpt(file, 0, size, wanted)


def _text_excerpt(file: BinaryIO, path: Path, begin: int, end: int, need: int, reader: _Rows) -> list[int]:
    """Up to `need` tokens of the text in bytes `begin … end`, from the start of a line if one is near."""
    size = _BYTES_PER_TOKEN // 2 * need
    if begin > 0:
        file.seek(begin)
        head = file.read(min(size // 2, end - begin))
        # Without a line start, the first byte that does not continue a character.
        begin += head.find(b"\n") + 1 or next((i for i, byte in enumerate(head[:4]) if byte & 0xC0 != 0x80), 0)
    while True:
        file.seek(begin)
        data = file.read(min(size, end - begin))
        try:
            # A decoder that waits for more leaves out a character that is cut off at the end.
            text = codecs.getincrementaldecoder("utf-8")().decode(data)
        except UnicodeDecodeError as error:
            where = begin + error.start
            raise InputError(f"{path}: is not UTF-8 text (byte {where}); convert it to UTF-8") from error
        ids = reader.encode(text, path)
        if len(ids) >= need or size >= end - begin:
            return ids[:need]
        size *= 4


# Rows with a `text` or with `messages`

_Row = tuple[Any, str]
"""A row of a .jsonl file or data set, and where it is, for messages."""


def _json_rows(file: BinaryIO, path: Path, begin: int, end: int) -> Iterator[_Row]:
    """Rows of the lines that start in bytes `begin … end`."""

    def read_line() -> bytes:
        line = file.readline(_LINE_LIMIT)
        if len(line) == _LINE_LIMIT and not line.endswith(b"\n"):
            raise InputError(f"{path}: has a line of more than {_LINE_LIMIT >> 20} MiB; one JSON object a line is read")
        return line

    file.seek(max(0, begin - 1))
    if begin > 0:
        read_line()
    number = 0
    while (offset := file.tell()) < end:
        number += 1
        where = f"{path}: line {number}" if begin == 0 else f"{path}: the line at byte {offset}"
        try:
            line = read_line().decode("utf-8-sig" if offset == 0 else "utf-8").strip()
            row = json.loads(line) if line else None
        except UnicodeDecodeError as error:
            raise InputError(f"{where}: is not UTF-8 text; convert the file to UTF-8") from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: is not JSON: {_one_line(error)}") from error
        if line:
            yield row, where


def _join(rows: Iterable[_Row], need: int, reader: _Rows) -> list[int]:
    """Tokens of the rows, with EOS between them, until there are `need`."""
    ids: list[int] = []
    eos = reader.tokenizer.eos_id
    for row, where in rows:
        # One long document must not cost more than all that is wanted.
        more = reader.tokens(row, where, _BYTES_PER_TOKEN * (need - len(ids)))
        # A chat template may have ended the text before, with or without a newline.
        if more and ids and eos is not None and eos not in ids[-2:]:
            ids.append(eos)
        ids += more
        if len(ids) >= need:
            break
    return ids


@dataclass(frozen=True)
class _Rows:
    """Turns text and rows into tokens."""

    tokenizer: Tokenizer

    def encode(self, text: str, path: Path) -> list[int]:
        """Tokens of a text file's text."""
        if "\0" in text:
            raise InputError(f"{path}: is not a text file (it has NUL bytes); {_USE_FILE}")
        return self.tokenizer.encode(text)

    def tokens(self, row: Any, where: str, limit: int) -> list[int]:
        """Tokens of at most `limit` characters of a row."""
        if not isinstance(row, dict):
            raise InputError(f"{where}: is not a JSON object")
        is_chat = "text" not in row and "messages" in row
        text = self._chat(row["messages"], where) if is_chat else row.get("text")
        if not isinstance(text, str):
            fields = ", ".join(map(str, row)) or "nothing"
            raise InputError(f"{where}: has no `text` (a string) and no `messages`, but {fields}")
        # JSON can spell half of a surrogate pair, which no tokenizer takes.
        return self.tokenizer.encode(text[:limit].encode(errors="replace").decode(), special=is_chat)

    def _chat(self, messages: Any, where: str) -> str:
        if not (isinstance(messages, list) and messages and all(isinstance(one, dict) for one in messages)):
            raise InputError(f"{where}: `messages` is not a list of objects with `role` and `content`")
        try:
            return self._template.render(messages=messages, add_generation_prompt=False, tools=None, documents=None)
        except Exception as error:  # whatever a stranger's template does
            raise InputError(
                f"{where}: the model's chat template fails: {_one_line(error)}; give rows with `text`"
            ) from error

    @cached_property
    def _template(self) -> jinja2.Template:
        return compile_template(self.tokenizer)


# Data sets by name


def _data_set(source: str) -> Iterator[_Row]:
    """Rows of a data set, streamed. No code of its author is run."""
    name, config, split, *rest = [*source.split(":"), "", ""]
    if not name or any(rest):
        raise InputError(f"{source!r}: is no file and no data set's name[:config[:split]]; {_USE_FILE}")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise InputError(
            f'{source}: no such file, and for a data set of that name pip install "a3q[datasets]"; or {_USE_FILE}'
        ) from error
    from huggingface_hub import HfApi

    try:
        # `load_dataset` tries for minutes when it is offline.
        HfApi().dataset_info(name, timeout=_HUB_TIMEOUT_S)
        stream = load_dataset(name, config or None, split=split or "train", streaming=True, trust_remote_code=False)
        lines = ""
        for number, row in enumerate(stream):
            if "text" not in row:
                yield row, f"{source}: row {number}"
                continue
            text = row["text"] or ""
            lines += text
            # Rows that end a line, or are empty, are lines of one text (WikiText) and not documents.
            if (text and not text.endswith("\n")) or len(lines) > _ROW_CHARACTERS:
                yield {"text": lines}, source
                lines = ""
        yield {"text": lines}, source
    except InputError:
        raise
    except Exception as error:  # of a dozen libraries
        raise InputError(
            f"{source}: no such file, and no data set of that name can be read: {_one_line(error)}; {_USE_FILE}"
        ) from error


def _one_line(error: Exception) -> str:
    message = str(error).strip()
    return message.splitlines()[0] if message else type(error).__name__
