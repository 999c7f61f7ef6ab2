"""Stand-in for pinned host memory, which a CPU build of torch does not have.

SGLang 0.5.23's LoRA layers and its torch_native LoRA backend pin their small index tensors on every device.
Pinning changes where a tensor lies, never its values. `stubs/` holds the entry point.
"""

import functools
from typing import Any

import torch


def apply() -> None:
    """Let `pin_memory` pass without effect in this process, where there is nothing to pin for."""
    if torch.cuda.is_available():
        return
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self
    for name in ("tensor", "zeros", "empty", "arange"):
        setattr(torch, name, _unpinned(getattr(torch, name)))


def _unpinned(make: Any) -> Any:
    @functools.wraps(make)
    def unpinned(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("pin_memory", None)
        return make(*args, **kwargs)

    return unpinned
