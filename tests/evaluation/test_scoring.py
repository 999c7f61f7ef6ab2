"""Scores: every gold answer of the shared rows earns its point, and a spoilt one does not."""

from pathlib import Path

import pytest

from hrm_text.evaluation import prompts
from hrm_text.evaluation.rows import local_rows
from hrm_text.evaluation.scoring import choice_score, integer_answer, last_boxed, letters, math_correct


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        (r"so \boxed{7}", "7"),
        (r"\boxed{1} and \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{ 3 }", "3"),
        (r"\fbox{4}", "4"),
        (r"\fbox{4} \boxed{5}", "5"),
        (r"cut off \boxed{12", None),
        (r"\boxed 5", None),
        ("no box", None),
        ("", None),
    ],
)
def test_last_boxed(text: str, boxed: str | None) -> None:
    assert last_boxed(text) == boxed


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (r"\boxed{18}", 18),
        (r"first \boxed{3}, then \boxed{\$1,234}".replace(r"\$", "$"), 1234),
        ("$70,000", 70000),
        (" 18.0 ", 18),
        ("-5", -5),
        ("The answer is 18", None),  # without a box the whole text must be the number
        (r"\boxed{}", None),
        ("", None),
        ("1e999", None),
        ("nan", None),
    ],
)
def test_integer_answer(text: str, number: int | None) -> None:
    assert integer_answer(text) == number


def test_choice_score() -> None:
    assert choice_score("B", 1, 4) == (1.0, True)
    assert choice_score(" b\n", 1, 4) == (1.0, True)
    assert choice_score("A", 1, 4) == (0.0, True)
    for outside in ("E", "", "AB", "the"):
        assert choice_score(outside, 1, 4) == (0.25, False)
    assert choice_score("C", 0, 2) == (0.5, False)


def test_math_verify_needs_delimiters() -> None:
    # The reason for the $ in math_correct: without them this gold answer is not even itself.
    from math_verify import parse, verify

    assert not verify(parse(r"\sqrt{51}"), parse(r"\sqrt{51}"))
    assert math_correct(r"\sqrt{51}", r"\boxed{\sqrt{51}}")
    assert math_correct(r"\frac{1}{2}", r"It is \boxed{0.5}.")
    assert math_correct("3", "The answer is $3$.")
    assert not math_correct("3", "")


def test_gold_gsm8k_answers_score_and_spoilt_ones_do_not(data: Path) -> None:
    rows = local_rows(data, ["gsm8k_test.jsonl"])
    assert len(rows) == 1319
    for row in rows:
        gold = prompts.gsm8k(row)["gold"]
        assert integer_answer(f"{row.fields['answer']} \\boxed{{{gold:,}}}") == gold
        assert integer_answer(f"${gold:,}") == gold
        assert integer_answer(f"\\boxed{{{gold}}} no, \\boxed{{{gold + 1}}}") == gold + 1


def test_gold_math_solutions_score_and_spoilt_ones_do_not(data: Path) -> None:
    rows = local_rows(data, ["math500_test.jsonl"])
    assert len(rows) == 500
    for row in rows:
        gold = prompts.math(row)["gold"]
        assert gold == row.fields["answer"]
        assert math_correct(gold, row.fields["solution"]), row.place
        assert not math_correct(gold, r"\boxed{987654321987}"), row.place
        assert not math_correct(gold, ""), row.place


def test_gold_mmlu_letters_score_and_others_do_not(data: Path) -> None:
    rows = local_rows(data, ["mmlu_dev.jsonl"]) + local_rows(data, ["mmlu_test_1in10.jsonl"])
    assert len(rows) == 285 + 1405
    for row in rows:
        question = prompts.mmlu(row)
        scores = [choice_score(letter, question.gold, 4)[0] for letter in letters(4)]
        assert scores == [float(index == row.fields["answer"]) for index in range(4)]
