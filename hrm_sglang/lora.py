"""LoRA adapters, as PEFT saves them for transformers' HrmTextForCausalLM, in the form that SGLang computes with.

SGLang finds a layer's adapter by the number in the layer's name, and both stacks count from 0: here layer n of
L has the number 2n and layer n of H 2n + 1. It stacks the projections that it knows by name; ours are
gqkv_proj = [gate | q | k | v] and gate_up_proj, and what an adapter leaves out of them is zero.
A fault is found when the adapter is loaded: SGLang would drop an unknown tensor, and end on a wrong shape
in the first batch that uses it.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch

from hrm_sglang.spans import is_hrm_text
from hrm_text.lora import TENSOR, check_pair, check_tensor, checked_rank, parts_of, rank_of, scaling_of
from hrm_text.weights import target_of

TARGETS = ("gqkv_proj", "o_proj", "gate_up_proj", "down_proj")
_LAYER = re.compile(r"\b([LH])_module\.layers\.(\d+)\.")


def number_of(name: str) -> int | None:
    """A layer's number, different in H and L; None for a name outside the stacks."""
    match = _LAYER.search(name)
    return None if match is None else 2 * int(match[2]) + (match[1] == "H")


def numbering(original: Callable[[str], int | None]) -> Callable[[str], int | None]:
    """For `get_layer_id` as `LoRAManager` uses it (SGLang 0.5.23)."""

    def get_layer_id(name: str) -> int | None:
        number = number_of(name)
        return original(name) if number is None else number

    return get_layer_id


def checking(original: Callable[..., Any]) -> Callable[..., Any]:
    """For `LoRAManager.validate_new_adapter`, which every adapter passes before its tensors are read (0.5.23)."""

    def validate_new_adapter(self: Any, lora_config: Any, lora_ref: Any) -> Any:
        if is_hrm_text(self.base_hf_config):
            from sglang.srt.runtime_context import get_lora

            lora_config.r = checked_rank(lora_config.hf_config, get_lora().max_lora_rank)
            # The adapter's own list names parts of fused projections, and gate_proj is a part of two.
            lora_config.target_modules = list(TARGETS)
        return original(self, lora_config, lora_ref)

    return validate_new_adapter


def reading(original: Callable[..., Any]) -> Callable[..., Any]:
    """For `LoRAAdapter._process_weight`, which takes a tensor of an adapter's file (SGLang 0.5.23)."""

    def _process_weight(self: Any, name: str, loaded_weight: torch.Tensor) -> None:
        if not is_hrm_text(self.base_hf_config):
            original(self, name, loaded_weight)
            return
        check_tensor(name, tuple(loaded_weight.shape), self.config.hf_config, self.base_model.shape)
        self.layers[number_of(name)].weights[name] = loaded_weight.cpu()

    return _process_weight


def stacking(original: Callable[..., Any]) -> Callable[..., Any]:
    """For `LoRAAdapter._normalize_weights`, after the last tensor (SGLang 0.5.23)."""

    def _normalize_weights(self: Any) -> None:
        if not is_hrm_text(self.base_hf_config):
            original(self)
            return
        for layer in self.layers:
            layer.weights = stacked(layer.weights, self.config.hf_config, self.config.r, self.scaling)

    return _normalize_weights


def stacked(
    weights: Mapping[str, torch.Tensor], config: Mapping[str, Any], rank: int, scaling: float
) -> dict[str, torch.Tensor]:
    """One layer's tensors by fused projection: A of (parts · rank, inputs), B of (outputs, rank).

    SGLang has one rank and one scaling for an adapter. A smaller rank is filled up with zeros, and another
    scaling (rank_pattern, alpha_pattern, rsLoRA) goes into B.

    Raises:
        ValueError: a projection has only one of A and B.
    """
    parts: dict[str, dict[int, torch.Tensor]] = defaultdict(dict)
    for name, tensor in weights.items():
        match = TENSOR.fullmatch(name)
        assert match is not None
        module, _, side = match.groups()
        check_pair(name, weights)
        missing = rank - rank_of(config, module)
        factor = scaling_of(config, module) / scaling
        if side == "B" and not math.isclose(factor, 1.0):
            tensor = tensor.float() * factor
        fill = (0, 0, 0, missing) if side == "A" else (0, missing)
        target, shard = target_of(name)
        parts[target][shard or 0] = torch.nn.functional.pad(tensor, fill)
    return {target: _whole(target, shards) for target, shards in parts.items()}


def _whole(target: str, shards: Mapping[int, torch.Tensor]) -> torch.Tensor:
    zeros = torch.zeros_like(next(iter(shards.values())))
    return torch.cat([shards.get(part, zeros) for part in range(parts_of(target.split(".")[-3]))])
