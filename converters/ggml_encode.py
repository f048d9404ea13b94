"""ggml's own encoders and decoders, from the library inside llama-cpp-python.

The package is optional, and its Python modules are not imported: loading them takes much longer than this one library.
"""

from __future__ import annotations

import ctypes
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from a3q.errors import InputError
from a3q.runtime import usable_cores

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

ENCODED = tuple(
    GGMLQuantizationType[name]
    for name in (
        *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"),
        *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"),
    )
)
"""Types that `encode` takes. ggml ends the process when it is asked for one that it cannot encode."""

# Where all weights that share a scale have importance 0, ggml scales them to nothing: they come back as 0, and as NaN
# from releases before March 2026. A weight that the calibration never used may well be used later. The share is small
# since a single column with large activations can make the mean hundreds of times the median.
_LEAST_SHARE = 1e-6
_CHUNKS_PER_WORKER = 4


def available() -> bool:
    """Whether ggml's library is here and can be loaded."""
    try:
        _library()
    except InputError:
        return False
    return True


def encode(weight: Floats, kind: GGMLQuantizationType, importance: Floats | None = None) -> Bytes:
    """Rows `[rows, n]` of finite weights as a GGUF file of type `kind` holds them, uint8 `[rows, bytes]`.

    `importance` `[n]`: by how much the squared error of each column counts, as in llama.cpp's imatrix; Q8_0 ignores it.
    InputError without llama-cpp-python; ValueError for a type that is not in `ENCODED` or needs importances and has
    none, for rows that do not divide into blocks, and for importances that are negative or not finite.
    """
    if kind not in ENCODED:
        raise ValueError(f"ggml does not encode {kind.name}")
    library = _library()
    if importance is None and library.ggml_quantize_requires_imatrix(int(kind)):
        raise ValueError(f"{kind.name} cannot be encoded without importances")
    rows, n = weight.shape
    block, size = (int(number) for number in GGML_QUANT_SIZES[kind])
    if n % block:
        raise ValueError(f"rows of {n} do not divide into {kind.name}'s blocks of {block}")
    weight = np.ascontiguousarray(weight, dtype=np.float32)
    columns = None if importance is None else _guarded(importance, n)
    data = np.empty((rows, n // block * size), dtype=np.uint8)
    workers = usable_cores()
    step = -(-rows // (workers * _CHUNKS_PER_WORKER)) or 1

    def run(first: int) -> None:
        library.ggml_quantize_chunk(
            int(kind),
            weight.ctypes.data,
            data.ctypes.data,
            first * n,
            min(step, rows - first),
            n,
            None if columns is None else columns.ctypes.data,
        )

    with ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(run, range(0, rows, step)):
            pass
    return data


def decode(data: Bytes, kind: GGMLQuantizationType) -> Floats:
    """Weights `[rows, n]` of the bytes `[rows, bytes]` of a quantized type.

    InputError without llama-cpp-python; ValueError when the rows are not whole blocks.
    """
    rows, width = data.shape
    block, size = (int(number) for number in GGML_QUANT_SIZES[kind])
    if width % size:
        raise ValueError(f"rows of {width} bytes are not whole {kind.name} blocks of {size}")
    # These functions and not the pointers in `ggml_type_traits`: that structure differs between releases.
    name = f"dequantize_row_{kind.name.lower().replace('_k', '_K')}"
    function = getattr(_library(), name)
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64), None
    data = np.ascontiguousarray(data)
    weight = np.empty((rows, width // size * block), dtype=np.float32)
    function(data.ctypes.data, weight.ctypes.data, weight.size)
    return weight


def _guarded(importance: Floats, n: int) -> Floats:
    """Importances `[n]` as ggml can bear them: none of them 0, and near 1."""
    if importance.shape != (n,) or not np.isfinite(importance).all() or (importance < 0).any():
        raise ValueError(f"importances must be {n} finite numbers of at least 0")
    mean = float(importance.mean(dtype=np.float64))
    if mean == 0:
        return np.ones(n, dtype=np.float32)
    # ggml compares products of three importances, which soon leave float32's range. Scaling by a power of two rounds
    # nothing, and so changes nothing else.
    floored = np.maximum(importance.astype(np.float64), mean * _LEAST_SHARE)
    scaled: Floats = np.ldexp(floored, -np.frexp(mean)[1]).astype(np.float32)
    return scaled


@cache
def _library() -> ctypes.CDLL:
    """ggml's base library with the functions' types set; InputError where it is missing or does not load."""
    try:
        library = ctypes.CDLL(str(_path()))
    except OSError as error:
        raise InputError(f'llama.cpp is not installed here ({error}); run: pip install "a3q[verify]"') from error
    number, pointer, count = ctypes.c_int, ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.argtypes = (number, pointer, pointer, count, count, count, pointer)
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_requires_imatrix.argtypes = (number,)
    library.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    return library


def _path() -> Path:
    """Where the library lies; OSError when it does not."""
    spec = find_spec("llama_cpp")
    folders = [] if spec is None else [Path(place) / "lib" for place in spec.submodule_search_locations or ()]
    suffix = {"win32": "dll", "darwin": "dylib"}.get(sys.platform, "so")
    for folder in folders:
        for name in (f"libggml-base.{suffix}", f"ggml-base.{suffix}"):
            if (folder / name).is_file():
                return folder / name
    raise OSError("no ggml-base library")
