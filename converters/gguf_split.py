"""A GGUF in several files, as `llama-gguf-split --split-max-size` makes it: what goes where, keys, names, placing."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from gguf import GGUFValueType
from gguf.gguf_writer import GGUFValue

from a3q.errors import InputError
from converters.entries import Entry

SMALLEST = 1_000_000
"""Bytes. llama-gguf-split takes no smaller size either; anything below is a forgotten unit."""
MOST_SHARDS = 0xFFFF
"""`split.count` has 16 bits."""


def check_limit(limit: int) -> None:
    """InputError for a size, in bytes, that files cannot sensibly be split by."""
    if limit < SMALLEST:
        raise InputError(
            f"--split-max-size: {limit:,} bytes is too small for a file; give {SMALLEST // 10**6}M or more, such as 4G"
        )


def plan(tensors: Sequence[Entry], sizes: Mapping[str, int], limit: int) -> list[list[Entry]]:
    """The tensors of each shard, in order. `sizes`: bytes that each takes in a file, padding included.

    Only tensors count, as they do for llama-gguf-split, so a file is larger than `limit` by its header, which in the
    first has the vocabulary. A tensor larger than `limit` has a shard of its own. InputError: too many shards.
    """
    shards: list[list[Entry]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + sizes[tensor.name] > limit:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += sizes[tensor.name]
    if len(shards) > MOST_SHARDS:
        raise InputError(
            f"--split-max-size: {limit:,} bytes makes {len(shards):,} files, of which llama.cpp reads at most "
            f"{MOST_SHARDS:,}; give a larger size"
        )
    return shards


def keys(index: int, count: int, tensors: int) -> dict[str, GGUFValue]:
    """What shard `index`, from 0, of `count` says about the split; `tensors` is their number in all shards."""
    return {
        "split.no": GGUFValue(index, GGUFValueType.UINT16),
        "split.tensors.count": GGUFValue(tensors, GGUFValueType.INT32),
        "split.count": GGUFValue(count, GGUFValueType.UINT16),
    }


def names(path: Path, count: int) -> list[str]:
    """File names of the shards when `path`, with or without `.gguf`, was asked for."""
    return [f"{_prefix(path)}-{i + 1:05}-of-{count:05}.gguf" for i in range(count)]


def existing(path: Path) -> list[Path]:
    """The shards there are already when `path` is asked for, of whatever count, the first ones first."""
    shard = re.compile(re.escape(_prefix(path)) + r"-\d{5}-of-\d{5}\.gguf")
    return sorted(file for file in path.parent.iterdir() if shard.fullmatch(file.name) and not file.is_dir())


def _prefix(path: Path) -> str:
    return path.name.removesuffix(".gguf")


def place(parts: Sequence[Path], path: Path) -> tuple[Path, ...]:
    """Move all shards of a model, which have their names already, beside `path`, and remove those it had before.

    They must lie in a folder of their own on the same file system; the caller removes it. All are moved or, on any
    error, none, and what was there stays. OSError: cannot be moved.
    """
    files = [path.with_name(part.name) for part in parts]
    old = existing(path)
    aside = parts[0].parent / "replaced"
    aside.mkdir()
    # Readers start from the first shard. An old one goes first and the new one comes last, so that a process killed
    # in between leaves nothing that opens as a model.
    moves = [(file, aside / file.name) for file in old if file in files]
    moves += reversed(list(zip(parts, files, strict=True)))
    try:
        for source, target in moves:
            source.replace(target)
    except BaseException:
        for source, target in reversed(moves):
            if not source.exists():
                target.replace(source)
        raise
    for file in old:
        if file not in files:
            file.unlink()
    return tuple(files)
