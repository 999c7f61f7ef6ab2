"""Programmatic dependent launch: a kernel starts, and fetches its weights, while the one before it still drains.

Every kernel launched so calls `gdc_wait` before it reads what the last one wrote and before it writes anything, so
a chain of them is ordered like any other kernels of a stream. What it reads before that (weights, block
tables, KV of earlier tokens) is written by no kernel of the chain.
"""

import functools
import os
from typing import Any

import torch
import triton
import triton.language as tl

OPTION = "HRM_TEXT_KERNELS"  # 1 switches the fused kernels on


def why_off() -> str | None:
    """Why decode steps are left to the engine's layers; None where the fused kernels run.

    Raises:
        ValueError: the option has a value that is neither 0 nor 1.
    """
    wanted = os.environ.get(OPTION, "0")
    if wanted not in ("0", "1"):
        raise ValueError(f"{OPTION}={wanted!r}: must be 0 or 1, or unset")
    return None if wanted == "1" else f"{OPTION}={wanted}"


@functools.cache
def dependent_launch(device: torch.device) -> bool:
    """Whether kernels on `device` may overlap: Hopper or later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def launch_options(device: torch.device) -> dict[str, Any]:
    """Keyword arguments for a launch; the CPU is Triton's interpreter, which knows none of them."""
    return {"launch_pdl": True} if dependent_launch(device) else {}


@triton.jit
def fetch_into_l2(pointer, program, programs, BYTES: tl.constexpr, THREADS: tl.constexpr):
    """Each program's share of `BYTES` bytes at `pointer`, 128 at a time, into the L2 cache; waits for nothing."""
    share = tl.cdiv(tl.cdiv(BYTES, 128), programs) * 128
    each = tl.maximum(tl.cdiv(share, THREADS * 128) * 128, 512)
    begin = tl.arange(0, THREADS) * each
    end = tl.minimum((program + 1) * share, BYTES) - program * share
    size = tl.maximum(tl.minimum(begin + each, end) - begin, 0)
    address = pointer.to(tl.int64) + program.to(tl.int64) * share + begin
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.gt.s32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
        "=r,l,r", [address, size], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


def fetched_bytes(weight: torch.Tensor | None) -> int:
    """Bytes of `weight` for `fetch_into_l2`; 0 where there is none, or no instruction that fetches them."""
    return weight.nbytes if weight is not None and dependent_launch(weight.device) else 0
