"""Chat templates as transformers runs them: Jinja in a sandbox, since a template comes from a stranger."""

from __future__ import annotations

import datetime
import json
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from a3q.model import Tokenizer


def compile_template(tokenizer: Tokenizer, *, clock: bool = True) -> jinja2.Template:
    """The tokenizer's chat template; jinja2.TemplateError when it has none or a broken one.

    `clock`: whether the template may ask for the day, which is always the same one.
    """
    if tokenizer.chat_template is None:
        raise jinja2.TemplateError("it has none")
    special = {
        "bos_token": token_text(tokenizer, tokenizer.bos_id),
        "eos_token": token_text(tokenizer, tokenizer.eos_id),
    }
    return _environment(clock).from_string(tokenizer.chat_template, globals=special)


def token_text(tokenizer: Tokenizer, i: int | None) -> str:
    """A token as the vocabulary spells it; empty for None."""
    return "" if i is None else str(tokenizer.metadata["tokenizer.ggml.tokens"].value[i])


class _Generation(Extension):
    """`{% generation %}` marks what an assistant wrote and leaves the text as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment(clock: bool) -> ImmutableSandboxedEnvironment:
    """What chat templates expect, as transformers gives it."""

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        # Jinja's own escapes HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    if clock:
        # Always the same day, so that the same input gives the same model.
        environment.globals["strftime_now"] = datetime.datetime(2025, 1, 1).strftime
    return environment
