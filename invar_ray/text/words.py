"""One normal form in which texts are compared, and one notion of a word for every script.

A word is a run of letters, digits and the marks on them.  Where a script writes no spaces (Han,
kana, Yi, Thai, Lao, Khmer, Myanmar, Javanese ..), and in Hangul, whose endings stick to the word,
each character with its marks counts as one: it needs no dictionary, and whether a text holds an
answer becomes a question of characters.  BM25 adds pairs of neighbours, as Lucene's CJK analyser
does.

Masks and mining compare every candidate with every answer, so that speed counts: the common cases
(ASCII, Latin with accents) go through ``re``, the others through ``regex``.
"""

from __future__ import annotations

import itertools
import re
import string
import unicodedata

import regex

_UNSPACED = (
    r"\p{Han}\p{Ideographic}\p{Hiragana}\p{Katakana}ー\p{Bopomofo}\p{Hangul}\p{Yi}\p{Javanese}"
    r"\p{Balinese}\p{Line_Break=SA}"  # SA: Thai, Lao, Khmer, Myanmar, Tai Lue, Tai Tham ..
)
_UNIT = regex.compile(rf"[{_UNSPACED}]\p{{M}}*")
_WORD = regex.compile(rf"(?V1)[{_UNSPACED}]\p{{M}}*|[[\p{{L}}\p{{M}}\p{{N}}]--[{_UNSPACED}]]+")
_PIECE = regex.compile(rf"(?V1)[{_UNSPACED}]\p{{M}}*|[\S--[{_UNSPACED}]]+")
_SIMPLE_WORD = re.compile(r"[^\W_]+")
# Marks that stand apart from their letter, and every script that has such or writes no spaces.
_NOT_SIMPLE = re.compile("[\u0300-\u036f\u0483-\u0489\u0591-\u1eff\u20d0-\u20f0\u2e80-\U0010ffff]")
_NOT_ASCII = re.compile(r"([^\x00-\x7f]+)")
_ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)

_IGNORED = regex.compile(r"\p{Default_Ignorable_Code_Point}|\u0640")  # 0640 stretches Arabic words
# Hyphens and apostrophes that are symbols or letters to Unicode; marks that NFKC would spell out.
_RESPELT = {
    "\u02bc": "'",
    "\u02bb": "'",
    "\u00b4": "'",
    "\u2212": "-",
    "\u00a9": "",
    "\u00ae": "",
    "\u2120": "",
    "\u2122": "",
}
# Beside the wide marks of Chinese and Japanese: dashes; marks of Tibetan and Ethiopic.
_PARTING = frozenset("\u2014\u2e3a\u2e3b") | frozenset(
    map(chr, (*range(0xF0B, 0xF15), *range(0x1361, 0x1369)))
)


class _Spelling(dict[int, str]):
    """Character -> how it is compared; filled as characters come.

    Args:
        punctuation: whether it is kept.
    """

    def __init__(self, punctuation: bool) -> None:
        self._punctuation = punctuation

    def __missing__(self, code: int) -> str:
        character = chr(code)
        self[code] = value = self._spelt(character)
        return value

    def _spelt(self, character: str) -> str:
        if _IGNORED.match(character):
            return ""
        plain = unicodedata.normalize("NFKC", _RESPELT.get(character, character)).casefold()
        plain = "".join(str(unicodedata.decimal(each, each)) for each in plain)
        if self._punctuation:
            return plain
        kept = "".join(each for each in plain if not _is_punctuation(each))
        parts = character in _PARTING or unicodedata.east_asian_width(character) in "WF"
        return " " if parts and plain and not kept else kept


_SPELLING, _SPELLING_OF_WORDS = _Spelling(True), _Spelling(False)


def fold(text: str, *, punctuation: bool = True) -> str:
    """``text`` as it is compared: NFKC (ligatures, full-width forms), without soft hyphens, zero
    width and other invisible characters, decimal digits as 0-9, case folded.

    Args:
        text: any text.
        punctuation: ``False`` leaves it out; what stands between words without spaces, as an em
            dash or a full-width comma, becomes one.

    Source: Unicode's NFKC_Casefold (UAX #44); the digits, and what is not spelt out ("™"), are
    [ours].
    """
    if text.isascii():
        return text.lower() if punctuation else text.lower().translate(_ASCII_PUNCTUATION)
    spelling = _SPELLING if punctuation else _SPELLING_OF_WORDS
    parts = _NOT_ASCII.split(text)
    parts[1::2] = [part.translate(spelling) for part in parts[1::2]]
    parts[::2] = [fold(part, punctuation=punctuation) for part in parts[::2]]
    # Turkish İ folds to an i with a dot of its own above.
    return unicodedata.normalize("NFKC", "".join(parts)).replace("i\u0307", "i")


def words(text: str) -> list[str]:
    """The words of a text, folded, in order; punctuation parts them."""
    return _split(fold(text))


def terms(text: str) -> list[str]:
    """What a word search counts in a text: its words, and pairs of neighbouring characters where
    the script writes no spaces.
    """
    folded = fold(text)
    found = _split(folded)
    if not is_unspaced(folded):
        return found
    units = [match.span() for match in _UNIT.finditer(folded)]
    return found + [
        folded[start:end]
        for (start, stop), (begin, end) in itertools.pairwise(units)
        if stop == begin
    ]


def pieces(text: str) -> list[tuple[int, int]]:
    """Where the words of a raw text stand, punctuation included: runs without white space, cut
    between characters of scripts without spaces.
    """
    return [match.span() for match in _PIECE.finditer(text)]


def is_unspaced(text: str) -> bool:
    """Whether any character is of a script whose words do not stand between spaces."""
    return _NOT_SIMPLE.search(text) is not None and _UNIT.search(text) is not None


def parts_unspaced(text: str, at: int) -> bool:
    """Whether a text may be cut before character ``at`` though there is no white space: one of the
    two characters is of a script without spaces, and the second is no mark on the first.
    """
    if not 0 < at < len(text) or not is_unspaced(text[at - 1 : at + 1]):
        return False
    return unicodedata.category(text[at])[0] not in "MP" and unicodedata.category(
        text[at - 1]
    ) not in {"Ps", "Pi"}


def _split(folded: str) -> list[str]:
    return (_WORD if _NOT_SIMPLE.search(folded) else _SIMPLE_WORD).findall(folded)


def _is_punctuation(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character).startswith("P")
