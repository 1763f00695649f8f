"""Numbers as they are said: ``1973`` -> ``nineteen seventy three``, ``21st`` -> ``twenty
first``.
"""

from __future__ import annotations

import re

_ONES = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen""".split()
_TENS = "zero ten twenty thirty forty fifty sixty seventy eighty ninety".split()
_SCALES = (
    (1_000_000_000, "billion"),
    (1_000_000, "million"),
    (1_000, "thousand"),
    (100, "hundred"),
)
_ORDINALS = {
    "one": "first",
    "two": "second",
    "three": "third",
    "five": "fifth",
    "eight": "eighth",
    "nine": "ninth",
    "twelve": "twelfth",
}
_NUMBER = re.compile(
    r"(?<![\w.,])(?P<whole>\d{1,3}(?:,\d{3})+|\d{1,12})(?P<part>\.\d+)?(?P<end>st|nd|rd|th|s)?(?![\w]|[.,]\d)"
)


def numbers_to_words(text: str) -> str:
    """``text`` with its numbers spelled; a number inside a word (``B52``, ``3D``) or of more than
    12 digits stays.
    """
    return _NUMBER.sub(_spell, text)


def cardinal(number: int) -> str:
    """A whole number from 0 to below 10**12 in words, without hyphens."""
    if number < 20:
        return _ONES[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return _TENS[tens] + (f" {_ONES[ones]}" if ones else "")
    for scale, name in _SCALES:
        if number >= scale:
            many, rest = divmod(number, scale)
            return f"{cardinal(many)} {name}" + (f" {cardinal(rest)}" if rest else "")
    raise ValueError(f"{number} is negative")


def year(number: int) -> str:
    """A year from 1100 to 2099 as it is said."""
    century, rest = divmod(number, 100)
    if 2000 <= number < 2010 or (rest == 0 and century % 10 == 0):
        return cardinal(number)
    if rest == 0:
        return f"{cardinal(century)} hundred"
    return f"{cardinal(century)} {'oh ' if rest < 10 else ''}{cardinal(rest)}"


def ordinal(number: int) -> str:
    """``21`` -> ``twenty first``."""
    *head, last = cardinal(number).split()
    if last in _ORDINALS:
        last = _ORDINALS[last]
    else:
        last = last[:-1] + "ieth" if last.endswith("y") else last + "th"
    return " ".join([*head, last])


def _spell(match: re.Match[str]) -> str:
    digits, part, end = match.group("whole"), match.group("part"), match.group("end")
    number = int(digits.replace(",", ""))
    if end in {"st", "nd", "rd", "th"}:
        return ordinal(number) if part is None else match.group()
    if part is not None:
        if end is not None:
            return match.group()
        return f"{cardinal(number)} point {' '.join(_ONES[int(digit)] for digit in part[1:])}"
    looks_like_year = len(digits) == 4 and 1100 <= number <= 2099
    words = year(number) if looks_like_year else cardinal(number)
    if end != "s":
        return words
    return words[:-1] + "ies" if words.endswith("y") else words + "s"
