"""What `hrm-text doctor` reports: is the plugin active, and what will it serve how?"""

from dataclasses import dataclass
from importlib.metadata import entry_points

from hrm_text.config import HrmTextShape

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
