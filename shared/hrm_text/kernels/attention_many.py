"""Decode attention of many requests: enough programs to fill the chip, so only long contexts are split.

A program takes one head of one request and is one warp. Its query stands in eight rows of a tensor-core tile, and
what bf16 cuts off it in eight more, so scores and mixture are as exact as in float32 and cost a fifth of the
instructions. A few programs behind those of the requests take what long contexts give away, and leave otherwise.
"""

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from hrm_text.kernels.attention_parts import (
    combined,
    lines_of,
    offset_type,
    pages_of,
    rotated,
    scratch,
    strides_of,
)
from hrm_text.kernels.launch import dependent_launch, launch_options

if TYPE_CHECKING:
    from hrm_text.kernels.attention import DecodeBatch

BLOCK = 16  # tokens a program takes at a time
MAX_PIECES = 16  # of a context
EXTRA_PROGRAMS = 32  # a head


@triton.jit
def _two_halves(x, dtype: tl.constexpr):
    """(8, n) as (16, n) of `dtype`: what it holds, and below that what rounding cut off."""
    high = x.to(dtype)
    low = (x - high.to(tl.float32)).to(dtype)
    return tl.reshape(tl.permute(tl.join(high, low), (2, 0, 1)), (16, x.shape[1]))


@triton.jit
def _summed_halves(x):
    """(16, n) as (8, n): the products of both halves as one."""
    return tl.sum(tl.reshape(x, (2, 8, x.shape[1])), 0)


@triton.jit
def _attend(q, k, v, inside, peak, total, mixed):
    """A block of keys and values into a running softmax (base 2); `total` is summed over its places at the end."""
    score = _summed_halves(tl.dot(q, tl.trans(k), input_precision="ieee"))
    score = tl.where(inside[None, :], score, -float("inf"))
    new_peak = tl.maximum(peak, tl.max(score, 1))  # never -inf; a NaN comes through the weights
    keep = tl.exp2(peak - new_peak)
    weight = tl.exp2(score - new_peak[:, None])
    kept = tl.reshape(tl.broadcast_to(keep[None, :], (2, 8)), (16,))
    mixed = tl.dot(_two_halves(weight, v.dtype), v, mixed * kept[:, None], input_precision="ieee")
    return new_peak, total * keep[:, None] + weight, mixed


@triton.jit
def _wait(turn):
    """0, once the kernel before has ended: `gdc_wait` for use in a loop, which Triton 3.9 does not pipeline with that.

    What must not be read earlier has an address to which this is added.
    """
    wait: tl.constexpr = "griddepcontrol.wait; mov.u32 $0, 0; // $1"
    return tl.inline_asm_elementwise(wait, "=r,r", [turn], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _given_away(cached, there, limit, piece, EXTRA: tl.constexpr):
    """How many pieces each context gives to the extra programs; longer pieces where those would be too many."""
    counts = tl.where(there, tl.minimum(tl.maximum(cached // piece, 1), limit) - 1, 0)
    while tl.sum(counts, 0) > EXTRA:
        piece *= 2
        counts = tl.where(there, tl.minimum(tl.maximum(cached // piece, 1), limit) - 1, 0)
    return counts


@triton.jit(do_not_specialize=["requests", "piece"])  # one compilation, not one for multiples of 16 too
def _decode_many(
    gqkv_ptr, x_ptr, out_ptr, k_ptr, v_ptr, cos_sin_ptr, positions_ptr, write_slots_ptr,
    table_ptr, row_starts_ptr, lengths_ptr, partial_ptr, stats_ptr, arrivals_ptr,
    requests, piece, table_stride, scale, eps,
    HEADS: tl.constexpr, DIM: tl.constexpr, HIDDEN: tl.constexpr, WIDE: tl.constexpr, PAGE: tl.constexpr,
    K_PAGE: tl.constexpr, K_LINE: tl.constexpr, K_HEAD: tl.constexpr,
    V_PAGE: tl.constexpr, V_LINE: tl.constexpr, V_HEAD: tl.constexpr, OFFSETS: tl.constexpr,
    RAGGED: tl.constexpr, REQUESTS: tl.constexpr, EXTRA: tl.constexpr, PIECES: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    head, request = tl.program_id(0), tl.program_id(1)
    split, pieces, slot = 0, 1, 0  # slot: of the context's first piece in the scratch memory
    one = request < requests
    if one:
        if RAGGED:
            cached = (tl.load(row_starts_ptr + request + 1) - tl.load(row_starts_ptr + request)).to(tl.int32) - 1
        else:
            cached = tl.load(lengths_ptr + request) - 1
    else:
        cached = 2 * piece
    if cached >= 2 * piece:
        each = tl.arange(0, REQUESTS)
        there = each < requests
        if RAGGED:
            begins = tl.load(row_starts_ptr + each, mask=there, other=0)
            all_cached = (tl.load(row_starts_ptr + each + 1, mask=there, other=0) - begins).to(tl.int32) - 1
        else:
            all_cached = tl.load(lengths_ptr + each, mask=there, other=0) - 1
        counts = _given_away(all_cached, there, PIECES, piece, EXTRA)
        if one:
            slot = tl.sum(tl.where(each < request, counts, 0), 0)
            split = tl.sum(tl.where(each == request, counts, 0), 0)
            pieces = split + 1
        else:
            wanted = request - requests
            if wanted >= tl.sum(counts, 0):
                return
            ends = tl.cumsum(counts, 0)
            request = tl.sum((ends <= wanted).to(tl.int32), 0)
            slot = tl.sum(tl.where(each < request, counts, 0), 0)
            split = wanted - slot
            pieces = tl.sum(tl.where(each == request, counts, 0), 0) + 1
            cached = tl.sum(tl.where(each == request, all_cached, 0), 0)
    if RAGGED:  # noqa: SIM108 - the compiler takes one branch
        first = tl.load(row_starts_ptr + request).to(tl.int64)
    else:
        first = request.to(tl.int64) * table_stride
    last = split == pieces - 1
    begin = cached * split // pieces // BLOCK * BLOCK
    end = tl.where(last, cached, cached * (split + 1) // pieces // BLOCK * BLOCK)
    HALF: tl.constexpr = DIM // 2
    full = tl.arange(0, DIM)
    offset = tl.arange(0, BLOCK)
    k_base, v_base = k_ptr + head * K_HEAD, v_ptr + head * V_HEAD

    page = pages_of(table_ptr, first, begin, offset, end, PAGE, BLOCK)
    write_slot = tl.load(write_slots_ptr + request).to(tl.int64)
    place = tl.load(positions_ptr + request)
    cos = tl.load(cos_sin_ptr + place * DIM + full % HALF).to(tl.float32)
    sin = tl.load(cos_sin_ptr + place * DIM + HALF + full % HALF).to(tl.float32)
    sign_sin = tl.where(full < HALF, -sin, sin)

    # The KV of earlier tokens is not this chain's, and Triton asks for the first blocks of a loop before its first
    # turn: so the wait, and what needs what it waits for, stand in that turn. There is always one.
    dtype: tl.constexpr = k_ptr.dtype.element_ty
    gate = tl.zeros((DIM,), gqkv_ptr.dtype.element_ty)
    factor = tl.full((), 1.0, tl.float32)
    own = tl.full((), 0.0, tl.float32)
    q = tl.zeros((16, DIM), dtype)
    peak = tl.zeros((8,), tl.float32)
    total = tl.zeros((8, BLOCK), tl.float32)
    mixed = tl.zeros((16, DIM), tl.float32)
    for at in tl.range(begin, tl.maximum(end, begin + BLOCK), BLOCK, num_stages=STAGES):
        k_lines = lines_of(page, at, offset, PAGE, BLOCK, K_PAGE, K_LINE, OFFSETS)
        v_lines = lines_of(page, at, offset, PAGE, BLOCK, V_PAGE, V_LINE, OFFSETS)
        inside = at + offset < end
        k = tl.load(k_base + k_lines[:, None] + full[None, :], mask=inside[:, None], other=0.0)
        v = tl.load(v_base + v_lines[:, None] + full[None, :], mask=inside[:, None], other=0.0)
        # Asked for one block ahead: the loads of the next one would wait for it.
        page = pages_of(table_ptr, first, at + BLOCK, offset, end, PAGE, BLOCK)
        if at == begin:
            zero = 0  # a multiple of 128, as the compiler can see
            if PDL:
                zero = _wait(at) * 128
            # All that the last kernel wrote is asked for at once.
            row = gqkv_ptr + zero + request * 4 * HEADS * DIM + head * DIM
            gate = tl.load(row + full)
            query = rotated(row + HEADS * DIM, full, cos, sign_sin, HALF, DIM)
            key = rotated(row + 2 * HEADS * DIM, full, cos, sign_sin, HALF, DIM)
            value = tl.load(row + 3 * HEADS * DIM + full).to(tl.float32)
            if NORM:
                each_x = tl.arange(0, WIDE)
                x = tl.load(x_ptr + zero + request * HIDDEN + each_x, mask=each_x < HIDDEN, other=0.0).to(tl.float32)
                factor = 1.0 / tl.sqrt(tl.sum(x * x, 0) / HIDDEN + eps)
                query, key, value = query * factor, key * factor, value * factor
            query = query * (scale * 1.4426950408889634)
            # The new token's key and value are attended to as the cache will hold them. Every piece starts from their
            # score, so no peak is ever -inf, but only the last one counts them.
            new_key, new_value = key.to(dtype), value.to(dtype)
            own = tl.sum(new_key.to(tl.float32) * query, 0)
            peak = tl.zeros((8,), tl.float32) + own
            counted = last & (tl.arange(0, 16) < 8)
            mixed = tl.where(counted[:, None], new_value[None, :].to(tl.float32), 0.0)
            if last & (write_slot >= 0):
                tl.store(k_base + (write_slot // PAGE) * K_PAGE + (write_slot % PAGE) * K_LINE + full, new_key)
                tl.store(v_base + (write_slot // PAGE) * V_PAGE + (write_slot % PAGE) * V_LINE + full, new_value)
            # By way of a product, whose layout lets the loop carry it in registers as it needs it.
            unit = (tl.arange(0, 16)[:, None] == tl.arange(0, 16)[None, :]).to(dtype)
            halves = _two_halves(tl.broadcast_to(query[None, :], (8, DIM)), dtype)
            q = tl.dot(unit, halves, input_precision="ieee").to(dtype)
        peak, total, mixed = _attend(q, k, v, inside, peak, total, mixed)

    # Eight equal rows: their sum and an eighth of it are exact.
    top = tl.max(peak, 0)
    weights = tl.sum(tl.sum(total, 1), 0) * 0.125
    result = tl.sum(mixed, 0) * 0.125
    weights += tl.where(last, tl.exp2(own - top), 0.0)

    out = out_ptr + request * HEADS * DIM + head * DIM + full
    gate = tl.sigmoid(gate.to(tl.float32) * factor)
    if pieces == 1:
        tl.store(out, (result / weights * gate).to(out_ptr.dtype.element_ty))
    else:
        own_slot = (tl.where(last, EXTRA + slot, slot + split) * HEADS + head).to(tl.int64)
        tl.store(partial_ptr + own_slot * DIM + full, result)
        tl.store(stats_ptr + own_slot * 2, top)
        tl.store(stats_ptr + own_slot * 2 + 1, weights)
        tl.debug_barrier()  # every thread's part is stored before the arrival that announces it
        if tl.atomic_add(arrivals_ptr + slot * HEADS + head, 1, sem="acq_rel") == pieces - 1:
            tl.store(arrivals_ptr + slot * HEADS + head, 0)
            each_piece = tl.arange(0, PIECES)
            slots = (tl.where(each_piece == pieces - 1, EXTRA + slot, slot + each_piece) * HEADS + head).to(tl.int64)
            whole = combined(partial_ptr, stats_ptr, slots, each_piece < pieces, full, DIM)
            tl.store(out, (whole * gate).to(out_ptr.dtype.element_ty))


class ManyRequests:
    """Decode attention of many requests with its scratch memory, which every layer of every step shares.

    Args:
        heads, head_dim: shape of the attention.
        device: where it runs.
    """

    def __init__(self, heads: int, head_dim: int, device: torch.device) -> None:
        self.heads, self.head_dim = heads, head_dim
        # Of each split context its last piece, and those that it gives away.
        self.partial, self.stats, self.arrivals = scratch(
            2 * EXTRA_PROGRAMS * heads, EXTRA_PROGRAMS * heads, head_dim, device
        )

    def __call__(
        self,
        gqkv: torch.Tensor,
        out: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        batch: "DecodeBatch",
        x: torch.Tensor | None,
        eps: float,
    ) -> Any:
        """Fill `out`; the rest as `DecodeAttention` takes it. The compiled kernel."""
        requests, hidden = len(gqkv), 1 if x is None else x.shape[1]
        return _decode_many[(self.heads, requests + EXTRA_PROGRAMS)](
            gqkv, x, out, k_cache, v_cache, batch.cos_sin, batch.positions, batch.write_slots,
            batch.table, batch.row_starts, batch.lengths, self.partial, self.stats, self.arrivals,
            requests, piece_for(requests), batch.table.stride(0), self.head_dim**-0.5, eps,
            HEADS=self.heads, DIM=self.head_dim, HIDDEN=hidden, WIDE=triton.next_power_of_2(hidden),
            PAGE=batch.page_size, OFFSETS=offset_type(k_cache, v_cache), RAGGED=batch.row_starts is not None,
            REQUESTS=max(128, triton.next_power_of_2(requests)), EXTRA=EXTRA_PROGRAMS, PIECES=MAX_PIECES,
            BLOCK=BLOCK, STAGES=stages_for(requests), NORM=x is not None,
            PDL=dependent_launch(gqkv.device), num_warps=1, **strides_of(k_cache, v_cache),
            **launch_options(gqkv.device),
        )  # fmt: skip


def stages_for(requests: int) -> int:
    """Stages of a program's pipeline: as deep as pays while the shared memory of all programs fits the chip at once."""
    return 4 if requests <= 64 else 3


def piece_for(requests: int) -> int:
    """Tokens that a piece of a split context has at least: fewer where whole contexts do not fill the chip.

    Steps of 17 x 576 took 7.2 ms on an H200 with pieces of 512, 6.1 with 256; of 32 x 576 7.8 and 7.9.
    """
    return 256 if requests <= 24 else 512
