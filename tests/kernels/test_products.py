"""Products of a step with prompts and what they are joined with, against float64; quack's on a GPU."""

import itertools

import pytest
import torch

from hrm_text.kernels.pointwise import PrefillBatch, factors_of, rms
from hrm_text.kernels.prefill_graphs import SIZES
from hrm_text.kernels.products import MANY_TOKENS, CublasProducts, Products, products_for, products_of_many, try_out
from tests.kernels.conftest import DEVICE
from tests.kernels.projections import check_replays, gpu
from tests.kernels.test_prefill import PAGE, caches_of, turn

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


def test_turns_lie_as_quacks_gqkv_reads_them() -> None:
    """Load n of lane l: blocks 2 n and 2 n + 1 of eight columns, of which the lane has two, with cosine and sine."""
    none, table = torch.zeros(0, dtype=torch.int64), torch.rand(5, 128)
    turns = PrefillBatch(none, none, PAGE, table).turns
    loads = turns.view(5, 4, 4, 2, 2, 2)
    for load, lane, block, column in itertools.product(range(4), range(4), range(2), range(2)):
        mine, at = loads[:, load, lane, block, column], 8 * (2 * load + block) + 2 * lane + column
        torch.testing.assert_close(mine.float(), table[:, [at, 64 + at]], rtol=0, atol=3e-4)


def test_no_graph_has_quacks() -> None:
    assert max(SIZES) < MANY_TOKENS


def test_few_tokens_and_other_types_stay_with_cublas() -> None:
    device = torch.device(DEVICE)
    assert isinstance(products_for(MANY_TOKENS, torch.float32, device), CublasProducts)
    assert isinstance(products_for(MANY_TOKENS - 1, torch.bfloat16, device), CublasProducts)
    assert DEVICE == "cuda" or products_of_many(torch.bfloat16, device) is None


@pytest.mark.parametrize("wrong", ["gqkv", "its KV", "add", "its factors", "swiglu"])
def test_products_that_are_wrong_are_refused(wrong: str) -> None:
    class Wrong(CublasProducts):
        def gqkv(
            self,
            x: torch.Tensor,
            factors: torch.Tensor,
            weight: torch.Tensor,
            batch: PrefillBatch,
            *caches: torch.Tensor,
        ) -> tuple[torch.Tensor, torch.Tensor | None]:
            product, left = super().gqkv(x, factors, weight, batch, *caches)
            caches[1][3, 5, 1] *= torch.nan if wrong == "its KV" else 1
            return product, None if wrong == "gqkv" else left

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
    o, gate_up, down = (
        normal(*size, scale=size[1] ** -0.5) for size in ((hidden, hidden), (2 * wide, hidden), (hidden, wide))
    )
    poison(tokens, wide, 8, 16)
    products = quack()
    for given, weight in ((a, o), (act, down)):
        expected = x.double() + given.double() @ weight.double().t()
        factors = products.factors(x, products.add(x, given, weight), EPS)
        assert close(x, expected) and close(factors, torch.rsqrt(expected.square().mean(-1) + EPS))
    factors = rms(x, EPS)
    gate, up = (factors.double()[:, None] * (x.double() @ gate_up.double().t())).chunk(2, -1)
    assert close(products.swiglu(x, factors, gate_up), torch.nn.functional.silu(gate) * up)


def poison(tokens: int, *widths: int) -> None:
    """What is allocated next takes this memory."""
    _ = [torch.full((tokens, width), float("nan"), device=DEVICE).bfloat16() for width in widths]


@gpu
@pytest.mark.parametrize(("across", "page"), [(True, PAGE), (False, PAGE), (False, 1)])
@pytest.mark.parametrize(("tokens", "heads"), [(1, 12), (127, 3), (128, 1), (300, 12), (2048, 12), (2500, 5)])
def test_quacks_gqkv_equals_float64(tokens: int, heads: int, across: bool, page: int) -> None:
    """Rotated and in the cache, in the layouts of both engines; padding nowhere, and nothing else is written."""
    hidden, dim, products = 1536, 128, quack()
    x, weight, factors = normal(tokens, hidden), normal(4 * heads * dim, hidden, scale=0.03), torch.rand(tokens).cuda()
    caches = caches_of(tokens // PAGE + 2, heads, dim, torch.bfloat16, across)
    k_cache, v_cache = caches if across else (cache.view(-1, page, heads, dim) for cache in caches)
    slots = torch.randperm(len(k_cache) * page, device=DEVICE)[:tokens]
    slots[tokens // 2 :: 5] = -1
    batch = PrefillBatch(torch.randint(4096, (tokens,), device=DEVICE), slots, page, normal(4096, dim))
    poison(tokens, len(weight))
    product, left = products.gqkv(x, factors, weight, batch, k_cache, v_cache)
    assert left is None
    wide = (factors.double()[:, None] * (x.double() @ weight.double().t())).view(tokens, 4, heads, dim)
    table = batch.cos_sin.double()[batch.positions]
    gate, q, k, v = product.view(tokens, 4, heads, dim).unbind(1)
    assert close(gate, wide[:, 0]) and close(v, wide[:, 3])
    assert close(q, turn(wide[:, 1], table)) and close(k, turn(wide[:, 2], table))
    there = slots >= 0
    for cache, mine in ((k_cache, k), (v_cache, v)):
        assert torch.equal(cache[slots[there] // page, slots[there] % page], mine[there])
        assert int((cache != 7).any(-1).sum()) == int(there.sum()) * heads


@gpu
@pytest.mark.parametrize(("dim", "dtype"), [(64, torch.int64), (128, torch.int32)])
def test_other_heads_and_indices(dim: int, dtype: torch.dtype) -> None:
    """Heads that it was not compiled for take cuBLAS."""
    x, weight, factors = normal(70, 256), normal(4 * 2 * dim, 256, scale=1 / 16), torch.rand(70).cuda()
    tokens = torch.arange(70, device=DEVICE, dtype=dtype)
    batch = PrefillBatch(tokens, tokens, PAGE, normal(70, dim))
    mine, other = (caches_of(5, 2, dim, torch.bfloat16, True) for _ in range(2))
    product, left = quack().gqkv(x, factors, weight, batch, *mine)
    expected, _ = CublasProducts().gqkv(x, factors, weight, batch, *other)
    assert (left is factors) == (dim == 64)
    for one, two in ((product[:, 2 * dim :], expected[:, 2 * dim :]), *zip(mine, other, strict=True)):
        assert close(one, two.double())


@gpu
def test_bad_numbers_come_through_quack() -> None:
    x, weight, products = normal(300, 256), normal(512, 256), quack()
    caches, tokens = caches_of(20, 1, 128, torch.bfloat16, False), torch.arange(300, device=DEVICE)
    batch = PrefillBatch(tokens, tokens, PAGE, normal(300, 128))
    for bad in (float("nan"), float("inf")):
        x[7, 3] = bad
        total, ones = normal(300, 512), torch.ones(300, device=DEVICE)
        results = products.gqkv(x, ones, weight, batch, *caches)[0], products.swiglu(x, ones, weight), total
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

    caches, tokens = caches_of(200, 2, 128, torch.bfloat16, True), torch.arange(2500, device=DEVICE)
    batch = PrefillBatch(tokens, tokens, PAGE, normal(2500, 128))

    def run() -> list[torch.Tensor]:
        wide, total = products.gqkv(x, ones, weights[0], batch, *caches)[0], x.clone()
        factors = products.factors(total, products.add(total, wide, weights[1]), EPS)
        act = products.swiglu(total, factors, weights[2])
        return [wide, *caches, factors, act, products.factors(total, products.add(total, act, weights[3]), EPS), total]

    check_replays(run, run(), 50)
