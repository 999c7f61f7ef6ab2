"""Negative controls: undo one thing that exactness rests on, and the exactness tests must fail."""

from typing import Any

import pytest

pytest.importorskip("sglang")

from tests.sglang.engine import TOLERANCE, Engine, deviation, prompt
from tests.sglang.sabotage import VARIABLE
from tests.vllm.engine import Ask

P = prompt(160)
LONG = prompt(200, seed=3)
# What each sabotage breaks: requests served one after the other.
BROKEN_BY: dict[str, list[Ask]] = {
    "span_keys_off": [Ask(P, (0, 160)), Ask(P, (0, 149))],
    "causal_everywhere": [Ask(P, (0, 160))],
    "non_causal_everywhere": [Ask(P, (0, 64), score=True)],
    "chunks_unaligned": [Ask(LONG, (10, 150, 150, 190))],
}


@pytest.mark.parametrize("act", BROKEN_BY)
def test_sabotage_shows(tiny: str, reference: Any, act: str) -> None:
    with Engine(env={VARIABLE: act}, model_path=tiny, chunked_prefill_size=160) as engine:
        worst = 0.0
        for ask in BROKEN_BY[act]:
            try:
                (answers,) = engine.ask([ask])
            except (RuntimeError, ValueError):
                # A chunk that cuts a span is caught before it can be served, and ends the scheduler.
                assert act == "chunks_unaligned"
                return
            worst = max(worst, deviation(reference, ask, answers))
    assert worst > 100 * TOLERANCE
