"""What the model state for Model Runner V2, which runs on GPUs, hands to the attention builders."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import SamplingParams

pytest.importorskip("triton")

from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from hrm_text.spans import SPANS_OPTION, SpanRule
from hrm_vllm.attention import SpanSplitting
from hrm_vllm.runner_v2 import HrmTextModelState


class Builder(SpanSplitting):
    pass


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch) -> HrmTextModelState:
    """One without an engine, whose `prepare_attn` returns what a builder of ours would be given."""
    config = SimpleNamespace(hf_config=SimpleNamespace())
    monkeypatch.setattr(DefaultModelState, "__init__", lambda self: setattr(self, "model_config", config))
    monkeypatch.setattr(DefaultModelState, "add_request", lambda *_: None)
    monkeypatch.setattr(DefaultModelState, "remove_request", lambda *_: None)
    monkeypatch.setattr(DefaultModelState, "prepare_attn", handed_over)
    monkeypatch.setattr("hrm_vllm.runner_v2.rule_of", lambda config: SpanRule(envelope=None))
    return HrmTextModelState()


def handed_over(self: Any, input_batch: Any, model_specific_attn_metadata: Any) -> dict[str, Any]:
    assert model_specific_attn_metadata.get_extra_attn_kwargs(object(), 1) == {}
    given: dict[str, Any] = model_specific_attn_metadata.get_extra_attn_kwargs(Builder(), 1)
    return given


def request(name: str, **fields: Any) -> Any:
    params = SamplingParams(extra_args={SPANS_OPTION: [0, 3]}, **fields)
    return SimpleNamespace(req_id=name, prompt_token_ids=[5, 6, 7, 8], sampling_params=params)


def batch(*names: str) -> Any:
    return SimpleNamespace(req_ids=list(names), logits_indices=torch.arange(len(names)))


def test_only_the_last_states_are_read_unless_a_prompt_is_scored(state: HrmTextModelState) -> None:
    state.add_request(0, request("plain", logprobs=2))
    state.add_request(1, request("scored", prompt_logprobs=0))
    alone = batch("plain")
    assert state.prepare_attn(alone) == {"row_spans": [((0, 3),)], "read": alone.logits_indices}
    assert state.prepare_attn(batch("plain", "scored")) == {"row_spans": [((0, 3),)] * 2, "read": None}
    state.remove_request("scored")
    assert state.prepare_attn(alone)["read"] is alone.logits_indices


def test_tokens_of_a_prompt_that_are_compared_are_read_too(state: HrmTextModelState) -> None:
    state.add_request(0, request("compared", prompt_logprob_token_ids=[[1, 2]] * 4))
    assert state.prepare_attn(batch("compared"))["read"] is None


def test_a_dry_run_computes_all(state: HrmTextModelState) -> None:
    assert state.prepare_attn(batch("made up")) == {"row_spans": [], "read": None}
