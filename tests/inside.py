"""What tests do inside the processes of `tests.processes`; a light module, since each of them imports it."""

from __future__ import annotations

import importlib
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

_CHANGES = {"os.rename": "rename", "os.mkdir": "mkdir", "os.rmdir": "rmdir", "os.remove": "remove", "open": "open"}
_CHANCE = re.compile(r"\.\d+(?=\.part\b)|(?<=gguf\.)[a-z0-9_]{8}(?=\.part)|(?<=tmp)[a-z0-9_]{8}")
"""Numbers of processes and the like in names."""


def nothing() -> None:
    """The process is left as it is."""


def noted(log: Path, prepare: Callable[[], None]) -> None:
    """Write down which layers are reduced, as their files in the current folder without suffix; then `prepare`."""
    import a3q.reduce

    really = a3q.reduce._Run.layer

    def layer(run: Any, i: int, *rest: Any) -> Any:
        with log.open("a") as file:
            file.write(f"{run.room._folder}/{i:05}\n")
        return really(run, i, *rest)

    a3q.reduce._Run.layer = layer  # type: ignore[method-assign]
    prepare()


def killed_at_changes(told: Path, pattern: str) -> None:
    """Kill the process where it is about to change a file below the current folder in a way that matches, unless the
    file `told` has it already; it is added there."""
    known, wanted, here = set(told.read_text().splitlines()), re.compile(pattern), Path.cwd()
    descriptor = os.open(told, os.O_WRONLY | os.O_APPEND)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _CHANGES:
            return
        if event == "open" and not (isinstance(arguments[1], str) and re.search("[wax+]", arguments[1])):
            return
        names = [str(name) for name in arguments[: 2 if event == "os.rename" else 1]]
        if any(Path(name).is_absolute() and not Path(name).is_relative_to(here) for name in names):
            return
        label = _CHANCE.sub("", " ".join([_CHANGES[event], *(name.removeprefix(f"{here}/") for name in names)]))
        if label not in known and wanted.search(label):
            os.write(descriptor, f"{label}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def often_kept(phase: int, steps: int) -> None:
    """Healing keeps all it has after every second step, and is killed after some of a phase."""
    from a3q.heal import checkpoint, stage

    phases = 0

    def keeper(run: Any, path: Path | None) -> Callable[[], None]:
        nonlocal phases
        phases += 1
        now, count = phases, 0

        def step() -> None:
            nonlocal count
            count += 1
            if (now, count) == (phase, steps):
                os.kill(os.getpid(), signal.SIGKILL)
            if count % 2 == 0 and path is not None:
                checkpoint.save(run, path)

        return step

    stage.keeper = keeper


def killed_in(module: str, name: str, call: int = 1, after: bool = False) -> None:
    """Kill the process at the so-manieth call of a function or method, or `after` it."""
    owner, last, really = _found(module, name)
    calls = 0

    def function(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = really(*args, **options)
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, last, function)


def killed_in_the_middle_of_a_write(call: int) -> None:
    """Kill the process when half of a tensor is in the GGUF."""
    import converters.gguf_writer

    really, calls = converters.gguf_writer.write_at, 0

    def write_at(path: Path, offset: int, data: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            really(path, offset, data.reshape(-1)[: data.size // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        really(path, offset, data)

    converters.gguf_writer.write_at = write_at


def _found(module: str, name: str) -> tuple[Any, str, Any]:
    """What holds a function, its name there, and itself."""
    owner: Any = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    return owner, last, getattr(owner, last)


def _at(module: str, name: str, call: int, happens: Callable[[], object]) -> None:
    """Before the so-manieth call of a function or method, something happens."""
    owner, last, really = _found(module, name)
    calls = 0

    def function(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            happens()
        return really(*args, **options)

    setattr(owner, last, function)


def raising(error: BaseException, module: str, name: str, call: int = 1) -> None:
    """The so-manieth call of a function or method raises `error`."""

    def happens() -> None:
        raise error

    _at(module, name, call, happens)


def unreadable(name: str, number: int) -> None:
    """Reading a file of this name fails in the middle."""
    really = Path.open

    def read(*_: object) -> bytes:
        raise OSError(number, os.strerror(number))

    def opened(path: Path, *args: Any, **options: Any) -> Any:
        file = really(path, *args, **options)
        if path.name != name:
            return file
        double = SimpleNamespace(read=read)
        return nullcontext(double)

    Path.open = opened  # type: ignore[method-assign]


def cut(path: Path, module: str, name: str, call: int) -> None:
    """A file is cut short at the so-manieth call of a function."""
    _at(module, name, call, lambda: os.truncate(path, path.stat().st_size // 2))


def limited(sequences: int) -> None:
    """Memory runs out inside a layer for more than so many sequences."""
    import torch

    import a3q.stream

    really = a3q.stream.attention_inner

    def attention_inner(*args: Any, **options: Any) -> Any:
        x = args[3]
        if len(x) > sequences:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore text.")
        return really(*args, **options)

    a3q.stream.attention_inner = attention_inner


def batches_of(size: int) -> None:
    """Batches have so many sequences from the start."""
    import a3q.batching

    a3q.batching.batch_size = lambda *_: size


def beside() -> None:
    """Layers are read and written in threads, as with a GPU."""
    import a3q.reduce
    from a3q.ahead import behind, fetched

    a3q.reduce.behind = lambda _: behind(True)
    a3q.reduce.fetched = lambda loads, _: fetched(loads, True)


def both(first: Callable[[], None], second: Callable[[], None]) -> None:
    """One after the other."""
    first()
    second()


def waiting(here: Path, module: str, name: str, call: int = 1) -> None:
    """At the so-manieth call of a function the file `here` appears, and nothing goes on until a signal comes."""

    def happens() -> None:
        here.touch()
        while True:
            time.sleep(0.05)

    _at(module, name, call, happens)


def file_size_limit(size: int) -> None:
    """No file can become longer than this."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
