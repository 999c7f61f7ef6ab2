"""Model Runner V2 (CUDA): the model state that keeps each request's spans, and captures what it has no graphs for."""

from collections.abc import Sequence
from typing import Any

from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.model_states.interface import ModelSpecificAttnMetadata

from hrm_text.spans import Spans
from hrm_vllm.attention import SpanSplitting
from hrm_vllm.spans import rule_of, spans_of


class RowSpans(ModelSpecificAttnMetadata):
    """Spans of a batch's rows, as a keyword argument of our builders' `build`."""

    def __init__(self, rows: Sequence[Spans]) -> None:
        self.rows = rows

    def get_extra_attn_kwargs(self, attn_metadata_builder: Any, num_reqs: int) -> dict[str, Any]:
        return {"row_spans": self.rows} if isinstance(attn_metadata_builder, SpanSplitting) else {}


class HrmTextModelState(DefaultModelState):
    """vLLM 0.32's default state, and the spans of every request in the batch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        rule = rule_of(self.model_config)
        if rule is None:
            raise RuntimeError("hrm_vllm: the model config hook did not run, so the span rule is unknown")
        self._rule = rule
        self._spans: dict[str, Spans] = {}

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        super().add_request(req_index, new_req_data)
        self._spans[new_req_data.req_id] = spans_of(
            new_req_data.prompt_token_ids, new_req_data.sampling_params, self._rule
        )

    def remove_request(self, req_id: str) -> None:
        super().remove_request(req_id)
        self._spans.pop(req_id, None)

    def prepare_attn(self, input_batch: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        rows = [self._spans.get(req_id, ()) for req_id in input_batch.req_ids]
        if not any(req_id in self._spans for req_id in input_batch.req_ids):
            rows = []  # vLLM's dry runs have made-up requests
        kwargs["model_specific_attn_metadata"] = RowSpans(rows)
        return super().prepare_attn(input_batch, *args, **kwargs)

    def capture_inner_cudagraphs(self, *args: Any, **kwargs: Any) -> None:
        """Steps with prompts, after vLLM has captured decode steps; again when it has bound its last KV caches."""
        super().capture_inner_cudagraphs(*args, **kwargs)
        self.model.prefiller.capture(self.device)
