"""a3q makes language models smaller with A3 and hands them to stock llama.cpp and Ollama as GGUF."""

__version__ = "0.1.0"

from a3q.convert import ConvertResult, convert
from a3q.errors import InputError, VerifyError

__all__ = ["ConvertResult", "InputError", "VerifyError", "convert"]
