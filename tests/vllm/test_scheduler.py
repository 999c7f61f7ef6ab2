"""The span-aligned scheduler's one decision, over the lookahead call that both scheduling loops make."""

from dataclasses import dataclass, field
from typing import Any

from vllm import SamplingParams
from vllm.v1.request import RequestStatus

from hrm_vllm.scheduler import span_aligned


class Base:
    """Stands in for a scheduler that skips a waiting request it cannot serve, as vLLM 0.33 does."""

    current_step = 1

    def _reserve_prefill_lookahead(self, request: Any, num_computed_tokens: int, num_new_tokens: int) -> int:
        return num_new_tokens


@dataclass
class Waiting:
    spans: list[int]
    status: RequestStatus = RequestStatus.WAITING
    num_prompt_tokens: int = 100
    prompt_token_ids: list[int] = field(default_factory=lambda: list(range(100)))

    @property
    def sampling_params(self) -> SamplingParams:
        return SamplingParams(extra_args={"prefix_lm_spans": self.spans})


def test_chunks_end_at_span_bounds() -> None:
    scheduler = span_aligned(Base)()
    request = Waiting([10, 60], RequestStatus.RUNNING)
    assert scheduler._reserve_prefill_lookahead(request, 0, 40) == 10
    assert scheduler._reserve_prefill_lookahead(request, 10, 49) == 0
    assert scheduler._reserve_prefill_lookahead(request, 10, 50) == 50
    assert scheduler._reserve_prefill_lookahead(request, 32, 28) == 28  # a cache hit inside the span
    assert scheduler._reserve_prefill_lookahead(request, 60, 7) == 7


def test_requests_behind_a_span_that_does_not_fit_wait_with_it() -> None:
    scheduler = span_aligned(Base)()
    long, short, running = Waiting([0, 90]), Waiting([]), Waiting([], RequestStatus.RUNNING)
    assert scheduler._reserve_prefill_lookahead(long, 0, 80) == 0
    assert scheduler._reserve_prefill_lookahead(short, 0, 20) == 0
    assert scheduler._reserve_prefill_lookahead(running, 50, 1) == 1
    scheduler.current_step = 2
    assert scheduler._reserve_prefill_lookahead(long, 0, 95) == 95
    assert scheduler._reserve_prefill_lookahead(short, 0, 20) == 20
