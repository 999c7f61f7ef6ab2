"""Reading config.json: the forms that are read, and the faults that are refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, HrmTextConfig

from hrm_text.config import ConfigError, read_config
from hrm_text.plan import RecurrencePlan
from tests.conftest import TINY

# The legacy form: the depth is that of one stack.
RAW: dict[str, Any] = TINY | {"num_key_value_heads": 2, "hidden_act": "silu", "attention_bias": False}
ABSENT = "absent"


def raw_with(**changes: Any) -> dict[str, Any]:
    return {field: value for field, value in (RAW | changes).items() if value is not ABSENT}


def test_both_forms_of_the_depth_mean_the_same() -> None:
    legacy = read_config(raw_with(num_hidden_layers=2))
    total = read_config(raw_with(num_hidden_layers=16, num_layers_per_stack=2))

    assert legacy == total
    assert legacy.plan == RecurrencePlan(H_cycles=2, L_cycles=3, layers_per_stack=2)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"embedding_scale": 3.5},
        {"embedding_scale": 0.0},
        {"initializer_range": 0.025},
        {"tie_word_embeddings": True, "prefix_lm": False},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_theta": 2e4},
        {"rms_norm_eps": 1e-5, "H_cycles": 3, "L_cycles": 1},
        {"head_dim": 16},
        {"head_dim": ABSENT},  # 128, whatever hidden_size / num_attention_heads is.
        {"max_position_embeddings": ABSENT},
        {"initializer_range": ABSENT},
    ],
    ids=str,
)
def test_every_field_is_as_transformers_reads_it(changes: dict[str, Any], tmp_path: Path) -> None:
    raw = raw_with(**changes)
    config = HrmTextConfig(**raw)
    config.save_pretrained(tmp_path)

    shape = read_config(raw)

    assert shape == read_config(config.to_dict())
    assert shape == read_config(json.loads((tmp_path / "config.json").read_text()))
    assert shape == read_config(AutoConfig.from_pretrained(tmp_path).to_dict())
    assert shape.plan.layers_per_stack == config.num_layers_per_stack
    assert shape.plan.num_slots == config.num_hidden_layers
    assert (shape.plan.H_cycles, shape.plan.L_cycles) == (config.H_cycles, config.L_cycles)
    assert (shape.hidden_size, shape.intermediate_size) == (config.hidden_size, config.intermediate_size)
    assert (shape.num_heads, shape.head_dim) == (config.num_attention_heads, config.head_dim)
    assert (shape.vocab_size, shape.max_positions) == (config.vocab_size, config.max_position_embeddings)
    assert shape.rope_theta == config.rope_parameters["rope_theta"]
    assert shape.rms_norm_eps == config.rms_norm_eps
    assert shape.embedding_scale == config.embedding_scale
    assert (shape.tie_word_embeddings, shape.prefix_lm) == (config.tie_word_embeddings, config.prefix_lm)


@pytest.mark.parametrize("absent", [ABSENT, None], ids=str)
def test_embedding_scale_defaults_to_one_over_the_initializer_range(absent: object) -> None:
    assert read_config(raw_with(embedding_scale=absent, initializer_range=0.25)).embedding_scale == 4.0


def test_the_older_spelling_of_rope_is_read() -> None:
    assert read_config(raw_with(rope_theta=5e5)).rope_theta == 5e5
    assert read_config(raw_with(rope_scaling={"type": "default"}, rope_theta=5e5)).rope_theta == 5e5
    assert read_config(RAW).rope_theta == 1e4


SIZES = [
    "H_cycles",
    "L_cycles",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
]
OPTIONAL_SIZES = ["head_dim", "max_position_embeddings", "num_layers_per_stack"]


@pytest.mark.parametrize("value", [0, -2, True, 2.0, "2"], ids=repr)
@pytest.mark.parametrize("field", SIZES + OPTIONAL_SIZES)
def test_a_size_that_is_no_positive_integer_is_refused(field: str, value: object) -> None:
    with pytest.raises(ConfigError) as refused:
        read_config(raw_with(**{field: value}))

    assert refused.value.field == field
    assert f"{field}={value!r}" in str(refused.value)


@pytest.mark.parametrize("absent", [ABSENT, None], ids=str)
@pytest.mark.parametrize("field", SIZES)
def test_a_missing_size_is_refused(field: str, absent: object) -> None:
    with pytest.raises(ConfigError, match="the field is missing") as refused:
        read_config(raw_with(**{field: absent}))

    assert refused.value.field == field


@pytest.mark.parametrize(
    "changes, field, value",
    [
        ({"num_key_value_heads": 1}, "num_key_value_heads", 1),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_parameters.rope_type", "yarn"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_parameters.rope_type", "linear"),
        ({"hidden_act": "gelu"}, "hidden_act", "gelu"),
        ({"attention_bias": True}, "attention_bias", True),
        ({"mlp_bias": True}, "mlp_bias", True),
        ({"num_hidden_layers": 2, "num_layers_per_stack": 2}, "num_hidden_layers", 2),
        ({"hidden_size": 65}, "hidden_size", 65),
    ],
    ids=str,
)
def test_what_cannot_be_served_exactly_is_refused(changes: dict[str, Any], field: str, value: object) -> None:
    with pytest.raises(ConfigError) as refused:
        read_config(raw_with(**changes))

    assert refused.value.field == field
    assert f"{field}={value!r}" in str(refused.value)


def test_a_contradictory_depth_is_told_the_right_one() -> None:
    with pytest.raises(ConfigError, match=r"num_hidden_layers=17 .* = 16"):
        read_config(raw_with(num_hidden_layers=17, num_layers_per_stack=2))
