"""Model Runner V1 (CPU): hands the batch's spans to the attention metadata builder."""

from collections.abc import Callable
from typing import Any

from vllm.distributed import get_pp_group

from hrm_text.spans import SpanRule, Spans
from hrm_vllm.attention import step_spans
from hrm_vllm.spans import rule_of, spans_of


def with_step_spans(original: Callable[..., Any]) -> Callable[..., Any]:
    """For `GPUModelRunner._build_attention_metadata`, which `CPUModelRunner` inherits.

    Seen in vLLM 0.32.0. Rows of the metadata are the input batch's requests, in its order.
    """

    def _build_attention_metadata(self: Any, *args: Any, **kwargs: Any) -> Any:
        rule = rule_of(self.model_config)
        if rule is None:
            return original(self, *args, **kwargs)
        _ensure_stage_buffer(self)
        with step_spans([_row_spans(self.requests.get(req_id), rule) for req_id in self.input_batch.req_ids]):
            return original(self, *args, **kwargs)

    return _build_attention_metadata


def _ensure_stage_buffer(runner: Any) -> None:
    """Later pipeline stages receive into a buffer that vLLM makes in its warm-up, which an eager CPU skips."""
    if runner.intermediate_tensors is None and not get_pp_group().is_first_rank:
        runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
            runner.max_num_tokens, runner.dtype, runner.device
        )


def _row_spans(state: Any, rule: SpanRule) -> Spans:
    if state is None:
        return ()
    cached = getattr(state, "_hrm_text_spans", None)
    if cached is None:
        cached = spans_of(state.prompt_token_ids, state.sampling_params, rule)
        state._hrm_text_spans = cached
    return cached
