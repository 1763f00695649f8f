"""From hits to a checked answer: what the model writes is scripted, what is made of it is the thing
under test.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from invar_ray.answering.rag import answer_batch, answer_question, answer_with_hits, build_prompt
from invar_ray.config import TinyConfig
from invar_ray.errors import RequestError
from invar_ray.models.generator import Generation, Generator
from invar_ray.models.tiny import build_tiny
from invar_ray.schema import Hit
from invar_ray.text.prompts import REFUSAL, format_answer_prompt

HITS = [
    Hit(
        "p1",
        "d1",
        1,
        0.9,
        "Gorse Island",
        "The keeper of the light was Mara Voss until the autumn storm.",
    ),
    Hit(
        "p2", "d2", 2, 0.8, "Harbour", "Barley and salt were traded here by Mara Voss and her sons."
    ),
    Hit("p3", "d3", 3, 0.7, "Ferry", "The ferry leaves at nine."),
]


class Scripted:
    """A generator that counts words as tokens and writes what it is told to, by question."""

    def __init__(
        self, replies: dict[str, str], max_context: int = 500, finish: Any = "eos"
    ) -> None:
        self.replies, self.max_context, self.finish = replies, max_context, finish
        self.batches: list[list[str]] = []

    def count_tokens(self, text: str) -> int:
        return len(text.split())

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[Generation]:
        self.batches.append(list(prompts))
        texts = [
            next(reply for question, reply in self.replies.items() if question in prompt)
            for prompt in prompts
        ]
        return [Generation(text, [-1.0, -0.5], 2, self.finish) for text in texts]


def ask(reply: str, hits: Sequence[Hit] = HITS, **options: Any) -> Any:
    return answer_with_hits(
        Scripted({"Who": reply}, **options), "Who kept the light?", hits, max_new_tokens=10
    )


def test_generated_citation_points_to_its_passage() -> None:
    answer = ask("Mara Voss [2]")
    assert answer.text == "Mara Voss"
    assert [
        (c.number, c.passage_id, c.document_id, c.title, c.source) for c in answer.citations
    ] == [(2, "p2", "d2", "Harbour", "generated")]
    assert answer.hits == tuple(HITS)
    assert answer.confidence == -0.75
    assert answer.notes == ()
    assert answer.timings["generate_s"] >= 0


def test_citation_out_of_range_is_removed_with_a_note() -> None:
    answer = ask("Mara Voss [7] [1] [7]")
    assert [citation.number for citation in answer.citations] == [1]
    assert answer.notes == ("removed [7]: the prompt had 3 passages",)
    assert answer.removed_citations == 2


def test_without_citations_the_passages_that_hold_the_answer_are_cited() -> None:
    answer = ask("mara voss")
    assert [(citation.number, citation.source) for citation in answer.citations] == [
        (1, "matched"),
        (2, "matched"),
    ]
    assert ask("Nobody at all").citations == ()
    assert ask("ara Vos").citations == (), "matching is by whole words"
    assert ask("the").citations == (), "an article stands in every passage"


def test_only_a_citation_that_was_removed_still_falls_back_to_matching() -> None:
    answer = ask("nine [9]")
    assert [(citation.number, citation.source) for citation in answer.citations] == [(3, "matched")]
    assert answer.notes == ("the model cited [9]; the answer stands in [3]",), "one note, not two"


def test_a_citation_of_a_passage_without_the_answer_gives_way_to_one_with_it() -> None:
    answer = ask("Mara Voss [3]")
    assert [(citation.number, citation.source) for citation in answer.citations] == [(1, "matched")]
    assert answer.notes == ("the model cited [3]; the answer stands in [1]",)
    mixed = ask("Mara Voss [3] [2]")  # of those that it cited, the one that holds it stays
    assert [(citation.number, citation.source) for citation in mixed.citations] == [
        (2, "generated")
    ]
    for wrong in ("nine [2]", "nine [2] [1]", "nine [2] [9]"):
        alone = ask(wrong)
        assert [(c.number, c.source) for c in alone.citations] == [(3, "matched")]
        assert len(alone.notes) == 1
    titled = ask("Harbour [1]")  # a title counts as well: it stands in the prompt
    assert [(c.number, c.source) for c in titled.citations] == [(2, "matched")]
    elsewhere = ask("the keeper's sister [3]")  # said in other words than the passages'
    assert [(citation.number, citation.source) for citation in elsewhere.citations] == [
        (3, "generated")
    ]


def test_of_two_passages_that_hold_the_answer_the_one_about_the_question_is_cited() -> None:
    rivers = [
        Hit("p1", "d1", 1, 0.9, "Yangtze", "A river of Asia."),
        Hit("p2", "d2", 2, 0.8, "Mekong", "A river of Asia."),
    ]

    def cited(reply: str, question: str = "On which landmass do we find the Yangtze?") -> Any:
        return answer_with_hits(Scripted({"?": reply}), question, rivers, max_new_tokens=10)

    for wrong in ("Asia [2]", "Asia [2] [7]"):
        moved = cited(wrong)
        assert [(c.number, c.source) for c in moved.citations] == [(1, "matched")]
        assert len(moved.notes) == 1, "one note, not two"
    assert cited("Asia [2]").notes == (
        "the model cited [2]; the passage about what is asked is [1]",
    )
    for fine in ("Asia [1]", "Asia [2] [1]"):
        kept = cited(fine)
        assert [(c.number, c.source) for c in kept.citations] == [(1, "generated")]
        assert kept.notes == ()
    assert [c.number for c in cited("Asia").citations] == [1]
    # Where no title says which, the model decides.
    both = cited("Asia [2]", "On which continent?")
    assert [(c.number, c.source) for c in both.citations] == [(2, "generated")]
    assert both.notes == ()


def test_a_refusal_cites_nothing() -> None:
    answer = ask(f"{REFUSAL} [1]")
    assert answer.refused
    assert answer.text == REFUSAL
    assert answer.citations == ()
    assert answer.notes == ()


def test_passages_that_do_not_fit_are_left_out_from_the_worst_and_noted() -> None:
    size = len(
        format_answer_prompt(
            "Who kept the light?", [(hit.title, hit.text) for hit in HITS[:2]]
        ).split()
    )
    answer = ask("Mara Voss [3]", max_context=size + 10)
    assert [hit.passage_id for hit in answer.hits] == ["p1", "p2"]
    assert any("left out" in note for note in answer.notes)
    assert "the model cited [3]; the answer stands in [1]" in answer.notes
    assert [citation.number for citation in answer.citations] == [1]


def test_a_cut_passage_is_matched_as_it_was_shown() -> None:
    first = len(format_answer_prompt("Who?", [(HITS[0].title, "The keeper of the light")]).split())
    answer = ask_who("Mara Voss", max_context=first + 10)
    assert [hit.passage_id for hit in answer.hits] == ["p1"]
    assert answer.citations == ()
    assert ask_who("keeper", max_context=first + 10).citations[0].passage_id == "p1"


def ask_who(reply: str, **options: Any) -> Any:
    return answer_with_hits(
        Scripted({"Who?": reply}, **options), "Who?", HITS[:1], max_new_tokens=10
    )


def test_a_question_beyond_the_context_is_refused_with_counts() -> None:
    generator = Scripted({}, max_context=50)
    with pytest.raises(RequestError, match=r"takes \d+ tokens .* context of 50.*at most 40 tokens"):
        answer_with_hits(generator, "why " * 60, HITS, max_new_tokens=10)
    assert generator.batches == []


def test_without_hits_the_answer_says_that_it_rests_on_none() -> None:
    answer = ask("Mara Voss [1]", hits=[])
    assert answer.citations == ()
    assert "no passage stands in the prompt: the answer rests on none" in answer.notes


def test_a_cut_answer_is_noted() -> None:
    assert ask("Mara", finish="length").notes == ("the answer was cut at 2 tokens",)


def test_batches_keep_the_order_and_equal_single_answers() -> None:
    replies = {
        "Q1?": "Mara Voss [1]",
        "Q2?": "nine [3]",
        "Q3?": "salt",
        "Q4?": REFUSAL,
        "Q5?": "x [9]",
    }
    hits = [HITS, HITS[1:], HITS[:1], [], HITS]
    generator = Scripted(replies)
    together = answer_batch(generator, list(replies), hits, max_new_tokens=5, batch_size=2)
    assert [len(batch) for batch in generator.batches] == [2, 2, 1]
    assert [answer.question for answer in together] == list(replies)
    apart = [
        answer_with_hits(generator, q, h, max_new_tokens=5)
        for q, h in zip(replies, hits, strict=True)
    ]
    assert [(a.text, a.citations, a.notes) for a in together] == [
        (a.text, a.citations, a.notes) for a in apart
    ]
    with pytest.raises(ValueError, match="5 questions but 1"):
        answer_batch(generator, list(replies), [HITS], max_new_tokens=5, batch_size=2)


def test_answer_question_retrieves_first_and_times_both() -> None:
    class Fixed:
        def retrieve(self, questions: list[str], top_k: int) -> list[list[Hit]]:
            assert questions == ["Who kept the light?"]
            return [HITS[:top_k]]

    answer = answer_question(
        Fixed(),
        Scripted({"Who": "Mara Voss [1]"}),
        "Who kept the light?",
        top_k=2,
        max_new_tokens=5,
    )
    assert [hit.passage_id for hit in answer.hits] == ["p1", "p2"]
    assert set(answer.timings) == {"retrieve_s", "generate_s"}
    with pytest.raises(RequestError, match="empty"):
        answer_question(Fixed(), Scripted({}), " \n", top_k=2, max_new_tokens=5)


def test_with_a_real_model_the_prompt_always_fits() -> None:
    tokenizer = build_tiny(TinyConfig(num_layers=1, num_heads=2, intermediate_size=16), seed=0)[1]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=96,
        eos_token_id=tokenizer.eos_token_id,
    )
    generator = Generator(LlamaForCausalLM(config), tokenizer)
    for count in range(len(HITS) + 1):
        prompt = build_prompt(generator, "Who kept the light?", HITS[:count], max_new_tokens=4)
        assert generator.count_tokens(prompt.text) <= 92
        answer = answer_with_hits(generator, "Who kept the light?", HITS[:count], max_new_tokens=4)
        assert answer.hits == prompt.hits
        assert answer.confidence is not None
        assert answer.confidence < 0
