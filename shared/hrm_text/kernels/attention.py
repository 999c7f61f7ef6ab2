"""Decode attention of one layer with what surrounds it: RoPE, the KV write, the gate.

One query token a request, its KV in pages that a table names. On Hopper up to 128 requests run on CUDA
(`attention_hopper`). Here a program takes a split of the context of one head of one request; the last split to arrive
combines them, so there is no second kernel. Many requests have a kernel of their own, in `attention_many`.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from hrm_text.kernels.attention_hopper import MAX_TOKENS as MAX_CUDA_TOKENS
from hrm_text.kernels.attention_hopper import paged_attention, takes
from hrm_text.kernels.attention_many import ManyRequests
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
from hrm_text.kernels.nvrtc import carve_out
from hrm_text.kernels.pointwise import in_blocks_at
from hrm_text.kernels.staged import room_for

MAX_SPLITS = 32
MAX_SPLIT_TOKENS = 16  # larger batches fill the chip with fewer
# Of a thread: what four warps of `down` and two of gqkv leave of the 16,384 of a multiprocessor's quarter (staged.py).
# With 114, which are dealt as 120, a program waits until `down` has ended: 0.4 ms of a step of 8 x 192.
REGISTERS = 112


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
def _attend(q, k, v, inside, peak, total, mixed):
    """A block of keys and values into running softmaxes (base 2), one for each place in the block.

    So nothing crosses a warp until the context ends.
    """
    score = tl.where(inside, tl.sum(k.to(tl.float32) * q[None, :], 1), -float("inf"))
    new_peak = tl.maximum(peak, score, propagate_nan=tl.PropagateNan.ALL)
    # A place without a token yet keeps -inf, and -inf - -inf would be NaN.
    safe = tl.where(new_peak == -float("inf"), 0.0, new_peak)
    keep = tl.exp2(peak - safe)
    weight = tl.exp2(score - safe)
    return new_peak, total * keep + weight, mixed * keep[:, None] + weight[:, None] * v.to(tl.float32)


@triton.jit
def _store(out, request, requests, column, value, WIDTH: tl.constexpr, COPIES: tl.constexpr):
    """A head's output: in a row, or copies of it in blocks (`staged.in_blocks`)."""
    value = value.to(out.dtype.element_ty)
    if COPIES == 0:
        tl.store(out + request * WIDTH + column, value)
    for copy in tl.static_range(COPIES):
        tl.store(out + copy * requests * WIDTH + in_blocks_at(request, requests, column), value)


@triton.jit
def _decode(
    gqkv_ptr, out_ptr, k_ptr, v_ptr, cos_sin_ptr, positions_ptr, write_slots_ptr,
    table_ptr, row_starts_ptr, lengths_ptr, partial_ptr, stats_ptr, arrivals_ptr, table_stride, scale,
    HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr,
    K_PAGE: tl.constexpr, K_LINE: tl.constexpr, K_HEAD: tl.constexpr,
    V_PAGE: tl.constexpr, V_LINE: tl.constexpr, V_HEAD: tl.constexpr, OFFSETS: tl.constexpr,
    RAGGED: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, COPIES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    head, split, request = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if RAGGED:
        first = tl.load(row_starts_ptr + request).to(tl.int64)
        length = (tl.load(row_starts_ptr + request + 1) - first).to(tl.int32)
    else:
        first = request.to(tl.int64) * table_stride
        length = tl.load(lengths_ptr + request)
    # A short context has fewer pieces than there are programs for them.
    cached = length - 1
    chunk = tl.maximum(tl.cdiv(cached, SPLITS * BLOCK), 1) * BLOCK
    pieces = tl.maximum(tl.cdiv(cached, chunk), 1)
    if split >= pieces:
        return
    last = split == pieces - 1
    begin = split * chunk
    end = tl.minimum(begin + chunk, cached)
    HALF: tl.constexpr = DIM // 2
    full = tl.arange(0, DIM)
    offset = tl.arange(0, BLOCK)
    k_base, v_base = k_ptr + head * K_HEAD, v_ptr + head * V_HEAD

    page = pages_of(table_ptr, first, begin, offset, end, PAGE, BLOCK)
    slot = tl.load(write_slots_ptr + request).to(tl.int64)
    place = tl.load(positions_ptr + request)
    cos = tl.load(cos_sin_ptr + place * DIM + full % HALF).to(tl.float32)
    sin = tl.load(cos_sin_ptr + place * DIM + HALF + full % HALF).to(tl.float32)
    sign_sin = tl.where(full < HALF, -sin, sin)

    # The KV of earlier tokens is not this chain's, so the first block of it is fetched before the wait.
    inside = begin + offset < end
    lines = lines_of(page, begin, offset, PAGE, BLOCK, K_PAGE, K_LINE, OFFSETS)
    k = tl.load(k_base + lines[:, None] + full[None, :], mask=inside[:, None], other=0.0)
    lines = lines_of(page, begin, offset, PAGE, BLOCK, V_PAGE, V_LINE, OFFSETS)
    v = tl.load(v_base + lines[:, None] + full[None, :], mask=inside[:, None], other=0.0)
    page = pages_of(table_ptr, first, begin + BLOCK, offset, end, PAGE, BLOCK)
    if PDL:
        tl.extra.cuda.gdc_wait()

    # All that the last kernel wrote is asked for at once: sums in between wait for all warps.
    row = gqkv_ptr + request * 4 * HEADS * DIM + head * DIM
    gate = tl.load(row + full)
    q = rotated(row + HEADS * DIM, full, cos, sign_sin, HALF, DIM) * (scale * 1.4426950408889634)
    key = rotated(row + 2 * HEADS * DIM, full, cos, sign_sin, HALF, DIM)
    value = tl.load(row + 3 * HEADS * DIM + full)

    peak = tl.full((BLOCK,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    mixed = tl.zeros((BLOCK, DIM), tl.float32)
    peak, total, mixed = _attend(q, k, v, inside, peak, total, mixed)
    for at in tl.range(begin + BLOCK, end, BLOCK, num_stages=STAGES):
        inside = at + offset < end
        lines = lines_of(page, at, offset, PAGE, BLOCK, K_PAGE, K_LINE, OFFSETS)
        k = tl.load(k_base + lines[:, None] + full[None, :], mask=inside[:, None], other=0.0)
        lines = lines_of(page, at, offset, PAGE, BLOCK, V_PAGE, V_LINE, OFFSETS)
        v = tl.load(v_base + lines[:, None] + full[None, :], mask=inside[:, None], other=0.0)
        # Asked for one block ahead: the loads of the next one would wait for it.
        page = pages_of(table_ptr, first, at + BLOCK, offset, end, PAGE, BLOCK)
        peak, total, mixed = _attend(q, k, v, inside, peak, total, mixed)

    top = tl.max(peak, 0)
    share = tl.exp2(peak - tl.where(top == -float("inf"), 0.0, top))
    result = tl.sum(mixed * share[:, None], 0)
    weights = tl.sum(total * share, 0)

    if last:
        # The new token's key and value go to the cache on the way, and are attended to as the cache holds them.
        new_key, new_value = key.to(k_ptr.dtype.element_ty), value.to(v_ptr.dtype.element_ty)
        if slot >= 0:
            tl.store(k_base + (slot // PAGE) * K_PAGE + (slot % PAGE) * K_LINE + full, new_key)
            tl.store(v_base + (slot // PAGE) * V_PAGE + (slot % PAGE) * V_LINE + full, new_value)
        score = tl.sum(new_key.to(tl.float32) * q, 0)
        new_top = tl.maximum(top, score)
        keep, weight = tl.exp2(top - new_top), tl.exp2(score - new_top)
        result = result * keep + weight * new_value.to(tl.float32)
        weights = weights * keep + weight
        top = new_top

    gate = tl.sigmoid(gate.to(tl.float32))
    requests, column = tl.num_programs(2), head * DIM + full
    if SPLITS == 1:  # noqa: SIM114 - known to the compiler, which leaves the rest out
        _store(out_ptr, request, requests, column, result / weights * gate, HEADS * DIM, COPIES)
    elif pieces == 1:
        _store(out_ptr, request, requests, column, result / weights * gate, HEADS * DIM, COPIES)
    else:
        pair = request * HEADS + head
        partial, stats = partial_ptr + pair * SPLITS * DIM, stats_ptr + pair * SPLITS * 2
        tl.store(partial + split * DIM + full, result)
        tl.store(stats + split * 2, top)
        tl.store(stats + split * 2 + 1, weights)
        tl.debug_barrier()  # every thread's part is stored before the arrival that announces it
        if tl.atomic_add(arrivals_ptr + pair, 1, sem="acq_rel") == pieces - 1:
            tl.store(arrivals_ptr + pair, 0)
            each = tl.arange(0, SPLITS)
            whole = combined(partial, stats, each, each < pieces, full, DIM)
            _store(out_ptr, request, requests, column, whole * gate, HEADS * DIM, COPIES)


def splits_for(tokens: int, heads: int) -> int:
    """Splits of a context: enough programs for a small batch to keep the chip busy, a power of two."""
    wanted = max(1, 384 // (tokens * heads))
    return min(MAX_SPLITS, 1 << (wanted.bit_length() - 1))


class DecodeAttention:
    """Decode attention with its scratch memory, which every layer of every step shares.

    Args:
        heads, head_dim: shape of the attention.
        device: where it runs.

    Attributes:
        shares: tokens up to which it shares multiprocessors with kernels that make all of L1 shared memory.
        why_not_cuda: why `attention_hopper` does not run what it takes; None where it does.
    """

    def __init__(self, heads: int, head_dim: int, device: torch.device) -> None:
        self.heads, self.head_dim = heads, head_dim
        self.shares = 0
        self.why_not_cuda: str | None = "nobody asked for it"
        self._carved: set[int] = set()
        room = max(tokens * splits_for(tokens, heads) for tokens in range(1, MAX_SPLIT_TOKENS + 1))
        self.partial, self.stats, self.arrivals = scratch(room * heads, MAX_SPLIT_TOKENS * heads, head_dim, device)
        self.many = ManyRequests(heads, head_dim, device)

    def __call__(
        self,
        gqkv: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        batch: DecodeBatch,
        *,
        x: torch.Tensor | None = None,
        eps: float = 0.0,
        copies: int = 0,
    ) -> torch.Tensor:
        """Gated attention output, (tokens, heads * head_dim); writes the new token's key and value.

        Args:
            gqkv: (tokens, 4 * heads * head_dim), [gate | q | k | v] before RoPE.
            k_cache, v_cache: (pages, page_size, heads, head_dim), any strides but the last.
            batch: where it all stands.
            x: (tokens, hidden), whose RMSNorm factor `gqkv` still lacks; None where it has it, as it must with no more
                than `MAX_SPLIT_TOKENS`.
            eps: of that RMSNorm.
            copies: of the output as `staged_linear` has x, (copies, width / 32, tokens, 32); 0 for one in rows, as it
                must be with more tokens than `MAX_SPLIT_TOKENS`.
        """
        tokens = gqkv.shape[0]
        out = room_for(copies, tokens, self.heads * self.head_dim, gqkv)
        if not self.why_not_cuda and tokens <= MAX_CUDA_TOKENS and x is None and takes(k_cache, v_cache, batch):
            paged_attention(gqkv, out, k_cache, v_cache, batch, copies)
            return out
        if tokens > MAX_SPLIT_TOKENS:
            if copies:
                raise ValueError(f"copies={copies}: {tokens} tokens have none; the limit is {MAX_SPLIT_TOKENS} tokens")
            self.share(self.many(gqkv, out, k_cache, v_cache, batch, x, eps), tokens)
            return out
        if x is not None:
            raise ValueError(f"x: {tokens} tokens take a gqkv that is normed; the limit is {MAX_SPLIT_TOKENS}")
        splits = splits_for(tokens, self.heads)
        block, stages, warps, registers = tile(splits)
        options = launch_options(gqkv.device)
        if options and registers:
            options["maxnreg"] = registers
        compiled = _decode[(self.heads, splits, tokens)](
            gqkv, out, k_cache, v_cache, batch.cos_sin, batch.positions, batch.write_slots,
            batch.table, batch.row_starts, batch.lengths, self.partial, self.stats, self.arrivals,
            batch.table.stride(0), self.head_dim**-0.5,
            HEADS=self.heads, DIM=self.head_dim, PAGE=batch.page_size, OFFSETS=offset_type(k_cache, v_cache),
            RAGGED=batch.row_starts is not None, SPLITS=splits, BLOCK=block, STAGES=stages, COPIES=copies,
            PDL=dependent_launch(gqkv.device), num_warps=warps, **strides_of(k_cache, v_cache), **options,
        )  # fmt: skip
        self.share(compiled, tokens)
        return out

    def share(self, compiled: Any, tokens: int) -> None:
        """Have a kernel that has been launched run where all of L1 is shared memory, if its neighbours do."""
        if tokens <= self.shares and compiled.function not in self._carved:
            carve_out(compiled.function)
            self._carved.add(compiled.function)


def tile(splits: int) -> tuple[int, int, int, int | None]:
    """(tokens a program takes at a time, stages of its pipeline, warps, registers of a thread at most)."""
    if splits >= 16:  # one or two requests: a program each for contexts that are not long
        return 64, 1, 4, None
    return (32, 2, 2, None) if splits == 2 else (16, 3, 2, REGISTERS)
