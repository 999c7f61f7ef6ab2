"""`small_linear` for 1 to 8 tokens with W's rows waiting in shared memory: geometry and launch of `staged.cu`."""

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from hrm_text.kernels.nvrtc import DependentKernel, compile_for_hopper, once, source, why_not_loaded

MAX_TOKENS = 8
BLOCK = 32  # columns that lie together, those of all tokens
COPIES = 4  # of what the next projection reads: X_COPIES in `staged.cu`
SOURCES = ("staged_ptx.cuh", "projection_parts.cuh", "staged.cu")
SHARED_BYTES = 227 * 1024  # of a CTA, at most


@dataclass(frozen=True)
class Tile:
    """How a projection is run.

    Attributes:
        ring: KiB of its rows that wait in shared memory.
        warps: that multiply, at most; each owns a slice of the columns.
        registers: of a thread.
        ahead: quads of rows that are on their way at a time.
    """

    ring: int
    warps: int
    registers: int
    ahead: int


# Neighbours fit together into a multiprocessor: its 228 KiB, of which each CTA takes 1 KiB more than it asks for, and
# its 65536 registers. gqkv, attention and o; attention, o and gate_up; gate_up and down; down, the next gqkv and its
# attention.
TILES = {
    "gqkv": Tile(ring=112, warps=8, registers=72, ahead=3),
    "o": Tile(ring=50, warps=8, registers=64, ahead=1),
    "gate_up": Tile(ring=124, warps=8, registers=80, ahead=4),
    "down": Tile(ring=98, warps=16, registers=64, ahead=1),
}


@dataclass(frozen=True)
class Geometry:
    """What the kernel is compiled for.

    Attributes:
        rows, width: of the weight.
        norm, swiglu, residual: what surrounds the product.
        ctas: among which the rows are dealt, 4 at a time.
        warps: that multiply.
        slots: of the ring, 4 rows each.
        registers: of a thread, at most.
        ahead: quads that are on their way at a time.
        copies: of the result in blocks; 0 for one in rows.
    """

    rows: int
    width: int
    norm: bool
    swiglu: bool
    residual: bool
    ctas: int
    warps: int
    slots: int
    registers: int
    ahead: int
    copies: int = 0

    @classmethod
    def of(
        cls, rows: int, width: int, norm: bool, swiglu: bool, residual: bool, processors: int, copies: int = 0
    ) -> "Geometry":
        """For a weight on a GPU of so many multiprocessors, by `TILES`."""
        tile = TILES["gate_up" if swiglu else "gqkv" if not residual else "down" if width > rows else "o"]
        warps = tile.warps
        while width % (32 * warps) and warps > 4:
            warps //= 2
        slots = max(1, tile.ring * 1024 // slot_bytes(width))
        ctas = min(processors, rows // 4)
        return cls(rows, width, norm, swiglu, residual, ctas, warps, slots, tile.registers, tile.ahead, copies)

    @property
    def macros(self) -> tuple[str, ...]:
        """Options of the compiler."""
        values = {"K": self.width} | {
            name.upper(): int(getattr(self, name))
            for name in ("rows", "norm", "swiglu", "residual", "ctas", "warps", "slots", "registers", "ahead", "copies")
        }
        return tuple(f"-D{name}={value}" for name, value in values.items())

    @property
    def threads(self) -> int:
        return 32 * (self.warps + 1)

    @property
    def shared_bytes(self) -> int:
        """The ring, its barriers, and the squares of each token's slices."""
        return self.slots * (slot_bytes(self.width) + 16) + 4 * MAX_TOKENS * self.warps


def slot_bytes(width: int) -> int:
    """Of 4 rows, as `staged.cu` pads them."""
    return 4 * (2 * width + 64)


def fits(rows: int, width: int) -> bool:
    """Whether the kernel takes a weight of this shape."""
    return rows % 4 == 0 and width % 128 == 0 and slot_bytes(width) <= SHARED_BYTES // 2


class Params(ctypes.Structure):
    """Arguments of the kernel; by value, so that a CUDA graph holds them."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "w", "residual", "out")),
        *((name, ctypes.c_int) for name in ("tokens", "shift", "apart")),
        ("eps", ctypes.c_float),
    ]


Launch = Callable[[ctypes.Structure], None]  # of `Params`


@once
def code_for(geometry: Geometry) -> bytes:
    """Machine code of the kernel."""
    return compile_for_hopper(source(*SOURCES), "staged.cu", geometry.macros)


@functools.cache
def kernel_for(rows: int, width: int, norm: bool, swiglu: bool, residual: bool, copies: int, device: int) -> Launch:
    """The kernel's launcher; the first call for a weight's shape compiles, so it must come before a capture.

    Args:
        device: index of the GPU.
    """
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    geometry = Geometry.of(rows, width, norm, swiglu, residual, processors, copies)
    with torch.cuda.device(device):
        return DependentKernel(code_for(geometry), "staged", geometry.ctas, geometry.threads, geometry.shared_bytes)


def staged_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    norm_eps: float | None = None,
    swiglu: bool = False,
    residual: torch.Tensor | None = None,
    copies: int = 0,
    kernel: Launch | None = None,
) -> torch.Tensor:
    """As `small_linear`, for bfloat16 and at most `MAX_TOKENS` tokens.

    All multiprocessors ask for x at once, and wait for the parts of L2 where it lies: so it is in blocks (`in_blocks`),
    and may be there more than once.

    Args:
        x: (1 or `COPIES`, K / 32, tokens, 32).
        residual: (any, rows / 32, tokens, 32), of which the first is read.
        copies: of the result, in blocks as well; 0 for one in rows. Each number of them is a kernel of its own.
        kernel: that runs it, where it is not the device's own.

    Returns:
        (copies, outputs / 32, tokens, 32), without copies (tokens, outputs), of what `small_linear` returns.
    """
    tokens, (rows, width) = x.shape[2], weight.shape
    outputs = rows // 2 if swiglu else rows
    assert len(x) in (1, COPIES) and x.shape[1] * x.shape[3] == width and x.shape[3] == BLOCK
    assert 1 <= tokens <= MAX_TOKENS and x.is_contiguous() and (residual is None or residual.is_contiguous())
    assert x.data_ptr() % 16 == 0 and weight.data_ptr() % 16 == 0, "rows are copied in units of 16 bytes"
    assert outputs % BLOCK == 0 or not (copies or residual is not None)
    out = room_for(copies, tokens, outputs, x)
    launch = kernel or kernel_for(
        rows, width, norm_eps is not None, swiglu, residual is not None, copies, x.device.index
    )
    launch(
        Params(
            x.data_ptr(), weight.data_ptr(), None if residual is None else residual.data_ptr(), out.data_ptr(),
            tokens, (tokens - 1).bit_length(), tokens * width if len(x) > 1 else 0, norm_eps or 0.0,
        )
    )  # fmt: skip
    return out


def copies_for(tokens: int) -> int:
    """Of what a projection reads. With more tokens, writing them takes longer than it saves: on an H200 steps of the 1B
    went from 2.59 to 2.49 ms with 1, from 3.26 to 3.13 with 4, from 3.37 to 3.41 with 8."""
    return COPIES if tokens <= MAX_TOKENS // 2 else 1


def room_for(copies: int, tokens: int, columns: int, like: torch.Tensor) -> torch.Tensor:
    """For (tokens, columns), or copies of it in blocks, (copies, columns / 32, tokens, 32), of the type of `like`."""
    return like.new_empty((copies, columns // BLOCK, tokens, BLOCK) if copies else (tokens, columns))


def in_blocks(x: torch.Tensor) -> torch.Tensor:
    """(tokens, columns) x as projections read it, (1, columns / 32, tokens, 32): of 32 columns those of all tokens."""
    return x.unflatten(-1, (-1, BLOCK)).transpose(0, 1)[None].contiguous()


def in_rows(x: torch.Tensor) -> torch.Tensor:
    """The inverse of `in_blocks`, for the first copy."""
    return x[0].transpose(0, 1).flatten(1)


def why_not(
    shapes: list[tuple[int, int, bool, bool, bool, int]], dtype: torch.dtype, device: torch.device
) -> str | None:
    """Why projections cannot run on these kernels; None when they can. Compiles and loads them.

    Args:
        shapes: (rows, width, norm, swiglu, residual, copies) of each.
        dtype: of weights and activations.
        device: where they are.
    """
    return why_not_loaded(shapes, lambda rows, width, *_: fits(rows, width), kernel_for, dtype, device)
