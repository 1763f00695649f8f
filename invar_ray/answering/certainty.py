"""How likely an answer is right, from how it came about; and when it is better not to give it.

A generator is sure of wrong answers, too: the probability of its tokens says how fluent the answer
is.  Together with what stands in the passages it separates better.  A logistic regression, fitted
on train questions with and without their documents, makes one probability of these signs, and a
threshold on it keeps the share of wrong answers among those given below a stated risk.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

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
"""What an answer's certainty is read from: the mean and the least log-probability of its tokens;
how much of what the question names stands in the title, and in title and text, of a passage that
holds the answer; whether any passage does; whether it only repeats the question."""
_STEM = 5
"""Words that agree in so many first letters count as one: "painted" and "painting"."""
_NUMBERS = frozenset("two three four five six seven eight nine ten".split())
_COMMON = (FUNCTION_WORDS | STOP_WORDS | {"s"}) - _NUMBERS  # "Denmark's" is Denmark
_FLOOR = -6.0  # nats: below it, a token's probability says no more
_RIDGE, _ROUNDS = 1.0, 50
_FOLDS = 5
Signs = tuple[float, ...]
_Floats = npt.NDArray[np.float64]


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
    asked, said, names = _stems(question), _stems(answer), _names(question)
    holding = [
        (hit.title, text)
        for hit, text in zip(hits, shown, strict=True)
        if contains_answer(f"{hit.title}\n{text}", [answer])
    ]
    return (
        sum(logprobs) / len(logprobs),
        min(logprobs),
        max((_about(names, title, text, answer) for title, text in holding), default=0.0),
        max((_share(names, f"{title}\n{text}") for title, text in holding), default=0.0),
        float(bool(holding)),
        float(bool(said) and said <= asked),
    )


def supporting(
    question: str, hits: Sequence[Hit], shown: Sequence[str], answer: str
) -> dict[int, float]:
    """The passages that an answer stands in, by number from 1, each with how much of what the
    question names its title names, in [0, 1].

    Args:
        question, hits, shown, answer: see :func:`signs_of`.
    """
    names = _names(question)
    return {
        number: _about(names, hit.title, text, answer)
        for number, (hit, text) in enumerate(zip(hits, shown, strict=True), start=1)
        if contains_answer(f"{hit.title}\n{text}", [answer])
    }


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


def _about(names: set[str], title: str, text: str, answer: str) -> float:
    """How much of what a question names a passage is about: its title says so, or its text where
    the title is itself the answer.
    """
    return _share(names, text if contains_answer(title, [answer]) else title)


def _share(wanted: set[str], text: str) -> float:
    return len(wanted & _stems(text)) / len(wanted) if wanted else 0.0


@dataclass(frozen=True)
class Tried:
    """An answer to a question whose answer is known.

    Attributes:
        question: which one: answers to one question, from different passages, stay together.
        answerable: whether the passages could answer it.
        signs: of what was written; ``None`` where the model refused by itself.
        right: whether it holds a gold answer.
    """

    question: str
    answerable: bool
    signs: Signs | None
    right: bool


@dataclass(frozen=True)
class Certainty:
    """A fitted model of :data:`SIGNS`, as a generator's manifest keeps it.

    Attributes:
        weights: one a sign, of its own unit.
        bias: added to the weighted sum.
        threshold: least probability of an answer that is given.
        risk: the share of all questions that may get a wrong answer, which it was chosen for.
        unanswerable: the share of questions without an answer in the passages, at which.
        measured_risk, coverage: the shares of wrong answers and of answers at that threshold, among
            all questions, each judged by a model that was fitted on the others.
        questions: how many questions it was fitted on.
    """

    weights: Signs
    bias: float
    threshold: float
    risk: float
    unanswerable: float
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
        return _probability(self.weights, self.bias, signs)


def fit(tried: Sequence[Tried], risk: float, unanswerable: float) -> Certainty | None:
    """Fit the weights, and choose the threshold that answers most at ``risk``.

    Questions with and without an answer in the passages are weighted so that the latter make up
    ``unanswerable``, however many of each there are.  The threshold is chosen on probabilities from
    models that had not seen the question (cross-fitting); the weights kept are fitted on all.

    Args:
        tried: answers to questions whose answer is known.
        risk: most wrong answers, as a share of all questions.
        unanswerable: share of questions that the passages do not answer.

    Returns:
        ``None`` where all answers are right, or none is: nothing can be learnt.

    Source: Platt, "Probabilistic Outputs for Support Vector Machines", 1999 (a logistic regression
    on scores); El-Yaniv and Wiener, "On the Foundations of Noise-free Selective Classification",
    JMLR 2010 (risk and coverage).  The signs, and a risk that counts refusals as asked, are [ours].
    """
    counts = Counter(each.answerable for each in tried)
    share = {True: 1.0 - unanswerable, False: unanswerable}
    if len(counts) == 1:
        share = dict.fromkeys(share, 1.0)
    given = [each for each in tried if each.signs is not None]
    names = sorted({each.question for each in given})
    if len({each.right for each in given}) < 2 or len(names) < 2:
        return None
    weight = np.array([share[each.answerable] / counts[each.answerable] for each in given])
    values = np.array([each.signs for each in given], np.float64)
    right = np.array([each.right for each in given], np.float64)
    random.Random(len(names)).shuffle(names)
    fold_of = {name: number % _FOLDS for number, name in enumerate(names)}
    folds = np.array([fold_of[each.question] for each in given])
    sure = np.zeros(len(given))
    for fold in set(fold_of.values()):
        seen, held = folds != fold, folds == fold
        weights, bias = _fitted(values[seen], right[seen], weight[seen])
        sure[held] = [_probability(weights, bias, tuple(each)) for each in values[held]]
    threshold = _threshold(sure, right, weight, risk)
    answered = sure >= threshold
    weights, bias = _fitted(values, right, weight)
    return Certainty(
        weights,
        bias,
        threshold,
        risk,
        unanswerable,
        measured_risk=float((weight * (1 - right))[answered].sum()),
        coverage=float(weight[answered].sum()),
        questions=len({each.question for each in tried}),
    )


def _threshold(sure: _Floats, right: _Floats, weight: _Floats, risk: float) -> float:
    """The least probability at which answers that are at least as sure are wrong for at most
    ``risk`` of all questions; half-way to the next one below, which is too much.
    """
    wrong, threshold = 0.0, 1.0
    for probability in sorted(set(sure.tolist()), reverse=True):
        of_it = sure == probability
        wrong += float((weight * (1 - right))[of_it].sum())
        if wrong > risk + 1e-12:
            return (threshold + probability) / 2 if threshold < 1.0 else 1.0
        threshold = probability
    return threshold


def _probability(weights: Signs, bias: float, signs: Signs) -> float:
    total = bias + sum(w * sign for w, sign in zip(weights, signs, strict=True))
    return 1.0 / (1.0 + math.exp(-max(-30.0, min(30.0, total))))


def _fitted(values: _Floats, right: _Floats, weight: _Floats) -> tuple[Signs, float]:
    """Weights and bias, in the signs' own units, of a ridge logistic regression by Newton's
    method.
    """
    weight = weight * len(weight) / weight.sum()
    mean = np.average(values, axis=0, weights=weight)
    scale = np.sqrt(np.average((values - mean) ** 2, axis=0, weights=weight))
    scale = np.maximum(scale, 1e-6)
    inputs = np.column_stack([(values - mean) / scale, np.ones(len(values))])
    penalty = np.diag([_RIDGE] * values.shape[1] + [0.0])
    made = np.zeros(inputs.shape[1])
    for _ in range(_ROUNDS):
        guess = 1.0 / (1.0 + np.exp(-np.clip(inputs @ made, -30, 30)))
        gradient = inputs.T @ (weight * (guess - right)) + penalty @ made
        curvature = (inputs * (weight * guess * (1 - guess))[:, None]).T @ inputs + penalty
        step = np.linalg.solve(curvature + 1e-9 * np.eye(len(made)), gradient)
        made -= step
        if np.abs(step).max() < 1e-9:
            break
    weights = made[:-1] / scale
    return tuple(weights.tolist()), float(made[-1] - weights @ mean)
