"""What a GPU's rounding costs: the in-tree model's own deviation on requests that it masks rightly.

GPU kernels round differently from the oracle's, so the in-tree model's deviation from the float32 oracle of
the same weights, with the whole prompt one span and nothing cached or scored, is the yardstick for each dtype.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from hypothesis import given
from hypothesis import strategies as st

from hrm_text.oracle import token_logprobs
from hrm_text.spans import Spans
from tests.vllm.engine import Answer, Ask
from tests.vllm.mixes import asks, only_generated, true_spans


class Yardstick(NamedTuple):
    """Mean and largest deviation of the in-tree model where its mask is right."""

    mean: float
    largest: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Yardstick":
        deviations = list(values)
        return cls(sum(deviations) / len(deviations), max(deviations))


def emitted_deviations(reference: Any, prompt: Sequence[int], spans: Spans, answers: Iterable[Any]) -> list[float]:
    """|log-prob - oracle's| of every emitted token of `answers`, which have `tokens` and `logprobs`."""
    return [
        abs(float(expected) - got)
        for answer in answers
        for expected, got in zip(
            token_logprobs(reference, [*prompt, *answer.tokens], spans)[len(prompt) - 1 :], answer.logprobs, strict=True
        )
    ]


def emitted_by(reference: Any, engine: Any, batch: Sequence[Ask]) -> list[float]:
    """Serve `batch` at once; `emitted_deviations` of all of it."""
    return [
        value
        for ask, samples in zip(batch, engine.ask(batch), strict=True)
        for value in emitted_deviations(reference, ask.prompt, true_spans(ask), samples)
    ]


def measure(engines: Mapping[str, Any], reference: Any) -> dict[str, Yardstick]:
    """The yardstick of each dtype, from those of the engines "in-tree float32" and "in-tree bf16" that there are."""
    generator = torch.Generator().manual_seed(0)
    prompts = [
        tuple((torch.randint(244, (length,), generator=generator) + 12).tolist())
        for length in (5, 33, 64, 90, 150)
        for _ in range(8)
    ]
    whole = [Ask(prompt, None, 12) for prompt in prompts]
    result = {
        dtype: Yardstick.of(emitted_by(reference, engines[f"in-tree {dtype}"], whole))
        for dtype in ("float32", "bf16")
        if f"in-tree {dtype}" in engines
    }
    print(f"\nyardsticks: {result}")
    return result


def of_engine(name: str, yardsticks: Mapping[str, Yardstick]) -> Yardstick:
    """The yardstick for an engine whose name says its dtype."""
    return yardsticks["bf16" if "bf16" in name else "float32"]


def serve_mixes(
    engine: Any, reference: Any, deviation: Callable[[Any, Ask, list[Answer]], float], longest_span: int
) -> tuple[list[float], float]:
    """Serve random mixes: `emitted_deviations`, and the largest deviation, scored tokens included."""
    emitted: list[float] = []
    worst = 0.0

    @only_generated(12)
    @given(batch=st.lists(asks(longest_span=longest_span), min_size=1, max_size=6))
    def serve(batch: list[Ask]) -> None:
        nonlocal worst
        for ask, samples in zip(batch, engine.ask(batch), strict=True):
            emitted.extend(emitted_deviations(reference, ask.prompt, true_spans(ask), samples))
            worst = max(worst, deviation(reference, ask, samples))

    serve()
    return emitted, worst
