"""What the base reads in pre-training: made-up facts, sentences with a hole, and real questions on short windows.

Real text comes from a folder of gzipped JSON lines (``wiki_pool``, ``squad``, ``nq``, ``popqa``; train questions only).
It is used for training and not shipped.
"""

from __future__ import annotations

import gzip
import json
import random
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from invar_ray.errors import DataError
from invar_ray.pretraining.copying import CopyingTasks
from invar_ray.text.prompts import INSTRUCTION, REFUSAL, format_answer_prompt, format_target

_SENTENCE_END = re.compile(r'(?<=[.!?])\s+(?=[A-Z0-9"])')
_NAME = re.compile(r"\b[A-Z][\w'’-]+(?:\s+(?:of|the|de|and)?\s*[A-Z][\w'’-]+){0,3}\b")
_YEAR = re.compile(r"\b(?:1\d{3}|20[0-2]\d)\b")
_NUMBER = re.compile(r"\b\d+(?:[.,]\d+)*\b")
_LONGEST_ANSWER = 8  # words
_LOOSE = (
    f"Answer the question with a passage below. If none answers it, say: {REFUSAL}",
    "Answer the question.",
    "Read the passages and answer the question.",
    "",
)
_HELD_TITLES = 20


@dataclass(frozen=True)
class Asked:
    """A question on a text."""

    question: str
    title: str
    text: str
    answer: str


@dataclass
class Item:
    """A prompt with one or more answers.

    Attributes:
        parts: prompt, target, and so on: (text, target) pairs that follow each other.
        answer: the first answer, without its citation; ``None`` for a refusal.
    """

    parts: list[tuple[str, str]]
    answer: str | None


@dataclass
class _Draft:
    passages: list[tuple[str, str]]
    asked: list[tuple[str, str, int]]
    refuse: bool = False
    numbered: bool = True
    instruction: str = field(default="")


class ReadingMixture:
    """Draws :class:`Item` after :class:`Item`.

    Args:
        folder: with the data sets.
        seed: which articles of SQuAD are held out.

    Raises:
        DataError: if a file is missing.
    """

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.wiki = _rows(folder / "wiki_pool" / "corpus.jsonl.gz")
        names = {row["title"] for row in self.wiki}
        for row in self.wiki[::5]:
            names.update(_NAME.findall(row["text"][20:]))  # a first word is capitalised for another reason
        self.tasks = CopyingTasks(sorted(name for name in names if 3 < len(name) < 28 and name[0].isupper()))
        squad = _asked(folder / "squad")
        held_titles = sorted({item.title for item in squad})
        random.Random(seed).shuffle(held_titles)
        held = set(held_titles[:_HELD_TITLES])
        self.held = [item for item in squad if item.title in held]
        """SQuAD train questions on articles that are never trained on."""
        self.squad = [item for item in squad if item.title not in held]
        self.others = _asked(folder / "nq") + _asked(folder / "popqa")
        self._siblings: dict[str, list[Asked]] = defaultdict(list)
        self._texts: dict[str, list[str]] = defaultdict(list)
        for item in self.squad:
            self._siblings[item.text].append(item)
            self._texts[item.title].append(item.text)

    def copying(self, rng: random.Random, level: int) -> Item:
        """Made-up facts, without an instruction."""
        task = self.tasks.make(rng, level)
        draft = _Draft(task.passages, task.asked, numbered=rng.random() < 0.75)
        return _write(draft, cite=draft.numbered and rng.random() < 0.15)

    def draw(self, rng: random.Random, progress: float, made_up: float | None = None) -> Item:
        """The mixture: with ``progress`` (0 to 1) less made-up text, longer windows, and more often the very prompt
        of :func:`invar_ray.text.prompts.format_answer_prompt`.

        Args:
            rng: where its choices come from.
            progress: of the training.
            made_up: share of made-up text, if it shall not follow from ``progress``.
        """
        exact = rng.random() < 0.05 + 0.4 * progress
        loose = rng.choice(_LOOSE) if rng.random() < progress else rng.choice(_LOOSE[1:])
        kind = rng.random()
        made_up = 0.6 - 0.25 * progress if made_up is None else made_up
        if kind < made_up:
            draft = self._made_up(rng, progress)
        else:
            length = rng.choice((20, 35, 50, 70) if progress < 0.6 else (25, 45, 70, 100))
            if kind < made_up + 0.3 * (1 - made_up):
                draft = self._around(rng, self._cloze(rng, length), [], length)
            else:
                item, window = self._windowed(rng, self.squad if rng.random() < 0.9 else self.others, length)
                more = [other for other in self._siblings[item.text] if other is not item and other.answer in window]
                rng.shuffle(more)
                draft = self._around(rng, Asked(item.question, item.title, window, item.answer), more[:6], length)
        draft.numbered = exact or rng.random() < 0.75
        draft.instruction = INSTRUCTION if exact else loose
        if draft.refuse and REFUSAL not in draft.instruction:
            draft.instruction = rng.choice((INSTRUCTION, _LOOSE[0]))
        cite = draft.numbered and (draft.instruction == INSTRUCTION or rng.random() < 0.15)
        return _write(draft, cite)

    def text(self, rng: random.Random) -> str:
        """A passage for language modelling."""
        row = rng.choice(self.wiki)
        return f"{row['title']}: {row['text']}"

    def pair(self, rng: random.Random) -> tuple[str, str]:
        """A question and a passage about it, for alignment."""
        kind = rng.random()
        if kind < 0.15:
            task = self.tasks.make(rng, 1)
            question, _, place = task.asked[0]
            title, text = task.passages[place]
            return question, f"{title} {text}"
        item, window = self._windowed(rng, self.squad if kind < 0.85 else self.others, 30)
        return item.question, f"{item.title} {window}"

    def _made_up(self, rng: random.Random, progress: float) -> _Draft:
        task = self.tasks.make(rng, 1 if progress < 0.4 else 2)
        passages, asked, refuse = task.passages, task.asked, False
        if len(passages) > 1 and rng.random() < 0.08:
            gone = asked[0][2]
            refuse = True
            passages = passages[:gone] + passages[gone + 1 :]
            kept = [(question, answer, place - (place > gone)) for question, answer, place in asked if place != gone]
            asked = [asked[0], *kept]
        return _Draft(passages, asked, refuse)

    def _around(self, rng: random.Random, item: Asked, more: list[Asked], length: int) -> _Draft:
        """The passage of ``item`` among others that do not hold its answer."""
        count = rng.choice((1, 1, 2, 3))
        count = min(count, 2) if length > 60 else count
        gold = (item.title, item.text)
        passages = [gold]
        for _ in range(count - 1):
            other = self._distractor(rng, item, min(length, 40))
            if other:
                passages.append(other)
        refuse = len(passages) > 1 and rng.random() < 0.08
        if refuse:
            passages = passages[1:]
        rng.shuffle(passages)
        place = 0 if refuse else passages.index(gold)
        if rng.random() < 0.15:
            passages = [("", text) for _, text in passages]
        rest = [] if refuse else [(other.question, other.answer, place) for other in more]
        return _Draft(passages, [(item.question, item.answer, place), *rest], refuse)

    def _windowed(self, rng: random.Random, pool: list[Asked], length: int) -> tuple[Asked, str]:
        while True:
            item = rng.choice(pool)
            window = _window(rng, item.text, item.answer, length)
            if window:
                return item, window

    def _cloze(self, rng: random.Random, length: int) -> Asked:
        """A sentence with "what" for one of its names or numbers, some of its words left out."""
        while True:
            row = rng.choice(self.wiki)
            sentences = [one for one in _SENTENCE_END.split(row["text"]) if 8 <= len(one.split()) <= 35]
            if not sentences:
                continue
            sentence = rng.choice(sentences)
            holes = [(match, "which year") for match in _YEAR.finditer(sentence)]
            holes += [(match, "what") for match in _NAME.finditer(sentence) if match.start()]
            holes += [(match, "how many") for match in _NUMBER.finditer(sentence)]
            if not holes:
                continue
            hole, word = rng.choice(holes)
            before = [one for one in sentence[: hole.start()].split()[-8:] if rng.random() > 0.25]
            after = [one for one in sentence[hole.end() :].split()[:8] if rng.random() > 0.25]
            question = " ".join([*before, word if rng.random() < 0.6 else "what", *after]).rstrip(".,;") + "?"
            if len(before) + len(after) < 4 or hole.group().lower() in question.lower():
                continue
            window = _window(rng, row["text"], hole.group(), length)
            text = window if window and sentence[:30] in window else sentence
            return Asked(question[:1].upper() + question[1:], row["title"], text, hole.group())

    def _distractor(self, rng: random.Random, item: Asked, length: int) -> tuple[str, str] | None:
        for _ in range(10):
            if item.title in self._texts and rng.random() < 0.5:
                title, text = item.title, rng.choice(self._texts[item.title])
            else:
                row = rng.choice(self.wiki)
                title, text = row["title"], row["text"]
            sentences = _SENTENCE_END.split(text)
            chosen: list[str] = []
            for sentence in sentences[rng.randrange(len(sentences)) :]:
                if chosen and len(" ".join([*chosen, sentence]).split()) > length:
                    break
                chosen.append(sentence)
            shown = " ".join(chosen)
            if item.answer.lower() not in shown.lower() and len(shown.split()) < 1.5 * length:
                return title, shown
        return None


def _write(draft: _Draft, cite: bool) -> Item:
    parts = []
    for number, (question, answer, place) in enumerate(draft.asked):
        refused = draft.refuse and number == 0
        target = REFUSAL if refused else format_target(answer, place + 1 if cite else None)
        if number:
            text = f"\n\nQuestion: {question}\nAnswer:"
        else:
            text = format_answer_prompt(question, draft.passages).removeprefix(INSTRUCTION).lstrip()
            if not draft.numbered:
                text = re.sub(r"^\[\d+\] ", "", text, flags=re.MULTILINE)
            text = f"{draft.instruction}\n\n{text}" if draft.instruction else text
        parts.append((text, f" {target}"))
    return Item(parts, None if draft.refuse else draft.asked[0][1])


def _window(rng: random.Random, text: str, answer: str, length: int) -> str | None:
    """Whole sentences around one that holds the answer, at most ``length`` words (one sentence: 1.6 times that)."""
    sentences = _SENTENCE_END.split(text)
    holding = [index for index, sentence in enumerate(sentences) if answer in sentence]
    if not holding:
        return None
    first = last = rng.choice(holding)
    while first > 0 or last < len(sentences) - 1:
        left = first > 0 and (last == len(sentences) - 1 or rng.random() < 0.5)
        wider = (first - 1, last) if left else (first, last + 1)
        if len(" ".join(sentences[wider[0] : wider[1] + 1]).split()) > length:
            break
        first, last = wider
    window = " ".join(sentences[first : last + 1])
    return window if len(window.split()) <= 1.6 * length else None


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") as stream:
            return [json.loads(line) for line in stream]
    except OSError as error:
        raise DataError(
            f"cannot read {path} ({error.strerror or error})",
            expected="a folder with wiki_pool/, squad/, nq/ and popqa/ of gzipped JSON lines",
            action="name it with --data",
        ) from error


def _asked(folder: Path) -> list[Asked]:
    texts = {row["id"]: row for row in _rows(folder / "corpus.jsonl.gz")}
    found = []
    for row in _rows(folder / "questions-train.jsonl.gz"):
        document = texts[row["positive_ids"][0]]
        answer = next((one for one in row["answers"] if one in document["text"]), None)
        if answer and row["question"].strip() and len(answer.split()) <= _LONGEST_ANSWER:
            found.append(Asked(row["question"].strip(), document["title"], document["text"], answer))
    return found
