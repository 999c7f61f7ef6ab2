"""The PrefixLM mask: which prompt tokens see each other in both directions.

Token i attends to token j iff j <= i, or i and j lie in the same span. A span is one instruction
segment, half-open in prompt positions; everything else, every generated token included, is causal.
`request_spans` is the one function that gives the spans of a request, in every process of every engine.
"""

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

Span = tuple[int, int]
Spans = tuple[Span, ...]

PREFIX = "prefix_lm"
SPANS_OPTION = f"{PREFIX}_spans"
LOGPROBS_OPTION = f"{PREFIX}_span_logprobs"
MAX_SPANS = 256
NO_ENVELOPE = (
    "A prompt came without HRM-Text's envelope (<|im_start|>, condition, text, <|im_end|>); it is taken "
    "whole as one bidirectional span. The model was trained with the envelope: use /v1/chat/completions, "
    "or wrap the text (hrm_text.envelope.wrap_prompt). This is logged once."
)


class SpanError(ValueError):
    """A fault in a request's span options; the message names the field, the value and the limit."""

    def __init__(self, message: str, *, field: str = SPANS_OPTION, value: object = None) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.value = value


class Envelope(NamedTuple):
    """Token ids of `<|im_start|>` and `<|im_end|>`."""

    start: int
    end: int


class Piece(NamedTuple):
    """A run of query tokens [start, end) that one attention call can serve as a sequence of length `end`."""

    start: int
    end: int
    bidirectional: bool


@dataclass(frozen=True)
class SpanRule:
    """What the spans of a checkpoint's requests depend on, beside the request itself.

    Attributes:
        envelope: ids of the envelope's markers, or None when the tokenizer is not known.
        prefix_lm: the checkpoint's `prefix_lm`; False makes every request causal.
    """

    envelope: Envelope | None
    prefix_lm: bool = True


def request_spans(prompt_ids: Sequence[int], options: Mapping[str, Any] | None, rule: SpanRule) -> Spans:
    """Spans of a request, from its prompt ids and its options.

    1. `options["prefix_lm_spans"]`, a flat list [s0, e0, s1, e1, ...]; empty means all causal;
    2. else every `<|im_start|>` ... `<|im_end|>` pair, both tokens included;
    3. else the whole prompt (transformers with `token_type_ids` all ones).

    Spans of one token are valid and dropped: they mean the same as causal.

    Raises:
        SpanError: the explicit list is not a valid one for this prompt.
    """
    flat = (options or {}).get(SPANS_OPTION)
    if flat is not None:
        spans = parse_spans(flat, len(prompt_ids))
        if spans and not rule.prefix_lm:
            raise SpanError("this checkpoint has prefix_lm=false, so only an empty list is valid", value=list(flat))
    elif not rule.prefix_lm:
        spans = ()
    else:
        spans = envelope_spans(prompt_ids, rule.envelope) or ((0, len(prompt_ids)),)
    return tuple(span for span in spans if span[1] - span[0] > 1)


def merged_options(fields: Mapping[str, Any], options: Mapping[str, Any] | None) -> dict[str, Any]:
    """`options` of a request with those of our prefix among its body's own `fields`.

    That is where OpenAI's client puts what is not OpenAI's (`extra_body`), and where engines ignore what they do not
    know: a request would be served with other spans than it names.

    Raises:
        SpanError: an option is in both places, with different values.
    """
    merged = dict(options or {})
    for key, value in fields.items():
        if not key.startswith(PREFIX) or value is None:
            continue
        if merged.setdefault(key, value) != value:
            raise SpanError(f"is {value!r} in the request and {merged[key]!r} in its options", field=key, value=value)
    return merged


def logprobs_option(options: Mapping[str, Any]) -> bool:
    """`prefix_lm_span_logprobs` of a request's options.

    Raises:
        SpanError: it is not a boolean, or another option of our prefix is a misspelt one.
    """
    for key in options:
        if key.startswith(PREFIX) and key not in (SPANS_OPTION, LOGPROBS_OPTION):
            raise SpanError(f"is unknown; there are {SPANS_OPTION} and {LOGPROBS_OPTION}", field=key, value=key)
    value = options.get(LOGPROBS_OPTION, False)
    if value in (True, False):
        return bool(value)
    raise SpanError(f"must be true or false, got {value!r}", field=LOGPROBS_OPTION, value=value)


def parse_spans(flat: object, prompt_len: int) -> Spans:
    """Validate a flat list of half-open spans against a prompt of `prompt_len` tokens.

    Raises:
        SpanError: not a list of integers, an odd length, more than MAX_SPANS spans, or a span that is
            empty, out of range, unsorted or overlapping.
    """
    if isinstance(flat, str | bytes) or not isinstance(flat, Sequence):
        raise SpanError(f"must be a flat list of integers [start, end, ...], got {flat!r}", value=flat)
    # OpenAI clients send JSON numbers, and vLLM's schema may turn them into floats.
    numbers = [int(x) if isinstance(x, float) and x.is_integer() else x for x in flat]
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int):
            raise SpanError(f"must hold integers only, got {number!r}", value=number)
    if len(numbers) % 2:
        raise SpanError(f"must hold pairs [start, end, ...], got {len(numbers)} numbers", value=len(numbers))
    if len(numbers) > 2 * MAX_SPANS:
        raise SpanError(f"holds {len(numbers) // 2} spans; the limit is {MAX_SPANS}", value=len(numbers) // 2)
    spans = tuple(zip(numbers[::2], numbers[1::2], strict=True))
    previous_end = 0
    for start, end in spans:
        if start == end:
            raise SpanError(f"span [{start}, {end}) is empty", value=[start, end])
        if start < 0 or end > prompt_len or start > end:
            raise SpanError(
                f"span [{start}, {end}) is out of range: it needs 0 <= start < end <= {prompt_len}, "
                "the number of prompt tokens",
                value=[start, end],
            )
        if start < previous_end:
            raise SpanError(
                f"span [{start}, {end}) starts before {previous_end}, the end of the one before it: "
                "spans must be sorted and must not overlap",
                value=[start, end],
            )
        previous_end = end
    return spans


def lacks_envelope(prompt_ids: Sequence[int], options: Mapping[str, Any], rule: SpanRule) -> bool:
    """Whether the prompt fell to rule 3 although its tokenizer knows the envelope."""
    by_rule = rule.prefix_lm and options.get(SPANS_OPTION) is None
    return by_rule and rule.envelope is not None and not envelope_spans(prompt_ids, rule.envelope)


def envelope_spans(ids: Sequence[int], envelope: Envelope | None) -> Spans:
    """Every `<|im_start|>` ... `<|im_end|>` pair of `ids`; an unclosed start opens nothing."""
    if envelope is None:
        return ()
    spans: list[Span] = []
    opened: int | None = None
    for position, token in enumerate(ids):
        if token == envelope.start:
            opened = position
        elif token == envelope.end and opened is not None:
            spans.append((opened, position + 1))
            opened = None
    return tuple(spans)


def flatten(spans: Spans) -> list[int]:
    """The explicit form of `spans`, as `prefix_lm_spans` takes it."""
    return [bound for span in spans for bound in span]


def chunk_end(spans: Spans, start: int, end: int) -> int:
    """Largest aligned end <= `end` of a prefill chunk that begins at `start`.

    A span is computed in one step, so a chunk never ends inside one. `start` is returned when the
    chunk cannot even finish the span it begins in or before: it has to wait for a larger budget.
    """
    for span_start, span_end in spans:
        if span_start < end < span_end:
            return max(span_start, start)
    return end


def pieces(spans: Spans, start: int, end: int) -> list[Piece]:
    """Split the query tokens [start, end) of a request at span bounds.

    Each piece attends to the KV positions [0, piece.end), causally or in both directions, so it is a
    sequence of its own for an attention kernel. A span's lone token sees what a causal one sees, and
    is counted causal; neighbouring causal pieces are one.

    Raises:
        ValueError: `end` cuts a span in two, which no exact schedule does.
    """
    result: list[Piece] = []
    position = start
    for span_start, span_end in spans:
        if span_end <= position:
            continue
        if span_start >= end:
            break
        if span_start > position:
            _append_causal(result, position, span_start)
            position = span_start
        if span_end > end:
            raise ValueError(f"query tokens [{start}, {end}) end inside the span [{span_start}, {span_end})")
        if span_end - position > 1:
            result.append(Piece(position, span_end, True))
        else:
            _append_causal(result, position, span_end)
        position = span_end
    if position < end:
        _append_causal(result, position, end)
    return result


def _append_causal(result: list[Piece], start: int, end: int) -> None:
    if result and not result[-1].bidirectional:
        result[-1] = Piece(result[-1].start, end, False)
    else:
        result.append(Piece(start, end, False))


def span_digest(ids: Sequence[int], span: Span) -> bytes:
    """SHA-256 of a span's token ids."""
    return hashlib.sha256(array("q", ids[span[0] : span[1]]).tobytes()).digest()


def block_keys(spans: Spans, digests: Sequence[bytes], start: int, end: int) -> list[tuple[int, int, bytes]]:
    """What the KV of cache block [start, end) depends on beyond the tokens up to its end.

    The KV of a token inside a span depends on the whole span, so a block that overlaps one is keyed
    by the span's bounds relative to the block and the digest of its tokens.
    """
    return [
        (span_start - start, span_end - start, digest)
        for (span_start, span_end), digest in zip(spans, digests, strict=True)
        if span_start < end and start < span_end
    ]


def scored_inside(spans: Spans, position: int) -> bool:
    """Whether the token at `position` was visible to the position that predicts it.

    Its log-prob is read at `position - 1`; inside a span that position already sees the token.
    """
    return any(start < position < end for start, end in spans)


def check_scoring(spans: Spans, scored: range, field: str, holes: bool = True) -> None:
    """Refuse a request for log-probs of prompt tokens that would get none.

    Tokens inside a span come back empty where the engine's answer can have holes, and it is enough that
    one token does not.

    Args:
        spans: of the request.
        scored: positions of the tokens to score.
        field: the request's field that asks for it.
        holes: whether entries of the answer can be empty.

    Raises:
        SpanError: every scored token lies inside a span; without holes, one of them.
    """
    hidden = [position for position in scored if scored_inside(spans, position)]
    if not hidden or (holes and len(hidden) < len(scored)):
        return
    start, end = next(span for span in spans if span[0] < hidden[0] < span[1])
    raise SpanError(
        f"the scored token at position {hidden[0]} lies inside the bidirectional span [{start}, {end}), where the "
        f"model already sees it. Close the span before the tokens to score ({SPANS_OPTION}), or set "
        f"{LOGPROBS_OPTION}=true to get the numbers anyway",
        field=field,
        value=hidden[0],
    )


def attention_allowed(spans: Spans, i: int, j: int) -> bool:
    """The mask's definition: may token i attend to token j?"""
    return j <= i or any(start <= i < end and start <= j < end for start, end in spans)
