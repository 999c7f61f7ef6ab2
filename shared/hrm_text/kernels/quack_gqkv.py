"""gqkv's product with everything up to attention in its epilogue: the norm's factors, RoPE, and k and v into the cache.

A tile is a head of 128 tokens. Of each of its rows a thread has columns 8 j + 2 (lane % 4) and the next, for every j
(PTX ISA, "wgmma: D fragments"), so it has both halves of what RoPE turns; and four lanes have 16 bytes of it each once
they exchanged theirs. In pingpong one group of warps does this while the other computes its tile.
"""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
import torch
from cutlass import BFloat16, Float16, Float32, Int32
from quack.compile_utils import div_for_dtype, make_fake_tensor
from quack.cute_dsl_utils import mlir_namedtuple
from quack.epilogue.frontend import EpiPlan, epilogue_from_class
from quack.epilogue.mixin import ComposableEpiMixin
from quack.epilogue.ops import EpiOp
from quack.gemm_config import GemmConfig
from quack.gemm_sm90 import GemmSm90
from quack.rounding import RoundingMode
from quack.utils import elem_pointer

from hrm_text.kernels.pointwise import PrefillBatch

HEAD_DIM = 128
BLOCKS = HEAD_DIM // 8  # of columns in an accumulator's row, of which a lane has two
CONFIG = GemmConfig(128, HEAD_DIM, pingpong=True, is_dynamic_persistent=False, cluster_m=1, cluster_n=2)


def version_of(file: str) -> str:
    """To go behind the names of what quack compiles from `file`.

    It keeps machine code on disk, and tells functions and classes of installed packages by their names alone.
    """
    return "_" + hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]


class InMemory(EpiOp):
    """A tensor that the epilogue reads or writes where it lies; the last stride is 1."""

    def host_fake_arg(self, key: Any, fctx: Any) -> Any:
        dtype, rank = key
        divisor = 1 if rank == 1 else div_for_dtype(dtype)
        return make_fake_tensor(dtype, tuple(cute.sym_int() for _ in range(rank)), divisor)

    def param_fields(self) -> list[tuple[str, type, None]]:
        return [(self.name, object, None)]

    def to_params(self, gemm: Any, args: Any) -> dict[str, Any]:
        return {self.name: getattr(args, self.name)}


@mlir_namedtuple
class Operands(NamedTuple):
    """See `pointwise.PrefillBatch`; factors are (tokens,) float32, and the table is `PrefillBatch.turns`."""

    factors: cute.Tensor
    positions: cute.Tensor
    write_slots: cute.Tensor
    turns: cute.Tensor
    k_cache: cute.Tensor
    v_cache: cute.Tensor


@cute.jit
def sixteen_bytes(tensor: cute.Tensor, place: Any, count: cutlass.Constexpr[int]) -> cute.Tensor:
    """(count,) of `tensor` from `place` on, which is a multiple of 16 bytes from its start."""
    address = elem_pointer(tensor, place).toint()
    pointer = cute.make_ptr(tensor.element_type, address, cute.AddressSpace.gmem, assumed_align=16)
    return cute.make_tensor(pointer, cute.make_layout(count))


@cute.jit
def turns_of(turns: cute.Tensor, position: Int32, lane: Int32) -> cute.Tensor:
    """(2, 2, BLOCKS / 2): cosine and sine of what this lane of four has of a row at `position`."""
    mine = cute.make_rmem_tensor((2, 2, BLOCKS // 2), Float16)
    for load in cutlass.range_constexpr(BLOCKS // 4):
        there = sixteen_bytes(turns, (position, 8 * (4 * load + lane)), 8)
        cute.autovec_copy(there, cute.make_tensor(mine.iterator + 8 * load, cute.make_layout(8)))
    return mine


@cute.jit
def rotate(row: cute.Tensor, turns: cute.Tensor) -> None:
    """Turn (2, BLOCKS) row in place, of which this lane of four has two columns of every block."""
    for block in cutlass.range_constexpr(BLOCKS // 2):
        for each in cutlass.range_constexpr(2):
            cos, sin = turns[0, each, block].to(Float32), turns[1, each, block].to(Float32)
            first, second = row[each, block], row[each, block + BLOCKS // 2]
            row[each, block] = first * cos - second * sin
            row[each, block + BLOCKS // 2] = second * cos + first * sin


@cute.jit
def gather_blocks(words: cute.Tensor, lane: Int32) -> None:
    """Of (BLOCKS,) words, one of a block each, make whole blocks: words 4 n to 4 n + 3 are block 4 n + lane then."""
    for bit in cutlass.range_constexpr(2):
        high = (lane >> bit) % 2 == 1
        for start in cutlass.range_constexpr(0, BLOCKS, 4):
            for each in cutlass.range_constexpr(2):
                one = start + each * (2 >> bit)
                other = one + (1 << bit)
                low_word, high_word = words[one], words[other]
                sent = low_word if high else high_word
                got = cute.arch.shuffle_sync_bfly(sent, offset=1 << bit)
                words[one] = got if high else low_word
                words[other] = high_word if high else got


@cute.jit
def store(row: cute.Tensor, cache: cute.Tensor, slot: Int32, head: Int32, lane: Int32) -> None:
    """Write (2, BLOCKS) row to `slot` of (pages, page size, heads, head_dim) cache, unless that is negative."""
    narrow = cute.make_rmem_tensor((2, BLOCKS), BFloat16)
    for block in cutlass.range_constexpr(BLOCKS):
        for each in cutlass.range_constexpr(2):
            narrow[each, block] = row[each, block].to(BFloat16)
    words = cute.recast_tensor(narrow, Int32)
    words = cute.make_tensor(words.iterator, cute.make_layout(BLOCKS))
    gather_blocks(words, lane)
    page_size = cache.shape[1]
    if slot >= 0:
        page, place = slot // page_size, slot % page_size
        for group in cutlass.range_constexpr(BLOCKS // 4):
            block = cute.make_tensor(narrow.iterator + 8 * group, cute.make_layout(8))
            cute.autovec_copy(block, sixteen_bytes(cache, (page, place, head, 8 * (4 * group + lane)), 8))


class GqkvGemm(ComposableEpiMixin, GemmSm90):
    """(tokens, [gate | q | k | v]), each of whole heads."""

    _epi_ops = tuple(InMemory(name) for name in Operands._fields)
    EpilogueArguments = Operands

    def epi_to_underlying_arguments(self, args: Any, *, loc: Any = None, ip: Any = None) -> Any:
        self.rounding_mode = RoundingMode.RN
        return self.EpilogueParams(**self._epi_ops_to_params_dict(args))

    @cute.jit
    def epi_visit_acc(
        self, params: Any, acc: cute.Tensor, tiled_mma: cute.TiledMma, tile_coord_mnkl: Any, tidx: Int32
    ) -> None:
        (rows, columns, _), tokens, heads = self.cta_tile_shape_mnk, params.positions.shape[0], params.k_cache.shape[2]
        part, head, lane = tile_coord_mnkl[1] // heads, tile_coord_mnkl[1] % heads, tidx % 4
        places = tiled_mma.get_slice(tidx).partition_C(cute.make_identity_tensor((rows, columns)))
        count = cutlass.const_expr(2 * cute.size(acc, mode=[1]))  # of rows
        mine = [acc[(None, row % 2, None), row // 2, 0] for row in range(count)]
        factors = cute.make_rmem_tensor(count, Float32)
        positions, slots = cute.make_rmem_tensor(count, Int32), cute.make_rmem_tensor(count, Int32)
        # All at once, and what is read next while something is computed: the other warps wait for these.
        for row in cutlass.range_constexpr(count):
            token = tile_coord_mnkl[0] * rows + places[(0, row % 2, 0), row // 2, 0][0]
            own = cutlass.min(token, tokens - 1)
            factors[row] = params.factors[own]
            positions[row] = params.positions[own].to(Int32)
            slots[row] = params.write_slots[own].to(Int32) if token < tokens else Int32(-1)
        for row in cutlass.range_constexpr(count):
            for block in cutlass.range_constexpr(BLOCKS):
                for each in cutlass.range_constexpr(2):
                    mine[row][each, block] = mine[row][each, block] * factors[row]
        if part % 3 > 0:
            turns = turns_of(params.turns, positions[0], lane)
            for row in cutlass.range_constexpr(count):
                ahead = turns_of(params.turns, positions[min(row + 1, count - 1)], lane)
                rotate(mine[row], turns)
                turns = ahead
        if part == 2:
            for row in cutlass.range_constexpr(count):
                store(mine[row], params.k_cache, slots[row], head, lane)
        if part == 3:
            for row in cutlass.range_constexpr(count):
                store(mine[row], params.v_cache, slots[row], head, lane)


GqkvGemm.__qualname__ += version_of(__file__)
globals()[GqkvGemm.__qualname__] = GqkvGemm


class Gqkv:
    """Calls it; compiled when it is first called, for all shapes."""

    def __init__(self) -> None:
        self._plan: EpiPlan | None = None

    def __call__(
        self,
        x: torch.Tensor,
        factors: torch.Tensor,
        weight: torch.Tensor,
        batch: PrefillBatch,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
    ) -> torch.Tensor:
        """As `hrm_text.kernels.products.Products.gqkv`, with caches that are `fit`."""
        out = torch.empty(len(x), len(weight), dtype=x.dtype, device=x.device)
        positions, slots = batch.positions.long(), batch.write_slots.long()
        operands = Operands(factors, positions, slots, batch.turns, k_cache, v_cache)._asdict()
        if self._plan is None:
            gemm = epilogue_from_class(GqkvGemm)
            self._plan = gemm.plan(x, weight, out, epi_args=operands, config=CONFIG)
        self._plan.run(x, weight, out={"D": out}, **operands)
        return out


def fit(*caches: torch.Tensor) -> bool:
    """Whether it was compiled for such (pages, page size, heads, head_dim) caches."""
    return all(
        cache.shape[-1] == HEAD_DIM
        and cache.dtype == torch.bfloat16
        and cache.data_ptr() % 16 == 0
        and all(stride % 8 == 0 for stride in cache.stride()[:-1])
        for cache in caches
    )
