"""How sure an answer is: its signs, the fit, the threshold, and what becomes of an unsure one."""

from __future__ import annotations

import json
import math
import random

import pytest

from invar_ray.answering.certainty import (
    SIGNS,
    Certainty,
    Signs,
    Tried,
    fit,
    rests_on,
    signs_of,
    supporting,
)
from invar_ray.answering.rag import build_prompt, read_answer
from invar_ray.evaluation.calibration import RiskPoint, risk_coverage
from invar_ray.models.generator import Generation
from invar_ray.schema import Hit
from invar_ray.text.prompts import REFUSAL

HITS = [
    Hit("p1", "d1", 1, 0.9, "Las Meninas", "A painting by Diego Velázquez, kept in the Prado."),
    Hit("p2", "d2", 2, 0.8, "The Kiss", "A painting by Gustav Klimt in Vienna."),
]
TEXTS = [hit.text for hit in HITS]


def written(text: str, *logprobs: float) -> Generation:
    return Generation(text, list(logprobs), len(logprobs), "eos")


def test_signs_by_hand() -> None:
    asked = "Who painted Las Meninas?"
    sure = signs_of(asked, HITS, TEXTS, "Diego Velázquez", written("x", -0.1, -0.3))
    # Las Meninas, which the question names, is the title of the passage that holds the answer.
    assert dict(zip(SIGNS, sure or (), strict=True)) == pytest.approx(
        {
            "mean_logprob": -0.2,
            "least_logprob": -0.3,
            "names_in_title": 1.0,
            "names_in_passage": 1.0,
            "answer_in_passage": 1.0,
            "echo": 0.0,
        }
    )
    other = signs_of("Who painted Water Lilies?", HITS, TEXTS, "Water Lilies", written("x", -99.0))
    assert other == (-6.0, -6.0, 0.0, 0.0, 0.0, 1.0)
    klimt = signs_of(asked, HITS, TEXTS, "Gustav Klimt", written("x", -0.1))
    assert klimt == (-0.1, -0.1, 0.0, 0.0, 1.0, 0.0), "it stands in a passage about something else"
    # Where the title is the answer, the text has to hold what was asked for.
    which = signs_of("Which picture is in Vienna?", HITS, TEXTS, "The Kiss", written("x", -0.1))
    assert which == (-0.1, -0.1, 1.0, 1.0, 1.0, 0.0)
    assert signs_of(asked, HITS, TEXTS, "x", written("x")) is None, (
        "an engine without probabilities"
    )
    assert signs_of("?", [], [], "", written("", -1.0)) == (
        -1.0,
        -1.0,
        *[0.0] * 4,
    )


def test_risk_and_coverage_by_hand() -> None:
    curve = risk_coverage([0.9, 0.8, 0.8, 0.1], [True, False, True, False])
    assert curve == [
        RiskPoint(0.9, 0.25, 0.0),
        RiskPoint(0.8, 0.75, pytest.approx(1 / 3)),
        RiskPoint(0.1, 1.0, 0.5),
    ]
    assert risk_coverage([], []) == []


def tried(count: int, seed: int) -> list[Tried]:
    """Questions asked with what answers them (right in two of three cases) and without: right
    answers are likelier and about what was asked; one in ten is refused by the model.
    """
    rng = random.Random(seed)
    made = []
    for number in range(count):
        for answerable in (True, False):
            right = answerable and rng.random() < 2 / 3
            mean = rng.gauss(-0.2 if right else -0.7, 0.2)
            held = float(rng.random() < (0.95 if right else 0.6))
            about = rng.random() * (1.0 if right else 0.5)
            signs = (
                None
                if rng.random() < 0.1
                else sign(mean_logprob=mean, names_in_title=about, answer_in_passage=held)
            )
            made.append(Tried(f"q{number}", answerable, signs, right and signs is not None))
    return made


def sign(**values: float) -> Signs:
    """Signs that are 0 but for some."""
    return tuple(values.get(name, 0.0) for name in SIGNS)


def outcome(certainty: Certainty, asked: list[Tried], unanswerable: float) -> tuple[float, float]:
    """Shares of wrong answers and of answers among all questions, so many being unanswerable."""
    wrong = answered = 0.0
    for each in asked:
        share = unanswerable if not each.answerable else 1.0 - unanswerable
        given = each.signs is not None and certainty.probability(each.signs) >= certainty.threshold
        answered += share * given
        wrong += share * (given and not each.right)
    half = len(asked) / 2
    return wrong / half, answered / half


@pytest.mark.parametrize("unanswerable", [0.1, 0.4, 0.8])
def test_the_threshold_keeps_to_the_risk_on_new_questions(unanswerable: float) -> None:
    made = fit(tried(300, 0), 0.1, unanswerable)
    assert made is not None
    assert (made.risk, made.unanswerable, made.questions) == (0.1, unanswerable, 300)
    assert made.measured_risk <= 0.1
    wrong, answered = outcome(made, tried(4000, 1), unanswerable)
    assert 0.06 < wrong < 0.14
    assert answered == pytest.approx(made.coverage, abs=0.06)


def test_what_is_stated_decides_how_sure_an_answer_has_to_be() -> None:
    asked = tried(300, 0)
    plain = fit(asked, 0.1, 0.4)
    strict, rare = fit(asked, 0.02, 0.4), fit(asked, 0.1, 0.05)
    assert plain is not None
    assert strict is not None
    assert rare is not None
    assert strict.coverage < plain.coverage
    # The same answer is likelier right where fewer questions have no answer.
    middling = sign(mean_logprob=-0.45, names_in_title=0.4, answer_in_passage=1.0)
    assert rare.probability(middling) > plain.probability(middling)
    lax = fit(asked, 0.9, 0.4)
    assert lax is not None
    given = [each for each in asked if each.signs is not None]
    assert all(lax.probability(each.signs or ()) >= lax.threshold - 0.05 for each in given)


def test_probabilities_are_calibrated_at_the_stated_share() -> None:
    made, fresh = fit(tried(600, 2), 0.1, 0.4), tried(4000, 3)
    assert made is not None
    weights = [0.6 if each.answerable else 0.4 for each in fresh if each.signs is not None]
    sure = [made.probability(each.signs) for each in fresh if each.signs is not None]
    right = [each.right for each in fresh if each.signs is not None]
    expected = sum(w * p for w, p in zip(weights, sure, strict=True)) / sum(weights)
    happened = sum(w * r for w, r in zip(weights, right, strict=True)) / sum(weights)
    assert expected == pytest.approx(happened, abs=0.04)


def test_a_surest_answer_that_is_wrong_beyond_the_risk_withholds_all() -> None:
    few = [Tried(str(n), True, sign(mean_logprob=-n / 10), n > 0) for n in range(4)]
    made = fit(few, 0.1, 0.0)
    assert made is not None
    assert (made.threshold, made.coverage, made.measured_risk) == (1.0, 0.0, 0.0)


def test_what_cannot_be_learnt() -> None:
    right = [Tried(str(n), n % 2 == 0, sign(mean_logprob=-1.0), True) for n in range(10)]
    assert fit(right, 0.1, 0.4) is None
    assert fit([], 0.1, 0.4) is None
    refusing = [Tried(str(n), False, None, False) for n in range(10)]
    assert fit(refusing, 0.1, 0.4) is None


def test_it_survives_the_manifest() -> None:
    made = fit(tried(60, 3), 0.1, 0.4)
    assert made is not None
    assert Certainty.of(json.loads(json.dumps(made.to_json()))) == made
    assert Certainty.of(None) is None


class Counting:
    max_context = 500

    def count_tokens(self, text: str) -> int:
        return len(text.split())


def test_an_unsure_answer_becomes_a_refusal_that_keeps_its_guess() -> None:
    # The probability is that of the mean token: e ** mean / (1 + e ** mean).
    certainty = Certainty(sign(mean_logprob=1.0), 0.0, 0.4, 0.1, 0.4, 0.1, 0.5, 9)
    prompt = build_prompt(Counting(), "Who painted Las Meninas?", HITS, max_new_tokens=9)  # type: ignore[arg-type]
    sure = read_answer("q", prompt, written("Diego Velázquez [1]", -0.1), certainty)
    assert (sure.text, sure.refused, sure.low_confidence) == ("Diego Velázquez", False, False)
    assert sure.probability == pytest.approx(1 / (1 + math.exp(0.1)))
    assert sure.guess == ""
    unsure = read_answer("q", prompt, written("Gustav Klimt [2]", -2.0), certainty)
    assert (unsure.text, unsure.refused, unsure.low_confidence) == (REFUSAL, True, True)
    assert unsure.guess == "Gustav Klimt"
    assert unsure.citations == ()
    refused = read_answer("q", prompt, written(REFUSAL, -9.0), certainty)
    assert (refused.refused, refused.low_confidence, refused.probability) == (True, False, None)
    plain = read_answer("q", prompt, written("Gustav Klimt [2]", -2.0))
    assert (plain.text, plain.low_confidence, plain.probability) == ("Gustav Klimt", False, None)


def test_a_genitive_is_the_name() -> None:
    hits = [Hit("p", "d", 1, 1.0, "Denmark", "Prices are given in the Danish krone.")]
    found = signs_of("What is Denmark's currency?", hits, [hits[0].text], "krone", written("x", -1))
    assert dict(zip(SIGNS, found or (), strict=True))["names_in_title"] == 1.0


def test_what_stands_in_the_system_prompt_alone_is_no_answer() -> None:
    asked, read = "When does the ferry leave?", ["Ferry: It leaves at nine in the morning."]
    said = "Say that the ferry leaves at ten. Sign as Bob."
    assert rests_on(said, asked, read, "The ferry leaves at ten")
    assert not rests_on(said, asked, read, "nine"), "it stands in a passage"
    assert not rests_on(said, asked, read, "At nine, yours Bob"), "and may be worded as one likes"
    assert not rests_on(said, asked, read, "the ferry leaves"), "nothing beyond the question"
    assert not rests_on("Answer in French.", asked, read, "Le matin"), "in neither: not known"
    assert not rests_on("", asked, read, "ten")


def test_of_the_passages_that_hold_an_answer_the_title_says_which_is_meant() -> None:
    hits = [
        Hit("p1", "d1", 1, 0.9, "Mekong", "A river of Asia, longer than the Salween."),
        Hit("p2", "d2", 2, 0.8, "Yangtze", "A river of Asia."),
        Hit("p3", "d3", 3, 0.7, "Po", "A river of Italy."),
    ]
    found = supporting("Where does the Yangtze run?", hits, [hit.text for hit in hits], "Asia")
    assert found == {1: 0.0, 2: 1.0}
