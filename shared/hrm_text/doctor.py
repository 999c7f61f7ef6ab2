"""What `hrm-text doctor` reports: is the plugin active, and what will it serve how?"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

from hrm_text.config import ConfigError, HrmTextShape, read_config
from hrm_text.hooks import Hook
from hrm_text.names import resolve_model

SPAN_RULE = (
    "prefix_lm_spans of the request; else each <|im_start|>...<|im_end|> pair; else the whole prompt is one span"
)


class DoctorError(Exception):
    """The plugin would not be active; the message says why."""


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    topic: str
    value: str


def require_entry_point(group: str, name: str, target: str) -> None:
    """Check that an engine would find this plugin.

    Raises:
        DoctorError: no such entry point, or it leads elsewhere.
    """
    found = [point for point in entry_points(group=group) if point.name == name]
    if not found:
        raise DoctorError(
            f"no entry point {name!r} in {group}: hrm-text-serving is not installed in this environment "
            "(pip install hrm-text-serving)"
        )
    if found[0].value != target:
        raise DoctorError(f"entry point {name!r} of {group} leads to {found[0].value}, not to {target}")


def model_findings(shape: HrmTextShape, dtype: str, element_bytes: int, free_bytes: int) -> list[Finding]:
    """What a checkpoint needs of the KV cache.

    Args:
        shape: of the checkpoint.
        dtype: name of the KV cache's element type.
        element_bytes: its size.
        free_bytes: memory that the KV cache may take.
    """
    per_token = shape.plan.kv_bytes_per_token(shape.num_heads, shape.head_dim, element_bytes)
    tokens = max(free_bytes, 0) // per_token
    return [
        Finding(
            "recurrence",
            f"H_cycles {shape.plan.H_cycles}, L_cycles {shape.plan.L_cycles}, "
            f"{shape.plan.layers_per_stack} layers a stack, {shape.plan.num_slots} KV slots a token",
        ),
        Finding("dtype", dtype),
        Finding("KV bytes per token", f"{per_token:,}"),
        Finding("KV tokens that fit", f"about {tokens:,} in {free_bytes / 2**30:.1f} GiB"),
        Finding("span rule", SPAN_RULE if shape.prefix_lm else "none: the checkpoint has prefix_lm=false"),
    ]


def check_hooks(hooks: Sequence[Hook], engine: str) -> Finding:
    """That every hook holds now.

    Raises:
        DoctorError: one does not; the message names it and the engine.
    """
    for hook in hooks:
        if not hook.holds():
            raise DoctorError(f"hook '{hook.name}' did not take hold in {engine}")
    return Finding("hooks that hold", ", ".join(dict.fromkeys(hook.name for hook in hooks)))


def read_model(model: str) -> tuple[HrmTextShape, Any]:
    """Shape and torch dtype of a checkpoint, by name, folder or Hub id.

    Raises:
        DoctorError: it is no HRM-Text, or one that cannot be served.
    """
    import torch
    from transformers import PretrainedConfig

    try:
        raw, _ = PretrainedConfig.get_config_dict(resolve_model(model))
        if not raw:
            raise DoctorError(f"model {model!r}: no config.json there")
        if raw.get("model_type") != "hrm_text":
            raise DoctorError(f"model {model!r} is of type {raw.get('model_type')!r}, not hrm_text")
        shape = read_config(raw)
    except (OSError, ConfigError, ValueError) as error:
        raise DoctorError(f"model {model!r} cannot be served: {error}") from error
    return shape, getattr(torch, raw.get("dtype") or raw.get("torch_dtype") or "float32")


def named(model: str) -> Finding:
    """The model as it was typed, and where that leads."""
    resolved = resolve_model(model)
    return Finding("model", f"{model} ({resolved})" if resolved != model else model)


def half_of_free_memory() -> int:
    """Bytes of main memory that a KV cache on a CPU may be expected to get."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") // 2
