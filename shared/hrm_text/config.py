"""Reading an HRM-Text `config.json`, and refusing what cannot be served exactly."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hrm_text.plan import RecurrencePlan


class ConfigError(ValueError):
    """A configuration field that this package cannot serve; the message names it."""

    def __init__(self, field: str, value: object, rule: str) -> None:
        super().__init__(f"HRM-Text config: {field}={value!r} is not supported: {rule}")
        self.field = field


_REQUIRED = (
    "H_cycles",
    "L_cycles",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
)
# Absent, they are what the class of transformers has.
_OPTIONAL = {"head_dim": 128, "max_position_embeddings": 2048}


@dataclass(frozen=True)
class HrmTextShape:
    """The sizes that a forward pass needs; every field as in `transformers.HrmTextConfig`."""

    plan: RecurrencePlan
    hidden_size: int
    intermediate_size: int
    num_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    rope_theta: float
    rms_norm_eps: float
    embedding_scale: float
    tie_word_embeddings: bool
    prefix_lm: bool


def read_config(raw: Mapping[str, Any]) -> HrmTextShape:
    """Read the mapping of a `config.json`, or of `HrmTextConfig.to_dict()`.

    Both serialised forms of the depth are read: `num_hidden_layers` as the blocks of one stack
    (legacy), or as the total number of KV slots beside `num_layers_per_stack`.

    Raises:
        ConfigError: a field is missing, contradictory or not supported; the message names it.
    """
    for field in _REQUIRED:
        if raw.get(field) is None:
            raise ConfigError(field, None, "the field is missing")
    for field in (*_REQUIRED, *_OPTIONAL, "num_layers_per_stack"):
        size = raw.get(field)
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise ConfigError(field, size, "it must be a positive integer")
    plan = _read_plan(raw)
    heads = raw["num_attention_heads"]
    _refuse_unsupported(raw, heads)
    embedding_scale = raw.get("embedding_scale")
    if embedding_scale is None:
        embedding_scale = 1.0 / (raw.get("initializer_range") or 0.02)
    rope = _rope_parameters(raw)
    return HrmTextShape(
        plan=plan,
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_heads=heads,
        head_dim=raw.get("head_dim") or _OPTIONAL["head_dim"],
        vocab_size=raw["vocab_size"],
        max_positions=raw.get("max_position_embeddings") or _OPTIONAL["max_position_embeddings"],
        rope_theta=float(rope.get("rope_theta", 10000.0)),
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        embedding_scale=float(embedding_scale),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        prefix_lm=bool(raw.get("prefix_lm", True)),
    )


def _read_plan(raw: Mapping[str, Any]) -> RecurrencePlan:
    calls = raw["H_cycles"] * (raw["L_cycles"] + 1)
    per_stack = raw.get("num_layers_per_stack")
    if per_stack is None:
        return RecurrencePlan(raw["H_cycles"], raw["L_cycles"], raw["num_hidden_layers"])
    if raw["num_hidden_layers"] != per_stack * calls:
        raise ConfigError(
            "num_hidden_layers",
            raw["num_hidden_layers"],
            f"beside num_layers_per_stack={per_stack} it must be "
            f"num_layers_per_stack * H_cycles * (L_cycles + 1) = {per_stack * calls}",
        )
    return RecurrencePlan(raw["H_cycles"], raw["L_cycles"], per_stack)


def _rope_parameters(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    # transformers 5 writes `rope_parameters`; older files have `rope_scaling` and a bare `rope_theta`.
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if "rope_theta" not in rope and raw.get("rope_theta") is not None:
        return {**rope, "rope_theta": raw["rope_theta"]}
    return rope


def _refuse_unsupported(raw: Mapping[str, Any], heads: int) -> None:
    kv_heads = raw.get("num_key_value_heads")
    if kv_heads is not None and kv_heads != heads:
        raise ConfigError(
            "num_key_value_heads", kv_heads, f"HRM-Text is MHA, so it must equal num_attention_heads={heads}"
        )
    rope = _rope_parameters(raw)
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        raise ConfigError("rope_parameters.rope_type", rope_type, "only 'default' is")
    if raw.get("hidden_act", "silu") != "silu":
        raise ConfigError("hidden_act", raw["hidden_act"], "only 'silu' is")
    for field in ("attention_bias", "mlp_bias"):
        if raw.get(field):
            raise ConfigError(field, raw[field], "HRM-Text's projections have no bias")
    if raw["hidden_size"] % heads:
        raise ConfigError("hidden_size", raw["hidden_size"], f"it must be a multiple of num_attention_heads={heads}")
