"""y = W x for a few tokens, with what surrounds it in the model fused in: bound by reading W once.

A parameterless RMSNorm is one factor a token, so it is applied to the product: W (x r) = r (W x).
"""

import torch
import triton
import triton.language as tl

from hrm_text.kernels.launch import dependent_launch, launch_options

MAX_TOKENS = 16  # columns of one tensor-core tile
TILE_ROWS = 16  # of one tensor-core tile


@triton.jit
def _finish(product, up, square_sum, residual, K, eps, NORM: tl.constexpr, SWIGLU: tl.constexpr):
    """Epilogue: norm factor, SwiGLU with `up`, residual (zero where there is none)."""
    if NORM:
        factor = 1.0 / tl.sqrt(square_sum / K + eps)
        product = product * factor
        up = up * factor
    if SWIGLU:
        product = product * tl.sigmoid(product) * up
    return product + residual


@triton.jit
def _in_registers(
    x_ptr,
    w_ptr,
    residual_ptr,
    out_ptr,
    rows,
    eps,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    NORM: tl.constexpr,
    SWIGLU: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PDL: tl.constexpr,
):
    """`BLOCK` rows of W, which wait in registers when the last kernel ends, against one token.

    A warp holds whole rows, in parts of `COLUMNS` that it adds up before anything crosses its lanes.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = row < rows
    column = tl.arange(0, COLUMNS)
    start = w_ptr + row.to(tl.int64)[:, None] * K + column[None, :]
    w = ()
    u = ()
    for part in tl.static_range(K // COLUMNS):
        w += (tl.load(start + part * COLUMNS, mask=mask[:, None], other=0.0),)  # type: ignore[assignment]
        if SWIGLU:
            u += (tl.load(start + rows * K + part * COLUMNS, mask=mask[:, None], other=0.0),)  # type: ignore[assignment]
    if PDL:
        tl.extra.cuda.gdc_wait()
    # Everything that the last kernel wrote is asked for at once.
    residual = tl.zeros((BLOCK,), tl.float32)
    if RESIDUAL:
        residual = tl.load(residual_ptr + row, mask=mask, other=0.0).to(tl.float32)
    products = tl.zeros((BLOCK, COLUMNS), tl.float32)
    ups = tl.zeros((BLOCK, COLUMNS), tl.float32)
    squares = tl.zeros((BLOCK, COLUMNS), tl.float32)
    for part in tl.static_range(K // COLUMNS):
        # Every row's own copy, so that it is loaded where it is needed and not shuffled there.
        x = tl.load(x_ptr + part * COLUMNS + column[None, :] + 0 * row[:, None]).to(tl.float32)
        products += w[part].to(tl.float32) * x
        if SWIGLU:
            ups += u[part].to(tl.float32) * x
        if NORM:
            squares += x * x
    product, up = tl.sum(products, 1), tl.sum(ups, 1)
    product = _finish(product, up, tl.sum(squares, 1), residual, K, eps, NORM, SWIGLU)
    tl.store(out_ptr + row, product.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens"])  # one compilation, not one for multiples of 16 too
def _on_tensor_cores(
    x_ptr,
    w_ptr,
    residual_ptr,
    out_ptr,
    tokens,
    rows,
    eps,
    K: tl.constexpr,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    NORM: tl.constexpr,
    SWIGLU: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PDL: tl.constexpr,
):
    """`BLOCK` rows of W, which wait in registers like those of `_in_registers`, against all tokens at once.

    K is split into `PARTS`, one a warp: a batch of products, for a tile this small has work for one warp only.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    local = tl.arange(0, BLOCK)
    w_row = tl.program_id(0) * BLOCK + local
    if SWIGLU:  # half of the tile are rows of gate, half the same ones of up
        w_row = tl.program_id(0) * (BLOCK // 2) + local % (BLOCK // 2) + local // (BLOCK // 2) * rows
    part = tl.arange(0, PARTS) * (K // PARTS)
    column = tl.arange(0, COLUMNS)
    start = w_ptr + w_row.to(tl.int64)[None, :, None] * K + part[:, None, None] + column[None, None, :]
    w = ()
    for k in tl.static_range(K // PARTS // COLUMNS):
        w += (tl.load(start + k * COLUMNS),)  # type: ignore[assignment]
    if PDL:
        tl.extra.cuda.gdc_wait()
    token = tl.arange(0, TOKENS)
    x_start = x_ptr + (token * K)[None, :, None] + part[:, None, None] + column[None, None, :]
    inside = (token < tokens)[None, :, None]
    # All of x is asked for before the first product, since what crosses warps waits for all of them; but with squares
    # to sum, the registers that it takes cost more (NOTES.md).
    early = ()
    if not NORM:
        for k in tl.static_range(K // PARTS // COLUMNS):
            early += (tl.load(x_start + k * COLUMNS, mask=inside, other=0.0),)  # type: ignore[assignment]
    products = tl.zeros((PARTS, BLOCK, TOKENS), tl.float32)
    squares = tl.zeros((PARTS, TOKENS), tl.float32)
    for k in tl.static_range(K // PARTS // COLUMNS):
        if NORM:
            x = tl.load(x_start + k * COLUMNS, mask=inside, other=0.0)
            wide = x.to(tl.float32)
            squares += tl.sum(wide * wide, 2)
        else:
            x = early[k]
        products = tl.dot(w[k], tl.permute(x, (0, 2, 1)), products, input_precision="ieee")
    product = tl.sum(products, 0)
    square_sum = tl.sum(squares, 0)[None, :]
    up = product
    row = tl.program_id(0) * BLOCK + local
    if SWIGLU:
        row = tl.program_id(0) * (BLOCK // 2) + tl.arange(0, BLOCK // 2)
        product, up = tl.split(tl.permute(tl.reshape(product, (2, BLOCK // 2, TOKENS)), (1, 2, 0)))
    offsets = token[None, :] * rows + row[:, None]
    write = (token < tokens)[None, :]
    residual = tl.zeros(offsets.shape, tl.float32)
    if RESIDUAL:
        residual = tl.load(residual_ptr + offsets, mask=write, other=0.0).to(tl.float32)
    product = _finish(product, up, square_sum, residual, K, eps, NORM, SWIGLU)
    tl.store(out_ptr + offsets, product.to(out_ptr.dtype.element_ty), mask=write)


def small_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    norm_eps: float | None = None,
    swiglu: bool = False,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """`weight` times RMSNorm(x), then SwiGLU or plus the residual.

    Args:
        x: (tokens, K), contiguous, at most `MAX_TOKENS` tokens.
        weight: (rows, K), contiguous; with `swiglu` the rows are [gate | up].
        norm_eps: epsilon of the parameterless RMSNorm; None leaves x as it is.
        swiglu: whether the result is silu(gate) * up, with half as many columns as weight has rows.
        residual: (tokens, rows), added.

    Returns:
        (tokens, rows), or half the rows with `swiglu`.
    """
    assert x.is_contiguous() and (residual is None or residual.is_contiguous())
    tokens, width = x.shape
    rows = weight.shape[0] // 2 if swiglu else weight.shape[0]
    out = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
    flags = {
        "NORM": norm_eps is not None,
        "SWIGLU": swiglu,
        "RESIDUAL": residual is not None,
    }
    eps = norm_eps or 0.0
    if tokens == 1:  # a step takes 3.1 ms, 3.6 on tensor cores; with 2 tokens 4.2 and 3.8 (H200, the 1B)
        block, warps = register_tile(width)
        _in_registers[(triton.cdiv(rows, block),)](
            x, weight, residual, out, rows, eps, width, BLOCK=block, COLUMNS=register_columns(width),
            PDL=dependent_launch(x.device), num_warps=warps, **launch_options(x.device), **flags,
        )  # fmt: skip
    else:
        warps, columns = tensor_core_parts(width)
        _on_tensor_cores[(weight.shape[0] // TILE_ROWS,)](
            x, weight, residual, out, tokens, rows, eps, width, PARTS=warps, COLUMNS=columns,
            TOKENS=8 if tokens <= 8 else MAX_TOKENS, BLOCK=TILE_ROWS, PDL=dependent_launch(x.device),
            num_warps=warps, **launch_options(x.device), **flags,
        )  # fmt: skip
    return out


def register_tile(width: int) -> tuple[int, int]:
    """(rows of a program, or pairs of gate and up; warps): some 24 KiB of weights in a warp's registers."""
    return (8, 4) if width <= 2048 else (4, 4)


def register_columns(width: int) -> int:
    """Columns of a part of W's rows: 16 bytes for each lane of a warp, where the width is a multiple of that."""
    return min(256, width & -width)


def tensor_core_parts(width: int) -> tuple[int, int]:
    """(warps, columns that each takes at a time): so many warps that 16 rows of W leave registers for the rest."""
    warps = 4 if width <= 2048 else 8 if width <= 4096 else 16
    while width % (16 * warps):
        warps //= 2
    columns = width // warps
    return warps, min(128, columns & -columns)


def fits(rows: int, width: int) -> bool:
    """Whether `small_linear` takes a weight of this shape: its tiles have no ragged edge."""
    return rows % (2 * TILE_ROWS) == 0 and width % 16 == 0
