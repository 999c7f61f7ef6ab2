"""Every emitted and scored token equals the oracle's, over random mixes of requests and schedules."""

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.vllm.engine import Ask, Engine
from tests.vllm.mixes import TOLERANCE, asks, worst_deviation

BUDGET = 96  # tokens a step: also the longest span, so chunks are as tight as they can be
# No shrinking: an engine that failed once is not the engine the next example should meet.
COMMON = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
    print_blob=False,
)

ENGINES: dict[str, dict[str, Any]] = {
    "tight chunks": {"max_num_batched_tokens": BUDGET},
    # 12 blocks of 32 tokens for up to 6 requests of 172: requests are preempted and computed again.
    "preemption": {"max_num_batched_tokens": BUDGET, "num_gpu_blocks_override": 12},
    "n-gram drafts": {
        "max_num_batched_tokens": BUDGET,
        "speculative_config": {
            "method": "ngram",
            "num_speculative_tokens": 3,
            "prompt_lookup_max": 2,
            "prompt_lookup_min": 1,
        },
    },
    "one step a prompt": {"enable_chunked_prefill": False, "max_num_batched_tokens": 2048},
}


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest, tiny: str) -> Iterator[Engine]:
    with Engine(model=tiny, **ENGINES[request.param]) as running:
        yield running


@COMMON
@given(batch=st.lists(asks(longest_span=BUDGET), min_size=1, max_size=6))
def test_mixes_equal_the_oracle(engine: Engine, reference: Any, batch: list[Ask]) -> None:
    assert worst_deviation(reference, engine, batch) <= TOLERANCE
