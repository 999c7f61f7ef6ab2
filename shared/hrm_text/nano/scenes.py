"""Word problems with a plot of their own, and the draw among all of them."""

from collections.abc import Callable
from random import Random

from hrm_text.nano.money import saving, shopping, wages
from hrm_text.nano.stories import Story, Unsuitable, ledger, size
from hrm_text.nano.words import DAYS, PEOPLE, container, noun, person


def compare(rng: Random) -> Story:
    """Two people, one has more, fewer or a multiple; how many together or how far apart."""
    s, a, b, what = Story(), person(rng), person(rng), noun(rng)
    if a.name == b.name:
        raise Unsuitable
    first = size(rng)
    s.facts.append(rng.choice((f"{a.name} has {what.count(first)}.", f"{a.name} collected {what.count(first)}.")))
    form, k = rng.random(), rng.randint(2, 20)
    if form < 0.3:
        s.facts.append(f"{b.name} has {k} more {what.many} than {a.name}.")
        second = s.step("Other", first, "+", k, what.many)
    elif form < 0.55:
        s.facts.append(rng.choice((f"{b.name} has {k} fewer than {a.name}.", f"{b.name} has {k} less than {a.name}.")))
        second = s.step("Other", first, "-", k, what.many)
    elif form < 0.88:
        times = rng.randint(2, 5)
        phrase = "twice" if times == 2 and rng.random() < 0.7 else f"{times} times"
        s.facts.append(f"{b.name} has {phrase} as many {what.many} as {a.name}.")
        second = s.step("Other", first, "*", times, what.many)
    else:
        s.facts.append(f"{b.name} has half as many {what.many} as {a.name}.")
        second = s.step("Other", first, "/", 2, what.many)
    if rng.random() < 0.75:
        s.question = rng.choice(
            (
                f"How many {what.many} do they have together?",
                f"How many {what.many} do they have in total?",
                f"How many {what.many} do {a.name} and {b.name} have altogether?",
            )
        )
        s.step("Together", first, "+", second, what.many)
        if rng.random() < 0.3:
            lost = rng.randint(1, 9)
            s.facts.append(f"They lose {what.count(lost)}.")
            s.question = f"How many {what.many} do they have left together?"
            s.step("Then", s.total, "-", lost, what.many)
    else:
        s.question = f"How many {what.many} does {b.name} have?"
    return s


def travel(rng: Random) -> Story:
    """Distance over hours or days, and what remains."""
    s, who = Story(), person(rng)
    per, count = rng.randint(3, 80), rng.randint(2, 10)
    mover = rng.choice(("A car", "A train", "A bus", who.name))
    unit = rng.choice(("miles", "kilometers", "km"))
    span = rng.choice(("hour", "day"))
    verb = "rides" if mover == who.name else "travels"
    s.facts.append(
        rng.choice(
            (
                f"{mover} {verb} {per} {unit} per {span} for {count} {span}s.",
                f"{mover} {verb} {per} {unit} every {span} for {count} {span}s.",
                f"{mover} {verb} for {count} {span}s at {per} {unit} per {span}.",
            )
        )
    )
    s.step("Distance", per, "*", count, unit)
    if rng.random() < 0.5:
        more = rng.randint(2, 60)
        s.facts.append(f"Then {mover if mover == who.name else 'it'} goes another {more} {unit}.")
        s.question = rng.choice((f"How many {unit} is that in total?", "How far is that in all?"))
        s.step("Total", s.total, "+", more, unit)
    else:
        trip = s.total + rng.randint(2, 90)
        s.facts.append(f"The whole trip is {trip} {unit}.")
        s.question = rng.choice((f"How many {unit} are left?", f"How many more {unit} remain?"))
        s.step("Left", trip, "-", s.total, unit)
    return s


def reading(rng: Random) -> Story:
    """Pages a day: what is read, what is left, how many days it takes."""
    s, who = Story(), person(rng)
    per, days = rng.randint(3, 40), rng.randint(2, 12)
    s.facts.append(f"{who.name} reads {per} pages {rng.choice(('a day', 'every day', 'each day', 'per day'))}")
    s.facts[-1] += rng.choice((f" for {days} days.", f". {who.He} reads for {days} days."))
    s.step("Read", per, "*", days, "pages")
    left = per * rng.randint(1, 8)
    book = s.total + left
    s.facts.append(f"The book has {book} pages.")
    s.question = f"How many pages {rng.choice(('are left', 'are left to read', 'remain'))}?"
    s.step("Left", book, "-", s.total, "pages")
    if rng.random() < 0.4:
        s.question = f"How many more days does {who.he} need to finish it?"
        s.step("Days", s.total, "/", per, "days")
    return s


def ages(rng: Random) -> Story:
    """Ages now, and later."""
    s, who = Story(), person(rng)
    age, k, later = rng.randint(4, 40), rng.randint(1, 12), rng.randint(2, 20)
    other = rng.choice(PEOPLE[1:8])
    s.facts.append(rng.choice((f"{who.name} is {age} years old.", f"{who.name} is {age}.")))
    form = rng.random()
    if form < 0.4:
        s.facts.append(f"{who.his.capitalize()} {other} is {k} years older.")
        second = s.step("Other", age, "+", k, "years")
    elif form < 0.7:
        s.facts.append(f"{who.his.capitalize()} {other} is {k} years younger than {who.name}.")
        second = s.step("Other", age, "-", k, "years")
    else:
        times = rng.randint(2, 4)
        s.facts.append(f"{who.his.capitalize()} {other} is {'twice' if times == 2 else f'{times} times'} as old.")
        second = s.step("Other", age, "*", times, "years")
    if rng.random() < 0.5:
        s.question = rng.choice(("How old are they together?", "What is the sum of their ages?"))
        s.step("Together", age, "+", second, "years")
    else:
        s.question = f"How old will {who.his} {other} be in {later} years?"
        s.step("Later", second, "+", later, "years")
    return s


def rows(rng: Random) -> Story:
    """A grid of seats, trees or desks; some are taken, or added."""
    s = Story()
    place, row, unit = rng.choice(
        (
            ("theater", "row", "seats"),
            ("garden", "row", "trees"),
            ("classroom", "row", "desks"),
            ("bus", "row", "seats"),
            ("parking lot", "row", "cars"),
            ("school", "class", "students"),
            ("library", "shelf", "books"),
            ("hotel", "floor", "rooms"),
            ("farm", "field", "cows"),
            ("farm", "barn", "horses"),
        )
    )
    n, each = rng.randint(2, 12), rng.randint(3, 40)
    many = {"class": "classes", "shelf": "shelves"}.get(row, row + "s")
    s.facts.append(
        rng.choice(
            (
                f"A {place} has {n} {many} with {each} {unit} in each {row}.",
                f"A {place} has {n} {many} of {each} {unit} each.",
                f"There are {n} {many} in a {place}. Each {row} has {each} {unit}.",
            )
        )
    )
    s.step("At first", n, "*", each, unit)
    for _ in range(rng.randint(1, 2)):
        k = rng.randint(1, max(1, min(s.total, 80)))
        if rng.random() < 0.65:
            taken = {
                "seats": "are taken",
                "desks": "are broken",
                "books": "are borrowed",
                "rooms": "are booked",
            }
            s.facts.append(f"{k} {unit} {taken.get(unit, 'leave' if unit != 'trees' else 'are cut down')}.")
            s.step("Then", s.total, "-", k, unit)
        else:
            s.facts.append(rng.choice((f"{k} more {unit} are added.", f"Then {k} {unit} are added.")))
            s.step("Then", s.total, "+", k, unit)
    s.question = f"How many {unit} are {'left' if ' - ' in s.steps[-1] else 'there now'}?"
    return s


def bus(rng: Random) -> Story:
    """People getting on and off."""
    s, start = Story(), rng.randint(5, 60)
    vehicle = rng.choice(("bus", "train", "boat", "tram"))
    s.facts.append(rng.choice((f"There are {start} people on a {vehicle}.", f"A {vehicle} has {start} passengers.")))
    s.total = start
    for _ in range(rng.randint(2, 4)):
        at = rng.choice(("At the next stop, ", "Then ", "At a stop, ", ""))
        k = rng.randint(1, 20)
        if rng.random() < 0.5:
            s.facts.append(f"{at}{k} people get on.")
            s.step("Then", s.total, "+", k, "people")
        else:
            s.facts.append(f"{at}{k} people get off.")
            s.step("Then", s.total, "-", k, "people")
    s.question = rng.choice((f"How many people are on the {vehicle} now?", f"How many are on the {vehicle}?"))
    return s


def week(rng: Random) -> Story:
    """Sales on two or three days, each told relative to the day before."""
    s, who, what = Story(), person(rng), noun(rng)
    first, day = size(rng), rng.randint(0, 4)
    verb = rng.choice(("sells", "makes", "bakes" if what.food else "paints", "sold", "picks"))
    s.facts.append(f"{who.name} {verb} {what.count(first)} on {DAYS[day]}.")
    amounts = [first]
    for d in DAYS[day + 1 : day + rng.randint(2, 3)]:
        k, label = rng.randint(2, 15), "Next"
        form = rng.random()
        if form < 0.4:
            s.facts.append(f"On {d} {who.he} {verb} {k} more than the day before.")
            amounts.append(s.step(label, amounts[-1], "+", k, what.many))
        elif form < 0.7:
            s.facts.append(f"On {d} {who.he} {verb} {k} fewer than the day before.")
            amounts.append(s.step(label, amounts[-1], "-", k, what.many))
        else:
            s.facts.append(f"On {d} {who.he} {verb} twice as many as the day before.")
            amounts.append(s.step(label, amounts[-1], "*", 2, what.many))
    total = amounts[0]
    for amount in amounts[1:]:
        total = s.step("Together", total, "+", amount, what.many)
    s.question = rng.choice((f"How many {what.many} is that in total?", "How many is that altogether?"))
    return s


def sharing(rng: Random) -> Story:
    """A total split into equal parts, then something happens to one part, or several parts are taken."""
    s, who, what, box = Story(), person(rng), noun(rng), container(rng)
    parts, each = rng.randint(2, 12), rng.randint(2, 30)
    total = parts * each
    s.facts.append(
        rng.choice(
            (
                f"{who.name} has {what.count(total)} and puts them equally into {box.count(parts)}.",
                f"{what.count(total)} are packed equally into {box.count(parts)}.",
                f"{who.name} divides {what.count(total)} equally into {box.count(parts)}.",
            )
        )
    )
    s.step("Each", total, "/", parts, what.many)
    taken = rng.randint(1, parts)
    if rng.random() < 0.5:
        s.facts.append(rng.choice((f"{who.name} gives away {box.count(taken)}.", f"{box.count(taken)} are sold.")))
        s.question = f"How many {what.many} {rng.choice(('is that', 'are in those ' + box.many))}?"
        s.step("Given", taken, "*", each, what.many)
        if rng.random() < 0.4:
            s.question = f"How many {what.many} are left?"
            s.step("Left", total, "-", s.total, what.many)
    else:
        k = rng.randint(1, 9)
        out = rng.random() < 0.6
        s.facts.append(f"Then {k} {what.many} are {'taken out of' if out else 'added to'} one {box.one}.")
        s.question = f"How many {what.many} are in that {box.one} now?"
        s.step("Then", each, "-" if out else "+", k, what.many)
    return s


SCENES: tuple[Callable[[Random], Story], ...] = (
    compare,
    shopping,
    travel,
    wages,
    reading,
    ages,
    rows,
    bus,
    week,
    saving,
    sharing,
)


def word_problem(rng: Random, fewest: int = 2, most: int = 4) -> Story:
    """One story with `fewest` to `most` steps; half of them are ledgers, the plainest kind."""
    while True:
        try:
            story = ledger(rng) if rng.random() < 0.5 else rng.choice(SCENES)(rng)
        except Unsuitable:
            continue
        if fewest <= len(story.steps) <= most:
            return story
