"""Stock llama.cpp in this process, through the low-level functions of llama-cpp-python.

The package is optional: nothing here imports it until a runtime is opened or its presence is asked for.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from a3q.errors import InputError, VerifyError

Logits = NDArray[np.float32]

_BATCH = 512
# Below this many tokens at once, llama.cpp's flash attention on the CPU sums values in float16: logits then differ by
# several percent of their spread, and depend on how a text was cut. Pieces are kept at least this long.
_LEAST = 64
_LOGITS_BYTES = 64 << 20
_LOG_ERROR, _LOG_CONTINUE = 4, 5  # ggml_log_level


def _load_library() -> Any:
    """The `llama_cpp.llama_cpp` module; ImportError or OSError where it or its shared library is missing."""
    from llama_cpp import llama_cpp

    return llama_cpp


def available() -> bool:
    """Whether llama.cpp can be used here."""
    try:
        _load_library()
    except (ImportError, OSError, RuntimeError):  # a missing or unusable shared library is one of the latter two
        return False
    return True


def version() -> str:
    """Versions of llama-cpp-python and of the llama.cpp in it, such as `llama-cpp-python 0.3.36 (llama.cpp 0.5.0)`."""
    import llama_cpp

    package = f"llama-cpp-python {llama_cpp.__version__}"
    # Releases before 2026 do not tell which llama.cpp they hold.
    native = getattr(_load_library(), "llama_version", None)
    return package if native is None else f"{package} (llama.cpp {native().decode()})"


def usable_cores() -> int:
    """Cores that this process may use; only Linux knows of a limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Log:
    """Takes llama.cpp's log, which goes to standard error otherwise, and keeps the last errors."""

    def __init__(self) -> None:
        self.errors: deque[str] = deque(maxlen=8)
        self._in_error = False
        self._callback: Any = None

    def install(self, library: Any) -> None:
        """Make this the log of the whole process; the callback stays referenced, since C code keeps calling it."""
        if self._callback is None:
            self._callback = library.llama_log_callback(self._take)
        library.llama_log_set(self._callback, ctypes.c_void_p(0))
        self.errors.clear()

    def _take(self, level: int, text: bytes, _user_data: object) -> None:
        line = text.decode("utf-8", "replace")
        if level == _LOG_CONTINUE:
            if self._in_error and self.errors:
                self.errors[-1] += line
            return
        self._in_error = level == _LOG_ERROR
        if self._in_error:
            self.errors.append(line)

    def reason(self) -> str:
        """The last errors, oldest first: the very last line alone only says that it failed."""
        return "; ".join(line.strip() for line in self.errors) or "llama.cpp gave no reason"


_log = _Log()


class LlamaRuntime:
    """A GGUF file loaded in llama.cpp on the CPU, with a context of one sequence.

    InputError without llama-cpp-python; VerifyError, in llama.cpp's own words, when the file does not load or run.
    """

    def __init__(self, path: Path, n_ctx: int, n_threads: int | None = None) -> None:
        self._model: Any = None
        self._context: Any = None
        self._vocab: Any = None
        self._batch: Any = None
        try:
            self._lib = _load_library()
        except (ImportError, OSError, RuntimeError) as error:
            raise InputError(f"llama.cpp is not installed here ({error}); run: pip install 'a3q[verify]'") from error
        self.path, self.n_ctx = path, n_ctx
        try:
            self._open(n_threads or usable_cores())
        except BaseException:
            self.close()
            raise

    def _open(self, n_threads: int) -> None:
        lib = self._lib
        _log.install(lib)
        lib.llama_backend_init()
        model_options = lib.llama_model_default_params()
        model_options.n_gpu_layers = 0
        self._model = lib.llama_model_load_from_file(os.fsencode(self.path), model_options)
        if not self._model:
            raise VerifyError(f"{self.path}: llama.cpp cannot load it: {_log.reason()}")
        options = lib.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch, options.n_seq_max = self.n_ctx, _BATCH, _BATCH, 1
        options.n_threads = options.n_threads_batch = n_threads
        self._context = lib.llama_init_from_model(self._model, options)
        if not self._context:
            raise VerifyError(f"{self.path}: llama.cpp cannot make a context of {self.n_ctx}: {_log.reason()}")

        vocab = self._vocab = lib.llama_model_get_vocab(self._model)
        self.vocab_size: int = lib.llama_vocab_n_tokens(vocab)
        self.add_bos: bool = lib.llama_vocab_get_add_bos(vocab)
        bos = lib.llama_vocab_bos(vocab)
        self.bos_id: int | None = bos if bos >= 0 else None

        self._batch = lib.llama_batch_init(_BATCH, 0, 1)
        for i in range(_BATCH):
            self._batch.n_seq_id[i], self._batch.seq_id[i][0] = 1, 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free everything; twice does no harm."""
        if self._batch:
            self._lib.llama_batch_free(self._batch)
        if self._context:
            self._lib.llama_free(self._context)
        if self._model:
            self._lib.llama_model_free(self._model)
        self._model = self._context = self._batch = None

    def tokenize(self, text: str, add_special: bool = False, parse_special: bool = False) -> list[int]:
        """Token ids as llama.cpp makes them; `add_special` puts BOS and EOS where the file asks for them."""
        data = text.encode()
        room = len(data) + 16
        while True:
            ids = (self._lib.llama_token * room)()
            count = self._lib.llama_tokenize(self._vocab, data, len(data), ids, room, add_special, parse_special)
            if count >= 0:
                return list(ids[:count])
            if -count <= room:
                raise VerifyError(f"{self.path}: llama.cpp cannot tokenize a text of {len(data)} bytes")
            room = -count

    def logits(self, tokens: Sequence[int]) -> Logits:
        """Logits of every position of one sequence, `[len(tokens), vocab]`."""
        return np.concatenate(list(self.logits_chunks(tokens)))

    def logits_chunks(self, tokens: Sequence[int], first: int = 0) -> Iterator[Logits]:
        """Logits of the positions from `first` on, in order, as pieces `[n, vocab]` of about 64 MiB.

        Every piece is the caller's own. Nothing else may be asked of the runtime before the last piece is taken.
        """
        self._start(tokens)
        rows = min(_BATCH, max(_LEAST, _LOGITS_BYTES // (4 * self.vocab_size)))
        begin = 0
        while begin < len(tokens):
            end = min(begin + _BATCH, max(begin, first) + rows, len(tokens))
            if 0 < len(tokens) - end < _LEAST:
                end = len(tokens) if len(tokens) - begin <= _BATCH else len(tokens) - _LEAST
            self._decode(tokens[begin:end], begin, first)
            wanted = end - max(begin, first)
            if wanted > 0:
                pointer = self._lib.llama_get_logits(self._context)
                yield np.ctypeslib.as_array(pointer, shape=(wanted, self.vocab_size)).copy()
            begin = end

    def prompt_speed(self, n_tokens: int, repeats: int = 3) -> float:
        """Prompt processing in tokens per second: median of `repeats`, after one run to warm up."""
        tokens = self._arbitrary_tokens(n_tokens)

        def run() -> None:
            for begin in range(0, n_tokens, _BATCH):
                self._decode(tokens[begin : begin + _BATCH], begin, n_tokens - 1)

        self._seconds(tokens, run)
        return n_tokens / statistics.median(self._seconds(tokens, run) for _ in range(repeats))

    def generation_speed(self, n: int) -> float:
        """Token by token generation in tokens per second, over `n` tokens from an empty context."""
        tokens = self._arbitrary_tokens(n)

        def run() -> None:
            for position, token in enumerate(tokens):
                self._decode([token], position, 0)
                self._lib.llama_synchronize(self._context)

        return n / self._seconds(tokens, run)

    def _arbitrary_tokens(self, n: int) -> list[int]:
        """Speed does not depend on the text; a fixed seed keeps runs alike."""
        return [int(token) for token in np.random.default_rng(0).integers(self.vocab_size, size=n)]

    def _seconds(self, tokens: Sequence[int], run: Callable[[], None]) -> float:
        self._start(tokens)
        started = time.perf_counter()
        run()
        self._lib.llama_synchronize(self._context)
        return time.perf_counter() - started

    def _start(self, tokens: Sequence[int]) -> None:
        """Forget what was decoded before and check that `tokens` can be."""
        if not self._context:
            raise ValueError(f"{self.path}: the runtime is closed")
        if not 0 < len(tokens) <= self.n_ctx:
            raise ValueError(f"{len(tokens)} tokens for a context of {self.n_ctx}")
        # llama.cpp refuses such a batch too, but with no more than a return code.
        if not all(0 <= token < self.vocab_size for token in tokens):
            raise ValueError(f"token ids must lie in 0 … {self.vocab_size - 1}")
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)

    def _decode(self, tokens: Sequence[int], begin: int, first: int) -> None:
        """Run at most one batch of tokens, which stand at `begin` …; logits only of positions from `first` on."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, begin + i, begin + i >= first
        _log.errors.clear()
        status = self._lib.llama_decode(self._context, batch)
        if status != 0:
            raise VerifyError(f"{self.path}: llama.cpp cannot run it (status {status}): {_log.reason()}")
