"""`staged_linear` for 9 to 32 tokens, W dealt among clusters of CTAs: geometry and launch of `clustered.cu`."""

import ctypes
import functools
from dataclasses import dataclass

import torch

from hrm_text.kernels.nvrtc import DependentKernel, compile_for_hopper, source, why_not_loaded
from hrm_text.kernels.staged import BLOCK, SHARED_BYTES, Launch, room_for

TOKENS = (16, 32)  # a kernel for up to so many
MAX_TOKENS = TOKENS[-1]
SOURCES = ("staged_ptx.cuh", "cluster_ptx.cuh", "projection_parts.cuh", "clustered.cu")
STAGE_BYTES = 32 * 64  # of a warp
SUMS_STRIDE = 20  # floats of a token's sums of 16 rows
REGISTERS = 128  # of a thread; two CTAs of 8 warps fit into a multiprocessor


@dataclass(frozen=True)
class Tile:
    """How a projection is divided.

    Attributes:
        splits: CTAs of a cluster, which have a part of the columns each.
        row_warps: of a CTA, with 32 rows each.
        k_warps: that share the columns of these rows.
        shared: KiB of shared memory that a CTA takes.
    """

    splits: int
    row_warps: int
    k_warps: int
    shared: int


# gqkv and gate_up take more than half of a multiprocessor, so that two of their CTAs never share one while others stand
# empty; o or down fits beside them. Clusters of four would do for these two, but not all 32 find four multiprocessors.
TILES = {
    "gqkv": Tile(splits=2, row_warps=3, k_warps=2, shared=129),
    "o": Tile(splits=4, row_warps=2, k_warps=2, shared=97),
    "gate_up": Tile(splits=2, row_warps=4, k_warps=2, shared=129),
    "down": Tile(splits=8, row_warps=4, k_warps=2, shared=97),
}


@dataclass(frozen=True)
class Geometry:
    """What the kernel is compiled for.

    Attributes:
        rows, width: of the weight.
        norm, swiglu, residual: what surrounds the product.
        blocked: whether the result is in blocks, and not in rows.
        tokens: at most.
        splits, row_warps, k_warps: as in `Tile`.
        stages: of 32 columns, which a warp has on their way.
        shared: KiB of shared memory, at least.
    """

    rows: int
    width: int
    norm: bool
    swiglu: bool
    residual: bool
    blocked: bool
    tokens: int
    splits: int
    row_warps: int
    k_warps: int
    stages: int
    shared: int

    @classmethod
    def of(
        cls, rows: int, width: int, norm: bool, swiglu: bool, residual: bool, blocked: bool, tokens: int
    ) -> "Geometry":
        """For at most so many tokens, by `TILES`."""
        tile = TILES["gate_up" if swiglu else "gqkv" if not residual else "down" if width > rows else "o"]
        warps = tile.row_warps * tile.k_warps
        rest = tile.shared * 1024 - other_bytes(width, tile.splits, tokens)
        blocks = width // tile.splits // tile.k_warps // BLOCK
        stages = max(2, min(blocks, rest // (warps * STAGE_BYTES)))
        return cls(
            rows, width, norm, swiglu, residual, blocked, tokens, tile.splits, tile.row_warps, tile.k_warps, stages,
            tile.shared,
        )  # fmt: skip

    @property
    def warps(self) -> int:
        return self.row_warps * self.k_warps

    @property
    def ctas(self) -> int:
        return self.rows // (32 * self.row_warps) * self.splits

    @property
    def macros(self) -> tuple[str, ...]:
        """Options of the compiler."""
        names = "rows norm swiglu residual blocked tokens splits row_warps k_warps stages warps".split()
        values = {name.upper(): int(getattr(self, name)) for name in names} | {"K": self.width, "REGISTERS": REGISTERS}
        return tuple(f"-D{name}={value}" for name, value in values.items())

    @property
    def shared_bytes(self) -> int:
        """The ring, this CTA's part of x, and barriers; what CTAs send one another takes their place."""
        least = self.warps * self.stages * STAGE_BYTES + other_bytes(self.width, self.splits, self.tokens)
        return max(least, self.shared * 1024)

    @property
    def fits(self) -> bool:
        """Whether a weight of this shape can be divided so: all that the kernel asserts, and that a launch takes."""
        tiles, outputs = 2 * self.row_warps // self.splits, self.rows // (2 if self.swiglu else 1)
        return (
            self.rows % (32 * self.row_warps) == 0
            and self.width % (BLOCK * self.splits * self.k_warps) == 0
            and 4 % self.k_warps == 0
            and 2 * self.row_warps % self.splits == 0
            and not (self.swiglu and tiles % 2)
            and self.tokens % 16 == 0
            and outputs % BLOCK == 0
            and self.width // self.splits // BLOCK <= 32
            and self.sums_bytes
            <= self.warps * self.stages * STAGE_BYTES + x_bytes(self.width, self.splits, self.tokens)
            and self.shared_bytes <= SHARED_BYTES
        )

    @property
    def sums_bytes(self) -> int:
        """What comes where W and x were: SUMS, squares and PARTS in `clustered.cu`."""
        sums, squares = 2 * self.row_warps * SUMS_STRIDE, self.splits * self.warps
        parts = self.warps * (4 - 4 // self.k_warps) * 8
        return 4 * self.tokens * (sums + squares + parts)


def x_bytes(width: int, splits: int, tokens: int) -> int:
    """Of a CTA's part of x."""
    return width // splits * tokens * 2


def other_bytes(width: int, splits: int, tokens: int) -> int:
    """Shared memory beside the ring: x, and barriers."""
    return x_bytes(width, splits, tokens) + 32


class Params(ctypes.Structure):
    """Arguments of the kernel; by value, so that a CUDA graph holds them."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "w", "residual", "out")),
        ("tokens", ctypes.c_int),
        ("eps", ctypes.c_float),
    ]


@functools.cache
def code_for(geometry: Geometry) -> bytes:
    """Machine code of the kernel."""
    return compile_for_hopper(source(*SOURCES), "clustered.cu", geometry.macros)


@functools.cache
def kernel_for(
    rows: int, width: int, norm: bool, swiglu: bool, residual: bool, blocked: bool, tokens: int, device: int
) -> Launch:
    """The kernel's launcher; the first call for a weight's shape compiles, so it must come before a capture.

    Args:
        tokens: one of `TOKENS`.
        device: index of the GPU.
    """
    geometry = Geometry.of(rows, width, norm, swiglu, residual, blocked, tokens)
    with torch.cuda.device(device):
        return DependentKernel(
            code_for(geometry), "clustered", geometry.ctas, 32 * geometry.warps, geometry.shared_bytes,
            cluster=geometry.splits,
        )  # fmt: skip


def tokens_for(tokens: int) -> int:
    """Of the kernel that takes so many."""
    return next(each for each in TOKENS if tokens <= each)


def clustered_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    norm_eps: float | None = None,
    swiglu: bool = False,
    residual: torch.Tensor | None = None,
    copies: int = 0,
    kernel: Launch | None = None,
) -> torch.Tensor:
    """As `staged_linear`, for at most `MAX_TOKENS` tokens, and one copy of each.

    Args:
        x: (1, K / 32, tokens, 32).
        residual: (1, rows / 32, tokens, 32).
        copies: 1 for the result in blocks as well, 0 for one in rows.
        kernel: that runs it, where it is not the device's own.
    """
    tokens, (rows, width) = x.shape[2], weight.shape
    outputs = rows // 2 if swiglu else rows
    assert len(x) == 1 and x.shape[1] * x.shape[3] == width and x.shape[3] == BLOCK and copies in (0, 1)
    assert 1 <= tokens <= MAX_TOKENS and x.is_contiguous() and (residual is None or residual.is_contiguous())
    assert x.data_ptr() % 16 == 0 and weight.data_ptr() % 16 == 0, "rows are copied in units of 16 bytes"
    out = room_for(copies, tokens, outputs, x)
    if kernel is None:
        around = norm_eps is not None, swiglu, residual is not None
        kernel = kernel_for(rows, width, *around, copies > 0, tokens_for(tokens), x.device.index)
    given = None if residual is None else residual.data_ptr()
    kernel(Params(x.data_ptr(), weight.data_ptr(), given, out.data_ptr(), tokens, norm_eps or 0.0))
    return out


def why_not(
    shapes: list[tuple[int, int, bool, bool, bool, bool]], dtype: torch.dtype, device: torch.device
) -> str | None:
    """Why projections cannot run on these kernels; None when they can. Compiles and loads them.

    Args:
        shapes: (rows, width, norm, swiglu, residual, blocked) of each.
        dtype: of weights and activations.
        device: where they are.
    """
    kinds = [(*shape, tokens) for shape in shapes for tokens in TOKENS]
    return why_not_loaded(kinds, lambda *kind: Geometry.of(*kind).fits, kernel_for, dtype, device)
