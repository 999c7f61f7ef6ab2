"""The prompt envelope: conditions, chat rendering, and text that stays text.

`<|im_start|>` + condition tokens + prompt + `<|im_end|>`, then the answer, ended by `<|box_end|>`.
The Jinja template beside this file lays a chat out; `encode_chat` tokenises it so that a marker
spelled inside a message is plain text and never opens a span or changes the mode.
"""

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2
import jinja2.sandbox
import tokenizers

from hrm_text.spans import Envelope

IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
ANSWER_END = "<|box_end|>"
CONDITIONS = {
    "direct": "<|object_ref_start|>",
    "cot": "<|object_ref_end|>",
    "noisy": "<|quad_start|>",
    "synth": "<|quad_end|>",
}
DEFAULT_CONDITION = "direct"
MARKERS = (IM_START, IM_END, ANSWER_END, *CONDITIONS.values())


class ChatError(ValueError):
    """A chat request that cannot be rendered; the message names the field and the value."""


def condition_tokens(condition: str) -> str:
    """Marker tokens of a condition or of a composite such as "synth,cot".

    Raises:
        ChatError: a name is not one of `CONDITIONS`.
    """
    names = [name.strip() for name in condition.split(",")]
    for name in names:
        if name not in CONDITIONS:
            raise ChatError(
                f"condition: {name!r} is unknown; it must be one of {', '.join(CONDITIONS)}, "
                "or several joined by commas"
            )
    return "".join(CONDITIONS[name] for name in names)


def wrap_prompt(prompt: str, condition: str = DEFAULT_CONDITION) -> str:
    """One instruction in its envelope, as text for a completions endpoint."""
    return f"{IM_START}{condition_tokens(condition)}{prompt}{IM_END}"


@functools.cache
def chat_template() -> str:
    """The Jinja chat template, for `tokenizer.chat_template` or `apply_chat_template`."""
    return (resources.files("hrm_text") / "chat_template.jinja").read_text()


@functools.cache
def _compiled_template() -> jinja2.Template:
    def raise_exception(message: str) -> None:
        raise ChatError(message)

    env = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    env.globals["raise_exception"] = raise_exception
    return env.from_string(chat_template())


@dataclass(frozen=True)
class ChatEncoder:
    """Token ids of chats, for one tokenizer.

    Attributes:
        plain: the tokenizer with special-token parsing off: every spelling is ordinary text.
        markers: marker text to token id.
    """

    plain: tokenizers.Tokenizer
    markers: Mapping[str, int]

    @classmethod
    def of(cls, tokenizer: Any) -> "ChatEncoder":
        """Build from a transformers fast tokenizer.

        Raises:
            ValueError: the tokenizer is not a fast one or lacks a marker.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(f"HRM-Text needs a fast tokenizer (tokenizer.json), got {type(tokenizer).__name__}")
        markers = marker_ids(tokenizer)
        # A copy, because the setting is global to a tokenizer object and others share this one.
        plain = tokenizers.Tokenizer.from_str(backend.to_str())
        # A marker that tokenizer.json calls an ordinary added token would be parsed all the same.
        plain.add_special_tokens(list(MARKERS))
        plain.encode_special_tokens = True
        plain.no_truncation()
        plain.no_padding()
        return cls(plain, markers)

    @property
    def envelope(self) -> Envelope:
        """Ids of the markers that open and close a span."""
        return Envelope(self.markers[IM_START], self.markers[IM_END])

    def encode_text(self, text: str) -> list[int]:
        """Ids of ordinary text; markers spelled in it are text."""
        return self.plain.encode(text, add_special_tokens=False).ids if text else []

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        condition: str = DEFAULT_CONDITION,
        continue_final_message: bool = False,
    ) -> list[int]:
        """Ids of a chat, ready for the model to answer.

        Args:
            messages: dicts with `role` (system first, then user and assistant in turn) and `content`.
            condition: a name of `CONDITIONS` or several joined by commas, used for every user turn.
            continue_final_message: leave a final assistant message open instead of ending it.

        Raises:
            ChatError: an unknown condition or role, turns out of order, or content that is not text.
        """
        contents = [_text_of(message, index) for index, message in enumerate(messages)]
        if not contents:
            raise ChatError("messages: must hold at least one message")
        if messages[-1].get("role") == "assistant" and not continue_final_message:
            raise ChatError(
                "messages: the last one is the assistant's, so there is nothing to answer; "
                "set continue_final_message to extend it"
            )
        condition_tokens(condition)
        rendered = _compiled_template().render(
            messages=[
                {"role": message.get("role"), "content": _placeholder(index)} for index, message in enumerate(messages)
            ],
            condition=condition,
            continue_final_message=continue_final_message,
        )
        ids: list[int] = []
        pending = ""
        for part, is_marker in self._split(rendered, contents):
            if not is_marker:
                pending += part
                continue
            ids += self.encode_text(pending)
            ids.append(self.markers[part])
            pending = ""
        return ids + self.encode_text(pending)

    def _split(self, rendered: str, contents: Sequence[str]) -> Iterator[tuple[str, bool]]:
        # Only the template's own text is searched for markers; contents go in as text.
        pattern = re.compile("|".join([*map(re.escape, self.markers), r"\ue000\d+\ue001"]))
        position = 0
        for match in pattern.finditer(rendered):
            yield rendered[position : match.start()], False
            token = match.group()
            if token in self.markers:
                yield token, True
            else:
                yield contents[int(token[1:-1])], False
            position = match.end()
        yield rendered[position:], False


def marker_ids(tokenizer: Any) -> dict[str, int]:
    """Token id of every marker.

    Raises:
        ValueError: the tokenizer lacks one.
    """
    vocab = tokenizer.get_vocab()
    missing = [marker for marker in MARKERS if marker not in vocab]
    if missing:
        raise ValueError(f"tokenizer: HRM-Text's special token {missing[0]!r} is not in its vocabulary")
    return {marker: vocab[marker] for marker in MARKERS}


def _placeholder(index: int) -> str:
    # Private-use characters: the template never writes them, and contents never pass through it.
    return f"\ue000{index}\ue001"


def _text_of(message: Mapping[str, Any], index: int) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return _encodable(content, index)
    if isinstance(content, Sequence):
        parts = [
            part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in content
        ]
        if parts and all(isinstance(part, str) for part in parts):
            return _encodable("\n".join(part for part in parts if part is not None), index)
    raise ChatError(f"messages[{index}].content: must be text, got {content!r}")


def _encodable(text: str, index: int) -> str:
    # JSON can spell half of a surrogate pair; the tokenizer would fail on it with a TypeError.
    try:
        text.encode()
    except UnicodeEncodeError as error:
        bad = text[error.start]
        raise ChatError(f"messages[{index}].content: must be valid Unicode, got {bad!r} at {error.start}") from None
    return text
