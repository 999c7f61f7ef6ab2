"""Decode attention of one layer with what surrounds it: norm factor and RoPE, the KV write, the gate.

One query token a request, its KV in pages that a table names. A program takes one head of one request, or
a split of its context; the last split to arrive combines them, so there is no second kernel.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from hrm_text.kernels.launch import dependent_launch, launch_options

MAX_SPLITS = 16
MAX_SPLIT_TOKENS = 16  # larger batches fill the chip without splits


@dataclass(frozen=True)
class DecodeBatch:
    """Where the tokens of a decode batch stand and where their KV lies; the same for every layer.

    Attributes:
        positions: (tokens,) integer, position of each request's new token.
        write_slots: (tokens,) integer, KV slot of the new token; negative for a padding row.
        table: integer; page numbers of each request's context, the new token included.
        row_starts: (tokens + 1,) int32 offsets into a flat `table`, or None where `table` is (tokens, pages).
        lengths: (tokens,) int32 context lengths, new token included; None where `row_starts` has them.
        page_size: tokens a page.
        cos_sin: (positions, head_dim), [cos | sin] of each position, as both engines' RoPE layers keep it.
    """

    positions: torch.Tensor
    write_slots: torch.Tensor
    table: torch.Tensor
    row_starts: torch.Tensor | None
    lengths: torch.Tensor | None
    page_size: int
    cos_sin: torch.Tensor


@triton.jit
def _attend(q1, q2, k1, k2, v, inside, peak, total, mixed):
    """One block of keys and values into the running softmax (base 2)."""
    score = tl.sum(k1.to(tl.float32) * q1[None, :] + k2.to(tl.float32) * q2[None, :], 1)
    score = tl.where(inside, score, -float("inf"))
    new_peak = tl.maximum(peak, tl.max(score, 0))
    # A split without a single token keeps -inf, and -inf - -inf would be NaN.
    safe = tl.where(new_peak == -float("inf"), 0.0, new_peak)
    keep = tl.exp2(peak - safe)
    weight = tl.exp2(score - safe)
    mixed = mixed * keep + tl.sum(weight[:, None] * v.to(tl.float32), 0)
    return new_peak, total * keep + tl.sum(weight, 0), mixed


@triton.jit
def _slots(table_ptr, first, position, inside, PAGE):
    page = tl.load(table_ptr + first + position // PAGE, mask=inside, other=0).to(tl.int64)
    return page, position % PAGE


@triton.jit
def _decode(
    gqkv_ptr, x_ptr, out_ptr, k_ptr, v_ptr, cos_sin_ptr, positions_ptr, write_slots_ptr,
    table_ptr, row_starts_ptr, lengths_ptr, partial_ptr, stats_ptr, arrivals_ptr,
    table_stride, k_page, k_token, k_head, v_page, v_token, v_head, scale, eps,
    HEADS: tl.constexpr, DIM: tl.constexpr, HIDDEN: tl.constexpr, WIDE: tl.constexpr, PAGE: tl.constexpr,
    RAGGED: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    head, split, request = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if RAGGED:
        first = tl.load(row_starts_ptr + request)
        length = tl.load(row_starts_ptr + request + 1) - first
    else:
        first = request.to(tl.int64) * table_stride
        length = tl.load(lengths_ptr + request)
    cached = length - 1
    chunk = tl.cdiv(cached, SPLITS * BLOCK) * BLOCK
    begin = split * chunk
    end = tl.minimum(begin + chunk, cached)
    HALF: tl.constexpr = DIM // 2
    half, full = tl.arange(0, HALF), tl.arange(0, DIM)
    offset = tl.arange(0, BLOCK)

    # The KV of earlier tokens is not this chain's, so the first block of it is fetched before the wait.
    position = begin + offset
    inside = position < end
    page, line = _slots(table_ptr, first, position, inside, PAGE)
    k_row = k_ptr + (page * k_page + line * k_token + head * k_head)[:, None]
    v_row = v_ptr + (page * v_page + line * v_token + head * v_head)[:, None]
    k1 = tl.load(k_row + half[None, :], mask=inside[:, None], other=0.0)
    k2 = tl.load(k_row + HALF + half[None, :], mask=inside[:, None], other=0.0)
    v = tl.load(v_row + full[None, :], mask=inside[:, None], other=0.0)
    place = tl.load(positions_ptr + request)
    cos = tl.load(cos_sin_ptr + place * DIM + half).to(tl.float32)
    sin = tl.load(cos_sin_ptr + place * DIM + HALF + half).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_wait()

    factor = 1.0
    if NORM:
        column = tl.arange(0, WIDE)
        x = tl.load(x_ptr + request * HIDDEN + column, mask=column < HIDDEN, other=0.0).to(tl.float32)
        factor = 1.0 / tl.sqrt(tl.sum(x * x, 0) / HIDDEN + eps)
    row = gqkv_ptr + request * 4 * HEADS * DIM + head * DIM
    a = tl.load(row + HEADS * DIM + half).to(tl.float32) * factor
    b = tl.load(row + HEADS * DIM + HALF + half).to(tl.float32) * factor
    to_base_2 = scale * 1.4426950408889634
    q1, q2 = (a * cos - b * sin) * to_base_2, (b * cos + a * sin) * to_base_2

    peak, total = -float("inf"), 0.0
    mixed = tl.zeros((DIM,), tl.float32)
    peak, total, mixed = _attend(q1, q2, k1, k2, v, inside, peak, total, mixed)
    for at in range(begin + BLOCK, end, BLOCK):
        position = at + offset
        inside = position < end
        page, line = _slots(table_ptr, first, position, inside, PAGE)
        k_row = k_ptr + (page * k_page + line * k_token + head * k_head)[:, None]
        v_row = v_ptr + (page * v_page + line * v_token + head * v_head)[:, None]
        k1 = tl.load(k_row + half[None, :], mask=inside[:, None], other=0.0)
        k2 = tl.load(k_row + HALF + half[None, :], mask=inside[:, None], other=0.0)
        v = tl.load(v_row + full[None, :], mask=inside[:, None], other=0.0)
        peak, total, mixed = _attend(q1, q2, k1, k2, v, inside, peak, total, mixed)

    if split == SPLITS - 1:
        # The new token: its key and value come from the projection and go to the cache on the way.
        kind = k_ptr.dtype.element_ty
        a = tl.load(row + 2 * HEADS * DIM + half).to(tl.float32) * factor
        b = tl.load(row + 2 * HEADS * DIM + HALF + half).to(tl.float32) * factor
        new1, new2 = (a * cos - b * sin).to(kind), (b * cos + a * sin).to(kind)
        value = (tl.load(row + 3 * HEADS * DIM + full).to(tl.float32) * factor).to(kind)
        slot = tl.load(write_slots_ptr + request).to(tl.int64)
        if slot >= 0:
            k_new = k_ptr + (slot // PAGE) * k_page + (slot % PAGE) * k_token + head * k_head
            v_new = v_ptr + (slot // PAGE) * v_page + (slot % PAGE) * v_token + head * v_head
            tl.store(k_new + half, new1)
            tl.store(k_new + HALF + half, new2)
            tl.store(v_new + full, value)
        score = tl.sum(new1.to(tl.float32) * q1 + new2.to(tl.float32) * q2, 0)
        new_peak = tl.maximum(peak, score)
        keep, weight = tl.exp2(peak - new_peak), tl.exp2(score - new_peak)
        mixed = mixed * keep + weight * value.to(tl.float32)
        total = total * keep + weight
        peak = new_peak

    out = out_ptr + request * HEADS * DIM + head * DIM + full
    gate = tl.sigmoid(tl.load(row + full).to(tl.float32) * factor)
    if SPLITS == 1:
        tl.store(out, (mixed / total * gate).to(out_ptr.dtype.element_ty))
    else:
        pair = request * HEADS + head
        tl.store(partial_ptr + (pair * SPLITS + split) * DIM + full, mixed)
        tl.store(stats_ptr + (pair * SPLITS + split) * 2, peak)
        tl.store(stats_ptr + (pair * SPLITS + split) * 2 + 1, total)
        tl.debug_barrier()  # every thread's part is stored before the arrival that announces it
        if tl.atomic_add(arrivals_ptr + pair, 1, sem="acq_rel") == SPLITS - 1:
            tl.store(arrivals_ptr + pair, 0)
            each = tl.arange(0, SPLITS)
            peaks = tl.load(stats_ptr + (pair * SPLITS + each) * 2, cache_modifier=".cg")
            totals = tl.load(stats_ptr + (pair * SPLITS + each) * 2 + 1, cache_modifier=".cg")
            share = tl.exp2(peaks - tl.max(peaks, 0))
            parts = tl.load(partial_ptr + ((pair * SPLITS + each) * DIM)[:, None] + full[None, :], cache_modifier=".cg")
            result = tl.sum(parts * share[:, None], 0) / tl.sum(totals * share, 0)
            tl.store(out, (result * gate).to(out_ptr.dtype.element_ty))


def splits_for(tokens: int, heads: int) -> int:
    """Splits of a context: enough programs for a small batch to keep the chip busy, a power of two."""
    if tokens > MAX_SPLIT_TOKENS:
        return 1
    wanted = max(1, 192 // (tokens * heads))
    return min(MAX_SPLITS, 1 << (wanted.bit_length() - 1))


class DecodeAttention:
    """Decode attention with its scratch memory, which every layer of every step shares.

    Args:
        heads, head_dim: shape of the attention.
        device: where it runs.
    """

    def __init__(self, heads: int, head_dim: int, device: torch.device) -> None:
        self.heads, self.head_dim = heads, head_dim
        room = max(tokens * splits_for(tokens, heads) for tokens in range(1, MAX_SPLIT_TOKENS + 1))
        self.partial = torch.empty(room * heads * head_dim, dtype=torch.float32, device=device)
        self.stats = torch.empty(room * heads * 2, dtype=torch.float32, device=device)
        self.arrivals = torch.zeros(MAX_SPLIT_TOKENS * heads, dtype=torch.int32, device=device)

    def __call__(
        self,
        gqkv: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        batch: DecodeBatch,
        *,
        x: torch.Tensor | None = None,
        eps: float = 0.0,
    ) -> torch.Tensor:
        """Gated attention output, (tokens, heads * head_dim); writes the new token's key and value.

        Args:
            gqkv: (tokens, 4 * heads * head_dim), [gate | q | k | v] before RoPE.
            k_cache, v_cache: (pages, page_size, heads, head_dim), any strides but the last.
            batch: where it all stands.
            x: (tokens, hidden), whose RMSNorm factor `gqkv` still lacks; None where it has it.
            eps: of that RMSNorm.
        """
        tokens = gqkv.shape[0]
        splits = splits_for(tokens, self.heads)
        out = torch.empty(tokens, self.heads * self.head_dim, dtype=gqkv.dtype, device=gqkv.device)
        hidden = 1 if x is None else x.shape[1]
        _decode[(self.heads, splits, tokens)](
            gqkv, x, out, k_cache, v_cache, batch.cos_sin, batch.positions, batch.write_slots,
            batch.table, batch.row_starts, batch.lengths, self.partial, self.stats, self.arrivals,
            batch.table.stride(0), *k_cache.stride()[:3], *v_cache.stride()[:3], self.head_dim**-0.5, eps,
            HEADS=self.heads, DIM=self.head_dim, HIDDEN=hidden, WIDE=triton.next_power_of_2(hidden),
            PAGE=batch.page_size, RAGGED=batch.row_starts is not None, SPLITS=splits,
            BLOCK=block_for(splits), NORM=x is not None, PDL=dependent_launch(gqkv.device),
            num_warps=4, **launch_options(gqkv.device),
        )  # fmt: skip
        return out


def block_for(splits: int) -> int:
    """Tokens a program takes at a time."""
    return 32 if splits > 1 else 64
