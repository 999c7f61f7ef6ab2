"""Which rows of the last states SGLang's LogitsProcessor reads, by running it, and what the model computes for it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("sglang")

from sglang.srt.layers.logits_processor import LogitsMetadata, LogitsProcessor
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardMode

from hrm_sglang.prefill import rows_read

LENGTHS = (5, 1, 3)


def batch(**fields: Any) -> Any:
    """What is asked of an extend batch of three sequences."""
    plain = {
        "return_logprob": False,
        "is_prefill_only": False,
        "capture_hidden_mode": CaptureHiddenMode.NULL,
        "extend_seq_lens": torch.tensor(LENGTHS),
    }
    return SimpleNamespace(**plain | fields)


@pytest.mark.parametrize("mode", [ForwardMode.EXTEND, ForwardMode.MIXED])
def test_the_processor_reads_what_is_computed(mode: ForwardMode) -> None:
    """All else is NaN, and would come out."""
    states = torch.full((sum(LENGTHS), 4), float("nan"))
    rows = rows_read(batch())
    assert rows is not None
    states[rows] = torch.arange(12.0).view(3, 4)
    metadata = LogitsMetadata(forward_mode=mode, extend_seq_lens=torch.tensor(LENGTHS))
    pruned, *_ = LogitsProcessor._get_pruned_states(None, states, None, None, metadata)
    assert torch.equal(pruned, torch.arange(12.0).view(3, 4))


@pytest.mark.parametrize(
    "fields",
    [
        {"return_logprob": True},
        {"is_prefill_only": True},
        {"capture_hidden_mode": CaptureHiddenMode.LAST},
        {"capture_hidden_mode": CaptureHiddenMode.FULL},
        {"extend_seq_lens": None},
    ],
)
def test_all_of_them_where_more_is_asked_for(fields: dict[str, Any]) -> None:
    assert rows_read(batch(**fields)) is None
