"""Word problems about money: shopping, wages, savings."""

from random import Random

from hrm_text.nano.stories import Story, Unsuitable
from hrm_text.nano.words import DAYS, noun, person


def shopping(rng: Random) -> Story:
    """Prices times counts, then the sum or the change."""
    s, who = Story(), person(rng)
    x, y = noun(rng), noun(rng)
    if x.one == y.one:
        raise Unsuitable
    p, q, n, m = rng.randint(2, 15), rng.randint(2, 15), rng.randint(2, 9), rng.randint(2, 9)
    two = rng.random() < 0.6
    prices = rng.choice((f"A {x.one} costs ${p}", f"One {x.one} costs {p} dollars", f"Each {x.one} costs ${p}"))
    buys = rng.choice(("buys", "bought", "wants to buy"))
    if two:
        s.facts += [
            f"{prices} and {rng.choice(('a', 'one', 'each'))} {y.one} costs ${q}.",
            f"{who.name} {buys} {x.count(n)} and {y.count(m)}.",
        ]
    else:
        s.facts += rng.choice(
            (
                [f"{prices}.", f"{who.name} {buys} {x.count(n)}."],
                [f"{who.name} {buys} {x.count(n)} for ${p} each."],
                [f"{who.name} {buys} {x.count(n)} that cost ${p} each."],
            )
        )
    cost = s.step("Cost", n, "*", p, "dollars")
    if two:
        other = s.step("Other", m, "*", q, "dollars")
        cost = s.step("Together", cost, "+", other, "dollars")
    s.question = rng.choice(
        (f"How much does {who.he} pay?", f"How much money does {who.name} need?", "What is the total cost?")
    )
    if not two or rng.random() < 0.4:
        paid = next((note for note in (20, 50, 100, 200, 500) if note >= cost and rng.random() < 0.8), cost + 10)
        if rng.random() < 0.5:
            s.facts.append(f"{who.He} pays with ${paid}.")
            s.question = rng.choice((f"How much change does {who.he} get?", "How many dollars of change?"))
        else:
            s.facts.insert(0, f"{who.name} has ${paid}.")
            s.question = f"How much money does {rng.choice((who.name, who.he))} have left?"
        s.step("Left", paid, "-", cost, "dollars")
    return s


def wages(rng: Random) -> Story:
    """Pay per hour, hours per day, days; then a purchase or a saving."""
    s, who = Story(), person(rng)
    pay, hours, days = rng.randint(4, 20), rng.randint(2, 9), rng.randint(2, 7)
    earns = rng.choice(("earns", "makes", "gets"))
    s.facts.append(f"{who.name} {earns} ${pay} {rng.choice(('an hour', 'per hour', 'for each hour'))}.")
    if rng.random() < 0.6:
        s.facts.append(
            rng.choice(
                (
                    f"{who.He} works {hours} hours a day for {days} days.",
                    f"{who.He} works {hours} hours each day, {days} days a week.",
                )
            )
        )
        s.step("Hours", hours, "*", days, "hours")
    else:
        s.facts.append(f"{who.He} works {hours} hours on {DAYS[0]} and {days} hours on {rng.choice(DAYS[1:])}.")
        s.step("Hours", hours, "+", days, "hours")
    s.step("Money", s.total, "*", pay, "dollars")
    s.question = rng.choice((f"How much does {who.he} earn?", f"How much money does {who.name} make in total?"))
    if rng.random() < 0.45:
        spent = rng.randint(1, max(1, min(s.total, 90)))
        s.facts.append(f"{who.He} spends ${spent}{rng.choice((' on food', ' on a book', '', ' on rent'))}.")
        s.question = f"How much money does {who.he} have left?"
        s.step("Left", s.total, "-", spent, "dollars")
    return s


def saving(rng: Random) -> Story:
    """Weekly saving toward a price."""
    s, who, what = (
        Story(),
        person(rng),
        rng.choice(("bike", "game", "phone", "guitar", "watch", "toy", "jacket")),
    )
    per, weeks, has = rng.randint(2, 30), rng.randint(2, 12), rng.randint(5, 60)
    span = rng.choice(("week", "month", "day"))
    start = rng.random() < 0.5
    if start:
        s.facts.append(rng.choice((f"{who.name} has ${has}.", f"{who.name} already has {has} dollars.")))
    name = who.He if start else who.name
    s.facts.append(
        rng.choice(
            (
                f"{name} saves ${per} a {span} for {weeks} {span}s.",
                f"{name} saves ${per} every {span} for {weeks} {span}s.",
            )
        )
    )
    s.step("Saved", per, "*", weeks, "dollars")
    if start:
        s.step("Together", has, "+", s.total, "dollars")
    if not start or rng.random() < 0.6:
        price = s.total + rng.randint(1, 90)
        s.facts.append(rng.choice((f"A {what} costs ${price}.", f"{who.He} wants to buy a {what} for ${price}.")))
        s.question = rng.choice((f"How much more does {who.he} need?", f"How many more dollars does {who.he} need?"))
        s.step("Needed", price, "-", s.total, "dollars")
    else:
        s.question = f"How much money does {who.he} have now?"
    return s
