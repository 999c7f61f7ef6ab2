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
from hrm_text.config import HrmTextShape
from hrm_text.weights import PACKED_MODULES, target_of

TARGETS = ("gqkv_proj", "o_proj", "gate_up_proj", "down_proj")
_LAYER = re.compile(r"\b([LH])_module\.layers\.(\d+)\.")
_TENSOR = re.compile(
    r"(?:base_model\.model\.)?"
    r"(model\.[LH]_module\.layers\.(\d+)\.(?:self_attn\.(?:gate|q|k|v|o)_proj|mlp\.(?:gate|up|down)_proj))"
    r"\.lora_([AB])\.weight"
)
# Fields of an adapter's config that mean more than A and B, which its tensors' names need not show.
_REFUSED = (
    "use_dora",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "kasa_config",
    "arrow_config",
    "alora_invocation_tokens",
    "layer_replication",
    "modules_to_save",
)
# They change the base model's weights when PEFT loads the adapter.
_REFUSED_INITS = ("pissa", "olora", "corda", "loftq")


def number_of(name: str) -> int | None:
    """A layer's number, different in H and L; None for a name outside the stacks."""
    match = _LAYER.search(name)
    return None if match is None else 2 * int(match[2]) + (match[1] == "H")


def sizes(shape: HrmTextShape, projection: str) -> tuple[int, int]:
    """Input and output size of one of `TARGETS`, over all ranks."""
    width = shape.num_heads * shape.head_dim
    return {
        "gqkv_proj": (shape.hidden_size, 4 * width),
        "o_proj": (width, shape.hidden_size),
        "gate_up_proj": (shape.hidden_size, 2 * shape.intermediate_size),
        "down_proj": (shape.intermediate_size, shape.hidden_size),
    }[projection]


def parts_of(projection: str) -> int:
    """How many projections are fused in `projection`."""
    return len(PACKED_MODULES.get(projection, (projection,)))


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
        check_tensor(name, loaded_weight, self.config.hf_config, self.base_model.shape)
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


def checked_rank(config: Mapping[str, Any], limit: int | None) -> int:
    """The largest rank of an adapter's config.

    Raises:
        ValueError: the config asks for more than A and B, or for a rank above `limit`.
    """
    if str(config.get("peft_type")).upper() != "LORA":
        raise ValueError(f"peft_type: must be 'LORA', got {config.get('peft_type')!r}")
    for field in _REFUSED:
        if config.get(field):
            raise ValueError(f"{field}: is not supported for HRM-Text, got {config[field]!r}")
    if config.get("bias", "none") != "none":
        raise ValueError(f"bias: must be 'none', got {config['bias']!r}; HRM-Text's projections have no bias")
    init = str(config.get("init_lora_weights")).lower()
    if init.startswith(_REFUSED_INITS):
        raise ValueError(f"init_lora_weights: {init!r} changes the base model; convert the adapter to plain LoRA")
    rank: int = max(config["r"], *(config.get("rank_pattern") or {}).values(), 1)
    if limit is not None and rank > limit:
        raise ValueError(f"r: the adapter's rank is {rank}; the limit is {limit}, from --max-lora-rank")
    return rank


def check_tensor(name: str, tensor: torch.Tensor, config: Mapping[str, Any], shape: HrmTextShape) -> None:
    """Check that a tensor of an adapter has a place in the model.

    Raises:
        ValueError: its name or its shape has none.
    """
    match = _TENSOR.fullmatch(name)
    if match is None:
        raise ValueError(
            f"tensor {name!r} is not supported: an adapter of HRM-Text holds A and B of the projections in the "
            "blocks of H_module and L_module, and nothing for the embedding or the LM head"
        )
    module, layer, side = match.groups()
    if int(layer) >= shape.plan.layers_per_stack:
        raise ValueError(f"tensor {name!r}: layer {layer} is out of range; a stack has {shape.plan.layers_per_stack}")
    fused = target_of(module + ".").parameter.removesuffix(".").rpartition(".")[2]
    inputs, outputs = sizes(shape, fused)
    rank = _rank(config, module)
    expected = (rank, inputs) if side == "A" else (outputs // parts_of(fused), rank)
    if tuple(tensor.shape) != expected:
        raise ValueError(f"tensor {name!r} has shape {tuple(tensor.shape)}; this model and rank {rank} need {expected}")


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
        match = _TENSOR.fullmatch(name)
        assert match is not None
        module, _, side = match.groups()
        other = name.replace(f".lora_{side}.", ".lora_B." if side == "A" else ".lora_A.")
        if other not in weights:
            raise ValueError(f"tensor {name!r} comes without {other!r}")
        missing = rank - _rank(config, module)
        factor = _scaling(config, module) / scaling
        if side == "B" and not math.isclose(factor, 1.0):
            tensor = tensor.float() * factor
        fill = (0, 0, 0, missing) if side == "A" else (0, missing)
        target, shard = target_of(name)
        parts[target][shard or 0] = torch.nn.functional.pad(tensor, fill)
    return {target: _whole(target, shards) for target, shards in parts.items()}


def _whole(target: str, shards: Mapping[int, torch.Tensor]) -> torch.Tensor:
    zeros = torch.zeros_like(next(iter(shards.values())))
    return torch.cat([shards.get(part, zeros) for part in range(parts_of(target.split(".")[-3]))])


def _rank(config: Mapping[str, Any], module: str) -> int:
    return int(_by_pattern(config.get("rank_pattern"), module, config["r"]))


def _scaling(config: Mapping[str, Any], module: str) -> float:
    rank = _rank(config, module)
    alpha = _by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(pattern: Mapping[str, float] | None, module: str, default: float) -> float:
    """PEFT's rule: the first key that matches the name's end from a dot on."""
    return next((value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", module)), default)
