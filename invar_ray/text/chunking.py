"""Documents into passages: by tokens, at sentence ends where there are any, with exact character
offsets.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

from invar_ray.schema import Document, Passage
from invar_ray.text.places import PlaceFinder
from invar_ray.text.sentences import sentence_starts, skip_space
from invar_ray.text.tokens import token_starts
from invar_ray.text.words import parts_unspaced

# A sentence longer than the window is cut at once if what stands before it fills less than this
# part. [ours]
_SENTENCE_PART = 1 / 3
# An overlap may grow to this many times its length to start with a sentence. [ours]
_OVERLAP_PART = 2
# A page or heading that starts beyond this part of the window ends it, so that a passage is of one
# place. [ours]
_PLACE_PART = 1 / 4
# Where a script writes no spaces: white space in this last part of a window is the better cut.
# [ours]
_SPACE_PART = 1 / 4
_SLICE_CHARS = 1_000_000


def chunk_document(
    document: Document, tokenizer: Any, *, tokens: int, stride: int
) -> list[Passage]:
    """Cut a document into passages of at most ``tokens`` tokens.

    A passage ends where a page or section of the document starts, if its window is a quarter full
    by then; else at the last sentence end in the window; else, inside a sentence longer than the
    window, between words (characters, where a script writes no spaces), else between tokens.  Every
    character but white space around passages is in some passage, and
    ``document.text[p.start:p.end] == p.text``.  With
    ``stride < tokens`` neighbours share about ``tokens - stride`` tokens, from the start of a
    sentence on: up to twice as many, or none where the sentence before the border is longer than
    that; inside a sentence longer than the window from a word border on.

    Args:
        document: an empty (or blank) text gives no passages.
        tokenizer: a Hugging Face *fast* tokenizer (offset mappings are needed); special tokens and
            the title do not count.  A passage cut inside a word can come out a token longer when it
            is tokenised by itself.
        tokens: longest passage, in tokens.
        stride: tokens between the starts of neighbours, at most ``tokens``; less overlap where no
            sentence starts.

    Returns:
        Passages in text order.  The id is ``<document id>:<start>-<end>:<hash of title and text>``.

    Raises:
        ValueError: ``tokens`` or ``stride`` is out of range, or the tokenizer is not a fast one.
    """
    if tokens < 1 or not 1 <= stride <= tokens:
        raise ValueError(f"tokens={tokens}, stride={stride}: expected 1 <= stride <= tokens")
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} has no offset mapping: expected a fast tokenizer"
        )
    text = document.text
    if not text.strip():
        return []
    spans = _token_windows(
        _borders(text, tokenizer), text, tokens, stride, [place.start for place in document.places]
    )
    kept: list[tuple[int, int]] = []
    for span in spans:
        start, end = _trimmed(text, *span)
        if start == end or (kept and end <= kept[-1][1]):
            # White space alone, or inside its neighbour once trimmed (tokens of white space in an
            # overlap).
            continue
        if kept and start == kept[-1][0]:
            kept.pop()
        kept.append((start, end))
    return passages_at(document, kept)


def passages_at(document: Document, spans: Sequence[tuple[int, int]]) -> list[Passage]:
    """The passages of a document that was cut before, from where they start and end: no tokenizer
    is needed.
    """
    places = PlaceFinder(document)
    return [_passage(document, start, end, places.of(start, end)) for start, end in spans]


def passage_id(document_id: str, title: str, text: str, start: int, end: int) -> str:
    """The id of a passage: where it is, and a hash of what is embedded, so that any edit gives a
    new id.
    """
    digest = hashlib.sha256(f"{title}\n{text}".encode("utf-8", "surrogatepass")).hexdigest()
    return f"{document_id}:{start}-{end}:{digest[:8]}"


def _borders(text: str, tokenizer: Any) -> list[int]:
    """Character offset at which each token starts, then ``len(text)``; never falling.  The first is
    0.
    """
    borders = [0]
    for begin, stop in _slices(text):
        for start in token_starts(tokenizer, text[begin:stop])[1 if begin == 0 else 0 :]:
            # Characters that the tokenizer drops lie between two offsets; starting each piece where
            # the one before ended keeps them in a passage.  Byte-level tokens of one character
            # share its offset.
            borders.append(max(borders[-1], min(begin + start, stop)))
    borders.append(len(text))
    return borders


def _slices(text: str) -> Iterator[tuple[int, int]]:
    """The text in parts of some million characters, cut at white space: a tokenizer needs about 200
    bytes of memory a character.
    """
    begin = 0
    while len(text) - begin > _SLICE_CHARS:
        space = max(text.rfind(mark, begin + 1, begin + _SLICE_CHARS) for mark in (" ", "\n"))
        stop = space if space > 0 else begin + _SLICE_CHARS
        yield begin, stop
        begin = stop
    yield begin, len(text)


def _token_windows(
    borders: list[int], text: str, tokens: int, stride: int, place_starts: list[int]
) -> list[tuple[int, int]]:
    last = len(borders) - 1
    places = sorted(
        {bisect.bisect_left(borders, start) for start in place_starts} - {0, last, last + 1}
    )
    sentences = _sentence_borders(borders, text)
    whole = set(sentences)

    def spaced(index: int) -> bool:
        at = borders[index]
        return at in (0, len(text)) or text[at - 1].isspace() or text[at].isspace()

    def between_words(index: int) -> bool:
        return spaced(index) or parts_unspaced(text, borders[index])

    def window_end(begin: int) -> int:
        limit = begin + tokens
        at = bisect.bisect_left(places, begin + max(1, round(tokens * _PLACE_PART)))
        if at < len(places) and places[at] <= limit:
            return places[at]
        if limit >= last:
            return last
        at = bisect.bisect_right(sentences, limit)
        if at and borders[sentences[at - 1]] > borders[begin]:
            end, following = sentences[at - 1], sentences[at] if at < len(sentences) else last
            if end - begin >= tokens * _SENTENCE_PART or following - end <= tokens:
                return end
        # White space first, as Thai has it between phrases; a character's end if it is far off.
        for index in range(limit, limit - round(tokens * _SPACE_PART), -1):
            if spaced(index) and borders[index] > borders[begin]:
                return index
        for index in range(limit, begin, -1):
            if between_words(index) and borders[index] > borders[begin]:
                return index
        # one character of many byte-level tokens
        while limit < last and borders[limit] == borders[begin]:
            limit += 1
        return limit

    def next_begin(begin: int, end: int) -> int:
        wanted = end - (tokens - stride)
        if end in whole:
            earliest = max(begin + 1, end - _OVERLAP_PART * (tokens - stride))
            near = sentences[
                bisect.bisect_left(sentences, earliest) : bisect.bisect_left(sentences, end)
            ]
            near = [index for index in near if borders[index] > borders[begin]]
            # the last one at or before the place wanted, else the first after it, else no overlap
            before = [index for index in near if index <= wanted]
            return before[-1] if before else near[0] if near else end
        # Not before the sentence that is cut: the one in front of it fits, and stays whole.
        at = bisect.bisect_left(sentences, end)
        wanted = max(wanted, sentences[at - 1] if at else 0)
        for index in range(wanted, begin, -1):
            if between_words(index) and borders[index] > borders[begin]:
                return index
        for index in range(max(wanted, begin + 1), end):
            if between_words(index) and borders[index] > borders[begin]:
                return index
        return end

    spans: list[tuple[int, int]] = []
    begin = 0
    while True:
        end = window_end(begin)
        spans.append((borders[begin], borders[end]))
        if end >= last:
            return spans
        begin = next_begin(begin, end) if stride < tokens else end


def _sentence_borders(borders: list[int], text: str) -> list[int]:
    """Indices of the tokens that sentences start with (or with the white space before them),
    ascending.
    """
    found = []
    for start in sentence_starts(text):
        index = bisect.bisect_left(borders, start)
        if borders[index] != start:
            index -= 1  # byte-level tokenizers glue the space to the word
        at = borders[index]
        if (at in (0, start) or text[at].isspace()) and skip_space(text, at) == start:
            found.append(index)
    return found


def _trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    piece = text[start:end]
    start += len(piece) - len(piece.lstrip())
    return start, start + len(piece.strip())


def _passage(document: Document, start: int, end: int, place: str) -> Passage:
    text = document.text[start:end]
    return Passage(
        id=passage_id(document.id, document.title, text, start, end),
        document_id=document.id,
        title=document.title,
        text=text,
        start=start,
        end=end,
        uri=document.uri,
        place=place,
        metadata=document.metadata,
    )
