"""Prompt log-probs: positions inside a span come back empty.

The log-prob of a token inside a span is read where the model already sees the token, so it is no
prediction. Admission refuses requests that would get nothing else; here the holes are made.
"""

from collections.abc import Callable
from typing import Any

from hrm_text.spans import LOGPROBS_OPTION, SPANS_OPTION, Spans, parse_spans, scored_inside


def hiding_in_span_scores(original: Callable[..., Any]) -> Callable[..., Any]:
    """For `LogprobsProcessor.from_new_request`: wraps the new processor's `_update_prompt_logprobs`.

    Seen in vLLM 0.32.0, where each prefill chunk's prompt log-probs are appended by that one method.
    """

    def from_new_request(*args: Any, **kwargs: Any) -> Any:
        processor = original(*args, **kwargs)
        request = kwargs.get("request") or args[-1]
        options = request.sampling_params.extra_args or {}
        flat = options.get(SPANS_OPTION)
        if flat and processor.prompt_logprobs is not None and not options.get(LOGPROBS_OPTION):
            _hide(processor, parse_spans(flat, len(request.prompt_token_ids)))
        return processor

    return from_new_request


def _hide(processor: Any, spans: Spans) -> None:
    append = processor._update_prompt_logprobs

    def _update_prompt_logprobs(tensors: Any) -> None:
        first = len(processor.prompt_logprobs)
        append(tensors)
        for position in range(first, len(processor.prompt_logprobs)):
            if scored_inside(spans, position):
                processor.prompt_logprobs[position] = None

    processor._update_prompt_logprobs = _update_prompt_logprobs
