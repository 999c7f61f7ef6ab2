"""Whole steps with prompts, and the kernels between GEMMs one by one."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from hrm_text.kernels.pointwise import PrefillBatch, add_rms, gate_in_place, norm, norm_add, rms, rope_write, swiglu
from hrm_text.kernels.prefill import FusedPrefill
from hrm_text.kernels.staged import in_blocks, in_rows
from hrm_text.model import HrmTextBody
from hrm_text.oracle import token_logprobs
from hrm_text.plain import rope_table
from hrm_text.spans import Spans, attention_allowed
from tests.kernels.conftest import DEVICE
from tests.kernels.test_decode import body as body

DTYPES = [torch.float32, torch.bfloat16]
PAGE = 16


def close(got: torch.Tensor, expected: torch.Tensor) -> bool:
    tolerance = 5e-3 if got.dtype == torch.bfloat16 else 1e-5
    assert bool(got.isfinite().all())
    return float((got.double() - expected).norm() / expected.norm()) <= tolerance


def fresh(*size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*size, device=DEVICE).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "hidden"), [(1, 64), (65, 1536), (130, 96)])
def test_sums_and_norms(dtype: torch.dtype, tokens: int, hidden: int) -> None:
    a, b = fresh(tokens, hidden, dtype=dtype), fresh(tokens, hidden, dtype=dtype)
    total, factors = add_rms(a, b, 1e-6)
    assert close(total, a.double() + b.double()) and close(factors, factors_of(total))
    assert close(rms(a, 1e-6), factors_of(a))
    assert close(norm(a, 1e-6), a.double() * factors_of(a)[:, None])
    normed, behind = norm_add(a, b, 1e-6)
    assert torch.equal(normed, norm(a, 1e-6)) and close(behind, normed.double() + b.double())
    squares = torch.full((tokens, 1), float("nan"), device=DEVICE)
    again, with_squares = norm_add(a, b, 1e-6, squares)
    assert torch.equal(again, normed) and torch.equal(with_squares, behind)
    torch.testing.assert_close(squares[:, 0], behind.float().square().sum(1))
    again, in_them = norm_add(in_blocks(a).repeat(2, 1, 1, 1), b, 1e-6)
    assert torch.equal(again, normed) and torch.equal(in_rows(in_them), behind) and len(in_them) == 1


def factors_of(x: torch.Tensor) -> torch.Tensor:
    return torch.rsqrt(x.double().square().mean(-1) + 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [(1, 96), (65, 4096), (3, 2500)])
def test_swiglu(dtype: torch.dtype, tokens: int, width: int) -> None:
    product, factors = fresh(tokens, 2 * width, dtype=dtype), torch.rand(tokens, device=DEVICE)
    gate, up = (product.double() * factors.double()[:, None]).chunk(2, -1)
    assert close(swiglu(product, factors), torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "heads", "dim"), [(1, 12, 128), (70, 3, 64), (66, 12, 16)])
def test_rope_cache_and_gate(dtype: torch.dtype, tokens: int, heads: int, dim: int) -> None:
    """Everything lands where it belongs, in the layouts of both engines, and a padding token nowhere."""
    for across in (False, True):
        pages = tokens // PAGE + 2
        k_cache, v_cache = caches_of(pages, heads, dim, dtype, across)
        slots = torch.randperm(pages * PAGE, device=DEVICE)[:tokens]
        slots[-1] = -1
        gqkv = fresh(tokens, 4 * heads * dim, dtype=dtype)
        factors, table = torch.rand(tokens, device=DEVICE), torch.randn(300, dim, device=DEVICE)
        positions = torch.randint(300, (tokens,), device=DEVICE)
        gate, q, k, v = (gqkv.double() * factors.double()[:, None]).view(tokens, 4, heads, dim).unbind(1)
        rotated = [turn(each, table.double()[positions]) for each in (q, k)]
        before = gqkv[:, : heads * dim].clone()
        rope_write(gqkv, factors, PrefillBatch(positions, slots, PAGE, table), k_cache, v_cache)
        assert torch.equal(gqkv[:, : heads * dim], before)
        _, *got = gqkv.view(tokens, 4, heads, dim).unbind(1)
        for mine, expected in zip(got, (*rotated, v), strict=True):
            assert close(mine, expected)
        for cache, mine in ((k_cache, got[1]), (v_cache, got[2])):
            assert torch.equal(cache[slots[:-1] // PAGE, slots[:-1] % PAGE], mine[:-1])
            assert int((cache != 7).any(-1).sum()) == (tokens - 1) * heads
        out = fresh(tokens, heads * dim, dtype=dtype)
        expected = out.double() * torch.sigmoid(gate.reshape(tokens, -1))
        gate_in_place(gqkv, factors, out)
        assert close(out, expected)


def caches_of(pages: int, heads: int, dim: int, dtype: torch.dtype, across: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Sevens: vLLM's heads before tokens with keys beside values, or SGLang's pools."""
    if across:
        cache = torch.full((pages, heads, PAGE, 2 * dim), 7.0, dtype=dtype, device=DEVICE)
        k, v = cache.transpose(1, 2).split(dim, -1)
        return k, v
    k, v = torch.full((2, pages, PAGE, heads, dim), 7.0, dtype=dtype, device=DEVICE)
    return k, v


def turn(x: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    cos, sin = cos_sin[:, None].chunk(2, -1)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def test_a_gqkv_that_has_its_factors() -> None:
    """Is rotated, written and gated the same, and its values stay as they are."""
    (heads, dim), tokens = (3, 64), 70
    gqkv, slots = fresh(tokens, 4 * heads * dim, dtype=torch.float32), torch.arange(tokens, device=DEVICE)
    batch = PrefillBatch(slots, slots, PAGE, torch.randn(300, dim, device=DEVICE))
    results = []
    for factors in (torch.ones(tokens, device=DEVICE), None):
        own, caches, out = (
            gqkv.clone(),
            caches_of(tokens // PAGE + 1, heads, dim, torch.float32, True),
            gqkv[:, : heads * dim],
        )
        rope_write(own, factors, batch, *caches)
        gate_in_place(own, factors, out := out.clone())
        results.append((own, *caches, out))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    a = torch.ones(2, 64, device=DEVICE)
    a[0, 3] = bad
    total, _ = add_rms(a, torch.zeros_like(a), 1e-6)
    assert not total[0].isfinite().all() and total[1].isfinite().all()
    product = torch.ones(2, 128, device=DEVICE)
    product[0, 70] = bad
    act = swiglu(product, torch.ones(2, device=DEVICE))
    assert not act[0].isfinite().all() and act[1].isfinite().all()


SPANS: tuple[Spans, ...] = ((), ((0, 6),), ((0, 4), (7, 11)))


@pytest.mark.parametrize("spans", SPANS)
def test_a_prompt_in_two_steps_equals_the_oracle(body: HrmTextBody, reference: Any, spans: Spans) -> None:
    """The second step with padding behind it, over the cache of the first."""
    shape, tokens, first = body.shape, 12, 6 if spans[:1] == ((0, 6),) else 4
    prompt = torch.randint(12, shape.vocab_size, (tokens,), generator=torch.Generator().manual_seed(3))
    cache = torch.zeros(shape.plan.num_slots, 2, 3, PAGE, shape.num_heads, shape.head_dim, device=DEVICE)
    fused = FusedPrefill(body)
    hidden, some = [], []
    for start, end, padding in ((0, first, 0), (first, tokens, 3)):
        ids = torch.nn.functional.pad(prompt[start:end], (0, padding), value=5).to(DEVICE)
        positions = torch.nn.functional.pad(torch.arange(start, end), (0, padding)).to(DEVICE)
        slots = torch.nn.functional.pad(torch.arange(start, end) + PAGE, (0, padding), value=-1).to(DEVICE)
        batch = PrefillBatch(positions, slots, PAGE, rope_table(shape).to(DEVICE))
        begun = body.begin(body.embed(ids))
        step = partial(fused, *begun, batch, lambda slot: (cache[slot, 0], cache[slot, 1]))
        step = partial(step, attend(cache, spans, start, end))
        hidden.append(step()[: end - start])
        read = torch.tensor([2, end - start - 1], device=DEVICE)
        written = cache.clone()
        some.append((step(read), read))
        assert torch.equal(cache, written)
    for whole, (z_H, read) in zip(hidden, some, strict=True):
        torch.testing.assert_close(z_H[read], whole[read], rtol=1e-5, atol=1e-5)
        left = torch.ones(len(z_H), dtype=torch.bool, device=DEVICE).index_fill(0, read, False)
        assert z_H[left].isnan().all()
    logprobs = body.lm_head(torch.cat(hidden)).float().log_softmax(-1).cpu()
    expected = token_logprobs(reference, prompt.tolist(), spans)
    got = logprobs[:-1].gather(1, prompt[1:, None])[:, 0]
    assert float((got - expected).abs().max()) <= 1e-5


def attend(cache: torch.Tensor, spans: Spans, start: int, end: int) -> Callable[..., None]:
    """The mask itself over what is in the second page of the cache."""
    allowed = torch.tensor([[attention_allowed(spans, i, j) for j in range(end)] for i in range(start, end)])

    def run(slot: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        keys, values = cache[slot, :, 1, :end]
        assert torch.equal(keys[start:end], k[: end - start]) and torch.equal(values[start:end], v[: end - start])
        scores = torch.einsum("qhd,khd->hqk", q[: end - start], keys) * q.shape[-1] ** -0.5
        weights = scores.masked_fill(~allowed.to(q.device), -torch.inf).softmax(-1)
        out = torch.zeros(q.shape, device=q.device)
        out[: end - start] = torch.einsum("hqk,khd->qhd", weights, values)
        return out

    return run
