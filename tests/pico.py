"""Tiny random models in Hugging Face layout, with a tokenizer that llama.cpp knows."""

from __future__ import annotations

import random
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

Kind = Literal[
    "llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3", "olmo2", "gpt_neox", "gpt2", "opt", "mpt"
]  # fmt: skip
KINDS: tuple[Kind, ...] = get_args(Kind)

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
_ROPE = ("llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2")
_NAMES: dict[str, dict[str, str]] = {
    "gpt2": {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "intermediate_size": "n_inner",
        "max_position_embeddings": "n_positions",
    },
    "opt": {"intermediate_size": "ffn_dim", "initializer_range": "init_std"},
    "mpt": {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "max_position_embeddings": "max_seq_len",
    },
}
"""What transformers calls the common fields in a family that has names of its own."""


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

    gemma3 has 3 layers, the first and last with a window of 12; gpt_neox, gpt2, opt and mpt have no shared keys.
    `overrides` are further fields of the transformers config. Norms and biases are random too: ones and zeros would
    hide a mistake.
    """
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
        "pad_token_id": None,
        "initializer_range": 0.15,
    }
    if kind in ("gpt_neox", "gpt2", "opt", "mpt"):
        del fields["num_key_value_heads"]
    if kind == "mpt":
        del fields["intermediate_size"]  # always four times the hidden size
    if kind in _ROPE:
        fields["rope_parameters"] = rope or {"rope_type": "default", "rope_theta": 10000.0}
    if kind == "gpt_neox":
        fields["rope_parameters"] = rope or {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    if kind in ("llama", "qwen3"):
        fields["attention_bias"] = bias
    if kind == "llama":
        fields["mlp_bias"] = bias
    if kind == "mistral":
        fields["sliding_window"] = None
    if kind == "qwen3":
        fields["head_dim"] = 16
    if kind == "gemma3":
        fields |= {
            "num_hidden_layers": 3,
            "head_dim": 16,
            "sliding_window": 12,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "query_pre_attn_scalar": 24,
        }
    if head_dim is not None:
        fields["head_dim"] = head_dim
    names = _NAMES.get(kind, {})
    config_class = CONFIG_MAPPING["gemma3_text" if kind == "gemma3" else kind]
    # transformers writes into the objects that it is given.
    fields = deepcopy(fields | overrides)
    config = config_class(**{names.get(name, name): value for name, value in fields.items()})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                # gemma3 adds the one itself.
                middle = kind != "gemma3" and name.endswith("weight")
                weight.copy_(float(middle) + 0.1 * torch.randn_like(weight))
    folder.mkdir(parents=True, exist_ok=True)
    model.to(dtype).save_pretrained(folder, max_shard_size="100KB" if sharded else "5GB")
    write_tokenizer(folder, fields["vocab_size"])
    return folder
