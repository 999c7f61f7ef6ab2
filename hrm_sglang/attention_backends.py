"""Which attention backends serve HRM-Text, and how SGLang gets ours under their names."""

from collections.abc import Callable
from typing import Any

import torch

from hrm_sglang.spans import is_hrm_text

SUPPORTED_BACKENDS = ("fa3", "triton", "torch_native")


def default_backend(device: str, hopper: bool, dtype: torch.dtype, kv_cache_dtype: str | None) -> str:
    """The backend of an engine for which none is named: FA3 on Hopper, for a model and a KV cache that it takes."""
    if device == "cpu":
        return "torch_native"
    half = dtype in (torch.bfloat16, torch.float16) and kv_cache_dtype in (None, "auto", "bf16", "bfloat16")
    return "fa3" if hopper and half else "triton"


def with_spans(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """For `ATTENTION_BACKENDS[name]`, the factory of a backend (SGLang 0.5.23): ours for HRM-Text."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def create(runner: Any) -> Any:
            if not is_hrm_text(runner.model_config.hf_config):
                return original(runner)
            return backend_class(name)(runner)

        return create

    return make


def backend_class(name: str) -> Any:
    """Our class for SGLang's backend `name`.

    Raises:
        ValueError: the backend is not one of `SUPPORTED_BACKENDS`.
    """
    if name == "fa3":
        from hrm_sglang.flash_attention import PrefixLMFlashBackend

        return PrefixLMFlashBackend
    if name == "triton":
        from hrm_sglang.triton_attention import PrefixLMTritonBackend

        return PrefixLMTritonBackend
    if name == "torch_native":
        from hrm_sglang.torch_attention import PrefixLMTorchBackend

        return PrefixLMTorchBackend
    raise ValueError(unsupported(name))


def unsupported(name: str) -> str:
    """Why a backend is refused."""
    return (
        f"HRM-Text: attention backend {name!r} is not supported: PrefixLM needs causal and bidirectional "
        f"sequences in one batch; use one of {', '.join(SUPPORTED_BACKENDS)} (--attention-backend)"
    )
