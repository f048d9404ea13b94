"""Chat templates in the styles of known models, a tokenizer that has one, and the part of Go's templates in use."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gguf import GGUFValueType, TokenType
from gguf.gguf_writer import GGUFValue

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou "
    "are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + "
    "message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""SmolLM2's own."""
LLAMA3 = (
    "{% for message in messages %}{% set text = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + "
    "message['content'] | trim + '<|eot_id|>' %}{{ (bos_token if loop.first else '') + text }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
DATED = (
    "{%- if strftime_now is defined %}{%- set today = strftime_now('%d %b %Y') %}{%- else %}"
    "{%- set today = '26 Jul 2024' %}{%- endif %}{{- bos_token }}"
    "{%- if messages[0].role == 'system' %}{%- set system = messages[0].content | trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + today + '\n\n' + system + '<|eot_id|>' }}"
    "{%- for m in messages %}{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim }}"
    "{{- '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
"""As Llama 3.2: a system turn always, with a day if it can."""
LLAMA2 = """\
{% if messages[0]['role'] == 'system' %}
{% set system = messages[0]['content'] %}
{% set messages = messages[1:] %}
{% endif %}
{% for m in messages %}
{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{% if loop.index0 == 0 and system is defined %}
{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m['content'] %}
{% else %}
{% set content = m['content'] %}
{% endif %}
{% if m['role'] == 'user' %}
{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' -}}
{% else %}
{{ ' ' + content.strip() + ' ' + eos_token -}}
{% endif %}
{% endfor %}"""
"""The system prompt is a part of the first question."""
MISTRAL = """\
{%- if messages[0].role == 'system' %}
{%- set system = messages[0].content %}{%- set messages = messages[1:] %}
{%- endif %}
{{- bos_token }}
{%- for m in messages %}
{%- if m.role == 'user' %}
{%- if loop.last and system is defined %}{{- '[INST] ' + system + '\n\n' + m.content + '[/INST]' }}
{%- else %}{{- '[INST] ' + m.content + '[/INST]' }}{%- endif %}
{%- else %}{{- ' ' + m.content + eos_token }}{%- endif %}
{%- endfor %}"""
"""The system prompt is a part of the last question."""
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}"
    "{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + "
    "'<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
ZEPHYR = """\
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n' + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
HEADINGS = (
    "{% for m in messages if m.role != 'system' %}{{ '### ' + ('Human' if m.role == 'user' else 'Answer') + ':\n' }}"
    "{{ m.content + '\n\n' }}{% endfor %}{{ '### Answer:\n' }}"
)
"""No control tokens, no system prompt."""
BRACES = "{% for m in messages %}{{ '{{' + m.role + '}} {' + m.content + '}\n' }}{% endfor %}{{ '{{assistant}} {' }}"
"""Literal text that Go would take for actions."""

BOS, EOS = 1, 2
CONTROL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
CONTROL += ["<start_of_turn>", "<end_of_turn>", "<|end|>"]


@dataclass
class Tokens:
    """A vocabulary of words and control tokens; it encodes nothing."""

    chat_template: str | None
    add_bos: bool = False
    extra: Mapping[str, GGUFValue] = field(default_factory=dict)
    words: Sequence[str] = ("<unk>",)
    bos_id: int | None = BOS
    eos_id: int | None = EOS

    @property
    def metadata(self) -> dict[str, GGUFValue]:
        tokens = [*self.words, *CONTROL]
        types = [int(TokenType.NORMAL)] * len(self.words) + [int(TokenType.CONTROL)] * len(CONTROL)
        return {
            "tokenizer.ggml.model": GGUFValue("gpt2", GGUFValueType.STRING),
            "tokenizer.ggml.tokens": GGUFValue(tokens, GGUFValueType.ARRAY, GGUFValueType.STRING),
            "tokenizer.ggml.token_type": GGUFValue(types, GGUFValueType.ARRAY, GGUFValueType.INT32),
            **self.extra,
        }

    @property
    def vocab_size(self) -> int:
        return len(self.metadata["tokenizer.ggml.tokens"].value)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        raise NotImplementedError

    def decode(self, ids: Sequence[int]) -> str:
        raise NotImplementedError


def ollama(template: str, messages: Sequence[tuple[str, str]]) -> str:
    """What Ollama's server makes of `messages` with a template of the actions that a3q writes.

    Held against Go itself by hand; there is no Go where the tests run.
    """
    collated: list[dict[str, Any]] = []
    for role, content in messages:
        if collated and collated[-1]["Role"] == role:
            collated[-1]["Content"] += "\n\n" + content
        else:
            collated.append({"Role": role, "Content": content})
    root = {"System": "\n\n".join(c for r, c in messages if r == "system"), "Messages": collated}
    parts = re.split(r"\{\{ (.*?) \}\}", template, flags=re.DOTALL)
    # Every other part is an action; Go takes the first pair of braces for one.
    assert not any("{{" in text for text in parts[::2])
    nodes, rest = _parse(list(enumerate(parts)))
    assert not rest
    return _run(nodes, root, root, {})


def _parse(parts: list[tuple[int, str]]) -> tuple[list[Any], list[tuple[int, str]]]:
    """Nodes up to an `else` or `end`, and what follows from there."""
    nodes: list[Any] = []
    while parts:
        (i, text), *parts = parts
        if i % 2 == 0:
            nodes.append(("text", text))
        elif text == "end" or text.startswith("else"):
            return nodes, [(i, text), *parts]
        elif text.startswith(("if ", "range ")):
            branches = []
            condition: str | None = text.split(" ", 1)[1]
            while True:
                body, ((_, closing), *parts) = _parse(parts)
                branches.append((condition, body))
                if closing == "end":
                    break
                condition = closing.removeprefix("else if ") if closing != "else" else None
            nodes.append((text.split(" ")[0], branches))
        else:
            nodes.append(("action", text))
    return nodes, []


def _run(nodes: list[Any], dot: Mapping[str, Any], root: Mapping[str, Any], names: dict[str, Any]) -> str:
    def value(word: str) -> Any:
        if word.startswith('"'):
            return json.loads(word)
        if word.startswith(("$.", ".")):
            return (root if word[0] == "$" else dot)[word.lstrip("$.")]
        return int(word) if word.isdigit() else names[word]

    def holds(condition: str | None) -> bool:
        match (condition or '""').split(" "):
            case ["eq", a, b]:
                return bool(value(a) == value(b))
            case ["ne", a, b]:
                return bool(value(a) != value(b))
            case [word]:
                return condition is None or bool(value(word))
        raise AssertionError(condition)

    out = ""
    for kind, node in nodes:
        if kind == "text":
            out += node
        elif kind == "action":
            name, assigned, word = node.partition(" := ") if " := " in node else node.partition(" = ")
            if assigned:
                names[name] = value(word)
            else:
                out += value(node)
        elif kind == "if":
            out += _run(next((body for condition, body in node if holds(condition)), []), dot, root, names)
        else:
            ((header, body),) = node
            assert header == "$i, $_ := .Messages"
            for names["$i"], element in enumerate(root["Messages"]):
                out += _run(body, element, root, names)
    return out
