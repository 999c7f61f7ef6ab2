"""y = W x for 17 to 128 tokens, with what surrounds it in the model fused in: tensor cores, K split over programs.

A program takes `BLOCK` rows of W and a part of K for a tile of tokens. Where K is split, the program that arrives last
adds the parts up in their order, so the sums are the same every time. An RMSNorm is one factor a token, applied to
the product; it comes from sums of squares that the projection before left for each tile of its columns.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from hrm_text.kernels.launch import dependent_launch, launch_options

MAX_TOKENS = 128  # beyond, a GEMM is bound by arithmetic


@dataclass(frozen=True)
class Tile:
    """How a product is divided.

    Attributes:
        block: rows of W a program takes.
        splits: parts of K.
        depth: columns of W at a time.
        early: of these, so many blocks are asked for before the wait.
        stages, warps: as Triton has them; warps for 64 tokens.
    """

    block: int
    splits: int
    depth: int
    early: int
    stages: int
    warps: int


@triton.jit(do_not_specialize=["tokens"])  # one compilation, not one for multiples of 16 too
def _gemm(
    x_ptr, w_ptr, residual_ptr, squares_ptr, next_squares_ptr, out_ptr, partial_ptr, arrivals_ptr,
    tokens, rows, eps,
    K: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr, SPLITS: tl.constexpr,
    EARLY: tl.constexpr, STAGES: tl.constexpr, SQUARES: tl.constexpr, ALL_SQUARES: tl.constexpr,
    SWIGLU: tl.constexpr, RESIDUAL: tl.constexpr, NEXT_SQUARES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    tile, split, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    PART: tl.constexpr = K // SPLITS
    local = tl.arange(0, BLOCK)
    w_row = tile * BLOCK + local
    if SWIGLU:  # a row of gate, the same of up, the next of gate: pairs that one thread holds
        w_row = tile * (BLOCK // 2) + local // 2 + local % 2 * rows
    depth = tl.arange(0, DEPTH)
    w_start = w_ptr + w_row[None, :] * K + split * PART + depth[:, None]
    early = ()
    for k in tl.static_range(EARLY):
        early += (tl.load(w_start + k * DEPTH),)  # type: ignore[assignment]
    if PDL:
        tl.extra.cuda.gdc_wait()
    token = group * TOKENS + tl.arange(0, TOKENS)
    there = token < tokens
    # Rows past the last token are the first ones again: loads without masks all run at once, and no line of x is asked
    # for more often than the others.
    x_start = x_ptr + (token % tokens)[:, None] * K + split * PART + depth[None, :]
    # What the end needs is asked for now and waited for then.
    COLUMNS: tl.constexpr = BLOCK // 2 if SWIGLU else BLOCK
    offsets = token[:, None] * rows + (tile * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    if RESIDUAL:
        residual = tl.load(residual_ptr + offsets, mask=there[:, None], other=0.0)
    if SQUARES > 0:
        each = tl.arange(0, ALL_SQUARES)
        known = there[:, None] & (each < SQUARES)[None, :]
        squares = tl.load(squares_ptr + token[:, None] * SQUARES + each[None, :], mask=known, other=0.0)
    x_early = ()
    for k in tl.static_range(EARLY):
        x_early += (tl.load(x_start + k * DEPTH),)  # type: ignore[assignment]
    product = tl.zeros((TOKENS, BLOCK), tl.float32)
    for k in tl.range(EARLY * DEPTH, PART, DEPTH, num_stages=STAGES):
        x = tl.load(x_start + k)
        w = tl.load(w_start + k)
        product = tl.dot(x, w, product, input_precision="ieee")
    for k in tl.static_range(EARLY):  # behind the loop, whose loads would wait for them
        product = tl.dot(x_early[k], early[k], product, input_precision="ieee")
    if SPLITS > 1:
        tiles = tl.num_programs(0)
        number = group * tiles + tile
        place = tl.arange(0, TOKENS)[:, None] * BLOCK + local[None, :]
        parts = partial_ptr + number.to(tl.int64) * SPLITS * TOKENS * BLOCK + place
        tl.store(parts + split * TOKENS * BLOCK, product)
        tl.debug_barrier()  # every thread's part is stored before the arrival that announces it
        if tl.atomic_add(arrivals_ptr + number, 1, sem="acq_rel") != SPLITS - 1:
            return
        tl.store(arrivals_ptr + number, 0)
        product = tl.zeros((TOKENS, BLOCK), tl.float32)
        for at in tl.static_range(SPLITS):
            product += tl.load(parts + at * TOKENS * BLOCK, cache_modifier=".cg")
    if SQUARES > 0:
        product = product / tl.sqrt(tl.sum(squares, 1) / K + eps)[:, None]
    if SWIGLU:
        gate, up = tl.split(tl.reshape(product, (TOKENS, COLUMNS, 2)))
        product = gate * tl.sigmoid(gate) * up
    if RESIDUAL:
        product += residual.to(tl.float32)
    rounded = product.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offsets, rounded, mask=there[:, None])
    if NEXT_SQUARES > 0:
        wide = rounded.to(tl.float32)
        tl.store(next_squares_ptr + token * NEXT_SQUARES + tile, tl.sum(wide * wide, 1), mask=there)


class Projections:
    """The projections of a layer with their scratch memory, which every layer of every step shares.

    Args:
        shapes: (rows, width) of the weights.
        dtype: of these.
        device: where they are.
    """

    def __init__(self, shapes: list[tuple[int, int]], dtype: torch.dtype, device: torch.device) -> None:
        tiles = [(rows, tile_for(rows, width, dtype)) for rows, width in shapes]
        room = max(rows * tile.splits * MAX_TOKENS if tile.splits > 1 else 0 for rows, tile in tiles)
        self.partial = torch.empty(room, dtype=torch.float32, device=device)
        programs = max(rows // tile.block for rows, tile in tiles) * (MAX_TOKENS // 64)
        self.arrivals = torch.zeros(programs, dtype=torch.int32, device=device)

    def __call__(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        *,
        squares: torch.Tensor | None = None,
        eps: float = 0.0,
        swiglu: bool = False,
        residual: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`weight` times RMSNorm(x), then SwiGLU or plus the residual.

        Args:
            x: (tokens, K), contiguous, at most `MAX_TOKENS` tokens.
            weight: (rows, K), contiguous; with `swiglu` the rows are [gate | up].
            squares: (tokens, any), which sum to those of each x; None where x is taken as it is.
            eps: of the RMSNorm.
            swiglu: whether the result is silu(gate) * up, with half as many columns as weight has rows.
            residual: (tokens, rows), added.

        Returns:
            (tokens, rows), or half the rows with `swiglu`; and with a residual, such squares of it.
        """
        tokens, width = x.shape
        tile = tile_for(weight.shape[0], width, x.dtype)
        rows = weight.shape[0] // 2 if swiglu else weight.shape[0]
        tiles, group = weight.shape[0] // tile.block, 64 if tokens <= 64 else 128
        out = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
        given = 0 if squares is None else squares.shape[1]
        left = None if residual is None else torch.empty(tokens, tiles, dtype=torch.float32, device=x.device)
        _gemm[(tiles, tile.splits, triton.cdiv(tokens, group))](
            x, weight, residual, squares, left, out, self.partial, self.arrivals, tokens, rows, eps,
            K=width, TOKENS=group, BLOCK=tile.block, DEPTH=tile.depth, SPLITS=tile.splits, EARLY=tile.early,
            STAGES=tile.stages, SQUARES=given, ALL_SQUARES=triton.next_power_of_2(max(1, given)), SWIGLU=swiglu,
            RESIDUAL=residual is not None, NEXT_SQUARES=0 if left is None else tiles,
            PDL=dependent_launch(x.device), num_warps=tile.warps * group // 64, **launch_options(x.device),
        )  # fmt: skip
        return out, left


def tile_for(rows: int, width: int, dtype: torch.dtype) -> Tile:
    """The division of a weight: some hundred programs, each with 48 KiB of W in flight."""
    block, depth = min(64, rows & -rows), min(128 * 2 // dtype.itemsize, width & -width)
    splits = 4 if rows // block <= 32 and width % (4 * depth) == 0 else 1
    return Tile(block, splits, depth, early=0, stages=4, warps=4)
