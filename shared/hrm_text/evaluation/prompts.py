"""Each benchmark's rows as items: the instruction to put in the envelope, and what its answer is scored with."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hrm_text.evaluation.rows import Row
from hrm_text.evaluation.scoring import integer_answer, last_boxed, letters

Item = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """A multiple-choice question; `gold` counts from 0."""

    text: str
    choices: Sequence[str]
    gold: int


def gsm8k(row: Row) -> Item:
    solution = row.get("answer", str)
    gold = integer_answer(solution.rpartition("####")[2]) if "####" in solution else None
    if gold is None:
        raise row.fault("answer", "must end with '#### ' and an integer", solution)
    return {"prompt": row.get("question", str), "gold": gold}


def math(row: Row) -> Item:
    solution = row.get("solution", str)
    gold = last_boxed(solution)
    if not gold:
        raise row.fault("solution", "must have its answer in \\boxed{}", solution)
    return {"prompt": row.get("problem", str), "gold": gold}


def mmlu(row: Row) -> Question:
    row.get("subject", str)
    return _question(row, row.get("question", str), row.get("choices", list), "answer", row.get("answer", int))


def arc_challenge(row: Row) -> Question:
    choices = row.get("choices", dict)
    texts, labels, answer = choices.get("text"), choices.get("label"), row.get("answerKey", str)
    if not isinstance(texts, list) or not isinstance(labels, list) or len(texts) != len(labels):
        raise row.fault("choices", "must hold 'text' and 'label', lists of one length", choices)
    if answer not in labels:
        raise row.fault("answerKey", f"must be one of {', '.join(map(str, labels))}", answer)
    return _question(row, row.get("question", str), texts, "answerKey", labels.index(answer))


def hellaswag(row: Row) -> Question:
    context = f"{row.get('ctx_a', str)} {row.get('ctx_b', str).capitalize()}"
    text = f"{context}\nQuestion: Which is the most logical continuation?"
    return _question(row, text, row.get("endings", list), "label", _number(row, "label"))


def winogrande(row: Row) -> Question:
    options = [row.get("option1", str), row.get("option2", str)]
    return _question(row, row.get("sentence", str), options, "answer", _number(row, "answer") - 1)


def boolq(row: Row) -> Question:
    text = f"{row.get('passage', str)}\nQuestion: {row.get('question', str).capitalize()}?"
    return Question(text, ("Yes", "No"), 0 if row.get("answer", bool) else 1)


def drop(row: Row) -> Item:
    from lm_eval.tasks.drop.utils import get_answers

    row.get("answer", dict), row.get("validated_answers", dict)
    try:
        answers = [list(answer) for answer in get_answers(row.fields)]
    except (KeyError, TypeError, IndexError) as error:
        raise row.fault("answer", f"must be an answer of DROP ({error!r})", row.fields["answer"]) from None
    return {"prompt": f"{row.get('passage', str)}\nQ: {row.get('question', str)}\nA:", "answers": answers}


def _number(row: Row, name: str) -> int:
    value = row.fields.get(name)
    if not str(value).isdecimal():
        raise row.fault(name, "must be the number of a choice", value)
    return int(str(value))


def _question(row: Row, text: str, choices: Sequence[Any], name: str, gold: int) -> Question:
    if not 2 <= len(choices) <= 26 or not all(isinstance(choice, str) for choice in choices):
        raise row.fault("choices", "must be 2 to 26 texts", list(choices))
    if not 0 <= gold < len(choices):
        raise row.fault(name, f"must name one of the {len(choices)} choices", row.fields.get(name))
    return Question(text, choices, gold)


def lay_out(question: Question) -> str:
    """The question, `A. …` a line each, and `Answer:`."""
    lines = [f"{letter}. {choice.strip()}" for letter, choice in zip(letters(26), question.choices, strict=False)]
    return "\n".join([question.text.strip(), *lines, "Answer:"])


def few_shot(shots: Sequence[Question], question: Question) -> Item:
    """Worked shots and the question, blank lines between, all of it one instruction."""
    worked = [f"{lay_out(shot)} {letters(26)[shot.gold]}" for shot in shots]
    prompt = "\n\n".join([*worked, lay_out(question)])
    return {"prompt": prompt, "gold": question.gold, "choices": len(question.choices)}


QUESTIONS: dict[str, Callable[[Row], Question]] = {
    "mmlu": mmlu,
    "arc_challenge": arc_challenge,
    "hellaswag": hellaswag,
    "winogrande": winogrande,
    "boolq": boolq,
}
ITEMS: dict[str, Callable[[Row], Item]] = {"gsm8k": gsm8k, "math": math}
