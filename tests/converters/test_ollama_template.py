"""Chat templates in Ollama's language: what comes out renders as the Jinja one does, or nothing comes out."""

from __future__ import annotations

import pytest

from a3q.model import Tokenizer
from converters.chat_template import compile_template
from converters.ollama_template import UnprovenTemplateError, derive_template
from tests.chat_templates import (
    BRACES,
    CHATML,
    DATED,
    GEMMA,
    HEADINGS,
    LLAMA2,
    LLAMA3,
    MISTRAL,
    PHI3,
    ZEPHYR,
    Tokens,
    ollama,
)

STYLES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "dated": DATED,
    "llama2": LLAMA2,
    "mistral": MISTRAL,
    "zephyr": ZEPHYR,
    "phi3": PHI3,
    "headings": HEADINGS,
    "braces": BRACES,
    "gemma": GEMMA,
}
CONVERSATIONS = [
    [("user", "What is 2 + 2?")],
    [("user", "Hi"), ("assistant", "Hello {{ there }}!"), ("user", "How are you?\n\nWell?")],
    [*zip(["user", "assistant"] * 3, "abcdef", strict=True), ("user", "漢字 \"quoted\" and 'so' <|x|>")],
]


def jinja(tokenizer: Tokenizer, messages: list[tuple[str, str]]) -> str:
    return compile_template(tokenizer, clock=False).render(
        messages=[{"role": role, "content": content} for role, content in messages], add_generation_prompt=True
    )


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("add_bos", [False, True])
def test_renders_as_the_jinja_template_does(style: str, add_bos: bool) -> None:
    tokenizer = Tokens(STYLES[style], add_bos)
    template = derive_template(tokenizer)
    for conversation in CONVERSATIONS:
        for system in ([], [("system", "You are terse.\nVery.")]) if style != "gemma" else ([],):
            messages = [*system, *conversation]
            expected = jinja(tokenizer, messages)
            assert ollama(template.text, messages) == (expected.removeprefix("<s>") if add_bos else expected)


def test_default_system_prompt_gives_way_to_one_that_is_given() -> None:
    template = derive_template(Tokens(CHATML)).text
    assert ollama(template, [("user", "Hi")]).startswith("<|im_start|>system\nYou are a helpful AI assistant")
    assert ollama(template, [("system", "Be terse."), ("user", "Hi")]) == (
        "<|im_start|>system\nBe terse.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_bos_stays_where_the_tokenizer_adds_none() -> None:
    for system in ([], [("system", "s")]):
        messages = [*system, ("user", "Hi")]
        assert ollama(derive_template(Tokens(LLAMA3)).text, messages).startswith("<s><|start_header_id|>")
        assert ollama(derive_template(Tokens(LLAMA3, add_bos=True)).text, messages).startswith("<|start_header_id|>")
    # Between turns it is no start of a text.
    assert "</s><s>[INST] " in derive_template(Tokens(LLAMA2, add_bos=True)).text


def test_a_template_without_system_prompt_gets_it_in_front_of_the_question() -> None:
    template = derive_template(Tokens(GEMMA, add_bos=True))
    assert ollama(template.text, [("system", "Be terse."), ("user", "Hi")]) == (
        "<start_of_turn>user\nBe terse.\n\nHi<end_of_turn>\n<start_of_turn>model\n"
    )
    assert "takes no system prompt" in template.notes[0]


def test_a_template_that_leaves_system_prompts_out() -> None:
    template = derive_template(Tokens(HEADINGS))
    assert "leaves system prompts out" in template.notes[0] and "System" not in template.text


def test_the_day_is_left_to_the_template_s_own_fallback() -> None:
    assert "26 Jul 2024" in derive_template(Tokens(DATED)).text


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        # An answer that comes last is continued.
        ([("user", "a"), ("assistant", "b")], "<|user|>\na<|end|>\n<|assistant|>\nb"),
        # The first question was dropped from a long conversation.
        (
            [("system", "s"), ("assistant", "b"), ("user", "c")],
            "<|system|>\ns<|end|>\n<|user|>\n<|end|>\n<|assistant|>\nb<|end|>\n<|user|>\nc<|end|>\n<|assistant|>\n",
        ),
        # Ollama gives all system prompts as one.
        (
            [("user", "a"), ("system", "s"), ("user", "c")],
            "<|system|>\ns<|end|>\n<|user|>\na\n\nc<|end|>\n<|assistant|>\n",
        ),
        ([("system", "s")], "<|system|>\ns<|end|>\n<|user|>\n<|end|>\n<|assistant|>\n"),
    ],
)
def test_conversations_that_do_not_alternate(messages: list[tuple[str, str]], expected: str) -> None:
    assert ollama(derive_template(Tokens(PHI3)).text, messages) == expected


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "it has none"),
        ("{% if %}", "cannot be read"),
        ("{{ raise_exception('never') }}", "fails for a plain conversation.*never"),
        ("{{ ''.__class__.__mro__ }}", "fails for a plain conversation.*unsafe"),
        ("{{ strftime_now('%Y') }}{% for m in messages %}{{ m.content }}\n{% endfor %}", "strftime_now"),
        ("{{ messages[-1].content }}", "every message once"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "every message once"),
        ("{% for m in messages %}{{ m.role }} {{ loop.index }}: {{ m.content }}\n{% endfor %}", "does more"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content | replace('?', '!') }}\n{% endfor %}", "does more"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content.replace('\n', ' ') }}\n{% endfor %}", "does more"),
        ("{% for m in messages %}{{ m.content }}{{ '!' if loop.length > 6 }}\n{% endfor %}", "does more"),
        (
            "{% if messages | length > 5 %}{{ raise_exception('too long') }}{% endif %}"
            "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
            "fails for some conversations.*too long",
        ),
        (
            "{% for m in messages %}{{ m.role }}: {{ m.content.replace('\t', ' ') }}\n{% endfor %}",
            "changes the contents",
        ),
    ],
)
def test_refuses_what_it_cannot_prove(template: str | None, reason: str) -> None:
    with pytest.raises(UnprovenTemplateError, match=f"(?s){reason}"):
        derive_template(Tokens(template))
