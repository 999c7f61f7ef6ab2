"""Chat requests: the shared template, rendered to token ids in which message text is only text."""

import difflib
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from vllm.config import VllmConfig
from vllm.renderers.chat_utils import parse_chat_messages, parse_chat_messages_async
from vllm.renderers.hf import HfRenderer
from vllm.renderers.inputs.preprocess import parse_dec_only_prompt
from vllm.renderers.params import ChatParams, TokenizeParams

from hrm_text.envelope import DEFAULT_CONDITION, ChatEncoder, ChatError
from hrm_vllm.compat import chat_template_error
from hrm_vllm.errors import RequestError


class HrmTextRenderer(HfRenderer):
    """vLLM 0.32's renderer for tokenizer mode `hrm_text`.

    A chat template given by the server's operator or, where trusted, by the request is used as
    vLLM would use it.
    """

    def __init__(self, config: VllmConfig, tokenizer: Any) -> None:
        self._encoder = ChatEncoder.of(tokenizer) if tokenizer is not None else None
        super().__init__(config, tokenizer)

    def render_chat(
        self, conversations: Any, chat_params: ChatParams, tok_params: TokenizeParams | None = None, **options: Any
    ) -> Any:
        limit, tok_params = without_limit(chat_params, tok_params)
        chats = super().render_chat(conversations, chat_params, tok_params, **options)
        check_limit(limit, chats[1])
        return chats

    async def render_chat_async(
        self, conversations: Any, chat_params: ChatParams, tok_params: TokenizeParams | None = None, **options: Any
    ) -> Any:
        limit, tok_params = without_limit(chat_params, tok_params)
        chats = await super().render_chat_async(conversations, chat_params, tok_params, **options)
        check_limit(limit, chats[1])
        return chats

    def render_messages(self, messages: Any, params: ChatParams) -> Any:
        if params.chat_template is not None:
            return super().render_messages(messages, params)
        parsed = parse_chat_messages(messages, self.model_config, content_format="string")
        return self._prompt_of(parsed, params)

    async def render_messages_async(self, messages: Any, params: ChatParams) -> Any:
        if params.chat_template is not None:
            return await super().render_messages_async(messages, params)
        parsed = await parse_chat_messages_async(messages, self.model_config, content_format="string")
        return self._prompt_of(parsed, params)

    def _prompt_of(self, parsed: Any, params: ChatParams) -> Any:
        conversation, media, _ = parsed
        options = params.chat_template_kwargs
        # vLLM adds keys of its own, so unknown ones are let pass; a misspelt `condition` must not mean "direct".
        for key in difflib.get_close_matches("condition", [k for k in options if k != "condition"]):
            raise RequestError(
                f"chat_template_kwargs.{key}: is unknown; did you mean 'condition'?",
                parameter="chat_template_kwargs",
                value=key,
            )
        for key in ("tools", "documents"):
            if options.get(key):
                raise RequestError(f"{key}: HRM-Text was not trained to use {key}", parameter=key)
        if media:
            raise RequestError("messages: HRM-Text takes text only", parameter="messages")
        if self._encoder is None:
            raise chat_template_error()("messages: a chat needs a tokenizer, and this engine runs without one")
        condition = options.get("condition", DEFAULT_CONDITION)
        if not isinstance(condition, str):
            raise RequestError(
                f"condition: must be a string, got {condition!r}", parameter="condition", value=condition
            )
        try:
            ids = self._encoder.encode_chat(
                conversation, condition, continue_final_message=bool(options.get("continue_final_message"))
            )
        except ChatError as error:
            raise RequestError(str(error), parameter="messages") from error
        return conversation, parse_dec_only_prompt(ids)


def without_limit(
    chat_params: ChatParams, tok_params: TokenizeParams | None
) -> tuple[int | None, TokenizeParams | None]:
    """`truncate_prompt_tokens` of a chat in our template, and how to tokenize it without."""
    if tok_params is None or chat_params.chat_template is not None:
        return None, tok_params
    return tok_params.truncate_prompt_tokens, replace(tok_params, truncate_prompt_tokens=None)


def check_limit(limit: int | None, prompts: Iterable[Any]) -> None:
    """Refuse a limit that would cut a chat's markers off, and so change what its spans are.

    Raises:
        RequestError: a prompt is longer. Less than 0 stands for the model's context, which vLLM checks.
    """
    for tokens in (len(prompt["prompt_token_ids"]) for prompt in prompts):
        if limit is not None and 0 <= limit < tokens:
            raise RequestError(
                f"truncate_prompt_tokens: {limit} would cut this chat of {tokens} tokens and its markers; shorten its "
                "messages",
                parameter="truncate_prompt_tokens",
                value=limit,
            )
