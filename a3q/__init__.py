"""a3q makes language models smaller with A3 and hands them to stock llama.cpp and Ollama as GGUF."""

from typing import TYPE_CHECKING, Any

from a3q.errors import InputError, VerifyError

if TYPE_CHECKING:
    from a3q.pipeline import ConvertResult, convert

__version__ = "0.1.0"
__all__ = ["ConvertResult", "InputError", "VerifyError", "convert"]


def __getattr__(name: str) -> Any:
    # The pipeline imports `converters`, which imports modules of this package: loaded here, neither could come first.
    if name in ("ConvertResult", "convert"):
        from a3q import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
