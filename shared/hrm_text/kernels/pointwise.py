"""What stands between two GEMMs of a layer, one kernel each time: bound by reading and writing the activations once.

A parameterless RMSNorm is one factor a token, so it is applied to the product behind it: W (x r) = r (W x). The
normed activations are never written.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import triton
import triton.language as tl

from hrm_text.kernels.launch import dependent_launch, launch_options
from hrm_text.kernels.staged import BLOCK

COLUMNS_TOGETHER = tl.constexpr(BLOCK)  # a name that kernels may read
COLUMNS = 2048  # of SwiGLU in one program
ROPE_ROWS = 2  # tokens of a program: 94 us of 16,384, where a program of 4 heads of one took 103


@dataclass(frozen=True)
class PrefillBatch:
    """Where the tokens of a step stand and where their KV goes; the same for every layer.

    Attributes:
        positions: (tokens,) integer.
        write_slots: (tokens,) integer, KV slot of each token; negative for padding.
        page_size: tokens a page of the KV cache.
        cos_sin: (positions, head_dim), [cos | sin] of each position, as both engines' RoPE layers keep it.
    """

    positions: torch.Tensor
    write_slots: torch.Tensor
    page_size: int
    cos_sin: torch.Tensor

    @cached_property
    def turns(self) -> torch.Tensor:
        """(positions, head_dim) float16: [cos, sin] of columns as `quack_gqkv` reads them, made when asked for.

        Of pairs 8 j + 2 l and the next, j and j + 1 side by side for lane l of four. It errs by 2e-4 at most.
        """
        pairs = torch.stack(self.cos_sin.chunk(2, -1), -1).half()
        return pairs.view(len(pairs), -1, 2, 4, 2, 2).transpose(2, 3).flatten(1)


def rows_of(device: torch.device, rows: int = 1) -> int:
    """Tokens a program: `rows` on a GPU; the interpreter takes programs one by one, and large ones as fast as small."""
    return rows if device.type == "cuda" else 64


def options(device: torch.device, rows: int = 1, warps: int = 4) -> dict[str, Any]:
    """Of every launch here."""
    return {
        "ROWS": rows_of(device, rows), "PDL": dependent_launch(device), "num_warps": warps, **launch_options(device)
    }  # fmt: skip


@triton.jit
def in_blocks_at(token, tokens, column):
    """Where a number of (tokens, columns) lies in `staged.in_blocks` of it."""
    return (column // COLUMNS_TOGETHER * tokens + token) * COLUMNS_TOGETHER + column % COLUMNS_TOGETHER


@triton.jit(do_not_specialize=["tokens"])
def _rms(
    x_ptr, other_ptr, out_ptr, factors_ptr, sum_ptr, squares_ptr, tokens, eps,
    HIDDEN: tl.constexpr, WIDE: tl.constexpr, SUM: tl.constexpr, NORM: tl.constexpr, ADD: tl.constexpr,
    SQUARES: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDE)
    mask = (token < tokens)[:, None] & (column < HIDDEN)[None, :]
    at = token[:, None] * HIDDEN + column[None, :]
    inner = at  # where x and its sum lie
    if BLOCKS:
        inner = in_blocks_at(token[:, None], tokens, column[None, :])
    x = tl.load(x_ptr + inner, mask=mask, other=0.0).to(tl.float32)
    if SUM or ADD:
        other = tl.load(other_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if SUM:
        x += other
        kept = x.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + at, kept, mask=mask)
        x = kept.to(tl.float32)  # the factor is that of the x which the GEMM reads
    factor = 1.0 / tl.sqrt(tl.sum(x * x, 1) / HIDDEN + eps)
    if NORM:
        normed = (x * factor[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + at, normed, mask=mask)
        if ADD:
            total = (normed.to(tl.float32) + other).to(sum_ptr.dtype.element_ty)
            tl.store(sum_ptr + inner, total, mask=mask)
            if SQUARES:
                wide = total.to(tl.float32)
                tl.store(squares_ptr + token, tl.sum(wide * wide, 1), mask=token < tokens)
    else:
        tl.store(factors_ptr + token, factor, mask=token < tokens)


def _launch_rms(
    x: torch.Tensor,
    eps: float,
    *,
    other: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    factors: torch.Tensor | None = None,
    behind: torch.Tensor | None = None,
    squares: torch.Tensor | None = None,
) -> None:
    """Factors of x, or of x + other in `out`; without `factors` the norm in `out`, its sum with other `behind`, and the
    sums of that one's `squares`."""
    tokens, hidden = (x if out is None else out).shape
    pointers = [x if each is None else each for each in (other, out, factors, behind, squares)]
    _rms[(triton.cdiv(tokens, rows_of(x.device)),)](
        x, *pointers, tokens, eps, HIDDEN=hidden, WIDE=triton.next_power_of_2(hidden),
        SUM=other is not None and behind is None, NORM=factors is None, ADD=behind is not None,
        SQUARES=squares is not None, BLOCKS=x.ndim == 4, **options(x.device),
    )  # fmt: skip


def add_rms(a: torch.Tensor, b: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, hidden) a + b, and its (tokens,) float32 RMSNorm factors; a and b contiguous."""
    out = torch.empty_like(a)
    factors = torch.empty(len(a), dtype=torch.float32, device=a.device)
    _launch_rms(a, eps, other=b, out=out, factors=factors)
    return out, factors


def rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """(tokens,) float32 RMSNorm factors of (tokens, hidden) x, contiguous."""
    factors = torch.empty(len(x), dtype=torch.float32, device=x.device)
    _launch_rms(x, eps, factors=factors)
    return factors


@triton.jit(do_not_specialize=["tokens"])
def _factors(
    squares_ptr, factors_ptr, tokens, width, eps,
    PARTS: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    part = tl.arange(0, WIDE)
    mask = (token < tokens)[:, None] & (part < PARTS)[None, :]
    squares = tl.load(squares_ptr + token[:, None] * PARTS + part[None, :], mask=mask, other=0.0)
    tl.store(factors_ptr + token, 1.0 / tl.sqrt(tl.sum(squares, 1) / width + eps), mask=token < tokens)


def factors_of(squares: torch.Tensor, width: int, eps: float) -> torch.Tensor:
    """(tokens,) float32 RMSNorm factors of rows of `width`, from (tokens, any) parts of the sums of their squares."""
    tokens, parts = squares.shape
    factors = torch.empty(tokens, dtype=torch.float32, device=squares.device)
    _factors[(triton.cdiv(tokens, 64),)](
        squares, factors, tokens, width, eps,
        PARTS=parts, WIDE=triton.next_power_of_2(parts), **options(squares.device) | {"ROWS": 64},
    )  # fmt: skip
    return factors


def norm(x: torch.Tensor, eps: float) -> torch.Tensor:
    """The RMSNorm of (tokens, hidden) x, contiguous."""
    out = torch.empty_like(x)
    _launch_rms(x, eps, out=out)
    return out


def norm_add(
    x: torch.Tensor, other: torch.Tensor, eps: float, squares: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The RMSNorm of x, and its sum with `other`.

    Args:
        x: (tokens, hidden), or the first of what a staged projection wrote, (copies, hidden / 32, tokens, 32).
        other: (tokens, hidden), contiguous as x is.
        squares: (tokens, 1) float32, to be filled with the sums of squares of the sum.

    Returns:
        (tokens, hidden), and the sum as x lies, in one copy.
    """
    out, behind = torch.empty_like(other), torch.empty_like(x[:1] if x.ndim == 4 else x)
    _launch_rms(x, eps, other=other, out=out, behind=behind, squares=squares)
    return out, behind


@triton.jit(do_not_specialize=["tokens"])
def _rope_write(
    gqkv_ptr, factors_ptr, positions_ptr, write_slots_ptr, cos_sin_ptr, k_cache_ptr, v_cache_ptr, tokens, heads,
    k_page_stride, k_token_stride, k_head_stride, v_page_stride, v_token_stride, v_head_stride,
    PAGE: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, SCALE: tl.constexpr,
    ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    head = tl.arange(0, HEADS)
    lane = tl.arange(0, HALF)
    there = token < tokens
    mask = there[:, None, None] & (head < heads)[None, :, None] & (lane < HALF)[None, None, :]
    inside = head[None, :, None] * 2 * HALF + lane[None, None, :]
    width = heads * 2 * HALF
    q_ptr = gqkv_ptr + token[:, None, None] * 4 * width + width + inside
    k_ptr = q_ptr + width
    v_ptr = k_ptr + width
    factor = 1.0
    if SCALE:
        factor = tl.load(factors_ptr + token, mask=there, other=0.0)[:, None, None]
    position = tl.load(positions_ptr + token, mask=there, other=0).to(tl.int64)
    table = cos_sin_ptr + position[:, None] * 2 * HALF + lane[None, :]
    cos = tl.load(table).to(tl.float32)[:, None, :]
    sin = tl.load(table + HALF).to(tl.float32)[:, None, :]
    first = tl.load(q_ptr, mask=mask, other=0.0).to(tl.float32) * factor
    second = tl.load(q_ptr + HALF, mask=mask, other=0.0).to(tl.float32) * factor
    tl.store(q_ptr, (first * cos - second * sin).to(gqkv_ptr.dtype.element_ty), mask=mask)
    tl.store(q_ptr + HALF, (second * cos + first * sin).to(gqkv_ptr.dtype.element_ty), mask=mask)
    first = tl.load(k_ptr, mask=mask, other=0.0).to(tl.float32) * factor
    second = tl.load(k_ptr + HALF, mask=mask, other=0.0).to(tl.float32) * factor
    k_first = (first * cos - second * sin).to(gqkv_ptr.dtype.element_ty)
    k_second = (second * cos + first * sin).to(gqkv_ptr.dtype.element_ty)
    v_first = (tl.load(v_ptr, mask=mask, other=0.0).to(tl.float32) * factor).to(gqkv_ptr.dtype.element_ty)
    v_second = (tl.load(v_ptr + HALF, mask=mask, other=0.0).to(tl.float32) * factor).to(gqkv_ptr.dtype.element_ty)
    tl.store(k_ptr, k_first, mask=mask)
    tl.store(k_ptr + HALF, k_second, mask=mask)
    if SCALE:
        tl.store(v_ptr, v_first, mask=mask)
        tl.store(v_ptr + HALF, v_second, mask=mask)
    slot = tl.load(write_slots_ptr + token, mask=there, other=-1).to(tl.int64)
    mask = mask & (slot >= 0)[:, None, None]
    page, place = (slot // PAGE)[:, None, None], (slot % PAGE)[:, None, None]
    inside = head[None, :, None] * k_head_stride + lane[None, None, :]
    line = k_cache_ptr + page * k_page_stride + place * k_token_stride + inside
    tl.store(line, k_first, mask=mask)
    tl.store(line + HALF, k_second, mask=mask)
    inside = head[None, :, None] * v_head_stride + lane[None, None, :]
    line = v_cache_ptr + page * v_page_stride + place * v_token_stride + inside
    tl.store(line, v_first, mask=mask)
    tl.store(line + HALF, v_second, mask=mask)


def rope_write(
    gqkv: torch.Tensor, factors: torch.Tensor | None, batch: PrefillBatch, k_cache: torch.Tensor, v_cache: torch.Tensor
) -> None:
    """q, k and v as attention reads them: with the norm's factor, rotated in place, and k and v in the cache as well.

    Args:
        gqkv: (tokens, 4 * heads * head_dim), [gate | q | k | v] of the x that was not normed; the gate stays as it is.
        factors: (tokens,) float32, of the norm; None where `gqkv` has it.
        batch: of these tokens.
        k_cache, v_cache: (pages, page_size, heads, head_dim), any strides but the last, which is 1.
    """
    heads, head_dim = k_cache.shape[2:]
    rows = rows_of(gqkv.device, ROPE_ROWS)
    _rope_write[(triton.cdiv(len(gqkv), rows),)](
        gqkv, factors, batch.positions, batch.write_slots, batch.cos_sin, k_cache, v_cache, len(gqkv), heads,
        *k_cache.stride()[:3], *v_cache.stride()[:3],
        PAGE=batch.page_size, HALF=head_dim // 2, HEADS=triton.next_power_of_2(heads), SCALE=factors is not None,
        **options(gqkv.device, ROPE_ROWS, warps=8),
    )  # fmt: skip


@triton.jit(do_not_specialize=["tokens"])
def _gate(
    gqkv_ptr, factors_ptr, out_ptr, tokens,
    WIDTH: tl.constexpr, WIDE: tl.constexpr, SCALE: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDE)
    mask = (token < tokens)[:, None] & (column < WIDTH)[None, :]
    at = token[:, None] * WIDTH + column[None, :]
    gate = tl.load(gqkv_ptr + token[:, None] * 4 * WIDTH + column[None, :], mask=mask, other=0.0).to(tl.float32)
    if SCALE:
        gate *= tl.load(factors_ptr + token, mask=token < tokens, other=0.0)[:, None]
    gate = tl.sigmoid(gate)
    out = tl.load(out_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, (out * gate).to(out_ptr.dtype.element_ty), mask=mask)


def gate_in_place(gqkv: torch.Tensor, factors: torch.Tensor | None, out: torch.Tensor) -> None:
    """Multiply attention's `out`, (tokens, heads * head_dim), by the sigmoid of the gates; `factors` as above."""
    tokens, width = out.shape
    _gate[(triton.cdiv(tokens, rows_of(out.device)),)](
        gqkv, factors, out, tokens,
        WIDTH=width, WIDE=triton.next_power_of_2(width), SCALE=factors is not None, **options(out.device),
    )  # fmt: skip


@triton.jit(do_not_specialize=["tokens"])
def _swiglu(
    product_ptr, factors_ptr, out_ptr, tokens, width, COLUMNS: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (token < tokens)[:, None] & (column < width)[None, :]
    factor = tl.load(factors_ptr + token, mask=token < tokens, other=0.0)[:, None]
    at = product_ptr + token[:, None] * 2 * width + column[None, :]
    gate = tl.load(at, mask=mask, other=0.0).to(tl.float32) * factor
    up = tl.load(at + width, mask=mask, other=0.0).to(tl.float32) * factor
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + token[:, None] * width + column[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


def swiglu(product: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """silu(gate r) * (up r), r the RMSNorm factor of each token.

    Args:
        product: (tokens, 2 * width), [gate | up] of the x that was not normed.
        factors: (tokens,) float32.

    Returns:
        (tokens, width).
    """
    tokens, width = product.shape[0], product.shape[1] // 2
    out = torch.empty(tokens, width, dtype=product.dtype, device=product.device)
    grid = triton.cdiv(tokens, rows_of(out.device)), triton.cdiv(width, COLUMNS)
    _swiglu[grid](product, factors, out, tokens, width, COLUMNS=COLUMNS, **options(out.device))
    return out
