"""Numbers in units that people read."""

from __future__ import annotations

from collections.abc import Sequence


def megabytes(size: float) -> str:
    """Bytes."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def operations(count: float) -> str:
    """Floating-point operations."""
    return f"{count / 1e9:.2f} GFLOP" if count >= 1e8 else f"{count / 1e6:.1f} MFLOP"


def count(number: float) -> str:
    """Tokens and the like with three digits, such as 26.2M."""
    for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        # What would be rounded up to 1000 is one of the next unit.
        if number >= 0.9995 * factor:
            return f"{float(f'{number / factor:.3g}'):g}{unit}"
    return f"{number:.0f}"


def clock(seconds: float) -> str:
    """Minutes and seconds, such as 4:10, and hours where there are any."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def span(values: Sequence[int]) -> str:
    """One number, or the range of those that differ."""
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"
