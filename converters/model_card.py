"""README.md of a written folder: what it is, what it was made from, how to load it, under which license."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from a3q.model import Model

_REPOSITORY_KEYS = ("general.source.huggingface.repository", "general.source.repo_url", "general.repo_url")
_REPOSITORY = re.compile(r"(?:https?://huggingface\.co/)?([\w.-]+/[\w.-]+)/?")
_GPTQ = """
Needs `pip install gptqmodel optimum`. GPTQModel reads the same checkpoints as auto-gptq, which is unmaintained and no
longer works with current transformers.
"""
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)")


def model_card(
    model: Model, name: str, reduction: Mapping[str, Any] | None, plain: bool = False, gptq: bool = False
) -> str:
    """The file's text. `plain`: of the family's own model type; `gptq`: matrices are quantized."""
    base, metadata = _repository(model), model.metadata
    head: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["a3q"]}
    if base is not None:
        head["base_model"] = base
    for key, gguf_key in (
        ("license", "general.license"),
        ("license_name", "general.license.name"),
        ("license_link", "general.license.link"),
        ("language", "general.languages"),
    ):
        if gguf_key in metadata:
            head[key] = metadata[gguf_key].value
    # JSON is YAML.
    front = "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items())
    title = metadata["general.name"].value if "general.name" in metadata else model.source.path.name
    origin = f"[{base}](https://huggingface.co/{base})" if base is not None else f"`{title}`"
    details = "".join(f"- {key}: `{json.dumps(value)}`\n" for key, value in (reduction or {}).items())
    made = [
        *(["made smaller with [A3](https://arxiv.org/abs/2505.12942)"] if (reduction or {}).get("ratio") else []),
        *(["quantized with [GPTQ](https://arxiv.org/abs/2210.17323)"] if gptq else []),
    ]
    how = f"{' and '.join(made) or 'written'} by a3q"
    knows = "" if plain else "import a3q  # makes transformers know the model\n"
    license_line = f"\nThe license of the original holds: {head['license']}.\n" if "license" in head else ""
    return f"""---
{front}
---
# {name}

{origin}, {how}: {model.parameters():,} parameters.

{details}{_GPTQ if gptq else ""}
```python
{knows}from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/{name}", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("path/to/{name}")
```
{license_line}"""


def _repository(model: Model) -> str | None:
    """Name on the Hugging Face Hub of the model that was read, where it is known."""
    if cached := _CACHED.search(str(model.source.path)):
        return f"{cached[1]}/{cached[2]}"
    for key in _REPOSITORY_KEYS:
        if key in model.metadata and (match := _REPOSITORY.fullmatch(str(model.metadata[key].value))):
            return match[1]
    return None
