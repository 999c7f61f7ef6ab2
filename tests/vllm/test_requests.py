"""Requests that vLLM's own checks let through, and that must not reach the engine or mislead it."""

from collections.abc import Iterator
from typing import Any

import pytest
from vllm import __version__ as version

from tests.vllm.engine import Ask, Engine
from tests.vllm.mixes import TOLERANCE, deviation
from tests.vllm.test_prefix_cache import prompt

pytestmark = pytest.mark.cpu

EVENTS = {"enable_kv_cache_events": True, "publisher": "null"}


@pytest.fixture(scope="module")
def engine(tiny: str) -> Iterator[Engine]:
    with Engine(model=tiny, max_num_batched_tokens=160, kv_events_config=EVENTS) as running:
        yield running


@pytest.mark.parametrize("token", [256, -1, 1 << 40])
def test_a_token_outside_the_vocabulary_is_refused(engine: Engine, reference: Any, token: int) -> None:
    """Without a tokenizer vLLM 0.32 does not look, and the embedding would stop the engine for everyone."""
    fault: type[Exception] = ValueError
    message = f"token id {token} is out of vocabulary; the limit is 255"
    if not version.startswith("0.32"):  # refuses it itself, with its own exception, which the test's engine passes on
        fault, message = RuntimeError, f"VLLMValidationError: Token id {token} is out of vocabulary"
    with pytest.raises(fault, match=message):
        engine.ask([Ask((20, token, 30))])
    ask = Ask(prompt(40))
    (answers,) = engine.ask([ask])
    assert deviation(reference, ask, answers) <= TOLERANCE


def test_a_scored_request_never_reads_the_cache(engine: Engine, reference: Any) -> None:
    """Told to, vLLM leaves the log-probs of cached tokens uninitialised."""
    ask = Ask(prompt(120, seed=6), (0, 40), score=True, sampling={"skip_reading_prefix_cache": False})
    for _ in range(2):
        (answers,) = engine.ask([ask])
        assert deviation(reference, ask, answers) <= TOLERANCE


def test_kv_events_carry_the_spans(engine: Engine) -> None:
    """A router that computes block hashes itself needs the keys they were computed with."""
    ask = Ask(prompt(100, seed=5), (40, 60))
    spanned, causal = engine.call(stored_keys, ask), engine.call(stored_keys, Ask(ask.prompt, ()))
    assert [keys is None for keys in spanned] == [True, False, True]
    assert spanned[1][0][:2] == (8, 28)
    assert causal == [None, None]  # the first block was in the cache


def stored_keys(llm: Any, ask: Ask) -> list[Any]:
    """Extra keys of the blocks that serving `ask` stored, in order, as its KV events tell them."""
    from tests.vllm.engine import generate

    batches: list[Any] = []
    llm.llm_engine.engine_core.engine_core.scheduler.kv_event_publisher.publish = batches.append
    generate(llm, [ask])
    stored = [event for batch in batches for event in batch.events if type(event).__name__ == "BlockStored"]
    return [keys for event in stored for keys in event.extra_keys]


def test_a_fault_is_a_value_error_offline(engine: Engine) -> None:
    with pytest.raises(ValueError, match="prefix_lm_spans"):
        engine.ask([Ask(prompt(20), (0, 30))])


def test_token_ids_offline_may_be_a_tuple_and_must_be_integers(engine: Engine) -> None:
    assert engine.call(generate_raw, (20, 21)) == engine.call(generate_raw, [20, 21])
    with pytest.raises(ValueError, match="prompt: must hold token ids"):
        engine.call(generate_raw, [20.0, 21])
    assert engine.call(generate_raw, [20, 21])  # nothing was left waiting


def generate_raw(llm: Any, ids: Any) -> list[int]:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True, detokenize=False)
    (output,) = llm.generate({"prompt_token_ids": ids}, params, use_tqdm=False)
    return list(output.outputs[0].token_ids)
