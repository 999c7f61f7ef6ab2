"""SwiGLU of a product that still lacks its RMSNorm factor, for batches whose projections are GEMMs."""

import torch
import triton
import triton.language as tl

from hrm_text.kernels.launch import dependent_launch, launch_options


@triton.jit
def _scaled_swiglu(
    product_ptr, x_ptr, out_ptr, width, eps,
    HIDDEN: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0)
    hidden = tl.arange(0, WIDE)
    x = tl.load(x_ptr + token * HIDDEN + hidden, mask=hidden < HIDDEN, other=0.0).to(tl.float32)
    factor = 1.0 / tl.sqrt(tl.sum(x * x, 0) / HIDDEN + eps)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    gate = tl.load(product_ptr + token * 2 * width + column, mask=mask, other=0.0).to(tl.float32) * factor
    up = tl.load(product_ptr + token * 2 * width + width + column, mask=mask, other=0.0).to(tl.float32) * factor
    tl.store(out_ptr + token * width + column, (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty), mask=mask)


def scaled_swiglu(product: torch.Tensor, x: torch.Tensor, eps: float) -> torch.Tensor:
    """silu(gate r) * (up r), r the RMSNorm factor of each token.

    Args:
        product: (tokens, 2 * width), [gate | up] of the x that was not normed.
        x: (tokens, hidden).
        eps: of the norm.

    Returns:
        (tokens, width).
    """
    tokens, width = product.shape[0], product.shape[1] // 2
    out = torch.empty(tokens, width, dtype=product.dtype, device=product.device)
    _scaled_swiglu[(tokens, triton.cdiv(width, 1024))](
        product, x, out, width, eps,
        HIDDEN=x.shape[1], WIDE=triton.next_power_of_2(x.shape[1]), BLOCK=1024, PDL=dependent_launch(x.device),
        num_warps=4, **launch_options(x.device),
    )  # fmt: skip
    return out
