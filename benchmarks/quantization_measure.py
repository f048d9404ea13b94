"""How far a quantized file is from the float file it was made from, in a3q's forward pass or in llama-perplexity."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from a3q.perplexity import Comparison, compare, logits_of
from benchmarks.common import windows
from converters.gguf_reader import check_gguf
from converters.open import open_model

LENGTH = 1024
"""Tokens of a window; its second half counts, as in `a3q eval` and llama-perplexity."""


@dataclass(frozen=True)
class Quality:
    """A file against its float original."""

    kl: float
    """Mean, in nats."""
    top1: float
    perplexity: float
    original_perplexity: float


def run(command: Sequence[str | Path]) -> str:
    """Output of a program; its last lines are the error where it fails."""
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output = done.stdout.decode(errors="replace")
    if done.returncode:
        raise RuntimeError("\n".join([f"{command[0]} failed:", *output.splitlines()[-10:]]))
    return output


def contents(path: Path) -> tuple[int, str]:
    """Bytes of a file's tensors, metadata left out, and how many matrices it has of each type."""
    tensors = check_gguf(path).tensors.values()
    types = Counter(tensor.tensor_type.name for tensor in tensors if len(tensor.shape) > 1)
    return sum(int(tensor.n_bytes) for tensor in tensors), " ".join(f"{n}:{types[n]}" for n in sorted(types))


@dataclass(frozen=True)
class InForward:
    """Measures in a3q's forward pass: float32 activations, so that only the weights differ."""

    original: Path
    text: Path
    count: int
    device: torch.device

    @cached_property
    def _reference(self) -> tuple[torch.Tensor, object]:
        model = open_model(self.original)
        sequences = windows(model, self.text, self.count, LENGTH)
        return sequences, logits_of(model, sequences, self.device, LENGTH // 2)

    def __call__(self, path: Path) -> Quality:
        """Quality of one file."""
        sequences, reference = self._reference
        candidate = logits_of(open_model(path), sequences, self.device, LENGTH // 2)
        found: Comparison = compare(reference, {"file": candidate}, sequences, LENGTH // 2)["file"]
        return Quality(found.mean_kl, found.top1_agreement, found.perplexity.value, found.reference_perplexity.value)


@dataclass(frozen=True)
class InLlama:
    """Measures with llama-perplexity, whose CPU kernels round activations too."""

    original: Path
    text: Path
    count: int
    programs: Path
    threads: int

    @cached_property
    def _logits(self) -> Path:
        path = self.original.with_name(f"{self.original.stem}-{self.count}.logits")
        if not path.exists():
            # With line ends as a3q's windows have them; they are other tokens.
            self._text.write_text(self.text.read_text(encoding="utf-8"), encoding="utf-8", newline="\n")
            part = path.with_suffix(".part")
            run([*self._command(self.original), "--save-all-logits", part])
            part.replace(path)
        return path

    @property
    def _text(self) -> Path:
        return self.original.with_name(f"{self.original.stem}-{self.text.name}")

    def _command(self, path: Path) -> list[str | Path]:
        program = self.programs / "llama-perplexity"
        sizes = ["-c", str(LENGTH), "--chunks", str(self.count), "-t", str(self.threads)]
        return [program, "-m", path, "-f", self._text, *sizes]

    def __call__(self, path: Path) -> Quality:
        """Quality of one file."""
        output = run([*self._command(path), "--kl-divergence", "--kl-divergence-base", self._logits])

        def figure(name: str) -> float:
            found = re.search(rf"^{re.escape(name)}\s*:\s*([-\d.naif]+)", output, re.MULTILINE)
            if found is None:
                raise RuntimeError(f"{path}: llama-perplexity said no {name!r}")
            return float(found[1])

        top1 = figure("Same top p") / 100
        return Quality(figure("Mean    KLD"), top1, figure("Mean PPL(Q)"), figure("Mean PPL(base)"))
