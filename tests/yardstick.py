"""What a GPU's rounding costs: the in-tree model's own deviation on requests that it masks rightly.

GPU kernels round differently from the oracle's, so the in-tree model's deviation from the float32 oracle of
the same weights, with the whole prompt one span and nothing cached or scored, is the yardstick for each dtype.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from hrm_text.oracle import token_logprobs
from hrm_text.spans import Spans


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
