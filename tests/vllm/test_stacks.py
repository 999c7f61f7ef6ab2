"""A stack that is compiled at its first step and run at all of them: the same log-probs, a sixth of the graphs."""

import shutil
from types import SimpleNamespace
from typing import Any

import pytest

from hrm_text.plan import RecurrencePlan
from hrm_vllm.model import stacks
from tests.conftest import TINY
from tests.vllm.engine import Ask, Engine
from tests.vllm.mixes import TOLERANCE, worst_deviation
from tests.vllm.test_exactness import count_events, event_counts
from tests.vllm.test_prefix_cache import prompt

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
compiled = [pytest.mark.cpu, pytest.mark.slow, needs_compiler]
COMPILED: dict[str, Any] = {
    "enforce_eager": False,
    "compilation_config": {"mode": 3},
    "env": {"TORCHDYNAMO_DISABLE": "0"},
}
P = prompt(120)


def seen_as_compiled(llm: Any) -> bool:
    """Whether Model Runner V2, which is for GPUs, would capture PIECEWISE graphs of the model."""
    from vllm.v1.worker.gpu.cudagraph_utils import has_compiled_submodule

    return llm.apply_model(has_compiled_submodule)[0]


def graphs(llm: Any) -> tuple[int, int]:
    """How many models, and pieces of them, vLLM compiled."""
    from vllm.compilation.counter import compilation_counter

    return compilation_counter.num_models_seen, compilation_counter.num_piecewise_graphs_seen


@pytest.mark.parametrize(
    "sabotage", [pytest.param(None, marks=compiled), pytest.param("one_step_for_all", marks=compiled)]
)
def test_compiled_stacks(tiny: str, reference: Any, sabotage: str | None) -> None:
    options = COMPILED | {"max_num_seqs": 8, "max_num_batched_tokens": 100}
    with Engine(model=tiny, sabotage=sabotage, **options) as engine:
        engine.call(count_events)
        chunked = Ask(P, (0, 40, 60, 90), 3, score=True)
        batch = [Ask(prompt(90, seed), (0, 50 + seed), 4) for seed in range(3)] + [chunked, Ask(prompt(40, 7), (), 8)]
        worst = worst_deviation(reference, engine, batch)
        worst = max(worst, worst_deviation(reference, engine, [Ask(P, (0, 40, 60, 90), 5)]))
        assert engine.call(event_counts)["chunks"]
        assert (worst <= TOLERANCE) == (sabotage is None), worst
        # Two stacks, cut before and behind each layer's KV write and attention: a piece more than cuts.
        assert engine.call(seen_as_compiled)
        models, pieces = engine.call(graphs)
        assert models == 2
        assert pieces < 2 * (4 * TINY["num_hidden_layers"] + 2)


@pytest.mark.parametrize("fails", [False, True])
def test_names_are_given_back(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    plan = RecurrencePlan(2, 3, 2)
    steps = plan.steps_of("L")

    def layer(step: int, index: int) -> Any:
        return SimpleNamespace(attn=SimpleNamespace(layer_name=f"layers.{plan.slot(step, index)}"))

    stack: Any = SimpleNamespace(
        layers=[
            SimpleNamespace(self_attn=SimpleNamespace(attn={str(step): layer(step, index) for step in steps}))
            for index in range(2)
        ]
    )
    named = {choice.attn.layer_name: choice.attn for block in stack.layers for choice in block.self_attn.attn.values()}
    table = dict(named)
    monkeypatch.setattr(stacks, "get_forward_context", lambda: SimpleNamespace(no_compile_layers=table))
    try:
        with stacks._slots_of(stack, steps[0], steps[2]):
            for block in stack.layers:
                first, third = (block.self_attn.attn[str(steps[at])].attn for at in (0, 2))
                assert table[first.layer_name] is third
                assert table[third.layer_name] is third
            if fails:
                raise ValueError
    except ValueError:
        pass
    assert table == named
