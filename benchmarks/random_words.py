"""Random words, and a tokenizer that has them as tokens: calibration text that reaches a whole vocabulary."""

from __future__ import annotations

import random
import string
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LETTERS = 4
_WORDS = len(string.ascii_lowercase) ** _LETTERS
_LINE = 500
"""Words of a line of random text."""


def word(i: int) -> str:
    """One of 26⁴ words of four letters, another for each number."""
    # Coprime to 26, so that successive numbers give all words in an order that looks random.
    i = i * 194_083 % _WORDS
    return "".join(string.ascii_lowercase[i // 26**place % 26] for place in range(_LETTERS))


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A byte-level BPE of `vocab_size` tokens: `<s>`, `</s>`, the bytes, and words of four letters behind a space.

    It splits as Llama 3 does and takes whole words as they are, so that random words reach the whole vocabulary.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # llama.cpp wants merges; these make the first two letters of some words.
    pairs = [("Ġ", letter) for letter in string.ascii_lowercase]
    tokens = ["<s>", "</s>", *alphabet, *map("".join, pairs)]
    tokens += [f"Ġ{word(i)}" for i in range(vocab_size - len(tokens))]
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != vocab_size:
        raise ValueError(f"{vocab_size} tokens: give {2 + 256 + len(pairs)} to {_WORDS}")
    tokenizer = Tokenizer(models.BPE(vocab, pairs, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def random_text(tokens: int, vocab_size: int, seed: int = 0) -> str:
    """Words of at least `tokens` tokens, of those that a tokenizer of `write_tokenizer` has as a token each."""
    rng = random.Random(seed)
    known = min(vocab_size, _WORDS) - 512
    words = [word(rng.randrange(known)) for _ in range(tokens)]
    return "".join(f"{' '.join(['', *words[i : i + _LINE]])}\n" for i in range(0, len(words), _LINE))
