"""What a decode step has before its first layer, as one kernel: embeddings, and their sum with z_L, where L begins."""

import torch
import triton
import triton.language as tl

from hrm_text.kernels.pointwise import in_blocks_at, options, rows_of
from hrm_text.kernels.staged import room_for
from hrm_text.model import HrmTextBody


@triton.jit(do_not_specialize=["tokens"])
def _first(
    ids_ptr, weight_ptr, z_L_ptr, z_H_ptr, x_ptr, squares_ptr, tokens, scale,
    HIDDEN: tl.constexpr, WIDE: tl.constexpr, BLOCKS: tl.constexpr, SQUARES: tl.constexpr,
    ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    dtype = x_ptr.dtype.element_ty
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDE)
    there = token < tokens
    mask = there[:, None] & (column < HIDDEN)[None, :]
    row = tl.load(ids_ptr + token, mask=there, other=0).to(tl.int64)
    embedding = tl.load(weight_ptr + row[:, None] * HIDDEN + column[None, :], mask=mask, other=0.0)
    z_H = (embedding.to(tl.float32) * scale).to(dtype)
    at = token[:, None] * HIDDEN + column[None, :]
    tl.store(z_H_ptr + at, z_H, mask=mask)
    z_L = tl.load(z_L_ptr + column, mask=column < HIDDEN, other=0.0).to(dtype)
    x = (z_L.to(tl.float32)[None, :] + z_H.to(tl.float32)).to(dtype)
    if BLOCKS:
        at = in_blocks_at(token[:, None], tokens, column[None, :])
    tl.store(x_ptr + at, x, mask=mask)
    if SQUARES:
        wide = x.to(tl.float32)
        tl.store(squares_ptr + token, tl.sum(wide * wide, 1), mask=there)


def first(
    body: HrmTextBody, input_ids: torch.Tensor, blocks: bool, squares: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """`HrmTextBody.begin` of the embeddings of (tokens,) integer ids, and the sum of both.

    Args:
        body: whose `embed_tokens.weight` is (any, hidden), contiguous, of the dtype of its activations.
        blocks: whether the sum is to lie in blocks, as `staged_linear` takes it.
        squares: whether the sums of its squares are wanted.

    Returns:
        z_H, (tokens, hidden); z_L + z_H, the same or in blocks, one copy; (tokens, 1) float32 where wanted.
    """
    weight, tokens = body.embed_tokens.weight, len(input_ids)
    z_H = weight.new_empty(tokens, weight.shape[1])
    x = room_for(int(blocks), tokens, weight.shape[1], weight)
    left = torch.empty(tokens, 1, dtype=torch.float32, device=weight.device) if squares else None
    _first[(triton.cdiv(tokens, rows_of(weight.device)),)](
        input_ids.contiguous(), weight, body.z_L_init, z_H, x, left, tokens, body.shape.embedding_scale,
        HIDDEN=weight.shape[1], WIDE=triton.next_power_of_2(weight.shape[1]), BLOCKS=blocks, SQUARES=squares,
        **options(weight.device),
    )  # fmt: skip
    return z_H, x, left
