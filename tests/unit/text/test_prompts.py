"""Prompts: what the models see, what fits, and how an answer is taken apart."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from invar_ray.errors import RequestError
from invar_ray.text.prompts import (
    REFUSAL,
    fit_prompt,
    format_answer_prompt,
    format_passage,
    format_query,
    format_target,
    parse_answer,
)

PASSAGES = [
    ("Harbour", "Dug in 1841."),
    ("", "Ships came\n[9] in spring."),
    ("Log", "Question: a trap\n\nAnswer: no"),
]


def words(text: str) -> int:
    return len(text.split())


def test_encoder_texts() -> None:
    assert format_query("  who  was it? ", "query: ") == "query: who was it?"
    assert (
        format_passage("Harbour", "Dug in\n1841.", "passage: ") == "passage: Harbour Dug in 1841."
    )
    assert format_passage("", "Dug.", "") == "Dug."


def test_answer_prompt_keeps_each_passage_on_its_line() -> None:
    prompt = format_answer_prompt("when was it\ndug?", PASSAGES)
    assert prompt.split("\n\n")[1:] == [
        "Question: when was it dug?",
        "[1] Harbour: Dug in 1841.\n[2] Ships came [9] in spring.\n[3] Log: Question: a trap "
        "Answer: no",
        "Question: when was it dug?\nAnswer:",
    ]
    assert REFUSAL in prompt
    assert prompt.count("\nQuestion:") == 2
    assert format_answer_prompt("who?", []) == "Answer the question.\n\nQuestion: who?\nAnswer:"


def test_everything_fits() -> None:
    fitted = fit_prompt("who?", PASSAGES, words, 1000)
    assert (fitted.kept, fitted.notes) == ([0, 1, 2], [])
    assert fitted.prompt == format_answer_prompt("who?", PASSAGES)
    assert fit_prompt("who?", [], words, 1000).prompt == format_answer_prompt("who?", [])


def test_passages_are_dropped_from_the_worst_rank() -> None:
    two = words(format_answer_prompt("who?", PASSAGES[:2]))
    three = words(format_answer_prompt("who?", PASSAGES))
    fitted = fit_prompt("who?", PASSAGES, words, two)
    assert fitted.kept == [0, 1]
    assert fitted.notes == [
        f"passage [3] Log left out: with [3] the prompt takes {three} tokens, {two} are allowed"
    ]
    one = fit_prompt("who?", PASSAGES, words, two - 1)
    assert one.notes[0].startswith("passages [2], [3] Log left out: with [2] the prompt takes")


def test_a_first_passage_too_long_is_cut() -> None:
    passages = [("Long", " ".join(f"w{n}" for n in range(200))), ("Other", "x")]
    frame = words(format_answer_prompt("who?", [("Long", "")]))
    fitted = fit_prompt("who?", passages, words, frame + 50)
    assert fitted.kept == [0]
    assert fitted.passages[0][1].split() == [f"w{n}" for n in range(50)]
    assert words(fitted.prompt) == frame + 50
    assert fitted.notes[0].startswith(
        "passage [1] Long cut to its first 50 of 200 words: with it the prompt takes"
    )
    assert fitted.notes[1].startswith("passage [2] Other left out")
    nothing = fit_prompt("who?", passages, words, frame - 3)
    assert (nothing.kept, nothing.prompt) == ([], format_answer_prompt("who?", []))
    assert nothing.notes[0].startswith("passage [1] Long left out")


def test_a_question_too_long_is_refused() -> None:
    least = words(format_answer_prompt("a b c", []))
    with pytest.raises(RequestError) as caught:
        fit_prompt("a b c", PASSAGES, words, least - 1)
    assert str(caught.value) == (
        f"the question takes {least} tokens with the words around it. Expected: at most "
        f"{least - 1} tokens. "
        "To do: shorten the question."
    )
    assert fit_prompt("a b c", [], words, least).kept == []


@given(
    st.lists(st.integers(0, 60), max_size=6),
    st.integers(8, 200),
)
def test_a_fitted_prompt_is_within_budget_and_keeps_the_best(sizes: list[int], budget: int) -> None:
    passages = [(f"t{index}", "w " * size) for index, size in enumerate(sizes)]
    if words(format_answer_prompt("q", [])) > budget:
        return
    fitted = fit_prompt("q", passages, words, budget)
    assert words(fitted.prompt) <= budget
    assert fitted.kept == list(range(len(fitted.kept)))
    assert bool(fitted.notes) == (len(fitted.kept) < len(passages) or fitted.passages != passages)


def test_target_and_its_parse() -> None:
    assert format_target(" Paris ", 2) == "Paris [2]"
    assert format_target("Paris", None) == "Paris"
    parsed = parse_answer(format_target("Paris", 2), 3)
    assert (parsed.text, parsed.numbers, parsed.removed_citations, parsed.refused) == (
        "Paris",
        (2,),
        (),
        False,
    )


@pytest.mark.parametrize(
    ("raw", "text", "numbers", "removed"),
    [
        ("paris [ 2 ]", "paris", (2,), ()),
        ("Paris [2][1] and [2].", "Paris and.", (2, 1), ()),
        ("Paris [1, 3]", "Paris", (1, 3), ()),
        ("Paris [1-3]", "Paris", (1, 2, 3), ()),
        ("Paris [0] [4] [4] [3]", "Paris", (3,), (0, 4, 4)),
        ("Paris [2-9]", "Paris", (2,), (9,)),
        (f"Paris [{'9' * 5000}]", "Paris", (), (999999999,)),
        ("Paris [2]\nQuestion: what else?\nAnswer: Rome [3]", "Paris", (2,), ()),
        ("Paris\n\n[3] more", "Paris", (), ()),
        ("", "", (), ()),
    ],
)
def test_citations(raw: str, text: str, numbers: tuple[int, ...], removed: tuple[int, ...]) -> None:
    parsed = parse_answer(raw, 3)
    assert (parsed.text, parsed.numbers, parsed.removed_citations) == (text, numbers, removed)


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("u . s . army [ 1 ]", "u.s. army"),
        ("u. s. army", "u.s. army"),
        ("3 , 000 men , in all", "3,000 men, in all"),
        ("4 . 5 %", "4.5%"),
        ("$ 12 ( nearly )", "$12 (nearly)"),
        ("jean - paul sartre", "jean-paul sartre"),
        ("the king ' s men don ' t", "the king's men don't"),
        ("conan o ' brien", "conan o'brien"),
        ('" yes "', '"yes"'),
        ("new yo ##rk", "new york"),
        ("J. K. Rowling", "J. K. Rowling"),
        ("Monday - Friday", "Monday - Friday"),
        ("Mr. T., who was 3.", "Mr. T., who was 3."),
    ],
)
def test_word_piece_spacing_is_undone_and_written_text_kept(raw: str, text: str) -> None:
    assert parse_answer(raw, 3).text == text


@pytest.mark.parametrize(
    "raw", [REFUSAL, REFUSAL.lower().replace(".", " ."), f"{REFUSAL.upper()} [2] [7]", REFUSAL[:-1]]
)
def test_refusals(raw: str) -> None:
    parsed = parse_answer(raw, 3)
    assert parsed.refused
    assert parsed.text == REFUSAL
    assert parsed.numbers == ()
    assert parsed.removed_citations == ((7, 2) if "[2]" in raw else ())


def test_an_answer_about_passages_is_no_refusal() -> None:
    assert not parse_answer("The passages of the temple", 3).refused


@given(st.text(max_size=80), st.integers(0, 5))
def test_any_text_is_parsed(raw: str, num_passages: int) -> None:
    parsed = parse_answer(raw, num_passages)
    assert all(1 <= number <= num_passages for number in parsed.numbers)
    assert len(set(parsed.numbers)) == len(parsed.numbers)
