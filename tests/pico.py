"""Tiny random models in Hugging Face layout, with a tokenizer that llama.cpp knows."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

Kind = Literal["llama", "qwen2", "mistral"]

VOCAB = 512
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
TEXT = "The quick brown fox, aged 12, doesn't jump over 3 lazy dogs; it naps under a tree near the old mill. "
"""A text to be tokenized; any will do."""

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CLASSES: dict[Kind, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
}


def corpus(lines: int = 400, seed: int = 0) -> list[str]:
    """Made-up sentences, the same for the same seed."""
    rng = random.Random(seed)
    words = TEXT.split() + ["".join(rng.choices("abcdefghijklmnoprstuvwy", k=rng.randint(2, 8))) for _ in range(300)]
    return [" ".join(rng.choices(words, k=12)) + "." for _ in range(lines)]


def write_tokenizer(folder: Path, vocab_size: int = VOCAB) -> None:
    """A byte-level BPE of exactly `vocab_size` tokens, split as Llama 3 splits; `<s>` in front, `</s>` at the end."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    assert tokenizer.get_vocab_size() == vocab_size
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def write_model(
    folder: Path,
    kind: Kind = "llama",
    *,
    tied: bool = False,
    rope: dict[str, Any] | None = None,
    bias: bool = False,
    head_dim: int | None = None,
    sharded: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **overrides: Any,
) -> Path:
    """Write a random model (hidden 64, 2 layers, 4 heads of which 2 hold keys, MLP 96) and its tokenizer to `folder`.

    `overrides` are further fields of the transformers config. Norms and biases are random too: ones and zeros would
    hide a mistake.
    """
    config_class, model_class = _CLASSES[kind]
    fields: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "max_position_embeddings": 256,
        "tie_word_embeddings": tied,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "initializer_range": 0.15,
        "rope_parameters": rope or {"rope_type": "default", "rope_theta": 10000.0},
    }
    if kind == "llama":
        fields |= {"attention_bias": bias, "mlp_bias": bias}
    if kind == "mistral":
        fields["sliding_window"] = None
    if head_dim is not None:
        fields["head_dim"] = head_dim
    torch.manual_seed(seed)
    model = model_class(config_class(**(fields | overrides)))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.copy_(float("norm" in name) + 0.1 * torch.randn_like(weight))
    folder.mkdir(parents=True, exist_ok=True)
    model.to(dtype).save_pretrained(folder, max_shard_size="100KB" if sharded else "5GB")
    write_tokenizer(folder, fields["vocab_size"])
    return folder
