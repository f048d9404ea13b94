"""`a3q` in processes that are forked from one that has PyTorch loaded: they begin at once, and may be killed."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

_LOADED = ["a3q.cli", "a3q.to_gguf", "a3q.to_folder", "a3q.report", "a3q.sensitivity", "converters.open", "llama_cpp"]
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(_LOADED)
_PATIENCE_S = 120.0

Prepare = Callable[[], None]
"""Called in the process before the command; travels there pickled."""


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    code: int
    """Negative: the signal that ended it."""
    said: str
    """Standard output and error."""

    def messages(self) -> list[str]:
        """Lines that are no progress bar."""
        return [line for line in self.said.splitlines() if line.strip() and not re.search(r"\d%.*left", line)]


@dataclass(frozen=True)
class Started:
    """A process that runs `a3q`."""

    _process: ForkServerProcess
    _said: Path

    def running(self, seconds: float) -> bool:
        """Whether it still runs after so long."""
        self._process.join(seconds)
        return self._process.exitcode is None

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def ended(self) -> Ended:
        """Wait for its end."""
        if self.running(_PATIENCE_S):
            self._process.kill()
            self._process.join()
            raise AssertionError(f"still running after {_PATIENCE_S} s: {self._said.read_text()}")
        code = self._process.exitcode
        assert code is not None
        return Ended(code, self._said.read_text())


def _nothing() -> None:
    pass


def start(*arguments: object, cwd: Path, prepare: Prepare = _nothing) -> Started:
    """Start `a3q` with `arguments` in the folder `cwd`; what it says goes to a file beside that."""
    said = cwd.with_name(f"{cwd.name}.said")
    texts = [str(argument) for argument in arguments]
    process = _CONTEXT.Process(target=_run, args=(texts, cwd, said, prepare), daemon=True)
    process.start()
    return Started(process, said)


def done(*arguments: object, cwd: Path, prepare: Prepare = _nothing) -> Ended:
    """The same, waiting for the end."""
    return start(*arguments, cwd=cwd, prepare=prepare).ended()


def _run(arguments: list[str], cwd: Path, said: Path, prepare: Prepare) -> None:
    import torch

    from a3q.cli import main

    torch.set_num_threads(1)
    os.chdir(cwd)
    os.environ |= {"COLUMNS": "300", "HF_HUB_OFFLINE": "1"}
    descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    # A runner of tests may have been started without.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["a3q", *arguments]
    prepare()
    main()
