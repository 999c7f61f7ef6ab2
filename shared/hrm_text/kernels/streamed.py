"""`Projections` for 9 to 128 tokens on the tensor cores of warpgroups: geometry and launch of `streamed.cu`."""

import ctypes
import dataclasses
import functools
from dataclasses import dataclass
from typing import Protocol

import torch

from hrm_text.kernels.nvrtc import DependentKernel, checked_cuda, compile_for_hopper, once, source, why_not_loaded
from hrm_text.kernels.staged import SHARED_BYTES

TOKENS = (16, 32, 64, 128)  # a kernel for up to so many
MAX_TOKENS = TOKENS[-1]
DEPTH = 64  # columns of a stage
MAX_PARTS = 32  # of a token's squares
SOURCES = ("staged_ptx.cuh", "streamed_ptx.cuh", "projection_parts.cuh", "streamed.cu")
REGISTERS = 128  # of a thread, at most
LEAST_REGISTERS = 56  # of a thread of o and down, as they are dealt
MULTIPROCESSOR_BYTES = 228 * 1024  # of shared memory, of which a CTA takes 1 KiB more than it asks for
MULTIPROCESSOR_REGISTERS = 65536
# Warps that a CTA is launched with where two would find room on a multiprocessor. Those without work end at once, but
# while it is launched their registers keep a second one away, so that CTAs come to more multiprocessors: on an H200 a
# step of 64 x 576 takes 9.86 ms, not 9.99, of 96 x 288 9.56, not 10.04. 16 warps, which take half of the registers,
# change nothing.
SPREADING_WARPS = 20


@dataclass(frozen=True)
class Tile:
    """How a projection is divided.

    Attributes:
        rows: of W that a CTA takes.
        splits: CTAs of a cluster, which have the same rows and a part of the columns each.
        x_stages: of 64 columns that are on their way, at most.
        shared: KiB of shared memory that a CTA takes; of W there is as much on its way as that leaves room for.
    """

    rows: int
    splits: int
    x_stages: int
    shared: int


# By the most tokens; 128 CTAs each, for an H200. A CTA is given its part of W and all of x at some 78 bytes a ns: of 64
# tokens it waits for x as long as for W (benchmarks/kernels/NOTES.md).
TILES = {
    16: {
        "gqkv": Tile(48, 1, 24, 160),
        "o": Tile(48, 4, 6, 90),
        "gate_up": Tile(64, 1, 24, 160),
        "down": Tile(48, 4, 16, 97),
    },
    32: {
        "gqkv": Tile(48, 1, 16, 145),
        "o": Tile(48, 4, 6, 97),
        "gate_up": Tile(64, 1, 12, 145),
        "down": Tile(48, 4, 12, 97),
    },
    64: {
        "gqkv": Tile(48, 1, 10, 141),
        "o": Tile(48, 4, 4, 90),
        "gate_up": Tile(64, 1, 8, 141),
        "down": Tile(48, 4, 4, 90),
    },
    128: {
        "gqkv": Tile(48, 1, 6, 145),
        "o": Tile(48, 4, 3, 97),
        "gate_up": Tile(64, 1, 6, 155),
        "down": Tile(48, 4, 3, 97),
    },
}


@dataclass(frozen=True)
class Geometry:
    """What the kernel is compiled for.

    Attributes:
        rows, width: of the weight.
        norm, swiglu, residual: what surrounds the product.
        tokens: at most.
        tile: the division.
        w_stages, x_stages: of 64 columns that are on their way.
    """

    rows: int
    width: int
    norm: bool
    swiglu: bool
    residual: bool
    tokens: int
    tile: Tile
    w_stages: int
    x_stages: int

    @classmethod
    def of(cls, rows: int, width: int, norm: bool, swiglu: bool, residual: bool, tokens: int) -> "Geometry":
        """For at most so many tokens, one of `TOKENS`."""
        name = "gate_up" if swiglu else "gqkv" if not residual else "down" if width > rows else "o"
        tile = TILES[tokens][name]
        empty = cls(rows, width, norm, swiglu, residual, tokens, tile, w_stages=0, x_stages=0)
        one = dataclasses.replace(empty, x_stages=min(empty.steps, tile.x_stages))
        left = tile.shared * 1024 - one.least_shared_bytes
        return dataclasses.replace(one, w_stages=min(one.steps, max(2, left // (128 * tile.rows + 16))))

    @property
    def steps(self) -> int:
        """Of 64 columns, in a CTA's part."""
        return self.width // self.tile.splits // DEPTH

    @property
    def warpgroups(self) -> int:
        """Of 64 tokens each."""
        return -(-self.tokens // 64)

    @property
    def warps(self) -> int:
        """That have work: four of each warpgroup, and two that fetch."""
        return 4 * self.warpgroups + 2

    @property
    def launched_warps(self) -> int:
        """Of a CTA."""
        alone = 2 * (self.shared_bytes + 1024) > MULTIPROCESSOR_BYTES
        return self.warps if alone else max(self.warps, SPREADING_WARPS)

    @property
    def registers(self) -> int:
        """Of a thread, at most, so that a CTA can be launched; they are dealt by eights."""
        return min(REGISTERS, MULTIPROCESSOR_REGISTERS // (32 * self.launched_warps) // 8 * 8)

    @property
    def ctas(self) -> int:
        return self.rows // self.tile.rows * self.tile.splits

    @property
    def parts(self) -> int:
        """Into which a token's squares are left."""
        return self.rows // self.tile.rows

    @property
    def macros(self) -> tuple[str, ...]:
        """Options of the compiler."""
        names = "rows norm swiglu residual tokens warps w_stages x_stages registers".split()
        values = {name.upper(): int(getattr(self, name)) for name in names}
        values |= {"K": self.width, "ROWS_HERE": self.tile.rows, "SPLITS": self.tile.splits}
        return tuple(f"-D{name}={value}" for name, value in values.items())

    @property
    def least_shared_bytes(self) -> int:
        """Rings of W and x, sums that are sent, and barriers."""
        tile, consumers = self.tile, 4 * self.warpgroups
        rings = 128 * (self.w_stages * tile.rows + self.x_stages * self.tokens)
        sums = consumers * tile.rows * 64 if tile.splits > 1 else 0
        return rings + sums + 16 * (self.w_stages + self.x_stages) + 8 * consumers

    @property
    def shared_bytes(self) -> int:
        return max(self.least_shared_bytes, self.tile.shared * 1024)

    @property
    def fits(self) -> bool:
        """Whether a weight of this shape can be divided so: all that the kernel asserts, and that a launch takes."""
        tile = self.tile
        return (
            self.width % (DEPTH * tile.splits) == 0
            and self.rows % tile.rows == 0
            and tile.rows % (32 if self.swiglu else 16) == 0
            and tile.splits in (1, 2, 4)
            and min(self.w_stages, self.x_stages) >= min(2, self.steps)
            and max(self.w_stages, self.x_stages) <= self.steps
            and (not self.residual or self.parts <= MAX_PARTS)
            and self.shared_bytes <= SHARED_BYTES
        )


TensorMap = ctypes.c_uint64 * 16


class Params(ctypes.Structure):
    """Arguments of the kernel; by value, so that a CUDA graph holds them."""

    _fields_ = [
        ("x", TensorMap),
        ("w", TensorMap),
        *((name, ctypes.c_void_p) for name in ("squares", "residual", "out", "next_squares")),
        *((name, ctypes.c_int) for name in ("tokens", "x_rows", "parts")),
        ("eps", ctypes.c_float),
        ("padding", ctypes.c_int * 4),  # to a multiple of 64 bytes
    ]


class Kernel(Protocol):
    """What runs a projection."""

    geometry: Geometry

    def tensor_map(self, address: int, rows: int, columns: int, fetched: int) -> "ctypes.Array[ctypes.c_uint64]":
        """Of a contiguous (rows, columns) matrix of bfloat16, of which `fetched` rows by 64 columns are a tile."""

    def __call__(self, params: ctypes.Structure) -> None: ...


@functools.lru_cache(4096)  # those of weights are asked for in every step
def tensor_map(address: int, rows: int, columns: int, fetched: int) -> "ctypes.Array[ctypes.c_uint64]":
    """As `Kernel` says; its numbers say all about it.

    Raises:
        RuntimeError: the driver refuses it.
    """
    from cuda.bindings import driver

    wide, narrow = driver.cuuint64_t, driver.cuuint32_t
    made = driver.cuTensorMapEncodeTiled(
        driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, address,
        [wide(columns), wide(rows)], [wide(2 * columns)], [narrow(DEPTH), narrow(fetched)], [narrow(1), narrow(1)],
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )  # fmt: skip
    return TensorMap.from_buffer_copy(ctypes.string_at(int(checked_cuda(made).getPtr()), ctypes.sizeof(TensorMap)))


class Streamed(DependentKernel):
    """A `Kernel` on the current device."""

    tensor_map = staticmethod(tensor_map)

    def __init__(self, geometry: Geometry) -> None:
        super().__init__(
            code_for(geometry), "streamed", geometry.ctas, 32 * geometry.launched_warps, geometry.shared_bytes,
            cluster=geometry.tile.splits,
        )  # fmt: skip
        self.geometry = geometry


@once
def code_for(geometry: Geometry) -> bytes:
    """Machine code of the kernel."""
    return compile_for_hopper(source(*SOURCES), "streamed.cu", geometry.macros)


@functools.cache
def kernel_for(rows: int, width: int, norm: bool, swiglu: bool, residual: bool, tokens: int, device: int) -> Kernel:
    """The kernel for a weight's shape; the first call compiles, so it must come before a capture.

    Args:
        tokens: one of `TOKENS`.
        device: index of the GPU.
    """
    with torch.cuda.device(device):
        return Streamed(Geometry.of(rows, width, norm, swiglu, residual, tokens))


def streamed_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    squares: torch.Tensor | None = None,
    eps: float = 0.0,
    swiglu: bool = False,
    residual: torch.Tensor | None = None,
    kernel: Kernel | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `gemm.Projections`, for bfloat16 and at most `MAX_TOKENS` tokens.

    Args:
        squares: (tokens, at most `MAX_PARTS`).
        kernel: that runs it, where it is not the device's own.
    """
    tokens, (rows, width) = len(x), weight.shape
    if kernel is None:
        group = next(each for each in TOKENS if tokens <= each)
        kernel = kernel_for(rows, width, squares is not None, swiglu, residual is not None, group, x.device.index)
    geometry, tile = kernel.geometry, kernel.geometry.tile
    assert 1 <= tokens <= geometry.tokens and x.shape[1] == width and x.is_contiguous() and weight.is_contiguous()
    assert squares is None or (squares.is_contiguous() and squares.shape[1] <= MAX_PARTS)
    assert x.data_ptr() % 16 == 0 and weight.data_ptr() % 16 == 0, "tiles begin at multiples of 16 bytes"
    outputs, here = (rows // 2, tile.rows // 2) if swiglu else (rows, tile.rows)
    out, left = x.new_empty(tokens, outputs), None
    if residual is not None:
        assert residual.is_contiguous() and residual.shape == out.shape
        left = torch.empty(tokens, geometry.parts, dtype=torch.float32, device=x.device)
    x_rows = 8 * -(-tokens // 8)  # lines of 8 rows are a unit of a tile
    pointers = [None if each is None else each.data_ptr() for each in (squares, residual, out, left)]
    kernel(
        Params(
            kernel.tensor_map(x.data_ptr(), tokens, width, x_rows),
            kernel.tensor_map(weight.data_ptr(), rows, width, here),
            *pointers, tokens, x_rows, 0 if squares is None else squares.shape[1], eps,
        )
    )  # fmt: skip
    return out, left


def why_not(shapes: list[tuple[int, int, bool, bool, bool]], dtype: torch.dtype, device: torch.device) -> str | None:
    """Why projections cannot run on these kernels; None when they can. Compiles and loads them.

    Args:
        shapes: (rows, width, norm, swiglu, residual) of each.
        dtype: of weights and activations.
        device: where they are.
    """
    kinds = [(*shape, tokens) for shape in shapes for tokens in TOKENS]
    return why_not_loaded(kinds, lambda *kind: Geometry.of(*kind).fits, kernel_for, dtype, device)
