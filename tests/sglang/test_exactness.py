"""Every emitted and scored token equals the oracle's, over random mixes of requests and schedules."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.sglang.engine import TOLERANCE, Engine, true_spans, worst_deviation
from tests.vllm.engine import Ask
from tests.vllm.mixes import asks, only_generated

pytest.importorskip("sglang")

COMMON = only_generated(12)
ENGINES: dict[str, dict[str, Any]] = {
    # The budget is below the longest span, so that spans run whole and first.
    "tight chunks": {"chunked_prefill_size": 48},
    # For up to 8 requests of 172 tokens: requests are retracted and computed again, and chunks are clipped.
    "retraction": {"chunked_prefill_size": 48, "max_total_tokens": 360, "schedule_conservativeness": 0.1},
    "mixed chunks": {"chunked_prefill_size": 64, "enable_mixed_chunk": True},
    "no overlap": {"chunked_prefill_size": 64, "disable_overlap_schedule": True},
    "one step a prompt": {"chunked_prefill_size": -1},
}


@pytest.fixture(scope="module", params=ENGINES)
def engine(request: pytest.FixtureRequest, tiny: str) -> Iterator[Engine]:
    with Engine(model_path=tiny, **ENGINES[request.param]) as running:
        yield running


@COMMON
@given(batch=st.lists(asks(longest_span=96), min_size=1, max_size=6), late=st.booleans())
def test_mixes_equal_the_oracle(engine: Engine, reference: Any, batch: list[Ask], late: bool) -> None:
    if late:  # scored from the last span's end on, so that the cache is read up to there
        batch = [replace(ask, score_from=max(0, *(end - 1 for _, end in true_spans(ask)), 0)) for ask in batch]
    assert worst_deviation(reference, engine, batch) <= TOLERANCE
