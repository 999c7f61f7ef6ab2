"""Chunks, retraction and scoring under a token pool that is too small for the batch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sglang")

from hrm_text.oracle import load_reference
from tests.conftest import make_checkpoint
from tests.sglang.engine import TOLERANCE, Engine, deviation, prompt, retractions, worst_deviation
from tests.vllm.engine import Ask

P = prompt(160)


@pytest.fixture(scope="module")
def engine(tiny: str) -> Iterator[Engine]:
    # Nearly no reserve for tokens to come, so that requests run out of memory and are retracted.
    with Engine(
        model_path=tiny, chunked_prefill_size=48, max_total_tokens=400, schedule_conservativeness=0.1
    ) as running:
        yield running


def test_a_span_longer_than_the_budget_runs_whole(engine: Engine, reference: Any) -> None:
    batch = [Ask(P, (0, 150)), Ask(prompt(30, 1), (5, 25)), Ask(prompt(120, 2), (20, 110)), Ask(prompt(40, 3), ())]
    assert worst_deviation(reference, engine, batch) <= TOLERANCE


def test_retracted_requests_are_computed_again_exactly(engine: Engine, reference: Any) -> None:
    # Six requests of 30 + 90 tokens in a pool of 400, which SGLang admits by an optimistic estimate.
    batch = [Ask(prompt(30, seed), (0, 20), max_tokens=90) for seed in range(20, 26)]
    assert worst_deviation(reference, engine, batch) <= TOLERANCE
    assert engine.call(retractions) > 0


def test_a_chunk_that_memory_clips_ends_at_a_span_bound(engine: Engine, reference: Any) -> None:
    batch = [Ask(prompt(60, seed), (0, 50), max_tokens=40) for seed in range(30, 33)]
    batch += [Ask(prompt(160, 40), (30, 100, 100, 155), max_tokens=4)]
    assert worst_deviation(reference, engine, batch) <= TOLERANCE


@pytest.mark.parametrize(
    "ask",
    [
        Ask(P, (), score=True),
        Ask(P, (0, 70), score=True),
        Ask(P, (0, 70, 90, 120), score=True),
        Ask(P, (0, 70), score=True, score_from=69),
        Ask(P, (0, 70), score=True, score_from=68),
        Ask(P, (0, 160), score=True, options={"prefix_lm_span_logprobs": True}),
    ],
    ids=["causal", "all, a span", "all, two spans", "behind a span", "sgl.select", "inside a span, opted in"],
)
def test_input_logprobs_are_exact(engine: Engine, reference: Any, ask: Ask) -> None:
    for _ in range(2):  # again, with the cache filled
        (answers,) = engine.ask([ask])
        assert deviation(reference, ask, answers) <= TOLERANCE
        assert sum(logprob is not None for logprob in answers[0].prompt_logprobs or ()) > 30


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (Ask(P, (0, 161)), "out of range: it needs 0 <= start < end <= 160"),
        (Ask(P, (5, 5)), r"span \[5, 5\) is empty"),
        (Ask(P, (0, 10, 5, 20)), "spans must be sorted and must not overlap"),
        (Ask(P, (0, 10, 5)), r"must hold pairs \[start, end, ...\], got 3 numbers"),
        (Ask(P, (0, "x")), "must hold integers only"),  # type: ignore[arg-type]
        (Ask((*P, 256), ()), "token id 256 is out of vocabulary; the limit is 255"),
        (Ask(P, (), options={"prefix_lm_span_logprobs": "maybe"}), "prefix_lm_span_logprobs: must be true or false"),
    ],
)
def test_a_fault_is_named_and_hurts_no_one_else(engine: Engine, reference: Any, ask: Ask, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engine.ask([ask])
    good = Ask(P, (0, 60))
    (answers,) = engine.ask([good])
    assert deviation(reference, good, answers) <= TOLERANCE


def test_an_aborted_request_leaves_the_others_exact(engine: Engine, reference: Any) -> None:
    assert engine.call(abort_midway, P) < 80
    asks = [Ask(P, (0, 100), max_tokens=8), Ask(prompt(60, 50), (0, 50), max_tokens=8)]
    assert worst_deviation(reference, engine, asks) <= TOLERANCE


def test_a_causal_checkpoint_is_served_causally(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "causal", prefix_lm=False)
    with Engine(model_path=str(path), chunked_prefill_size=48) as causal:
        (answers,) = causal.ask([Ask(P)])
        assert deviation(load_reference(path), Ask(P, ()), answers) <= TOLERANCE
        with pytest.raises(ValueError, match="prefix_lm=false, so only an empty list is valid"):
            causal.ask([Ask(P, (0, 20))])


def test_scoring_inside_a_span_is_refused(engine: Engine) -> None:
    with pytest.raises(
        ValueError, match=r"logprob_start_len: the scored token at position 1 lies inside .* \[0, 160\)"
    ):
        engine.ask([Ask(P, score=True)])


def test_every_form_of_input_logprobs_has_the_holes(engine: Engine) -> None:
    token, top, chosen = engine.call(every_form, P, [0, 70])
    for entries in (token, top, chosen):
        assert [index for index, entry in enumerate(entries) if entry is None] == list(range(70))
        assert len(entries) == 160


def every_form(engine: Any, ids: tuple[int, ...], spans: list[int]) -> tuple[list[Any], ...]:
    """Log-probs of each input token, of the two best in its place, and of two chosen ids."""
    meta = engine.generate(
        input_ids=list(ids),
        sampling_params={"max_new_tokens": 1, "custom_params": {"prefix_lm_spans": spans}},
        return_logprob=True,
        logprob_start_len=0,
        top_logprobs_num=2,
        token_ids_logprob=[20, 21],
    )["meta_info"]
    tokens = [logprob for logprob, *_ in meta["input_token_logprobs"]]
    return tokens, meta["input_top_logprobs"], meta["input_token_ids_logprobs"]


def abort_midway(engine: Any, ids: tuple[int, ...]) -> int:
    """Abort a request after its first token; tokens it had by then."""

    async def run() -> int:
        stream = await engine.async_generate(
            input_ids=list(ids), sampling_params={"max_new_tokens": 80, "temperature": 0}, stream=True, rid="aborted"
        )
        tokens = 0
        async for output in stream:
            tokens = output["meta_info"]["completion_tokens"]
            engine.tokenizer_manager.abort_request(rid="aborted")
        return tokens

    return engine.loop.run_until_complete(run())
