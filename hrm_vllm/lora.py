"""LoRA on a CPU: a token of the base model, beside tokens of adapters, gets no adapter's products."""

from collections.abc import Callable
from typing import Any

import torch


def sparing_the_base_model(original: Callable[..., None]) -> Callable[..., None]:
    """For `bgmv_shrink`, the first half of every LoRA product on a CPU; the second adds what comes of it.

    vLLM 0.32.0 marks a token without an adapter by -1 and indexes the adapters with that, so that it gets the
    last one's. 0.33 does not, and its Triton kernels for GPUs never did.
    """

    def bgmv_shrink(
        inputs: torch.Tensor,
        weights: torch.Tensor,
        output_tensor: torch.Tensor,
        lora_indices_tensor: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        original(inputs, weights, output_tensor, lora_indices_tensor, *args, **kwargs)
        output_tensor[lora_indices_tensor < 0] = 0

    return bgmv_shrink
