"""PrefixLM attention for SGLang's backends: a batch cut at span bounds into virtual sequences.

A virtual sequence is a slice of the query with the same row of the token table, ending where its piece
ends. A backend writes the step's keys and values before attention runs, so a non-causal virtual sequence
sees exactly its span and what lies before it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from hrm_sglang.spans import spans_of_rows
from hrm_text.spans import Piece, Spans, pieces


class VirtualSequence(NamedTuple):
    """One virtual sequence.

    Attributes:
        row: the batch row it is cut from.
        first, last: its query tokens [first, last) in the flattened batch.
        prefix: KV tokens before its own.
        bidirectional: whether its tokens see each other in both directions.
    """

    row: int
    first: int
    last: int
    prefix: int
    bidirectional: bool

    @property
    def kv_end(self) -> int:
        """KV tokens that its last token sees."""
        return self.prefix + self.last - self.first


def cut_rows(
    rows: Sequence[Spans], prefix_lens: Sequence[int], extend_lens: Sequence[int]
) -> list[VirtualSequence] | None:
    """Cut an extend batch at span bounds; None when no piece of it is bidirectional."""
    result: list[VirtualSequence] = []
    first = 0
    for row, (spans, prefix, extend) in enumerate(zip(rows, prefix_lens, extend_lens, strict=True)):
        for piece in pieces(spans, prefix, prefix + extend) if spans else [Piece(prefix, prefix + extend, False)]:
            offset = first - prefix
            result.append(
                VirtualSequence(row, piece.start + offset, piece.end + offset, piece.start, piece.bidirectional)
            )
        first += extend
    return result if any(sequence.bidirectional for sequence in result) else None


def cut_batch(forward_batch: Any) -> list[VirtualSequence] | None:
    """Virtual sequences of a ForwardBatch; None where the stock backend is exact (SGLang 0.5.23).

    Attributes set on a ForwardBatch do not reach the backend; `rids` does.
    """
    mode = forward_batch.forward_mode
    if not mode.is_extend_without_speculative():
        return None
    return cut_rows(
        spans_of_rows(forward_batch.rids or ()),
        forward_batch.extend_prefix_lens_cpu,
        forward_batch.extend_seq_lens_cpu,
    )


def computed_again(cut: Sequence[VirtualSequence]) -> tuple[list[VirtualSequence], torch.Tensor]:
    """What a causal kernel call computes after a non-causal one over every piece of `cut`, and which tokens.

    A lone token sees the same in either.
    """
    again = [sequence for sequence in cut if not sequence.bidirectional and sequence.last - sequence.first > 1]
    tokens = [torch.arange(sequence.first, sequence.last) for sequence in again]
    return again, torch.cat(tokens) if tokens else torch.empty(0, dtype=torch.int64)
