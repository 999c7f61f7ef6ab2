"""Decode attention against float64: pages of any size, splits, the KV write, padding rows."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hrm_text.kernels import attention_many
from hrm_text.kernels.attention import MAX_SPLIT_TOKENS, DecodeAttention, DecodeBatch, splits_for
from hrm_text.kernels.staged import in_rows
from tests.kernels.conftest import DEVICE
from tests.kernels.test_linear import DTYPE, EPS, TOLERANCE, draw, error

HEADS, DIM = (12, 128) if DEVICE == "cuda" else (2, 16)
LONGEST = 4096 if DEVICE == "cuda" else 200


def angle_table(positions: int, dim: int) -> torch.Tensor:
    frequencies = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    return torch.arange(positions, dtype=torch.float64)[:, None] * frequencies


class Case:
    """Random requests over a paged cache, every number of it drawn from `seed`."""

    heads, dim, dtype = HEADS, DIM, DTYPE

    def __init__(self, lengths: list[int], page_size: int, ragged: bool, normed: bool, seed: int) -> None:
        self.lengths, self.page_size = lengths, page_size
        heads, dim = self.heads, self.dim
        tokens, hidden = len(lengths), 96
        pages = [-(-length // page_size) for length in lengths]
        generator = torch.Generator().manual_seed(seed)
        numbers = (torch.randperm(sum(pages), generator=generator) + 1).tolist()
        self.pages = [[numbers.pop() for _ in range(count)] for count in pages]
        shape = (sum(pages) + 1, page_size, heads, dim)
        self.k_cache, self.v_cache = (draw(*shape, seed=seed + i).to(self.dtype) for i in (1, 2))
        self.gqkv = draw(tokens, 4 * heads * dim, seed=seed + 3).to(self.dtype)
        self.x = draw(tokens, hidden, seed=seed + 4, scale=4.0) if normed and tokens > MAX_SPLIT_TOKENS else None
        angles = angle_table(max(lengths), dim)
        slots = [
            row[-1] * page_size + (length - 1) % page_size for row, length in zip(self.pages, lengths, strict=True)
        ]
        widest = max(pages)
        table = [row + [0] * (widest - len(row)) for row in self.pages]
        flat = [page for row in self.pages for page in row]
        starts = torch.tensor([0, *pages]).cumsum(0)

        def to_device(values: object, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.as_tensor(values).to(DEVICE, dtype)

        self.batch = DecodeBatch(
            positions=to_device([length - 1 for length in lengths], torch.int64),
            write_slots=to_device(slots, torch.int64),
            table=to_device(flat, torch.int64) if ragged else to_device(table),
            row_starts=to_device(starts) if ragged else None,
            lengths=None if ragged else to_device(lengths),
            page_size=page_size,
            cos_sin=torch.cat([angles.cos(), angles.sin()], -1).to(DEVICE, torch.float32),
        )

    def rotated(self, x: torch.Tensor) -> torch.Tensor:
        """neox rotation of (tokens, heads, dim), float64."""
        a, b = x.double().chunk(2, dim=-1)
        cos, sin = self.batch.cos_sin[self.batch.positions][:, None].double().chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def expected(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Output, and the key and value of the new tokens, in float64."""
        factor: torch.Tensor | float = 1.0
        if self.x is not None:
            factor = torch.rsqrt(self.x.double().square().mean(-1, keepdim=True) + EPS)
        gate, q, k, v = ((self.gqkv.double() * factor).view(-1, 4, self.heads, self.dim)).unbind(1)
        q, k = self.rotated(q), self.rotated(k)
        rows = []
        for row, (pages, length) in enumerate(zip(self.pages, self.lengths, strict=True)):
            keys = self.k_cache[pages].double().flatten(0, 1)[: length - 1]
            values = self.v_cache[pages].double().flatten(0, 1)[: length - 1]
            keys, values = torch.cat([keys, k[row, None]]), torch.cat([values, v[row, None]])
            weights = torch.einsum("hd,thd->ht", q[row] * self.dim**-0.5, keys).softmax(-1)
            rows.append(torch.einsum("ht,thd->hd", weights, values))
        return (torch.stack(rows) * gate.sigmoid()).flatten(1), k, v


def attend(case: Case, attention: DecodeAttention | None = None) -> torch.Tensor:
    attention = attention or DecodeAttention(HEADS, DIM, torch.device(DEVICE))
    return attention(case.gqkv, case.k_cache, case.v_cache, case.batch, x=case.x, eps=EPS)


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    lengths=st.lists(st.integers(1, LONGEST), min_size=1, max_size=20),
    ragged=st.booleans(),
    page_size=st.sampled_from([1, 16]),
    normed=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_equals_float64(lengths: list[int], ragged: bool, page_size: int, normed: bool, seed: int) -> None:
    case = Case(lengths, 1 if ragged else page_size, ragged, normed, seed)
    expected, key, value = case.expected()
    untouched = case.k_cache.clone(), case.v_cache.clone()
    assert error(attend(case), expected) <= TOLERANCE
    pages, lines = case.batch.write_slots // case.page_size, case.batch.write_slots % case.page_size
    assert error(case.k_cache[pages, lines], key) <= TOLERANCE
    assert error(case.v_cache[pages, lines], value) <= TOLERANCE
    for cache, before in zip((case.k_cache, case.v_cache), untouched, strict=True):
        before[pages, lines] = cache[pages, lines]
        assert torch.equal(cache, before), "something else was written"


@pytest.mark.parametrize("lengths", [[1500], [700] * 16, [1500, 1, 40], [1500, 700] + [1, 40] * 8])
def test_a_split_takes_many_blocks(lengths: list[int]) -> None:
    case = Case(lengths, 16, False, False, 0)
    expected, _, _ = case.expected()
    assert error(attend(case), expected) <= TOLERANCE


def test_splits_are_counted_anew_each_time() -> None:
    assert splits_for(1, HEADS) > 1
    attention = DecodeAttention(HEADS, DIM, torch.device(DEVICE))
    for seed in range(3):
        case = Case([LONGEST - seed], 1, True, False, seed)
        expected, _, _ = case.expected()
        assert error(attend(case, attention), expected) <= TOLERANCE
    assert not attention.arrivals.any()


@pytest.mark.parametrize("lengths", [[1], [5, 90, 17], [LONGEST, 3], [40] * 16])
def test_copies_of_the_output(lengths: list[int]) -> None:
    """From one piece of a context, from several, and where there are never several."""
    case = Case(lengths, 16, False, False, 0)
    expected, _, _ = case.expected()
    attention = DecodeAttention(HEADS, DIM, torch.device(DEVICE))
    copies, (tokens, width) = 3, expected.shape
    poison = torch.full((copies, *expected.shape), float("nan"), device=DEVICE, dtype=case.gqkv.dtype)
    del poison  # the next tensor of its size takes its memory
    got = attention(case.gqkv, case.k_cache, case.v_cache, case.batch, copies=copies)
    assert got.shape == (copies, width // 32, tokens, 32)
    for each in got:
        assert error(in_rows(each[None]), expected) <= TOLERANCE


def test_copies_are_refused_where_nothing_would_write_them() -> None:
    case = Case([3] * (MAX_SPLIT_TOKENS + 1), 16, False, False, 0)
    attention = DecodeAttention(HEADS, DIM, torch.device(DEVICE))
    with pytest.raises(ValueError, match="copies=2: 17 tokens have none; the limit is 16"):
        attention(case.gqkv, case.k_cache, case.v_cache, case.batch, copies=2)


def test_padding_rows_write_nothing() -> None:
    case = Case([5, 9], 16, False, False, 0)
    case.batch.write_slots[1] = -1
    before = case.k_cache.clone()
    attend(case)
    assert torch.equal(case.k_cache[case.pages[1]], before[case.pages[1]])
    assert not torch.equal(case.k_cache[case.pages[0]], before[case.pages[0]])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("cache", ["k_cache", "v_cache"])
@pytest.mark.parametrize("length", [40, 150])  # one piece, and several to combine
def test_bad_numbers_come_through(bad: float, cache: str, length: int) -> None:
    case = Case([length, length], 1, True, False, 0)
    getattr(case, cache)[case.pages[0][7], 0] = bad
    got = attend(case)
    assert not got[0].isfinite().any()
    assert got[1].isfinite().all()


def make_padding(case: Case) -> None:
    """Two rows behind the first: one as SGLang has it (one token, slot 0) and one as vLLM does (no token, slot -1)."""
    assert case.batch.lengths is not None
    case.batch.lengths[1:] = torch.tensor([1, 0])
    case.batch.positions[1:] = 0
    case.batch.write_slots[1:] = torch.tensor([0, -1])
    case.batch.table[1:] = 0


def test_graph_padding_reads_nothing() -> None:
    case = Case([5, 9, 9], 16, False, False, 0)
    make_padding(case)
    before = case.k_cache.clone()
    got = attend(case)
    assert got.isfinite().all()
    changed = (case.k_cache != before).flatten(2).any(-1).nonzero().tolist()
    assert changed == [[0, 0], [case.pages[0][0], 4]]


def spoil_all_but_earlier_tokens(case: Case) -> None:
    """Every line of the cache that belongs to no earlier token is NaN, those of the new tokens included."""
    places = [
        (pages[at // case.page_size], at % case.page_size)
        for pages, length in zip(case.pages, case.lengths, strict=True)
        for at in range(length - 1)
    ]
    earlier = tuple(torch.tensor(places, dtype=torch.int64, device=DEVICE).view(-1, 2).unbind(1))
    for cache in (case.k_cache, case.v_cache):
        kept = cache[earlier]
        cache[:] = float("nan")
        cache[earlier] = kept


@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    lengths=st.lists(st.integers(1, 40) | st.integers(1, 600), min_size=1, max_size=20),
    page_size=st.sampled_from([1, 16, 32]),
    ragged=st.booleans(),
    normed=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_nothing_but_earlier_tokens_is_read(
    lengths: list[int], page_size: int, ragged: bool, normed: bool, seed: int
) -> None:
    """Every line of the cache that belongs to no earlier token is NaN, those of the new tokens included."""
    case = Case(lengths, 1 if ragged else page_size, ragged, normed, seed)
    expected, _, _ = case.expected()
    spoil_all_but_earlier_tokens(case)
    assert error(attend(case), expected) <= TOLERANCE


@settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    lengths=st.lists(st.integers(1, 40) | st.integers(1, 600), min_size=17, max_size=20),
    page_size=st.sampled_from([1, 16, 32]),
    ragged=st.booleans(),
    normed=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_many_requests_read_their_own_tokens_only(
    lengths: list[int], page_size: int, ragged: bool, normed: bool, seed: int
) -> None:
    """Everything in the cache that belongs to no earlier token is NaN; contexts are split into many pieces."""
    case = Case(lengths, 1 if ragged else page_size, ragged, normed, seed)
    expected, _, _ = case.expected()
    spoil_all_but_earlier_tokens(case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_many, "piece_for", lambda _: 32)
        attention = DecodeAttention(HEADS, DIM, torch.device(DEVICE))
        for _ in range(2):
            assert error(attend(case, attention), expected) <= TOLERANCE
    assert not attention.many.arrivals.any()


def test_splits_leave_results_as_they_are_in_another_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A context is split by its length: not by what stands beside it, while there are programs for all pieces."""
    monkeypatch.setattr(attention_many, "piece_for", lambda _: 32)
    lengths = [200, 150, 3] + [20] * 15
    case = Case(lengths, 1, False, False, 0)
    whole = attend(case)
    order = list(reversed(range(len(lengths))))
    batch = case.batch
    assert batch.lengths is not None
    case.batch = replace(
        batch,
        positions=batch.positions[order],
        write_slots=batch.write_slots[order],
        table=batch.table[order],
        lengths=batch.lengths[order],
    )
    case.gqkv = case.gqkv[order]
    assert torch.equal(attend(case)[order], whole)


def test_what_half_precision_cuts_off_is_kept() -> None:
    """Query and weights count in float32, though the tensor cores take the cache's type (float16: the interpreter
    multiplies no bfloat16).
    """
    case = Case([40] * 17, 16, False, False, 0)
    case.k_cache, case.v_cache = case.k_cache.half(), case.v_cache.half()
    case.gqkv = 4 * case.gqkv.float()
    got = attend(case)  # first: it writes the new token, which it attends to as the cache holds it
    gate, q, _, _ = case.gqkv.double().view(-1, 4, HEADS, DIM).unbind(1)
    q = case.rotated(q)
    rows = []
    for row, pages in enumerate(case.pages):
        keys, values = (cache[pages].double().flatten(0, 1)[:40] for cache in (case.k_cache, case.v_cache))
        weights = torch.einsum("hd,thd->ht", q[row] * DIM**-0.5, keys).softmax(-1)
        rows.append(torch.einsum("ht,thd->hd", weights, values))
    assert error(got, (torch.stack(rows) * gate.sigmoid()).flatten(1)) <= 2e-5


def test_few_tokens_come_normed() -> None:
    case = Case([5], 16, False, False, 0)
    case.x = draw(1, HEADS * DIM, seed=1)
    with pytest.raises(ValueError, match="x: 1 tokens take a gqkv that is normed; the limit is 16"):
        attend(case)
