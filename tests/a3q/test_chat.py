"""Answers of llama.cpp: on tiny random models what goes in and comes out, on the demo model that it makes sense."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from a3q.chat import Answered, Chat
from a3q.errors import InputError, VerifyError
from a3q.runtime import LlamaRuntime
from converters.gguf_writer import write_gguf
from converters.hf_reader import open_huggingface
from converters.open import demo_model
from converters.types import resolve_quant
from tests.converters.test_gguf_reader import rewrite
from tests.pico import Kind, write_model

llama_cpp = pytest.importorskip("llama_cpp")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if m.content == 'bad' %}"
    "{{ raise_exception('no bad words') }}{% endif %}{% endfor %}{% if add_generation_prompt %}[me]{% endif %}"
)


def written(folder: Path, template: str | None, kind: Kind = "llama") -> Path:
    model = write_model(folder, kind, head_dim=32 if kind == "llama" else None)
    if template is not None:
        (model / "chat_template.jinja").write_text(template)
    return write_gguf(open_huggingface(model), resolve_quant("f32"), folder.with_suffix(".gguf")).path


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("talks") / "m", TEMPLATE)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("plain") / "m", None)


@pytest.fixture(scope="module")
def runtime(talks: Path) -> Iterator[LlamaRuntime]:
    with LlamaRuntime(talks, 256, n_threads=1) as opened:
        yield opened


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[int]]]:
    """Puts words in the model's mouth; gives the prompts that it got."""

    def patch(*tokens: int) -> list[list[int]]:
        prompts: list[list[int]] = []

        def generate(_self: object, prompt: list[int], temp: float) -> Iterator[int]:
            assert temp == 0
            prompts.append(prompt)
            yield from tokens

        monkeypatch.setattr("llama_cpp.Llama.generate", generate)
        return prompts

    return patch


def took(chat: Chat) -> Answered:
    assert chat.last is not None
    return chat.last


def test_the_files_own_template_is_used(
    talks: Path, runtime: LlamaRuntime, says: Callable[..., list[list[int]]]
) -> None:
    prompts = says(*runtime.tokenize("well"), 1, *runtime.tokenize("not this"))
    with Chat(talks, temperature=0, system="be brief") as chat:
        assert not chat.raw
        assert "".join(chat.answer("hello")) == "well"
        assert took(chat).tokens == len(runtime.tokenize("well"))
        assert took(chat).cut is None
        assert "".join(chat.answer("<s>again")) == "well"
    texts = ["<s>[system]be brief[user]hello[me]", "<s>[system]be brief[user]hello[assistant]well[user]<s>again[me]"]
    assert prompts == [runtime.tokenize(text, parse_special=True) for text in texts]


@pytest.mark.parametrize("own", [True, False])
def test_raw_text_is_completed(
    talks: Path, plain: Path, runtime: LlamaRuntime, says: Callable[..., list[list[int]]], own: bool
) -> None:
    prompts = says(5, 1)
    with Chat(talks if own else plain, temperature=0, raw=own) as chat:
        assert chat.raw
        for text in ("once upon", "a time"):
            "".join(chat.answer(text))
        with pytest.raises(InputError, match="prompt is empty"):
            next(chat.answer(""))
    assert prompts == [runtime.tokenize(text, add_special=True) for text in ("once upon", "a time")]


def test_greedy_tokens_are_the_likeliest(talks: Path, runtime: LlamaRuntime) -> None:
    tokens = runtime.tokenize("The quick brown fox jumps over the lazy dog")
    start = len(tokens)
    for _ in range(6):
        tokens.append(int(np.argmax(runtime.logits(tokens)[-1])))
    assert 1 not in tokens
    with Chat(talks, temperature=0, raw=True, max_tokens=6) as chat:
        text = "".join(chat.answer("The quick brown fox jumps over the lazy dog"))
        # Bytes that are no text come as U+FFFD.
        pieces = b"".join(chat._piece(token) for token in tokens[start:])
        assert text == pieces.decode("utf-8", "replace")
        last = took(chat)
    assert (last.prompt_tokens, last.tokens, last.cut, last.forgotten) == (start, 6, "-n 6", 0)
    assert last.prompt_speed > 0
    assert last.speed > 0
    assert str(last).startswith(f"prompt {start} tokens, ")
    assert str(last).endswith("; cut off: -n 6")


def test_seed_makes_it_repeatable(talks: Path) -> None:
    def text(seed: int | None) -> str:
        with Chat(talks, temperature=5.0, seed=seed, max_tokens=12) as chat:
            return "".join(chat.answer("hello"))

    assert text(3) == text(3)
    assert len({text(3), text(4), text(5)}) > 1
    assert len({text(None) for _ in range(3)}) > 1


def test_characters_of_several_tokens_come_whole(
    talks: Path, runtime: LlamaRuntime, says: Callable[..., list[list[int]]]
) -> None:
    tokens = runtime.tokenize("€5 ß")
    assert len(tokens) > 4
    says(*tokens, *runtime.tokenize("€")[:2])
    with Chat(talks, temperature=0) as chat:
        pieces = list(chat.answer("hello"))
    assert "".join(pieces) == "€5 ß\N{REPLACEMENT CHARACTER}"
    assert "€" in pieces


def test_what_was_said_is_not_read_again(talks: Path) -> None:
    with Chat(talks, temperature=0, max_tokens=4) as chat:
        "".join(chat.answer("a long story about a mill by the river"))
        first = took(chat).prompt_tokens
        "".join(chat.answer("and?"))
        assert took(chat).prompt_tokens < first


def test_an_answer_that_is_given_up(talks: Path, runtime: LlamaRuntime, says: Callable[..., list[list[int]]]) -> None:
    prompts = says(*runtime.tokenize("abc"))
    with Chat(talks, temperature=0) as chat:
        pieces = chat.answer("hello")
        first = next(pieces)
        pieces.close()
        assert took(chat).cut == "interrupted"
        "".join(chat.answer("go on"))
    assert prompts[1] == runtime.tokenize(f"<s>[user]hello[assistant]{first}[user]go on[me]", parse_special=True)


def test_a_long_chat_forgets_the_oldest(
    talks: Path, runtime: LlamaRuntime, says: Callable[..., list[list[int]]]
) -> None:
    prompts = says(*runtime.tokenize("yes"), 1)
    with Chat(talks, temperature=0, system="be brief", n_ctx=100) as chat:
        forgotten = []
        for i in range(8):
            "".join(chat.answer(f"question {i}"))
            forgotten.append(took(chat).forgotten)
    assert all(len(prompt) <= 75 for prompt in prompts)
    assert forgotten[0] == 0
    assert set(forgotten) <= {0, 2, 4}
    assert sum(forgotten) >= 4
    text = "<s>[system]be brief[user]question"
    assert prompts[-1][: len(runtime.tokenize(text, parse_special=True))] == runtime.tokenize(text, parse_special=True)
    assert "messages forgotten" in str(Answered(1, 1.0, 1, 1.0, 2, None))


def test_a_prompt_that_does_not_fit_is_not_remembered(
    talks: Path, runtime: LlamaRuntime, says: Callable[..., list[list[int]]]
) -> None:
    prompts = says(1)
    with Chat(talks, temperature=0, n_ctx=40) as chat:
        with pytest.raises(
            InputError, match=r"the prompt has \d+ tokens and the context holds 40; give a larger --ctx"
        ):
            next(chat.answer("no " * 60))
        with pytest.raises(InputError, match=r"template refuses the chat \(no bad words\); use --raw"):
            next(chat.answer("bad"))
        assert chat.last is None
        "".join(chat.answer("hi"))
    assert prompts == [runtime.tokenize("<s>[user]hi[me]", parse_special=True)]


def test_an_answer_ends_with_the_context(talks: Path) -> None:
    with Chat(talks, temperature=0, raw=True, n_ctx=20) as chat:
        "".join(chat.answer("hello there"))
        last = took(chat)
        assert last.prompt_tokens + last.tokens == 20
        assert last.cut == "a context of 20"


@pytest.mark.parametrize("cache_type", ["q8_0", "q4_0"])
def test_cache_types(talks: Path, cache_type: str) -> None:
    with Chat(talks, temperature=0, cache_type=cache_type, max_tokens=4) as chat:
        assert "".join(chat.answer("hello"))


def test_default_context_is_what_was_trained(talks: Path) -> None:
    with Chat(talks) as chat:
        assert chat.n_ctx == 256


def test_split_files(talks: Path, tmp_path: Path, says: Callable[..., list[list[int]]]) -> None:
    rewrite(talks, tmp_path / "m.gguf", split_max_tensors=8)
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert len(parts) > 1
    with Chat(talks, temperature=0, max_tokens=5) as whole:
        expected = "".join(whole.answer("hello"))
    for part in (parts[0], parts[-1]):
        with Chat(part, temperature=0, max_tokens=5) as chat:
            assert "".join(chat.answer("hello")) == expected


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"cache_type": "q5_1"}, "--kv-type q5_1: give f16, q8_0, q4_0"),
        ({"temperature": -1.0}, "--temp -1"),
        ({"temperature": float("nan")}, "--temp nan"),
        ({"seed": -1}, "--seed -1"),
        ({"seed": 2**32}, "--seed 4294967296"),
        ({"max_tokens": 0}, "-n 0"),
        ({"n_ctx": 0}, "--ctx 0"),
        ({"n_ctx": 2**31}, "--ctx 2147483648"),
        ({"system": "x", "raw": True}, "--system .*--raw leaves it out"),
    ],
)
def test_options_that_cannot_be_used(talks: Path, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        Chat(talks, **options)


def test_system_message_without_a_template(plain: Path) -> None:
    with pytest.raises(InputError, match=r"--system .*m\.gguf has none"):
        Chat(plain, system="x")


def test_cache_type_that_the_heads_do_not_fit(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path / "m", None, "mistral")
    capfd.readouterr()
    with pytest.raises(InputError, match=r"cannot use --kv-type q8_0: .*16.*; leave it at f16"):
        Chat(path, cache_type="q8_0")
    assert capfd.readouterr() == ("", "")


def test_learned_positions_end(tmp_path: Path) -> None:
    path = written(tmp_path / "m", None, "gpt2")
    with pytest.raises(InputError, match="--ctx 257: the model has learned 256 positions"):
        Chat(path, n_ctx=257)


def test_broken_template(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"m\.gguf: its chat template is broken \(.*\); mend it"):
        Chat(written(tmp_path / "m", "{% for %}"))


def test_files_that_cannot_be_used(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"is a folder, .*: a3q convert "):
        Chat(tmp_path)
    with pytest.raises(InputError, match="no such file"):
        Chat(tmp_path / "none.gguf")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(plain.read_bytes()[:-2000])
    with pytest.raises(InputError, match="truncated or damaged"):
        Chat(cut)
    monkeypatch.setattr("a3q.chat.available", lambda: False)
    with pytest.raises(InputError, match=r'pip install "a3q\[verify\]"'):
        Chat(plain)


def test_what_only_llama_cpp_refuses(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = shutil.copy(plain, tmp_path / "m.gguf")
    monkeypatch.setattr("llama_cpp.llama_cpp.llama_model_load_from_file", lambda *_: None)
    with pytest.raises(VerifyError, match=r"m\.gguf: llama.cpp cannot load it: "):
        Chat(path)


@pytest.mark.parametrize("cache_type", ["f16", "q8_0"])
def test_demo_model_knows_its_planet(cache_type: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Of France's capital it is so little sure that the processor's rounding decides in which language it answers."""
    try:
        path = demo_model()
    except InputError:
        pytest.skip("the demo model is not installed")
    with Chat(path, temperature=0, cache_type=cache_type, system="You are a helpful assistant.", max_tokens=24) as chat:
        assert "Earth" in "".join(chat.answer("Which planet do we live on?"))
        assert took(chat).cut is None
    assert capfd.readouterr() == ("", "")
