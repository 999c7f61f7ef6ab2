"""Admission: every request gets its spans, or a 400 that names the fault."""

import copy
from array import array
from collections.abc import Callable, Sequence
from typing import Any

from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.sampling_params import BeamSearchParams

from hrm_text.spans import (
    LOGPROBS_OPTION,
    NO_ENVELOPE,
    SPANS_OPTION,
    SpanError,
    Spans,
    check_scoring,
    flatten,
    lacks_envelope,
    logprobs_option,
    merged_options,
    request_spans,
)
from hrm_vllm.errors import RequestError
from hrm_vllm.lora import check_once
from hrm_vllm.spans import rule_of, scores_prompt

logger = init_logger("vllm.hrm_vllm")


def with_spans(original: Callable[..., Any]) -> Callable[..., Any]:
    """For `InputProcessor.process_inputs`, which both the server and `LLM` put every request through.

    Seen in vLLM 0.32.0. Writes the resolved spans into the request's own `extra_args`, so that the
    scheduler, the workers and the output processor read one and the same list.
    """

    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = original(self, *args, **kwargs)
        rule = rule_of(self.model_config)
        if rule is None or request.sampling_params is None:
            return request
        if request.prompt_token_ids is None or request.prompt_embeds is not None:
            raise RequestError("HRM-Text takes token prompts, not prompt embeddings", parameter="prompt_embeds")
        if request.resumable:
            raise RequestError(
                "HRM-Text does not take streaming input: a span must be known whole", parameter="resumable"
            )
        request.prompt_token_ids = list(request.prompt_token_ids)  # offline, a tuple would stop the engine
        _check_token_ids(request.prompt_token_ids, self.model_config)
        # Several prompts may share one object; what is written below belongs to this one.
        params = request.sampling_params = copy.copy(request.sampling_params)
        _check_seed(params)
        if request.lora_request is not None:
            check_once(request.lora_request, self.vllm_config)
        options = params.extra_args or {}
        try:
            spans = request_spans(request.prompt_token_ids, options, rule)
            _check_length(spans, self.vllm_config)
            allow_inside = logprobs_option(options)
            scores = scores_prompt(params)
            if scores and not allow_inside:
                _check_scoring(spans, len(request.prompt_token_ids), params)
        except SpanError as error:
            raise RequestError(str(error), parameter=error.field, value=error.value) from error
        if lacks_envelope(request.prompt_token_ids, options, rule):
            logger.warning_once(NO_ENVELOPE)
        if scores:
            # Told to read the cache all the same, vLLM returns uninitialised memory for the cached tokens.
            params.skip_reading_prefix_cache = True
        params.extra_args = {**options, SPANS_OPTION: flatten(spans), LOGPROBS_OPTION: allow_inside}
        return request

    return process_inputs


def with_fields(original: Callable[..., Any]) -> Callable[..., Any]:
    """For `to_sampling_params` of the bodies that vLLM's server takes (0.32.0): options among the body's own fields."""

    def to_sampling_params(self: Any, *args: Any, **kwargs: Any) -> Any:
        params = original(self, *args, **kwargs)
        try:
            options = merged_options(self.model_extra or {}, params.extra_args)
        except SpanError as error:
            raise RequestError(str(error), parameter=error.field, value=error.value) from error
        params.extra_args = options or params.extra_args
        return params

    return to_sampling_params


def refusing_beams(original: Callable[..., Any]) -> Callable[..., Any]:
    """For `InputProcessor.resolve_watermarking`, the first call of both beam searches (vLLM 0.32.0).

    Beam search sends each beam as a new prompt, generated tokens and all, so spans that reach the end
    of the prompt would take them in.
    """

    def resolve_watermarking(self: Any, params: Any) -> Any:
        if isinstance(params, BeamSearchParams) and rule_of(self.model_config) is not None:
            raise RequestError(
                "use_beam_search: is not supported for HRM-Text, because vLLM turns generated tokens into prompt "
                "tokens there; use n with a temperature",
                parameter="use_beam_search",
            )
        return original(self, params)

    return resolve_watermarking


def _check_token_ids(prompt_ids: Sequence[int], model_config: Any) -> None:
    # vLLM leaves this out where it has no tokenizer (--skip-tokenizer-init, --tokens-only), and lets pass what
    # the tokenizer knows and the embedding does not; either would stop the engine for everyone.
    limit = model_config.get_vocab_size()
    for token in (min(prompt_ids), max(prompt_ids)):
        if not 0 <= token < limit:
            raise RequestError(
                f"prompt: token id {token} is out of vocabulary; the limit is {limit - 1}, from vocab_size",
                parameter="prompt",
                value=token,
            )
    try:
        array("q", prompt_ids)
    except TypeError as error:
        # Offline only; the engine would fail on it after `LLM` has begun to wait for its answer.
        raise RequestError(f"prompt: must hold token ids, {error}", parameter="prompt") from error


def _check_seed(params: Any) -> None:
    if current_platform.is_cpu() and params.seed is not None and params.temperature > 0:
        # Its V1 runner rewinds the generator of a request whose prompt is chunked, which a CPU generator
        # cannot do; the engine would stop for everyone.
        raise RequestError(
            f"seed: {params.seed} with temperature {params.temperature} is not supported by vLLM's CPU runner; "
            "leave seed out or set temperature to 0",
            parameter="seed",
            value=params.seed,
        )


def span_limit(vllm_config: Any) -> int:
    """Longest span, in tokens, that one step of this engine can compute."""
    scheduler = vllm_config.scheduler_config
    speculative = vllm_config.speculative_config
    drafting = speculative.max_num_new_slots_for_drafting if speculative is not None else 0
    return min(
        scheduler.max_num_scheduled_tokens or scheduler.max_num_batched_tokens,
        scheduler.max_num_batched_tokens - drafting,
    )


def _check_length(spans: Spans, vllm_config: Any) -> None:
    limit = span_limit(vllm_config)
    for start, end in spans:
        if end - start > limit:
            raise SpanError(
                f"span [{start}, {end}) has {end - start} tokens and is computed in one step; the limit is "
                f"{limit}, from max_num_batched_tokens",
                value=[start, end],
            )


def _check_scoring(spans: Spans, prompt_len: int, params: Any) -> None:
    # Ordinary prompt log-probs can have holes; the flat form and the table of fixed ids cannot.
    holes = not params.flat_logprobs and params.prompt_logprob_token_ids is None
    scored = range((params.prompt_logprob_start or 0) + 1, prompt_len)
    check_scoring(spans, scored, "prompt_logprobs", holes)
