"""`DecodeAttention` for up to 128 requests in bfloat16 on Hopper: geometry and launch of `attention.cu`."""

import ctypes
import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from hrm_text.kernels.nvrtc import DependentKernel, compile_for_hopper, once, source, why_not_loaded

if TYPE_CHECKING:
    from hrm_text.kernels.attention import DecodeBatch

HEAD_DIM = 128
BLOCK = 16  # tokens that a warp takes at a time
PIECE = 8  # elements of 16 bytes
REGISTERS = 128  # of a thread
SOURCES = (
    "staged_ptx.cuh",
    "streamed_ptx.cuh",
    "attention_ptx.cuh",
    "projection_parts.cuh",
    "attention_block.cuh",
    "attention.cu",
)


@dataclass(frozen=True)
class Tile:
    """How a context is divided.

    Attributes:
        splits: CTAs of a cluster, which has one head of one request.
        warps: of a CTA; blocks are dealt to those of the whole cluster.
        stages: blocks that a warp has on their way, at most.
    """

    splits: int
    warps: int
    stages: int

    @property
    def macros(self) -> tuple[str, ...]:
        """Options of the compiler."""
        names = ("splits", "warps", "stages")
        return (
            f"-DDIM={HEAD_DIM}",
            f"-DREGISTERS={REGISTERS}",
            *(f"-D{name.upper()}={getattr(self, name)}" for name in names),
        )

    @property
    def shared_bytes(self) -> int:
        """Blocks on their way, the query, what the cluster's warps send, the new token, and a barrier."""
        blocks = self.warps * self.stages * BLOCK * HEAD_DIM * 4
        return blocks + 4 * HEAD_DIM + self.splits * self.warps * 4 * (HEAD_DIM + 4) + 32 * 16 + 8


# By the most requests.
TILES = {
    2: Tile(4, 3, 2),
    4: Tile(2, 4, 2),
    8: Tile(1, 6, 2),
    16: Tile(2, 3, 2),
    32: Tile(2, 2, 2),
    64: Tile(1, 2, 2),
    128: Tile(1, 1, 2),
}
MAX_TOKENS = max(TILES)


class Params(ctypes.Structure):
    """Arguments of the kernel; by value, so that a CUDA graph holds them."""

    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in "gqkv k v cos_sin positions write_slots table row_starts lengths out".split()
        ),
        *((name, ctypes.c_uint32) for name in ("page_pieces", "line_pieces", "head_pieces")),
        *((name, ctypes.c_int) for name in ("page_shift", "tokens", "heads", "table_stride", "copies")),
        *((name, ctypes.c_int) for name in ("wide_positions", "wide_slots", "wide_table", "float_cos_sin")),
        ("scale", ctypes.c_float),
        ("padding", ctypes.c_int),
    ]


class Kernel(Protocol):
    """What runs it."""

    def __call__(self, params: ctypes.Structure, clusters: int) -> None: ...


class Attention:
    """A `Kernel` on the current device."""

    def __init__(self, tile: Tile) -> None:
        threads, splits = 32 * tile.warps, tile.splits
        self.launch = DependentKernel(code_for(tile), "attention", splits, threads, tile.shared_bytes, cluster=splits)
        self.splits = splits
        self.together = math.lcm(splits, torch.cuda.get_device_properties().multi_processor_count)

    def __call__(self, params: ctypes.Structure, clusters: int) -> None:
        """Launch it for so many clusters.

        Every multiprocessor is given as many CTAs, some of them without a request, so that what is launched next is
        dealt evenly too: of 8 x 192 a step takes 2.66 ms on an H200, without them 2.99.
        """
        self.launch(params, -(-clusters * self.splits // self.together) * self.together)


@once
def code_for(tile: Tile) -> bytes:
    """Machine code of the kernel."""
    return compile_for_hopper(source(*SOURCES), "attention.cu", tile.macros)


@functools.cache
def kernel_for(tokens: int, device: int) -> Kernel:
    """The kernel for one of `TILES`; the first call compiles, so it must come before a capture.

    Args:
        device: index of the GPU.
    """
    with torch.cuda.device(device):
        return Attention(TILES[tokens])


def takes(k_cache: torch.Tensor, v_cache: torch.Tensor, batch: "DecodeBatch") -> bool:
    """Whether the kernel reads a cache and a batch of this form: all that engines have but pages of 48 tokens."""
    last = sum((n - 1) * s for n, s in zip(k_cache.shape, k_cache.stride(), strict=True))
    lengths = batch.lengths if batch.row_starts is None else batch.row_starts
    return (
        k_cache.dtype == v_cache.dtype == torch.bfloat16
        and k_cache.stride() == v_cache.stride()
        and k_cache.stride(-1) == 1
        and not any(stride % PIECE for stride in k_cache.stride()[:-1])
        and not (k_cache.data_ptr() | v_cache.data_ptr()) % 16
        and last < PIECE << 32
        and batch.page_size & (batch.page_size - 1) == 0
        and batch.cos_sin.dtype in (torch.bfloat16, torch.float32)
        and lengths is not None
        and lengths.dtype == torch.int32
    )


def paged_attention(
    gqkv: torch.Tensor,
    out: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: "DecodeBatch",
    copies: int,
    kernel: Kernel | None = None,
) -> None:
    """Fill `out`; the rest as `DecodeAttention` takes it, for what `takes` says.

    Args:
        kernel: that runs it, where it is not the device's own.
    """
    requests, heads = len(gqkv), k_cache.shape[2]
    assert gqkv.is_contiguous() and gqkv.shape[1] == 4 * heads * HEAD_DIM and out.is_contiguous()
    if kernel is None:
        kernel = kernel_for(next(each for each in TILES if requests <= each), gqkv.device.index)
    wide = [each.element_size() == 8 for each in (batch.positions, batch.write_slots, batch.table)]
    tensors = (
        gqkv, k_cache, v_cache, batch.cos_sin, batch.positions, batch.write_slots, batch.table, batch.row_starts,
        batch.lengths, out,
    )  # fmt: skip
    kernel(
        Params(
            *(None if each is None else each.data_ptr() for each in tensors),
            *(stride // PIECE for stride in k_cache.stride()[:3]),
            batch.page_size.bit_length() - 1, requests, heads, batch.table.stride(0), copies, *wide,
            batch.cos_sin.dtype == torch.float32, HEAD_DIM**-0.5 * math.log2(math.e),
        ),
        requests * heads,
    )  # fmt: skip


def why_not(head_dim: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why attention cannot run on this kernel; None when it can. Compiles and loads it for every batch.

    Args:
        head_dim: of the model.
        dtype: of its activations.
        device: where they are.
    """
    if dtype == torch.bfloat16 and head_dim != HEAD_DIM:
        return f"head_dim={head_dim} is not {HEAD_DIM}"
    return why_not_loaded([(tokens,) for tokens in TILES], lambda _: True, kernel_for, dtype, device)
