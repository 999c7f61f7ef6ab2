"""Spans, chunks, pieces and block keys, against the mask's own definition."""

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise, product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm_text.spans import (
    LOGPROBS_OPTION,
    MAX_SPANS,
    SPANS_OPTION,
    Envelope,
    SpanError,
    SpanRule,
    Spans,
    attention_allowed,
    block_keys,
    check_scoring,
    chunk_end,
    envelope_spans,
    flatten,
    lacks_envelope,
    merged_options,
    parse_spans,
    pieces,
    request_spans,
    scored_inside,
    span_digest,
)

START, END, X = 6, 7, 42
ENVELOPE = Envelope(START, END)
RULE = SpanRule(ENVELOPE)


@st.composite
def layouts(draw: st.DrawFn, shortest: int = 1) -> tuple[Spans, int]:
    """Spans of `shortest` tokens or more, and the length of a sequence that holds them."""
    spans = []
    position = 0
    for gap, size in draw(st.lists(st.tuples(st.integers(0, 4), st.integers(shortest, 8)), max_size=5)):
        spans.append((position + gap, position + gap + size))
        position += gap + size
    return tuple(spans), position + draw(st.integers(0 if position else 1, 6))


def cuts(spans: Spans, position: int) -> bool:
    """Whether an end at `position` has tokens of one span on both sides."""
    return any(start < position < end for start, end in spans)


# The rules of request_spans


def options(*flat: int) -> dict[str, Any]:
    return {SPANS_OPTION: list(flat), "other": 1}


TURN = [START, X, X, END]


@pytest.mark.parametrize(
    "ids, explicit, expected",
    [
        pytest.param([*TURN, X], options(1, 3), ((1, 3),), id="explicit beats envelope"),
        pytest.param([*TURN, X], options(), (), id="empty is all causal"),
        pytest.param([*TURN, X], options(0, 2, 2, 5), ((0, 2), (2, 5)), id="neighbours stay apart"),
        pytest.param([*TURN, X], options(0, 1, 2, 4), ((2, 4),), id="one token is causal"),
        pytest.param([*TURN, X], {SPANS_OPTION: None}, ((0, 4),), id="null is not given"),
        pytest.param([*TURN, X], {}, ((0, 4),), id="envelope"),
        pytest.param([*TURN, X, X, *TURN], None, ((0, 4), (6, 10)), id="envelope, multi-turn"),
        pytest.param([X, *TURN, START, X], None, ((1, 5),), id="unclosed start opens nothing"),
        pytest.param([START, X, *TURN], None, ((2, 6),), id="a second start begins anew"),
        pytest.param([X, END, *TURN, X, END], None, ((2, 6),), id="stray ends close nothing"),
        pytest.param([START, END], None, ((0, 2),), id="empty envelope"),
        pytest.param([X, X, X], None, ((0, 3),), id="no markers: the whole prompt"),
        pytest.param([END, X, START], None, ((0, 3),), id="no pair: the whole prompt"),
        pytest.param([START, X, X], None, ((0, 3),), id="unclosed only: the whole prompt"),
        pytest.param([X], None, (), id="a prompt of one token"),
    ],
)
def test_request_spans(ids: list[int], explicit: dict[str, Any] | None, expected: Spans) -> None:
    assert request_spans(ids, explicit, RULE) == expected


def test_without_a_tokenizer_markers_mean_nothing() -> None:
    assert request_spans([*TURN, X], None, SpanRule(envelope=None)) == ((0, 5),)


@pytest.mark.parametrize("explicit", [None, options()])
def test_a_checkpoint_without_prefix_lm_is_causal(explicit: dict[str, Any] | None) -> None:
    assert request_spans([*TURN, X], explicit, SpanRule(ENVELOPE, prefix_lm=False)) == ()


def test_a_checkpoint_without_prefix_lm_refuses_spans() -> None:
    with pytest.raises(SpanError, match=r"prefix_lm_spans: .*prefix_lm=false.*only an empty list") as refused:
        request_spans([*TURN, X], options(0, 4), SpanRule(ENVELOPE, prefix_lm=False))

    assert (refused.value.field, refused.value.value) == (SPANS_OPTION, [0, 4])


def test_options_may_stand_among_a_requests_own_fields() -> None:
    fields = {"model": "x", SPANS_OPTION: [0, 4], LOGPROBS_OPTION: None}
    assert merged_options(fields, None) == {SPANS_OPTION: [0, 4]}
    assert merged_options(fields, {"other": 1, SPANS_OPTION: [0, 4]}) == {"other": 1, SPANS_OPTION: [0, 4]}
    assert merged_options({"prefix_lm_typo": 1}, {}) == {"prefix_lm_typo": 1}, "to be refused with the others"
    with pytest.raises(SpanError, match=r"prefix_lm_spans: is \[0, 4\] in the request and \[\] in its options"):
        merged_options(fields, {SPANS_OPTION: []})


@given(st.lists(st.sampled_from([START, END, X]), max_size=20))
def test_an_envelope_runs_from_the_last_start_to_the_first_end(ids: list[int]) -> None:
    text = "".join({START: "(", END: ")", X: "."}[token] for token in ids)

    assert envelope_spans(ids, ENVELOPE) == tuple(match.span() for match in re.finditer(r"\([^()]*\)", text))


@given(layouts())
def test_explicit_spans_say_what_they_flatten_to(layout: tuple[Spans, int]) -> None:
    spans, length = layout
    flat = flatten(spans)

    assert parse_spans(flat, length) == spans
    assert parse_spans([float(bound) for bound in flat], length) == spans
    resolved = request_spans([START] * length, {SPANS_OPTION: flat}, RULE)
    assert resolved == tuple(span for span in spans if span[1] - span[0] > 1)
    for i, j in product(range(length), repeat=2):
        assert attention_allowed(resolved, i, j) == attention_allowed(spans, i, j)


# Faults


@pytest.mark.parametrize(
    "flat, value, message",
    [
        ("0, 4", "0, 4", "a flat list of integers [start, end, ...], got '0, 4'"),
        (b"\0\4", b"\0\4", "a flat list of integers"),
        (4, 4, "a flat list of integers [start, end, ...], got 4"),
        ({"start": 0}, {"start": 0}, "a flat list of integers"),
        ([[0, 4]], [0, 4], "integers only, got [0, 4]"),
        ([0, "4"], "4", "integers only, got '4'"),
        ([0, 2.5], 2.5, "integers only, got 2.5"),
        ([0, float("inf")], float("inf"), "integers only, got inf"),
        ([False, 4], False, "integers only, got False"),
        ([0, None], None, "integers only, got None"),
        ([0, 4, 5], 3, "pairs [start, end, ...], got 3 numbers"),
        ([0, 1] * (MAX_SPANS + 1), MAX_SPANS + 1, f"holds {MAX_SPANS + 1} spans; the limit is {MAX_SPANS}"),
        ([2, 2], [2, 2], "span [2, 2) is empty"),
        ([0, 4, 11, 11], [11, 11], "span [11, 11) is empty"),
        ([-1, 4], [-1, 4], "span [-1, 4) is out of range: it needs 0 <= start < end <= 10"),
        ([0, 11], [0, 11], "span [0, 11) is out of range: it needs 0 <= start < end <= 10"),
        ([0, 2, 6, 4], [6, 4], "span [6, 4) is out of range: it needs 0 <= start < end <= 10"),
        ([6, 8, 0, 2], [0, 2], "span [0, 2) starts before 8"),
        ([0, 4, 3, 6], [3, 6], "span [3, 6) starts before 4"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_fault_is_named_with_its_field_value_and_limit(flat: object, value: object, message: str) -> None:
    with pytest.raises(SpanError) as refused:
        parse_spans(flat, 10)

    assert refused.value.field == SPANS_OPTION
    assert refused.value.value == value
    assert str(refused.value).startswith(f"{SPANS_OPTION}: ")
    assert message in str(refused.value)


def test_as_many_spans_as_the_limit_are_valid() -> None:
    spans = tuple((2 * i, 2 * i + 2) for i in range(MAX_SPANS))

    assert parse_spans(flatten(spans), 2 * MAX_SPANS) == spans


@given(st.lists(st.integers(-2, 9), max_size=6), st.integers(0, 8))
def test_a_list_of_integers_is_valid_iff_it_is_sorted_pairs_in_range(flat: list[int], prompt_len: int) -> None:
    pairs = [(flat[i], flat[i + 1]) for i in range(0, len(flat) - 1, 2)]
    valid = (
        len(flat) % 2 == 0
        and flat == sorted(flat)
        and all(start < end for start, end in pairs)
        and all(0 <= bound <= prompt_len for bound in flat)
    )
    if valid:
        assert parse_spans(flat, prompt_len) == tuple(pairs)
    else:
        with pytest.raises(SpanError):
            parse_spans(flat, prompt_len)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
)


@given(JSON)
def test_any_json_is_spans_or_a_span_error(value: Any) -> None:
    try:
        spans = parse_spans(value, 5)
    except SpanError as fault:
        assert fault.field == SPANS_OPTION
        return
    assert flatten(spans) == value
    assert all(0 <= start < end <= 5 for start, end in spans)


# Chunks


@settings(max_examples=300)
@given(layouts(), st.data())
def test_a_chunk_ends_at_the_last_place_that_cuts_no_span(layout: tuple[Spans, int], data: st.DataObject) -> None:
    spans, length = layout
    start = data.draw(st.integers(0, length))
    end = data.draw(st.integers(start, length))
    candidates = [e for e in range(start, end + 1) if e == start or not cuts(spans, e)]

    assert chunk_end(spans, start, end) == candidates[-1]


@pytest.mark.parametrize(
    "start, end, expected",
    [
        pytest.param(0, 3, 3, id="up to a span"),
        pytest.param(0, 4, 3, id="a span does not fit"),
        pytest.param(0, 7, 7, id="a whole span"),
        pytest.param(3, 6, 3, id="waits at a span's start"),
        pytest.param(5, 6, 5, id="waits inside a span, after a cache hit"),
        pytest.param(5, 7, 7, id="the rest of a span"),
        pytest.param(3, 9, 7, id="a span fits, its neighbour does not"),
        pytest.param(0, 20, 20, id="behind all spans"),
        pytest.param(5, 5, 5, id="nothing asked"),
    ],
)
def test_chunk_end_by_example(start: int, end: int, expected: int) -> None:
    assert chunk_end(((3, 7), (7, 12)), start, end) == expected


def chunks(spans: Spans, length: int, begin: int, budgets: Iterator[int]) -> list[tuple[int, int]]:
    """A whole prefill from `begin`, as a scheduler does it with one token budget a step."""
    result = []
    start = begin
    while start < length:
        budget = next(budgets)
        end = chunk_end(spans, start, min(start + budget, length))
        assert start < end <= start + budget
        assert not cuts(spans, end)
        result.append((start, end))
        start = end
    return result


@settings(max_examples=300)
@given(layouts(), st.data())
def test_a_prefill_in_chunks_sees_what_the_mask_allows(layout: tuple[Spans, int], data: st.DataObject) -> None:
    """Whatever the budgets, as long as each holds the longest span, and wherever a cache hit ends."""
    spans, length = layout
    longest = max((end - start for start, end in spans), default=1)
    budgets = data.draw(st.lists(st.integers(longest, longest + 12), min_size=length, max_size=length))
    begin = data.draw(st.integers(0, length))

    served = [
        piece for start, end in chunks(spans, length, begin, iter(budgets)) for piece in pieces(spans, start, end)
    ]

    assert [i for piece in served for i in range(piece.start, piece.end)] == list(range(begin, length))
    for piece in served:
        for i, j in product(range(piece.start, piece.end), range(length)):
            seen = j < piece.end if piece.bidirectional else j <= i
            assert seen == attention_allowed(spans, i, j)


# Pieces


@settings(max_examples=300)
@given(layouts(), st.data())
def test_pieces_cover_a_chunk_in_as_few_runs_as_can_be(layout: tuple[Spans, int], data: st.DataObject) -> None:
    spans, length = layout
    start = data.draw(st.integers(0, length))
    end = chunk_end(spans, start, data.draw(st.integers(start, length)))
    if cuts(spans, end):  # The chunk waits where a cache hit ended.
        assert start == end
        return

    result = pieces(spans, start, end)

    assert [i for piece in result for i in range(piece.start, piece.end)] == list(range(start, end))
    assert all(piece.start < piece.end for piece in result)
    assert all(left.bidirectional or right.bidirectional for left, right in pairwise(result))
    assert all(piece.end - piece.start > 1 for piece in result if piece.bidirectional)


@given(layouts(shortest=2), st.data())
def test_a_chunk_that_cuts_a_span_has_no_pieces(layout: tuple[Spans, int], data: st.DataObject) -> None:
    spans, length = layout
    inside = [position for position in range(length) if cuts(spans, position)]
    if not inside:
        return
    end = data.draw(st.sampled_from(inside))

    with pytest.raises(ValueError, match=rf", {end}\) end inside the span"):
        pieces(spans, data.draw(st.integers(0, end - 1)), end)


def test_pieces_by_example() -> None:
    spans = ((2, 5), (5, 8), (9, 10))

    assert pieces(spans, 0, 12) == [(0, 2, False), (2, 5, True), (5, 8, True), (8, 12, False)]
    assert pieces(spans, 3, 8) == [(3, 5, True), (5, 8, True)]
    assert pieces(spans, 4, 5) == [(4, 5, False)]
    assert pieces(spans, 2, 2) == []


# The mask and what is scored under it


@given(layouts())
def test_a_token_is_scored_inside_a_span_iff_its_predictor_sees_it(layout: tuple[Spans, int]) -> None:
    spans, length = layout

    assert not scored_inside(spans, 0)
    for position in range(1, length + 1):
        assert scored_inside(spans, position) == attention_allowed(spans, position - 1, position)


@pytest.mark.parametrize(
    ("scored", "holes", "fault"),
    [
        (range(1, 20), True, None),  # 10 to 19 are left
        (range(1, 11), True, None),
        (range(1, 10), True, 1),
        (range(9, 10), True, 9),
        (range(10, 10), True, None),
        (range(1, 20), False, 1),
        (range(9, 20), False, 9),
        (range(10, 20), False, None),
    ],
)
def test_scoring_is_refused_when_nothing_would_come_back(scored: range, holes: bool, fault: int | None) -> None:
    if fault is None:
        check_scoring(((0, 10),), scored, "prompt_logprobs", holes)
        return
    with pytest.raises(SpanError, match=rf"prompt_logprobs: .*position {fault} lies inside .* \[0, 10\)"):
        check_scoring(((0, 10),), scored, "prompt_logprobs", holes)


@pytest.mark.parametrize(
    ("ids", "options", "rule", "lacks"),
    [
        ([20, 21], {}, RULE, True),
        ([6, 20, 7, 21], {}, RULE, False),
        ([20, 21], {SPANS_OPTION: []}, RULE, False),
        ([20, 21], {}, SpanRule(ENVELOPE, prefix_lm=False), False),
        ([20, 21], {}, SpanRule(None), False),
    ],
)
def test_an_envelope_is_missed_where_it_would_count(
    ids: list[int], options: dict[str, Any], rule: SpanRule, lacks: bool
) -> None:
    assert lacks_envelope(ids, options, rule) is lacks


def test_the_mask_by_example() -> None:
    rows = ["".join(".x"[attention_allowed(((1, 3), (3, 5)), i, j)] for j in range(6)) for i in range(6)]

    assert rows == ["x.....", "xxx...", "xxx...", "xxxxx.", "xxxxx.", "xxxxxx"]


# Block keys


def all_spans(length: int, start: int = 0) -> Iterator[Spans]:
    """Every set of spans of two tokens or more within [start, length)."""
    yield ()
    for s in range(start, length):
        for e in range(s + 2, length + 1):
            for rest in all_spans(length, e):
                yield ((s, e), *rest)


def dependencies(spans: Spans, length: int) -> list[frozenset[int]]:
    """Positions whose tokens reach the KV of each position, through any number of layers."""
    direct = [{j for j in range(length) if attention_allowed(spans, i, j)} for i in range(length)]
    reached = direct
    for _ in range(length):
        reached = [set().union(*(direct[j] for j in seen)) for seen in reached]
    return [frozenset(seen) for seen in reached]


def cache_key(ids: Sequence[int], spans: Spans, end: int, size: int) -> object:
    """What a prefix cache knows of the blocks up to `end`: their tokens and extra keys."""
    digests = [span_digest(ids, span) for span in spans]
    blocks = range(0, end, size)
    return tuple(ids[:end]), tuple(tuple(block_keys(spans, digests, b, b + size)) for b in blocks)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_blocks_share_a_key_iff_their_kv_is_the_same_function_of_the_same_tokens(size: int) -> None:
    """For every prompt of up to seven tokens of a binary alphabet, with every set of spans."""
    meaning: dict[object, object] = {}
    prompts = 0
    for length in range(size, 8):
        for spans in all_spans(length):
            reached = dependencies(spans, length)
            for ids in product((0, 1), repeat=length):
                prompts += 1
                for end in range(size, length + 1, size):
                    # The KV of [0, end): for each position the tokens that reach it, and the mask among them.
                    needed = sorted(frozenset().union(*reached[:end]))
                    depends = (
                        tuple(reached[:end]),
                        tuple((j, ids[j]) for j in needed),
                        tuple((i, j) for i in needed for j in needed if attention_allowed(spans, i, j)),
                    )
                    assert meaning.setdefault((end, cache_key(ids, spans, end, size)), depends) == depends
    assert prompts >= 2**6 * 2**7
    assert len(set(meaning.values())) == len(meaning)


@settings(max_examples=300)
@given(layouts(shortest=2), st.data())
def test_a_block_is_keyed_by_the_spans_that_overlap_it(layout: tuple[Spans, int], data: st.DataObject) -> None:
    spans, length = layout
    ids = data.draw(st.lists(st.integers(0, 1), min_size=length, max_size=length))
    start = data.draw(st.integers(0, length - 1))
    end = data.draw(st.integers(start + 1, length))
    block = set(range(start, end))

    def keys(ids: Sequence[int], spans: Spans) -> list[tuple[int, int, bytes]]:
        return block_keys(spans, [span_digest(ids, span) for span in spans], start, end)

    for index, (s, e) in enumerate(spans):
        without = spans[:index] + spans[index + 1 :]
        shorter = (*spans[:index], (s, e - 1), *spans[index + 1 :])
        changed = [*ids[: e - 1], 1 - ids[e - 1], *ids[e:]]
        if block & set(range(s, e)):
            assert keys(ids, without) != keys(ids, spans)
            assert keys(ids, shorter) != keys(ids, spans)
            assert keys(changed, spans) != keys(ids, spans)
        else:
            assert keys(ids, without) == keys(ids, shorter) == keys(changed, spans) == keys(ids, spans)


def test_a_digest_is_of_the_spans_tokens_only() -> None:
    assert span_digest([1, 2, 3, 4], (1, 3)) == span_digest([9, 9, 2, 3], (2, 4))
    assert span_digest([1, 2, 3, 4], (1, 3)) != span_digest([1, 3, 2, 4], (1, 3))
    assert span_digest([1, 258], (0, 2)) != span_digest([257, 2], (0, 2))
    assert len(span_digest([1, 2], (0, 2))) == 32
