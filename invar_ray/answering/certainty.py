"""How likely an answer is right, from how it came about; and when it is better not to give it.

A generator is sure of wrong answers, too: the probability of its tokens says how fluent the answer
is.  Together with what stands in the passages it separates better.  A logistic regression, fitted
on train questions with and without their documents, makes one probability of these signs, and a
threshold on it keeps the share of wrong answers among those given below a stated risk.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from invar_ray.evaluation.calibration import risk_coverage
from invar_ray.models.generator import Generation
from invar_ray.questions.lexicon import FUNCTION_WORDS, STOP_WORDS
from invar_ray.schema import Hit
from invar_ray.text.answers import contains_answer
from invar_ray.text.words import words

SIGNS = (
    "mean_logprob",
    "least_logprob",
    "names_in_title",
    "names_in_passage",
    "answer_in_passage",
    "echo",
)
_STEM = 5
"""Words that agree in so many first letters count as one: "painted" and "painting"."""
_NUMBERS = frozenset("two three four five six seven eight nine ten".split())
_COMMON = (FUNCTION_WORDS | STOP_WORDS | {"s"}) - _NUMBERS  # "Denmark's" is Denmark
_FLOOR = -6.0  # nats: below it, a token's probability says no more
_RIDGE, _ROUNDS = 1.0, 50
_FEWEST, _EVEN = 10, 0.5
Signs = tuple[float, ...]


def signs_of(
    question: str, hits: Sequence[Hit], shown: Sequence[str], answer: str, generation: Generation
) -> Signs | None:
    """What an answer's certainty is read from, in the order of :data:`SIGNS`; ``None`` where the
    engine gives no probabilities.

    Args:
        question: as asked.
        hits: the passages of the prompt.
        shown: their texts as they stand in it.
        answer: what was written, without marks.
        generation: the same with its tokens' log-probabilities.
    """
    logprobs = [max(_FLOOR, value) for value in generation.token_logprobs]
    if not logprobs:
        return None
    read = [(hit.title, f"{hit.title}\n{text}") for hit, text in zip(hits, shown, strict=True)]
    holding = [(title, text) for title, text in read if contains_answer(text, [answer])]
    asked, said, names = _stems(question), _stems(answer), _names(question)
    # A passage about what is asked has its name in the title; one that is itself the answer, not.
    about = [text if contains_answer(title, [answer]) else title for title, text in holding]
    return (
        sum(logprobs) / len(logprobs),
        min(logprobs),
        max((_share(names, each) for each in about), default=0.0),
        max((_share(names, text) for _, text in holding), default=0.0),
        float(bool(holding)),
        float(bool(said) and said <= asked),
    )


def rests_on(other: str, question: str, shown: Sequence[str], answer: str) -> bool:
    """Whether what an answer says beyond the question stands in another text and in no passage.

    Args:
        other: what was said to the model beside the passages: a system prompt.
        question: as asked.
        shown: the passages as they stand in the prompt, titles and texts.
        answer: what was written, without marks.
    """
    said = _stems(answer) - _stems(question)
    return not said & _stems("\n".join(shown)) and bool(said & _stems(other))


def _stems(text: str) -> set[str]:
    return {word[:_STEM] for word in words(text) if word not in _COMMON}


def _names(question: str) -> set[str]:
    """What a question is about: words with a capital (the first has one anyway) and numbers, where
    it has any, else all of its words.
    """
    named = [
        word
        for number, word in enumerate(question.split())
        if any(character.isdigit() for character in word)
        or (number > 0 and word.lstrip("\"'(“‘")[:1].isupper())
    ]
    return _stems(" ".join(named)) or _stems(question)


def _share(wanted: set[str], text: str) -> float:
    return len(wanted & _stems(text)) / len(wanted) if wanted else 0.0


@dataclass(frozen=True)
class Certainty:
    """A fitted model of :data:`SIGNS`, as a generator's manifest keeps it.

    Attributes:
        weights: one a sign, of its own unit.
        bias: added to the weighted sum.
        threshold: least probability of an answer that is given.
        risk: the share of wrong answers among those given that it was chosen for.
        measured_risk, coverage: that share, and the share of questions answered, on the questions
            that it was fitted on.
        questions: how many these were.
    """

    weights: Signs
    bias: float
    threshold: float
    risk: float
    measured_risk: float
    coverage: float
    questions: int

    @classmethod
    def of(cls, kept: Mapping[str, Any] | None) -> Certainty | None:
        """From the ``certainty`` of a generator's manifest; ``None`` where it has none."""
        return None if kept is None else cls(**{**kept, "weights": tuple(kept["weights"])})

    def to_json(self) -> dict[str, Any]:
        """What :meth:`of` reads."""
        return asdict(self)

    def probability(self, signs: Signs) -> float:
        """That an answer with these signs is right, in (0, 1)."""
        total = self.bias + sum(w * sign for w, sign in zip(self.weights, signs, strict=True))
        return 1.0 / (1.0 + math.exp(-max(-30.0, min(30.0, total))))


def fit(signs: Sequence[Signs], right: Sequence[bool], risk: float) -> Certainty | None:
    """Fit the weights, then choose the threshold that answers most at ``risk``.

    Args:
        signs: of answers to questions whose answer is known.
        right: whether each was.
        risk: most wrong answers among those given, as a share.  Where no threshold keeps to it on
            at least ten answers (fewer are chance), it is 0.5: given is what is more likely right
            than wrong.

    Returns:
        ``None`` where all answers are right, or none is: nothing can be learnt.

    Source: Platt, "Probabilistic Outputs for Support Vector Machines", 1999 (a logistic regression
    on scores); El-Yaniv and Wiener, "On the Foundations of Noise-free Selective Classification",
    JMLR 2010 (risk and coverage).  The signs are [ours].
    """
    if len(set(right)) < 2:
        return None
    values = np.asarray(signs, np.float64)
    mean, scale = values.mean(axis=0), np.maximum(values.std(axis=0), 1e-6)
    weights, bias = _logistic((values - mean) / scale, np.asarray(right, np.float64))
    weights = weights / scale
    made = Certainty(
        tuple(weights.tolist()), float(bias - weights @ mean), 0.0, risk, 0.0, 0.0, len(right)
    )
    sure = [made.probability(each) for each in signs]
    kept = [
        point
        for point in risk_coverage(sure, right)
        if point.risk <= risk and point.coverage * len(right) >= _FEWEST
    ]
    threshold = max(kept, key=lambda point: point.coverage).threshold if kept else _EVEN
    given = [is_right for p, is_right in zip(sure, right, strict=True) if p >= threshold]
    wrong = given.count(False) / len(given) if given else 0.0
    coverage = len(given) / len(right)
    return Certainty(made.weights, made.bias, threshold, risk, wrong, coverage, len(right))


def _logistic(
    values: npt.NDArray[np.float64], right: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], float]:
    """Ridge logistic regression by Newton's method."""
    inputs = np.column_stack([values, np.ones(len(values))])
    penalty = np.diag([_RIDGE] * values.shape[1] + [0.0])
    weights = np.zeros(inputs.shape[1])
    for _ in range(_ROUNDS):
        guess = 1.0 / (1.0 + np.exp(-np.clip(inputs @ weights, -30, 30)))
        gradient = inputs.T @ (guess - right) + penalty @ weights
        curvature = (inputs * (guess * (1 - guess))[:, None]).T @ inputs + penalty
        step = np.linalg.solve(curvature + 1e-9 * np.eye(len(weights)), gradient)
        weights -= step
        if np.abs(step).max() < 1e-9:
            break
    return weights[:-1], float(weights[-1])
