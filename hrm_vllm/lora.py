"""LoRA: adapters are checked before the engine sees them, and on a CPU they leave the base model's tokens alone.

vLLM drops a tensor of a layer that the model lacks, computes with an A of the wrong shape, and ends its engine on a
wrong B in the first batch that uses the adapter.
"""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

from hrm_text.config import read_config
from hrm_text.lora import check_adapter
from hrm_vllm.errors import RequestError
from hrm_vllm.spans import rule_of

LARGEST_ID = 2**31 - 1  # vLLM's runner for GPUs keeps ids in 32 bits, and the engine ends with a request that has more

_checked: set[tuple[int, str]] = set()


def check_once(adapter: Any, vllm_config: Any) -> None:
    """Check the adapter of a request; those that were found right are not read again.

    Raises:
        RequestError: it is not an adapter for this model, see `hrm_text.lora.check_adapter`, or its id is too large.
    """
    key = (adapter.lora_int_id, adapter.lora_path)
    if key not in _checked:
        _check_request(adapter, vllm_config)
        _checked.add(key)


def _check_request(adapter: Any, vllm_config: Any) -> None:
    if rule_of(vllm_config.model_config) is not None and adapter.lora_int_id > LARGEST_ID:
        message = f"lora_int_id: must be at most {LARGEST_ID}, got {adapter.lora_int_id}"
        raise RequestError(message, parameter="lora_int_id", value=adapter.lora_int_id)
    _check(adapter, vllm_config)


def _check(adapter: Any, vllm_config: Any) -> None:
    from vllm.lora.utils import get_adapter_absolute_path

    if rule_of(vllm_config.model_config) is None or vllm_config.lora_config is None:
        return
    folder = Path(get_adapter_absolute_path(adapter.lora_path))
    shape = read_config(vllm_config.model_config.hf_config.to_dict())
    try:
        check_adapter(folder, shape, vllm_config.lora_config.max_lora_rank)
    except ValueError as error:
        name = adapter.lora_name
        raise RequestError(f"LoRA adapter {name!r}: {error}", parameter="lora_path", value=name) from error


def checking(original: Callable[..., bool]) -> Callable[..., bool]:
    """For `LLMEngine.add_lora`, which loads an adapter ahead of its requests (vLLM 0.32.0)."""

    def add_lora(self: Any, lora_request: Any) -> bool:
        _check_request(lora_request, self.vllm_config)
        return original(self, lora_request)

    return add_lora


def refusing(original: Callable[..., Any]) -> Callable[..., Any]:
    """For `OpenAIServingModels.load_lora_adapter`: `--lora-modules` and `/v1/load_lora_adapter` (vLLM 0.32.0).

    What its engine refuses it answers with a 500.
    """

    async def load_lora_adapter(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            # The path may have to come from the Hub.
            await asyncio.to_thread(_check, request, self.engine_client.vllm_config)
        except RequestError as error:
            return create_error_response(error)
        return await original(self, request, *args, **kwargs)

    return load_lora_adapter


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
