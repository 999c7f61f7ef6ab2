"""Negative controls: undo one thing that exactness rests on, and the exactness tests must fail."""

from typing import Any

import pytest

from tests.vllm.engine import Ask, Engine
from tests.vllm.mixes import TOLERANCE, deviation
from tests.vllm.test_prefix_cache import P, prompt

pytestmark = pytest.mark.cpu

LONG = prompt(200, seed=3)
# What each sabotage breaks: requests served one after the other.
BROKEN_BY: dict[str, list[Ask]] = {
    "span_keys_off": [Ask(P, (0, 160)), Ask(P, (0, 149))],
    "non_causal_everywhere": [Ask(P, (0, 64), score=True)],
    "causal_everywhere": [Ask(P, (0, 160))],
    "chunks_unaligned": [Ask(LONG, (10, 150, 150, 190))],
}


@pytest.mark.parametrize("act", BROKEN_BY)
def test_sabotage_shows(tiny: str, reference: Any, act: str) -> None:
    with Engine(model=tiny, sabotage=act, max_num_batched_tokens=160) as engine:
        worst = 0.0
        for ask in BROKEN_BY[act]:
            try:
                (answers,) = engine.ask([ask])
            except (RuntimeError, ValueError) as error:
                # A chunk that cuts a span is caught before it can be served.
                assert act == "chunks_unaligned" and "end inside the span" in str(error)
                return
            worst = max(worst, deviation(reference, ask, answers))
    assert worst > 100 * TOLERANCE


def test_the_same_requests_are_exact_without_sabotage(tiny: str, reference: Any) -> None:
    with Engine(model=tiny, max_num_batched_tokens=160) as engine:
        for asks in BROKEN_BY.values():
            for ask in asks:
                (answers,) = engine.ask([ask])
                assert deviation(reference, ask, answers) <= TOLERANCE
