"""From a checkpoint's tensor names to this package's parameters.

On disk the attention projections are fused as `attn.gqkv_proj` = [gate | q | k | v] and the MLP's as
`mlp.gate_up_proj` = [gate | up] (transformers' conversion mapping for "hrm_text"); checkpoints with
the runtime names (`self_attn.q_proj`, ...) load as well.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

GQKV_SHARDS = ("gate_proj", "q_proj", "k_proj", "v_proj")
GATE_UP_SHARDS = ("gate_proj", "up_proj")
PACKED_MODULES = {"gqkv_proj": list(GQKV_SHARDS), "gate_up_proj": list(GATE_UP_SHARDS)}

_ATTENTION = re.compile(r"\.(?:self_)?attn\.")
_SHARD = re.compile(r"\.(self_attn|mlp)\.(gate_proj|q_proj|k_proj|v_proj|up_proj)\.")


class Target(NamedTuple):
    """Where a tensor goes: a parameter, and for one part of a fused projection its index there."""

    parameter: str
    shard: int | None


def target_of(name: str) -> Target:
    """Parameter that the checkpoint tensor `name` belongs to."""
    name = _ATTENTION.sub(".self_attn.", name)
    match = _SHARD.search(name)
    if match is None:
        return Target(name, None)
    block, part = match.groups()
    fused, shards = ("gqkv_proj", GQKV_SHARDS) if block == "self_attn" else ("gate_up_proj", GATE_UP_SHARDS)
    return Target(name.replace(f".{block}.{part}.", f".{block}.{fused}."), shards.index(part))


def load_into(
    parameters: Mapping[str, Any],
    weights: Iterable[tuple[str, Any]],
    default_loader: Callable[..., None],
    skip_lm_head: bool,
) -> set[str]:
    """Hand every checkpoint tensor to its parameter's loader; the names of the parameters loaded.

    Args:
        parameters: of the module, by name; an engine's carry a `weight_loader(parameter, tensor[, shard])`.
        weights: (name on disk, tensor) pairs.
        default_loader: for a parameter without a loader of its own.
        skip_lm_head: the LM head is tied to the embedding, or another pipeline stage's.

    Raises:
        ValueError: a tensor has no parameter to go to.
    """
    loaded: set[str] = set()
    for disk_name, tensor in weights:
        name, shard = target_of(disk_name)
        if skip_lm_head and name.startswith("lm_head."):
            continue
        if name not in parameters:
            raise ValueError(f"checkpoint tensor {disk_name!r} has no place in HRM-Text (looked for {name!r})")
        parameter = parameters[name]
        loader = getattr(parameter, "weight_loader", default_loader)
        loader(parameter, tensor) if shard is None else loader(parameter, tensor, shard)
        loaded.add(name)
    return loaded
