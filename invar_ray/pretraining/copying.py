"""Made-up facts about made-up subjects: nothing can be known beforehand, so the only way to answer is to read.

The sentences are ``relations.yaml``.  Names are syllables put together, or names given from outside (article titles),
so that common words have to be copied as well as rare pieces.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

_ONSETS = "b bl br c ch d dr f fl g gr h j k kl l m n p pl pr qu r s sh sl st t th tr v w z".split()
_VOWELS = "a e i o u ai au ea ei ia ie io oa oo ou".split()
_CODAS = ("", "", "", "", "n", "l", "r", "s", "m", "t", "nd", "rk", "x", "ck", "lt", "ng")
_MONTHS = "January February March April May June July August September October November December".split()
_PRONOUNS = ("It", "It", "This", "He", "She", "The same")


@dataclass(frozen=True)
class Reading:
    """Passages, questions on them, and where their answers stand.

    Attributes:
        passages: (title, text).
        asked: (question, answer, index of its passage), the one to be asked first in front.
    """

    passages: list[tuple[str, str]]
    asked: list[tuple[str, str, int]]


@dataclass(frozen=True)
class _Relation:
    value: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]


@dataclass(frozen=True)
class _Clue:
    """A fact that asks for its subject."""

    statement: str
    questions: list[str]


class CopyingTasks:
    """Makes :class:`Reading` tasks.

    Args:
        names: real names to use beside made-up ones.
    """

    def __init__(self, names: Sequence[str] = ()) -> None:
        self.names = list(names)

    def make(self, rng: random.Random, level: int) -> Reading:
        """A task.

        Args:
            rng: where its choices come from.
            level: 0 is one passage of one or two facts; 1 up to three passages; 2 up to four, of up to five facts.
        """
        num_passages = 1 if level == 0 else rng.choice((1, 2, 3) if level == 1 else (1, 2, 3, 3, 4))
        num_facts = rng.choice((1, 2)) if level == 0 else rng.choice((1, 2, 3, 4) if level == 1 else (1, 2, 3, 4, 5))
        num_facts = min(num_facts, 10 // num_passages)
        subjects: list[str] = []
        while len(subjects) < num_passages:
            subject = self._name(rng) if rng.random() < 0.6 else self._person(rng)
            subject = f"the {subject}" if rng.random() < 0.15 else subject
            if subject not in subjects:
                subjects.append(subject)
        shared = rng.sample(_relations(), num_facts)
        facts: list[list[tuple[_Relation, str]]] = []
        clues: list[_Clue | None] = []
        for _ in subjects:
            chosen = list(shared) if rng.random() < 0.6 else rng.sample(_relations(), num_facts)
            rng.shuffle(chosen)
            facts.append([(relation, self._value(rng, relation.value)) for relation in chosen])
            clues.append(self._clue(rng) if level and rng.random() < 0.35 else None)
        passages = []
        for subject, told, clue in zip(subjects, facts, clues, strict=True):
            others = [other for other in subjects if other != subject]
            passages.append((_capital(subject), self._text(rng, subject, told, clue, others)))
        asked: list[tuple[str, str, int]] = []
        for _ in range(3 if level == 0 else 8):  # more questions on one text cost little and teach as much
            place = rng.randrange(num_passages)
            clue = clues[place]
            if clue and rng.random() < 0.4:
                question, value = rng.choice(clue.questions), subjects[place].removeprefix("the ")
            else:
                relation, value = rng.choice(facts[place])
                question = rng.choice(relation.questions).format(s=subjects[place])
            question = _capital(question)
            if rng.random() < 0.2:
                question = rng.choice(_spec()["frames"]).format(q=question)
            if question not in {other for other, _, _ in asked}:
                asked.append((question, value, place))
        return Reading(passages, asked)

    def _text(
        self,
        rng: random.Random,
        subject: str,
        told: list[tuple[_Relation, str]],
        clue: _Clue | None,
        others: list[str],
    ) -> str:
        sentences = []
        for number, (relation, value) in enumerate(told):
            statement = rng.choice(relation.statements)
            named = subject
            if number and statement.startswith("{s} ") and rng.random() < 0.6:
                named = rng.choice(_PRONOUNS)
            sentences.append(_dressed(rng, _capital(statement.format(s=named, v=value))))
            if rng.random() < 0.25:
                sentences.append(rng.choice(_spec()["fillers"]).format(o=self._name(rng)))
        if clue:
            sentences.insert(rng.randint(1, len(sentences)), clue.statement)
        if others and rng.random() < 0.4:
            # Passages that name each other's subjects: the right one is not just the one that holds the name.
            neighbour = rng.choice(_spec()["neighbours"]).format(o=rng.choice(others), p=self._name(rng))
            sentences.insert(rng.randint(1, len(sentences)), _capital(neighbour))
        return " ".join(sentences)

    def _clue(self, rng: random.Random) -> _Clue:
        spec = rng.choice(_spec()["clues"])
        parts = {name: rng.choice(values) for name, values in (_spec()["values"] | _spec()["parts"]).items()}
        parts |= {"person": self._person(rng), "place": self._name(rng)}
        return _Clue(
            _capital(rng.choice(spec["statements"]).format(**parts)),
            [text.format(**parts) for text in spec["questions"]],
        )

    def _name(self, rng: random.Random) -> str:
        if self.names and rng.random() < 0.8:
            return rng.choice(self.names)
        return " ".join(_word(rng) for _ in range(rng.choice((1, 1, 2))))

    def _person(self, rng: random.Random) -> str:
        if self.names and rng.random() < 0.5:
            return rng.choice(self.names)
        return f"{_word(rng)} {_word(rng)}"

    def _value(self, rng: random.Random, kind: str) -> str:
        if kind == "year":
            return str(rng.randint(1200, 2020))
        if kind == "num":
            thousands = f"{rng.randint(1, 99)},{rng.randint(0, 999):03d}"
            fraction = f"{rng.randint(1, 99)}.{rng.randint(0, 9)}"
            return rng.choice((str(rng.randint(2, 99)), thousands, fraction, str(rng.randint(100, 9999))))
        if kind == "person":
            return self._person(rng)
        if kind == "place":
            return self._name(rng)
        if kind == "date":
            return f"{rng.choice(_MONTHS)} {rng.randint(1, 28)}, {rng.randint(1200, 2020)}"
        if kind == "sym":
            return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.choice((1, 2, 2, 3))))
        return str(rng.choice(_spec()["values"][kind]))


@cache
def _spec() -> dict[str, Any]:
    text = (files("invar_ray.pretraining") / "relations.yaml").read_text(encoding="utf-8")
    spec: dict[str, Any] = yaml.safe_load(text)
    return spec


@cache
def _relations() -> tuple[_Relation, ...]:
    return tuple(
        _Relation(entry["value"], tuple(entry["statements"]), tuple(entry["questions"]))
        for entry in _spec()["relations"]
    )


def _dressed(rng: random.Random, sentence: str) -> str:
    """The statement as it is, or with words around it, so that the fact may stand anywhere in its sentence."""
    chance = rng.random()
    if chance < 0.2:
        return f"{rng.choice(_spec()['openings'])} {sentence}"
    if chance < 0.45:
        return sentence.removesuffix(".") + rng.choice(_spec()["endings"])
    return sentence


def _word(rng: random.Random) -> str:
    # Many different syllables: where a few recur all over a passage, what followed the last one says nothing.
    count = rng.choice((1, 2, 2, 2, 3))
    return _capital("".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(count)))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
