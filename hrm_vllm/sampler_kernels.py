"""vLLM's top-k and top-p kernels, of which its warm-up compiles three, one after the other: 14 s of a start on an H200.

The warm-up finds them compiled when the same calls were made before, side by side with our own kernels.
"""

from collections.abc import Callable
from functools import partial

import torch

from hrm_vllm.compat import mask_top_k_top_p

# Requests in the steps of vLLM's warm-up: one, which Triton compiles for, two, whose top-p is split, and many.
SIZES = (1, 2, 128)


def top_k_top_p_calls(vocabulary: int, most: int) -> list[Callable[[], object]]:
    """A call for each kernel that vLLM's warm-up will ask for, where up to `most` requests are decoded at once."""
    return [partial(_mask, size, vocabulary) for size in sorted({min(size, most) for size in SIZES})]


def _mask(requests: int, vocabulary: int) -> torch.Tensor:
    logits = torch.zeros(requests, vocabulary, device="cuda")
    k = torch.full((requests,), 50, dtype=torch.int32, device="cuda")
    return mask_top_k_top_p(logits, k, torch.full((requests,), 0.9, device="cuda"))
