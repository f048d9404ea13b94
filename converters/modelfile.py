"""The Modelfile from which Ollama makes a model out of a GGUF.

How texts are quoted and which characters survive is what Ollama's own parser does (parser/parser.go).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gguf import TokenType
from gguf.gguf_writer import GGUFValue

from a3q.errors import InputError
from a3q.files import write_whole
from a3q.model import Tokenizer
from converters.ollama_template import ChatFormat, UnprovenTemplateError, derive_template
from converters.vocabulary import Vocabulary

_MARK = "# Written by a3q."
_LICENSES = ("license", "licence", "copying")
_LICENSE_BYTES = 1 << 20


@dataclass(frozen=True)
class Modelfile:
    """What Ollama is told about a GGUF besides the file itself."""

    path: Path
    template: str | None
    """Go text/template; None leaves it to Ollama."""
    stops: tuple[str, ...]
    """Texts at which an answer ends."""
    context: int
    """Tokens of the context window."""
    license: str | None
    notes: tuple[str, ...]

    @property
    def parameters(self) -> dict[str, int | list[str]]:
        """As Ollama's API takes them."""
        return {"num_ctx": self.context, **({"stop": list(self.stops)} if self.stops else {})}


def modelfile_path(gguf: Path) -> Path:
    """Where the Modelfile of `gguf` goes."""
    return gguf.with_name("Modelfile")


def check_modelfile(gguf: Path, force: bool) -> None:
    """InputError if a Modelfile for `gguf` cannot be written; `force` replaces one that is not a3q's for this file."""
    if not gguf.name.isprintable():
        raise InputError(f"{gguf}: Ollama's Modelfile cannot hold this file name; give another with -o")
    path = modelfile_path(gguf)
    if force or not path.exists():
        return
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    if lines[:2] != [_MARK, _from(gguf)]:
        raise InputError(
            f"{path}: exists already and is not a3q's for {gguf.name}; move it, use --force to replace it, or give -o "
            f"another folder"
        )


def write_modelfile(
    gguf: Path,
    tokenizer: Tokenizer,
    metadata: Mapping[str, GGUFValue],
    source: Path,
    *,
    context: int,
    force: bool,
) -> Modelfile:
    """Write the Modelfile of `gguf` beside it.

    `tokenizer` and `metadata` are the model's; `source`: the folder or file that it was read from, whose license goes
    along; `context`: tokens of the context window.
    """
    check_modelfile(gguf, force)
    template, chat, notes = _template(tokenizer)
    made = Modelfile(
        modelfile_path(gguf), template, stop_texts(tokenizer, chat), context, license_text(metadata, source), notes
    )
    write_whole(made.path, _text(made, gguf))
    return made


def _template(tokenizer: Tokenizer) -> tuple[str | None, ChatFormat | None, tuple[str, ...]]:
    if tokenizer.chat_template is None:
        return None, None, ("the model has no chat template; Ollama will give it plain prompts",)
    try:
        derived = derive_template(tokenizer)
        if not _can_be_quoted(derived.text):
            raise UnprovenTemplateError("it holds characters that a Modelfile cannot")
    except UnprovenTemplateError as error:
        note = (
            f"its chat template cannot be put into Ollama's language: {error}; Ollama will use its own if it knows "
            "this one, else plain prompts"
        )
        return None, None, (note,)
    return derived.text, derived.format, derived.notes


def stop_texts(tokenizer: Tokenizer, chat: ChatFormat | None) -> tuple[str, ...]:
    """What ends an answer: end tokens, the control tokens between an answer and the next question, or its first line.

    The runtime stops at end tokens by itself; the texts stop a model that goes on to write the next turn.
    """
    metadata = tokenizer.metadata
    vocabulary = Vocabulary.from_gguf(metadata, metadata["tokenizer.ggml.model"].value == "gpt2", "the tokenizer")
    control = vocabulary.of_type(TokenType.CONTROL)
    ends = [tokenizer.eos_id]
    for name in ("eot", "eom"):
        key = f"tokenizer.ggml.{name}_token_id"
        ends.append(metadata[key].value if key in metadata else None)
    if chat is not None:
        ends += [part for part in vocabulary.fragments(chat.next, special=True) if isinstance(part, int)]
    stops = [vocabulary.tokens[i] for i in ends if i in control]
    if not stops and chat is not None:
        stops = chat.next.strip().splitlines()[:1]
    return tuple(stop for stop in dict.fromkeys(stops) if stop.isprintable() and '"' not in stop)


def license_text(metadata: Mapping[str, GGUFValue], source: Path) -> str | None:
    """The license file of a source folder, else what the metadata calls the license; None if there is neither."""
    # What lies beside a GGUF need not belong to it.
    for path in sorted(source.iterdir()) if source.is_dir() else ():
        if path.stem.lower() in _LICENSES and path.is_file() and 0 < path.stat().st_size <= _LICENSE_BYTES:
            text = _printable(path.read_text(encoding="utf-8", errors="replace")).strip()
            if text and _can_be_quoted(text):
                return text
    keys = ("general.license.name", "general.license", "general.license.link")
    values = [metadata[key].value for key in keys if key in metadata]
    text = _printable("\n".join(dict.fromkeys(value for value in values if isinstance(value, str))))
    return text if text and _can_be_quoted(text) else None


def _text(made: Modelfile, gguf: Path) -> str:
    lines = [_MARK, _from(gguf)]
    if made.template is not None:
        lines.append(f'TEMPLATE """{made.template}"""')
    lines += [f'PARAMETER stop "{stop}"' for stop in made.stops]
    lines.append(f"PARAMETER num_ctx {made.context}")
    if made.license is not None:
        lines.append(f'LICENSE """{made.license}"""')
    return "\n".join(lines) + "\n"


def _from(gguf: Path) -> str:
    return f"FROM ./{gguf.name}"


def _can_be_quoted(text: str) -> bool:
    return '"""' not in text and text == _printable(text)


def _printable(text: str) -> str:
    """`text` without the characters that Ollama's parser drops without a word."""
    return "".join(c for c in text if c.isprintable() or c in "\n\t")
