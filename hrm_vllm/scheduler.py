"""A scheduler whose prefill chunks end only at span bounds or in causal runs."""

import functools
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from hrm_text.spans import SPANS_OPTION, chunk_end
from hrm_vllm.prefill import prepare_many_tokens
from hrm_vllm.prefix_cache import spans_and_digests


@functools.cache
def span_aligned(base: type[Scheduler]) -> type[Scheduler]:
    class SpanAlignedScheduler(base):
        """Cuts a chunk that would end inside a span at the span's start; 0 tokens means wait.

        `_reserve_prefill_lookahead` is called in both scheduling loops just before the check for an
        empty chunk (vLLM 0.32.0). Progress: running requests come first and in order of admission, so
        the oldest unfinished prefill gets the whole budget in the end, and admission refused spans
        that are longer than it. A waiting request whose span does not fit holds back those behind it
        (vLLM 0.32 stops there by itself, 0.33 skips on), or a stream of short ones could starve it.
        """

        _held_back_at = -1  # the step in which a waiting request's span did not fit

        def add_request(self, request: Request) -> None:
            options = request.sampling_params.extra_args if request.sampling_params else None
            if SPANS_OPTION not in (options or {}):
                raise RuntimeError(
                    f"hrm_vllm: request {request.request_id} came without its spans; the admission hook was bypassed"
                )
            super().add_request(request)

        def _reserve_prefill_lookahead(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
            num_new_tokens = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
            waiting = request.status != RequestStatus.RUNNING
            if waiting and self._held_back_at == self.current_step:
                return 0
            spans, _ = spans_and_digests(request)
            if not spans or num_computed_tokens >= spans[-1][1]:
                return num_new_tokens
            end = chunk_end(spans, num_computed_tokens, num_computed_tokens + num_new_tokens)
            if waiting and end == num_computed_tokens:
                self._held_back_at = self.current_step
            return end - num_computed_tokens

    return SpanAlignedScheduler


def make_scheduler(*args: Any, vllm_config: Any, **kwargs: Any) -> Scheduler:
    """`scheduler_cls` factory: keeps vLLM's choice between the sync and the async scheduler.

    It is made when the model is ready to serve, so what can wait until then begins here.
    """
    prepare_many_tokens(vllm_config)
    base = AsyncScheduler if vllm_config.scheduler_config.async_scheduling else Scheduler
    return span_aligned(base)(*args, vllm_config=vllm_config, **kwargs)
