"""Prompt log-probs: positions inside a span come back empty.

The log-prob of a token inside a span is read where the model already sees the token, so it is no
prediction. Admission refuses requests that would get nothing else; here the holes are made.
"""

from collections.abc import Callable
from typing import Any

from hrm_text.spans import LOGPROBS_OPTION, SPANS_OPTION, parse_spans, scored_inside


def hiding_in_span_scores(original: Any) -> Callable[..., Any]:
    """For `LogprobsProcessor.from_new_request`: wraps the new processor's `pop_prompt_logprobs`.

    Seen in vLLM 0.32.0, where a request's prompt log-probs leave through that one method.
    """

    def from_new_request(*args: Any, **kwargs: Any) -> Any:
        processor = original(*args, **kwargs)
        request = kwargs.get("request") or args[-1]
        options = request.sampling_params.extra_args or {}
        flat = options.get(SPANS_OPTION)
        if flat and processor.prompt_logprobs is not None and not options.get(LOGPROBS_OPTION):
            spans = parse_spans(flat, len(request.prompt_token_ids))
            pop = processor.pop_prompt_logprobs

            def pop_prompt_logprobs() -> Any:
                return [
                    None if scored_inside(spans, position) else entry for position, entry in enumerate(pop() or [])
                ] or None

            processor.pop_prompt_logprobs = pop_prompt_logprobs
        return processor

    return from_new_request
