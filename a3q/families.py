"""The one table of architectures: which weights a family has, what they are called in each format, and their shapes.

Readers find tensors by it, the writers name and check them by it, and the stages speak only of roles. Roles that share
one name in a format are parts of one stored tensor, its rows in the order of the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from a3q.errors import InputError
from a3q.model import LayerShape, ModelConfig

Dim = Literal[
    "hidden", "vocab", "positions", "intermediate", "queries", "keys", "values", "attended", "query_norm", "key_norm"
]
RopeLayout = Literal["half", "interleaved"]
Component = Literal["QK", "OV", "MLP"]


@dataclass(frozen=True)
class Role:
    """One weight: its role, its names (with `{i}` for the layer) and its shape in symbols, Hugging Face order."""

    name: str
    hf: str
    gguf: str
    shape: tuple[Dim, ...]
    required: bool = True
    rotary: Literal["queries", "keys"] | None = None
    """Rows are laid out per head for RoPE, so the format's layout matters."""

    def expected_shape(self, config: ModelConfig, layer: LayerShape) -> tuple[int, ...]:
        """Shape of this weight under `config`, in a layer of shape `layer`."""
        queries = config.num_attention_heads * layer.qk_head_dim
        keys = config.num_key_value_heads * layer.qk_head_dim
        one_norm = config.qk_norm == "head"
        sizes: Mapping[Dim, int] = {
            "hidden": config.hidden_size,
            "vocab": config.vocab_size,
            "positions": config.max_position_embeddings,
            "intermediate": layer.intermediate_size,
            "queries": queries,
            "keys": keys,
            "values": config.num_key_value_heads * layer.v_head_dim,
            "attended": config.num_attention_heads * layer.v_head_dim,
            "query_norm": layer.qk_head_dim if one_norm else queries,
            "key_norm": layer.qk_head_dim if one_norm else keys,
        }
        return tuple(sizes[dim] for dim in self.shape)


@dataclass(frozen=True)
class GGUFForm:
    """How stock llama.cpp holds a family."""

    reads: tuple[str, ...]
    """Values of `general.architecture` that are read as this family."""
    writes: str
    """Architecture of what a3q writes."""
    written_rope: RopeLayout
    """Order of the rows of q and k in what a3q writes."""
    reduces: frozenset[Component]
    """Components whose size the runtime's graph lets a file choose."""
    mixed: str | None = None
    """Architecture with the same graph that reads one `feed_forward_length` for each layer; None: there is none."""
    reads_rope: RopeLayout = "half"
    """Order of the rows of q and k in the family's own files, the first of `reads`."""


@dataclass(frozen=True)
class Family:
    """An architecture as a3q understands it."""

    name: str
    hf_model_types: tuple[str, ...]
    layer: tuple[Role, ...]
    top: tuple[Role, ...]
    gguf: GGUFForm | None
    """None: stock llama.cpp has no such architecture."""
    hf_transposed: bool = False
    """Matrices of the layers are stored `[in_features, out_features]` in Hugging Face files."""
    hf_heads_together: bool = False
    """A stored tensor of q, k and v has their rows head by head, each head's three in turn."""
    hf_norm_offset: float = 0.0
    """What the model adds to the weights of its norms."""
    hf_position_offset: int = 0
    """Rows in front of the first position's embedding."""

    @property
    def fused(self) -> frozenset[str]:
        """Roles whose weights are one tensor, hence one matrix product, with others."""
        names = [role.hf for role in self.layer]
        return frozenset(role.name for role in self.layer if names.count(role.hf) > 1)


def _attention(
    prefix: str, names: tuple[str, str, str, str], *, biases: bool = True, required: bool = False, o_bias: bool = False
) -> tuple[Role, ...]:
    """Projections q, k, v, o called `names` after `prefix`, in GGUF's usual names, with biases that may be there."""
    q, k, v, o = (prefix + name for name in names)
    gguf_q, gguf_k, gguf_v = (f"blk.{{i}}.attn_{part}" for part in "qkv")
    if q == k:
        gguf_q = gguf_k = gguf_v = "blk.{i}.attn_qkv"
    gguf_o = "blk.{i}.attn_output"
    weights = (
        Role("q", f"{q}.weight", f"{gguf_q}.weight", ("queries", "hidden"), rotary="queries"),
        Role("k", f"{k}.weight", f"{gguf_k}.weight", ("keys", "hidden"), rotary="keys"),
        Role("v", f"{v}.weight", f"{gguf_v}.weight", ("values", "hidden")),
        Role("o", f"{o}.weight", f"{gguf_o}.weight", ("hidden", "attended")),
    )
    if not biases:
        return weights
    return (
        *weights,
        Role("q_bias", f"{q}.bias", f"{gguf_q}.bias", ("queries",), required, "queries"),
        Role("k_bias", f"{k}.bias", f"{gguf_k}.bias", ("keys",), required, "keys"),
        Role("v_bias", f"{v}.bias", f"{gguf_v}.bias", ("values",), required),
        Role("o_bias", f"{o}.bias", f"{gguf_o}.bias", ("hidden",), o_bias),
    )


def _gated_mlp(prefix: str, *, biases: bool = True, fused: bool = False) -> tuple[Role, ...]:
    gate, up = ("gate_up_proj", "gate_up_proj") if fused else ("gate_proj", "up_proj")
    weights = (
        Role("gate", f"{prefix}{gate}.weight", "blk.{i}.ffn_gate.weight", ("intermediate", "hidden")),
        Role("up", f"{prefix}{up}.weight", "blk.{i}.ffn_up.weight", ("intermediate", "hidden")),
        Role("down", f"{prefix}down_proj.weight", "blk.{i}.ffn_down.weight", ("hidden", "intermediate")),
    )
    if not biases:
        return weights
    return (
        *weights,
        Role("gate_bias", f"{prefix}gate_proj.bias", "blk.{i}.ffn_gate.bias", ("intermediate",), False),
        Role("up_bias", f"{prefix}up_proj.bias", "blk.{i}.ffn_up.bias", ("intermediate",), False),
        Role("down_bias", f"{prefix}down_proj.bias", "blk.{i}.ffn_down.bias", ("hidden",), False),
    )


def _plain_mlp(up: str, down: str, *, biases: bool = True, required: bool = True) -> tuple[Role, ...]:
    """An MLP without a gate."""
    weights = (
        Role("up", f"{up}.weight", "blk.{i}.ffn_up.weight", ("intermediate", "hidden")),
        Role("down", f"{down}.weight", "blk.{i}.ffn_down.weight", ("hidden", "intermediate")),
    )
    if not biases:
        return weights
    return (
        *weights,
        Role("up_bias", f"{up}.bias", "blk.{i}.ffn_up.bias", ("intermediate",), required),
        Role("down_bias", f"{down}.bias", "blk.{i}.ffn_down.bias", ("hidden",), required),
    )


def _norm(role: str, hf: str, gguf: str, *, bias: bool = False, required: bool = True) -> tuple[Role, ...]:
    weight = Role(role, f"{hf}.weight", f"{gguf}.weight", ("hidden",))
    return (weight, Role(f"{role}_bias", f"{hf}.bias", f"{gguf}.bias", ("hidden",), required)) if bias else (weight,)


def _qk_norm(prefix: str) -> tuple[Role, ...]:
    return (
        Role("q_norm", f"{prefix}q_norm.weight", "blk.{i}.attn_q_norm.weight", ("query_norm",), rotary="queries"),
        Role("k_norm", f"{prefix}k_norm.weight", "blk.{i}.attn_k_norm.weight", ("key_norm",), rotary="keys"),
    )


def _ends(
    embed: str, final_norm: str, output: str = "lm_head", *, norm_bias: bool = False, bias_required: bool = True
) -> tuple[Role, ...]:
    """Embedding, final norm and output."""
    return (
        Role("embed", f"{embed}.weight", "token_embd.weight", ("vocab", "hidden")),
        *_norm("final_norm", final_norm, "output_norm", bias=norm_bias, required=bias_required),
        Role("output", f"{output}.weight", "output.weight", ("vocab", "hidden"), required=False),
    )


def _positions(name: str) -> tuple[Role, ...]:
    return (Role("positions", f"{name}.weight", "position_embd.weight", ("positions", "hidden")),)


_LAYER = "model.layers.{i}."
_ATTN, _MLP = _LAYER + "self_attn.", _LAYER + "mlp."
_QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
_TOP = _ends("model.embed_tokens", "model.norm")
_PRE_NORMS = (
    *_norm("attn_norm", _LAYER + "input_layernorm", "blk.{i}.attn_norm"),
    *_norm("mlp_norm", _LAYER + "post_attention_layernorm", "blk.{i}.ffn_norm"),
)
_POST_NORMS = (
    *_norm("attn_post_norm", _LAYER + "post_attention_layernorm", "blk.{i}.post_attention_norm"),
    *_norm("mlp_post_norm", _LAYER + "post_feedforward_layernorm", "blk.{i}.post_ffw_norm"),
)

_ALL: frozenset[Component] = frozenset(("QK", "OV", "MLP"))
_ONLY_MLP: frozenset[Component] = frozenset(("MLP",))

_GPT2, _NEOX = "transformer.h.{i}.", "gpt_neox.layers.{i}."
_OPT, _MPT = "model.decoder.layers.{i}.", "transformer.blocks.{i}."

FAMILIES: tuple[Family, ...] = (
    Family(
        "llama",
        ("llama", "mistral"),
        (*_PRE_NORMS, *_attention(_ATTN, _QKVO), *_gated_mlp(_MLP)),
        _TOP,
        GGUFForm(("llama", "deci"), "llama", "interleaved", _ALL, "deci", reads_rope="interleaved"),
    ),
    Family(
        "qwen2",
        ("qwen2",),
        (*_PRE_NORMS, *_attention(_ATTN, _QKVO, required=True), *_gated_mlp(_MLP)),
        _TOP,
        # The runtime's own graph takes neither narrower queries nor frequency factors; llama's takes biases.
        GGUFForm(("qwen2",), "llama", "interleaved", _ALL, "deci"),
    ),
    Family(
        "phi3",
        ("phi3",),
        (
            *_PRE_NORMS,
            *_attention(_ATTN, ("qkv_proj", "qkv_proj", "qkv_proj", "o_proj"), biases=False),
            *_gated_mlp(_MLP, biases=False, fused=True),
        ),
        _TOP,
        # Taken apart, the fused weights are llama's.
        GGUFForm((), "llama", "interleaved", _ALL, "deci"),
    ),
    Family(
        "qwen3",
        ("qwen3",),
        (*_PRE_NORMS, *_attention(_ATTN, _QKVO), *_qk_norm(_ATTN), *_gated_mlp(_MLP, biases=False)),
        _TOP,
        GGUFForm(("qwen3",), "qwen3", "half", _ONLY_MLP),
    ),
    Family(
        "gemma3",
        ("gemma3_text",),
        (
            *_norm("attn_norm", _LAYER + "input_layernorm", "blk.{i}.attn_norm"),
            *_norm("mlp_norm", _LAYER + "pre_feedforward_layernorm", "blk.{i}.ffn_norm"),
            *_POST_NORMS,
            *_attention(_ATTN, _QKVO, biases=False),
            *_qk_norm(_ATTN),
            *_gated_mlp(_MLP, biases=False),
        ),
        _TOP,
        GGUFForm(("gemma3",), "gemma3", "half", _ONLY_MLP),
        hf_norm_offset=1.0,
    ),
    Family(
        "olmo2",
        ("olmo2",),
        (*_POST_NORMS, *_attention(_ATTN, _QKVO, biases=False), *_qk_norm(_ATTN), *_gated_mlp(_MLP, biases=False)),
        _TOP,
        GGUFForm(("olmo2",), "olmo2", "half", _ONLY_MLP),
    ),
    Family(
        "gpt_neox",
        ("gpt_neox",),
        (
            *_norm("attn_norm", _NEOX + "input_layernorm", "blk.{i}.attn_norm", bias=True),
            *_norm("mlp_norm", _NEOX + "post_attention_layernorm", "blk.{i}.ffn_norm", bias=True),
            *_attention(_NEOX + "attention.", ("query_key_value",) * 3 + ("dense",)),
            *_plain_mlp(_NEOX + "mlp.dense_h_to_4h", _NEOX + "mlp.dense_4h_to_h"),
        ),
        _ends("gpt_neox.embed_in", "gpt_neox.final_layer_norm", "embed_out", norm_bias=True),
        GGUFForm(("gptneox",), "gptneox", "half", _ONLY_MLP),
        hf_heads_together=True,
    ),
    Family(
        "gpt2",
        ("gpt2",),
        (
            *_norm("attn_norm", _GPT2 + "ln_1", "blk.{i}.attn_norm", bias=True),
            *_norm("mlp_norm", _GPT2 + "ln_2", "blk.{i}.ffn_norm", bias=True),
            *_attention(_GPT2 + "attn.", ("c_attn",) * 3 + ("c_proj",), required=True, o_bias=True),
            *_plain_mlp(_GPT2 + "mlp.c_fc", _GPT2 + "mlp.c_proj"),
        ),
        (*_ends("transformer.wte", "transformer.ln_f", norm_bias=True), *_positions("transformer.wpe")),
        GGUFForm(("gpt2",), "gpt2", "half", _ONLY_MLP),
        hf_transposed=True,
    ),
    Family(
        "opt",
        ("opt",),
        (
            *_norm("attn_norm", _OPT + "self_attn_layer_norm", "", bias=True),
            *_norm("mlp_norm", _OPT + "final_layer_norm", "", bias=True),
            *_attention(_OPT + "self_attn.", ("q_proj", "k_proj", "v_proj", "out_proj")),
            *_plain_mlp(_OPT + "fc1", _OPT + "fc2", required=False),
        ),
        (
            *_ends("model.decoder.embed_tokens", "model.decoder.final_layer_norm", norm_bias=True),
            *_positions("model.decoder.embed_positions"),
        ),
        None,
        hf_position_offset=2,
    ),
    Family(
        "mpt",
        ("mpt",),
        (
            *_norm("attn_norm", _MPT + "norm_1", "blk.{i}.attn_norm", bias=True, required=False),
            *_norm("mlp_norm", _MPT + "norm_2", "blk.{i}.ffn_norm", bias=True, required=False),
            *_attention(_MPT + "attn.", ("Wqkv", "Wqkv", "Wqkv", "out_proj"), biases=False),
            *_plain_mlp(_MPT + "ffn.up_proj", _MPT + "ffn.down_proj", biases=False),
        ),
        _ends("transformer.wte", "transformer.norm_f", norm_bias=True, bias_required=False),
        GGUFForm(("mpt",), "mpt", "half", _ONLY_MLP),
    ),
)

COMPONENTS: Mapping[Component, tuple[str, ...]] = {
    "QK": ("q", "k", "q_bias", "k_bias", "q_norm", "k_norm"),
    "OV": ("v", "o", "v_bias"),
    "MLP": ("gate", "up", "down", "gate_bias", "up_bias"),
}
"""Weights whose inner dimension each A3 component reduces."""


_EXPERTS = ("mixtral", "dbrx", "deepseek_v2", "deepseek_v3", "gpt_oss", "llama4", "llama4_text", "qwen3_next")
"""Model types of Hugging Face that are mixtures of experts, though `moe` is not in their name."""


def _known(kind: str, names: list[str]) -> str:
    return f"a3q knows these {kind}: {', '.join(sorted(names))}"


def family_named(name: str) -> Family | None:
    """The family called `name` in this table."""
    return next((family for family in FAMILIES if family.name == name), None)


def family_for_hf(model_type: str | None, origin: object) -> Family:
    """The family of a Hugging Face `model_type`; InputError names those that work."""
    for family in FAMILIES:
        if model_type in family.hf_model_types:
            return family
    if model_type in _EXPERTS or "moe" in str(model_type):
        raise InputError(
            f"{origin}: model_type {model_type!r} is a mixture of experts, which is not supported; take a dense model"
        )
    if model_type == "gemma3":
        raise InputError(
            f"{origin}: model_type 'gemma3' reads images too and is not supported; take its text model (gemma3_text)"
        )
    known = _known("model types", [name for family in FAMILIES for name in family.hf_model_types])
    raise InputError(f"{origin}: model_type {model_type!r} is not supported; {known}")


def family_for_gguf(architecture: str | None, origin: object) -> Family:
    """The family of a GGUF `general.architecture`; InputError names those that work."""
    forms = [(family, family.gguf) for family in FAMILIES if family.gguf is not None]
    for family, form in forms:
        if architecture in form.reads:
            return family
    known = _known("architectures", [name for _, form in forms for name in form.reads])
    raise InputError(f"{origin}: architecture {architecture!r} is not supported; {known}")
