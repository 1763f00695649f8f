"""Follow-ups, said so that they stand alone, and what is left as it is."""

from __future__ import annotations

import pytest

from invar_ray.answering.followup import Turn, stand_alone

DRACULA = [Turn("Who wrote Dracula?", "Bram Stoker [1]")]


CAPITAL = Turn("What is the capital of Belisk?")
STOKER = DRACULA[0]


@pytest.mark.parametrize(
    "before, question, wanted",
    [
        (Turn("Who keeps Gorse Island?"), "And where does it lie?", "Where does Gorse Island lie?"),
        (CAPITAL, "What is its coin?", "What is Belisk's coin?"),
        (
            CAPITAL,
            "And of Corrie?",
            "What is the capital of Corrie?",
        ),
        (Turn("Who wrote Dracula?"), "What about Emma?", "Who wrote Emma?"),
        (
            STOKER,
            "When was he born?",
            "When was Bram Stoker born?",
        ),
        (
            STOKER,
            "When did it appear?",
            "When did Dracula appear?",
        ),
        (Turn("Tell me about the copper mine."), "Is it deep?", "Is copper mine deep?"),
        (Turn("Who rules Belisk?"), "How many live there?", "How many live in Belisk?"),
    ],
)
def test_a_follow_up_gets_what_it_points_to(before: Turn, question: str, wanted: str) -> None:
    assert stand_alone(question, [before]) == wanted


@pytest.mark.parametrize(
    "question",
    [
        "Who painted Las Meninas?",
        "Does it rain in Spain?",
        "What is the capital of Corrie?",
        "Which island has the most people?",
        "Is there life on Mars?",
        "And why?",
        "Thanks!",
        "",
        "?",
    ],
)
def test_what_stands_alone_is_left_alone(question: str) -> None:
    assert stand_alone(question, DRACULA) is None


def test_without_turns_nothing_is_a_follow_up() -> None:
    assert stand_alone("Where does it hang?", []) is None
    assert stand_alone("And of Corrie?", [Turn("")]) is None


def test_a_chain_is_read_from_its_beginning() -> None:
    turns = [Turn("What is the capital of Belisk?", "Arvon"), Turn("And of Corrie?", "Elvay")]
    assert stand_alone("What is its currency?", turns) == "What is Corrie's currency?"


def test_names_are_put_in_as_they_are() -> None:
    asked = "Where is it?"
    assert stand_alone(asked, [Turn("Who met O'Neil-Smith?")]) == "Where is O'Neil-Smith?"
    assert stand_alone(asked, [Turn("Who owns Café de la Paix?")]) == "Where is Café de la Paix?"
