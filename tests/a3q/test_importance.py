"""Importances against the inputs that transformers' own modules see."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from a3q import batching
from a3q.errors import InputError
from a3q.families import Role
from a3q.importance import measure
from a3q.model import Model
from converters.hf_reader import open_huggingface
from tests.pico import KINDS, VOCAB, Kind, write_model
from tests.reduced import reduced

CPU = torch.device("cpu")
WINDOWS = (3, 40)


def tokens() -> Tensor:
    return torch.randint(VOCAB, WINDOWS, generator=torch.Generator().manual_seed(0))


def seen_by_transformers(folder: Path) -> dict[str, Tensor]:
    """Mean squares `[in_features]` of what goes into every module, by its name, and into `output`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found: dict[str, Tensor] = {}

    def listen(name: str, module: torch.nn.Module) -> None:
        def hook(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if inputs and inputs[0].is_floating_point():
                found[name] = inputs[0].detach().flatten(0, -2).double().square().mean(0)

        module.register_forward_pre_hook(hook)

    for name, module in model.named_modules():
        listen(name, module)
    listen("output", model.get_output_embeddings())
    with torch.inference_mode():
        model(tokens())
    return found


def matrices(model: Model) -> list[Role]:
    """Roles of a layer that are multiplied with something."""
    return [role for role in model.family.layer if len(role.shape) == 2 and role.name in model.layer_roles]


def agree(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected.float(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_inputs_of_every_matrix(kind: Kind, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_model(tmp_path / f"pico-{kind}", kind, tied=tied)
    model, expected = open_huggingface(folder), seen_by_transformers(folder)
    # One sequence at a time, so that there are several batches.
    monkeypatch.setattr(batching, "BATCH_BYTES", 1)
    done: list[int] = []
    found = measure(model, tokens(), CPU, lambda: done.append(len(done)))
    assert found.windows == WINDOWS and found.tokens == 120
    assert len(done) == len(found.layers) == model.config.num_hidden_layers
    for i, layer in enumerate(found.layers):
        roles = matrices(model)
        assert layer.keys() == {role.name for role in roles}
        for role in roles:
            agree(layer[role.name], expected[role.hf.format(i=i).removesuffix(".weight")])
        assert layer["q"] is layer["k"] is layer["v"]
    assert found.top.keys() == {"output"}
    agree(found.top["output"], expected["output"])


def test_sizes_of_a_reduced_model(tmp_path: Path) -> None:
    model = reduced(open_huggingface(write_model(tmp_path / "pico")))
    found = measure(model, tokens(), CPU)
    for layer, importance in zip(model.layers, found.layers, strict=True):
        for role, vector in importance.items():
            assert vector.shape == layer[role].shape[1:]


def test_inputs_that_are_no_numbers(tmp_path: Path) -> None:
    model = open_huggingface(write_model(tmp_path / "pico"))
    layers = list(model.layers)
    layers[1]["mlp_norm"][3] = float("inf")
    with pytest.raises(InputError, match=r"pico: layer 1: the inputs .* no numbers"):
        measure(replace(model, layers=layers), tokens(), CPU)
