"""Answers as text: SQuAD normalisation, and whether and where a text holds an answer.

Sources: ``normalise_answer`` is SQuAD's official evaluation script (Rajpurkar et al., arXiv
1606.05250).  Containment is word-bounded on the normalised text, as METHOD "Stage 1" and answer
recall need it; [ours] it compares in the form of :func:`invar_ray.text.words.fold`, drops
punctuation outside ASCII too (curly quotes, en dashes; SQuAD's script keeps it), and takes each
character for a word where a script writes no spaces.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from typing import NamedTuple

import regex

from invar_ray.text.words import fold, is_unspaced, pieces

_PUNCTUATION = frozenset(string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WORD = re.compile(r"\S+")
_GROUPED = re.compile(r"(?<=\d)，(?=\d{3}(?!\d))|(?<=\d)．(?=\d)")  # full-width, in a number
_RUN = re.compile(r"\S+|\s+")
_CLUSTER = regex.compile(r"\X")
_INVISIBLE = regex.compile(r"\p{Default_Ignorable_Code_Point}+")


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


def f1_words(text: str, normalise: Callable[[str], str] = normalise_answer) -> list[str]:
    """The tokens of an answer's F1: its words under a benchmark's own normalisation; characters
    where the script writes no spaces, as the scripts of MLQA and CMRC count them.
    """
    return _words(text) if is_unspaced(text) else normalise(fold(text)).split()


def contains_answer(text: str, answers: Sequence[str]) -> bool:
    """Whether any of ``answers`` stands in ``text``, word by word after normalisation.

    ``"art"`` is not in ``"party"``; ``"1,000 men"`` is in ``"the 1000 men"``.  An answer of which
    normalisation leaves nothing (``"the"``, ``"?"``) is in no text.
    """
    wanted = [answer for answer in map(searchable, answers) if answer.strip()]
    if not wanted:
        return False
    held = searchable(text)
    return any(answer in held for answer in wanted)


def searchable(text: str) -> str:
    """The normalised words of ``text`` between single spaces, one at either end.

    ``searchable(answer) in searchable(text)`` is :func:`contains_answer`, for texts that are
    searched many times.  An answer without words gives ``"  "``: leave it out.
    """
    return f" {' '.join(_words(text))} "


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
    if not contains_answer(text, answers):
        return None
    words = _located(text)
    best: tuple[int, int] | None = None
    for answer in answers:
        wanted = _located(answer)
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


def _words(text: str) -> list[str]:
    found = _ARTICLES.sub(" ", fold(_GROUPED.sub(".", text), punctuation=False)).split()
    if not is_unspaced(text):
        return found
    return [word[start:end] for word in found for start, end in pieces(word)]


def _located(text: str) -> list[_Word]:
    """The words of :func:`_words` with where they stand."""
    folded, places = _folded(_GROUPED.sub(".", text))
    joined = _ARTICLES.sub(lambda match: " " * len(match.group()), folded)
    return [
        _Word(match.group()[start:end], places[first + start][0], places[first + end - 1][1])
        for match in _WORD.finditer(joined)
        for first in (match.start(),)
        for start, end in pieces(match.group())
    ]


def _folded(text: str) -> tuple[str, list[tuple[int, int]]]:
    """``fold(text)`` without punctuation, and the raw characters that each of its characters comes
    from.
    """
    whole = fold(text, punctuation=False)
    # Only what stands within one grapheme cluster can join into one character, once what is
    # invisible is gone; in odd spellings neighbours join too: then words, then all are one.
    for spans in (_clusters(text), [match.span() for match in _RUN.finditer(text)]):
        pieces = [(fold(text[start:end], punctuation=False), (start, end)) for start, end in spans]
        if "".join(piece for piece, _ in pieces) == whole:
            return whole, [span for piece, span in pieces for _ in piece]
    return whole, [(0, len(text))] * len(whole)


def _clusters(text: str) -> list[tuple[int, int]]:
    if text.isascii():
        return [(at, at + 1) for at in range(len(text))]
    origins = [at for at, character in enumerate(text) if not _INVISIBLE.match(character)]
    visible = "".join(text[at] for at in origins)
    return [
        (origins[match.start()], origins[match.end() - 1] + 1)
        for match in _CLUSTER.finditer(visible)
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
