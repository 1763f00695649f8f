"""Other cuts of a document around an indexed passage: the window half of an environment."""

from __future__ import annotations

import random
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from invar_ray.schema import Document, Window
from invar_ray.text.answers import find_answer
from invar_ray.text.sentences import sentence_starts
from invar_ray.text.stable import stable_random
from invar_ray.text.words import parts_unspaced, pieces

# [ours] A cut has at least this many words and this share of the anchor's; more text than that
# still shows the topic.
_MIN_WORDS = 5
_MIN_SHARE = 0.25
_DRAWS = 24


@dataclass(frozen=True)
class _Scene:
    """Word borders of the part of the document around the anchor; word indices
    ``first <= anchor < last``.
    """

    text: str
    words: list[tuple[int, int]]
    first: int
    last: int
    starts: list[int]
    answer: tuple[int, int] | None
    shortest: int

    @property
    def size(self) -> int:
        return self.last - self.first


def resize_windows(
    document: Document, start: int, end: int, answers: Sequence[str], count: int, seed: int
) -> list[Window]:
    """Cut a document otherwise around the anchor cut ``document.text[start:end]``.

    Kinds take turns (which comes first depends on seed, document and place): ``shorter`` (40-80 %
    of the anchor's words, inside it), ``longer`` (120-200 %, around it) and ``shifted`` (same size,
    moved by 25-50 %, over it in part). Edges are moved to the nearest sentence border within an
    eighth of the anchor's size, else they are word borders. No cut equals the anchor or another
    cut.  If the anchor holds one of ``answers``, so does every cut.

    Rule for fewer: a cut has at least 5 words and a quarter of the anchor's, so a short anchor with
    nothing around it (the document *is* the anchor span) has few cuts or none, of the kind
    ``shorter`` only.  Where a kind is impossible its turn goes to the next.

    Args:
        document: the document.
        start, end: the anchor's character offsets, half open.
        answers: gold answers; may be empty.
        count: how many cuts to make.
        seed: part of the draw, with the document's id and the offsets; the same arguments give the
            same windows.

    Returns:
        At most ``count`` windows, numbered from 1 without gaps.

    Raises:
        ValueError: the offsets are not a span of the text.
    """
    if not 0 <= start < end <= len(document.text):
        raise ValueError(f"span {start}:{end} of a text of {len(document.text)} characters")
    scene = _scene(document.text, start, end, answers)
    if scene is None:
        return []
    generator = stable_random("windows", seed, document.id, start, end)
    kinds: list[tuple[str, Callable[[_Scene, random.Random], tuple[int, int] | None]]]
    kinds = [("shorter", _shorter), ("longer", _longer), ("shifted", _shifted)]
    turn = generator.randrange(len(kinds))
    taken = {document.text[start:end].strip()}
    windows: list[Window] = []
    idle = 0
    while len(windows) < count and idle < len(kinds):
        kind, draw = kinds[turn % len(kinds)]
        turn += 1
        cut = _first_valid(scene, draw, generator, answers, taken)
        if cut is None and kind == "shorter":
            cut = _any_shorter(scene, answers, taken)
        if cut is None:
            idle += 1
            continue
        idle = 0
        taken.add(document.text[cut[0] : cut[1]])
        windows.append(Window(document.id, len(windows) + 1, cut[0], cut[1], kind))
    return windows


def _scene(text: str, start: int, end: int, answers: Sequence[str]) -> _Scene | None:
    reach = 2 * (end - start) + 200  # no cut goes further; keeps a long document cheap
    low, high = max(0, start - reach), min(len(text), end + reach)
    while low > 0 and not text[low - 1].isspace() and not parts_unspaced(text, low):
        low -= 1
    while high < len(text) and not text[high].isspace() and not parts_unspaced(text, high):
        high += 1
    words = [(low + begin, low + stop) for begin, stop in pieces(text[low:high])]
    first = bisect_right([stop for _, stop in words], start)
    last = bisect_left([begin for begin, _ in words], end)
    if first >= last:
        return None
    found = find_answer(text[start:end], answers)
    answer = None
    if found is not None:
        answer = (
            bisect_right([stop for _, stop in words], start + found[0]),
            bisect_left([begin for begin, _ in words], start + found[1]),
        )
    starts = [begin + low for begin in sentence_starts(text[low:high])]
    shortest = max(_MIN_WORDS, round(_MIN_SHARE * (last - first)))
    return _Scene(text, words, first, last, starts, answer, shortest)


def _first_valid(
    scene: _Scene,
    draw: Callable[[_Scene, random.Random], tuple[int, int] | None],
    generator: random.Random,
    answers: Sequence[str],
    taken: set[str],
) -> tuple[int, int] | None:
    for _ in range(_DRAWS):
        drawn = draw(scene, generator)
        if drawn is None:
            return None
        # on sentence borders if that keeps what must be kept
        for cut in (
            _snap(scene, *drawn),
            drawn,
        ):
            span = _checked(scene, cut, answers, taken)
            if span is not None:
                return span
    return None


def _any_shorter(scene: _Scene, answers: Sequence[str], taken: set[str]) -> tuple[int, int] | None:
    """The longest sub-cut that is still free: the draws can all lose the answer or fall on a cut
    that exists.
    """
    for drop in range(1, scene.size - scene.shortest + 1):
        for cut in ((scene.first + drop, scene.last), (scene.first, scene.last - drop)):
            span = _checked(scene, cut, answers, taken)
            if span is not None:
                return span
    return None


def _checked(
    scene: _Scene, cut: tuple[int, int], answers: Sequence[str], taken: set[str]
) -> tuple[int, int] | None:
    low, high = cut
    if high - low < scene.shortest:
        return None
    span = scene.words[low][0], scene.words[high - 1][1]
    text = scene.text[span[0] : span[1]]
    if text in taken:
        return None
    if scene.answer is not None and not low <= scene.answer[0] < scene.answer[1] <= high:
        # perhaps it holds another occurrence
        return span if find_answer(text, answers) is not None else None
    return span


def _shorter(scene: _Scene, generator: random.Random) -> tuple[int, int] | None:
    size = max(scene.shortest, round(scene.size * generator.uniform(0.4, 0.8)))
    earliest, latest = scene.first, scene.last - size
    if scene.answer is not None:
        size = max(size, scene.answer[1] - scene.answer[0])
        earliest = max(scene.first, scene.answer[1] - size)
        latest = min(scene.last - size, scene.answer[0])
    if size >= scene.size or earliest > latest:
        return None if scene.size <= scene.shortest else (scene.first, scene.last)
    low = generator.randint(earliest, latest)
    return low, low + size


def _longer(scene: _Scene, generator: random.Random) -> tuple[int, int] | None:
    before, after = scene.first, len(scene.words) - scene.last
    if before + after == 0:
        return None
    more = max(1, round(scene.size * generator.uniform(0.2, 1.0)))
    ahead = min(before, round(more * generator.random()))
    behind = min(after, more - ahead)
    ahead = min(before, more - behind)  # what one side lacks, the other gives
    return scene.first - ahead, scene.last + behind


def _shifted(scene: _Scene, generator: random.Random) -> tuple[int, int] | None:
    by = max(1, round(scene.size * generator.uniform(0.25, 0.5)))
    left = min(by, scene.first)
    right = min(by, len(scene.words) - scene.last)
    if scene.answer is not None:
        left = min(left, max(0, scene.last - scene.answer[1]))
        right = min(right, max(0, scene.answer[0] - scene.first))
    moves = [-left] * (left > 0) + [right] * (right > 0)
    if not moves:
        return None
    move = generator.choice(moves)
    return scene.first + move, scene.last + move


def _snap(scene: _Scene, low: int, high: int) -> tuple[int, int]:
    tolerance = max(1, scene.size // 8)
    if low != scene.first:
        low = _nearest_start(scene, low, tolerance)
    if high != scene.last:
        high = _nearest_start(scene, high, tolerance)
    return low, high


def _nearest_start(scene: _Scene, index: int, tolerance: int) -> int:
    if index >= len(scene.words):
        return index  # the end of the text
    starts = set(scene.starts)
    fitting = [
        near
        for near in range(
            max(0, index - tolerance), min(len(scene.words) - 1, index + tolerance) + 1
        )
        if scene.words[near][0] in starts
    ]
    return min(fitting, key=lambda near: (abs(near - index), near), default=index)
