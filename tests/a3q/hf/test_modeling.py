"""The configuration and the model class: against `a3q.forward`, in caches, in batches and in 16 bits."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from a3q.errors import InputError
from a3q.forward import hidden_states, output_logits
from a3q.hf.configuration_a3q import A3QConfig, describe_config, from_model_config, to_model_config
from a3q.hf.modeling_a3q import A3QForCausalLM, A3QRMSNorm
from a3q.model import Model
from converters.a3q_folder import read_a3q_config
from converters.hf_reader import open_huggingface
from converters.hf_writer import write_huggingface
from tests.pico import KINDS, VOCAB, Kind, write_model
from tests.reduced import reduced

CPU = torch.device("cpu")
GREEDY: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}


def tokens(count: int = 2, length: int = 40) -> Tensor:
    return torch.randint(2, VOCAB, (count, length), generator=torch.Generator().manual_seed(0))


def load(folder: Path, **options: Any) -> A3QForCausalLM:
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    assert type(model) is A3QForCausalLM
    return model


@torch.no_grad()
def logits(model: A3QForCausalLM, ids: Tensor, **inputs: Any) -> Tensor:
    return model(ids, **inputs).logits.float()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[Kind, Model]:
    root = tmp_path_factory.mktemp("sources")
    return {kind: reduced(open_huggingface(write_model(root / kind, kind))) for kind in KINDS}


@pytest.fixture(scope="module")
def folders(models: dict[Kind, Model], tmp_path_factory: pytest.TempPathFactory) -> dict[Kind, Path]:
    root = tmp_path_factory.mktemp("reduced")
    return {kind: write_huggingface(model, root / kind, dtype=torch.float32).path for kind, model in models.items()}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_reduced_logits_equal_the_own_forward_pass(
    models: dict[Kind, Model], folders: dict[Kind, Path], kind: Kind, attention: str
) -> None:
    expected = output_logits(models[kind], hidden_states(models[kind], tokens(), CPU), CPU)
    torch.testing.assert_close(
        logits(load(folders[kind], attn_implementation=attention), tokens()), expected, atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("kind", KINDS)
def test_generation_with_a_cache(models: dict[Kind, Model], folders: dict[Kind, Path], kind: Kind) -> None:
    model, config = load(folders[kind]), models[kind].config
    plain = model.generate(tokens(), use_cache=False, **GREEDY)
    # MPT's own generation_config.json turns the cache off.
    out = model.generate(tokens(), use_cache=True, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(out.sequences, plain)
    for layer, shape in zip(out.cache.layers, config.layers, strict=True):
        seen = min(plain.shape[1] - 1, (shape.sliding_window or VOCAB) - 1)
        heads = (2, config.num_key_value_heads, seen)
        assert (layer.keys.shape, layer.values.shape) == ((*heads, shape.qk_head_dim), (*heads, shape.v_head_dim))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "gemma3", "opt", "mpt"])
def test_caches_in_pieces(folders: dict[Kind, Path], kind: Kind, attention: str) -> None:
    model, ids = load(folders[kind], attn_implementation=attention), tokens()
    whole = logits(model, ids)
    for cache in (DynamicCache(config=model.config), StaticCache(model.config, max_cache_len=64)):
        parts = []
        for piece in ids.split([17, 14, 1, 1, 7], dim=1):
            parts.append(logits(model, piece, cache=cache, use_cache=True))
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-4, rtol=0)


def test_a_cache_by_its_old_name(folders: dict[Kind, Path]) -> None:
    """As code for transformers before 5.24 calls it, of the whole model and of the one below the output."""
    model, ids = load(folders["llama"]), tokens()
    whole = logits(model, ids)
    cache = DynamicCache(config=model.config)
    logits(model, ids[:, :-1], past_key_values=cache, use_cache=True)
    torch.testing.assert_close(logits(model, ids[:, -1:], past_key_values=cache), whole[:, -1:], atol=1e-4, rtol=0)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model.model(ids[:, :-1], past_key_values=cache)
    assert cache.get_seq_length() == ids.shape[1] - 1


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_left_padded_batches_generate_as_alone(folders: dict[Kind, Path], kind: Kind, attention: str) -> None:
    model, long = load(folders[kind], attn_implementation=attention), tokens(1, 20)
    short = long[:, 9:]
    batch = torch.cat((long, torch.cat((torch.full((1, 9), 1), short), dim=1)))
    mask = torch.ones_like(batch)
    mask[1, :9] = 0
    together = model.generate(batch, attention_mask=mask, use_cache=True, **GREEDY)
    assert torch.equal(together[:1], model.generate(long, **GREEDY))
    assert torch.equal(together[1:, 9:], model.generate(short, **GREEDY))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_sixteen_bits(folders: dict[Kind, Path], kind: Kind, dtype: torch.dtype) -> None:
    expected, model = logits(load(folders[kind]), tokens()), load(folders[kind], dtype=dtype)
    assert model.dtype == dtype
    error = (logits(model, tokens()) - expected).norm() / expected.norm()
    assert error < (0.06 if dtype == torch.bfloat16 else 0.01)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_frequencies_keep_their_precision(folders: dict[Kind, Path], kind: Kind) -> None:
    model = load(folders[kind])
    x, far = torch.zeros(1, 1, 1), torch.tensor([[3001]])
    expected = list(model.model.rotations(x, far))
    for cast in (model.half(), load(folders[kind], dtype=torch.bfloat16).float(), copy.deepcopy(model).double()):
        found = list(cast.model.rotations(x, far))
        assert all(
            torch.equal(*pair) for turns in zip(found, expected, strict=True) for pair in zip(*turns, strict=True)
        )
        assert not [name for name, _ in cast.named_buffers()]


def test_one_position_at_a_time_turns_like_many(folders: dict[Kind, Path]) -> None:
    rotations = load(folders["llama"]).model.rotations
    x = torch.zeros(1, 1, 1)
    many = list(rotations(x, torch.arange(5)[None]))
    for t in range(5):
        for whole, single in zip(many, rotations(x, torch.tensor([[t]])), strict=True):
            assert all(torch.equal(a[:, :, t : t + 1], b) for a, b in zip(whole, single, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_as_many_matrix_products_as_the_original(folders: dict[Kind, Path], kind: Kind) -> None:
    block = load(folders[kind]).model.layers[0]
    expected = {"phi3": 4, "gpt_neox": 4, "gpt2": 4, "mpt": 4, "opt": 6}.get(kind, 7)
    assert sum(isinstance(module, nn.Linear) for module in block.modules()) == expected


@pytest.mark.parametrize("kind", ["llama", "mpt"])
def test_one_graph_without_breaks(folders: dict[Kind, Path], kind: Kind) -> None:
    model, ids = load(folders[kind]), tokens()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    cache = StaticCache(model.config, max_cache_len=64)
    logits(model, ids[:, :-2], cache=cache)
    for t in (-2, -1):
        found = logits(compiled, ids[:, t:] if t == -1 else ids[:, t:-1], cache=cache, use_cache=True)
    torch.testing.assert_close(found, logits(model, ids)[:, -1:], atol=1e-4, rtol=0)


def test_outputs_and_loss(folders: dict[Kind, Path]) -> None:
    model = load(folders["gemma3"], attn_implementation="eager")
    out = model(tokens(), labels=tokens(), output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 4 and len(out.attentions) == 3
    expected = nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)
    last = model(tokens(), logits_to_keep=1).logits
    torch.testing.assert_close(last, out.logits[:, -1:])
    embedded = model.get_input_embeddings()(tokens())
    torch.testing.assert_close(model(inputs_embeds=embedded).logits, out.logits)


def test_trains_after_inference(folders: dict[Kind, Path]) -> None:
    model = load(folders["mpt"])
    with torch.inference_mode():
        model(tokens())
    model(tokens(), labels=tokens()).loss.backward()
    assert model.model.layers[0].self_attn.qkv_proj.weight.grad is not None


def test_checkpointed_gradients_are_the_same(folders: dict[Kind, Path]) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = load(folders["phi3"]).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert model.model.layers[0].gradient_checkpointing
        model(tokens(), labels=tokens()).loss.backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None and torch.allclose(gradient, gradients[1][name], atol=1e-6), name


@pytest.mark.parametrize("kind", ["gemma3", "mpt", "gpt_neox"])
def test_saved_and_loaded(folders: dict[Kind, Path], kind: Kind, tmp_path: Path) -> None:
    model = load(folders[kind])
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert to_model_config(again.config) == to_model_config(model.config)
    assert torch.equal(logits(again, tokens()), logits(model, tokens()))


@pytest.mark.parametrize("kind", KINDS)
def test_configuration_round_trip(models: dict[Kind, Model], kind: Kind) -> None:
    model = models[kind]
    config = from_model_config(model.family, model.config, model.layer_roles, model.top, reduction={"ratio": 0.5})
    assert to_model_config(config) == model.config
    again = A3QConfig(**json.loads(config.to_json_string()))
    description = describe_config(again)
    assert (description.family, description.config) == (model.family, model.config)
    assert (description.layer_roles, description.top_roles) == (model.layer_roles, frozenset(model.top))
    assert again.reduction == {"ratio": 0.5}


def test_fresh_models_are_sound(models: dict[Kind, Model], tmp_path: Path) -> None:
    model = models["gemma3"]
    fresh = A3QForCausalLM(from_model_config(model.family, model.config, model.layer_roles, model.top))
    norms = [module for module in fresh.modules() if isinstance(module, A3QRMSNorm)]
    assert norms and all((norm.weight == 0).all() for norm in norms)
    toy = A3QForCausalLM(A3QConfig())
    assert toy(tokens() % 256).logits.shape == (2, 40, 256)
    # Every field is written, even one with its default.
    toy.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert read_a3q_config(raw, tmp_path) == (describe_config(toy.config).family, to_model_config(toy.config))


def test_flash_attention_only_where_its_kernels_can(folders: dict[Kind, Path]) -> None:
    assert not load(folders["llama"])._supports_flash_attn
    assert not load(folders["mpt"])._supports_flash_attn
    assert A3QForCausalLM(A3QConfig())._supports_flash_attn


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "bert"}, "family must be one of gemma3, gpt2"),
        ({"qk_head_dim": [16, 16]}, "qk_head_dim must be a list of 1 entries"),
        ({"v_head_dim": [0]}, "v_head_dim must be a list of positive whole numbers; found 0"),
        ({"intermediate_size": ["wide"]}, "intermediate_size must be a list of positive"),
        ({"num_attention_heads": 3}, "num_key_value_heads must be a divisor"),
        ({"num_hidden_layers": 1 << 40}, "num_hidden_layers must be a positive whole number"),
        ({"frequencies": [[[1.0] * 9]]}, "frequencies must be for each head equally many positive numbers, at most 8"),
        ({"frequencies": [[[1.0, 0.0]]]}, "frequencies must be for each head equally many positive numbers"),
        ({"frequencies": [[[1.0, 1e39]]]}, "frequencies must be for each head equally many positive numbers"),
        ({"norm_eps": 1e39}, "norm_eps must be a positive number"),
        ({"rope_theta": 1e39}, "rope_theta must be a positive number"),
        ({"frequencies": [[[1.0], [1.0]]]}, "frequencies must be for each layer no list, one, or 4"),
        ({"frequencies": [[[1.0], [1.0, 2.0], [1.0], [1.0]]]}, "equally many"),
        ({"frequencies": 7}, "frequencies must be a list of 1 entries"),
        ({"layer_types": ["sliding_attention"]}, "layer_types must be full_attention"),
        ({"weights": ["q"]}, "weights must be a list with attn_norm"),
        ({"weights": ["engine"]}, "weights must be a list of names out of"),
        ({"qk_norm": "head"}, "qk_norm must be set exactly where"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings must be true exactly where"),
        ({"fused": ["qkv"]}, "fused must be [] for the family llama"),
        ({"norm_eps": 10**400}, "norm_eps must be a positive number; found 1000"),
        ({"norm_eps": float("nan")}, "norm_eps must be a positive number; found nan"),
        ({"hidden_act": "swiglu"}, "hidden_act must be one of silu"),
        ({"alibi_slopes": [1.0]}, "alibi_slopes must be a list of 4 numbers"),
    ],
)
def test_configurations_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        A3QConfig(**changes)
    assert message in str(error.value) and "\n" not in str(error.value)
