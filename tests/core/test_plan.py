"""The recurrence plan against the steps and cache slots that transformers' own forward uses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, HrmTextConfig, HrmTextForCausalLM

from hrm_text.config import read_config
from hrm_text.plan import RecurrencePlan
from tests.conftest import TINY

CONFIG_1B = Path(__file__).parents[2] / "benchmarks/hrm-text-1b/config.json"
PLANS = [RecurrencePlan(2, 3, 2), RecurrencePlan(1, 1, 1), RecurrencePlan(3, 1, 2), RecurrencePlan(1, 4, 3)]


class RecordingCache(DynamicCache):
    """A DynamicCache that also writes down which slots it was given, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.slots: list[int] = []

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self.slots.append(layer_idx)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def note_steps(model: Any) -> list[tuple[str, int]]:
    """The (stack, cycle offset) of each stack call that `model` will make, filled as it runs."""
    calls: list[tuple[str, int]] = []

    def note(stack: str) -> Callable[..., None]:
        return lambda module, args, kwargs: calls.append((stack, kwargs["cycle_offset"]))

    model.model.L_module.register_forward_pre_hook(note("L"), with_kwargs=True)
    model.model.H_module.register_forward_pre_hook(note("H"), with_kwargs=True)
    return calls


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_steps_and_slots_are_those_of_transformers(plan: RecurrencePlan) -> None:
    sizes = {"H_cycles": plan.H_cycles, "L_cycles": plan.L_cycles, "num_hidden_layers": plan.layers_per_stack}
    model = HrmTextForCausalLM(HrmTextConfig(**(TINY | sizes))).eval()
    calls = note_steps(model)
    cache = RecordingCache()

    with torch.inference_mode():
        model(input_ids=torch.arange(20, 23)[None], past_key_values=cache, use_cache=True)

    assert calls == [(stack, plan.slot(step, 0)) for step, stack in enumerate(plan.steps)]
    ours = [plan.slot(step, layer) for step in range(len(plan.steps)) for layer in range(plan.layers_per_stack)]
    assert cache.slots == ours
    assert len(set(ours)) == plan.num_slots == len(cache.layers) == model.config.num_hidden_layers
    assert all(cache.get_seq_length(slot) == 3 for slot in ours)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_the_two_stacks_share_the_steps_out(plan: RecurrencePlan) -> None:
    slow, fast = plan.steps_of("H"), plan.steps_of("L")

    assert sorted(slow + fast) == list(range(len(plan.steps)))
    assert slow == tuple((h + 1) * (plan.L_cycles + 1) - 1 for h in range(plan.H_cycles))


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_stages_partition_the_steps_evenly(plan: RecurrencePlan) -> None:
    for world_size in range(1, len(plan.steps) + 1):
        stages = [plan.stage(rank, world_size) for rank in range(world_size)]
        sizes = [len(stage) for stage in stages]
        assert [step for stage in stages for step in stage] == list(range(len(plan.steps)))
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[0] - sizes[-1] <= 1


def test_more_stages_than_steps_are_refused_by_name_value_and_limit() -> None:
    with pytest.raises(ValueError, match=r"pipeline_parallel_size=9 exceeds .*the limit is 8"):
        RecurrencePlan(2, 3, 16).stage(0, 9)


def test_kv_bytes_of_the_1b_checkpoint() -> None:
    shape = read_config(json.loads(CONFIG_1B.read_text()))

    assert shape.plan == RecurrencePlan(2, 3, 16)
    assert shape.plan.kv_bytes_per_token(shape.num_heads, shape.head_dim, torch.bfloat16.itemsize) == 786_432


def test_kv_bytes_are_those_of_a_real_cache(reference: Any) -> None:
    shape = read_config(reference.config.to_dict())
    with torch.inference_mode():
        cache = reference(input_ids=torch.arange(20, 25)[None], use_cache=True).past_key_values

    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert shape.plan.kv_bytes_per_token(shape.num_heads, shape.head_dim, torch.float32.itemsize) * 5 == held
