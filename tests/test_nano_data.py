"""The demo checkpoint's data, tokenizer and packing, and the checkpoint as shipped."""

import json
import re
from collections.abc import Callable
from functools import cache
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from hrm_text.nano.evaluate import answer, exact_match, prompt_of
from hrm_text.nano.packing import Batch, Document, PackedRows, encode, fill_row, pack, prefix_mask
from hrm_text.nano.problems import (
    GROUPS,
    REASONED,
    Problem,
    draw,
    final_answer,
    held_out,
    held_out_questions,
    training_stream,
)
from hrm_text.nano.tokenizer import SPECIAL_TOKENS, train_tokenizer

CHECKPOINT = Path(__file__).parents[1] / "shared/hrm_text/checkpoints/hrm-text-nano"
STEP = re.compile(r"^[A-Z][a-z ]+: (\d+) ([-+*/]) (\d+) = (\d+)( [a-z ]+)?\.$")
COMPUTE: dict[str, Callable[[int, int], float]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
}


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))


@cache
def model() -> Any:
    from transformers import HrmTextForCausalLM

    return HrmTextForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()


def sample(seed: int, size: int) -> list[Problem]:
    return list(islice(training_stream(seed), size))


# Data


def test_a_seed_gives_the_same_problems_and_another_seed_others() -> None:
    assert sample(7, 200) == sample(7, 200)
    assert sample(7, 200) != sample(8, 200)
    assert list(islice(training_stream(7, worker=1), 200)) != sample(7, 200)


def test_training_never_shows_a_held_out_question() -> None:
    held = held_out_questions()
    problems = sample(1, 20_000)
    assert {(p.kind, p.condition) for p in problems} == set(GROUPS)
    assert held.isdisjoint(question for p in problems for question in p.questions)
    prompts = {p.turns for group in GROUPS for p in held_out(*group)}
    assert prompts.isdisjoint(p.turns for p in problems)


@pytest.mark.parametrize("group", GROUPS)
def test_held_out_items_are_many_and_distinct(group: tuple[str, str]) -> None:
    problems = held_out(*group)
    assert len({p.turns for p in problems}) == len(problems) >= 500


def test_reasoned_responses_compute_what_they_box() -> None:
    """Each step is checked by itself, and the last one is the answer."""
    for problem in sample(2, 5000):
        if problem.condition != REASONED:
            continue
        for turn in problem.turns:
            *steps, boxed = turn.response.split("\n")
            values = []
            for step in steps:
                match = STEP.match(step)
                assert match, step
                left, op, right, value = match.group(1, 2, 3, 4)
                assert COMPUTE[op](int(left), int(right)) == int(value), step
                values.append(value)
            assert boxed == f"\\boxed{{{values[-1]}}}"
            assert 1 <= len(steps) <= 4
        assert final_answer(problem.response) == problem.answer


def test_steps_use_numbers_of_the_question_or_of_earlier_steps() -> None:
    """A reasoned word problem can be followed: no number comes from nowhere."""
    for problem in held_out("word", REASONED):
        spelled = re.search(r"\b(one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve)\b", problem.prompt)
        if spelled:
            continue
        known = set(re.findall(r"\d+", problem.prompt)) | {"2"}  # half, twice
        for step in problem.response.split("\n")[:-1]:
            left, right, value = (STEP.match(step) or pytest.fail(step)).group(1, 3, 4)
            assert {left, right} <= known, problem
            known.add(value)


def test_direct_arithmetic_is_what_the_expression_says() -> None:
    rng, checked = Random(3), 0
    for _ in range(2000):
        problem = draw(rng, "arithmetic", "direct")
        shown = problem.prompt.replace("x", "*").replace("×", "*").replace("÷", "/")
        expression = re.search(r"[\d(][\d ()+*/-]*[-+*/][\d ()+*/-]*\d", shown)
        if expression:  # the others are said in words
            assert eval(expression.group()) == int(problem.answer), problem.prompt
            checked += 1
    assert checked > 1000


def test_multiple_choice_has_four_distinct_options_and_a_bare_letter() -> None:
    for problem in held_out("choice", "direct"):
        question = problem.prompt.split("\n\n")[-1]
        options = re.findall(r"^([A-D])\. (.+)$", question, re.M)
        assert [letter for letter, _ in options] == list("ABCD")
        assert len({text for _, text in options}) == 4
        assert question.endswith("\nAnswer:") and problem.response in set("ABCD")
        bounds = re.search(r"number is the (\w+)\?", question)
        if bounds:
            pick = max if bounds.group(1) in ("largest", "greatest", "biggest") else min
            right = dict(options)[problem.answer]
            assert int(right) == pick(int(text) for _, text in options)


def test_extraction_copies_from_its_own_passage() -> None:
    for problem in held_out("extraction", "direct"):
        assert problem.answer in problem.prompt.split("\n\n")[-1]


# Tokenizer


def test_special_tokens_have_the_published_ids() -> None:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(CHECKPOINT)
    assert loaded.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(14))
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (6, 11, 5)
    assert loaded("12 apples").input_ids == tokenizer().encode("12 apples").ids  # nothing is added in front
    assert loaded.decode(loaded("a , b .").input_ids) == "a , b ."
    assert loaded.chat_template is None
    assert len(loaded) <= 4096


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_round_trips(text: str) -> None:
    assert tokenizer().decode(tokenizer().encode(text).ids, skip_special_tokens=False) == text


def test_digits_are_tokens_of_their_own() -> None:
    assert [t for t in tokenizer().encode("it costs $1234").tokens if t.isdigit()] == list("1234")


def test_the_shipped_tokenizer_is_the_trained_one() -> None:
    shipped = json.loads((CHECKPOINT / "tokenizer.json").read_text())
    assert json.loads(train_tokenizer().to_str())["model"] == shipped["model"]


# Packing


def test_a_document_is_span_then_response() -> None:
    problem = next(p for p in sample(4, 2000) if p.history and p.condition == REASONED)
    document = encode(tokenizer(), problem)
    ids = document.ids
    assert [ids[start : start + 3] for start, _ in document.spans] == [[6, 13, 9]] * 2
    assert [ids[end - 1] for _, end in document.spans] == [7, 7]
    assert [ids[end - 1] for _, end in document.responses] == [11, 11]
    assert document.spans[0][1] == document.responses[0][0]
    assert document.responses[0][1] == document.spans[1][0]


def brute_force_mask(row: list[Document], length: int) -> torch.Tensor:
    mask = torch.eye(length, dtype=torch.bool)
    at = 0
    for document in row:
        for i in range(len(document.ids)):
            for j in range(len(document.ids)):
                both = any(start <= i < end and start <= j < end for start, end in document.spans)
                mask[at + i, at + j] = j <= i or both
        at += len(document.ids)
    return mask


def test_mask_targets_and_weights_equal_their_definition() -> None:
    length = 160
    pool = sorted((encode(tokenizer(), p) for p in sample(5, 40)), key=lambda d: len(d.ids))
    rows = [fill_row(pool, length) for _ in range(3)]
    batch = pack(rows, length)
    mask = prefix_mask(batch.documents, batch.spans)
    for r, row in enumerate(rows):
        assert torch.equal(mask[r, 0], brute_force_mask(row, length))
        at = 0
        for document in row:
            size = len(document.ids)
            assert batch.positions[r, at : at + size].tolist() == list(range(size))
            scored = (batch.weights[r, at : at + size] > 0).nonzero().flatten().tolist()
            assert scored == [i - 1 for start, end in document.responses for i in range(start, end)]
            assert [int(batch.targets[r, at + i]) for i in scored] == [document.ids[i + 1] for i in scored]
            at += size
        assert not batch.weights[r, at:].any()


def test_rows_are_nearly_full() -> None:
    batch: Batch = next(iter(PackedRows(tokenizer().to_str(), seed=6, rows=8, length=320)))
    assert (batch.documents >= 0).float().mean() > 0.95


# Checkpoint


def test_checkpoint_is_a_small_hrm_text_with_the_published_names(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    weights = load_file(CHECKPOINT / "model.safetensors")
    assert sum(p.stat().st_size for p in CHECKPOINT.iterdir()) <= 20e6
    assert {str(w.dtype) for w in weights.values()} == {"torch.bfloat16"}
    assert weights["model.L_module.layers.0.attn.gqkv_proj.weight"].shape == (4 * 256, 256)
    assert weights["model.H_module.layers.3.mlp.gate_up_proj.weight"].shape == (2 * 704, 256)
    assert not weights["model.z_L_init"].any()  # frozen
    config = model().config
    assert (config.H_cycles, config.L_cycles, config.num_layers_per_stack, config.head_dim) == (2, 3, 4, 64)
    assert config.prefix_lm and not config.tie_word_embeddings and config.max_position_embeddings == 1024
    assert json.loads((CHECKPOINT / "generation_config.json").read_text())["eos_token_id"] == 11
    model().save_pretrained(tmp_path)
    again = load_file(tmp_path / "model.safetensors")
    assert weights.keys() == again.keys()
    assert all(torch.equal(again[name], weights[name].float()) for name in weights)


def test_the_readme_question_is_answered() -> None:
    prompt = "Tom has 3 boxes with 4 apples each. He gives away 5 apples. How many apples are left?"
    for condition in (REASONED, "direct"):
        problem = Problem("word", condition, prompt, "", "7")
        assert final_answer(answer(model(), tokenizer(), [problem], True, 1)[0]) == "7"


@pytest.mark.parametrize("group", [("word", REASONED), ("choice", "direct")])
def test_held_out_accuracy(group: tuple[str, str]) -> None:
    problems = held_out(*group)[:40]
    assert exact_match(problems, answer(model(), tokenizer(), problems, True, 40)) >= 0.9


def test_left_padding_and_the_cache_change_nothing() -> None:
    from hrm_text.nano.evaluate import decode_spans, generate

    prompts = [prompt_of(encode(tokenizer(), p)) for p in held_out("word", "direct")[:12]]
    for prefix in (True, False):
        cached = generate(model(), [ids for ids, _ in prompts], prefix)
        assert cached == decode_spans(model(), prompts, prefix)
