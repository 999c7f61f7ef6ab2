"""Chat requests: the shared template, rendered to token ids in which message text is only text."""

import difflib
from typing import Any

from vllm.config import VllmConfig
from vllm.renderers.chat_utils import parse_chat_messages, parse_chat_messages_async
from vllm.renderers.hf import HfRenderer
from vllm.renderers.inputs.preprocess import parse_dec_only_prompt
from vllm.renderers.params import ChatParams

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
