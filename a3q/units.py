"""Numbers in units that people read."""

from __future__ import annotations

from collections.abc import Sequence


def megabytes(size: float) -> str:
    """Bytes."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def operations(count: float) -> str:
    """Floating-point operations."""
    return f"{count / 1e9:.2f} GFLOP" if count >= 1e8 else f"{count / 1e6:.1f} MFLOP"


def span(values: Sequence[int]) -> str:
    """One number, or the range of those that differ."""
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"
