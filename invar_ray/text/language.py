"""Whether texts are English, which the teacher MiniLM and the rules for rewrites know alone."""

from __future__ import annotations

import re
from collections.abc import Sequence

from invar_ray.text.words import words

# Words that nearly every English text of some length holds, and that few other languages write so.
_ENGLISH = frozenset(
    """the of and to what which who whose how when where why is are were did does has have with from
    by that this for his her their name""".split()
)
_LATIN = re.compile("[a-z\u00df-\u024f]")
_LATIN_PART = 0.5
SAMPLE = 500
"""How many texts are looked at; they are taken evenly."""


def is_latin(text: str) -> bool:
    """Whether at least half of a text's letters are of the Latin alphabet (so is one without
    letters).
    """
    letters = [character for character in text.lower() if character.isalpha()]
    latin = sum(_LATIN.match(letter) is not None for letter in letters)
    return latin >= _LATIN_PART * len(letters)


def english_share(texts: Sequence[str]) -> float:
    """The share of the texts, of at most 500 of them, that look English: in Latin letters, with one
    of its commonest words. [ours]
    """
    sample = texts[:: max(1, len(texts) // SAMPLE)][:SAMPLE]
    english = [is_latin(text) and not _ENGLISH.isdisjoint(words(text)) for text in sample]
    return sum(english) / max(1, len(english))
