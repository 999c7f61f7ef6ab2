"""Cutting a batch into virtual sequences, without an engine."""

import pytest
import torch

pytest.importorskip("sglang")

from hrm_sglang.attention import computed_again, cut_rows


def test_a_causal_batch_is_left_alone() -> None:
    assert cut_rows([(), ((0, 5),)], [0, 5], [10, 3]) is None


def test_pieces_follow_the_definition_of_the_mask() -> None:
    """What the sequences of a batch let each token see is what the mask says."""
    from hrm_text.oracle import span_mask

    rows, prefixes, extends = [((2, 6), (6, 9)), (), ((0, 4),)], [0, 3, 2], [12, 1, 5]
    cut = cut_rows(rows, prefixes, extends)
    assert cut is not None
    assert [sequence.first for sequence in cut[1:]] == [sequence.last for sequence in cut[:-1]]
    starts = [0, 12, 13]
    for sequence in cut:
        allowed = span_mask(rows[sequence.row], prefixes[sequence.row] + extends[sequence.row])
        for token in range(sequence.first, sequence.last):
            position = prefixes[sequence.row] + token - starts[sequence.row]
            seen = torch.zeros_like(allowed[0])
            seen[: sequence.kv_end if sequence.bidirectional else position + 1] = True
            assert torch.equal(seen, allowed[position])
    again, tokens = computed_again(cut)
    assert all(not sequence.bidirectional for sequence in again)
    assert tokens.tolist() == [0, 1, 9, 10, 11, 15, 16, 17]
