"""Prefill chunks that end only at span bounds or in causal runs.

SGLang's `PrefillAdder` takes a request's next chunk from `rem_chunk_tokens`, so each hook lends it the
aligned number for one call. A span longer than what is left of the budget waits for a step of its own
and then runs whole.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hrm_sglang.compat import clipped_chunk, extend_end, prefix_len, unclipped
from hrm_sglang.spans import spans_of
from hrm_text.spans import Spans, chunk_end


def admitting(original: Callable[..., Any]) -> Callable[..., Any]:
    """For `PrefillAdder.add_one_req`, the first chunk of a waiting request (SGLang 0.5.23)."""

    def add_one_req(self: Any, req: Any, has_chunked_req: bool, truncation_align_size: int | None) -> Any:
        from sglang.srt.managers.schedule_policy import AddReqResult

        def admit() -> Any:
            return original(self, req, has_chunked_req, truncation_align_size)

        total = len(req.full_untruncated_fill_ids)
        start = prefix_len(req)
        if not _serves(self) or self.rem_chunk_tokens is None or start + self.rem_chunk_tokens >= total:
            return admit()
        if has_chunked_req:
            # Only one request can be between chunks; an aligned chunk of it may have left budget over.
            return AddReqResult.OTHER
        spans = spans_of(req)
        aligned = chunk_end(spans, start, start + self.rem_chunk_tokens)
        if aligned == start:
            if self.can_run_list or self.rem_chunk_tokens <= 0:
                return AddReqResult.OTHER
            aligned = _span_end(spans, start)
        with _lending(self, aligned - start):
            result = admit()
            _check(req, spans, self)
        # The budget that the alignment left over is not for another request's first chunk.
        return AddReqResult.OTHER if result is AddReqResult.CONTINUE else result

    return add_one_req


def continuing(original: Callable[..., Any]) -> Callable[..., Any]:
    """For `PrefillAdder.add_chunked_req`, the further chunks of a request (SGLang 0.5.23).

    Free memory can clip such a chunk. A span that the budget holds back runs whole all the same; one that
    memory holds back waits for running requests, alone, until it fits.
    """

    def add_chunked_req(self: Any, req: Any) -> Any:
        if not _serves(self):
            return original(self, req)
        spans = spans_of(req)
        start, total = prefix_len(req), len(req.full_untruncated_fill_ids)
        aligned = chunk_end(spans, start, min(start + clipped_chunk(self), total))
        if aligned == start:
            aligned = _span_end(spans, start)
            running = self.running_batch is not None and self.running_batch.reqs
            if aligned - start > self.cur_rem_tokens and running:
                # Nothing may be added beside it: SGLang counts the request as one of a batch that is run.
                self.rem_chunk_tokens = 0
                return req
        with unclipped(self), _lending(self, aligned - start):
            result = original(self, req)
            _check(req, spans, self)
        return result

    return add_chunked_req


def _serves(adder: Any) -> bool:
    """Whether this adder's scheduler serves HRM-Text: only then its cache is ours."""
    from hrm_sglang.prefix_cache import SpanRadixCache

    return isinstance(adder.tree_cache, SpanRadixCache)


def _span_end(spans: Spans, position: int) -> int:
    """End of the span that begins or lies at `position`."""
    return next(end for start, end in spans if start <= position < end)


@contextmanager
def _lending(adder: Any, tokens: int) -> Iterator[None]:
    """Let the PrefillAdder `adder` have exactly `tokens` for a chunk, and charge its own budget with what it took."""
    budget, adder.rem_chunk_tokens = adder.rem_chunk_tokens, tokens
    try:
        yield
    finally:
        adder.rem_chunk_tokens = budget - (tokens - adder.rem_chunk_tokens)


def _check(req: Any, spans: Spans, adder: Any) -> None:
    if not adder.can_run_list or adder.can_run_list[-1] is not req:
        return
    chunk = extend_end(req)
    for start, end in spans:
        if start < chunk < end:
            raise RuntimeError(
                f"hrm_sglang: a prefill chunk of request {req.rid} ends at {chunk}, inside the span "
                f"[{start}, {end}); SGLang cut it where the chunk hook does not look"
            )
