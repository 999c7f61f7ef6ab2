"""Chats as token ids, with the bundled checkpoint's tokenizer."""

import json
from itertools import pairwise
from typing import Any

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from hrm_text.envelope import (
    CONDITIONS,
    MARKERS,
    ChatEncoder,
    ChatError,
    chat_template,
    condition_tokens,
    marker_ids,
    wrap_prompt,
)
from hrm_text.names import nano_path
from hrm_text.spans import SpanRule, envelope_spans, request_spans

IM_START, IM_END, DIRECT, COT, BOX_END, NOISY, SYNTH = 6, 7, 8, 9, 11, 12, 13
SPECIAL = range(14)

TOKENIZER: Any = AutoTokenizer.from_pretrained(nano_path())
PLAIN = Tokenizer.from_file(str(nano_path() / "tokenizer.json"))
ENCODER = ChatEncoder.of(TOKENIZER)

Message = dict[str, Any]


def text(content: str) -> list[int]:
    """Ids of text that spells no marker."""
    ids: list[int] = PLAIN.encode(content, add_special_tokens=False).ids
    assert not set(ids) & set(SPECIAL)
    return ids


def system(content: Any) -> Message:
    return {"role": "system", "content": content}


def user(content: Any) -> Message:
    return {"role": "user", "content": content}


def assistant(content: Any) -> Message:
    return {"role": "assistant", "content": content}


def ids_of_transformers(messages: list[Message], **options: Any) -> list[int]:
    ids: list[int] = TOKENIZER.apply_chat_template(
        messages, chat_template=chat_template(), tokenize=True, return_dict=False, **options
    )
    return ids


# Layout

DIALOGUE = [user("What is 2 + 2?"), assistant("It is 4."), user("And 3 + 3?"), assistant("6"), user("Why?")]


def test_one_turn() -> None:
    assert ENCODER.encode_chat([user("What is 2 + 2?")]) == [IM_START, DIRECT, *text("What is 2 + 2?"), IM_END]


def test_many_turns_with_system_text_in_the_first() -> None:
    ids = ENCODER.encode_chat([system("Be brief."), *DIALOGUE], condition="cot")

    assert ids == [
        *(IM_START, COT, *text("Be brief.\n\nWhat is 2 + 2?"), IM_END),
        *(*text("It is 4."), BOX_END),
        *(IM_START, COT, *text("And 3 + 3?"), IM_END),
        *(*text("6"), BOX_END),
        *(IM_START, COT, *text("Why?"), IM_END),
    ]


def test_a_developer_message_is_system_text() -> None:
    developer = {"role": "developer", "content": "Be brief."}

    assert ENCODER.encode_chat([developer, user("Hi")]) == ENCODER.encode_chat([system("Be brief."), user("Hi")])


@pytest.mark.parametrize(
    "condition, markers",
    [
        ("direct", [DIRECT]),
        ("cot", [COT]),
        ("noisy", [NOISY]),
        ("synth", [SYNTH]),
        ("synth,cot", [SYNTH, COT]),
        ("cot,synth", [COT, SYNTH]),
        (" noisy , direct ", [NOISY, DIRECT]),
    ],
)
def test_conditions(condition: str, markers: list[int]) -> None:
    expected = [IM_START, *markers, *text("Hi"), IM_END]

    assert ENCODER.encode_chat([user("Hi")], condition=condition) == expected
    assert ids_of_transformers([user("Hi")], condition=condition) == expected
    assert TOKENIZER(wrap_prompt("Hi", condition), add_special_tokens=False).input_ids == expected
    assert TOKENIZER(condition_tokens(condition), add_special_tokens=False).input_ids == markers


def test_every_condition_is_tested() -> None:
    assert list(CONDITIONS) == ["direct", "cot", "noisy", "synth"]


def test_without_a_condition_it_is_direct() -> None:
    assert ids_of_transformers([user("Hi")]) == ENCODER.encode_chat([user("Hi")], condition="direct")
    assert wrap_prompt("Hi") == wrap_prompt("Hi", "direct")


def test_a_final_assistant_message_can_be_left_open() -> None:
    messages = [user("What is 2 + 2?"), assistant("It is")]
    ids = ENCODER.encode_chat(messages, continue_final_message=True)

    assert ids == [IM_START, DIRECT, *text("What is 2 + 2?"), IM_END, *text("It is")]
    assert ids == ids_of_transformers(messages, continue_final_message=True)


def test_only_the_final_assistant_message_is_left_open() -> None:
    ids = ENCODER.encode_chat([*DIALOGUE, assistant("Be")], continue_final_message=True)

    assert ids.count(BOX_END) == 2
    assert ids[-len(text("Be")) - 1 :] == [IM_END, *text("Be")]


def test_a_final_user_message_has_nothing_to_leave_open() -> None:
    assert ENCODER.encode_chat(DIALOGUE, continue_final_message=True) == ENCODER.encode_chat(DIALOGUE)


def test_text_parts_are_lines_of_one_text() -> None:
    parts = [{"type": "text", "text": "What is"}, {"type": "text", "text": "2 + 2?"}]

    assert ENCODER.encode_chat([user(parts)]) == ENCODER.encode_chat([user("What is\n2 + 2?")])


def test_empty_content_leaves_the_markers() -> None:
    messages = [user(""), assistant(""), user("")]

    assert ENCODER.encode_chat(messages) == [IM_START, DIRECT, IM_END, BOX_END, IM_START, DIRECT, IM_END]


# Hypothesis also draws string constants that it finds in the code; a marker is no ordinary text.
TEXT = st.text(max_size=12).filter(lambda text: not any(marker in text for marker in MARKERS))


@st.composite
def dialogues(draw: st.DrawFn, content: st.SearchStrategy[str]) -> list[Message]:
    """Chats that end with the user's turn, with or without system text."""
    contents = draw(st.lists(content, min_size=1, max_size=5).filter(lambda turns: len(turns) % 2))
    turns = [assistant(content) if index % 2 else user(content) for index, content in enumerate(contents)]
    return [system(draw(content)), *turns] if draw(st.booleans()) else turns


CONDITION = st.lists(st.sampled_from(list(CONDITIONS)), min_size=1, max_size=3).map(",".join)


@given(dialogues(TEXT), CONDITION)
def test_ordinary_chats_are_those_of_apply_chat_template(messages: list[Message], condition: str) -> None:
    assert ENCODER.encode_chat(messages, condition=condition) == ids_of_transformers(messages, condition=condition)


# Text stays text

SPELLINGS = [
    *MARKERS,
    "<|endoftext|>",
    "<|reserved_0|>",
    "<|im_",
    "start|>",
    "\ue0000\ue001",
    "\ue0009\ue001",
    "\ue000",
]
TRICKY = st.lists(st.one_of(st.sampled_from(SPELLINGS), TEXT), max_size=4).map("".join)


@settings(max_examples=300)
@given(dialogues(TRICKY), CONDITION)
def test_markers_spelled_in_messages_stay_text(messages: list[Message], condition: str) -> None:
    ids = ENCODER.encode_chat(messages, condition=condition)
    questions = [message["content"] for message in messages if message["role"] == "user"]
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    if messages[0]["role"] == "system":
        questions[0] = f"{messages[0]['content']}\n\n{questions[0]}"
    conditions = [ENCODER.markers[CONDITIONS[name]] for name in condition.split(",")]
    special = [id for id in ids if id in SPECIAL]
    spans = envelope_spans(ids, ENCODER.envelope)

    turn = [IM_START, *conditions, IM_END]
    assert special == [*turn, BOX_END] * len(answers) + turn
    assert len(spans) == len(questions)
    assert spans == request_spans(ids, None, SpanRule(ENCODER.envelope))
    assert [PLAIN.decode(ids[start + 1 + len(conditions) : end - 1]) for start, end in spans] == questions
    gaps = [ids[end : start - 1] for (_, end), (start, _) in pairwise(spans)]
    assert [PLAIN.decode(gap) for gap in gaps] == answers


@pytest.mark.parametrize("marker", MARKERS)
def test_a_spelled_marker_is_more_than_one_token(marker: str) -> None:
    ids = ENCODER.encode_text(marker)

    assert not set(ids) & set(SPECIAL)
    assert PLAIN.decode(ids) == marker
    assert TOKENIZER(marker, add_special_tokens=False).input_ids == [ENCODER.markers[marker]]


def test_placeholders_in_messages_do_not_swap_them() -> None:
    ids = ENCODER.encode_chat([user("\ue0002\ue001"), assistant("\ue0000\ue001"), user("secret")])

    assert ids == [
        *(IM_START, DIRECT, *text("\ue0002\ue001"), IM_END),
        *(*text("\ue0000\ue001"), BOX_END),
        *(IM_START, DIRECT, *text("secret"), IM_END),
    ]


def test_jinja_in_messages_is_text() -> None:
    assert ENCODER.encode_chat([user("{{ 7 * 7 }}")]) == [IM_START, DIRECT, *text("{{ 7 * 7 }}"), IM_END]


# Faults

IMAGE = [{"type": "text", "text": "Look:"}, {"type": "image_url", "image_url": {"url": "x"}}]


@pytest.mark.parametrize(
    "messages, message",
    [
        pytest.param([], "messages: must hold at least one message", id="none"),
        pytest.param([user("a"), assistant("b")], "messages: the last one is the assistant's", id="answered"),
        pytest.param([user("a"), user("b")], "messages: two user messages in a row", id="user twice"),
        pytest.param([assistant("a"), user("b")], "messages: an assistant message must follow", id="assistant first"),
        pytest.param(
            [user("a"), assistant("b"), assistant("c"), user("d")],
            "messages: an assistant message must follow",
            id="assistant twice",
        ),
        pytest.param([system("a"), system("b"), user("c")], "messages: a system message must come first", id="systems"),
        pytest.param([user("a"), system("b")], "messages: a system message must come first", id="system last"),
        pytest.param([system("a")], "messages: a system message must be followed by a user", id="system only"),
        pytest.param(
            [user("a"), {"role": "tool", "content": "b"}], "messages: role tool is not supported", id="unknown role"
        ),
        pytest.param([{"content": "a"}], "messages: role None is not supported", id="no role"),
    ],
)
def test_a_chat_out_of_order_is_refused(messages: list[Message], message: str) -> None:
    with pytest.raises(ChatError) as refused:
        ENCODER.encode_chat(messages)

    assert str(refused.value).startswith(message)


@pytest.mark.parametrize(
    "messages", [[user("a"), user("b")], [assistant("a"), user("b")], [user("a"), system("b")], [system("a")]]
)
def test_the_template_itself_refuses_a_chat_out_of_order(messages: list[Message]) -> None:
    with pytest.raises(jinja2.exceptions.TemplateError, match="messages: "):
        ids_of_transformers(messages)


@pytest.mark.parametrize("content", [None, 4, b"text", [], IMAGE, [None], [{"type": "text"}], {"text": "a"}], ids=str)
def test_content_that_is_not_text_is_refused_by_its_place(content: object) -> None:
    with pytest.raises(ChatError) as refused:
        ENCODER.encode_chat([user("a"), assistant("b"), user(content)])

    assert str(refused.value) == f"messages[2].content: must be text, got {content!r}"


@pytest.mark.parametrize("content", ["a\ud83d", [{"type": "text", "text": "a\ud83d"}]], ids=ascii)
def test_half_a_surrogate_pair_is_refused_by_its_place(content: object) -> None:
    with pytest.raises(ChatError) as refused:
        ENCODER.encode_chat([user("a"), assistant("b"), user(content)])

    assert str(refused.value) == r"messages[2].content: must be valid Unicode, got '\ud83d' at 1"


@pytest.mark.parametrize("condition, name", [("loud", "loud"), ("synth,loud", "loud"), ("", ""), ("COT", "COT")])
def test_an_unknown_condition_is_refused(condition: str, name: str) -> None:
    with pytest.raises(ChatError, match=f"^condition: '{name}' is unknown; .*direct, cot, noisy, synth"):
        ENCODER.encode_chat([user("a")], condition=condition)
    with pytest.raises(ChatError, match=f"^condition: '{name}' is unknown"):
        wrap_prompt("a", condition)


# Tokenizers


def test_markers_are_those_of_the_vocabulary() -> None:
    assert marker_ids(TOKENIZER) == dict(
        zip(MARKERS, (IM_START, IM_END, BOX_END, DIRECT, COT, NOISY, SYNTH), strict=True)
    )
    assert ENCODER.envelope == (IM_START, IM_END)


def test_a_tokenizer_without_a_marker_is_refused() -> None:
    bare = Tokenizer(models.BPE())
    bare.add_special_tokens([marker for marker in MARKERS if marker != "<|quad_end|>"])

    with pytest.raises(ValueError, match=r"special token '<\|quad_end\|>' is not in its vocabulary"):
        ChatEncoder.of(PreTrainedTokenizerFast(tokenizer_object=bare))


def test_markers_stay_text_when_the_tokenizer_calls_them_ordinary_added_tokens() -> None:
    raw = json.loads(PLAIN.to_str())
    for added in raw["added_tokens"]:
        added["special"] = False
    ordinary = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(raw)))
    messages = [user("".join(MARKERS))]

    assert ChatEncoder.of(ordinary).encode_chat(messages) == ENCODER.encode_chat(messages)
    assert not ordinary.backend_tokenizer.get_added_tokens_decoder()[IM_END].special


def test_a_slow_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"needs a fast tokenizer.*ByT5Tokenizer"):
        ChatEncoder.of(ByT5Tokenizer())


def test_the_tokenizers_own_settings_neither_change_nor_matter() -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(nano_path())
    tokenizer.backend_tokenizer.enable_truncation(max_length=3)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    encoder = ChatEncoder.of(tokenizer)

    assert encoder.encode_chat(DIALOGUE) == ENCODER.encode_chat(DIALOGUE)
    assert not tokenizer.backend_tokenizer.encode_special_tokens
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 3
