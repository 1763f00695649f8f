"""Where sentences start: rules for written text, used to cut passages and windows at natural
places.
"""

from __future__ import annotations

import itertools
import re

_ABBREVIATIONS = frozenset(
    """mr mrs ms dr prof st sr jr rev gen col capt lt sgt gov sen rep hon pres vs etc e.g i.e eg ie cf al ca approx
    no nos vol fig figs ed eds est dept inc ltd co corp bros mt ft jan feb mar apr jun jul aug sep sept oct nov dec
    u.s u.k u.n a.m p.m ph.d b.c a.d d.c lit pinyin""".split()
)
# Sentence-final marks (of Arabic, Devanagari and Armenian too) and what closes the sentence, then
# white space; or marks of scripts that write no spaces, which need none; or an empty line.
_END = re.compile(
    r"(?P<marks>[.!?…؟۔।॥։]+)[\"'”’»)\]]*(?=\s)|[。！？｡။។።]+[」』）”’》]*|\n[^\S\n]*\n"
)
_LAST_WORD = re.compile(r"[\w.]+$")


def sentence_starts(text: str) -> list[int]:
    """Character offsets at which sentences of ``text`` start (each at its first visible character),
    ascending.

    A full stop ends no sentence after an abbreviation, after an initial (``J. S. Bach``) or before
    a small letter, unless the whole text is in small letters.  An empty line always does.
    """
    starts: list[int] = []
    first = _skip_space(text, 0)
    if first < len(text):
        starts.append(first)
    all_small = text == text.lower()
    for match in _END.finditer(text):
        following = _skip_space(text, match.end())
        if following >= len(text):
            break
        if match.group("marks") == "." and not _ends_sentence(
            text, match.start(), following, all_small
        ):
            continue
        if starts[-1] < following:
            starts.append(following)
    return starts


def sentences_of(text: str) -> list[str]:
    """The sentences of ``text``, without the white space around them."""
    starts = [*sentence_starts(text), len(text)]
    return [text[start:end].strip() for start, end in itertools.pairwise(starts)]


def skip_space(text: str, offset: int) -> int:
    """The first offset at or after ``offset`` that is not white space (``len(text)`` where there is
    none).
    """
    return _skip_space(text, offset)


def _skip_space(text: str, offset: int) -> int:
    while offset < len(text) and text[offset].isspace():
        offset += 1
    return offset


def _ends_sentence(text: str, stop: int, following: int, all_small: bool) -> bool:
    if text[following].islower() and not all_small:
        return False
    word = _LAST_WORD.search(text, max(0, stop - 20), stop)
    if word is None:
        return True
    last = word.group().lower()
    is_initial = len(last) == 1 and last.isalpha()
    return not is_initial and last not in _ABBREVIATIONS
