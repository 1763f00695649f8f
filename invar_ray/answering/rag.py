"""Questions to answers with citations: retrieve, fit the passages into the prompt, generate, check
what was cited.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from invar_ray.answering.certainty import Certainty, rests_on, signs_of, supporting
from invar_ray.answering.followup import Turn, stand_alone
from invar_ray.answering.fusion import fuse_hits
from invar_ray.answering.rerank import PassageRetriever
from invar_ray.errors import RequestError
from invar_ray.models.generator import Generation
from invar_ray.schema import Answer, Citation, Hit
from invar_ray.text.prompts import REFUSAL, fit_prompt, format_answer_prompt, parse_answer

STOP_STRINGS = ("\n\n", "\nQuestion:", "\nPassages:")
"""Where an answer ends even if the model goes on: base models like to invent a next question."""


class TextGenerator(Protocol):
    """What answering needs of a generator; :class:`invar_ray.models.generator.Generator` is one."""

    @property
    def max_context(self) -> int:
        """Most tokens of prompt and answer together."""
        ...

    def count_tokens(self, text: str, /) -> int:
        """Tokens of a prompt."""
        ...

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        stop: Sequence[str] = ...,
        temperature: float = ...,
        seed: int = ...,
    ) -> list[Generation]:
        """Continue each prompt."""
        ...


@dataclass(frozen=True, slots=True)
class AnswerPrompt:
    """A prompt and what stands in it.

    Attributes:
        text: the prompt.
        hits: the passages in it; the passage with number n is ``hits[n - 1]``.
        shown: their texts as they stand in it (the first may be cut to fit).
        notes: what had to be left out.
    """

    text: str
    hits: tuple[Hit, ...]
    shown: tuple[str, ...]
    notes: tuple[str, ...]


def build_prompt(
    generator: TextGenerator, question: str, hits: Sequence[Hit], *, max_new_tokens: int
) -> AnswerPrompt:
    """The prompt for a question with as many of its hits, by rank, as the context leaves room for.

    Raises:
        RequestError: if the question alone leaves no room for ``max_new_tokens``; it names the
            token counts.
    """
    budget = generator.max_context - max_new_tokens
    bare = generator.count_tokens(format_answer_prompt(question, []))
    if bare > budget:
        raise RequestError(
            f"the question takes {bare} tokens as a prompt and {max_new_tokens} are kept for the "
            "answer, "
            f"{bare - budget} too many for the model's context of {generator.max_context}",
            expected=f"a prompt of at most {max(budget, 0)} tokens",
            action="shorten the question",
        )
    fitted = fit_prompt(
        question, [(hit.title, hit.text) for hit in hits], generator.count_tokens, budget
    )
    notes = [*fitted.notes]
    if not fitted.kept:
        notes.append("no passage stands in the prompt: the answer rests on none")
    return AnswerPrompt(
        fitted.prompt,
        tuple(hits[i] for i in fitted.kept),
        tuple(text for _, text in fitted.passages),
        tuple(notes),
    )


def answer_question(
    retriever: PassageRetriever,
    generator: TextGenerator,
    question: str,
    *,
    top_k: int,
    max_new_tokens: int,
    turns: Sequence[Turn] = (),
) -> Answer:
    """Answer one question from the ``top_k`` passages that the retriever finds.

    Args:
        retriever, generator: what finds and what writes.
        question: as asked.
        top_k, max_new_tokens: how many passages, and the longest answer.
        turns: before it; a follow-up is searched in words that stand alone, what the words as asked
            find weighing half as much, and answered in them.

    Returns:
        The answer; ``timings`` has ``retrieve_s`` and ``generate_s`` in seconds.

    Raises:
        RequestError: if the question is blank or does not fit the context.
    """
    if not question.strip():
        raise RequestError("the question is empty", expected="some words")
    start = time.perf_counter()
    read_as = stand_alone(question, turns)
    if read_as is None:
        hits = retriever.retrieve([question], top_k)[0]
    else:
        made, asked = retriever.retrieve([read_as, question], top_k)
        hits, question = fuse_hits([made, made, asked], top_k), read_as
    retrieve_s = time.perf_counter() - start
    answer = answer_with_hits(generator, question, hits, max_new_tokens=max_new_tokens)
    return replace(answer, timings={"retrieve_s": retrieve_s, **answer.timings})


def answer_with_hits(
    generator: TextGenerator, question: str, hits: Sequence[Hit], *, max_new_tokens: int
) -> Answer:
    """Answer one question from passages that were already retrieved; without any, from the model
    alone (noted).

    Raises:
        RequestError: if the question alone does not fit the context.
    """
    return answer_batch(generator, [question], [hits], max_new_tokens=max_new_tokens, batch_size=1)[
        0
    ]


def answer_batch(
    generator: TextGenerator,
    questions: Sequence[str],
    hits_per_question: Sequence[Sequence[Hit]],
    *,
    max_new_tokens: int,
    batch_size: int,
) -> list[Answer]:
    """Answer many questions, ``batch_size`` at a time, prompts of like length together (less
    padding).

    Returns:
        Answers in the order of the questions.  ``timings["generate_s"]`` is the question's even
        share of its batch's time, in seconds.

    Raises:
        RequestError: if a question alone does not fit the context.
        ValueError: if the two sequences differ in length or ``batch_size`` is below 1.
    """
    if len(questions) != len(hits_per_question):
        raise ValueError(f"{len(questions)} questions but {len(hits_per_question)} lists of hits")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    prompts = [
        build_prompt(generator, question, hits, max_new_tokens=max_new_tokens)
        for question, hits in zip(questions, hits_per_question, strict=True)
    ]
    certainty = certainty_of(generator)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].text))
    answers: dict[int, Answer] = {}
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        start = time.perf_counter()
        generations = generator.generate(
            [prompts[index].text for index in batch],
            max_new_tokens=max_new_tokens,
            stop=STOP_STRINGS,
        )
        share = (time.perf_counter() - start) / len(batch)
        for index, generation in zip(batch, generations, strict=True):
            answer = read_answer(questions[index], prompts[index], generation, certainty)
            answers[index] = replace(answer, timings={"generate_s": share})
    return [answers[index] for index in range(len(prompts))]


def certainty_of(generator: Any) -> Certainty | None:
    """What a generator's manifest says of its certainty; ``None``: it never abstains by itself."""
    return Certainty.of(getattr(generator, "certainty", None))


def read_answer(
    question: str,
    prompt: AnswerPrompt,
    generation: Generation,
    certainty: Certainty | None = None,
    *,
    style: str = "",
) -> Answer:
    """An answer from what the model wrote: its text, and citations of passages that were really in
    the prompt.

    The text decides where it can.  Those passages count in which the answer stands (title or text),
    and of several the ones whose title names most of what the question names.  The model's
    citations of such passages stay; where it cited others only, the first that counts is cited,
    with ``source="matched"`` and one note.  Where the model cited nothing, all that count are;
    where the answer stands nowhere, its own citations stay.

    With a ``certainty``, an answer that is less likely right than its threshold becomes a refusal
    that keeps it as a guess.  So does one that rests on ``style``, what the model was told of how
    to word answers, and on no passage.
    """
    parsed = parse_answer(generation.text, len(prompt.hits))
    signs = (
        None
        if certainty is None or parsed.refused
        else signs_of(question, prompt.hits, prompt.shown, parsed.text, generation)
    )
    probability = None if certainty is None or signs is None else certainty.probability(signs)
    unsure = certainty is not None and probability is not None and probability < certainty.threshold
    notes = list(prompt.notes)
    read = [hit.title for hit in prompt.hits] + list(prompt.shown)
    if style and not parsed.refused and rests_on(style, question, read, parsed.text):
        unsure = True
        notes.append("what the model wrote stands in the system prompt and in no passage")
    # A refusal cites nothing; only numbers that stand for no passage are worth a word.
    unknown = [number for number in parsed.removed_citations if not 1 <= number <= len(prompt.hits)]
    if generation.finish == "length":
        notes.append(f"the answer was cut at {generation.num_tokens} tokens")
    citations: tuple[Citation, ...] = ()
    moved = False
    if not parsed.refused and not unsure:
        cited = list(dict.fromkeys(parsed.numbers))
        holding = supporting(question, prompt.hits, prompt.shown, parsed.text)
        meant = [n for n, about in holding.items() if about == max(holding.values())]
        kept = [number for number in cited if number in meant]
        if kept or not holding:
            source, numbers = "generated", kept or cited
        else:
            moved = bool(cited or unknown)
            source, numbers = "matched", meant[:1] if moved else meant
        if moved:
            also = any(number in holding for number in cited)
            why = "the passage about what is asked is" if also else "the answer stands in"
            notes.append(f"the model cited {_marks([*cited, *unknown])}; {why} {_marks(numbers)}")
        citations = tuple(_citation(n, prompt.hits[n - 1], source) for n in numbers)
    if unknown and not moved:
        notes.append(f"removed {_marks(unknown)}: the prompt had {len(prompt.hits)} passages")
    return Answer(
        question=question,
        text=REFUSAL if unsure else parsed.text,
        citations=citations,
        hits=prompt.hits,
        notes=tuple(notes),
        confidence=generation.confidence,
        refused=parsed.refused or unsure,
        removed_citations=len(unknown),
        low_confidence=unsure,
        guess=parsed.text if unsure else "",
        probability=probability,
    )


def _marks(numbers: Sequence[int]) -> str:
    return ", ".join(f"[{number}]" for number in dict.fromkeys(numbers))


def _citation(number: int, hit: Hit, source: str) -> Citation:
    return Citation(number, hit.passage_id, hit.document_id, hit.title, source, hit.place)
