"""The demo checkpoint's tasks: one seeded stream of problems, and a held-out set it never contains.

Kinds: `word` (2-4 step stories), `arithmetic`, `choice` (four-way multiple choice), `extraction` and
`dialogue` (two turns). `word` and `arithmetic` come in both conditions; the rest is `direct`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from random import Random

from hrm_text.nano.quizzes import arithmetic, extraction, multiple_choice
from hrm_text.nano.scenes import word_problem
from hrm_text.nano.stories import LIMIT, Story, Unsuitable
from hrm_text.nano.words import spell_small_numbers

DIRECT, REASONED = "direct", "synth,cot"
HELD_OUT_SIZE = 600  # items per kind and condition
GROUPS: tuple[tuple[str, str], ...] = (
    ("word", REASONED),
    ("word", DIRECT),
    ("arithmetic", REASONED),
    ("arithmetic", DIRECT),
    ("choice", DIRECT),
    ("extraction", DIRECT),
    ("dialogue", DIRECT),
    ("dialogue", REASONED),
)
WEIGHTS = (28, 12, 6, 10, 30, 8, 3, 3)  # shares of the training stream, in the order of GROUPS


@dataclass(frozen=True)
class Turn:
    """One instruction and its response, both plain text."""

    prompt: str
    response: str


@dataclass(frozen=True)
class Problem:
    """The last instruction, its response and bare answer, and what came before.

    `questions` are all the questions the item shows, worked shots and earlier turns included: the held-out
    split is made on them, so a held-out question is not seen inside a training shot either.
    """

    kind: str
    condition: str
    prompt: str
    response: str
    answer: str
    history: tuple[Turn, ...] = ()
    questions: tuple[str, ...] = ()

    @property
    def turns(self) -> tuple[Turn, ...]:
        return (*self.history, Turn(self.prompt, self.response))


def final_answer(response: str) -> str:
    r"""What a response answers: the last `\boxed{}` if there is one, else the whole text."""
    start = response.rfind("\\boxed{")
    if start < 0:
        return response.strip()
    return response[start + len("\\boxed{") :].split("}", 1)[0].strip()


def respond(story: Story, condition: str) -> str:
    """Bare number, or the steps one a line and the number boxed."""
    if condition == DIRECT:
        return str(story.total)
    return "\n".join([*story.steps, f"\\boxed{{{story.total}}}"])


def from_story(rng: Random, kind: str, condition: str, story: Story) -> Problem:
    question = story.text
    if kind == "word":
        if rng.random() < 0.08:
            question = spell_small_numbers(question)
        question = rng.choice(("Question: {}", "{}\nAnswer:") if rng.random() < 0.06 else ("{}",)).format(question)
    return Problem(kind, condition, question, respond(story, condition), str(story.total), (), (question,))


def with_shots(rng: Random, kind: str) -> Problem:
    """Multiple choice or extraction, a third of it behind 1-3 worked shots in the same instruction."""
    make = multiple_choice if kind == "choice" else extraction
    count = rng.randint(1, 3) if rng.random() < 0.33 else 0
    *shots, (question, answer) = [make(rng) for _ in range(count + 1)]
    if shots and kind == "extraction":
        joined = [f"{q} {a}" if q.endswith(":") else f"{q}\n{a}" for q, a in shots]
    else:
        joined = [f"{q} {a}" for q, a in shots]
    questions = (*(q for q, _ in shots), question)
    return Problem(kind, DIRECT, "\n\n".join([*joined, question]), answer, answer, (), questions)


FOLLOW_UPS = {
    "+": ("Add {k} to that.", "Now add {k}.", "And {k} more?", "What if you add {k}?"),
    "-": ("Subtract {k} from that.", "Now take away {k}.", "And {k} less?", "What if you subtract {k}?"),
    "*": ("Multiply that by {k}.", "Now multiply it by {k}.", "And {k} times that?"),
}


def dialogue(rng: Random, condition: str) -> Problem:
    """Two turns: a problem, then either a change to its answer or an unrelated problem."""
    first = base(rng, rng.choice(("word", "arithmetic")), condition)
    if rng.random() < 0.65:
        story, op = Story(), rng.choice("++--*")
        start, k = int(first.answer), rng.randint(2, 9 if op == "*" else 60)
        if op == "*" and start * k > LIMIT:
            raise Unsuitable
        story.question = rng.choice(FOLLOW_UPS[op]).format(k=k)
        story.step("Answer", start, op, k)
        second = from_story(rng, "arithmetic", condition, story)
        questions = first.questions  # the follow-up means nothing without the first question
    else:
        second = base(rng, rng.choice(("word", "arithmetic")), condition)
        questions = first.questions + second.questions
    turn = Turn(first.prompt, first.response)
    return Problem("dialogue", condition, second.prompt, second.response, second.answer, (turn,), questions)


def base(rng: Random, kind: str, condition: str, fewest_steps: int = 2) -> Problem:
    if kind == "word":
        return from_story(rng, kind, condition, word_problem(rng, fewest_steps))
    if kind == "arithmetic":
        return from_story(rng, kind, condition, arithmetic(rng))
    return dialogue(rng, condition) if kind == "dialogue" else with_shots(rng, kind)


def draw(rng: Random, kind: str, condition: str, fewest_steps: int = 2) -> Problem:
    """One problem; draws again where the numbers made no sense."""
    while True:
        try:
            return base(rng, kind, condition, fewest_steps)
        except Unsuitable:
            continue


@cache
def held_out(kind: str, condition: str, size: int = HELD_OUT_SIZE) -> tuple[Problem, ...]:
    """The evaluation items of one group: distinct prompts from a seed of their own."""
    rng = Random(f"held-out/{kind}/{condition}")
    found: dict[tuple[Turn, ...], Problem] = {}
    while len(found) < size:
        problem = draw(rng, kind, condition)
        found.setdefault(problem.turns, problem)
    return tuple(found.values())


@cache
def held_out_questions() -> frozenset[str]:
    """Every question that a held-out item shows, its shots and earlier turns included."""
    return frozenset(question for group in GROUPS for item in held_out(*group) for question in item.questions)


def training_stream(seed: int, worker: int = 0) -> Iterator[Problem]:
    """Endless problems of one worker, none of which shows a held-out question."""
    rng, excluded = Random(f"train/{seed}/{worker}"), held_out_questions()
    while True:
        kind, condition = rng.choices(GROUPS, WEIGHTS)[0]
        # One story in twelve has a single step: easier than anything held out, but people ask such things.
        problem = draw(rng, kind, condition, fewest_steps=1 if rng.random() < 0.25 else 2)
        if excluded.isdisjoint(problem.questions):
            yield problem
