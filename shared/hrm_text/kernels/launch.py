"""Programmatic dependent launch: a kernel starts, and fetches its weights, while the one before it still drains.

Every kernel launched so calls `gdc_wait` before it reads what the last one wrote and before it writes anything, so
a chain of them is ordered like any other kernels of a stream. What it reads before that (weights, block
tables, KV of earlier tokens) is written by no kernel of the chain.
"""

import functools
import os
from typing import Any

import torch

from hrm_text.names import KERNELS_OPTION


def why_off() -> str | None:
    """Why decode steps are left to the engine's layers; None where the fused kernels run.

    Raises:
        ValueError: the option has a value that is neither 0 nor 1.
    """
    wanted = os.environ.get(KERNELS_OPTION, "0")
    if wanted not in ("0", "1"):
        raise ValueError(f"{KERNELS_OPTION}={wanted!r}: must be 0 or 1, or unset")
    return None if wanted == "1" else f"{KERNELS_OPTION}={wanted}"


@functools.cache
def dependent_launch(device: torch.device) -> bool:
    """Whether kernels on `device` may overlap: Hopper or later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def launch_options(device: torch.device) -> dict[str, Any]:
    """Keyword arguments for a launch; the CPU is Triton's interpreter, which knows none of them."""
    return {"launch_pdl": True} if dependent_launch(device) else {}
