"""Where the fused kernels run, and how they are launched: with programmatic dependent launch.

A kernel starts, and fetches its weights, while the one before it still drains. Every kernel launched so calls
`gdc_wait` before it reads what the last one wrote and before it writes anything, so a chain of them is ordered like
any other kernels of a stream. What it reads before that (weights, block tables, KV of earlier tokens) is written by
no kernel of the chain.
"""

import functools
import os
from importlib.util import find_spec
from typing import Any

import torch

from hrm_text.names import KERNELS_OPTION


def check_option() -> str | None:
    """What the option says: "0", "1", or None where it is unset.

    Raises:
        ValueError: it has another value.
    """
    wanted = os.environ.get(KERNELS_OPTION)
    if wanted not in (None, "0", "1"):
        raise ValueError(f"{KERNELS_OPTION}={wanted!r}: must be 0 or 1, or unset")
    return wanted


def why_off(device: torch.device) -> str | None:
    """Why steps on `device` are left to the engine's layers; None where the fused kernels run.

    They are on where they were verified, on Hopper, and where the option asks for them.

    Raises:
        ValueError: the option has a value that is neither 0 nor 1.
    """
    return why_off_at(capability(device))


def why_off_at(major: int) -> str | None:
    """`why_off` for NVIDIA GPUs of a major compute capability, and 0 for anything else."""
    wanted = check_option()
    if wanted == "0":
        return f"{KERNELS_OPTION}=0"
    if find_spec("triton") is None:
        return "Triton is not installed"
    if wanted is None and major != 9:
        return f"they were verified on Hopper GPUs only; {KERNELS_OPTION}=1 tries them here"
    return None


@functools.cache
def capability(device: torch.device) -> int:
    """Major compute capability of an NVIDIA GPU; 0 for anything else."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    return torch.cuda.get_device_capability(device)[0] if nvidia else 0


def dependent_launch(device: torch.device) -> bool:
    """Whether kernels on `device` may overlap: Hopper or later."""
    return capability(device) >= 9


def launch_options(device: torch.device) -> dict[str, Any]:
    """Keyword arguments for a launch; the CPU is Triton's interpreter, which knows none of them."""
    return {"launch_pdl": True} if dependent_launch(device) else {}
