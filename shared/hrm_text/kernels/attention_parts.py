"""What the decode attention of few requests and that of many have in common: RoPE, a block's lines in a paged cache,
and contexts in pieces."""

from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def rotated(head_ptr, full, cos, sign_sin, HALF: tl.constexpr, DIM: tl.constexpr):
    """A head's query or key after RoPE (neox), float32."""
    own = tl.load(head_ptr + full).to(tl.float32)
    partner = tl.load(head_ptr + (full + HALF) % DIM).to(tl.float32)
    return own * cos + partner * sign_sin


@triton.jit
def combined(partial_ptr, stats_ptr, slots, mine, full, DIM: tl.constexpr):
    """What the pieces of a context found, as one; they are those of `slots` that are `mine`."""
    tops = tl.load(stats_ptr + 2 * slots, mask=mine, other=-float("inf"), cache_modifier=".cg")
    weights = tl.load(stats_ptr + 2 * slots + 1, mask=mine, other=0.0, cache_modifier=".cg")
    rows = partial_ptr + (slots * DIM)[:, None] + full[None, :]
    parts = tl.load(rows, mask=mine[:, None], other=0.0, cache_modifier=".cg")
    share = tl.exp2(tops - tl.max(tops, 0))
    return tl.sum(parts * share[:, None], 0) / tl.sum(weights * share, 0)


def scratch(
    pieces: int, contexts: int, head_dim: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Room for what `pieces` found, (head_dim,) and two numbers each, and counts of those that arrived, all zero."""
    partial = torch.empty(pieces * head_dim, dtype=torch.float32, device=device)
    stats = torch.empty(pieces * 2, dtype=torch.float32, device=device)
    return partial, stats, torch.zeros(contexts, dtype=torch.int32, device=device)


@triton.jit
def pages_of(table_ptr, first, at, offset, bound, PAGE: tl.constexpr, BLOCK: tl.constexpr):
    """Page numbers of the block at `at`: one where a page holds the whole block. Nothing past `bound` is read."""
    if PAGE % BLOCK == 0:
        page = tl.load(table_ptr + first + at // PAGE, mask=at < bound, other=0)
    else:
        page = tl.load(table_ptr + first + (at + offset) // PAGE, mask=at + offset < bound, other=0)
    return page


@triton.jit
def lines_of(
    page, at, offset, PAGE: tl.constexpr, BLOCK: tl.constexpr, PAGE_STRIDE: tl.constexpr, STRIDE: tl.constexpr,
    OFFSETS: tl.constexpr,
):  # fmt: skip
    """Offsets of a block's lines in a cache."""
    if PAGE % BLOCK == 0:
        lines = page.to(OFFSETS) * PAGE_STRIDE + (at % PAGE) * STRIDE + offset * STRIDE
    else:
        lines = page.to(OFFSETS) * PAGE_STRIDE + (at + offset) % PAGE * STRIDE
    return lines


def offset_type(*caches: torch.Tensor) -> tl.dtype:
    """Of offsets into a cache: 32 bits where they do, which saves a third of the address arithmetic."""
    last = max(sum((n - 1) * s for n, s in zip(cache.shape, cache.stride(), strict=True)) for cache in caches)
    return tl.int32 if last < 2**31 else tl.int64


def strides_of(k_cache: torch.Tensor, v_cache: torch.Tensor) -> dict[str, Any]:
    """The caches' strides as the kernels take them, which compile for them."""
    return {
        f"{name}_{part}": stride
        for name, cache in (("K", k_cache), ("V", v_cache))
        for part, stride in zip(("PAGE", "LINE", "HEAD"), cache.stride(), strict=False)
    }
