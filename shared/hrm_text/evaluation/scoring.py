r"""From a model's text to a score, by the model authors' rules."""


def last_boxed(text: str) -> str | None:
    r"""Contents of the last `\boxed{}` (or, without any, the last `\fbox{}`), or None; its braces must balance."""
    start = text.rfind("\\boxed")
    if start < 0:
        start = text.rfind("\\fbox")
    opening = text.find("{", start) if start >= 0 else -1
    if opening < 0:
        return None
    depth = 0
    for position in range(opening, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[opening + 1 : position].strip()
    return None


def integer_answer(text: str) -> int | None:
    r"""The number a GSM8K answer gives: its last `\boxed{}`, else the whole text, without `,` and `$`."""
    answer = (last_boxed(text) or text).replace(",", "").replace("$", "")
    try:
        return int(float(answer))
    except (ValueError, OverflowError):
        return None


def math_correct(gold: str, text: str) -> bool:
    r"""Whether the last `\boxed{}` of `text`, else the whole of it, equals the LaTeX `gold` by math-verify.

    math-verify reads LaTeX only between delimiters: without them a tenth of MATH's own answers parse to nothing.
    """
    from math_verify import parse, verify

    boxed = last_boxed(text)
    return bool(verify(parse(f"${gold}$"), parse(text if boxed is None else f"${boxed}$")))


def letters(choices: int) -> str:
    """`ABCD` for four choices."""
    return "".join(chr(ord("A") + index) for index in range(choices))


def choice_score(text: str, gold: int, choices: int) -> tuple[float, bool]:
    """Score of a multiple-choice answer, and whether it was one of the letters; if not, it earns a guess's share."""
    answer = text.strip().upper()
    if len(answer) != 1 or answer not in letters(choices):
        return 1 / choices, False
    return float(answer == letters(choices)[gold]), True
