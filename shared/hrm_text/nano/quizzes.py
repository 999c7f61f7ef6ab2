"""Arithmetic, four-way multiple choice and short extraction."""

import operator
from collections.abc import Callable, Sequence
from random import Random

from hrm_text.nano import words
from hrm_text.nano.facts import CATEGORIES, FACTS
from hrm_text.nano.scenes import word_problem
from hrm_text.nano.stories import LIMIT, Story, Unsuitable
from hrm_text.nano.words import invented, person

OPERATORS: dict[str, Callable[[int, int], int]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv,
}  # fmt: skip


def small_sum(rng: Random) -> tuple[int, str, int]:
    """One operation that a pupil does in the head: left, operator, right."""
    op = rng.choice("++--*/")
    if op == "+":
        top = rng.choice((9, 50, 99, 450))
        return rng.randint(0, top), op, rng.randint(0, top)
    if op == "-":
        left = rng.randint(1, rng.choice((20, 99, LIMIT)))
        return left, op, rng.randint(0, left)
    a, b = rng.randint(2, rng.choice((12, 12, 99))), rng.randint(2, 9)
    return (a, op, b) if op == "*" else (a * b, op, b)


def arithmetic(rng: Random) -> Story:
    """Plain expressions of one or two operations; a two-digit product is worked in tens and ones."""
    s = Story()
    a, op, b = small_sum(rng)
    if rng.random() < 0.6:
        if op == "*" and a > 12:
            tens, ones = s.step("Tens", a // 10 * 10, "*", b), s.step("Ones", a % 10, "*", b)
            s.step("Together", tens, "+", ones)
        else:
            s.step("Answer", a, op, b)
        expression = f"{a} {op} {b}"
        spoken = {"+": "plus", "-": "minus", "*": "times", "/": "divided by"}[op]
        name = {"+": "sum", "-": "difference", "*": "product", "/": "quotient"}[op]
        said = rng.choice(
            (
                f"How much is {a} {spoken} {b}?",
                f"What is {a} {spoken} {b}?",
                f"{a} {spoken} {b}",
                f"What is the {name} of {a} and {b}?",
                f"Find the {name} of {a} and {b}.",
            )
        )
    else:
        c, last = rng.randint(1, 99), rng.choice("+-")
        if op in "+-" and rng.random() < 0.3:
            c = rng.randint(2, 9)
            s.step("First", a, op, b)
            s.step("Answer", s.total, "*", c)
            expression = f"({a} {op} {b}) * {c}"
        elif rng.random() < 0.3 and op in "*/":
            s.step("First", a, op, b)
            s.step("Answer", c, last, s.total)
            expression = f"{c} {last} {a} {op} {b}"
        else:
            s.step("First", a, op, b)
            s.step("Answer", s.total, last, c)
            expression = f"{a} {op} {b} {last} {c}"
        said = f"What is the value of {expression}?"
    times, over = rng.choice(("*", "*", "x", "×")), rng.choice(("/", "/", "÷"))
    shown = expression.replace("*", times).replace("/", over)
    if rng.random() < 0.15:
        shown = shown.replace(" ", "")
    written = (
        "What is {}?",
        "Calculate {}.",
        "{} =",
        "{} = ?",
        "Compute {}.",
        "{}",
        "Work out {}.",
        "How much is {}?",
    )
    s.question = rng.choice(written).format(shown) if rng.random() < 0.75 else said
    return s


def near(rng: Random, value: int) -> list[int]:
    """Three wrong numbers close to `value`."""
    wrong: set[int] = set()
    while len(wrong) < 3:
        other = value + rng.choice((-20, -10, -5, -4, -3, -2, -1, 1, 2, 3, 4, 5, 10, 20))
        if other >= 0 and other != value:
            wrong.add(other)
    return sorted(wrong)


Choice = tuple[str, str, Sequence[str]]  # question, right option, three wrong options


def number_choice(rng: Random) -> Choice:
    """Comparison, parity, multiples, neighbours and sequences."""
    form, top = rng.random(), rng.choice((20, 100, 100, LIMIT))
    if form < 0.35:
        numbers = rng.sample(range(top), 4)
        largest = rng.random() < 0.5
        word = rng.choice(("largest", "greatest", "biggest") if largest else ("smallest", "least"))
        right = max(numbers) if largest else min(numbers)
        question = rng.choice((f"Which number is the {word}?", f"Which of these numbers is the {word}?"))
        return question, str(right), [str(n) for n in numbers if n != right]
    if form < 0.5:
        even = rng.randint(0, 1)
        pick = [n * 2 + 1 - even for n in rng.sample(range(top // 2), 3)]
        name = "even" if even else "odd"
        right = rng.randrange(top // 2) * 2 + (1 - even)
        return (
            f"Which number is {name}?",
            str(right),
            [str(n + (1 if even else -1)) if n else "1" for n in pick],
        )
    if form < 0.62:
        n = rng.randint(1, top - 5)
        after = rng.random() < 0.5
        question = rng.choice((f"Which number comes right {{}} {n}?", f"What number comes just {{}} {n}?"))
        right = n + (1 if after else -1)
        return question.format("after" if after else "before"), str(right), [str(w) for w in near(rng, right)]
    if form < 0.75:
        bar, over = rng.randint(5, top - 5), rng.random() < 0.5
        low, high = rng.sample(range(bar), min(3, bar)), rng.sample(range(bar + 1, bar + 60), 3)
        right = high[0] if over else low[0]
        wrong = low[:3] if over else high
        return (
            f"Which number is {'greater' if over else 'less'} than {bar}?",
            str(right),
            [str(w) for w in wrong],
        )
    start, by = rng.randint(1, 40), rng.randint(1, 12)
    sequence = [start + by * i for i in range(5)]
    if rng.random() < 0.3:
        sequence.reverse()
    shown = ", ".join(map(str, sequence[:4]))
    return f"Which number comes next: {shown}?", str(sequence[4]), [str(w) for w in near(rng, sequence[4])]


def category_choice(rng: Random) -> Choice:
    """Which of these is, or is not, a member."""
    name = rng.choice(list(CATEGORIES))
    members = CATEGORIES[name]
    outside = [word for other, group in CATEGORIES.items() if other != name for word in group if word not in members]
    # Lists overlap where the world does: a bird is an animal, an orange has its colour.
    if name == "an animal":
        outside = [word for word in outside if word not in CATEGORIES["a bird"]]
    if name in ("a color", "a colour"):
        outside.remove("orange")
    form = rng.random()
    if form < 0.6:
        question = rng.choice((f"Which of these is {name}?", f"Which one is {name}?", f"Which word names {name}?"))
        return question, rng.choice(members), rng.sample(sorted(set(outside)), 3)
    if form < 0.8:
        return f"Which of these is not {name}?", rng.choice(outside), rng.sample(members, 3)
    word = rng.choice(members)
    if name in ("a bird", "an animal", "a color", "a colour"):
        others = [c for c in CATEGORIES if c not in ("a bird", "an animal", "a color", "a colour")]
    else:
        others = [c for c in CATEGORIES if c != name and word not in CATEGORIES[c] and c != "a color"]
    return (
        rng.choice((f"What kind of thing is {word}?", f"{word.capitalize()} is")),
        name,
        rng.sample(others, 3),
    )


def fact_choice(rng: Random) -> Choice:
    """Opposites, capitals, young animals, small counts, days and months."""
    if rng.random() < 0.35:
        cycle, what = rng.choice(((words.DAYS, "day"), (words.MONTHS, "month")))
        i, after = rng.randrange(len(cycle)), rng.random() < 0.5
        right = cycle[(i + (1 if after else -1)) % len(cycle)]
        wrong = rng.sample([c for c in cycle if c not in (right, cycle[i])], 3)
        return f"Which {what} comes {'after' if after else 'before'} {cycle[i]}?", right, wrong
    template, pairs = rng.choice(FACTS)
    asked, right = rng.choice(pairs)
    if right.isdigit():
        return template.format(asked), right, [str(w) for w in near(rng, int(right))]
    if "opposite" in template and rng.random() < 0.5:
        asked, right = right, asked
    pool = {side for pair in pairs for side in (pair if "opposite" in template else pair[1:])} - {
        asked,
        right,
    }
    return template.format(asked), right, rng.sample(sorted(pool), 3)


def computed_choice(rng: Random) -> Choice:
    """A small sum or a one- or two-step story, with close distractors."""
    if rng.random() < 0.55:
        a, op, b = small_sum(rng)
        value = OPERATORS[op](a, b)
        question = rng.choice(("What is {}?", "{} =", "How much is {}?", "Calculate {}.")).format(f"{a} {op} {b}")
        return question, str(value), [str(w) for w in near(rng, value)]
    while True:
        story = word_problem(rng, 1, 2)
        if max(int(n) for n in "".join(c if c.isdigit() else " " for c in " ".join(story.steps)).split()) <= 100:
            return story.text, str(story.total), [str(w) for w in near(rng, story.total)]


def multiple_choice(rng: Random) -> tuple[str, str]:
    """Question, four lettered options, `Answer:`; and the right letter."""
    make = rng.choice((number_choice, category_choice, fact_choice, computed_choice))
    while True:
        question, right, wrong = make(rng)
        options = [right, *wrong]
        if len(set(options)) == 4:
            break
    rng.shuffle(options)
    lines = [f"{letter}. {option}" for letter, option in zip("ABCD", options, strict=True)]
    return "\n".join([question, *lines, "Answer:"]), "ABCD"[options.index(right)]


def extraction(rng: Random) -> tuple[str, str]:
    """A short passage about one or two people, and a question whose answer is copied from it."""
    first, second = person(rng), person(rng)
    if first.name == second.name:
        raise Unsuitable
    asked: list[tuple[str, str, str]] = []
    sentences: list[str] = []
    for who in (first, second)[: rng.randint(1, 2)]:
        fields = rng.sample(range(len(TRAITS)), rng.randint(2, 4))
        for place, field in enumerate(fields):
            value, sentence, question, label = TRAITS[field](rng)
            sentences.append(sentence.format(n=who.name if place == 0 or rng.random() < 0.4 else who.He, v=value))
            asked.append((question.format(n=who.name), f"{who.name}'s {label}", value))
    question, label, value = rng.choice(asked)
    question, label = words.tidy(question), words.tidy(f"of {label}").removeprefix("of ")
    passage = words.tidy(" ".join(sentences))
    form = rng.random()
    if form < 0.6:
        return f"Passage: {passage}\nQuestion: {question}\nAnswer:", value
    if form < 0.8:
        return f"{passage}\n{question}", value
    return f"Text: {passage}\nExtract {label}.", value


Trait = tuple[str, str, str, str]  # value, sentence with {n} and {v}, question with {n}, label


def _pick(rng: Random, known: Sequence[str]) -> str:
    return invented(rng).capitalize() if rng.random() < 0.3 else rng.choice(known)


def _place(rng: Random) -> Trait:
    city = _pick(rng, words.CITIES)
    return city, rng.choice(("{n} lives in {v}.", "{n} moved to {v}.")), "Where does {n} live?", "city"


def _dog(rng: Random) -> Trait:
    return _pick(rng, words.BOYS), "{n} has a dog named {v}.", "What is the name of {n}'s dog?", "dog name"


def _birthday(rng: Random) -> Trait:
    day = f"{rng.choice(words.MONTHS)} {rng.randint(1, 28)}"
    return day, "{n} was born on {v}.", "When was {n} born?", "birthday"


def _phone(rng: Random) -> Trait:
    number = f"{rng.randint(200, 999)}-{rng.randint(1000, 9999)}"
    return number, "{n} can be reached at {v}.", "What is {n}'s phone number?", "phone number"


TRAITS: tuple[Callable[[Random], Trait], ...] = (
    _place,
    lambda r: (r.choice(words.JOBS), "{n} works as a {v}.", "What is {n}'s job?", "job"),
    lambda r: (str(r.randint(5, 90)), "{n} is {v} years old.", "How old is {n}?", "age"),
    lambda r: (r.choice(words.COLOURS), "{n} drives a {v} car.", "What colour is {n}'s car?", "car colour"),
    lambda r: (r.choice(words.HOBBIES), "{n} likes {v}.", "What does {n} like?", "hobby"),
    _dog,
    lambda r: (r.choice(words.FOODS), "{n} eats a {v} every day.", "What does {n} eat every day?", "food"),
    _birthday,
    _phone,
    lambda r: (f"${r.randint(5, 900)}", "{n} paid {v} for a ticket.", "How much did {n} pay?", "price"),
)
