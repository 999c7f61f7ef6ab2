"""The oracle against transformers' own PrefixLM: its masks from token_type_ids, its cache, its generate."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

from hrm_text.oracle import load_reference, reference_logprobs, span_mask, token_logprobs
from hrm_text.spans import Spans, attention_allowed

TOLERANCE = 1e-5
IDS = [6, 8, 97, 104, 111, 32, 200, 57, 131, 19, 7, 250, 88, 143, 61, 30]
PROMPT = 11


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item()


@torch.inference_mode()
def logprobs_of(model: Any, ids: list[int], **inputs: Any) -> torch.Tensor:
    """Log-probs of transformers' own forward, which builds its own mask."""
    logits = model(input_ids=torch.tensor([ids]), **inputs).logits[0]
    return torch.log_softmax(logits.float(), dim=-1)


def prefix_types(prefix: int, length: int) -> torch.Tensor:
    return torch.tensor([[1] * prefix + [0] * (length - prefix)])


def test_one_span_over_all_is_token_type_ids_of_ones(reference: Any) -> None:
    close(
        reference_logprobs(reference, IDS, ((0, len(IDS)),)),
        logprobs_of(reference, IDS, token_type_ids=torch.ones(1, len(IDS), dtype=torch.long)),
    )


@pytest.mark.parametrize("prefix", [2, PROMPT, len(IDS) - 1])
def test_a_span_over_the_prompt_is_token_type_ids_of_the_prompt(reference: Any, prefix: int) -> None:
    close(
        reference_logprobs(reference, IDS, ((0, prefix),)),
        logprobs_of(reference, IDS, token_type_ids=prefix_types(prefix, len(IDS))),
    )


def test_no_span_is_no_token_type_ids(reference: Any) -> None:
    close(reference_logprobs(reference, IDS, ()), logprobs_of(reference, IDS))


def test_other_attention_of_transformers_agrees(tiny: str, reference: Any) -> None:
    from transformers import HrmTextForCausalLM

    sdpa = HrmTextForCausalLM.from_pretrained(tiny, dtype=torch.float32, attn_implementation="sdpa").eval()

    close(
        reference_logprobs(reference, IDS, ((0, PROMPT),)),
        logprobs_of(sdpa, IDS, token_type_ids=prefix_types(PROMPT, len(IDS))),
    )


def test_cached_decode_of_transformers_is_the_oracle_on_the_whole(reference: Any) -> None:
    cache = DynamicCache(config=reference.config)
    prompt = IDS[:PROMPT]
    rows = [logprobs_of(reference, prompt, token_type_ids=prefix_types(PROMPT, PROMPT), past_key_values=cache)]
    for token in IDS[PROMPT:]:
        rows.append(logprobs_of(reference, [token], past_key_values=cache))

    assert cache.get_seq_length() == len(IDS)
    close(reference_logprobs(reference, IDS, ((0, PROMPT),)), torch.cat(rows))


def test_generate_of_transformers_is_the_oracle_on_the_whole(reference: Any) -> None:
    out = reference.generate(
        torch.tensor([IDS[:PROMPT]]),
        attention_mask=torch.ones(1, PROMPT, dtype=torch.long),
        token_type_ids=prefix_types(PROMPT, PROMPT),
        do_sample=False,
        max_new_tokens=8,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
    )
    ids = out.sequences[0].tolist()
    theirs = torch.log_softmax(torch.cat(out.logits).float(), dim=-1)

    assert len(ids) == PROMPT + 8
    ours = reference_logprobs(reference, ids, ((0, PROMPT),))
    close(ours[PROMPT - 1 : -1], theirs)
    assert ours[PROMPT - 1 : -1].argmax(-1).tolist() == ids[PROMPT:]


def test_two_turns_keep_the_first_ones_log_probs(reference: Any) -> None:
    """A later span changes nothing before it, and itself sees all before it."""
    spans = ((0, 5), (8, 12))
    whole = reference_logprobs(reference, IDS, spans)

    close(whole[:8], reference_logprobs(reference, IDS[:8], ((0, 5),)))
    other_first_token = reference_logprobs(reference, [IDS[0] + 1, *IDS[1:]], spans)
    assert distance(whole[8], other_first_token[8]) > 1e-2


@pytest.mark.parametrize("spans", [((1, 9),), ((0, 8),), ((0, 10),), ((2, 9),), ((0, 9), (9, 11)), ()], ids=str)
def test_a_bound_off_by_one_shows(reference: Any, spans: Spans) -> None:
    exact = token_logprobs(reference, IDS, ((0, 9),))

    assert distance(token_logprobs(reference, IDS, spans), exact) > 100 * TOLERANCE


def test_token_logprobs_are_the_rows_entries(reference: Any) -> None:
    rows = reference_logprobs(reference, IDS, ((0, PROMPT),))

    assert rows.shape == (len(IDS), reference.config.vocab_size)
    assert rows.dtype == torch.float32
    close(rows.exp().sum(-1), torch.ones(len(IDS)))
    assert token_logprobs(reference, IDS, ((0, PROMPT),)).tolist() == [rows[i, IDS[i + 1]] for i in range(len(IDS) - 1)]


@given(st.lists(st.integers(0, 14), max_size=8, unique=True).map(sorted), st.integers(1, 12))
def test_span_mask_is_the_masks_definition(bounds: list[int], length: int) -> None:
    """Also for spans that end behind the tokens at hand."""
    spans = tuple(zip(bounds[::2], bounds[1::2], strict=False))

    expected = [[attention_allowed(spans, i, j) for j in range(length)] for i in range(length)]
    assert span_mask(spans, length).tolist() == expected


def test_the_reference_is_eager_and_in_evaluation_mode(tiny: str) -> None:
    model = load_reference(tiny, dtype=torch.bfloat16)

    assert model.config._attn_implementation == "eager"
    assert not model.training
    assert model.dtype == torch.bfloat16
