"""y = W x for a few tokens, with what surrounds it in the model fused in: bound by reading W once.

A parameterless RMSNorm is one factor a token, so it is applied to the product: W (x r) = r (W x).
"""

import torch
import triton
import triton.language as tl

from hrm_text.kernels.launch import dependent_launch, launch_options

MAX_TOKENS = 16  # rows of one tensor-core tile
MAX_REGISTER_TOKENS = 2  # a step of 2: 5.2 ms, 6.7 on tensor cores; of 4: 8.2 and 6.8 (H200, the 1B)


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
    tokens,
    rows,
    eps,
    K: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    NORM: tl.constexpr,
    SWIGLU: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PDL: tl.constexpr,
):
    """`BLOCK` rows of W, which wait in registers when the last kernel ends, against one token after the other.

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
    for token in tl.static_range(TOKENS):
        # Everything that the last kernel wrote is asked for at once.
        offsets = token * rows + row
        write = mask & (offsets < tokens * rows)
        residual = tl.zeros((BLOCK,), tl.float32)
        if RESIDUAL:
            residual = tl.load(residual_ptr + offsets, mask=write, other=0.0).to(tl.float32)
        products = tl.zeros((BLOCK, COLUMNS), tl.float32)
        ups = tl.zeros((BLOCK, COLUMNS), tl.float32)
        squares = tl.zeros((BLOCK, COLUMNS), tl.float32)
        for part in tl.static_range(K // COLUMNS):
            # Every row's own copy, so that it is loaded where it is needed and not shuffled there.
            at = token * K + part * COLUMNS + column[None, :] + 0 * row[:, None]
            x = tl.load(x_ptr + at, mask=at < tokens * K, other=0.0).to(tl.float32)
            products += w[part].to(tl.float32) * x
            if SWIGLU:
                ups += u[part].to(tl.float32) * x
            if NORM:
                squares += x * x
        product, up = tl.sum(products, 1), tl.sum(ups, 1)
        product = _finish(product, up, tl.sum(squares, 1), residual, K, eps, NORM, SWIGLU)
        tl.store(out_ptr + offsets, product.to(out_ptr.dtype.element_ty), mask=write)


@triton.jit
def _on_tensor_cores(
    x_ptr,
    w_ptr,
    residual_ptr,
    out_ptr,
    tokens,
    rows,
    eps,
    K: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    NORM: tl.constexpr,
    SWIGLU: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """`BLOCK` rows of W against up to `TOKENS` tokens, on tensor cores.

    No dependent launch: started early, it takes shared memory from the kernel that runs (NOTES.md).
    """
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = tl.arange(0, TOKENS)
    start = row.to(tl.int64) * K
    product = tl.zeros((TOKENS, BLOCK), tl.float32)
    up = tl.zeros((TOKENS, BLOCK), tl.float32)
    square_sum = tl.zeros((TOKENS,), tl.float32)
    inside = token[:, None] < tokens
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        column = k + tl.arange(0, BLOCK_K)
        w = tl.load(w_ptr + start[None, :] + column[:, None])
        x = tl.load(x_ptr + token[:, None] * K + column[None, :], mask=inside, other=0.0)
        product = tl.dot(x, w, product, input_precision="ieee")
        if SWIGLU:
            u = tl.load(w_ptr + rows * K + start[None, :] + column[:, None])
            up = tl.dot(x, u, up, input_precision="ieee")
        if NORM:
            wide = x.to(tl.float32)
            square_sum += tl.sum(wide * wide, 1)
    offsets = token[:, None] * rows + row[None, :]
    residual = tl.zeros((TOKENS, BLOCK), tl.float32)
    if RESIDUAL:
        residual = tl.load(residual_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    product = _finish(product, up, square_sum[:, None], residual, K, eps, NORM, SWIGLU)
    tl.store(out_ptr + offsets, product.to(out_ptr.dtype.element_ty), mask=inside)


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
    if tokens <= MAX_REGISTER_TOKENS:
        block, warps = register_tile(width, swiglu)
        _in_registers[(triton.cdiv(rows, block),)](
            x, weight, residual, out, tokens, rows, eps, width,
            TOKENS=triton.next_power_of_2(tokens), BLOCK=block, COLUMNS=register_columns(width),
            PDL=dependent_launch(x.device), num_warps=warps, **launch_options(x.device), **flags,
        )  # fmt: skip
    else:
        block, block_k, stages, warps = tensor_core_tile(rows, width)
        _on_tensor_cores[(rows // block,)](
            x, weight, residual, out, tokens, rows, eps, width, TOKENS=MAX_TOKENS, BLOCK=block,
            BLOCK_K=block_k, STAGES=stages, num_warps=warps, **flags,
        )  # fmt: skip
    return out


def register_tile(width: int, swiglu: bool) -> tuple[int, int]:
    """(rows of a program, warps): a row, or a pair of gate and up, to a warp."""
    return 4, 4


def register_columns(width: int) -> int:
    """Columns of a part of W's rows: 16 bytes for each lane of a warp, where the width is a multiple of that."""
    return min(256, width & -width)


def tensor_core_tile(rows: int, width: int) -> tuple[int, int, int, int]:
    """(rows of a program, columns a stage, stages, warps)."""
    return 16 if rows % 32 else 32, min(256 if width > 2048 else 128, width & -width), 4, 4


def fits(rows: int, width: int) -> bool:
    """Whether `small_linear` takes a weight of this shape: its tiles have no ragged edge."""
    return rows % 32 == 0 and width & -width >= 16
