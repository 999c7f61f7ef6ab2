"""Prefix-cache hits: exact, and only where the tokens *and* the spans they lie in are the same."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.vllm.engine import Ask, Engine
from tests.vllm.mixes import TOLERANCE, deviation

pytestmark = pytest.mark.cpu

BLOCK = 32


def prompt(length: int, seed: int = 7) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple((torch.randint(244, (length,), generator=generator) + 12).tolist())


@pytest.fixture(scope="module")
def engine(tiny: str) -> Iterator[Engine]:
    with Engine(model=tiny, max_num_batched_tokens=160) as running:
        yield running


P = prompt(160)
CASES = {
    # first request, second request, prompt tokens the second must find in the cache
    "same prompt, one span": (Ask(P, (0, 160)), Ask(P, (0, 160)), 128),
    "hit ends inside the last span": (Ask(P, (0, 40, 40, 150)), Ask(P, (0, 40, 40, 150)), 128),
    "causal prompt": (Ask(P, ()), Ask(P, ()), 128),
    "shared first turn, other second turn": (
        Ask(P, (0, 64, 96, 128)),
        Ask(P[:96] + prompt(64, seed=8), (0, 64, 96, 160)),
        96,
    ),
    "same tokens, other segmentation": (Ask(P, (0, 150)), Ask(P, (0, 149)), 0),
    "same tokens, causal after span": (Ask(P, (0, 160)), Ask(P, ()), 0),
    "same tokens, span starts later": (Ask(P, (0, 160)), Ask(P, (40, 160)), 0),
    "span grows beyond the shared tokens": (Ask(P[:100], (0, 100)), Ask(P, (0, 160)), 0),
    "same blocks, other tail of the span": (Ask(P, (0, 150)), Ask((*P[:149], 99, *P[150:]), (0, 150)), 0),
    "span after a shared causal run": (Ask(P, (100, 140)), Ask(P, (100, 150)), 96),
}


@pytest.mark.parametrize("case", CASES)
def test_hits_are_exact_and_keyed_by_span(engine: Engine, reference: Any, case: str) -> None:
    first, second, cached = CASES[case]
    engine.call(reset_cache)
    (before,) = engine.ask([first])
    (after,) = engine.ask([second])
    assert before[0].cached == 0
    assert after[0].cached == cached
    assert deviation(reference, first, before) <= TOLERANCE
    assert deviation(reference, second, after) <= TOLERANCE


def test_generated_tokens_are_reused_by_the_next_turn(engine: Engine, reference: Any) -> None:
    """A chat's second turn finds the first one's prompt and answer in the cache."""
    engine.call(reset_cache)
    first = Ask(P[:50], (0, 50), max_tokens=60)
    (answers,) = engine.ask([first])
    history = P[:50] + answers[0].tokens
    second = Ask(history + prompt(40, seed=9), (0, 50, 110, 150))
    (again,) = engine.ask([second])
    assert again[0].cached == 96  # the whole blocks of 109 computed tokens
    assert deviation(reference, second, again) <= TOLERANCE


def reset_cache(llm: Any) -> None:
    assert llm.reset_prefix_cache()
