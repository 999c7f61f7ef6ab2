"""What the multiple-choice questions know: word categories, opposites, capitals, small counts."""

from hrm_text.nano import words

CATEGORIES: dict[str, tuple[str, ...]] = {
    "a fruit": tuple("apple banana pear peach plum lemon mango cherry grape strawberry orange melon".split()),
    "a vegetable": tuple("carrot potato onion cabbage spinach broccoli celery lettuce radish turnip".split()),
    "an animal": tuple(words.ANIMALS),
    "a bird": tuple("eagle sparrow owl parrot penguin duck swan crow pigeon robin".split()),
    "a colour": tuple(c for c in words.COLOURS if c != "orange"),
    "a color": tuple(c for c in words.COLOURS if c != "orange"),
    "a day of the week": tuple(words.DAYS),
    "a month": tuple(words.MONTHS),
    "a job": tuple(words.JOBS),
    "a city": tuple(words.CITIES),
    "a country": tuple("France Germany Spain Italy Japan China Brazil Egypt Canada Mexico Kenya Norway India".split()),
    "a vehicle": tuple("car bus train truck bicycle boat plane tram ship motorcycle".split()),
    "a tool": tuple("hammer saw drill wrench screwdriver shovel rake pliers".split()),
    "a piece of furniture": tuple("table chair sofa bed desk wardrobe bench bookcase".split()),
    "a musical instrument": tuple("piano guitar violin flute drum trumpet cello harp".split()),
    "a sport": tuple("football tennis basketball swimming hockey golf rugby volleyball".split()),
    "a drink": tuple("water milk tea coffee juice lemonade cocoa".split()),
    "a body part": tuple("hand foot arm leg nose ear knee elbow finger shoulder".split()),
    "a piece of clothing": tuple("shirt hat coat sock glove scarf dress sweater jacket".split()),
}


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    """`left/right left/right ...` as pairs."""
    return tuple((left, right) for left, right in (pair.split("/") for pair in text.split()))


FACTS: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    (
        "What is the opposite of {}?",
        _pairs(
            "hot/cold big/small up/down day/night fast/slow old/young wet/dry happy/sad full/empty left/right "
            "open/closed early/late high/low long/short hard/soft light/dark"
        ),
    ),
    (
        "What is the capital of {}?",
        _pairs(
            "France/Paris Germany/Berlin Spain/Madrid Italy/Rome Japan/Tokyo England/London Austria/Vienna "
            "Norway/Oslo Egypt/Cairo Peru/Lima Ireland/Dublin Greece/Athens Portugal/Lisbon Russia/Moscow "
            "Poland/Warsaw"
        ),
    ),
    (
        "What is a baby {} called?",
        _pairs("dog/puppy cat/kitten cow/calf horse/foal sheep/lamb pig/piglet goat/kid duck/duckling lion/cub"),
    ),
    (
        "How many {}?",
        (
            ("days are in a week", "7"),
            ("minutes are in an hour", "60"),
            ("hours are in a day", "24"),
            ("months are in a year", "12"),
            ("seconds are in a minute", "60"),
            ("legs does a spider have", "8"),
            ("legs does a dog have", "4"),
            ("sides does a triangle have", "3"),
            ("sides does a square have", "4"),
            ("wheels does a bicycle have", "2"),
            ("legs does an insect have", "6"),
            ("days are in a year", "365"),
        ),
    ),
)
