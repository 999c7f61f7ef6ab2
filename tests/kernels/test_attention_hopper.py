"""Decode attention for Hopper against float64: on a GPU, and emulated on a CPU.

The emulation runs the kernel's own source, all CTAs of a cluster at once: what is fetched comes as late as a wait
allows, and what is sent comes when it comes.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hrm_text.config import HrmTextShape
from hrm_text.kernels import nvrtc
from hrm_text.kernels.attention import DecodeAttention, DecodeBatch
from hrm_text.kernels.attention_hopper import (
    HEAD_DIM,
    REGISTERS,
    TILES,
    Tile,
    code_for,
    paged_attention,
    takes,
    why_not,
)
from hrm_text.kernels.staged import SHARED_BYTES, in_rows
from hrm_text.plan import RecurrencePlan
from tests.kernels import projections, test_attention
from tests.kernels.conftest import DEVICE
from tests.kernels.emulation import Emulated
from tests.kernels.projections import GENERATED, ON_GPU, TOLERANCE, either, emulated, gpu
from tests.kernels.test_attention import make_padding, spoil_all_but_earlier_tokens
from tests.kernels.test_linear import error

LONGEST = 4096 if ON_GPU else 300
PAGES = st.sampled_from([(1, True), (1, False), (16, False), (32, False), (4, False)])  # tokens; in a flat table
SMALL = Tile(splits=2, warps=2, stages=2)


class Case(test_attention.Case):
    """Keys and values of a page lie as in vLLM's cache, a head's together."""

    heads, dim, dtype = 12 if ON_GPU else 2, HEAD_DIM, torch.bfloat16

    def __init__(self, lengths: list[int], page_size: int = 16, ragged: bool = False, seed: int = 0) -> None:
        super().__init__(lengths, page_size, ragged, False, seed)
        if page_size > 1:
            both = torch.cat([self.k_cache, self.v_cache], -1).transpose(1, 2).contiguous()
            self.k_cache, self.v_cache = both.transpose(1, 2).split(self.dim, dim=-1)

    def run(self, kernel: Any = None, copies: int = 0) -> torch.Tensor:
        shape = (copies, self.heads * self.dim // 32, len(self.gqkv), 32) if copies else (len(self.gqkv), -1)
        out = torch.full((max(copies, 1), *self.gqkv[:, : self.heads * self.dim].shape), float("nan"), dtype=self.dtype)
        out = out.to(DEVICE).view(shape)
        assert takes(self.k_cache, self.v_cache, self.batch)
        paged_attention(self.gqkv, out, self.k_cache, self.v_cache, self.batch, copies, kernel)
        return out

    def check(self, out: torch.Tensor) -> None:
        """What was computed, and what was written to the cache."""
        expected, key, value = self.expected()
        for each in [in_rows(copy[None]) for copy in out] if out.ndim == 4 else [out]:
            assert error(each, expected) <= TOLERANCE
        pages, lines = self.batch.write_slots // self.page_size, self.batch.write_slots % self.page_size
        assert error(self.k_cache[pages, lines], key) <= TOLERANCE
        assert torch.equal(self.v_cache[pages, lines].double(), value)


def kernel_of(tile: Tile, seed: int = 0) -> Any:
    """The one that a test runs: on a GPU the one for the batch."""
    return None if ON_GPU else Emulated(tile, seed)


@either
@GENERATED
@given(
    tile=st.builds(Tile, st.sampled_from([1, 2, 4]), st.integers(1, 3), st.integers(1, 3)),
    lengths=st.lists(st.integers(1, 40) | st.integers(1, LONGEST), min_size=1, max_size=128 if ON_GPU else 3),
    pages=PAGES,
    copies=st.sampled_from([0, 1, 3]),
    narrow=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_equals_float64(
    tile: Tile, lengths: list[int], pages: tuple[int, bool], copies: int, narrow: bool, seed: int
) -> None:
    """What no earlier token's is, is NaN in the cache; and nothing else is written."""
    case = Case(lengths, *pages, seed=seed)
    if narrow:
        numbers = {name: getattr(case.batch, name).int() for name in ("positions", "write_slots", "table")}
        case.batch = replace(case.batch, **numbers, cos_sin=case.batch.cos_sin.bfloat16())
    spoil_all_but_earlier_tokens(case)
    before = case.k_cache.clone(), case.v_cache.clone()
    kernel = kernel_of(tile, seed)
    out = case.run(kernel, copies)
    case.check(out)
    assert ON_GPU or kernel.early_writes == 0
    pages_of, lines = case.batch.write_slots // case.page_size, case.batch.write_slots % case.page_size
    for cache, untouched in zip((case.k_cache, case.v_cache), before, strict=True):
        untouched[pages_of, lines] = cache[pages_of, lines]
        assert torch.equal(cache.nan_to_num(7), untouched.nan_to_num(7)), "something else was written"


@either
@pytest.mark.parametrize("tile", {*TILES.values()}, ids=str)
def test_the_tiles(tile: Tile) -> None:
    """Contexts of no block, of one, and of more than all warps have on their way at once."""
    case = Case([1, 2, 17, 16 * tile.splits * tile.warps * tile.stages + 50])
    kernel = kernel_of(tile)
    case.check(case.run(kernel))
    assert ON_GPU or kernel.early_writes == 0


@either
@pytest.mark.parametrize("tile", [SMALL, Tile(1, 2, 1)], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["k_cache", "v_cache", "gqkv"])
def test_bad_numbers_come_through(tile: Tile, bad: float, where: str) -> None:
    """In their own request, of which the first warp has one block, and another one another."""
    for token in (3, 20):
        case = Case([40, 40], 1, True)
        if where == "gqkv":
            case.gqkv[0, case.gqkv.shape[1] // 4 + token] = bad  # of the first head's query
        else:
            getattr(case, where)[case.pages[0][token], 0] = bad
        got = case.run(kernel_of(tile)).unflatten(1, (case.heads, -1))
        assert not got[0, 0].isfinite().any()
        assert got[1].isfinite().all()


@either
def test_padding_writes_nothing() -> None:
    case = Case([5, 9, 9], 16)
    make_padding(case)
    before = case.k_cache.clone()
    assert case.run(kernel_of(SMALL)).isfinite().all()
    changed = (case.k_cache != before).flatten(2).any(-1).nonzero().tolist()
    assert changed == [[0, 0], [case.pages[0][0], 4]]


BROKEN = {
    "the kernel before": ("  wait_for_last_kernel();\n  float", "  float"),
    "a block": ("    wait_for_fetches<STAGES - 1>();\n", ""),
    "the last block": ("wait_for_fetches<STAGES - 1>", "wait_for_fetches<STAGES>"),
    "the query": ("  sync_all();\n", ""),
    "all that is sent": ("  wait(shared.sent);\n", ""),
    "the cluster": ("  wait_for_cluster();\n", ""),
    "its barrier": ("    barriers_ready();\n", ""),
    "the bytes sent": ("ALL * PART * 16", "ALL * PART * 16 - 16"),
}


@emulated
@pytest.mark.parametrize("name", BROKEN)
def test_the_emulation_sees_what_is_not_waited_for(name: str) -> None:
    def right(kernels: Iterable[Emulated]) -> bool:
        for kernel in kernels:
            case = Case([1, 130], seed=1)
            try:
                if not error(case.run(kernel), case.expected()[0]) <= 10 * TOLERANCE:
                    return False
            except RuntimeError as reason:
                assert "emulation:" in str(reason)
                return False
        return True

    edit = projections.replacing(*BROKEN[name])
    assert right(Emulated(SMALL, seed) for seed in range(3))
    assert not right(Emulated(SMALL, seed, edit) for seed in range(30))


# ---- Where it runs


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device(DEVICE)
    assert "float32" in str(why_not(HEAD_DIM, torch.float32, device))
    assert (why_not(HEAD_DIM, torch.bfloat16, device) is None) == ON_GPU
    monkeypatch.setattr(nvrtc, "capability", lambda device: 9)
    assert why_not(64, torch.bfloat16, device) == "head_dim=64 is not 128"


def test_what_it_takes() -> None:
    case = Case([5], 16)
    k, v, batch = case.k_cache, case.v_cache, case.batch
    assert takes(k, v, batch)
    assert not takes(k.float(), v.float(), batch)
    assert not takes(k, v.clone(), batch), "other strides"
    assert not takes(k[..., 1:], v[..., 1:], batch), "unaligned"
    assert not takes(k, v, replace(batch, page_size=48))
    assert not takes(k, v, replace(batch, cos_sin=batch.cos_sin.half()))
    assert batch.lengths is not None
    assert not takes(k, v, replace(batch, lengths=batch.lengths.long()))


@pytest.mark.parametrize("tokens", TILES)
def test_ctas_fit_on_a_multiprocessor(tokens: int) -> None:
    """Of an H200: all of a batch that is small, or of a large one as many as leave no room for gqkv's of the next."""
    tile = TILES[tokens]
    assert 32 * tile.warps * REGISTERS <= 65536 and tile.shared_bytes <= SHARED_BYTES
    assert 132 * (228 * 1024 // (tile.shared_bytes + 1024)) >= min(tokens, 64) * 12 * tile.splits


@pytest.mark.parametrize("tokens", TILES)
def test_compiles_for_hopper(tokens: int) -> None:
    projections.check_compiled(lambda: code_for(TILES[tokens]))


# ---- On a GPU


@gpu
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 64, 65, 128])
def test_every_batch_equals_float64(tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    for page_size, ragged, longest in ((16, False, 700), (1, True, 300), (16, False, LONGEST)):
        lengths = torch.randint(1, longest, (tokens,), generator=generator).tolist()
        case = Case(lengths, page_size, ragged, seed=tokens)
        case.check(case.run())


@gpu
@pytest.mark.parametrize("tokens", [1, 3, 8, 16, 32, 64, 128])
def test_replays_agree(tokens: int) -> None:
    """To the bit, each launched before what it reads is there."""
    case = Case([1 + 37 * i % 300 for i in range(tokens)], 16, seed=tokens)
    given, attention = case.gqkv.clone(), DecodeAttention(case.heads, case.dim, torch.device(DEVICE))
    attention.why_not_cuda = None

    def run() -> list[torch.Tensor]:
        written = [case.gqkv]
        for _ in range(6):
            out = attention(written[-1], case.k_cache, case.v_cache, case.batch)
            written += [out, out.repeat(1, 4)]
        return written

    first = [each.clone() for each in run()]
    projections.check_replays(run, first, 300, lambda: case.gqkv.copy_(given))


@gpu
def test_a_batch_of_another_size_changes_nothing() -> None:
    """Within those that one kernel serves: the bits of a request are its own."""
    lengths = [200, 150, 3, 577] + [20] * 14
    case = Case(lengths)
    whole = case.run()
    order = list(reversed(range(len(lengths))))
    case.batch = batch_of(case.batch, order)
    case.gqkv = case.gqkv[order]
    assert torch.equal(case.run()[order], whole)


def batch_of(batch: DecodeBatch, order: list[int]) -> DecodeBatch:
    """Its requests in another order."""
    assert batch.lengths is not None
    names = ("positions", "write_slots", "table", "lengths")
    return replace(batch, **{name: getattr(batch, name)[order] for name in names})


@gpu
@pytest.mark.parametrize("tokens", [1, 8, 9, 64, 128])
def test_a_step_on_it_equals_one_on_triton(tokens: int) -> None:
    shape = HrmTextShape(RecurrencePlan(2, 1, 2), 1536, 4096, 12, HEAD_DIM, 16, 4096, 10000.0, 1e-6, 1.0, False, True)
    projections.check_step(shape, tokens, "why_not_cuda")
