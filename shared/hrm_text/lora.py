"""What a LoRA adapter of HRM-Text must be, as PEFT saves it for transformers' HrmTextForCausalLM.

Neither engine checks all of it: a tensor without a place would be dropped, one of a wrong shape be served as
something else, or end the engine in the first batch that uses it.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hrm_text.config import HrmTextShape
from hrm_text.weights import PACKED_MODULES, target_of

TENSOR = re.compile(
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


def sizes(shape: HrmTextShape, projection: str) -> tuple[int, int]:
    """Input and output size of a projection with its parts fused, over all ranks."""
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


def check_adapter(folder: Path, shape: HrmTextShape, limit: int | None) -> None:
    """Check the adapter in `folder` without reading its numbers.

    Raises:
        ValueError: it is not there, or not one for a model of this shape, with ranks up to `limit`.
    """
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        if not isinstance(config, dict):
            raise ValueError(f"adapter_config.json must hold an object, got {config!r:.40}")
        tensors = tensor_shapes(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"no adapter can be read in {str(folder)!r}: {error}") from error
    checked_rank(config, limit)
    for name, size in tensors.items():
        check_tensor(name, size, config, shape)
    for name in tensors:
        check_pair(name, tensors)


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shape of each of the adapter's tensors, by name.

    Raises:
        OSError: there is no file of them.
    """
    from safetensors import safe_open

    path = folder / "adapter_model.safetensors"
    if path.exists():
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    import torch

    tensors = torch.load(folder / "adapter_model.bin", map_location="meta", weights_only=True)
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def checked_rank(config: Mapping[str, Any], limit: int | None) -> int:
    """The largest rank of an adapter's config.

    Raises:
        ValueError: the config asks for more than A and B, or for a rank above `limit`, or a number is missing.
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
    for field, alpha in _with_pattern(config, "lora_alpha", "alpha_pattern"):
        if isinstance(alpha, bool) or not isinstance(alpha, int | float):
            raise ValueError(f"{field}: must be a number, got {alpha!r}")
    ranks = _with_pattern(config, "r", "rank_pattern")
    for field, value in ranks:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{field}: must be an integer from 1 on, got {value!r}")
    rank: int = max(value for _, value in ranks)
    if limit is not None and rank > limit:
        raise ValueError(f"r: the adapter's rank is {rank}; the limit is {limit}, from --max-lora-rank")
    return rank


def _with_pattern(config: Mapping[str, Any], field: str, pattern: str) -> list[tuple[str, Any]]:
    """A field of an adapter's config and those of the pattern that goes with it, each with the name it has there.

    Raises:
        ValueError: the pattern is none.
    """
    others = config.get(pattern) or {}
    if not isinstance(others, Mapping):
        raise ValueError(f"{pattern}: must be an object, got {others!r}")
    return [(field, config.get(field)), *((f"{pattern}[{key!r}]", value) for key, value in others.items())]


def check_tensor(name: str, size: tuple[int, ...], config: Mapping[str, Any], shape: HrmTextShape) -> None:
    """Check that a tensor of an adapter has a place in the model.

    Raises:
        ValueError: its name or its shape has none.
    """
    match = TENSOR.fullmatch(name)
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
    rank = rank_of(config, module)
    expected = (rank, inputs) if side == "A" else (outputs // parts_of(fused), rank)
    if size != expected:
        raise ValueError(f"tensor {name!r} has shape {size}; this model and rank {rank} need {expected}")


def check_pair(name: str, tensors: Mapping[str, Any]) -> None:
    """Check that the A or B called `name` has the other one among `tensors`.

    Raises:
        ValueError: it has not.
    """
    head, _, tail = name.rpartition(".lora_")
    other = f"{head}.lora_{'B' if tail.startswith('A') else 'A'}.weight"
    if other not in tensors:
        raise ValueError(f"tensor {name!r} comes without {other!r}")


def rank_of(config: Mapping[str, Any], module: str) -> int:
    """Rank of the projection `module`."""
    return int(_by_pattern(config.get("rank_pattern"), module, config["r"]))


def scaling_of(config: Mapping[str, Any], module: str) -> float:
    """What B A of the projection `module` is multiplied by."""
    rank = rank_of(config, module)
    alpha = _by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(pattern: Mapping[str, float] | None, module: str, default: float) -> float:
    """PEFT's rule: the first key that matches the name's end from a dot on."""
    return next((value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", module)), default)
