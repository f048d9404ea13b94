"""Triton's interpreter: Triton decides on its import whether it interprets, so that it runs in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch


def interpreted(module: str, path: Path) -> Any:
    """What `python -m module path` saves at `path` where Triton interprets its kernels."""
    subprocess.run(
        [sys.executable, "-m", module, path],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[1],
        check=True,
    )
    return torch.load(path, weights_only=False)
