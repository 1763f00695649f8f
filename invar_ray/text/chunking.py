"""Documents into passages: by tokens, at sentence ends where there are any, with exact character offsets."""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Iterator
from typing import Any

from invar_ray.schema import Document, Passage
from invar_ray.text.places import PlaceFinder
from invar_ray.text.sentences import sentence_starts, skip_space

# A sentence end in the last third of the window is taken; an earlier one would waste too much of it. [ours]
_SENTENCE_PART = 1 / 3
# A page or heading that starts beyond this part of the window ends it, so that a passage is of one place. [ours]
_PLACE_PART = 1 / 4
_SLICE_CHARS = 1_000_000


def chunk_document(document: Document, tokenizer: Any, *, tokens: int, stride: int) -> list[Passage]:
    """Cut a document into passages of at most ``tokens`` tokens.

    A passage ends where a page or section of the document starts, if its window is a quarter full by then; else at a
    sentence end if one lies in the last third of the window, else between words, else (no white space at all) between
    tokens.  Every character but white space around passages is in some passage, and
    ``document.text[p.start:p.end] == p.text``.  With ``stride < tokens`` neighbours share about ``tokens - stride``
    tokens, from a word border on.

    Args:
        document: an empty (or blank) text gives no passages.
        tokenizer: a Hugging Face *fast* tokenizer (offset mappings are needed); special tokens and the title do not
            count.  A passage cut inside a word can come out a token longer when it is tokenised by itself.
        tokens: longest passage, in tokens.
        stride: most tokens between the starts of neighbours; at most ``tokens``.

    Returns:
        Passages in text order.  The id is ``<document id>:<start>-<end>:<hash of title and text>``.

    Raises:
        ValueError: ``tokens`` or ``stride`` is out of range, or the tokenizer is not a fast one.
    """
    if tokens < 1 or not 1 <= stride <= tokens:
        raise ValueError(f"tokens={tokens}, stride={stride}: expected 1 <= stride <= tokens")
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{type(tokenizer).__name__} has no offset mapping: expected a fast tokenizer")
    text = document.text
    if not text.strip():
        return []
    spans = _token_windows(_borders(text, tokenizer), text, tokens, stride, [place.start for place in document.places])
    kept: list[tuple[int, int]] = []
    for span in spans:
        start, end = _trimmed(text, *span)
        if start == end or (kept and end <= kept[-1][1]):
            continue  # white space alone, or inside its neighbour once trimmed (tokens of white space in an overlap)
        if kept and start == kept[-1][0]:
            kept.pop()
        kept.append((start, end))
    places = PlaceFinder(document)
    return [_passage(document, start, end, places.of(start, end)) for start, end in kept]


def passage_id(document_id: str, title: str, text: str, start: int, end: int) -> str:
    """The id of a passage: where it is, and a hash of what is embedded, so that any edit gives a new id."""
    digest = hashlib.sha256(f"{title}\n{text}".encode("utf-8", "surrogatepass")).hexdigest()
    return f"{document_id}:{start}-{end}:{digest[:8]}"


def _borders(text: str, tokenizer: Any) -> list[int]:
    """Character offset at which each token starts, then ``len(text)``; never falling.  The first is 0."""
    borders = [0]
    for begin, stop in _slices(text):
        # verbose=False: no warning that a whole document is longer than the model's context, it is cut right after.
        encoded = tokenizer(text[begin:stop], add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        for start, _ in encoded["offset_mapping"][1 if begin == 0 else 0 :]:
            # Characters that the tokenizer drops lie between two offsets; starting each piece where the one before
            # ended keeps them in a passage.  Byte-level tokens of one character share its offset.
            borders.append(max(borders[-1], min(begin + start, stop)))
    borders.append(len(text))
    return borders


def _slices(text: str) -> Iterator[tuple[int, int]]:
    """The text in parts of some million characters, cut at white space: a tokenizer needs about 200 bytes of memory a
    character.
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
    places = sorted({bisect.bisect_left(borders, start) for start in place_starts} - {0, last, last + 1})
    starts = set(sentence_starts(text))

    def between_words(index: int) -> bool:
        at = borders[index]
        return at in (0, len(text)) or text[at - 1].isspace() or text[at].isspace()

    def between_sentences(index: int) -> bool:
        return between_words(index) and skip_space(text, borders[index]) in starts

    def window_end(begin: int) -> int:
        limit = begin + tokens
        at = bisect.bisect_left(places, begin + max(1, round(tokens * _PLACE_PART)))
        if at < len(places) and places[at] <= limit:
            return places[at]
        if limit >= last:
            return last
        earliest = begin + max(1, round(tokens * (1 - _SENTENCE_PART)))
        for index in range(limit, earliest - 1, -1):
            if between_sentences(index):
                return index
        for index in range(limit, begin, -1):
            if between_words(index) and borders[index] > borders[begin]:
                return index
        while limit < last and borders[limit] == borders[begin]:  # one character of many byte-level tokens
            limit += 1
        return limit

    def next_begin(begin: int, end: int) -> int:
        wanted = end - (tokens - stride)
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
    )
