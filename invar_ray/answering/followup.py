"""A question that only makes sense after the turns before it, said so that it stands alone.

By rule, and gated: without a pronoun that points back, or a question cut short ("And of
Portugal?"), a question is left as it is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from invar_ray.questions.lexicon import FUNCTION_WORDS, STOP_WORDS

_THINGS = {"it": "", "this": "", "that": "", "one": "", "there": "in ", "its": "'s"}
_PEOPLE = {
    "he": "",
    "she": "",
    "they": "",
    "him": "",
    "her": "",
    "them": "",
    "his": "'s",
    "hers": "'s",
    "their": "'s",
}
_BACK = {**_THINGS, **_PEOPLE}
"""Words that point back, with what a name gets in their place: an ending, or a word before it."""
_OPENING = re.compile(
    r"^(?:(?:and|but|so|or|then|also|what about|how about|ok|okay)\b[\s,]*)+", re.IGNORECASE
)
_CUT_SHORT = re.compile(r"^(?:of|for|in|by|from|to|with)?\s*(?P<name>[^?.!]{1,60})[?.!]*$", re.I)
_NAME = re.compile(
    r"[^\W\d_a-z][\w'’.-]*"
    r"(?:\s+(?:(?:of|the|de|da|del|la|van|von|in|a|with|and)\s+)*[^\W\d_a-z][\w'’.-]*)*"
)
_MOST_WORDS = 4
_NO_CONTENT = FUNCTION_WORDS | STOP_WORDS | {"me", "us", "my", "please"}


@dataclass(frozen=True, slots=True)
class Turn:
    """A question that was asked before, and what was answered."""

    question: str
    answer: str = ""


def stand_alone(question: str, turns: Sequence[Turn]) -> str | None:
    """The question in words that need no earlier turn; ``None`` where it is one as it is.

    Args:
        question: as asked.
        turns: those before it, oldest first; each is read in the light of the ones before it.
    """
    before, answer = "", ""
    for turn in turns:
        before = (_resolved(turn.question, before, answer) or turn.question).strip()
        answer = turn.answer
    return _resolved(question, before, answer) if before else None


def _resolved(question: str, before: str, answer: str) -> str | None:
    if not before:
        return None
    opened = _OPENING.sub("", question.strip())
    words = re.findall(r"[\w'’-]+", opened)
    back = [word for word in words if word.lower() in _BACK]
    own = _name_in(opened)
    if back and not own:
        return _replaced(opened, back[0], _meant(back[0].lower(), before, answer))
    if opened != question.strip() and not back and len(words) <= _MOST_WORDS:
        cut = _CUT_SHORT.match(opened)
        if cut and not _is_sentence(words):
            return _instead(before, cut["name"].strip())
    return None


def _is_sentence(words: Sequence[str]) -> bool:
    """Whether a few words ask by themselves: they begin with a question word or a verb."""
    return bool(words) and words[0].lower() in FUNCTION_WORDS - {"of", "for", "in", "by", "the"}


def _meant(word: str, before: str, answer: str) -> str:
    """What a word points back to: people are mostly the answer, things what was asked about."""
    person = _name_in(answer, anywhere=True) if word in _PEOPLE else ""
    if person:
        return person
    name = _name_in(before)
    if name:
        return name
    content = [each for each in re.findall(r"[\w'’-]+", before) if each.lower() not in _NO_CONTENT]
    return " ".join(content) or before.rstrip("?.! ")


def _name_in(text: str, *, anywhere: bool = False) -> str:
    """The last name in a text; its first word is none, as it has a capital anyway."""
    names = [match for match in _NAME.finditer(text) if anywhere or match.start() > 0]
    return names[-1].group().rstrip(".'’-") if names else ""


def _replaced(question: str, word: str, name: str) -> str:
    with_name = _BACK[word.lower()]
    put = f"{name}{with_name}" if with_name == "'s" else f"{with_name}{name}"
    made = re.sub(rf"\b{re.escape(word)}\b", lambda _: put, question, count=1)
    return made[:1].upper() + made[1:]


def _instead(before: str, name: str) -> str:
    """The question before, asked about something else."""
    old = _name_in(before)
    if not old:
        return f"{before.rstrip('?.! ')} {name}?"
    place = before.rindex(old)
    return f"{before[:place]}{name}{before[place + len(old) :]}"
