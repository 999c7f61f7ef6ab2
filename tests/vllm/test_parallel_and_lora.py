"""Pipeline and tensor parallelism and LoRA, against the oracle."""

from pathlib import Path
from typing import Any

import pytest

from tests.adapters import make_adapter, merged, scaled_adapter
from tests.vllm.engine import Answer, Ask, Engine
from tests.vllm.mixes import TOLERANCE, deviation
from tests.vllm.test_prefix_cache import prompt

pytestmark = pytest.mark.cpu

ASKS = [
    Ask(prompt(120), (0, 50, 60, 110), 8),
    Ask(prompt(60, seed=2), None, 8),
    Ask(prompt(90, seed=3), (), 8, score=True),
]
RANK = 8
NUMBERS = {"adapter": 1, "scaled": 2}


@pytest.mark.parametrize("stages", [2])
def test_pipeline_stages(tiny: str, reference: Any, stages: int) -> None:
    """Each stage holds the KV slots of its own steps only, so two stages hold twice the tokens."""
    with Engine(model=tiny, pipeline_parallel_size=stages, max_num_batched_tokens=96) as engine:
        for ask, answers in zip(ASKS, engine.ask(ASKS), strict=True):
            assert deviation(reference, ask, answers) <= TOLERANCE
        # Again, from the prefix cache.
        answers = engine.ask([ASKS[0]])[0]
        assert answers[0].cached > 0
        assert deviation(reference, ASKS[0], answers) <= TOLERANCE
        assert engine.call(pool_tokens) > 1.9 * _pool_of_one(tiny)


def test_tensor_parallel(tiny: str, reference: Any) -> None:
    with Engine(model=tiny, tensor_parallel_size=2, max_num_batched_tokens=96) as engine:
        for ask, answers in zip(ASKS, engine.ask(ASKS), strict=True):
            assert deviation(reference, ask, answers) <= TOLERANCE


def pool_tokens(llm: Any) -> int:
    cache = llm.llm_engine.vllm_config.cache_config
    return cache.num_gpu_blocks * cache.block_size


def _pool_of_one(tiny: str) -> int:
    with Engine(model=tiny, max_num_batched_tokens=96) as engine:
        return engine.call(pool_tokens)


def generate_with(llm: Any, adapter: str, asks: list[Ask]) -> list[list[Answer]]:
    from vllm.lora.request import LoRARequest

    from tests.vllm.engine import generate

    return generate(llm, asks, LoRARequest(adapter, 1 + hash(adapter) % 1000, adapter) if adapter else None)


def test_lora_equals_merged_weights(tiny: str, reference: Any, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", reference, RANK)
    oracle = merged(tiny, adapter)
    scaled = scaled_adapter(tmp_path / "scaled", reference)
    with Engine(model=tiny, enable_lora=True, max_lora_rank=RANK, max_num_batched_tokens=160) as engine:
        for path, model in ((adapter, oracle), (None, reference), (scaled, merged(tiny, scaled)), (adapter, oracle)):
            for ask, answers in zip(ASKS, engine.call(generate_with, str(path or ""), ASKS), strict=True):
                assert deviation(model, ask, answers) <= TOLERANCE
                assert (deviation(reference, ask, answers) > 100 * TOLERANCE) == bool(path)
