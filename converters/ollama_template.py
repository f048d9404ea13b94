"""A chat template in Ollama's language, Go's text/template, found by running the Jinja one.

Ollama runs no Jinja: it knows some templates by their text and gives a model with any other the bare prompt. Here the
template is rendered for conversations with marks for contents, cut at the marks, and what stands between them is put
together again as Go text. What comes out counts only if the same concatenation equals the Jinja rendering for many
other conversations; so there is no table of names, and a template that does more is refused and not approximated.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from a3q.model import Tokenizer
from converters.chat_template import compile_template, token_text
from converters.vocabulary import reason

_Render = Callable[[str | None, Sequence[str]], str]

_TEXTS = (
    "Hi",
    "What is 2 + 2?",
    "First line.\n\nThird line, after an empty one.",
    "é, 漢字 and 😀; a < b & 'c' \"d\"",
    "{{ .Content }} {% if x %} %s \\n",
    "A longer one. " * 20 + "The end.",
    "No",
)
_EDGES = ("  two spaces", "a space at the end ", "\na line before\n", "\tboth ")
_TRIMS: tuple[Callable[[str], str], ...] = (str, str.strip, str.lstrip, str.rstrip)
_MOST_QUESTIONS = 4
"""In one conversation of a proof."""


class UnprovenTemplateError(Exception):
    """A chat template that has no counterpart in Ollama's language; the message says why."""


@dataclass(frozen=True)
class ChatFormat:
    """What stands around the contents of a conversation; its turns alternate and a question is the last."""

    start: str
    """In front of the first question, where there is no system prompt."""
    reply: str
    """Between a question and its answer."""
    next: str
    """Between an answer and the next question."""
    prompt: str
    """After the last question."""
    system: Literal["first", "last", "never"]
    """Where the system prompt goes: in front of all, into the last question, or nowhere."""
    system_start: str = ""
    """In front of the system prompt; `first`: instead of `start`."""
    system_end: str = ""

    def render(self, system: str | None, turns: Sequence[str]) -> str:
        """The text for `turns`, a question first and last. `go` says the same in Go."""
        given = system if self.system != "never" else None
        first = self.start if given is None or self.system == "last" else self.system_start + given + self.system_end
        text = first
        for i, content in enumerate(turns):
            if i:
                text += self.reply if i % 2 else self.next
            if given is not None and self.system == "last" and i == len(turns) - 1:
                text += self.system_start + given + self.system_end
            text += content
        return text + self.prompt

    def go(self) -> str:
        """The Go template, over the fields that Ollama fills.

        Ollama gives all system prompts joined as `.System` and drops old messages of a long conversation, so roles need
        not alternate: what is missing in front of an answer is an empty question, and two of a kind are joined
        by an empty line, as Ollama joins neighbours. An answer that comes last is continued.
        """
        start, reply, following, prompt, system_start, system_end = map(
            _go_text, (self.start, self.reply, self.next, self.prompt, self.system_start, self.system_end)
        )
        system = f"{system_start}{{{{ .System }}}}{system_end}"
        head = f"{{{{ if .System }}}}{system}{{{{ else }}}}{start}{{{{ end }}}}" if self.system == "first" else start
        inner = ""
        if self.system == "last":
            head = (
                '{{ $last := 0 }}{{ range $i, $_ := .Messages }}{{ if eq .Role "user" }}{{ $last = $i }}'
                "{{ end }}{{ end }}" + head
            )
            inner = (
                "{{ if eq $i $last }}{{ if $.System }}"
                f"{system_start}{{{{ $.System }}}}{system_end}"
                "{{ end }}{{ end }}"
            )
        question = (
            '{{ if eq $role "user" }}\n\n{{ else if eq $role "assistant" }}'
            f"{following}{{{{ end }}}}{inner}{{{{ .Content }}}}"
        )
        answer = f'{{{{ if eq $role "assistant" }}}}\n\n{{{{ else }}}}{reply}{{{{ end }}}}{{{{ .Content }}}}'
        return (
            f'{head}{{{{ $role := "" }}}}{{{{ range $i, $_ := .Messages }}}}'
            f'{{{{ if eq .Role "user" }}}}{question}{{{{ $role = "user" }}}}'
            f'{{{{ else if eq .Role "assistant" }}}}{answer}{{{{ $role = "assistant" }}}}{{{{ end }}}}{{{{ end }}}}'
            f'{{{{ if ne $role "assistant" }}}}{prompt}{{{{ end }}}}'
        )


@dataclass(frozen=True)
class OllamaTemplate:
    """A proven template."""

    text: str
    """Go text/template; without BOS at the start where the tokenizer adds it."""
    format: ChatFormat
    """As the Jinja template writes it, BOS included."""
    notes: tuple[str, ...]


def derive_template(tokenizer: Tokenizer) -> OllamaTemplate:
    """The tokenizer's chat template for Ollama; UnprovenTemplateError where it cannot be had.

    Where the Jinja template strips contents, equality holds for contents that have nothing to strip, since Go's
    templates cannot. Where it takes no system prompt, that goes in front of the first question, with an empty line
    between.
    """
    try:
        # Ollama's templates know no day; those that can do without are asked for what they write then.
        template = compile_template(tokenizer, clock=False)
    except Exception as error:  # whatever a stranger's template does
        raise UnprovenTemplateError(f"it cannot be read ({reason(error)})") from error

    def render(system: str | None, turns: Sequence[str]) -> str:
        messages = [] if system is None else [{"role": "system", "content": system}]
        messages += [{"role": "assistant" if i % 2 else "user", "content": turn} for i, turn in enumerate(turns)]
        return template.render(messages=messages, add_generation_prompt=True, tools=None, documents=None)

    notes: tuple[str, ...] = ()
    try:
        found = _without_system(render)
    except UnprovenTemplateError:
        raise
    except Exception as error:
        raise UnprovenTemplateError(f"it fails for a plain conversation ({reason(error)})") from error
    try:
        render("a3q", ["a3q"])
    except Exception:
        _prove(render, found, with_system=False)
        found = replace(found, system="first", system_start=found.start, system_end="\n\n")
        notes = ("its chat template takes no system prompt; in Ollama one goes in front of the first message",)
    else:
        found = _with_system(render, found)
        if found.system == "never":
            notes = ("its chat template leaves system prompts out, and so will Ollama",)
        _prove(render, found, with_system=True)
    return OllamaTemplate(_without_bos(found, tokenizer).go(), found, notes)


def _without_system(render: _Render) -> ChatFormat:
    question, answer, again = "a3qQ1x", "a3qA1x", "a3qQ2x"
    start, prompt = _cut(render(None, [question]), question)
    _, reply, following, _ = _cut(render(None, [question, answer, again]), question, answer, again)
    return ChatFormat(start, reply, following, prompt, "never")


def _with_system(render: _Render, found: ChatFormat) -> ChatFormat:
    system, question = "a3qS0x", "a3qQ1x"
    text = _attempt(render, system, [question])
    if system not in text:
        return found
    before, between, _ = _cut(text, system, question)
    first = replace(found, system="first", system_start=before, system_end=between)
    turns = [question, "a3qA1x", "a3qQ2x"]
    # With one question, the first is the last.
    if _attempt(render, system, turns) != first.render(system, turns) and before.startswith(found.start):
        return replace(first, system="last", system_start=before.removeprefix(found.start))
    return first


def _cut(text: str, *marks: str) -> list[str]:
    """What stands before, between and behind `marks`."""
    pieces = []
    for mark in marks:
        piece, found, text = text.partition(mark)
        if not found or mark in text:
            raise UnprovenTemplateError("it does not write every message once and in order")
        pieces.append(piece)
    return [*pieces, text]


def _prove(render: _Render, found: ChatFormat, with_system: bool) -> None:
    """UnprovenTemplateError unless `found` renders other conversations as the template does."""
    for system, turns in _conversations(_TEXTS[1:4] if with_system else (), _TEXTS, _MOST_QUESTIONS):
        if _attempt(render, system, turns) != found.render(system, turns):
            raise UnprovenTemplateError("it does more than put texts around messages")
    for system, turns in _conversations(_EDGES if with_system else (), _EDGES, 2):
        text = _attempt(render, system, turns)
        # A template may strip one message and not another, such as the one that holds the system prompt.
        for of_system, *of_turns in itertools.product(_TRIMS, repeat=1 + len(turns)):
            stripped = [trim(turn) for trim, turn in zip(of_turns, turns, strict=True)]
            if text == found.render(system and of_system(system), stripped):
                break
        else:
            raise UnprovenTemplateError("it changes the contents of messages")


def _conversations(
    systems: Sequence[str], contents: Sequence[str], most_questions: int
) -> Iterator[tuple[str | None, list[str]]]:
    for system in (None, *systems):
        for questions in range(1, most_questions + 1):
            for offset in range(len(contents)):
                yield system, [contents[(offset + i) % len(contents)] for i in range(2 * questions - 1)]


def _attempt(render: _Render, system: str | None, turns: Sequence[str]) -> str:
    try:
        return render(system, turns)
    except Exception as error:
        raise UnprovenTemplateError(f"it fails for some conversations ({reason(error)})") from error


def _without_bos(found: ChatFormat, tokenizer: Tokenizer) -> ChatFormat:
    """`found` without the BOS that the runtime puts in front anyway."""
    bos = token_text(tokenizer, tokenizer.bos_id) if tokenizer.add_bos else ""
    shorter = replace(found, start=found.start.removeprefix(bos))
    if found.system == "first":
        return replace(shorter, system_start=found.system_start.removeprefix(bos))
    return shorter


def _go_text(text: str) -> str:
    """Literal text; braces, which could open an action, as Go strings."""
    return re.sub(r"\{+", lambda braces: f'{{{{ "{braces[0]}" }}}}', text)
