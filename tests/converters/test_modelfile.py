"""Modelfiles, read back as Ollama's own parser reads them."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf import GGUFValueType
from gguf.gguf_writer import GGUFValue

from a3q.errors import InputError
from converters.modelfile import Modelfile, check_modelfile, license_text, stop_texts, write_modelfile
from converters.ollama_template import derive_template
from tests.chat_templates import BRACES, CHATML, HEADINGS, LLAMA2, LLAMA3, PHI3, Tokens


def parse(text: str) -> list[tuple[str, str]]:
    """Commands and their values, by the rules of Ollama's parser/parser.go."""
    commands: list[tuple[str, str]] = []
    state, buffer, name = "nil", "", ""

    def unquote(value: str) -> str | None:
        for quote in ('"""', '"'):
            if value.startswith(quote):
                complete = len(value) >= 2 * len(quote) and value.endswith(quote)
                return value[len(quote) : -len(quote)] if complete else None
        return value

    for c in text:
        space, newline = c in " \t", c in "\r\n"
        if state == "nil":
            if not space and not newline:
                state, buffer = ("comment", "") if c == "#" else ("name", c)
        elif state == "comment":
            state = "nil" if newline else "comment"
        elif state == "name":
            if space:
                name, buffer, state = buffer.lower(), "", "parameter" if buffer.lower() == "parameter" else "value"
            else:
                assert c.isalpha()
                buffer += c
        elif state == "parameter":
            if space:
                name, buffer, state = buffer, "", "value"
            else:
                buffer += c
        elif space or newline:
            value = unquote(buffer.strip())
            if value is None or space:
                buffer += c
            else:
                commands.append((name, value))
                state, buffer = "nil", ""
        elif c.isprintable():
            buffer += c
    assert state == "nil"
    return commands


def string(value: str) -> GGUFValue:
    return GGUFValue(value, GGUFValueType.STRING)


def write(
    folder: Path, tokenizer: Tokens, metadata: dict[str, GGUFValue] | None = None, source: Path | None = None
) -> Modelfile:
    return write_modelfile(
        folder / "m-4bit.gguf", tokenizer, metadata or {}, source or folder / "m.gguf", context=4096, force=False
    )


@pytest.mark.parametrize("template", [CHATML, LLAMA3, LLAMA2, PHI3, BRACES])
def test_ollama_reads_what_was_meant(tmp_path: Path, template: str) -> None:
    tokenizer = Tokens(template)
    made = write(tmp_path, tokenizer, {"general.license": string("apache-2.0")})
    assert made.path == tmp_path / "Modelfile" and made.notes == ()
    assert made.template == derive_template(tokenizer).text
    assert parse(made.path.read_text(encoding="utf-8")) == [
        ("from", "./m-4bit.gguf"),
        ("template", made.template),
        *(("stop", stop) for stop in made.stops),
        ("num_ctx", "4096"),
        ("license", "apache-2.0"),
    ]
    assert made.parameters == {"num_ctx": 4096, "stop": list(made.stops)}
    assert [path.name for path in tmp_path.iterdir()] == ["Modelfile"]


def test_a_template_that_cannot_be_carried_is_left_to_ollama(tmp_path: Path) -> None:
    each = "{{% for m in messages %}}{{{{ m.role + {} + m.content }}}}{{% endfor %}}"
    for template, reason in (
        ("{{ messages | length }}", "every message once"),
        (each.format('\'"""\''), "characters"),
        (each.format("'\u200b'"), "characters"),
        (each.format("'\\r'"), "characters"),
    ):
        made = write(tmp_path, Tokens(template))
        assert made.template is None
        assert [name for name, _ in parse(made.path.read_text())] == ["from", "stop", "num_ctx"]
        assert reason in made.notes[0] and "plain prompts" in made.notes[0]
    assert "no chat template" in write(tmp_path, Tokens(None)).notes[0]


def test_stops() -> None:
    def stops(template: str | None, tokenizer: Tokens | None = None) -> tuple[str, ...]:
        chat = derive_template(Tokens(template)).format if template else None
        return stop_texts(tokenizer or Tokens(template), chat)

    assert stops(None) == ("</s>",)
    assert stops(CHATML) == ("</s>", "<|im_end|>", "<|im_start|>")
    assert stops(LLAMA3) == ("</s>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
    assert stops(LLAMA2) == ("</s>", "<s>")
    ends = Tokens(None, extra={"tokenizer.ggml.eot_token_id": GGUFValue(10, GGUFValueType.UINT32)})
    assert stops(None, ends) == ("</s>", "<|end|>")
    # Without any control token, what opens the next question.
    assert stops(HEADINGS, Tokens(HEADINGS, eos_id=None)) == ("### Human:",)
    # An end token that is a piece of text would cut answers short.
    assert stops(None, Tokens(None, eos_id=0)) == ()
    # An end token that a Modelfile cannot hold; the runtime stops at it all the same.
    assert stops(None, Tokens(None, words=["<unk>", 'a"b'])) == ("<s>",)


def test_license_of_the_source_folder(tmp_path: Path) -> None:
    metadata = {"general.license": string("other"), "general.license.name": string("own"), "x": string("y")}
    metadata["general.license.link"] = string("https://example.org/LICENSE")
    words = "own\nother\nhttps://example.org/LICENSE"
    assert license_text({}, tmp_path) is None
    assert license_text(metadata, tmp_path) == words
    (tmp_path / "m.gguf").touch()
    (tmp_path / "LICENSE.txt").write_text('Do as "you" like.\f\n\n\tNo  warranty.\n')
    assert license_text(metadata, tmp_path) == 'Do as "you" like.\n\n\tNo  warranty.'
    made = write(tmp_path, Tokens(CHATML), source=tmp_path)
    assert parse(made.path.read_text())[-1] == ("license", made.license)
    # What lies beside a GGUF may belong to something else.
    assert license_text(metadata, tmp_path / "m.gguf") == words
    (tmp_path / "LICENSE.txt").write_text('say """this"""')
    assert license_text(metadata, tmp_path) == words


def test_replaces_its_own_modelfile_and_no_other(tmp_path: Path) -> None:
    gguf = tmp_path / "m-4bit.gguf"
    check_modelfile(gguf, force=False)
    write(tmp_path, Tokens(CHATML))
    check_modelfile(gguf, force=False)
    write(tmp_path, Tokens(CHATML))
    with pytest.raises(InputError, match=r"Modelfile: exists already and is not a3q's for other\.gguf.*--force"):
        check_modelfile(tmp_path / "other.gguf", force=False)
    check_modelfile(tmp_path / "other.gguf", force=True)
    (tmp_path / "Modelfile").write_text("FROM ./m-4bit.gguf\nSYSTEM mine\n")
    with pytest.raises(InputError, match="exists already"):
        write(tmp_path, Tokens(CHATML))
    assert "mine" in (tmp_path / "Modelfile").read_text()


def test_impossible_places(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot hold this file name"):
        check_modelfile(tmp_path / "a\u00a0b.gguf", force=False)
    with pytest.raises(InputError, match="Modelfile: cannot be written: No such file"):
        write(tmp_path / "absent", Tokens(CHATML))
    made = write_modelfile(tmp_path / "with space.gguf", Tokens(None), {}, tmp_path, context=8, force=False)
    assert parse(made.path.read_text())[0] == ("from", "./with space.gguf")
