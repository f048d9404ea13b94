"""What a run did, as plain data: what `OUT.report.json` holds and the report's page is made of.

Sizes are in bytes, losses are shares of 1, KL divergences are in nats, times are in seconds; `before` is the model that
was read, `after` the written one. What is not known or not a finite number is null. Files stand by name only, so that a
report that is passed on tells nothing about the machine's folders.
"""

from __future__ import annotations

import hashlib
import math
import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from a3q import __version__, runtime
from a3q.dimensions import Plan
from a3q.families import COMPONENTS
from a3q.footprint import CACHE_TYPES, Speedup, cache_bytes, can_quantize_cache
from a3q.model import LayerShape, ModelConfig, pick_device
from a3q.report_healing import distances, healing_facts
from a3q.result import Result, Rounding
from a3q.verify import Quality
from converters.gguf_writer import WrittenFile

SCHEMA = 1
"""Raised when a key changes its meaning or goes."""
SIZES = {"QK": "qk_head_dim", "OV": "v_head_dim", "MLP": "intermediate_size"}
"""What the size of each component is called."""
_SHORTEST_CONTEXT = 512

Facts = dict[str, Any]


def facts(result: Result) -> Facts:
    """Everything about `result` in values that JSON has."""
    original, reduced = result.original, result.reduced
    name = original.metadata.get("general.name")
    found = {
        "schema": SCHEMA,
        "model": {
            "name": original.source.path.stem if name is None else str(name.value),
            "family": original.family.name,
            "layers": original.config.num_hidden_layers,
            "hidden_size": original.config.hidden_size,
            "heads": original.config.num_attention_heads,
            "kv_heads": original.config.num_key_value_heads,
            "vocab_size": original.config.vocab_size,
            "context_tokens": original.config.max_position_embeddings,
            "parameters": _pair(original.parameters(), reduced.parameters()),
            "kv_bytes_per_token_f16": _pair(original.config.kv_bytes_per_token(), reduced.config.kv_bytes_per_token()),
        },
        "source": _source(result),
        "output": _output(result),
        "plan": _plan(result),
        "footprint": _footprint(result),
        "layers": _layers(result),
        "rope": _rope(original.config, reduced.config),
        "cache": _cache(original.config, reduced.config, isinstance(result.written, WrittenFile)),
        "healing": healing_facts(result),
        "quantization": None if result.rounding is None else _quantization(result, result.rounding),
        "quality": _quality(result),
        "seconds": dict(result.seconds),
        "notes": list(result.notes),
        "calibration": _calibration(result),
        "made_by": _made_by(result),
    }
    cleaned = _clean(found)
    assert isinstance(cleaned, dict)
    return cleaned


def _pair(before: Any, after: Any) -> Facts:
    return {"before": before, "after": after}


def _clean(value: Any) -> Any:
    """`value` with only what JSON has: no number that is not finite, no tuple, no set."""
    if isinstance(value, Mapping):
        return {str(key): _clean(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(one) for one in value]
    if isinstance(value, (set, frozenset)):
        return sorted(_clean(one) for one in value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def _source(result: Result) -> Facts:
    source = result.original.source
    return {
        "name": source.path.name,
        "format": source.format,
        "bytes": source.file_size,
        "weights_by_type": dict(source.tensor_types),
        "files": [
            {"name": path.name, "sha256": digest}
            for path, digest in zip(source.weight_files, result.job.digests, strict=True)
        ],
    }


def _output(result: Result) -> Facts:
    written = result.written
    if isinstance(written, WrittenFile):
        files = [_file(path, digest) for path, digest in zip(written.files, written.sha256, strict=True)]
        by_type: Mapping[str, int] | None = written.tensor_types
    else:
        files = [_file(path, _sha256(path)) for path in written.weight_files]
        by_type = None
    return {
        "name": result.path.name,
        "format": "gguf" if isinstance(written, WrittenFile) else "huggingface",
        "type": result.type_name,
        "bytes": written.size,
        "weights_by_type": by_type,
        "files": files,
    }


def _file(path: Path, digest: str) -> Facts:
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": digest}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _plan(result: Result) -> Facts:
    plan, request = result.job.plan, result.job.plan.request
    groups = {member: (ratio, members) for members, ratio in request.groups() for member in members}
    return {
        "asked": plan.asked,
        "achieved": plan.achieved,
        "method": result.job.method.name,
        "frequencies": result.job.method.frequencies,
        "ranks": None if result.settings is None else ("mixed" if result.settings.mixed() else "uniform"),
        "components": {
            component: {
                "asked": groups[component][0] if component in groups else 0.0,
                # Components that share a budget lose so much together, and each what it can best spare.
                "together_with": sorted(groups[component][1] - {component}) if component in groups else [],
                "achieved": plan.per_component[component],
            }
            for component in COMPONENTS
        },
        "predicted_kl": plan.predicted_kl,
        "tried": [
            {"sizes": _range_of_sizes(option), "kl": kl, "chosen": option == plan} for option, kl in result.job.tried
        ],
    }


def _range_of_sizes(plan: Plan) -> Facts:
    """The least and the greatest of each size."""
    values = {key: [getattr(one, key) for one in plan.dimensions] for key in ("qk_head_dim", "v_head_dim")}
    values["intermediate_size"] = [one.intermediate_size for one in plan.dimensions]
    return {key: [min(found), max(found)] for key, found in values.items()}


def _footprint(result: Result) -> Facts | None:
    """What running it takes, see `a3q.footprint.Footprint`, and how much faster that makes it at best; GGUFs only."""
    if not result.footprints:
        return None
    before, after = result.footprints["before"], result.footprints["after"]
    return {
        **_pair(asdict(before), asdict(after)),
        "predicted_speedup": asdict(Speedup.of(before, after)),
    }


def _layers(result: Result) -> list[Facts]:
    """Sizes of each layer, and what its components lost; null: the component was left alone, or nothing healed."""
    before, after = result.original.config.layers, result.reduced.config.layers
    losses = result.job.reduction.losses
    found = []
    for i, (old, new) in enumerate(zip(before, after, strict=True)):
        pairs = {key: _pair(getattr(old, key), getattr(new, key)) for key in SIZES.values()}
        lost = {
            component: getattr(losses[i], component.lower())
            if losses and pairs[key]["after"] < pairs[key]["before"]
            else None
            for component, key in SIZES.items()
        }
        distance = distances(losses[i]) if losses else None
        found.append({"layer": i, **pairs, "energy_lost": lost, "output_distance": distance})
    return found


def _rope(before: ModelConfig, after: ModelConfig) -> list[Facts]:
    """Which of the original's frequencies stay, once for all layers alike; nothing without RoPE.

    `kept` are positions in `radians_per_token`, one list for all heads or one for each key head.
    """
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, (old, new) in enumerate(zip(before.layers, after.layers, strict=True)):
        if old.pairs:
            groups.setdefault((old.frequencies, _kept(old, new)), []).append(i)
    return [
        {
            "layers": layers,
            # One list for each head only where the source's heads have their own.
            "radians_per_token": [list(own) for own in frequencies],
            "kept": [list(own) for own in kept],
        }
        for (frequencies, kept), layers in groups.items()
    ]


def _kept(old: LayerShape, new: LayerShape) -> tuple[tuple[int, ...], ...]:
    lists = old.frequencies if len(old.frequencies) > 1 else old.frequencies * len(new.frequencies)
    # Where the source's heads differ, a reduced layer's are as many.
    return tuple(
        tuple(sorted(own.index(frequency) for frequency in kept))
        for own, kept in zip(lists, new.frequencies, strict=False)
    )


def _cache(before: ModelConfig, after: ModelConfig, in_llama_cpp: bool) -> Facts:
    """Bytes of the KV cache up to the trained context. Only llama.cpp has quantized ones, and only for some sizes."""
    longest = after.max_position_embeddings
    contexts = [1 << n for n in range(64) if _SHORTEST_CONTEXT <= 1 << n < longest] + [longest]
    kinds = CACHE_TYPES if in_llama_cpp and can_quantize_cache(after) else CACHE_TYPES[:1]
    runs = [("original", before, CACHE_TYPES[0]), *(("written", after, kind) for kind in kinds)]
    return {
        "quantizable": can_quantize_cache(after),
        "contexts_tokens": contexts,
        "series": [
            {"model": model, "type": kind, "bytes": [cache_bytes(config, context, kind) for context in contexts]}
            for model, config, kind in runs
        ],
    }


def _quantization(result: Result, rounding: Rounding) -> Facts:
    """How weights were rounded. A folder's tensors stand by their role, and without sizes."""
    tensors: list[Facts] = [
        {
            "name": one.name,
            "layer": one.layer,
            "kind": one.short_name,
            "type": one.type,
            "weights": one.weights,
            "bytes": one.bytes,
            "bits_per_weight": 8 * one.bytes / one.weights,
            "output_energy_lost": one.loss,
        }
        for one in rounding.tensors
    ]
    if not tensors:
        unknown = dict.fromkeys(("type", "weights", "bytes", "bits_per_weight"))
        tensors = [
            {"name": f"layer {i}: {role}", "layer": i, "kind": role, **unknown, "output_energy_lost": loss}
            for i, layer in enumerate(result.job.reduction.rounding_losses)
            for role, loss in layer.items()
        ]
    return {
        "quantizer": rounding.quantizer,
        "bits_per_weight": rounding.bits_per_weight,
        "mean_output_energy_lost_by_role": dict(rounding.losses),
        "matrices_by_role_and_type": {role: dict(types) for role, types in rounding.types.items()},
        "tensors": tensors,
    }


def _quality(result: Result) -> Facts | None:
    check = result.verification
    if check is None:
        return None

    def of(quality: Quality) -> Facts:
        measured = quality.perplexity
        return {"perplexity": measured.value, "perplexity_stderr": measured.stderr, "kl_to_original": quality.kl}

    return {
        "original": of(check.original),
        "in_memory": of(check.reduced),
        "written": of(check.written),
        "kl_of_written_to_in_memory": check.kl_to_reduced,
        "scored_tokens": check.scored_tokens,
        "runtime": check.runtime,
    }


def _calibration(result: Result) -> Facts | None:
    calibration = result.job.calibration
    if calibration is None:
        return None
    return {
        "source": calibration.source,
        "description": calibration.description,
        "sequences": calibration.tokens.shape[0],
        "tokens": calibration.tokens.numel(),
        "held_out_tokens": calibration.held_out.numel(),
        "seed": None if result.settings is None else result.settings.seed,
    }


def _made_by(result: Result) -> Facts:
    return {
        "a3q": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "llama_cpp": runtime.version() if runtime.available() else None,
        "device": None if result.settings is None else _device(result.settings.device),
        "platform": platform.platform(),
    }


def _device(asked: str) -> str:
    """What did the work, by name where it has one."""
    device = pick_device(asked)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
