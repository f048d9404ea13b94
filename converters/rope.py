"""Rotary position embedding across formats: the order of a head's rows, and its list of frequencies."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from a3q.errors import InputError
from a3q.model import plain_frequencies

LARGEST = 3e38
"""Numbers beyond it do not fit a float32, which is what files hold."""


def to_interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of a half-split projection (or bias) `[heads * d, ...]` put so that a pair is rows `2p` and `2p + 1`."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def to_half_split(weight: Tensor, heads: int) -> Tensor:
    """The inverse of `to_interleaved`."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, half, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def frequencies_from_hf(
    config: Mapping[str, Any], head_dim: int, origin: object, *, partial: bool = False
) -> tuple[float, tuple[float, ...]]:
    """`rope_theta` and the scaled frequencies of a config.json; `partial`: the family may rotate a part of each head.

    Reads both `rope_parameters` (transformers 5) and `rope_theta` beside `rope_scaling`. InputError where the scaling
    is not a fixed list of frequencies (`dynamic`), scales the scores too (`yarn`, `longrope`) or is not complete.
    """
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(scaling, Mapping):
        raise InputError(f"{origin}: the RoPE parameters are not an object: {scaling!r}")
    if nested := [key for key, value in scaling.items() if isinstance(value, Mapping)]:
        raise InputError(f"{origin}: RoPE parameters for each kind of layer ({', '.join(nested)}) are not supported")
    theta = _positive({"rope_theta": 10000.0, **config, **scaling}, "rope_theta", origin)
    plain = plain_frequencies(theta, _rotated({**config, **scaling}, head_dim, origin, partial))
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return theta, plain
    if kind == "linear":
        factor = _positive(scaling, "factor", origin)
        return theta, tuple(omega / factor for omega in plain)
    if kind == "llama3":
        return theta, _llama3(plain, {"max_position_embeddings": 0, **config, **scaling}, origin)
    raise InputError(f"{origin}: RoPE scaling {kind!r} is not supported; a3q knows default, linear and llama3")


def _rotated(parameters: Mapping[str, Any], head_dim: int, origin: object, partial: bool) -> int:
    """Dimensions of a head that are rotated."""
    part = parameters.get("partial_rotary_factor")
    if part is None:
        part = 1.0
    if not partial and part != 1:
        raise InputError(f"{origin}: partial_rotary_factor is {part!r}; in this family a3q needs whole heads rotated")
    part = _positive({"partial_rotary_factor": part}, "partial_rotary_factor", origin)
    # Cut as transformers cuts it.
    rotated = int(head_dim * part)
    if part > 1 or rotated % 2 or not rotated:
        raise InputError(f"{origin}: RoPE cannot turn {rotated} dimensions of a head of {head_dim}")
    return rotated


def _llama3(plain: tuple[float, ...], parameters: Mapping[str, Any], origin: object) -> tuple[float, ...]:
    """Llama 3.1's scaling: slow pairs are divided by `factor`, fast ones kept, those between blended."""
    factor = _positive(parameters, "factor", origin)
    low = _positive(parameters, "low_freq_factor", origin)
    high = _positive(parameters, "high_freq_factor", origin)
    context = _positive(
        {"original_max_position_embeddings": parameters["max_position_embeddings"], **parameters},
        "original_max_position_embeddings",
        origin,
    )
    if high <= low:
        raise InputError(f"{origin}: RoPE scaling llama3 needs high_freq_factor above low_freq_factor")

    def scaled(omega: float) -> float:
        turns = context * omega / (2 * math.pi)
        keep = min(max((turns - low) / (high - low), 0.0), 1.0)
        return keep * omega + (1 - keep) * omega / factor

    return tuple(scaled(omega) for omega in plain)


def _positive(parameters: Mapping[str, Any], key: str, origin: object) -> float:
    """A finite number above zero; InputError names the key."""
    value = parameters.get(key)
    # Compared, not asked whether it is finite: JSON knows integers that no float holds.
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= LARGEST:
        raise InputError(f"{origin}: RoPE parameter {key} must be a positive number, found {value!r}")
    return float(value)


def factors(frequencies: tuple[float, ...], theta: float) -> tuple[float, ...] | None:
    """Divisors of the plain frequencies for `rope_freqs.weight`; None when the frequencies are the plain ones."""
    plain = plain_frequencies(theta, 2 * len(frequencies))
    pairs = tuple(zip(plain, frequencies, strict=True))
    if all(math.isclose(base, omega, rel_tol=1e-6, abs_tol=0.0) for base, omega in pairs):
        return None
    return tuple(base / omega for base, omega in pairs)


def base_and_factor(frequencies: tuple[float, ...], theta: float) -> tuple[float, float] | None:
    """Base and divisor that give `frequencies`, `theta` being the base where it can be; None when no two do."""
    first = frequencies[0]
    bases = [theta]
    if len(frequencies) > 1 and 0 < frequencies[1] < first:
        # Chosen frequencies may fall so fast that no float is their base.
        logarithm = len(frequencies) * math.log(first / frequencies[1])
        bases += [math.exp(logarithm)] if logarithm < math.log(LARGEST) else []
    for base in bases:
        plain = plain_frequencies(base, 2 * len(frequencies))
        pairs = zip(plain, frequencies, strict=True)
        if all(math.isclose(one * first, omega, rel_tol=1e-6, abs_tol=0.0) for one, omega in pairs):
            return base, 1.0 if math.isclose(first, 1.0, rel_tol=1e-6) else 1 / first
    return None
