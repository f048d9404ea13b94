"""Run a command, watch what memory it takes, and keep it below a limit if so told.

    python -m benchmarks.limits [--limit-memory 6GiB] COMMAND …

A limit is a control group, which only root can make, or a user to whom one is delegated. There pages of files count
too, but they are given back when others are needed: a command that maps a model larger than the limit runs, as it would
on a machine with as little memory. `ulimit -v` counts mapped files and the address space that threads and CUDA reserve,
and `ulimit -d` safetensors' private maps, none of which need memory.

With `--gpu-memory`, `python -m benchmarks.limits` is what runs instead of `python -m a3q`, and does a3q's work in the
same process on a device that seems to have that much memory: PyTorch refuses to allocate more, and what it tells of the
device is its total, and as free what is left of it beside PyTorch's own memory. A smaller device's speed is not
imitated, nor what CUDA itself takes of its memory, some hundred MB.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from a3q.settings import parse_size

_PERIOD_S = 0.5
_ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Usage:
    """What a command took, in seconds and bytes."""

    seconds: float
    code: int
    """Its exit code; negative: the signal that ended it."""
    resident: int
    """Peak, pages of mapped files included, as the kernel tells at the end."""
    anonymous: int
    """Peak of what no file stands behind, looked at every half second: what the command cannot do without."""
    gpu: int | None
    """Peak of the first GPU beyond what was taken before, as nvidia-smi tells; None without one."""
    limit: int | None
    limited_by: str | None
    """`cgroup v1` or `cgroup v2`."""
    group_anonymous: int | None
    """Peak of the control group's anonymous memory, its other processes included."""
    out_of_memory: bool
    """Whether the kernel ended it for that; a refused allocation is in its own output."""


@dataclass(frozen=True)
class _Group:
    """A control group with a limit on memory."""

    folder: Path
    version: int

    @property
    def processes(self) -> Path:
        """Where a process writes its number to join."""
        return self.folder / "cgroup.procs"

    def anonymous(self) -> int:
        """Bytes that no file stands behind."""
        return _field(self.folder / "memory.stat", "total_rss" if self.version == 1 else "anon")

    def killed(self) -> bool:
        """Whether a process was ended because it had no more memory."""
        name = "memory.oom_control" if self.version == 1 else "memory.events"
        return _field(self.folder / name, "oom_kill") > 0


def _field(path: Path, name: str) -> int:
    with suppress(OSError):
        for line in path.read_text().splitlines():
            key, value, *_ = [*line.split(), "", ""]
            if key.rstrip(":") == name:
                return int(value)
    return 0


@contextmanager
def memory_group(limit: int) -> Iterator[_Group | None]:
    """A control group inside this process's own that may take `limit` bytes, and no swap; None where none can be made.

    It is removed when its processes have ended.
    """
    made = None
    for version, parent in _parents():
        folder = parent / f"a3q-{os.getpid()}-{time.monotonic_ns()}"
        try:
            folder.mkdir()
        except OSError:
            continue
        try:
            (folder / ("memory.limit_in_bytes" if version == 1 else "memory.max")).write_text(str(limit))
        except OSError:
            folder.rmdir()
            continue
        with suppress(OSError):  # where there is no swap, there is nothing to turn off
            (folder / ("memory.swappiness" if version == 1 else "memory.swap.max")).write_text("0")
        made = _Group(folder, version)
        break
    try:
        yield made
    finally:
        if made is not None:
            _remove(made.folder)


def _parents() -> Iterator[tuple[int, Path]]:
    """Groups of this process in which one of ours may be made, with the version of control groups."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            own = path.strip("/")
            if "memory" in controllers.split(","):
                yield 1, _ROOT / "memory" / own
            elif number == "0" and (_ROOT / "cgroup.controllers").is_file():
                # A group that limits its children holds no processes itself, except at the top of a name space.
                with suppress(OSError):
                    (_ROOT / own / "cgroup.subtree_control").write_text("+memory")
                yield 2, _ROOT / own


def _remove(folder: Path) -> None:
    for _ in range(50):
        try:
            folder.rmdir()
            return
        except OSError:  # its processes are still being cleared away
            time.sleep(0.1)


def run_watched(
    command: Sequence[str], log: Path | None, limit: int | None = None, env: Mapping[str, str] | None = None
) -> Usage:
    """Run `command` with its output in `log`, if given, and in at most `limit` bytes of memory."""
    if limit is None:
        return _watch(command, log, None, None, None, env)
    with memory_group(limit) as group:
        if group is None:
            sys.exit("--limit-memory: no control group can be made here; run it as root, or in one that is delegated")
        # The shell limits itself, and then becomes the command.
        line = f"echo $$ > '{group.processes}' && exec \"$@\""
        return _watch(["sh", "-c", line, "sh", *command], log, limit, f"cgroup v{group.version}", group, env)


def _watch(
    command: Sequence[str],
    log: Path | None,
    limit: int | None,
    how: str | None,
    group: _Group | None,
    env: Mapping[str, str] | None,
) -> Usage:
    taken = _gpu_memory()
    anonymous = in_group = gpu = 0
    with nullcontext() if log is None else log.open("wb") as out:
        start = time.monotonic()
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env)
        try:
            looked = 0.0
            # Not `wait`, which keeps what the kernel says about memory to itself; and the figure for all children
            # would be that of the largest so far.
            while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
                if time.monotonic() - looked > _PERIOD_S:
                    looked = time.monotonic()
                    anonymous = max(anonymous, 1024 * _field(Path(f"/proc/{process.pid}/status"), "RssAnon"))
                    in_group = max(in_group, 0 if group is None else group.anonymous())
                    gpu = max(gpu, (_gpu_memory() or 0) if taken is not None else 0)
                time.sleep(0.02)
            seconds = time.monotonic() - start
            process.returncode = os.waitstatus_to_exitcode(ended[1])
        except BaseException:
            process.kill()
            process.wait()
            raise
    return Usage(
        seconds,
        process.returncode,
        1024 * ended[2].ru_maxrss,
        anonymous,
        None if taken is None else max(0, gpu - taken),
        limit,
        how,
        None if group is None else in_group,
        group is not None and group.killed(),
    )


def end_cleanly() -> None:
    """Let this process, when it is told to end, first end its command and remove its control group."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def _gpu_memory() -> int | None:
    """Bytes of the first GPU that are taken; None without one."""
    command = ["nvidia-smi", "-i", "0", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
        return int(found.split()[0]) << 20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


class _Smaller:
    """Properties of a device, which cannot be changed, but for its memory."""

    def __init__(self, properties: Any, size: int) -> None:
        self._properties = properties
        self.total_memory = min(size, properties.total_memory)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._properties, name)


def _shrink_gpu(size: int) -> None:
    """Let the device have `size` bytes for the rest of this process: a limit, and what PyTorch tells of its memory."""
    import torch

    properties, memory = torch.cuda.get_device_properties, torch.cuda.mem_get_info

    def smaller_properties(device: Any = None) -> Any:
        return _Smaller(properties(device), size)

    def smaller_memory(device: Any = None) -> tuple[int, int]:
        free, total = memory(device)
        return max(0, min(free, size - torch.cuda.memory_reserved(device))), min(size, total)

    torch.cuda.set_per_process_memory_fraction(min(1.0, size / properties(0).total_memory))
    torch.cuda.get_device_properties, torch.cuda.mem_get_info = smaller_properties, smaller_memory


def _with_gpu_memory(size: int, arguments: Sequence[str]) -> None:
    """a3q's command line in this process, on a device of `size` bytes."""
    import torch

    from a3q.cli import main as a3q_main

    if torch.cuda.is_available():
        _shrink_gpu(size)
    sys.argv = ["a3q", *arguments]
    a3q_main()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit-memory", metavar="SIZE")
    parser.add_argument("--gpu-memory", metavar="SIZE", help="what follows are a3q's arguments, not a command")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    if args.gpu_memory is not None:
        _with_gpu_memory(parse_size("--gpu-memory", args.gpu_memory), args.command)
        return
    end_cleanly()
    limit = None if args.limit_memory is None else parse_size("--limit-memory", args.limit_memory)
    print(run_watched(args.command, None, limit))


if __name__ == "__main__":
    main()
