"""Stand-ins for what SGLang 0.5.23's LoRA takes from a GPU; `stubs/` holds the entry point.

Its layers and its torch_native backend pin their small index tensors on every device, which a CPU build of torch
refuses: pinning changes where a tensor lies, never its values. Its csgmv backend looks up the kernels' tuning by
the device's name, and takes the defaults for one that it does not know.

Only engines that serve LoRA take them, by an environment variable: the test's own process runs the oracle.
"""

import functools
import os
from typing import Any

import torch
from torch.utils._device import _device_constructors

VARIABLE = "HRM_TEXT_LORA_ON_CPU"


def apply() -> None:
    """Put the stand-ins into this process, if the environment asks for them and there is no GPU."""
    if not os.environ.get(VARIABLE) or torch.cuda.is_available():
        return
    # A `torch.device` context knows the constructors by a set that is built once; with ours in it, tensors meant
    # for the meta device are made on the CPU, and transformers leaves the RoPE frequencies of a model unset.
    _device_constructors()
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self
    for name in ("tensor", "zeros", "empty", "arange"):
        setattr(torch, name, _unpinned(getattr(torch, name)))
    from sglang.kernels.ops.lora.dense import lora_tuning_config

    lora_tuning_config.get_device_name = lambda *args: "no GPU"


def _unpinned(make: Any) -> Any:
    @functools.wraps(make)
    def unpinned(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("pin_memory", None)
        return make(*args, **kwargs)

    return unpinned
