"""Rounding with ggml's encoders: the blocks are what llama.cpp reads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType

from a3q.quantize import LayerRounding
from a3q.solve.grid import GRIDS
from converters.ggml_encode import available, decode, encode
from converters.nearest import nearest

pytestmark = pytest.mark.skipif(not available(), reason="llama.cpp is not installed")


@pytest.mark.parametrize("name", GRIDS)
def test_weights_are_those_that_llama_cpp_reads(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, importance = torch.randn(6, 512, generator=generator), torch.rand(512, generator=generator)
    blocks = nearest(weight, GRIDS[name], importance)
    kind = GGMLQuantizationType[name.upper()]
    read = decode(encode(weight.numpy(), kind, importance.numpy()), kind)
    np.testing.assert_array_equal(blocks.dequantize().numpy(), read)
    assert blocks.grid is GRIDS[name] and blocks.codes.device.type == "cpu"


def test_importances_count() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, importance = torch.randn(8, 256, generator=generator), torch.ones(256)
    importance[::4] = 100.0

    def error(by: torch.Tensor) -> float:
        left = nearest(weight, GRIDS["q4_0"], by).dequantize() - weight
        return float((left.square() * importance).sum())

    assert error(importance) < 0.9 * error(torch.ones(256))


def test_a_layer_is_rounded_by_it() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(400, 64, generator=generator), torch.randn(32, 64, generator=generator)
    gram = x.T @ x / 400
    layer = {"q": weight.clone()}
    rounding = LayerRounding({"q": GRIDS["q4_1"]}, nearest, "here")
    rounding.apply(layer, ("q",), gram)
    expected = nearest(weight, GRIDS["q4_1"], gram.diagonal())
    assert torch.equal(layer["q"], expected.dequantize())
    assert torch.equal(rounding.blocks["q"].codes, expected.codes)
    assert 0 < rounding.losses["q"] < 0.02
