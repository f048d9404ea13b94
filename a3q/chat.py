"""A GGUF that answers: chat with the file's own template, or completion, in llama.cpp through llama-cpp-python.

Of its class `Llama` this uses the model, the reuse of what is cached, and the sampling. Templates are rendered and text
is put together here: left to itself, the class takes a format of its own for a template that it thinks it knows, one of
Llama 2 where there is none, and drops what a token's piece has beyond 32 bytes.
"""

from __future__ import annotations

import codecs
import ctypes
import random
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jinja2

from a3q.errors import InputError, VerifyError
from a3q.footprint import CACHE_STEP, check_cache_type, padded_context
from a3q.runtime import available, cache_type_number, log, usable_cores
from converters.gguf_reader import GGUFHeader, check_gguf
from converters.tokenizer import tokenizer_from_gguf

DEFAULT_CONTEXT = 4096
_MOST = 2**31 - CACHE_STEP


@dataclass(frozen=True)
class Answered:
    """What the last answer took, by llama.cpp's own counters."""

    prompt_tokens: int
    """Read for this answer: what an earlier one left in the cache is not among them."""
    prompt_speed: float
    """Tokens per second."""
    tokens: int
    """Of the answer."""
    speed: float
    """Tokens per second; 0 where no more than one was written, which the prompt gives."""
    forgotten: int
    """Messages, the oldest, that the context no longer held."""
    cut: str | None
    """What ended the answer before the model did."""

    def __str__(self) -> str:
        parts = [
            f"prompt {self.prompt_tokens} tokens, {self.prompt_speed:.1f} tokens/s",
            f"answer {self.tokens} tokens, {self.speed:.1f} tokens/s",
        ]
        if self.cut is not None:
            parts.append(f"cut off: {self.cut}")
        if self.forgotten:
            parts.append(f"{self.forgotten} older messages forgotten")
        return "; ".join(parts)


class Chat:
    """A GGUF file in llama.cpp on the CPU, and what was said so far.

    `raw`, or a file without a chat template: every prompt is completed as it is, without what was said before. `n_ctx`:
    by default what the model was trained for, at most `DEFAULT_CONTEXT`. InputError for files and options that cannot
    be used; VerifyError, in llama.cpp's own words, where it does not load a file that looks sound.
    """

    def __init__(
        self,
        path: Path,
        *,
        n_ctx: int | None = None,
        cache_type: str = "f16",
        system: str | None = None,
        raw: bool = False,
        temperature: float = 0.8,
        seed: int | None = None,
        max_tokens: int = 256,
    ) -> None:
        check_cache_type(cache_type)
        # Written so that a NaN is refused too.
        if not 0 <= temperature < float("inf"):
            raise InputError(f"--temp {temperature:g}: give 0 (always the likeliest token) or more")
        if seed is not None and not 0 <= seed < 2**32:
            raise InputError(f"--seed {seed}: give a number from 0 to {2**32 - 1}")
        if max_tokens < 1:
            raise InputError(f"-n {max_tokens}: give a positive number of tokens")
        if n_ctx is not None and not 0 < n_ctx <= _MOST:
            raise InputError(f"--ctx {n_ctx}: give a number of tokens from 1 to {_MOST}")
        header = _checked(path)
        self.n_ctx = n_ctx or min(header.config.max_position_embeddings, DEFAULT_CONTEXT)
        trained = header.config.max_position_embeddings
        if self.n_ctx > trained and any(role.name == "positions" for role in header.family.top):
            raise InputError(f"--ctx {self.n_ctx}: the model has learned {trained} positions; give at most that")
        # Holds the vocabulary to its rules too, before llama.cpp reads it.
        template = tokenizer_from_gguf(header.fields, path).chat_template
        self.raw = raw or template is None
        if self.raw and system is not None:
            reason = "--raw leaves it out" if raw else f"{path} has none"
            raise InputError(f"--system goes through the chat template, and {reason}")
        self.path = path
        self.last: Answered | None = None
        """Of the last answer, once it is complete or given up."""
        self._temperature, self._max_tokens = temperature, max_tokens
        self._messages = [] if system is None else [{"role": "system", "content": system}]
        self._kept = len(self._messages)
        seed = random.randrange(1, 2**32) if seed is None else seed
        self._llama = self._load(header.files[0], cache_type, seed)
        self._formatter = None if raw or template is None else self._template(template)

    def _load(self, path: Path, cache_type: str, seed: int) -> Any:
        import llama_cpp

        log.install(llama_cpp.llama_cpp)
        try:
            llama = llama_cpp.Llama(
                str(path),
                # The class has no room for what llama.cpp itself would add.
                n_ctx=padded_context(self.n_ctx),
                n_threads=usable_cores(),
                n_threads_batch=usable_cores(),
                # What llama.cpp chooses by itself on the CPU, and what a rounded cache needs.
                flash_attn=True,
                type_k=cache_type_number(cache_type),
                type_v=cache_type_number(cache_type),
                verbose=False,
            )
        except ValueError as error:
            if cache_type != "f16" and "context" in str(error):
                raise InputError(
                    f"{self.path}: llama.cpp cannot use --kv-type {cache_type}: {log.reason()}; leave it at f16"
                ) from error
            raise VerifyError(f"{self.path}: llama.cpp cannot load it: {log.reason()}") from error
        except jinja2.TemplateError as error:  # the class compiles every template of a file, wanted or not
            raise InputError(
                f"{self.path}: its chat template is broken ({error}); mend it and convert again"
            ) from error
        llama.set_seed(seed)
        return llama

    def _template(self, template: str) -> Any:
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        def text(token: int) -> str:
            return "" if token < 0 else str(self._llama._model.token_get_text(token))

        return Jinja2ChatFormatter(template, text(self._llama.token_eos()), text(self._llama.token_bos()))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._llama.close()

    def answer(self, prompt: str) -> Generator[str, None, None]:
        """The model's answer in pieces, as they come; closed early, what was written so far is remembered.

        InputError for a prompt that the context does not hold or the template refuses; it is not remembered then.
        """
        self.last = None
        forgotten = 0
        if self.raw:
            tokens = self._raw_tokens(prompt)
        else:
            forgotten, tokens = self._chat_tokens(prompt)
        answer = ""
        try:
            for piece in self._generate(tokens, forgotten):
                answer += piece
                yield piece
        finally:
            if not self.raw:
                self._messages.append({"role": "assistant", "content": answer})

    def _raw_tokens(self, prompt: str) -> list[int]:
        add_bos = bool(self._llama._model.add_bos_token())
        tokens: list[int] = self._llama.tokenize(prompt.encode(errors="replace"), add_bos=add_bos, special=True)
        if not tokens:
            raise InputError("the prompt is empty; give a text to complete")
        self._check_room(tokens)
        return tokens

    def _chat_tokens(self, prompt: str) -> tuple[int, list[int]]:
        """How many messages had to be forgotten, and the chat as the template writes it, `prompt` now in it."""
        system, said = self._messages[: self._kept], self._messages[self._kept :]
        said.append({"role": "user", "content": prompt})
        # Of a long chat a quarter of the context stays free for the answer.
        room = self.n_ctx - min(self._max_tokens, self.n_ctx // 4)
        dropped = 0
        while True:
            tokens = self._rendered(system + said[dropped:])
            if len(tokens) <= room or dropped + 1 == len(said):
                break
            dropped += 2
        self._check_room(tokens)
        self._messages = system + said[dropped:]
        return dropped, tokens

    def _rendered(self, messages: list[dict[str, str]]) -> list[int]:
        assert self._formatter is not None
        try:
            text = self._formatter(messages=messages).prompt
        # A template may refuse what it is given, and says so in either way.
        except (jinja2.TemplateError, ValueError, TypeError) as error:
            raise InputError(f"{self.path}: its chat template refuses the chat ({error}); use --raw") from error
        # Templates write what goes in front of a text themselves.
        tokens: list[int] = self._llama.tokenize(text.encode(errors="replace"), add_bos=False, special=True)
        return tokens

    def _check_room(self, tokens: list[int]) -> None:
        if len(tokens) >= self.n_ctx:
            raise InputError(
                f"the prompt has {len(tokens)} tokens and the context holds {self.n_ctx}; give a larger --ctx"
            )

    def _generate(self, prompt: list[int], forgotten: int) -> Generator[str, None, None]:
        import llama_cpp

        llama = self._llama
        room = self.n_ctx - len(prompt)
        limit = min(self._max_tokens, room)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        llama_cpp.llama_perf_context_reset(llama.ctx)
        count = 0
        cut: str | None = "interrupted"
        try:
            for token in llama.generate(prompt, temp=self._temperature):
                if llama_cpp.llama_vocab_is_eog(llama._model.vocab, token):
                    cut = None
                    break
                count += 1
                if piece := decoder.decode(self._piece(token)):
                    yield piece
                if count == limit:
                    cut = f"-n {self._max_tokens}" if limit == self._max_tokens else f"a context of {self.n_ctx}"
                    break
            if rest := decoder.decode(b"", final=True):
                yield rest
        finally:
            took = llama_cpp.llama_perf_context(llama.ctx)
            self.last = Answered(
                prompt_tokens=took.n_p_eval,
                prompt_speed=_rate(took.n_p_eval, took.t_p_eval_ms),
                tokens=count,
                speed=_rate(took.n_eval, took.t_eval_ms),
                forgotten=forgotten,
                cut=cut,
            )

    def _piece(self, token: int) -> bytes:
        import llama_cpp

        room = 64
        while True:
            buffer = ctypes.create_string_buffer(room)
            length = llama_cpp.llama_token_to_piece(self._llama._model.vocab, token, buffer, room, 0, False)
            if length >= 0:
                return buffer.raw[:length]
            room = -length


def _rate(count: int, milliseconds: float) -> float:
    return 1000 * count / milliseconds if milliseconds > 0 else 0.0


def _checked(path: Path) -> GGUFHeader:
    """A sound GGUF, before native code sees it; InputError when it is none or there is no runtime for it."""
    if path.is_dir():
        raise InputError(f"{path}: is a folder, and `a3q run` takes a GGUF; write one with: a3q convert {path}")
    if not path.exists():
        raise InputError(f"{path}: no such file")
    if not available():
        raise InputError('llama.cpp is not installed here; run: pip install "a3q[verify]"')
    return check_gguf(path)
