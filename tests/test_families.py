"""Every family against transformers: logits, cached decoding, older files and configs, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from a3q.errors import InputError
from a3q.families import family_for_hf
from a3q.forward import Attend, KeyValueCache, block, embed, hidden_states, norm, only_causal, output_logits
from a3q.model import Model
from converters.hf_config import config_from_hf
from converters.hf_reader import open_huggingface, read_config
from tests.pico import KINDS, VOCAB, Kind, write_model

CPU = torch.device("cpu")
LENGTH = 48
LINEAR = {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0}

VARIANTS: dict[str, dict[str, Any]] = {kind: {"kind": kind} for kind in KINDS} | {
    "mistral-window": {"kind": "mistral", "sliding_window": 12},
    "qwen2-window": {"kind": "qwen2", "use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1},
    "qwen3-window": {
        "kind": "qwen3",
        "bias": True,
        "use_sliding_window": True,
        "sliding_window": 7,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi3-window": {"kind": "phi3", "sliding_window": 12},
    "phi3-partial": {"kind": "phi3", "rope": {"rope_type": "default", "partial_rotary_factor": 0.75}},
    "llama-gelu": {"kind": "llama", "hidden_act": "gelu"},
    "gemma3-linear": {"kind": "gemma3", "rope_parameters": {"full_attention": LINEAR}},
    "gemma3-alike": {"kind": "gemma3", "layer_types": ["full_attention"] * 3, "sliding_window": 4096},
    "gpt_neox-sequential": {"kind": "gpt_neox", "use_parallel_residual": False, "rope": LINEAR},
    "gpt_neox-whole": {"kind": "gpt_neox", "rope": {"partial_rotary_factor": 1.0}, "attention_bias": False},
    "gpt2-unscaled": {"kind": "gpt2", "scale_attn_weights": False, "initializer_range": 0.1},
    "gpt2-default-inner": {"kind": "gpt2", "intermediate_size": None, "activation_function": "gelu"},
    "opt-no-bias": {"kind": "opt", "enable_bias": False, "activation_function": "gelu_fast"},
    "mpt-six-heads": {"kind": "mpt", "hidden_size": 96, "num_attention_heads": 6},
    "mpt-scale": {"kind": "mpt", "attn_config": {"softmax_scale": 0.4}},
    **{f"{kind}-tied": {"kind": kind, "tied": True} for kind in KINDS},
}


def tokens(count: int = 2) -> Tensor:
    return torch.randint(VOCAB, (count, LENGTH), generator=torch.Generator().manual_seed(0))


def logits(model: Model, ids: Tensor) -> Tensor:
    return output_logits(model, hidden_states(model, ids, CPU), CPU)


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Kind, Path]:
    root = tmp_path_factory.mktemp("families")
    return {kind: write_model(root / kind, kind) for kind in KINDS}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_logits_equal_those_of_transformers(tmp_path: Path, options: dict[str, Any]) -> None:
    folder = write_model(tmp_path / "m", **options)
    model = open_huggingface(folder)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens()).logits
    assert expected.std() > 0.5
    assert (logits(model, tokens()) - expected).abs().max() < 5e-5
    # OPT has two rows of positions in front that are never used.
    unused = 2 * model.config.hidden_size if options["kind"] == "opt" else 0
    assert sum(model.source.tensor_types.values()) == model.parameters() + unused
    for i, w in enumerate(model.layers):
        assert w.keys() == model.layer_roles
        for role in model.family.layer:
            if role.name in w:
                assert tuple(w[role.name].shape) == role.expected_shape(model.config, model.config.layers[i])


@pytest.mark.parametrize("name", [*KINDS, "mistral-window", "phi3-partial", "mpt-six-heads"])
def test_cached_decoding_equals_the_whole_pass(tmp_path: Path, name: str) -> None:
    """Prompt at once, then token by token through the cache, windows and slopes included."""
    model = open_huggingface(write_model(tmp_path / "m", **VARIANTS[name]))
    ids, config, layers = tokens(3), model.config, list(model.layers)
    caches = [KeyValueCache(config, shape, 3, LENGTH, CPU) for shape in config.layers]
    states = []
    for start, end in [(0, 20), *((i, i + 1) for i in range(20, LENGTH))]:
        x = embed(model, ids[:, start:end], start)
        for shape, w, cache in zip(config.layers, layers, caches, strict=True):
            x = block(config, shape, w, x, cache)
        states.append(norm(config, model.top, "final_norm", x))
    torch.testing.assert_close(torch.cat(states, 1), hidden_states(model, ids, CPU), rtol=1e-4, atol=1e-4)


def up_to(q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
    """What `a3q.decode_triton.attend` does."""
    end = int(position) + 1
    return F.scaled_dot_product_attention(q, k[:, :, :end], v[:, :, :end])


@pytest.mark.parametrize("attend", [None, up_to])
@pytest.mark.parametrize("name", [*KINDS, "mistral-window", "phi3-partial", "mpt-six-heads"])
def test_decoding_at_a_position_in_a_tensor_equals_the_whole_pass(
    tmp_path: Path, name: str, attend: Attend | None
) -> None:
    """As a recorded graph decodes: the same operations for every position, looking at keys that are not there yet."""
    model = open_huggingface(write_model(tmp_path / "m", **VARIANTS[name]))
    ids, config, layers = tokens(3), model.config, list(model.layers)
    if attend is not None and not all(only_causal(config, shape, LENGTH) for shape in config.layers):
        pytest.skip("looks at other keys")
    caches = [KeyValueCache(config, shape, 3, LENGTH, CPU) for shape in config.layers]
    for cache in caches:
        cache.values.fill_(torch.nan)
    position, states = torch.zeros(1, dtype=torch.int64), []
    for i in range(LENGTH):
        if i == 20:
            for cache in caches:
                cache.follow(position.fill_(i), LENGTH, attend)
        start = position if i >= 20 else i
        x = embed(model, ids[:, i : i + 1], start)
        for shape, w, cache in zip(config.layers, layers, caches, strict=True):
            x = block(config, shape, w, x, cache)
        states.append(norm(config, model.top, "final_norm", x))
        position += 1
    torch.testing.assert_close(torch.cat(states, 1), hidden_states(model, ids, CPU), rtol=1e-4, atol=1e-4)


def test_windows(folders: dict[Kind, Path], tmp_path: Path) -> None:
    gemma = open_huggingface(folders["gemma3"]).config
    assert [shape.sliding_window for shape in gemma.layers] == [12, None, 12]
    assert gemma.layers[0].frequencies != gemma.layers[1].frequencies
    assert gemma.rope_theta == 1e6
    qwen = open_huggingface(write_model(tmp_path / "q", **VARIANTS["qwen2-window"])).config
    assert [shape.sliding_window for shape in qwen.layers] == [None, 12]
    changes: dict[Kind, dict[str, Any]] = {
        "mistral": {"sliding_window": 256},
        "phi3": {"sliding_window": 262144},
        "qwen2": {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 0, "layer_types": None},
    }
    for name, change in changes.items():
        raw = json.loads((folders[name] / "config.json").read_text()) | change
        config = config_from_hf(family_for_hf(name, "x"), raw, Path("x"))
        assert config.uniform is not None
        assert config.uniform.sliding_window is None
    raw = json.loads((folders["mistral"] / "config.json").read_text()) | {"max_position_embeddings": 8192}
    del raw["sliding_window"]
    assert config_from_hf(family_for_hf("mistral", "x"), raw, Path("x")).layers[0].sliding_window == 4096


OLD_CONFIGS: dict[Kind, dict[str, Any]] = {
    "gpt_neox": {"rope_parameters": None, "rotary_pct": 0.5, "rotary_emb_base": 10000, "rope_scaling": None},
    "phi3": {"rope_parameters": None, "rope_theta": 10000.0, "partial_rotary_factor": 1.0, "rope_scaling": None},
    "qwen3": {"rope_parameters": None, "rope_theta": 10000, "layer_types": None, "max_window_layers": 28},
    "gpt2": {"tie_word_embeddings": False, "n_ctx": 256},
}


@pytest.mark.parametrize("kind", OLD_CONFIGS)
def test_older_configs_say_the_same(folders: dict[Kind, Path], kind: Kind) -> None:
    raw = json.loads((folders[kind] / "config.json").read_text())
    family = family_for_hf(raw["model_type"], "x")
    old = {key: value for key, value in (raw | OLD_CONFIGS[kind]).items() if value is not None}
    assert config_from_hf(family, old, Path("x")) == config_from_hf(family, raw, Path("x"))


def test_older_gemma(tmp_path: Path) -> None:
    """Pattern, two thetas and a scaling of the global layers only."""
    layers = ["sliding_attention", "sliding_attention", "full_attention"]
    parameters = {"full_attention": LINEAR, "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0}}
    folder = write_model(tmp_path / "m", "gemma3", layer_types=layers, rope_parameters=parameters)
    expected = read_config(folder)[1]
    new = {"layer_types", "rope_parameters", "tie_word_embeddings", "head_dim", "query_pre_attn_scalar"}
    old = {
        "rope_theta": 1000000,
        "rope_local_base_freq": 5000,
        "rope_scaling": {"rope_type": "linear", "factor": 4},
        "sliding_window_pattern": 3,
        "head_dim": 16,
        "tie_word_embeddings": False,
    }
    path = folder / "config.json"
    raw = {key: value for key, value in json.loads(path.read_text()).items() if key not in new}
    path.write_text(json.dumps(raw | old))
    assert read_config(folder)[1] == expected


@pytest.mark.parametrize(("kind", "tied"), [("gpt2", True), ("opt", True), ("mpt", True), ("llama", False)])
def test_absent_tying(folders: dict[Kind, Path], kind: Kind, tied: bool) -> None:
    raw = json.loads((folders[kind] / "config.json").read_text())
    del raw["tie_word_embeddings"]
    assert config_from_hf(family_for_hf(kind, "x"), raw, Path("x")).tie_word_embeddings is tied


BUFFERS = {
    "gpt2": ("transformer.h.{}.attn.bias", "transformer.h.{}.attn.masked_bias"),
    "gpt_neox": (
        "gpt_neox.layers.{}.attention.bias",
        "gpt_neox.layers.{}.attention.masked_bias",
        "gpt_neox.layers.{}.attention.rotary_emb.inv_freq",
    ),
}


@pytest.mark.parametrize("kind", ["gpt2", "opt", "gpt_neox", "llama", "mpt"])
@pytest.mark.parametrize("bare", [False, True])
def test_older_tensor_names(tmp_path: Path, kind: Kind, bare: bool) -> None:
    """Buffers, names without the first part, and an output that repeats the embedding."""
    folder = write_model(tmp_path / "m", kind, tied=True)
    expected = logits(open_huggingface(folder), tokens())
    path = folder / "model.safetensors"
    weights = load_file(path)
    for pattern in BUFFERS.get(kind, ()):
        weights |= {pattern.format(i): torch.ones(1, 1, 4, 4, dtype=torch.bool) for i in range(2)}
    if bare:
        weights = {name.partition(".")[2]: weight for name, weight in weights.items()}
    table = family_for_hf(kind, "x")
    output, first = (next(role.hf for role in table.top if role.name == name) for name in ("output", "embed"))
    weights[output] = weights[first.partition(".")[2] if bare else first].clone()
    save_file(weights, path)
    model = open_huggingface(folder)
    assert "output" not in model.top
    assert torch.equal(logits(model, tokens()), expected)
    weights[output][0, 0] += 1
    save_file(weights, path)
    with pytest.raises(InputError, match=f"tie_word_embeddings.*{output}"):
        open_huggingface(folder)


def test_nothing_is_folded_without_need(tmp_path: Path) -> None:
    """Usual scales leave the stored bits; another goes into the queries, behind their norm where they have one."""
    gemma = write_model(tmp_path / "g", "gemma3", query_pre_attn_scalar=16)
    q_norm = load_file(gemma / "model.safetensors")["model.layers.1.self_attn.q_norm.weight"]
    assert torch.equal(open_huggingface(gemma).layers[1]["q_norm"], q_norm + 1)
    edit(gemma / "config.json", lambda raw: raw.update(query_pre_attn_scalar=64))
    assert torch.equal(open_huggingface(gemma).layers[1]["q_norm"], (q_norm + 1) * 0.5)
    mpt = write_model(tmp_path / "m", "mpt", attn_config={"softmax_scale": 16**-0.5})
    fused = load_file(mpt / "model.safetensors")["transformer.blocks.0.attn.Wqkv.weight"]
    w = open_huggingface(mpt).layers[0]
    assert torch.equal(torch.cat((w["q"], w["k"], w["v"])), fused)


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 6, 12, 16, 40])
def test_alibi_slopes(folders: dict[Kind, Path], heads: int) -> None:
    raw = json.loads((folders["mpt"] / "config.json").read_text()) | {"n_heads": heads, "d_model": 8 * heads}
    for largest in (8, 16):
        raw["attn_config"] = {"alibi_bias_max": largest}
        config = config_from_hf(family_for_hf("mpt", "x"), raw, Path("x"))
        wanted = build_mpt_alibi_tensor(heads, 2, alibi_bias_max=largest)
        torch.testing.assert_close(-torch.tensor(config.alibi_slopes), wanted[:, 0, 0])


BAD: list[tuple[Kind, dict[str, Any], str]] = [
    ("gemma3", {"model_type": "gemma3"}, "take its text model (gemma3_text)"),
    ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0"),
    ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0"),
    ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
    ("gemma3", {"sliding_window": None}, "sliding_window"),
    ("gemma3", {"layer_types": ["sliding_attention"] * 2}, "layer_types"),
    ("gemma3", {"layer_types": ["chunked_attention"] * 3}, "layer_types"),
    ("gemma3", {"hidden_activation": "quick_gelu"}, "hidden_activation 'quick_gelu'"),
    ("gemma3", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
    ("gemma3", {"rope_parameters": {"rope_type": "default"}}, "full_attention"),
    ("gemma3", {"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 2.0}}}, "'yarn'"),
    ("llama", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
    ("llama", {"model_type": "mixtral"}, "mixture of experts"),
    ("llama", {"model_type": "qwen3_moe"}, "mixture of experts"),
    ("llama", {"moe_intermediate_size": 64}, "moe_intermediate_size is 64"),
    ("mistral", {"layer_types": ["sliding_attention", "full_attention"]}, "sliding"),
    ("qwen3", {"layer_types": ["sliding_attention", "full_attention"]}, "sliding"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": "x"}, "max_window_layers"),
    ("phi3", {"rope_parameters": {"rope_type": "longrope"}}, "'longrope'"),
    ("phi3", {"rope_parameters": {"partial_rotary_factor": 0.2}}, "RoPE cannot turn 3"),
    ("phi3", {"num_attention_heads": 2}, "qkv_proj.weight has shape [128, 64]"),
    ("gpt_neox", {"num_attention_heads": 5}, "5 heads"),
    ("gpt_neox", {"rope_parameters": None, "rotary_pct": 2.0}, "RoPE cannot turn 32"),
    ("gpt_neox", {"layer_norm_eps": 0}, "layer_norm_eps"),
    ("gpt_neox", {"use_parallel_residual": 3}, "use_parallel_residual"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention True"),
    ("gpt2", {"n_inner": 100}, "mlp.c_fc.weight has shape [64, 96]"),
    ("gpt2", {"n_positions": 100}, "wpe.weight has shape [256, 64]"),
    ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before False"),
    ("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm True"),
    ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine False"),
    ("opt", {"word_embed_proj_dim": 32}, "word_embed_proj_dim 32"),
    ("opt", {"max_position_embeddings": 258}, "embed_positions.weight has shape [258, 64]"),
    ("mpt", {"expansion_ratio": 3}, "expansion_ratio 3"),
    ("mpt", {"no_bias": False}, "no_bias False"),
    ("mpt", {"logit_scale": 0.5}, "logit_scale 0.5"),
    ("mpt", {"norm_type": "rmsnorm"}, "norm_type 'rmsnorm'"),
    ("mpt", {"attn_config": {"alibi": False}}, "attn_config.alibi False"),
    ("mpt", {"attn_config": {"clip_qkv": 6}}, "attn_config.clip_qkv 6"),
    ("mpt", {"attn_config": {"qk_ln": True}}, "attn_config.qk_ln True"),
    ("mpt", {"attn_config": {"prefix_lm": True}}, "attn_config.prefix_lm True"),
    ("mpt", {"attn_config": {"attn_type": "multiquery_attention"}}, "multiquery_attention"),
    ("mpt", {"attn_config": {"kv_n_heads": 2}}, "kv_n_heads 2"),
    ("mpt", {"attn_config": 3}, "attn_config"),
]


@pytest.mark.parametrize(("kind", "change", "part"), BAD, ids=[f"{kind}-{part}" for kind, _, part in BAD])
def test_refusals(folders: dict[Kind, Path], tmp_path: Path, kind: Kind, change: dict[str, Any], part: str) -> None:
    folder = Path(shutil.copytree(folders[kind], tmp_path / "model"))
    edit(folder / "config.json", lambda raw: raw.update(change))
    with pytest.raises(InputError) as caught:
        open_huggingface(folder)
    message = str(caught.value)
    assert part in message
    assert str(folder) in message
    assert "\n" not in message


@pytest.mark.parametrize("kind", KINDS)
def test_any_value_in_config(folders: dict[Kind, Path], tmp_path: Path, kind: Kind) -> None:
    """Whatever one field holds, it is read or refused in one line."""
    original = json.loads((folders[kind] / "config.json").read_text())
    further = ("rope_scaling", "rope_theta", "rotary_pct", "sliding_window", "layer_types", "partial_rotary_factor")
    for value in (None, "x", -1, 2**70, 10**400, float("inf"), float("nan"), [], [1], {}, {"x": 1}, True, 0.5):
        for key in {*original, *further}:
            (tmp_path / "config.json").write_text(json.dumps(original | {key: value}))
            try:
                read_config(tmp_path)
            except InputError as error:
                assert str(tmp_path) in str(error)
                assert "\n" not in str(error)


def test_a_missing_half_of_an_optional_weight(tmp_path: Path) -> None:
    """Layers are alike: a bias that one layer has, each must have."""
    folder = write_model(tmp_path / "m", "gpt_neox")
    weights = load_file(folder / "model.safetensors")
    name = "gpt_neox.layers.1.attention.query_key_value.bias"
    del weights[name]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(InputError, match=f"{name} is missing"):
        open_huggingface(folder)
