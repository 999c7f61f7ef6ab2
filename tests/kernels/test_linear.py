"""Projections for a few tokens against float32, with what is fused around them."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hrm_text.kernels.linear import MAX_TOKENS, fits, small_linear
from hrm_text.kernels.swiglu import scaled_swiglu
from tests.kernels.conftest import DEVICE

DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
TOLERANCE = 5e-3 if DEVICE == "cuda" else 2e-6
EPS = 1e-6
# (rows, width): the 1B's four projections on a GPU; one, three and six parts a row under the interpreter.
SHAPES = (
    [(6144, 1536), (1536, 1536), (8192, 1536), (1536, 4096)] if DEVICE == "cuda" else [(64, 64), (32, 96), (96, 48)]
)


def draw(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator)).to(DEVICE, DTYPE)


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest relative error of a token: one wrong row must not hide among right ones."""
    got, expected = got.double().flatten(1), expected.flatten(1)
    return float(((got - expected).norm(dim=1) / expected.norm(dim=1)).max())


def expected_linear(
    x: torch.Tensor, weight: torch.Tensor, norm: bool, swiglu: bool, residual: torch.Tensor | None
) -> torch.Tensor:
    x, weight = x.double(), weight.double()
    if norm:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
    product = x @ weight.T
    if swiglu:
        gate, up = product.chunk(2, dim=-1)
        product = torch.nn.functional.silu(gate) * up
    return product if residual is None else product + residual.double()


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    shape=st.sampled_from(SHAPES),
    tokens=st.sampled_from([1, 2, 3, 8, 15, MAX_TOKENS]),
    norm=st.booleans(),
    kind=st.sampled_from(["plain", "swiglu", "residual"]),
    seed=st.integers(0, 1000),
)
def test_equals_float64(shape: tuple[int, int], tokens: int, norm: bool, kind: str, seed: int) -> None:
    rows, width = shape
    # Small enough, at times, for the norm's epsilon to matter.
    x = draw(tokens, width, seed=seed, scale=3.0 if seed % 2 else 1e-3)
    weight = draw(rows, width, seed=seed + 1, scale=width**-0.5)
    residual = draw(tokens, rows, seed=seed + 2, scale=0.1) if kind == "residual" else None
    got = small_linear(x, weight, norm_eps=EPS if norm else None, swiglu=kind == "swiglu", residual=residual)
    expected = expected_linear(x, weight, norm, kind == "swiglu", residual)
    assert got.shape == expected.shape
    assert error(got, expected) <= TOLERANCE


@pytest.mark.parametrize("tokens", [1, 8])
def test_bad_numbers_come_through(tokens: int) -> None:
    rows, width = SHAPES[0]
    weight = draw(rows, width, seed=1)
    for bad in (float("nan"), float("inf")):
        x = draw(tokens, width, seed=0)
        x[0, 3] = bad
        got = small_linear(x, weight)
        assert not got[0].isfinite().any()
        assert got[1:].isfinite().all()


@pytest.mark.parametrize("tokens", [1, 17, 40])
def test_swiglu_with_a_missing_norm(tokens: int) -> None:
    width, hidden = SHAPES[-1][1], SHAPES[0][1]
    x = draw(tokens, hidden, seed=3, scale=5.0)
    product = draw(tokens, 2 * width, seed=4, scale=5.0)
    factor = torch.rsqrt(x.double().square().mean(-1, keepdim=True) + EPS)
    gate, up = (product.double() * factor).chunk(2, dim=-1)
    assert error(scaled_swiglu(product, x, EPS), torch.nn.functional.silu(gate) * up) <= TOLERANCE


def test_shapes_that_do_not_fit_are_known() -> None:
    assert fits(6144, 1536) and fits(1536, 4096) and fits(64, 96)
    assert not fits(100, 64)
    assert not fits(64, 104)
