"""Admission: every request gets its spans, or a 400 that names the fault."""

import contextlib
import functools
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from fastapi import Request

from hrm_sglang.spans import is_hrm_text
from hrm_text.envelope import ChatEncoder
from hrm_text.spans import (
    LOGPROBS_OPTION,
    NO_ENVELOPE,
    SPANS_OPTION,
    SpanRule,
    check_scoring,
    flatten,
    lacks_envelope,
    logprobs_option,
    merged_options,
    request_spans,
)

# Below "sglang", whose level and handler are the ones that the server's options set.
logger = logging.getLogger("sglang.srt.hrm_sglang")

_ENCODER = "_hrm_text_chat_encoder"
_WARM_UP = "The capital city of France is"  # what SGLang 0.5.20 to 0.5.23 send themselves at start-up


def with_spans(original: Callable[..., Any]) -> Callable[..., Any]:
    """For `TokenizerManager._create_tokenized_object`, which every prompt passes (SGLang 0.5.23).

    Writes the resolved spans into the request's own `custom_params`, so that every scheduler reads one and
    the same list. A ValueError here is a 400 from the server, and a ValueError to a caller of `Engine`.
    """

    def _create_tokenized_object(
        self: Any, obj: Any, input_text: Any, input_ids: Any, *args: Any, **kwargs: Any
    ) -> Any:
        rule = rule_of(self)
        if rule is None:
            return original(self, obj, input_text, input_ids, *args, **kwargs)
        if getattr(obj, "input_embeds", None) is not None or not input_ids:
            raise ValueError("input_embeds: HRM-Text takes token prompts, not prompt embeddings")
        for field in ("session_params", "session_id", "positional_embed_overrides", "multi_item_delimiter_indices"):
            if getattr(obj, field, None):
                raise ValueError(f"{field}: is not supported for HRM-Text: a request's spans must be known whole")
        if getattr(obj, "token_indices_to_pool", None):
            raise ValueError("token_indices_to_pool: is not supported for HRM-Text: it is not checked against spans")
        if (obj.sampling_params or {}).get("beam_width"):
            raise ValueError("beam_width: beam search is not supported for HRM-Text; use n with a temperature")
        _check_token_ids(input_ids, self.model_config.vocab_size)
        request = original(self, obj, input_text, input_ids, *args, **kwargs)
        if not hasattr(request, "return_logprob"):
            raise ValueError("HRM-Text: embedding is not supported, only generation")
        params = request.sampling_params
        options = params.custom_params or {}
        # SGLang may have cut the prompt; what it sends is what counts.
        prompt = request.input_ids
        spans = request_spans(prompt, options, rule)
        allow_inside = logprobs_option(options)
        start = request.logprob_start_len
        if request.return_logprob and not allow_inside and start is not None and start >= 0:
            # The entry at `start` itself is always empty.
            check_scoring(spans, range(start + 1, len(prompt)), "logprob_start_len")
        if lacks_envelope(prompt, options, rule) and not _is_servers_own(obj, request.rid):
            _warn_without_envelope()
        params.custom_params = {**options, SPANS_OPTION: flatten(spans), LOGPROBS_OPTION: allow_inside}
        return request

    return _create_tokenized_object


def with_fields(original: Callable[..., Any]) -> Callable[..., Any]:
    """For `TokenizerManager.generate_request`, whose callers hand over the HTTP request (SGLang 0.5.20 to 0.5.23).

    Options among the body's own fields, which SGLang drops.
    """

    async def generate_request(self: Any, obj: Any, request: Any = None) -> AsyncIterator[Any]:
        if rule_of(self) is not None and isinstance(request, Request) and await request.body():
            fields = await request.json()  # which FastAPI has read, and kept
            obj.sampling_params = _merged(fields, obj.sampling_params)
        async with contextlib.aclosing(original(self, obj, request)) as answers:
            async for answer in answers:
                yield answer

    return generate_request


def _merged(fields: Mapping[str, Any], params: Any) -> Any:
    """Sampling parameters of one prompt, or a list of many prompts', with options of ours among their custom ones."""
    if isinstance(params, list):
        return [_merged(fields, each) for each in params]
    params = params or {}
    return {**params, "custom_params": merged_options(fields, params.get("custom_params"))}


def rule_of(manager: Any) -> SpanRule | None:
    """The span rule of a TokenizerManager's model; None for any model but HRM-Text."""
    hf_config = manager.model_config.hf_config
    if not is_hrm_text(hf_config):
        return None
    encoder = encoder_of(manager)
    return SpanRule(encoder.envelope if encoder else None, bool(getattr(hf_config, "prefix_lm", True)))


def encoder_of(manager: Any) -> ChatEncoder | None:
    """The chat encoder of a TokenizerManager; None without a tokenizer."""
    if manager.tokenizer is None:
        return None
    encoder: ChatEncoder | None = getattr(manager, _ENCODER, None)
    if encoder is None:
        encoder = ChatEncoder.of(manager.tokenizer)
        setattr(manager, _ENCODER, encoder)
    return encoder


def _is_servers_own(obj: Any, rid: str) -> bool:
    """Whether SGLang itself sent this prompt: to warm up, or for `/health_generate`."""
    from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX

    return getattr(obj, "text", None) == _WARM_UP or rid.startswith(HEALTH_CHECK_RID_PREFIX)


@functools.cache
def _warn_without_envelope() -> None:
    """Once in a process."""
    logger.warning(NO_ENVELOPE)


def _check_token_ids(prompt_ids: Sequence[int], vocab_size: int) -> None:
    for token in prompt_ids:
        if not isinstance(token, int):
            raise ValueError(f"prompt: must hold token ids, got {token!r}")
    for token in (min(prompt_ids), max(prompt_ids)):
        if not 0 <= token < vocab_size:
            raise ValueError(
                f"prompt: token id {token} is out of vocabulary; the limit is {vocab_size - 1}, from vocab_size"
            )
