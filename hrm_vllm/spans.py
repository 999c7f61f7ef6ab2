"""Spans of a vLLM request: the core's one function, fed from vLLM's objects."""

from typing import Any

from vllm.config import ModelConfig

from hrm_text.spans import Envelope, SpanRule, Spans, request_spans
from hrm_vllm import ARCHITECTURE

MODEL_TYPE = "hrm_text"

# Set on the HF config by the config hook, so that every process has it.
RULE_ATTRIBUTE = "hrm_text_span_rule"


def set_rule(model_config: ModelConfig, rule: SpanRule) -> None:
    """Record the rule where the pickled configuration carries it; a plain list survives any copy."""
    envelope = list(rule.envelope) if rule.envelope else None
    setattr(model_config.hf_config, RULE_ATTRIBUTE, {"envelope": envelope, "prefix_lm": rule.prefix_lm})


def rule_of(model_config: ModelConfig) -> SpanRule | None:
    """The rule of an HRM-Text deployment; None for any other model."""
    stored = getattr(model_config.hf_config, RULE_ATTRIBUTE, None)
    if stored is None:
        return None
    envelope = Envelope(*stored["envelope"]) if stored["envelope"] else None
    return SpanRule(envelope, stored["prefix_lm"])


def require_rule(model_config: ModelConfig) -> None:
    """Refuse HRM-Text under another architecture, whose class knows no spans and would serve it causally.

    Raises:
        ValueError: `--model-impl transformers`, or a config.json that names another class.
    """
    if model_config.hf_config.model_type == MODEL_TYPE and rule_of(model_config) is None:
        raise ValueError(
            f"HRM-Text: architecture {model_config.architecture} (--model-impl {model_config.model_impl}) is not "
            f"supported: only {ARCHITECTURE} masks prompts as the model was trained; unset --model-impl, and name "
            "that class in config.json's architectures"
        )


def spans_of(prompt_ids: list[int] | None, sampling_params: Any, rule: SpanRule) -> Spans:
    """Spans of a request as the scheduler and the runners see it.

    Admission wrote the spans into `extra_args`; a request that did not pass admission (warm-up)
    falls under the same rules.
    """
    options = getattr(sampling_params, "extra_args", None)
    return request_spans(prompt_ids or [], options, rule)


def scores_prompt(params: Any) -> bool:
    """Whether sampling parameters ask for log-probs of a prompt's tokens, by their ranks or by their ids."""
    return params.prompt_logprobs is not None or params.prompt_logprob_token_ids is not None
