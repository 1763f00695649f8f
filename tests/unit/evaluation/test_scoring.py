"""Answer rules against what the benchmarks' own scripts give, and calibration by hand."""

from __future__ import annotations

import pytest

from invar_ray.errors import ConfigError, DataError
from invar_ray.evaluation.calibration import calibration_bins, expected_calibration_error
from invar_ray.evaluation.metrics import exact_match, f1
from invar_ray.evaluation.scoring import RULES, AnswerScore, answer_rule, normalise_trivia


def test_squad_is_the_metrics_own() -> None:
    for text, golds in [
        ("The Eiffel Tower!", ["eiffel tower"]),
        ("a tower", ["eiffel tower", "x"]),
        ("", ["x"]),
    ]:
        score = answer_rule("squad").score(text, golds)
        assert (score.exact_match, score.f1) == (exact_match(text, golds), f1(text, golds))


def test_accuracy_forgives_length() -> None:
    assert answer_rule("squad").score("It was Paris, in 1889.", ["paris"]) == AnswerScore(
        0.0, pytest.approx(1 / 3), 1.0
    )


def test_trivia_parts_words_at_punctuation() -> None:
    assert normalise_trivia("The Spider-Man_\u2018film\u2019") == "spider man film"
    assert answer_rule("triviaqa").score("spider man", ["Spider-Man"]).exact_match == 1.0
    assert answer_rule("squad").score("spider man", ["Spider-Man"]).exact_match == 0.0


def test_hotpot_gives_no_part_of_yes() -> None:
    assert answer_rule("hotpotqa").score("yes it is", ["yes"]).f1 == 0.0
    assert answer_rule("squad").score("yes it is", ["yes"]).f1 == pytest.approx(0.5)
    assert answer_rule("hotpotqa").score("Yes.", ["yes"]) == AnswerScore(1.0, 1.0, 1.0)
    assert answer_rule("hotpotqa").score("new york", ["york"]).f1 == pytest.approx(2 / 3)


def test_patterns() -> None:
    rule = answer_rule("regex")
    assert rule.score("1,312 feet", [r"1,?312 f(ee)?t"]) == AnswerScore(1.0, None, 1.0)
    assert rule.score("about 1312 ft high", [r"1,?312 f(ee)?t"]) == AnswerScore(0.0, None, 1.0)
    assert rule.contains("it is 1312 FEET", [r"1,?312 f(ee)?t"])
    with pytest.raises(DataError, match="no regular expression"):
        rule.score("x", ["("])


def test_unknown_rules_and_missing_answers_are_refused() -> None:
    with pytest.raises(ConfigError, match="squad, triviaqa"):
        answer_rule("other")
    for rule in RULES.values():
        with pytest.raises(ValueError, match="at least one"):
            rule.score("x", [])


def test_calibration_by_hand() -> None:
    bins = calibration_bins([0.05, 0.15, 0.19, 1.0], [0.0, 1.0, 0.0, 1.0])
    assert [(b.low, b.high, b.count) for b in bins] == [(0.0, 0.1, 1), (0.1, 0.2, 2), (0.9, 1.0, 1)]
    assert bins[1].confidence == pytest.approx(0.17)
    assert bins[1].accuracy == 0.5
    assert expected_calibration_error(bins) == pytest.approx((0.05 + 2 * 0.33 + 0.0) / 4)
    assert expected_calibration_error([]) is None
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        calibration_bins([1.2], [1.0])


@pytest.mark.parametrize("rule", ["squad", "triviaqa", "hotpotqa", "regex"])
def test_a_blank_gold_answer_does_not_make_silence_right(rule: str) -> None:
    assert answer_rule(rule).score("", ["Ada", "", " "]).exact_match == 0.0
    assert answer_rule(rule).score("other", ["Ada", ""]).accuracy == 0.0
    assert answer_rule(rule).score("Ada", ["", "Ada"]).exact_match == 1.0
