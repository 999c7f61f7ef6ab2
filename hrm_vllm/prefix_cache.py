"""Prefix-cache keys that know the spans.

The KV of a token inside a span depends on the whole span, also on the part behind its cache block.
"""

from collections.abc import Callable
from typing import Any

from hrm_text.spans import SPANS_OPTION, Spans, block_keys, parse_spans, span_digest

_TAG = "prefix_lm_span"


def with_span_keys(original: Callable[..., Any]) -> Callable[..., Any]:
    """For `kv_cache_utils.generate_block_hash_extra_keys`, called for each full block of a request.

    Seen in vLLM 0.32.0. Keys are (tag, value) pairs, the form that vLLM's KV events expect.
    """

    def generate_block_hash_extra_keys(
        request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int
    ) -> tuple[tuple[Any, ...] | None, int]:
        keys, next_mm_idx = original(request, start_token_idx, end_token_idx, start_mm_idx)
        spans, digests = spans_and_digests(request)
        extra = tuple((_TAG, key) for key in block_keys(spans, digests, start_token_idx, end_token_idx))
        return ((keys or ()) + extra or None), next_mm_idx

    return generate_block_hash_extra_keys


def spans_and_digests(request: Any) -> tuple[Spans, tuple[bytes, ...]]:
    """Spans of a core `Request` and the digests of their tokens, computed once a request."""
    cached = getattr(request, "_hrm_text_spans", None)
    if cached is None:
        params = request.sampling_params
        flat = (params.extra_args or {}).get(SPANS_OPTION) if params is not None else None
        # Admission wrote the list; without it the request is another model's.
        spans = parse_spans(flat, request.num_prompt_tokens) if flat else ()
        prompt = request.prompt_token_ids or []
        cached = (spans, tuple(span_digest(prompt, span) for span in spans))
        request._hrm_text_spans = cached
    return cached
