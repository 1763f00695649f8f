"""How an answer is held against the gold ones, as each benchmark's own script does it.

===========  =======================================================================================
``squad``    lower case, no punctuation, no articles (SQuAD; DPR uses it for NQ and WebQuestions
             too)
``triviaqa`` the same, but punctuation becomes a space, as do underscores and typographic quotes
``hotpotqa`` SQuAD's, and "yes" / "no" must match whole: they earn no partial F1
``regex``    gold answers are regular expressions (CuratedTREC); there is no F1
===========  =======================================================================================
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from invar_ray.errors import ConfigError, DataError
from invar_ray.evaluation.metrics import token_f1
from invar_ray.text.answers import contains_answer, f1_words, normalise_answer

_TRIVIA_SPACES = frozenset(string.punctuation + "\u2018\u2019\u00b4`_")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WHOLE = frozenset({"yes", "no", "noanswer"})


@dataclass(frozen=True, slots=True)
class AnswerScore:
    """One answer against its gold ones.

    Attributes:
        exact_match: 0 or 1.
        f1: token F1 with the best gold answer, in [0, 1]; ``None`` under a rule that has none.
        accuracy: 0 or 1: a gold answer stands in the text, word by word (PopQA's measure; it
            forgives long answers).
    """

    exact_match: float
    f1: float | None
    accuracy: float


@dataclass(frozen=True, slots=True)
class AnswerRule:
    """A benchmark's way to compare; see the module.  Get one with :func:`answer_rule`."""

    name: str
    _score: Callable[[str, Sequence[str]], AnswerScore]
    contains: Callable[[str, Sequence[str]], bool]

    def score(self, text: str, answers: Sequence[str]) -> AnswerScore:
        """Hold a text against gold answers, any of which will do.

        Raises:
            ValueError: there is no gold answer.
        """
        if not answers:
            raise ValueError("answers: got none, expected at least one")
        # A blank beside other answers is none: it would make saying nothing right.
        return self._score(text, [answer for answer in answers if answer.strip()] or answers)


def answer_rule(name: str) -> AnswerRule:
    """The rule of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in RULES:
        raise ConfigError(f"no answer rule {name!r}", expected=", ".join(RULES))
    return RULES[name]


def normalise_trivia(text: str) -> str:
    """TriviaQA's normalisation.  Source: Joshi et al., arXiv 1705.03551,
    ``utils/evaluation.py``.
    """
    spaced = "".join(
        " " if character in _TRIVIA_SPACES else character for character in text.lower()
    )
    return " ".join(_ARTICLES.sub(" ", spaced).split())


def _by(
    normalise: Callable[[str], str], whole: frozenset[str] = frozenset()
) -> Callable[..., AnswerScore]:
    def score(text: str, answers: Sequence[str]) -> AnswerScore:
        given = normalise(text)
        golds = [normalise(answer) for answer in answers]
        words = f1_words(text, normalise)

        def f1(answer: str, gold: str) -> float:
            if given != gold and (given in whole or gold in whole):
                return 0.0
            return token_f1(words, f1_words(answer, normalise))

        return AnswerScore(
            float(given in golds),
            max(map(f1, answers, golds)),
            float(contains_answer(text, answers)),
        )

    return score


@lru_cache(maxsize=4096)
def _pattern(answer: str) -> re.Pattern[str]:
    try:
        return re.compile(answer, re.IGNORECASE | re.MULTILINE)
    except re.error as error:
        raise DataError(
            f"the gold answer {answer!r} is no regular expression ({error})",
            action="correct it, or set evaluation.answer_rule=squad",
        ) from error


def _contains_pattern(text: str, answers: Sequence[str]) -> bool:
    return any(_pattern(answer).search(text) for answer in answers)


def _score_patterns(text: str, answers: Sequence[str]) -> AnswerScore:
    whole = any(_pattern(answer).fullmatch(text.strip()) for answer in answers)
    return AnswerScore(float(whole), None, float(_contains_pattern(text, answers)))


RULES = {
    "squad": AnswerRule("squad", _by(normalise_answer), contains_answer),
    "triviaqa": AnswerRule("triviaqa", _by(normalise_trivia), contains_answer),
    "hotpotqa": AnswerRule("hotpotqa", _by(normalise_answer, _WHOLE), contains_answer),
    "regex": AnswerRule("regex", _score_patterns, _contains_pattern),
}
"""Every rule by its name."""
