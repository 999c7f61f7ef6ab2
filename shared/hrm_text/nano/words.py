"""Word lists and small text helpers that the problem generators draw from."""

import re
from dataclasses import dataclass
from random import Random

GIRLS = (
    "Anna Maria Lisa Sara Emma Olivia Mia Sophie Julia Nina Clara Ella Lucy Grace Zoe Alice Ruby Ivy "
    "Hannah Leah Amy Kate Jane Mary Susan Linda Priya Aisha Mei Yuki Fatima Elena Rosa Carla Diana Eva "
    "Nora Molly Betty Natalia"
).split()
BOYS = (
    "Tom Ben Sam Max Leo Jack Noah Liam Lucas Oscar Peter Paul John James David Daniel Mark Adam Eric "
    "Henry George Frank Tim Joe Bob Bill Alex Ali Omar Ravi Kenji Wei Carlos Diego Marco Ivan Hugo Felix "
    "Simon Weng"
).split()
PEOPLE = (
    "friend brother sister mother father uncle aunt neighbor cousin teacher grandmother grandfather mom dad"
).split()
FOODS = (
    "apple orange banana pear peach plum lemon mango cookie candy cupcake muffin donut sandwich egg "
    "carrot tomato potato strawberry cherry grape chocolate pancake pretzel lollipop cracker nut olive "
    "melon brownie"
).split()
THINGS = (
    "pencil pen book marble sticker card coin stamp toy ball button bead shell flower balloon crayon "
    "ribbon ticket notebook eraser block doll postcard key rock feather badge poster magazine shirt hat "
    "candle cup plate brick"
).split()
CONTAINERS = ("box bag basket jar pack crate tray carton drawer bucket packet case bin tin shelf bowl sack").split()
JOBS = ("teacher doctor baker farmer pilot nurse painter singer driver lawyer chef writer dentist plumber").split()
CITIES = (
    "London Paris Berlin Madrid Rome Vienna Oslo Tokyo Cairo Lima Boston Chicago Dublin Prague Athens "
    "Lisbon Sydney Toronto Delhi Seoul Moscow Warsaw Geneva Milan Dallas Denver Austin Seattle"
).split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
COLOURS = "red blue green yellow orange purple pink brown black white gray".split()
ANIMALS = ("dog cat horse cow pig sheep goat rabbit lion tiger bear wolf fox mouse elephant monkey zebra deer").split()
HOBBIES = ("chess tennis football swimming painting dancing cooking reading fishing hiking singing cycling").split()
NUMBER_WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()
SYLLABLES = (
    "ba be bo da do fa fi ga go ka ki ko la le lo ma mi mo na ne no pa po ra ri ro sa so ta to va vi za zo"
).split()


@dataclass(frozen=True)
class Person:
    """Somebody in a story, with the pronouns that refer to them."""

    name: str
    he: str
    him: str
    his: str

    @property
    def He(self) -> str:
        return self.he.capitalize()


@dataclass(frozen=True)
class Noun:
    """A countable thing; `food` says whether a story may eat it."""

    one: str
    many: str
    food: bool = False

    def count(self, n: int) -> str:
        """`1 apple`, `4 apples`."""
        return f"{n} {self.one if n == 1 else self.many}"


def plural(word: str) -> str:
    if word.endswith(("s", "x", "ch", "sh", "ato", "ango")):
        return word + "es"
    if word == "shelf":
        return "shelves"
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + "s"


def invented(rng: Random) -> str:
    """A word nobody has: stories with these teach copying, so a reader's own names and things work."""
    return "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(2, 3))) + rng.choice(("", "n", "r", "l", "t"))


def person(rng: Random) -> Person:
    girl = rng.random() < 0.5
    draw = rng.random()
    if draw < 0.12:
        name = invented(rng).capitalize()
    elif draw < 0.2:
        name = f"The {rng.choice(JOBS)}"
    else:
        name = rng.choice(GIRLS if girl else BOYS)
    return Person(name, "she", "her", "her") if girl else Person(name, "he", "him", "his")


def noun(rng: Random) -> Noun:
    draw = rng.random()
    if draw < 0.1:
        word, food = invented(rng), False
    else:
        food = draw < 0.6
        word = rng.choice(FOODS if food else THINGS)
    return Noun(word, plural(word), food)


def container(rng: Random) -> Noun:
    word = rng.choice(CONTAINERS)
    return Noun(word, plural(word))


def tidy(text: str) -> str:
    """Somebody called `The baker` is `the baker` inside a sentence; `a apple` is `an apple`."""
    text = re.sub(r"(?<=[a-z,] )The (?=[a-z])", "the ", text)
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def spell_small_numbers(text: str) -> str:
    """Writes whole numbers up to twelve as words, prices aside."""

    def word(match: re.Match[str]) -> str:
        value = int(match.group())
        return NUMBER_WORDS[value] if value <= 12 else match.group()

    spelled = re.sub(r"(?<![$\d.])\d+(?![\d.]*\d)", word, text)
    return re.sub(r"(^|[.?!] )([a-z])", lambda m: m.group(1) + m.group(2).upper(), spelled)
