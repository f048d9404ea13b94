"""The rival methods on tiny random models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from a3q.families import family_named
from a3q.forward import attention, hidden_states, mlp
from a3q.model import LayerShape, Model, ModelConfig, Source, plain_frequencies
from benchmarks.rivals import RIVALS, layer_parameters
from benchmarks.rivals.activations import layers_with_moments
from benchmarks.rivals.modegpt import allocate
from benchmarks.rivals.rival import require_llama
from benchmarks.rivals.slicegpt import kept_dimensions, sliced_hidden_states
from benchmarks.rivals.svd import truncate

CPU = torch.device("cpu")
VOCAB = 128


class NoTokenizer:
    """Stands where a model's tokenizer is: nothing here reads text."""

    metadata: dict[str, object] = {}  # noqa: RUF012
    vocab_size, bos_id, eos_id, add_bos, chat_template = VOCAB, None, None, False, None


def tiny(key_heads: int = 2, hidden: int = 64, seed: int = 0) -> Model:
    """Three random layers; built by hand, so that no reader takes part."""
    family = family_named("llama")
    assert family is not None
    generator = torch.Generator().manual_seed(seed)
    shape = LayerShape(16, 16, 96, (plain_frequencies(100.0, 16),))
    config = ModelConfig((shape,) * 3, hidden, 4, key_heads, VOCAB, 256, 1e-5, True)
    roles = [role for role in family.layer if not role.name.endswith("bias")]

    def weight(shape: tuple[int, ...]) -> Tensor:
        if len(shape) == 1:
            return 1 + 0.1 * torch.randn(shape, generator=generator)
        return 1.5 * torch.randn(shape, generator=generator) / shape[1] ** 0.5

    layers = [{role.name: weight(role.expected_shape(config, shape)) for role in roles} for _ in config.layers]
    top = {"embed": torch.randn(VOCAB, hidden, generator=generator), "final_norm": weight((hidden,))}
    names = frozenset(role.name for role in roles)
    return Model(family, config, top, layers, names, NoTokenizer(), {}, Source(Path(), "huggingface", 0))


@pytest.fixture(scope="module", params=[4, 2, 1], ids=["no-groups", "groups", "one-key-head"])
def model(request: pytest.FixtureRequest) -> Model:
    return tiny(request.param)


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(VOCAB, (4, 64), generator=torch.Generator().manual_seed(1))


def error(model: Model, hidden: Tensor, tokens: Tensor) -> float:
    """Relative error of final hidden states."""
    expected = hidden_states(model, tokens, CPU)
    return float((hidden - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", RIVALS)
def test_ratio_zero_is_the_original(name: str, model: Model, tokens: Tensor) -> None:
    rival = RIVALS[name](model, tokens, 0.0, CPU)
    assert rival.parameters == layer_parameters(model.config)
    assert error(model, rival.hidden(tokens, CPU), tokens) < 1e-3


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5])
@pytest.mark.parametrize("name", RIVALS)
def test_weights_are_as_many_as_promised(name: str, ratio: float, model: Model, tokens: Tensor) -> None:
    rival = RIVALS[name](model, tokens, ratio, CPU)
    assert rival.parameters == pytest.approx((1 - ratio) * layer_parameters(model.config), rel=0.02)
    hidden = rival.hidden(tokens, CPU)
    assert hidden.shape == (*tokens.shape, model.config.hidden_size)
    assert hidden.isfinite().all()
    # What is counted is what is there, where the weights are not multiplied out.
    if rival.model.config != model.config:
        assert rival.parameters == sum(
            weight.numel() for layer in rival.model.layers for weight in layer.values() if weight.dim() == 2
        )


@pytest.mark.parametrize("name", RIVALS)
def test_less_is_worse(name: str, model: Model, tokens: Tensor) -> None:
    errors = [
        error(model, RIVALS[name](model, tokens, ratio, CPU).hidden(tokens, CPU), tokens) for ratio in (0.02, 0.7)
    ]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("name", RIVALS)
def test_the_original_is_left_alone(name: str, model: Model, tokens: Tensor) -> None:
    before = [{role: weight.clone() for role, weight in layer.items()} for layer in model.layers]
    RIVALS[name](model, tokens, 0.3, CPU)
    for old, layer in zip(before, model.layers, strict=True):
        assert all(torch.equal(old[role], layer[role]) for role in old)


def test_whitening_lowers_every_matrix_output_error(model: Model, tokens: Tensor) -> None:
    plain, whitened = (RIVALS[name](model, tokens, 0.4, CPU).model for name in ("truncated SVD", "SVD-LLM (W)"))
    for (_, w, moments), cut, better in zip(
        layers_with_moments(model, tokens, CPU), plain.layers, whitened.layers, strict=True
    ):
        for role in ("q", "k", "v", "o", "gate", "up", "down"):
            lost = [
                float(((w[role] - layer[role]) @ moments.of(role) * (w[role] - layer[role])).sum())
                for layer in (better, cut)
            ]
            assert lost[0] <= lost[1] * (1 + 1e-4)


@pytest.mark.parametrize("shape", [(24, 24), (40, 16), (16, 40)])
def test_truncation_is_that_of_the_svd(shape: tuple[int, int]) -> None:
    W = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    U, sigma, Vh = torch.linalg.svd(W, full_matrices=False)
    A, B = truncate(W, None, 9)
    assert A.shape == (shape[0], 9)
    assert torch.allclose(A @ B, (U[:, :9] * sigma[:9]) @ Vh[:9])


def test_svd_llm_is_the_papers_formula(tokens: Tensor) -> None:
    """`U_r Σ_r V_rᵀ S⁻¹` with an SVD of W S and S from Cholesky, for a wide, a square and a tall matrix."""
    model = tiny()
    ours = RIVALS["SVD-LLM (W)"](model, tokens, 0.5, CPU).model.layers[0]
    _, w, moments = next(layers_with_moments(model, tokens, CPU))
    for role in ("down", "q", "gate"):
        S = torch.linalg.cholesky(moments.of(role).double())
        U, sigma, Vh = torch.linalg.svd(w[role].double() @ S, full_matrices=False)
        rank = int(torch.linalg.matrix_rank(ours[role], rtol=1e-4))
        expected = (U[:, :rank] * sigma[:rank]) @ Vh[:rank] @ torch.linalg.inv(S)
        assert (ours[role] - expected).norm() < 1e-2 * expected.norm()


def test_modegpt_keeps_exactly_what_has_low_rank(tokens: Tensor) -> None:
    """A model whose inner dimensions are already redundant loses nothing."""
    model = tiny()
    for w in model.layers:
        values = w["v"].view(2, 16, -1)
        values[:, 8:] = values[:, :8]
        w["q"].view(4, 2, 8, -1)[:, :, 4:] = 0
        w["up"][48:] = 0
    rival = RIVALS["MoDeGPT"](model, tokens, 0.5, CPU)
    assert {shape.qk_head_dim for shape in rival.model.config.layers} == {8}
    assert error(model, rival.hidden(tokens, CPU), tokens) < 1e-2
    # Nothing that is fitted: pruning cannot add up values that are equal.
    assert error(model, RIVALS["structured Wanda"](model, tokens, 0.5, CPU).hidden(tokens, CPU), tokens) > 1e-2


def test_allocation_takes_most_from_layers_of_least_influence() -> None:
    ratios = allocate([0.5, 0.1, 0.2, 0.3], 0.3)
    assert sum(ratios) == pytest.approx(4 * 0.3)
    assert ratios[1] == max(ratios) <= 0.8
    assert ratios[0] == min(ratios) >= 0


def test_all_axes_of_slicegpt_are_the_original(model: Model, tokens: Tensor) -> None:
    generator = torch.Generator().manual_seed(2)
    axes = [torch.linalg.qr(torch.randn(64, 64, generator=generator)).Q for _ in range(7)]
    assert error(model, sliced_hidden_states(model, axes, tokens, CPU), tokens) < 1e-3


def test_slicegpt_equals_a_model_of_smaller_hidden_size(tokens: Tensor) -> None:
    """The projected stream against rotated and cut weights with adapters, as the paper stores them."""
    model, ratio = tiny(), 0.3
    config, k = model.config, kept_dimensions(model.config, ratio)
    rival = RIVALS["SliceGPT"](model, tokens, ratio, CPU)
    axes = rival.run.args[1]  # type: ignore[union-attr]
    sliced = sliced_forward(model, axes, tokens)
    assert (sliced - rival.hidden(tokens, CPU)).norm() < 1e-3 * sliced.norm()
    assert rival.parameters == k * layer_parameters(config) // 64 + 2 * 3 * k * k


def sliced_forward(model: Model, axes: list[Tensor], tokens: Tensor) -> Tensor:
    """SliceGPT with hidden size k, from its own weights; only the last, normed states are turned back."""
    config = model.config

    def unit(x: Tensor) -> Tensor:
        # Divided by the root of the old size, though x has only k entries.
        return x / (x.square().sum(-1, keepdim=True) / config.hidden_size + config.norm_eps).sqrt()

    x = model.embed[tokens] @ axes[0]
    for i, (shape, w) in enumerate(zip(config.layers, model.layers, strict=True)):
        before, between, after = axes[2 * i : 2 * i + 3]
        cut = {role: (w[role] * w["attn_norm"]) @ before for role in "qkv"} | {"o": between.T @ w["o"]}
        cut |= {role: (w[role] * w["mlp_norm"]) @ between for role in ("gate", "up")} | {"down": after.T @ w["down"]}
        x = x @ (before.T @ between) + attention(config, shape, cut, unit(x))
        x = x @ (between.T @ after) + mlp(config, cut, unit(x))
    return unit(x) @ axes[-1].T * model.top["final_norm"]


def test_other_families_are_refused(tokens: Tensor) -> None:
    model = tiny()
    with pytest.raises(ValueError, match="without biases"):
        require_llama(Model(**vars(model) | {"layer_roles": model.layer_roles | {"q_bias"}}), 0.1)
    with pytest.raises(ValueError, match="ratio"):
        require_llama(model, 1.0)
