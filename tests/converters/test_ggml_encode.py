"""ggml's encoders: importances do what they are for, and what would end the process is refused before."""

from __future__ import annotations

from importlib import util

import numpy as np
import pytest
from gguf import quants
from gguf.constants import GGMLQuantizationType
from numpy.typing import NDArray

from a3q.errors import InputError
from converters import ggml_encode
from converters.ggml_encode import ENCODED, available, decode, encode

Kind = GGMLQuantizationType
ROWS, N = 9, 512
# ggml takes seconds to make the tables of the types of one and two bits.
WEIGHTED = [kind for kind in ENCODED if kind is not Kind.Q8_0 and not kind.name.startswith(("IQ1", "IQ2"))]


def names(kind: GGMLQuantizationType) -> str:
    return kind.name


@pytest.fixture(scope="module")
def weight() -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((ROWS, N)).astype(np.float32)


@pytest.fixture(scope="module")
def importance() -> NDArray[np.float32]:
    return (np.random.default_rng(1).random(N) ** 6).astype(np.float32)


def error(weight: NDArray[np.float32], data: NDArray[np.uint8], kind: Kind, per: NDArray[np.float32]) -> float:
    return float((per * (decode(data, kind) - weight) ** 2).mean())


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0], ids=names)
def test_the_gguf_package_writes_the_same_bytes(weight: NDArray[np.float32], kind: Kind) -> None:
    np.testing.assert_array_equal(encode(weight, kind), quants.quantize(weight, kind))


@pytest.mark.parametrize("kind", WEIGHTED, ids=names)
def test_importances_lower_the_error_where_they_are_high(
    weight: NDArray[np.float32], importance: NDArray[np.float32], kind: Kind
) -> None:
    plain = encode(weight, kind, np.ones(N, dtype=np.float32))
    assert error(weight, encode(weight, kind, importance), kind, importance) < error(weight, plain, kind, importance)


@pytest.mark.parametrize("kind", WEIGHTED, ids=names)
def test_only_ratios_of_importances_count(
    weight: NDArray[np.float32], importance: NDArray[np.float32], kind: Kind
) -> None:
    data = encode(weight[:2], kind, importance)
    for factor in (2.0**-70, 2.0**70):
        np.testing.assert_array_equal(encode(weight[:2], kind, importance * np.float32(factor)), data)


@pytest.mark.parametrize("unused", [slice(256), slice(32), slice(None)], ids=["super-block", "block", "all"])
@pytest.mark.parametrize("kind", WEIGHTED, ids=names)
def test_weights_of_no_importance_are_kept(
    weight: NDArray[np.float32], importance: NDArray[np.float32], kind: Kind, unused: slice
) -> None:
    holes = importance.copy()
    holes[unused] = 0
    their = (holes == 0).astype(np.float32)
    evenly = error(weight[:2], encode(weight[:2], kind, np.ones(N, dtype=np.float32)), kind, their)
    assert error(weight[:2], encode(weight[:2], kind, holes), kind, their) < 1.5 * evenly


def test_rows_do_not_depend_on_their_chunk(
    weight: NDArray[np.float32], importance: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ggml_encode, "usable_cores", lambda: 1)
    monkeypatch.setattr(ggml_encode, "_CHUNKS_PER_WORKER", 1)
    whole = encode(weight, Kind.Q4_K, importance)
    monkeypatch.setattr(ggml_encode, "usable_cores", lambda: 4)
    np.testing.assert_array_equal(encode(weight, Kind.Q4_K, importance), whole)
    np.testing.assert_array_equal(encode(weight[::-1], Kind.Q4_K, importance), whole[::-1])
    np.testing.assert_array_equal(encode(weight[4:5], Kind.Q4_K, importance), whole[4:5])


def test_what_ggml_cannot_take_is_refused(weight: NDArray[np.float32], importance: NDArray[np.float32]) -> None:
    with pytest.raises(ValueError, match="does not encode Q8_1"):
        encode(weight, Kind.Q8_1)
    with pytest.raises(ValueError, match="IQ2_XXS cannot be encoded without importances"):
        encode(weight, Kind.IQ2_XXS)
    with pytest.raises(ValueError, match="rows of 96 do not divide into Q4_K's blocks of 256"):
        encode(weight[:, :96], Kind.Q4_K)
    for wrong in (importance[:-1], -importance, np.full(N, np.nan, dtype=np.float32)):
        with pytest.raises(ValueError, match="512 finite numbers"):
            encode(weight, Kind.Q4_K, wrong)
    with pytest.raises(ValueError, match="145 bytes are not whole Q4_K blocks of 144"):
        decode(np.zeros((1, 145), dtype=np.uint8), Kind.Q4_K)


def test_without_the_library_it_says_what_to_install(
    weight: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert available()
    ggml_encode._library.cache_clear()
    monkeypatch.setattr(ggml_encode, "find_spec", lambda name: None)
    assert not available()
    with pytest.raises(InputError, match=r'pip install "a3q\[verify\]"'):
        encode(weight, Kind.Q4_K)
    monkeypatch.setattr(ggml_encode, "find_spec", util.find_spec)
    assert available()
