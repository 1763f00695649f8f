"""Answers as text: SQuAD's normalisation and word-bounded containment."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from invar_ray.text.answers import contains_answer, find_answer, normalise_answer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Eiffel Tower!", "eiffel tower"),
        ("  an   apple,\ta pear ", "apple pear"),
        ("1,000", "1000"),
        ("the-end", "theend"),  # punctuation goes before articles, as in SQuAD's script
        ("Theatre", "theatre"),
        ("A.", ""),
        ("", ""),
    ],
)
def test_normalise_answer_follows_squad(text: str, expected: str) -> None:
    assert normalise_answer(text) == expected


@pytest.mark.parametrize(
    ("text", "answers", "expected"),
    [
        ("It lies in Paris, France.", ["Paris"], True),
        ("A party was held.", ["art"], False),
        ("Some 1000 men came.", ["1,000 men"], True),
        ("He read The Hobbit twice.", ["hobbit"], True),
        ("\u201cParis\u201d, he said", ["Paris"], True),
        ("The war of 1939\u20131945 ended", ["1939-1945"], True),
        ("Rome\u2014Paris", ["Paris"], True),
        ("Nothing here", ["the", "?", ""], False),
        ("Nothing here", [], False),
        ("", ["Paris"], False),
        ("first new then york", ["new york"], False),
        ("new new york", ["new york"], True),
    ],
)
def test_contains_answer(text: str, answers: list[str], expected: bool) -> None:
    assert contains_answer(text, answers) is expected


@pytest.mark.parametrize(
    ("text", "answers", "expected"),
    [
        ("It lies in PARIS, France.", ["Paris"], "PARIS"),
        ("Some 1,000 men came.", ["1000 men"], "1,000 men"),
        ("They wrote it in C++ then.", ["C++"], "C++"),
        ("A song of The Who.", ["The Who"], "The Who"),
        ("A song of Who.", ["The Who"], "Who"),
        (
            "\u0130zmir and Rome",
            ["Rome"],
            "Rome",
        ),  # lower-casing makes the first letter two characters
        ("in New York City", ["New York", "New York City", "City"], "New York City"),
    ],
)
def test_find_answer_gives_raw_offsets(text: str, answers: list[str], expected: str) -> None:
    span = find_answer(text, answers)
    assert span is not None
    assert text[span[0] : span[1]] == expected


def test_find_answer_takes_the_earliest() -> None:
    assert find_answer("Rome, then Paris, then Rome", ["Paris", "Rome"]) == (0, 4)


ascii_text = st.text(alphabet="ab theAN.,-' 1", max_size=24)


@given(text=ascii_text, answer=ascii_text)
@settings(max_examples=200, deadline=None)
def test_containment_is_that_of_normalised_words_on_ascii(text: str, answer: str) -> None:
    normal = normalise_answer(answer)
    expected = bool(normal) and f" {normal} " in f" {normalise_answer(text)} "
    assert contains_answer(text, [answer]) is expected


@given(text=st.text(max_size=30), answer=st.text(min_size=1, max_size=8))
@settings(max_examples=200, deadline=None)
def test_a_found_span_lies_in_the_text_and_holds_the_answer(text: str, answer: str) -> None:
    padded = f"{text} {answer} {text}"
    span = find_answer(padded, [answer])
    if span is None:
        assert not contains_answer(answer, [answer])  # nothing is left of it after normalisation
    else:
        assert 0 <= span[0] < span[1] <= len(padded)
        assert contains_answer(padded[span[0] : span[1]], [answer])
