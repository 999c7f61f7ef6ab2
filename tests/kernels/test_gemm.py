"""Projections for 17 to 128 tokens against float64, with what is fused around them."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hrm_text.kernels import gemm
from hrm_text.kernels.gemm import MAX_TOKENS, Projections, Tile
from tests.kernels.conftest import DEVICE
from tests.kernels.test_linear import DTYPE, EPS, SHAPES, TOLERANCE, draw, error, expected_linear

# Under the interpreter: whole rows of W, K split, blocks before the wait, and both.
TILES = (None,) if DEVICE == "cuda" else (None, Tile(32, 1, 16, 2, 3, 4), Tile(16, 2, 8, 1, 3, 4))


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    shape=st.sampled_from(SHAPES),
    tokens=st.sampled_from([17, 40, 64, 65, MAX_TOKENS]),
    kind=st.sampled_from(["plain", "swiglu", "residual"]),
    tile=st.sampled_from(TILES),
    seed=st.integers(0, 1000),
)
def test_equals_float64(shape: tuple[int, int], tokens: int, kind: str, tile: Tile | None, seed: int) -> None:
    rows, width = shape
    # Small enough, at times, for the norm's epsilon to matter.
    x = draw(tokens, width, seed=seed, scale=3.0 if seed % 2 else 1e-3)
    weight = draw(rows, width, seed=seed + 1, scale=width**-0.5)
    residual = draw(tokens, rows, seed=seed + 2, scale=0.1) if kind == "residual" else None
    squares = x.float().square().view(tokens, -1, 16).sum(-1) if kind == "swiglu" else None
    with pytest.MonkeyPatch.context() as patch:
        if tile is not None:
            patch.setattr(gemm, "tile_for", lambda *_: tile)
        project = Projections([shape], DTYPE, torch.device(DEVICE))
        options: dict[str, Any] = {"squares": squares, "eps": EPS, "swiglu": kind == "swiglu", "residual": residual}
        got, left = project(x, weight, **options)
        again, _ = project(x, weight, **options)
    assert error(got, expected_linear(x, weight, kind == "swiglu", kind == "swiglu", residual)) <= TOLERANCE
    assert torch.equal(got, again) and not project.arrivals.any()
    assert (left is None) == (residual is None)
    if left is not None:
        torch.testing.assert_close(left.sum(1), got.float().square().sum(1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("tokens", [17, 70])
def test_other_rows_do_not_matter(tokens: int, bad: float) -> None:
    """Neither those of the batch, whatever is in them, nor those that pad it."""
    rows, width = SHAPES[0]
    x, weight = draw(tokens, width, seed=0), draw(rows, width, seed=1)
    project = Projections([SHAPES[0]], DTYPE, torch.device(DEVICE))
    before, _ = project(x, weight)
    x[[0, tokens - 1], 3] = bad
    after, _ = project(x, weight)
    assert not after[[0, tokens - 1]].isfinite().any()
    assert torch.equal(before[1:-1], after[1:-1])
