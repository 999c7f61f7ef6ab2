"""Model Runner V2 (CUDA): the model state that keeps each request's spans, and captures what it has no graphs for."""

from collections.abc import Sequence
from typing import Any

import torch
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.model_states.interface import ModelSpecificAttnMetadata

from hrm_text.spans import Spans
from hrm_vllm.attention import SpanSplitting
from hrm_vllm.spans import rule_of, scores_prompt, spans_of


class RowSpans(ModelSpecificAttnMetadata):
    """What our builders' `build` takes besides: spans of a batch's rows, and the tokens whose state will be read."""

    def __init__(self, rows: Sequence[Spans], read: torch.Tensor | None) -> None:
        self.rows = rows
        self.read = read

    def get_extra_attn_kwargs(self, attn_metadata_builder: Any, num_reqs: int) -> dict[str, Any]:
        ours = isinstance(attn_metadata_builder, SpanSplitting)
        return {"row_spans": self.rows, "read": self.read} if ours else {}


class HrmTextModelState(DefaultModelState):
    """vLLM 0.32's default state, and the spans of every request in the batch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        rule = rule_of(self.model_config)
        if rule is None:
            raise RuntimeError("hrm_vllm: the model config hook did not run, so the span rule is unknown")
        self._rule = rule
        self._spans: dict[str, Spans] = {}
        self._scored: set[str] = set()  # requests whose prompt's states are read, not only the last one's

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        super().add_request(req_index, new_req_data)
        self._spans[new_req_data.req_id] = spans_of(
            new_req_data.prompt_token_ids, new_req_data.sampling_params, self._rule
        )
        params = new_req_data.sampling_params
        if params is None or scores_prompt(params):
            self._scored.add(new_req_data.req_id)

    def remove_request(self, req_id: str) -> None:
        super().remove_request(req_id)
        self._spans.pop(req_id, None)
        self._scored.discard(req_id)

    def prepare_attn(self, input_batch: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        rows = [self._spans.get(req_id, ()) for req_id in input_batch.req_ids]
        if not any(req_id in self._spans for req_id in input_batch.req_ids):
            rows = []  # vLLM's dry runs have made-up requests
        read = None if not rows or self._scored.intersection(input_batch.req_ids) else input_batch.logits_indices
        kwargs["model_specific_attn_metadata"] = RowSpans(rows, read)
        return super().prepare_attn(input_batch, *args, **kwargs)

    def capture_inner_cudagraphs(self, *args: Any, **kwargs: Any) -> None:
        """Steps with prompts, after vLLM has captured decode steps; again when it has bound its last KV caches."""
        super().capture_inner_cudagraphs(*args, **kwargs)
        self.model.prefiller.capture(self.device)
