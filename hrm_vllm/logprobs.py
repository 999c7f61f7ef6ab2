"""Prompt log-probs: positions inside a span come back empty.

The log-prob of a token inside a span is read where the model already sees the token, so it is no
prediction. Admission refuses requests that would get nothing else; here the holes are made. For a hole the
completions endpoint decodes the token, as vLLM does for every log-prob: three times a prompt token, through a pool of
tokenizers, which is most of a scoring request's time in the API server. So a token is decoded once for all requests.
"""

import functools
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
        if processor.tokenizer is not None:
            processor.tokenizer = decoding_once(processor.tokenizer)
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


def with_one_decoding(original: Callable[..., Any]) -> Callable[..., Any]:
    """For `OpenAIServingCompletion._create_completion_logprobs`, whose callers name `tokenizer` (vLLM 0.32.0)."""

    def _create_completion_logprobs(self: Any, *args: Any, tokenizer: Any, **kwargs: Any) -> Any:
        once = None if tokenizer is None else decoding_once(tokenizer)
        return original(self, *args, tokenizer=once, **kwargs)

    return _create_completion_logprobs


@functools.lru_cache(maxsize=4)
def decoding_once(tokenizer: Any) -> "OnceDecoding":
    """The one for a tokenizer, or for what this made of it."""
    return tokenizer if isinstance(tokenizer, OnceDecoding) else OnceDecoding(tokenizer)


class OnceDecoding:
    """A tokenizer that decodes each token by itself once; all else is the tokenizer's own."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._text_of = functools.cache(lambda token: tokenizer.decode([token]))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def decode(self, ids: Any, *args: Any, **kwargs: Any) -> str:
        ids = [ids] if isinstance(ids, int) else ids
        if len(ids) == 1 and not args and not kwargs:
            return self._text_of(ids[0])
        return self._tokenizer.decode(ids, *args, **kwargs)
