"""Attention of one position in a Triton kernel against PyTorch's: interpreted, and compiled where there is a GPU."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.interpreter import interpreted

pytest.importorskip("triton")

CASES = [
    # One key; the last of a piece, the first of the next; few and odd sizes; more queries than a tile has, all keys.
    (2, 3, 3, 64, 64, 256, 0),
    (2, 3, 3, 64, 64, 256, 63),
    (2, 3, 3, 64, 64, 256, 64),
    (1, 2, 1, 40, 24, 100, 99),
    (2, 1, 20, 128, 96, 130, 129),
    (1, 2, 4, 8, 6, 70, 68),
]
"""Sequences, key heads, queries of each, sizes of keys and values, capacity and position."""
ROUGH = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def states(case: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys and values, no numbers behind the position, and the position."""
    B, groups, shared, size, width, capacity, position = case
    generator = torch.Generator().manual_seed(position)
    q, k, v = (
        (2 * torch.randn(B, groups, *shape, generator=generator)).to(dtype)
        for shape in ((shared, size), (capacity, size), (capacity, width))
    )
    k[:, :, position + 1 :] = v[:, :, position + 1 :] = torch.nan
    return q, k, v, torch.tensor([position])


def run(device: str, dtype: torch.dtype) -> list[Tensor]:
    from a3q.decode_triton import attend

    return [attend(*(one.to(device) for one in states(case, dtype))).cpu() for case in CASES]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(
            ("interpreter", torch.float32),
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="compiled where there is a GPU"),
        ),
        *(
            pytest.param(
                ("cuda", dtype), marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
            )
            for dtype in ROUGH
        ),
    ],
    ids=lambda param: f"{param[0]}-{param[1]}",
)
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Tensor]:
    where, dtype = request.param
    if where == "cuda":
        return run(where, dtype)
    found: list[Tensor] = interpreted("tests.a3q.test_decode_triton", tmp_path_factory.mktemp("triton") / "results.pt")
    return found


@pytest.mark.parametrize("case", range(len(CASES)))
def test_attention_up_to_a_position(results: list[Tensor], case: int) -> None:
    found = results[case]
    q, k, v, position = states(CASES[case], found.dtype)
    end = int(position) + 1
    known = F.scaled_dot_product_attention(q.float(), k[:, :, :end].float(), v[:, :, :end].float())
    torch.testing.assert_close(found.float(), known, rtol=ROUGH[found.dtype], atol=ROUGH[found.dtype])


if __name__ == "__main__":
    torch.save(run("cpu", torch.float32), sys.argv[1])
