"""What a machine can do at best: the rates that a3q's are measured against."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

_REPEATS = 5
_SIZES = {"cuda": 8192, "cpu": 2048}
_COPIED = {"cuda": 4 << 30, "cpu": 1 << 29}
"""Bytes."""
_FILE = {"cuda": 4 << 30, "cpu": 1 << 28}
"""The same; a GPU's machine has a disk to match."""
_PART = 1 << 26


def _best(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of several runs, after one that does not count."""
    times = []
    for _ in range(_REPEATS + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """FLOP/s of a product of two square matrices."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _best(lambda: a @ b, device)


def copy_rate(source: torch.device, target: torch.device, size: int) -> float:
    """Bytes/s that are copied; inside one memory each byte is read and written, which counts once."""
    a = torch.zeros(size, dtype=torch.uint8, device=source)
    b = torch.zeros(size, dtype=torch.uint8, device=target)
    return size / _best(lambda: b.copy_(a), source if source.type == "cuda" else target)


def file_rates(folder: Path, size: int) -> tuple[float, float]:
    """Bytes/s of writing a file until it is on the disk, and of reading it when the system has forgotten it."""
    path, part = folder / f".a3q-rate-{os.getpid()}", os.urandom(_PART)
    try:
        start = time.perf_counter()
        with path.open("wb") as file:
            for _ in range(size // _PART):
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        write = size / (time.perf_counter() - start)
        with path.open("rb", buffering=0) as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            start = time.perf_counter()
            while file.read(_PART):
                pass
            read = size / (time.perf_counter() - start)
    finally:
        path.unlink(missing_ok=True)
    return write, read


def reference_rates(device: torch.device, folder: Path) -> dict[str, float]:
    """FLOP/s and bytes/s of this machine by what they are of; `folder` is on the disk that counts."""
    cpu, size = torch.device("cpu"), _SIZES[device.type]
    found = {"matmul float32": matmul_rate(device, torch.float32, size)}
    if device.type == "cuda":
        found["matmul bfloat16"] = matmul_rate(device, torch.bfloat16, size)
        found["matmul float64"] = matmul_rate(device, torch.float64, size // 2)
        found["copy on the device"] = copy_rate(device, device, _COPIED["cuda"])
        found["copy to the device"] = copy_rate(cpu, device, _COPIED["cpu"])
    found["copy in main memory"] = copy_rate(cpu, cpu, _COPIED["cpu"])
    found["write a file"], found["read a file"] = file_rates(folder, _FILE[device.type])
    return found


def main_rate(rates: dict[str, float]) -> float:
    """FLOP/s that shares are given of: bfloat16's on a GPU, where most is computed in it."""
    return rates.get("matmul bfloat16", rates["matmul float32"])
