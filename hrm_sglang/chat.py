"""Chat requests: the shared template, rendered to token ids in which message text is only text."""

import difflib
from collections.abc import Callable
from typing import Any

from hrm_sglang.requests import encoder_of, rule_of
from hrm_text.envelope import DEFAULT_CONDITION


def encoding(original: Callable[..., Any]) -> Callable[..., Any]:
    """For `OpenAIServingChat._process_messages`, which turns a chat into a prompt (SGLang 0.5.23).

    A ValueError here is a 400. A chat template given by the server's operator (--chat-template) is used as
    SGLang would use it.
    """

    def _process_messages(self: Any, request: Any, is_multimodal: bool, **kwargs: Any) -> Any:
        manager = self.tokenizer_manager
        if rule_of(manager) is None or getattr(manager.tokenizer, "chat_template", None):
            return original(self, request, is_multimodal, **kwargs)
        from sglang.srt.entrypoints.openai.protocol import MessageProcessingResult

        options = {**(self.default_chat_template_kwargs or {}), **(request.chat_template_kwargs or {})}
        for key in difflib.get_close_matches("condition", [k for k in options if k != "condition"]):
            raise ValueError(f"chat_template_kwargs.{key}: is unknown; did you mean 'condition'?")
        if request.tools:
            raise ValueError("tools: HRM-Text was not trained to use tools")
        condition = options.get("condition", DEFAULT_CONDITION)
        if not isinstance(condition, str):
            raise ValueError(f"condition: must be a string, got {condition!r}")
        encoder = encoder_of(manager)
        if encoder is None:
            raise ValueError("messages: a chat needs a tokenizer, and this engine runs without one")
        messages = [message.model_dump() for message in request.messages]
        ids = encoder.encode_chat(messages, condition, continue_final_message=bool(request.continue_final_message))
        stop = request.stop or []
        return MessageProcessingResult(
            prompt=manager.tokenizer.decode(ids),
            prompt_ids=ids,
            image_data=None,
            audio_data=None,
            video_data=None,
            modalities=[],
            stop=[stop] if isinstance(stop, str) else list(stop),
        )

    return _process_messages
