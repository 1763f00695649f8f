"""How sure an answer is: its signs, the fit, the threshold, and what becomes of an unsure one."""

from __future__ import annotations

import json
import math
import random

import pytest

from invar_ray.answering.certainty import SIGNS, Certainty, Signs, fit, rests_on, signs_of
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


def examples(count: int, seed: int) -> tuple[list[Signs], list[bool]]:
    """Right answers are somewhat likelier and mostly stand in a passage."""
    rng = random.Random(seed)
    signs: list[Signs] = []
    right = [rng.random() < 0.5 for _ in range(count)]
    for is_right in right:
        mean = rng.gauss(-0.2 if is_right else -0.6, 0.2)
        held = float(rng.random() < (0.95 if is_right else 0.5))
        about = rng.random() * (1.0 if is_right else 0.6)
        signs.append((mean, 2 * mean, about, about, held, 0.0))
    return signs, right


def test_the_threshold_keeps_to_the_risk_on_new_questions_and_is_calibrated() -> None:
    signs, right = examples(600, 0)
    made = fit(signs, right, 0.1)
    assert made is not None
    assert made.measured_risk <= 0.1
    assert made.questions == 600
    fresh, truth = examples(4000, 1)
    sure = [made.probability(each) for each in fresh]
    given = [is_right for p, is_right in zip(sure, truth, strict=True) if p >= made.threshold]
    assert 0.0 < 1 - sum(given) / len(given) < 0.14
    assert len(given) / len(fresh) == pytest.approx(made.coverage, abs=0.06)
    assert sum(sure) / len(sure) == pytest.approx(sum(truth) / len(truth), abs=0.04)
    strict = fit(signs, right, 0.02)
    assert strict is not None
    assert strict.threshold > made.threshold
    assert strict.coverage < made.coverage


def test_what_cannot_be_learnt_and_what_cannot_be_kept() -> None:
    signs, _ = examples(10, 0)
    assert fit(signs, [True] * 10, 0.1) is None
    assert fit([], [], 0.1) is None
    same = [(-1.0, -1.0, 0.5, 0.5, 1.0, 0.0)] * 4
    hopeless = fit(same, [True, False, False, False], 0.1)
    assert hopeless is not None
    assert (hopeless.threshold, hopeless.coverage) == (0.5, 0.0), "wrong more often than right"


def test_a_handful_of_sure_answers_keeps_no_risk() -> None:
    # One answer is far surer than all others and right: to give it alone would be chance.
    rest = [(-1.0, -1.0, 0.5, 0.5, 1.0, 0.0)] * 40
    signs, right = (
        [(0.0, 0.0, 1.0, 1.0, 1.0, 0.0), *rest],
        [True, *([True, True, False, True] * 10)],
    )
    made = fit(signs, right, 0.1)
    assert made is not None
    assert made.threshold == 0.5
    assert made.coverage == 1.0
    assert made.measured_risk == pytest.approx(10 / 41)


def test_it_survives_the_manifest() -> None:
    made = fit(*examples(60, 3), 0.1)
    assert made is not None
    assert Certainty.of(json.loads(json.dumps(made.to_json()))) == made
    assert Certainty.of(None) is None


class Counting:
    max_context = 500

    def count_tokens(self, text: str) -> int:
        return len(text.split())


def test_an_unsure_answer_becomes_a_refusal_that_keeps_its_guess() -> None:
    # The probability is that of the mean token: e ** mean / (1 + e ** mean).
    certainty = Certainty((1.0, *[0.0] * 5), 0.0, 0.4, 0.1, 0.1, 0.5, 9)
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
