"""a3q makes language models smaller with A3 and hands them to stock llama.cpp and Ollama, or to PyTorch.

Importing it makes transformers' Auto classes load the folders that it writes.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from a3q import hf
from a3q.errors import InputError, VerifyError

if TYPE_CHECKING:
    from a3q.result import Result
    from a3q.sweep_results import Sweep
    from a3q.sweeps import sweep
    from a3q.to_folder import reduce_to_folder
    from a3q.to_gguf import convert

__version__ = "0.1.0"
__all__ = ["InputError", "Result", "Sweep", "VerifyError", "convert", "reduce_to_folder", "sweep"]

hf.register()


_LAZY = {
    "Result": "a3q.result",
    "Sweep": "a3q.sweep_results",
    "convert": "a3q.to_gguf",
    "reduce_to_folder": "a3q.to_folder",
    "sweep": "a3q.sweeps",
}


def __getattr__(name: str) -> Any:
    # The pipeline imports `converters`, which imports modules of this package: loaded here, neither could come first.
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
