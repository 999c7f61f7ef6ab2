"""What the decode attention of few requests and that of many have in common: RoPE, and contexts in pieces."""

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
