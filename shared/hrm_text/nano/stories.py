"""GSM8K-style word problems of one to four steps, composed from small parts.

A story is its text (facts, then a question), the worked steps (each a label and one `a op b = c`), and the
answer. Labels are few and fixed: the free part of a reasoned answer is the numbers.
"""

from dataclasses import dataclass, field
from random import Random

from hrm_text.nano import words
from hrm_text.nano.words import DAYS, PEOPLE, Noun, container, noun, person

LIMIT = 999  # no quantity in a story exceeds this


class Unsuitable(Exception):
    """The drawn numbers make no sensible story; draw again."""


@dataclass
class Story:
    """A word problem under construction; `total` is the running quantity."""

    facts: list[str] = field(default_factory=list)
    question: str = ""
    steps: list[str] = field(default_factory=list)
    total: int = 0

    def step(self, label: str, left: int, op: str, right: int, unit: str = "") -> int:
        """Appends `label: left op right = value unit.` and returns the value, a whole number >= 0."""
        value = apply(op, left, right)
        self.steps.append(f"{label}: {left} {op} {right} = {value}{' ' + unit if unit else ''}.")
        self.total = value
        return value

    @property
    def text(self) -> str:
        return words.tidy(" ".join([*self.facts, self.question]))


def apply(op: str, left: int, right: int) -> int:
    """Exact integer arithmetic inside the generator's range."""
    if op == "/":
        if right == 0 or left % right:
            raise Unsuitable
        value = left // right
    else:
        value = {"+": left + right, "-": left - right, "*": left * right}[op]
    # A product has one factor below 13, as in school.
    if not 0 <= value <= LIMIT or (op == "*" and min(left, right) > 12):
        raise Unsuitable
    return value


def size(rng: Random) -> int:
    """A quantity: mostly small, sometimes up to 120."""
    return rng.randint(2, rng.choice((12, 30, 60, 120)))


def ledger(rng: Random) -> Story:
    """Somebody's things: a start, events that change the count, and a question about what is left."""
    story, who, what, box = Story(), person(rng), noun(rng), container(rng)
    ledger_start(rng, story, who, what, box)
    for _ in range(rng.randint(0, 3)):
        ledger_event(rng, story, who, what, box)
    first, second = [*story.facts, ""][:2]
    same = first.rsplit(". ", 1)[-1].startswith(who.name) and second.startswith(f"{who.He} ")
    if same and rng.random() < 0.3:
        story.facts[:2] = [f"{first[:-1]} and {second.removeprefix(who.He + ' ')}"]
    ledger_end(rng, story, who, what)
    return story


def ledger_start(rng: Random, s: Story, who: words.Person, what: Noun, box: Noun) -> None:
    name, he = who.name, who.He
    form = rng.random()
    if form < 0.35:
        s.total = size(rng)
        n = what.count(s.total)
        s.facts.append(
            rng.choice((f"{name} has {n}.", f"{name} had {n}.", f"{name} buys {n}.", f"{name} starts with {n}."))
        )
    elif form < 0.75:
        groups, each = rng.randint(2, 12), rng.randint(2, rng.choice((10, 10, 25)))
        g, e = box.count(groups), what.count(each)
        s.facts.append(
            rng.choice(
                (
                    f"{name} has {g} with {e} each.",
                    f"{name} has {g} with {e} in each {box.one}.",
                    f"{name} has {g} of {what.many}. Each {box.one} has {e}.",
                    f"{name} buys {g} of {what.many}. Each {box.one} holds {e}.",
                    f"{name} bought {g} of {e} each.",
                    f"{name} has {g}. Each {box.one} contains {e}.",
                    f"There are {e} in each {box.one}. {name} has {g}.",
                    f"{name} fills {g} with {e} each.",
                    f"{name} puts {e} into each of {g}.",
                    f"{name} has {g}, each with {e}.",
                    f"{name} has {g} containing {e} each.",
                    f"{name} has {g} with {e} per {box.one}.",
                )
            )
        )
        s.step("At first", groups, "*", each, what.many)
    else:
        a, b = size(rng), size(rng)
        other = rng.choice(PEOPLE)
        red, blue = rng.sample(words.COLOURS, 2)
        s.facts.append(
            rng.choice(
                (
                    f"{name} has {a} {red} {what.many} and {b} {blue} {what.many}.",
                    f"{name} gets {what.count(a)} from {who.his} {other} and {b} more from a shop.",
                    f"{name} collects {what.count(a)} in the morning and {b} in the afternoon.",
                    f"{name} finds {what.count(a)} on {rng.choice(DAYS)}. The next day {who.he} finds {b} more.",
                    f"{name} has {what.count(a)} at home and {b} at school.",
                    f"{name} buys {what.count(a)}. {he} already had {b}.",
                )
            )
        )
        s.step("At first", a, "+", b, what.many)


def ledger_event(rng: Random, s: Story, who: words.Person, what: Noun, box: Noun) -> None:
    he = rng.choice((who.He, who.He, who.name))
    then = rng.choice(("", "", "", "Then ", "Later ", "After that, ", "The next day "))
    subject = f"{then}{he if not then or he == who.name else who.he}"
    other, friend = rng.choice(PEOPLE), person(rng).name
    form = rng.random()
    if form < 0.3:
        gain(rng, s, subject, who, what, rng.randint(1, rng.choice((9, 20, 50))), (friend, other))
    elif form < 0.65:
        lose(rng, s, subject, who, what, (friend, other))
    elif form < 0.78:
        gain_groups(rng, s, subject, what, box)
    elif form < 0.9:
        lose_groups(rng, s, subject, who, what)
    else:
        gone = rng.choice(
            (
                f"gives half of them to {friend}",
                f"gives away half of the {what.many}",
                f"sells half of {who.his} {what.many}",
            )
        )
        s.facts.append(f"{subject} {gone}.")
        s.step("Then", s.total, "/", 2, what.many)


def gain(rng: Random, s: Story, subject: str, who: words.Person, what: Noun, k: int, givers: tuple[str, str]) -> None:
    n = rng.choice((f"{k} more", what.count(k), f"{k} more {what.many}"))
    verb = rng.choice(("buys", "gets", "finds", "receives", "collects", "bought", "adds"))
    giver = rng.choice((givers[0], f"{who.his.capitalize()} {givers[1]}"))
    s.facts.append(rng.choice((f"{subject} {verb} {n}.", f"{giver} gives {who.him} {n}.")))
    s.step("Then", s.total, "+", k, what.many)


def lose(rng: Random, s: Story, subject: str, who: words.Person, what: Noun, takers: tuple[str, str]) -> None:
    k = rng.randint(1, max(1, min(s.total, rng.choice((9, 20, 50)))))
    n = rng.choice((f"{k}", what.count(k), f"{k} of them", f"{k} of the {what.many}"))
    verbs = "gives away/loses/sells/uses/gave away/throws away/lost/sold/donates".split("/")
    verbs += ["eats", "ate", "eats"] if what.food else ["breaks"]
    to = rng.choice((takers[0], f"{who.his} {takers[1]}", "a friend"))
    s.facts.append(rng.choice((f"{subject} {rng.choice(verbs)} {n}.", f"{subject} gives {n} to {to}.")))
    s.step("Then", s.total, "-", k, what.many)


def gain_groups(rng: Random, s: Story, subject: str, what: Noun, box: Noun) -> None:
    groups, each, start = rng.randint(2, 8), rng.randint(2, 12), s.total
    s.facts.append(
        rng.choice(
            (
                f"{subject} buys {groups} more {box.many} with {what.count(each)} each.",
                f"{subject} gets {groups} {box.many} of {each} {what.many}.",
                f"{subject} finds {box.count(groups)} with {each} more {what.many} in each.",
            )
        )
    )
    s.step("New", groups, "*", each, what.many)
    s.step("Then", start, "+", groups * each, what.many)


def lose_groups(rng: Random, s: Story, subject: str, who: words.Person, what: Noun) -> None:
    groups, each, start = rng.randint(2, 8), rng.randint(1, 6), s.total
    s.facts.append(
        rng.choice(
            (
                f"{subject} gives {each} to each of {who.his} {groups} friends.",
                f"{subject} gives {groups} friends {what.count(each)} each.",
                f"{subject} gives away {what.count(each)} a day for {groups} days.",
            )
        )
    )
    s.step("Given", groups, "*", each, what.many)
    s.step("Then", start, "-", groups * each, what.many)


def ledger_end(rng: Random, s: Story, who: words.Person, what: Noun) -> None:
    if not s.steps or s.total == 0:
        raise Unsuitable
    form, name, last = rng.random(), rng.choice((who.name, who.he)), s.steps[-1]
    if form < 0.68:
        options = [
            f"How many {what.many} does {name} have?",
            f"How many {what.many} does {name} have now?",
            f"How many {what.many} does {name} have in the end?",
            f"How many does {name} have now?",
            f"How many {what.many} are there now?",
        ]
        if " - " in last or " / " in last:
            options = [
                f"How many {what.many} are left?",
                f"How many {what.many} does {name} have left?",
                f"How many {what.many} remain?",
                *options,
            ]
        elif last.startswith("At first"):
            options = [
                f"How many {what.many} does {name} have in total?",
                f"How many {what.many} are there altogether?",
                f"How many {what.many} is that?",
                *options,
            ]
        s.question = rng.choice(options)
    elif form < 0.86:
        friends = rng.choice([d for d in range(2, 13) if s.total % d == 0] or [0])
        rest = rng.choice(("the rest", "them", f"the {what.many}", f"all the {what.many}"))
        s.facts.append(
            rng.choice(
                (
                    f"{who.He} shares {rest} equally among {friends} friends.",
                    f"{who.He} divides {rest} equally between {friends} children.",
                    f"{who.He} puts {rest} equally into {friends} bags.",
                )
            )
        )
        kind = "bag" if "bags" in s.facts[-1] else "child" if "children" in s.facts[-1] else "friend"
        verb = rng.choice(("get", "receive")) if kind != "bag" else "have"
        many = f"How many {what.many}"
        s.question = f"{many} are in each bag?" if kind == "bag" else f"{many} does each {kind} {verb}?"
        s.step("Each", s.total, "/", friends, what.many)
    else:
        price = rng.randint(2, 9)
        s.facts.append(rng.choice((f"{who.He} sells the rest for ${price} each.", f"Each one is sold for ${price}.")))
        s.question = rng.choice((f"How much money does {name} make?", f"How many dollars does {name} get?"))
        s.step("Money", s.total, "*", price, "dollars")
