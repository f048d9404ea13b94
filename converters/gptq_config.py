"""`quantization_config` of config.json for GPTQ: what a3q reads of it, and what it writes for other loaders."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from a3q import __version__
from a3q.errors import InputError
from converters.gptq import BITS, Form

_FORMATS = ("gptq", "gptq_v2")


def read_form(raw: Mapping[str, Any], path: Path) -> Form | None:
    """How a config.json says that matrices are stored, None for plain ones; InputError for what a3q cannot read."""
    described = raw.get("quantization_config")
    if not described:
        return None
    config = described if isinstance(described, Mapping) else {"quant_method": described}
    method = config.get("quant_method", config.get("method"))
    if str(method).lower() != "gptq":
        raise InputError(
            f"{path}: the model is already quantized ({method}), and of quantized folders a3q reads gptq only; "
            "take the unquantized original"
        )
    bits, group_size = config.get("bits"), config.get("group_size", 128)
    if not _whole(bits) or bits not in BITS:
        raise InputError(f"{path}: gptq: bits must be {_either(BITS)}, found {bits!r}")
    if not _whole(group_size) or (group_size < 1 and group_size != -1):
        raise InputError(f"{path}: gptq: group_size must be positive or -1, found {group_size!r}")
    # Older files have one of the two names, newer ones both.
    layout = config.get("checkpoint_format") or config.get("format") or "gptq"
    if layout not in _FORMATS:
        raise InputError(f"{path}: gptq: checkpoint_format must be {_either(_FORMATS)}, found {layout!r}")
    if (words := config.get("pack_dtype") or "int32") != "int32":
        raise InputError(f"{path}: gptq: pack_dtype must be int32, found {words!r}")
    return Form(bits, group_size, layout == "gptq_v2")


def describe(
    form: Form,
    *,
    symmetric: bool,
    plain: Collection[str] = (),
    quantized: Collection[str] = (),
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The content for a folder in whose layers the modules `quantized` are stored so and `plain` are not.

    `settings` are further entries, like `damp_percent`.
    """
    layout = _FORMATS[form.v2]
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "bits": form.bits,
        "group_size": form.group_size,
        "desc_act": False,
        "sym": symmetric,
        "lm_head": False,
        # GPTQModel knows both names, transformers and vLLM one each.
        "checkpoint_format": layout,
        "format": layout,
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"a3q:{__version__}"]},
        **(settings or {}),
    }
    if plain:
        # For transformers, then for GPTQModel and vLLM.
        config["modules_in_block_to_quantize"] = [sorted(quantized)]
        config["dynamic"] = {f"-:^(?:{'|'.join(map(re.escape, sorted(plain)))})$": {}}
    return config


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _either(values: Collection[object]) -> str:
    return " or ".join(map(str, values))
