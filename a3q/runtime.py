"""Stock llama.cpp in this process, through the low-level functions of llama-cpp-python.

The package is optional: nothing here imports it until a runtime is opened or its presence is asked for.
"""

from __future__ import annotations

import ctypes
import os
import re
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from gguf.constants import GGMLQuantizationType
from numpy.typing import NDArray

from a3q.errors import InputError, VerifyError
from a3q.footprint import check_cache_type

Logits = NDArray[np.float32]

_BATCH = 512
# Below this many tokens at once, llama.cpp's flash attention on the CPU sums values in float16: logits then differ by
# several percent of their spread, and depend on how a text was cut. Pieces are kept at least this long.
_LEAST = 64
_LOGITS_BYTES = 64 << 20
_LOG_INFO, _LOG_ERROR, _LOG_CONTINUE = 2, 4, 5  # ggml_log_level
_BUFFER = re.compile(r"(KV|compute|output) buffer size = +([\d.]+) MiB")


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


@dataclass(frozen=True)
class MemoryReport:
    """What a context takes in llama.cpp's own words: its log has MiB with two decimals, 5 kB either way a buffer."""

    kv_bytes: int
    """The key/value cache; where layers with a sliding window have one of their own, both."""
    compute_bytes: int
    """Intermediate results of the largest batch."""
    output_bytes: int
    """Logits of one batch."""
    n_ctx: int
    """Positions that the cache was made for: what was asked for, rounded up to a multiple of 256."""
    flash_attention: bool

    @property
    def kv_bytes_per_token(self) -> float:
        """Of the context as a whole: sliding windows make it less in a longer one."""
        return self.kv_bytes / self.n_ctx


class RuntimeLog:
    """Takes llama.cpp's log, which goes to standard error otherwise, and keeps the last errors and notes."""

    def __init__(self) -> None:
        self.errors: deque[str] = deque(maxlen=8)
        self.notes: deque[str] = deque(maxlen=128)
        self._last: deque[str] | None = None
        self._callback: Any = None

    def install(self, library: Any) -> None:
        """Make this the log of the whole process; the callback stays referenced, since C code keeps calling it."""
        if self._callback is None:
            self._callback = library.llama_log_callback(self._take)
        library.llama_log_set(self._callback, ctypes.c_void_p(0))
        self.clear()

    def clear(self) -> None:
        """Forget what was said."""
        self.errors.clear()
        self.notes.clear()

    def _take(self, level: int, text: bytes, _user_data: object) -> None:
        line = text.decode("utf-8", "replace")
        if level == _LOG_CONTINUE:
            if self._last:
                self._last[-1] += line
            return
        self._last = {_LOG_ERROR: self.errors, _LOG_INFO: self.notes}.get(level)
        if self._last is not None:
            self._last.append(line)

    def reason(self) -> str:
        """The last errors, oldest first: the very last line alone only says that it failed."""
        return "; ".join(line.strip() for line in self.errors) or "llama.cpp gave no reason"


log = RuntimeLog()
"""The one of this process: llama.cpp has one for all models."""


def cache_type_number(name: str) -> int:
    """The `ggml_type` of a cache type."""
    return int(GGMLQuantizationType[name.upper()])


class LlamaRuntime:
    """A GGUF file loaded in llama.cpp on the CPU.

    `n_ctx` positions are shared by `n_seq_max` sequences, as llama.cpp's `-c` and `-np` do, of which only the first is
    run here. `cache_type`: type of keys and values in the cache, one of `a3q.footprint.CACHE_TYPES`. InputError without
    llama-cpp-python; VerifyError, in llama.cpp's own words, when the file does not load or run, or its heads do not fit
    the cache's type.
    """

    def __init__(
        self, path: Path, n_ctx: int, n_threads: int | None = None, *, cache_type: str = "f16", n_seq_max: int = 1
    ) -> None:
        self._model: Any = None
        self._context: Any = None
        self._vocab: Any = None
        self._batch: Any = None
        try:
            self._lib = _load_library()
        except (ImportError, OSError, RuntimeError) as error:
            raise InputError(f"llama.cpp is not installed here ({error}); run: pip install 'a3q[verify]'") from error
        check_cache_type(cache_type)
        self.path, self.n_ctx, self.cache_type, self.n_seq_max = path, n_ctx, cache_type, n_seq_max
        try:
            self._open(n_threads or usable_cores())
        except BaseException:
            self.close()
            raise

    def _open(self, n_threads: int) -> None:
        lib = self._lib
        log.install(lib)
        lib.llama_backend_init()
        model_options = lib.llama_model_default_params()
        model_options.n_gpu_layers = 0
        self._model = lib.llama_model_load_from_file(os.fsencode(self.path), model_options)
        if not self._model:
            raise VerifyError(f"{self.path}: llama.cpp cannot load it: {log.reason()}")
        options = lib.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = self.n_ctx, _BATCH, _BATCH
        options.n_seq_max = self.n_seq_max
        options.n_threads = options.n_threads_batch = n_threads
        options.type_k = options.type_v = cache_type_number(self.cache_type)
        # As llama-server has it: layers with a sliding window keep the window only.
        options.swa_full = False
        if self.cache_type != "f16":
            # Values that are rounded in blocks can only be read this way; without them llama.cpp decides itself.
            options.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
        log.clear()
        self._context = lib.llama_init_from_model(self._model, options)
        if not self._context:
            cache = "" if self.cache_type == "f16" else f" with a {self.cache_type} cache"
            raise VerifyError(f"{self.path}: llama.cpp cannot make a context of {self.n_ctx}{cache}: {log.reason()}")
        self._notes = tuple(log.notes)

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

    @property
    def memory(self) -> MemoryReport:
        """What the context takes; VerifyError when this llama.cpp does not say."""
        sizes: dict[str, float] = {}
        attention = None
        for note in self._notes:
            if found := _BUFFER.search(note):
                sizes[found[1]] = sizes.get(found[1], 0.0) + float(found[2])
            # The second is what `auto` came to.
            elif found := re.search(r"flash_attn += (enabled|disabled)|Flash Attention (enabled|disabled|not)", note):
                attention = "enabled" in found.groups()
        if attention is None or sizes.keys() != {"KV", "compute", "output"}:
            raise VerifyError(f"{self.path}: {version()} does not say what memory a context takes")
        kv, compute, output = (round(sizes[name] * 2**20) for name in ("KV", "compute", "output"))
        return MemoryReport(kv, compute, output, self._lib.llama_n_ctx(self._context), attention)

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

    def generation_speed(self, n: int, after: int = 0) -> float:
        """Token by token generation in tokens per second, over `n` tokens in a context that holds `after` already."""
        tokens = self._arbitrary_tokens(after + n)

        def fill() -> None:
            for begin in range(0, after, _BATCH):
                self._decode(tokens[begin : min(begin + _BATCH, after)], begin, after)

        def run() -> None:
            for position in range(after, after + n):
                self._decode([tokens[position]], position, after)
                self._lib.llama_synchronize(self._context)

        return n / self._seconds(tokens, run, fill)

    def _arbitrary_tokens(self, n: int) -> list[int]:
        """Speed does not depend on the text; a fixed seed keeps runs alike."""
        return [int(token) for token in np.random.default_rng(0).integers(self.vocab_size, size=n)]

    def _seconds(
        self, tokens: Sequence[int], run: Callable[[], None], prepare: Callable[[], None] = lambda: None
    ) -> float:
        self._start(tokens)
        prepare()
        self._lib.llama_synchronize(self._context)
        started = time.perf_counter()
        run()
        self._lib.llama_synchronize(self._context)
        return time.perf_counter() - started

    def _start(self, tokens: Sequence[int]) -> None:
        """Forget what was decoded before and check that `tokens` can be."""
        if not self._context:
            raise ValueError(f"{self.path}: the runtime is closed")
        room = self.n_ctx // self.n_seq_max
        if not 0 < len(tokens) <= room:
            raise ValueError(f"{len(tokens)} tokens for a context of {room}")
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
        log.errors.clear()
        status = self._lib.llama_decode(self._context, batch)
        if status != 0:
            raise VerifyError(f"{self.path}: llama.cpp cannot run it (status {status}): {log.reason()}")
