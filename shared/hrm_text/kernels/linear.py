"""y = W x for a few tokens, with what surrounds it in the model fused in: bound by reading W once.

A parameterless RMSNorm is one factor a token, so it is applied to the product: W (x r) = r (W x).
"""

import torch
import triton
import triton.language as tl

from hrm_text.kernels.launch import dependent_launch, launch_options, two_parts

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
    K0: tl.constexpr,
    K1: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    NORM: tl.constexpr,
    SWIGLU: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PDL: tl.constexpr,
):
    """`BLOCK` rows of W, which wait in registers when the last kernel ends, against one token after the other."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = row < rows
    start = row.to(tl.int64)[:, None] * K
    k0 = tl.arange(0, K0)
    w0 = tl.load(w_ptr + start + k0[None, :], mask=mask[:, None], other=0.0)
    if SWIGLU:
        u0 = tl.load(w_ptr + rows * K + start + k0[None, :], mask=mask[:, None], other=0.0)
    if K1 > 0:
        k1 = K0 + tl.arange(0, K1)
        w1 = tl.load(w_ptr + start + k1[None, :], mask=mask[:, None], other=0.0)
        if SWIGLU:
            u1 = tl.load(w_ptr + rows * K + start + k1[None, :], mask=mask[:, None], other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    for token in tl.static_range(TOKENS):
        # Everything that the last kernel wrote is asked for before the first sum, which waits for all warps.
        offsets = token * rows + row
        write = mask & (offsets < tokens * rows)
        residual = tl.zeros((BLOCK,), tl.float32)
        if RESIDUAL:
            residual = tl.load(residual_ptr + offsets, mask=write, other=0.0).to(tl.float32)
        at0 = token * K + k0
        x0 = tl.load(x_ptr + at0, mask=at0 < tokens * K, other=0.0).to(tl.float32)
        if K1 > 0:
            at1 = token * K + k1
            x1 = tl.load(x_ptr + at1, mask=at1 < tokens * K, other=0.0).to(tl.float32)
        product = tl.sum(w0.to(tl.float32) * x0[None, :], 1)
        square_sum = tl.sum(x0 * x0, 0)
        up = product
        if SWIGLU:
            up = tl.sum(u0.to(tl.float32) * x0[None, :], 1)
        if K1 > 0:
            product += tl.sum(w1.to(tl.float32) * x1[None, :], 1)
            square_sum += tl.sum(x1 * x1, 0)
            if SWIGLU:
                up += tl.sum(u1.to(tl.float32) * x1[None, :], 1)
        product = _finish(product, up, square_sum, residual, K, eps, NORM, SWIGLU)
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
    squares = tl.zeros((TOKENS, BLOCK_K), tl.float32)  # summed once, behind the loop: a sum crosses warps
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
            squares += wide * wide
    offsets = token[:, None] * rows + row[None, :]
    residual = tl.zeros((TOKENS, BLOCK), tl.float32)
    if RESIDUAL:
        residual = tl.load(residual_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    product = _finish(product, up, tl.sum(squares, 1)[:, None], residual, K, eps, NORM, SWIGLU)
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
        first, rest = two_parts(width)
        block = register_block(width, swiglu)
        _in_registers[(triton.cdiv(rows, block),)](
            x, weight, residual, out, tokens, rows, eps, width, first, rest,
            TOKENS=triton.next_power_of_2(tokens), BLOCK=block, PDL=dependent_launch(x.device),
            num_warps=4, **launch_options(x.device), **flags,
        )  # fmt: skip
    else:
        block, block_k, stages, warps = tensor_core_tile(rows, width)
        _on_tensor_cores[(rows // block,)](
            x, weight, residual, out, tokens, rows, eps, width,
            TOKENS=MAX_TOKENS, BLOCK=block, BLOCK_K=block_k, STAGES=stages, num_warps=warps, **flags,
        )  # fmt: skip
    return out


def register_block(width: int, swiglu: bool) -> int:
    """Rows of a program: some 24 KiB of weights, which its 128 threads hold in registers."""
    rows = max(1, 12288 // width)
    rows = 1 << (rows.bit_length() - 1)
    return max(1, rows // 2) if swiglu else rows


def tensor_core_tile(rows: int, width: int) -> tuple[int, int, int, int]:
    """(rows of a program, columns a stage, stages, warps)."""
    return 16 if rows % 32 else 32, min(256 if width > 2048 else 128, width & -width), 4, 4


def fits(rows: int, width: int) -> bool:
    """Whether `small_linear` takes a weight of this shape: its tiles have no ragged edge."""
    rest = width - (1 << (width.bit_length() - 1))
    return rows % 32 == 0 and width & -width >= 16 and rest & (rest - 1) == 0
