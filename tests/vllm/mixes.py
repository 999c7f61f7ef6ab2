"""Random mixes of requests, and the check that every emitted and scored token equals the oracle's."""

from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from hrm_text.oracle import token_logprobs
from hrm_text.spans import SpanRule, Spans, request_spans, scored_inside
from tests.vllm.engine import Answer, Ask, Engine

TOLERANCE = 1e-5
VOCAB = range(12, 256)
RULE = SpanRule(envelope=None)


def only_generated(examples: int) -> settings:
    """The same examples each time and no shrinking, which would serve hundreds of batches."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )


def spans_for(length: int, longest: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Flat span lists over `length` tokens: gaps and spans in turn, abutting ones included."""

    def build(steps: list[tuple[int, int]]) -> tuple[int, ...]:
        flat: list[int] = []
        position = 0
        for gap, width in steps:
            start, end = position + gap, min(position + gap + width, length)
            if end <= start:
                break
            flat += [start, end]
            position = end
        return tuple(flat)

    gaps = st.one_of(st.just(0), st.integers(0, 40))
    return st.lists(st.tuples(gaps, st.integers(1, longest)), max_size=4).map(build)


@st.composite
def asks(draw: st.DrawFn, longest_span: int = 96, max_prompt: int = 160) -> Ask:
    """One request: causal, spanned, or left to rule 3; sometimes scored, sometimes several samples."""
    length = draw(st.integers(2, max_prompt))
    # Few seeds, so that prompts share prefixes and the cache is hit.
    generator = torch.Generator().manual_seed(draw(st.integers(0, 3)))
    prompt = tuple((torch.randint(len(VOCAB), (max_prompt,), generator=generator) + VOCAB.start).tolist())[:length]
    whole = st.none() if length <= longest_span else st.just(())
    spans = draw(st.one_of(whole, st.just(()), spans_for(length, longest_span)))
    score = draw(st.booleans())
    # Scored tokens inside spans come with the opt-in; without it they must be holes, if any are left.
    holes = spans is not None and score and draw(st.booleans()) and _scorable(spans, length)
    options = {"prefix_lm_span_logprobs": True} if score and not holes else {}
    n = draw(st.sampled_from([1, 1, 3]))
    sampling = {"temperature": 1.0} if n > 1 else {}
    return Ask(prompt, spans, draw(st.integers(1, 12)), n, score, options, sampling)


def _scorable(flat: tuple[int, ...], length: int) -> bool:
    """Whether some prompt token is not hidden inside a span."""
    spans = tuple(zip(flat[::2], flat[1::2], strict=True))
    return any(not scored_inside(spans, position) for position in range(1, length))


def true_spans(ask: Ask) -> Spans:
    """Spans the request must be served with, by the core's own function."""
    options: dict[str, Any] = {} if ask.spans is None else {"prefix_lm_spans": list(ask.spans)}
    return request_spans(ask.prompt, options, RULE)


def deviation(reference: Any, ask: Ask, answers: Sequence[Answer]) -> float:
    """Largest |log-prob - oracle's| over every emitted token and every scored prompt token."""
    spans = true_spans(ask)
    worst = 0.0
    for answer in answers:
        expected = token_logprobs(reference, ask.prompt + answer.tokens, spans)
        emitted = expected[len(ask.prompt) - 1 :]
        worst = max(worst, float((emitted - torch.tensor(answer.logprobs)).abs().max()))
        opted_in = ask.options.get("prefix_lm_span_logprobs", False)
        for position, logprob in enumerate(answer.prompt_logprobs or ()):
            hidden = position == 0 or (scored_inside(spans, position) and not opted_in)
            assert (logprob is None) == hidden, f"position {position} of spans {spans}"
            if logprob is not None:
                worst = max(worst, abs(float(expected[position - 1]) - logprob))
    return worst


def worst_deviation(reference: Any, engine: Engine, batch: Sequence[Ask]) -> float:
    """Serve `batch` at once; the largest deviation in it."""
    return max(deviation(reference, ask, answers) for ask, answers in zip(batch, engine.ask(batch), strict=True))
