"""Every emitted and scored token equals the oracle's, over random mixes of requests and schedules."""

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.vllm.engine import Ask, Engine
from tests.vllm.mixes import TOLERANCE, asks, only_generated, worst_deviation

pytestmark = pytest.mark.cpu

BUDGET = 96  # tokens a step: also the longest span, so chunks are as tight as they can be
# No shrinking: an engine that failed once is not the engine the next example should meet.
COMMON = only_generated(20)

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


# What each schedule has to have done, or the engine did not test what its name says.
EXPECTED = {
    "tight chunks": {"chunks", "hits"},
    "preemption": {"preemptions"},
    "n-gram drafts": {"drafts", "accepted"},
    "one step a prompt": {"hits"},
}


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest, tiny: str) -> Iterator[tuple[str, Engine]]:
    with Engine(model=tiny, **ENGINES[request.param]) as running:
        running.call(count_events)
        yield request.param, running


@COMMON
@given(batch=st.lists(asks(longest_span=BUDGET), min_size=1, max_size=6))
def test_mixes_equal_the_oracle(engine: tuple[str, Engine], reference: Any, batch: list[Ask]) -> None:
    assert worst_deviation(reference, engine[1], batch) <= TOLERANCE


def test_the_schedule_was_the_one_named(engine: tuple[str, Engine]) -> None:
    name, running = engine
    # A prompt that repeats itself, for the drafts; greedy tokens of a random model do not.
    running.ask([Ask(tuple(range(20, 30)) * 8, (0, 20), 30)])
    counts = running.call(event_counts)
    assert {event for event, count in counts.items() if count} >= EXPECTED[name], counts


def count_events(llm: Any) -> None:
    """Watch every step that the engine's scheduler plans."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    counts = llm.counts = dict.fromkeys(("chunks", "preemptions", "drafts", "accepted", "hits"), 0)
    schedule, update = scheduler.schedule, scheduler.update_from_output

    def counting_schedule(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        counts["preemptions"] += len(output.preempted_req_ids or ())
        counts["drafts"] += sum(map(len, output.scheduled_spec_decode_tokens.values()))
        for new in output.scheduled_new_reqs:
            counts["hits"] += new.num_computed_tokens > 0
            whole = len(new.prompt_token_ids) - new.num_computed_tokens
            counts["chunks"] += output.num_scheduled_tokens[new.req_id] < whole
        return output

    def counting_update(planned: Any, result: Any) -> Any:
        counts["accepted"] += sum(len(tokens) > 1 for tokens in result.sampled_token_ids)
        return update(planned, result)

    scheduler.schedule, scheduler.update_from_output = counting_schedule, counting_update


def event_counts(llm: Any) -> dict[str, int]:
    return llm.counts
