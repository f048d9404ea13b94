"""The pre-tokenizers that llama.cpp knows by name, as `tokenizers` JSON: to recognise one and to build one.

llama.cpp never normalises a byte-level BPE text, so an NFC normalizer (Qwen) is accepted but not part of a name: text
in decomposed form is tokenized by the runtime as it stands. Other corners where the runtime differs from
`tokenizers` by nature: `(?i:'s)` reaches U+017F only in the latter, and the two hold different versions of Unicode
(U+10D40, a digit since version 16, is one to only one of them). A pre-tokenizer whose expression the runtime only
approximates has a `runtime` of its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from a3q.errors import InputError

Steps = list[dict[str, Any]]
"""A canonical pre-tokenizer: the steps of a flattened Sequence, defaults spelled out, irrelevant fields dropped."""


def _split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def _bytes(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}


def _regexes(*expressions: str) -> Steps:
    return [*map(_split, expressions), _bytes(False)]


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_PUNCTUATION = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|"
_LLAMA3 = _regexes(_WORDS + r"\p{N}{1,3}" + _PUNCTUATION + _SPACES)
_QWEN2 = _regexes(_WORDS + r"\p{N}" + _PUNCTUATION + _SPACES)


def _cased(ending: str, numbers: str, *, runtime: bool) -> Steps:
    """Words split where the case changes (o200k, tekken). The runtime has no case classes beyond ASCII, and keeps no
    combining mark with its letter."""
    upper = r"((?=[\p{L}])([^a-z]))" if runtime else r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
    lower = r"((?=[\p{L}])([^A-Z]))" if runtime else r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    head = r"[^\r\n\p{L}\p{N}]?"
    words = f"{head}{upper}*{lower}+{ending}|{head}{upper}+{lower}*{ending}"
    return _regexes(rf"{words}|{numbers}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}")


@dataclass(frozen=True)
class PreTokenizer:
    """One way of splitting text, with llama.cpp's defaults that hang on its name."""

    names: tuple[str, ...]
    """Names of llama.cpp that split like this; a recognised tokenizer gets the first."""
    steps: Steps
    runtime: Steps | None = None
    """What llama.cpp does where that is not `steps`."""
    ignore_merges: bool = False
    """A word that is a token needs no merges."""
    add_bos: bool = False
    """BOS is added when the file does not say."""


_GPT2_NAMES = (
    *("gpt-2", "phi-2", "gigachat", "a.x-4.0", "mellum", "modern-bert", "jina-es", "jina-de", "jina-v2-es"),
    *("jina-v2-de", "jina-v1-en", "jina-v2-code", "roberta-bpe", "mpt", "olmo", "jais", "exaone4", "trillion"),
    "granite-docling",
)

PRE_TOKENIZERS: tuple[PreTokenizer, ...] = (
    PreTokenizer(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"),
        _LLAMA3,
        ignore_merges=True,
        add_bos=True,
    ),
    PreTokenizer(("dbrx", "smaug-bpe", "chatglm-bpe"), _LLAMA3),
    PreTokenizer(("glm4", "glm5"), _LLAMA3, ignore_merges=True),
    PreTokenizer(
        ("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2"),
        _QWEN2,
    ),
    PreTokenizer(
        ("qwen35",),
        _regexes(_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + _SPACES),
    ),
    PreTokenizer(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
        [{"type": "Digits", "individual_digits": True}, _bytes(True)],
    ),
    PreTokenizer(
        _GPT2_NAMES,
        [_bytes(True)],
    ),
    PreTokenizer(
        ("tekken",),
        _cased("", r"\p{N}", runtime=False),
        _cased("", r"\p{N}", runtime=True),
        ignore_merges=True,
        add_bos=True,
    ),
    PreTokenizer(
        ("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"),
        _cased(_CONTRACTIONS + "?", r"\p{N}{1,3}", runtime=False),
        _cased(_CONTRACTIONS + "?", r"\p{N}{1,3}", runtime=True),
    ),
    PreTokenizer(
        ("deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"),
        _regexes(
            r"\p{N}{1,3}",
            "[一-龥\u3040-ゟ゠-ヿ]+",
            r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
            r"| ?[\p{P}\p{S}]+[\r\n]*|" + _SPACES,
        ),
    ),
    PreTokenizer(
        ("deepseek-coder",),
        [
            *map(_split, (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+")),
            {"type": "Digits", "individual_digits": True},
            _bytes(False),
        ],
    ),
    PreTokenizer(("default",), _regexes(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
)

_OTHERS = (
    "minicpm5 deepseek-llm spark2_5 youtu falcon jais-2 gemma4 granite-embed-multi-311m sarvam-moe whitespace "
    "poro-chat viking bloom gpt3-finnish exaone-moe chameleon granite-embed-multi-97m tiny_aya "
    "cohere2moe superbpe bailingmoe bailingmoe2 llada-moe seed-coder kimi-k2 ufakzeka afmoe laguna"
)
LLAMA_CPP_NAMES = frozenset(name for entry in PRE_TOKENIZERS for name in entry.names) | frozenset(_OTHERS.split())
"""Every `tokenizer.ggml.pre` that llama.cpp's loader accepts (llama-vocab.cpp)."""

_BY_NAME: Mapping[str, PreTokenizer] = {name: entry for entry in PRE_TOKENIZERS for name in entry.names}

_SAME_CONTRACTIONS = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])",
    r"'(?i:[sdmt]|ll|ve|re)",
)


def pre_tokenizer_named(name: str, origin: object) -> PreTokenizer:
    """What llama.cpp's `name` means; InputError names those that a3q can encode with."""
    entry = _BY_NAME.get(name)
    if entry is None:
        raise InputError(
            f"{origin}: a3q cannot encode text with the pre-tokenizer {name!r} (tokenizer.ggml.pre); "
            f"those that work: {', '.join(sorted(_BY_NAME))}"
        )
    return entry


def check_override(name: str) -> str:
    """`name` if llama.cpp's loader accepts it; InputError names all that it does."""
    if name not in LLAMA_CPP_NAMES:
        raise InputError(
            f"--pre {name}: llama.cpp knows no such pre-tokenizer; it knows {', '.join(sorted(LLAMA_CPP_NAMES))}"
        )
    return name


def recognise(tokenizer: Mapping[str, Any], origin: object) -> str:
    """llama.cpp's name for the pre-tokenizer of a parsed tokenizer.json; InputError when there is none."""
    steps = canonical(tokenizer.get("pre_tokenizer"))
    model = tokenizer.get("model")
    ignore_merges = isinstance(model, Mapping) and bool(model.get("ignore_merges"))
    mend = f"if you know that llama.cpp has it, pass --pre NAME, one of {', '.join(sorted(LLAMA_CPP_NAMES))}"
    normalizer = tokenizer.get("normalizer")
    if not _only_nfc(normalizer):
        kind = normalizer.get("type") if isinstance(normalizer, Mapping) else normalizer
        raise InputError(f"{origin}: llama.cpp has no normalizer {kind!r} for byte-level BPE; {mend}")
    same = [entry for entry in PRE_TOKENIZERS if entry.steps == steps]
    for entry in same:
        if entry.ignore_merges == ignore_merges:
            return entry.names[0]
    if same:
        raise InputError(
            f"{origin}: the pre-tokenizer is llama.cpp's {same[0].names[0]!r}, but ignore_merges is "
            f"{str(ignore_merges).lower()} in this file and not there; {mend}"
        )
    digest = hashlib.sha256(json.dumps(steps, sort_keys=True).encode()).hexdigest()[:12]
    raise InputError(f"{origin}: unknown pre-tokenizer {digest} ({_describe(steps)}); {mend}")


def canonical(node: Any) -> Steps:
    """`pre_tokenizer` of a tokenizer.json as steps that compare equal when they split alike."""
    if not isinstance(node, Mapping):
        return []
    kind = node.get("type")
    if kind == "Sequence":
        inner = node.get("pretokenizers")
        return [step for item in (inner if isinstance(inner, list) else []) for step in canonical(item)]
    if kind == "ByteLevel":
        # trim_offsets only concerns offsets.
        prefix, use_regex = bool(node.get("add_prefix_space", True)), bool(node.get("use_regex", True))
        return [{"type": kind, "add_prefix_space": prefix, "use_regex": use_regex}]
    if kind == "Split":
        return [_canonical_split(node)]
    return [dict(node)]


def _canonical_split(node: Mapping[str, Any]) -> dict[str, Any]:
    step = dict(node)
    pattern = node.get("pattern")
    if not isinstance(pattern, Mapping) or not isinstance(pattern.get("Regex"), str):
        return step
    regex = pattern["Regex"].replace("\r", r"\r").replace("\n", r"\n")
    for spelling in _SAME_CONTRACTIONS:
        regex = regex.replace(spelling, _CONTRACTIONS)
    step["pattern"] = {"Regex": regex}
    # An expression that matches everywhere leaves nothing to remove between its matches.
    if regex.endswith(r"|\s+") and (step.get("behavior"), step.get("invert")) == ("Removed", True):
        step["behavior"], step["invert"] = "Isolated", False
    return step


def _only_nfc(normalizer: Any) -> bool:
    if normalizer is None:
        return True
    if not isinstance(normalizer, Mapping):
        return False
    if normalizer.get("type") == "Sequence":
        inner = normalizer.get("normalizers")
        return isinstance(inner, list) and all(map(_only_nfc, inner))
    return normalizer.get("type") == "NFC"


def _describe(steps: Steps) -> str:
    """Step types with their expressions, shortened to fit a message of one line."""
    parts = []
    for step in steps:
        pattern = step.get("pattern")
        text = next(iter(pattern.values()), "") if isinstance(pattern, Mapping) else ""
        short = str(text) if len(str(text)) <= 60 else str(text)[:57] + "..."
        parts.append(f"{step.get('type')} {short!r}" if short else str(step.get("type")))
    return ", ".join(parts) or "none"
