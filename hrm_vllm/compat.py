"""Differences between the supported vLLM versions, one function each."""

from inspect import signature

import torch
from vllm import __version__ as VLLM_VERSION

SUPPORTED = ((0, 32), (0, 33))


def check_version() -> None:
    """Refuse a vLLM that the hooks were not written for.

    Raises:
        hrm_vllm.hooks.HookError: any release but 0.32.x and 0.33.x.
    """
    from packaging.version import Version

    from hrm_vllm.hooks import HookError

    if Version(VLLM_VERSION).release[:2] not in SUPPORTED:
        raise HookError("version", "this plugin was written for 0.32 and 0.33")


def chat_template_error() -> type[ValueError]:
    """vLLM's error for a chat that cannot be rendered; 0.33 moved it to `vllm.exceptions`."""
    try:
        from vllm.exceptions import ChatTemplateResolutionError
    except ImportError:
        from vllm.renderers.chat_utils import ChatTemplateResolutionError
    error: type[ValueError] = ChatTemplateResolutionError
    return error


def mask_top_k_top_p(logits: torch.Tensor, k: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """vLLM's masking of (requests, vocabulary) logits where every request has a top-k; 0.33 wants to be told so."""
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

    told = {"has_topp_only_rows": False} if "has_topp_only_rows" in signature(apply_top_k_top_p).parameters else {}
    masked: torch.Tensor = apply_top_k_top_p(logits, k, p, **told)
    return masked
