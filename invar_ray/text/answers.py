"""Answers as text: SQuAD normalisation, and whether and where a text holds an answer.

Sources: ``normalise_answer`` is SQuAD's official evaluation script (Rajpurkar et al., arXiv
1606.05250).  Containment is word-bounded on the normalised text, as METHOD "Stage 1" and answer
recall need it; [ours] it also drops punctuation outside ASCII (curly quotes, en dashes), which
SQuAD's script keeps and which is common in Wikipedia.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

_PUNCTUATION = frozenset(string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WORD = re.compile(r"\S+")
_EM_DASH = "\u2014"


class _Word(NamedTuple):
    """A normalised word and the characters of the raw text that it was made from, half open."""

    text: str
    start: int
    end: int


def normalise_answer(text: str) -> str:
    """Normalise an answer as SQuAD does: lower case, no ASCII punctuation, no English articles,
    single spaces.

    The order is SQuAD's (punctuation goes before articles, so ``"the-end"`` becomes ``"theend"``).
    """
    kept = "".join(character for character in text.lower() if character not in _PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", kept).split())


def contains_answer(text: str, answers: Sequence[str]) -> bool:
    """Whether any of ``answers`` stands in ``text``, word by word after normalisation.

    ``"art"`` is not in ``"party"``; ``"1,000 men"`` is in ``"the 1000 men"``.  An answer of which
    normalisation leaves nothing (``"the"``, ``"?"``) is in no text.
    """
    return find_answer(text, answers) is not None


def searchable(text: str) -> str:
    """The normalised words of ``text`` between single spaces, one at either end.

    ``searchable(answer) in searchable(text)`` is :func:`contains_answer`, for texts that are
    searched many times; an answer without words gives ``"  "``, which is in no text.
    """
    return f" {' '.join(word.text for word in _words(text))} "


def find_answer(text: str, answers: Sequence[str]) -> tuple[int, int] | None:
    """Where the first answer stands in the raw text.

    Args:
        text: the raw text.
        answers: gold answers, any of which will do.

    Returns:
        Character offsets, half open, of the earliest occurrence (of the longest one, where several
        start there); ``None`` exactly when :func:`contains_answer` is false.  The span covers the
        answer as it was written where the text spells it so (``"C++"``, ``"The Who"``), else the
        words that matched.
    """
    words = _words(text)
    best: tuple[int, int] | None = None
    for answer in answers:
        wanted = _words(answer)
        first = _first_run(words, wanted)
        if first is None:
            continue
        start, end = words[first].start, words[first + len(wanted) - 1].end
        literal = start - wanted[0].start
        if literal >= 0 and text[literal : literal + len(answer)].lower() == answer.lower():
            start, end = literal, literal + len(answer)
        if best is None or (start, -end) < (best[0], -best[1]):
            best = (start, end)
    return best


def _words(text: str) -> list[_Word]:
    lowered = text.lower()
    # Lower-casing can lengthen a character ("İ"): remember which raw character each lowered one
    # came from.
    origins = [index for index, character in enumerate(text) for _ in character.lower()]
    kept, places = [], []
    for character, origin in zip(lowered, origins, strict=True):
        if character == _EM_DASH:
            character = " "  # stands between words without spaces, unlike a hyphen
        elif character in _PUNCTUATION or unicodedata.category(character).startswith("P"):
            continue
        kept.append(character)
        places.append(origin)
    joined = _ARTICLES.sub(lambda match: " " * len(match.group()), "".join(kept))
    return [
        _Word(match.group(), places[match.start()], places[match.end() - 1] + 1)
        for match in _WORD.finditer(joined)
    ]


def _first_run(words: Sequence[_Word], wanted: Sequence[_Word]) -> int | None:
    if not wanted:
        return None
    target = [word.text for word in wanted]
    texts = [word.text for word in words]
    for start in range(len(texts) - len(target) + 1):
        if texts[start] == target[0] and texts[start : start + len(target)] == target:
            return start
    return None
