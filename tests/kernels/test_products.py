"""Products of a step with prompts and what they are joined with, against float64; quack's on a GPU."""

import pytest
import torch

from hrm_text.kernels.pointwise import factors_of, rms
from hrm_text.kernels.prefill_graphs import SIZES
from hrm_text.kernels.products import MANY_TOKENS, CublasProducts, Products, products_for, products_of_many, try_out
from tests.kernels.conftest import DEVICE
from tests.kernels.projections import check_replays, gpu

EPS = 1e-6
TOLERANCE = 5e-3


def normal(*size: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*size, device=DEVICE) * scale).bfloat16()


def close(got: torch.Tensor, expected: torch.Tensor) -> bool:
    return float((got.double() - expected).norm() / expected.norm()) <= TOLERANCE


def test_factors_of_parts_of_squares() -> None:
    x = torch.randn(130, 96, device=DEVICE)
    parts = x.square().view(130, 3, 32).sum(-1)
    torch.testing.assert_close(factors_of(parts, 96, EPS), rms(x, EPS), rtol=1e-6, atol=0)


def test_no_graph_has_quacks() -> None:
    assert max(SIZES) < MANY_TOKENS


def test_few_tokens_and_other_types_stay_with_cublas() -> None:
    device = torch.device(DEVICE)
    assert isinstance(products_for(MANY_TOKENS, torch.float32, device), CublasProducts)
    assert isinstance(products_for(MANY_TOKENS - 1, torch.bfloat16, device), CublasProducts)
    assert DEVICE == "cuda" or products_of_many(torch.bfloat16, device) is None


@pytest.mark.parametrize("wrong", ["scaled", "add", "its factors", "swiglu"])
def test_products_that_are_wrong_are_refused(wrong: str) -> None:
    class Wrong(CublasProducts):
        def scaled(
            self, x: torch.Tensor, factors: torch.Tensor, weight: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor | None]:
            product, factors = super().scaled(x, factors, weight)
            return product, None if wrong == "scaled" else factors

        def add(self, x: torch.Tensor, a: torch.Tensor, weight: torch.Tensor) -> None:
            super().add(x, a, weight)
            x *= torch.nan if wrong == "add" else 1

        def factors(self, x: torch.Tensor, squares: torch.Tensor | None, eps: float) -> torch.Tensor:
            return super().factors(x, squares, eps) * (0.98 if wrong == "its factors" else 1)

        def swiglu(self, x: torch.Tensor, factors: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            up_first = torch.cat(weight.chunk(2)[::-1])  # as another version might have it
            return super().swiglu(x, factors, up_first if wrong == "swiglu" else weight)

    try_out(CublasProducts(), torch.device(DEVICE))
    with pytest.raises(RuntimeError, match=f"{wrong}: off by"):
        try_out(Wrong(), torch.device(DEVICE))


def quack() -> Products:
    pytest.importorskip("quack")
    products = products_of_many(torch.bfloat16, torch.device("cuda"))
    assert products is not None, "the log says why"
    return products


@gpu
@pytest.mark.parametrize("tokens", [1, 127, 300, 2048, 2500])
def test_quacks_equal_float64(tokens: int) -> None:
    hidden, wide = 1536, 4096
    x, a, act = normal(tokens, hidden), normal(tokens, hidden), normal(tokens, wide)
    gqkv, o, gate_up, down = (
        normal(*size, scale=size[1] ** -0.5)
        for size in ((4 * hidden, hidden), (hidden, hidden), (2 * wide, hidden), (hidden, wide))
    )
    poison = [
        torch.full((tokens, width), float("nan"), device=DEVICE).bfloat16() for width in (4 * hidden, wide, 8, 16)
    ]
    del poison  # what is allocated next takes its memory
    products = quack()
    for given, weight in ((a, o), (act, down)):
        expected = x.double() + given.double() @ weight.double().t()
        factors = products.factors(x, products.add(x, given, weight), EPS)
        assert close(x, expected) and close(factors, torch.rsqrt(expected.square().mean(-1) + EPS))
    factors = rms(x, EPS)
    product, left = products.scaled(x, factors, gqkv)
    assert left is None and close(product, factors.double()[:, None] * (x.double() @ gqkv.double().t()))
    gate, up = (factors.double()[:, None] * (x.double() @ gate_up.double().t())).chunk(2, -1)
    assert close(products.swiglu(x, factors, gate_up), torch.nn.functional.silu(gate) * up)


@gpu
def test_bad_numbers_come_through_quack() -> None:
    x, weight, products = normal(300, 256), normal(512, 256), quack()
    for bad in (float("nan"), float("inf")):
        x[7, 3] = bad
        total, ones = normal(300, 512), torch.ones(300, device=DEVICE)
        results = products.scaled(x, ones, weight)[0], products.swiglu(x, ones, weight), total
        factors = products.factors(total, products.add(total, x, weight), EPS)
        for each in results:
            assert not each[7].isfinite().all() and each[:7].isfinite().all() and each[8:].isfinite().all()
        assert not factors[7] > 0 and (factors[8:] > 0).all()


@gpu
def test_quacks_in_a_graph() -> None:
    """Each is launched while the one before it runs, and reads what that one wrote; replays agree to the bit."""
    x, ones, products = normal(2500, 256), torch.ones(2500, device=DEVICE), quack()
    weights = [
        normal(rows, width, scale=width**-0.5) for rows, width in ((1024, 256), (256, 1024), (1024, 256), (256, 512))
    ]

    def run() -> list[torch.Tensor]:
        wide, total = products.scaled(x, ones, weights[0])[0], x.clone()
        factors = products.factors(total, products.add(total, wide, weights[1]), EPS)
        act = products.swiglu(total, factors, weights[2])
        return [wide, factors, act, products.factors(total, products.add(total, act, weights[3]), EPS), total]

    check_replays(run, run(), 50)
