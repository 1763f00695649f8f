"""Training questions for a corpus that has none, by rule: from plain sentences and definitions.

A sentence with a span of a known type (a year, a date, a number of things, a name ..) becomes the
question for that span: ``The harbour was dug in 1841.`` gives
``In which year was the harbour dug?``, with ``The harbour was dug in which year?``, a gap text and
keywords as other wordings.  The answer stands in the document, the question can be understood
without it.  Everything hangs on hashes of the texts and the seed: the same documents give the same
questions anywhere. Rules are for English. [ours]
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from invar_ray.questions.cloze import plain_sentences, questions_of
from invar_ray.questions.lexicon import FUNCTION_WORDS
from invar_ray.questions.rules import comparison_key
from invar_ray.schema import Document, Example
from invar_ray.text.answers import contains_answer
from invar_ray.text.stable import stable_hash

_DEV_SHARE = 0.2


@dataclass(frozen=True, slots=True)
class MadeQuestion:
    """A question made from a document.

    Attributes:
        example: what a reader of questions gets; ``positive_ids`` is the document.
        answer_type: ``year``, ``date``, ``number``, ``percentage``, ``money``, ``agent``, ``name``,
            ``place``, ``subject``, ``definition`` or, from a language model, ``model``.
        start: character offset of its sentence in the document's text.
    """

    example: Example
    answer_type: str
    start: int


def make_questions(document: Document, *, most: int, seed: int) -> list[MadeQuestion]:
    """At most ``most`` questions about a document, types taking turns, in text order."""
    drafts: dict[str, list[MadeQuestion]] = {}
    for made in _drafts(document):
        drafts.setdefault(made.answer_type, []).append(made)
    for kind, group in drafts.items():
        group.sort(key=lambda made: stable_hash("question", seed, kind, made.example.question))
    taken: list[MadeQuestion] = []
    sentences: set[int] = set()
    while any(drafts.values()) and len(taken) < most:
        for group in drafts.values():
            # One question a sentence while there are others: two gaps of one sentence teach little
            # more than one.
            at = next((at for at, made in enumerate(group) if made.start not in sentences), 0)
            if group and len(taken) < most:
                taken.append(group.pop(at))
                sentences.add(taken[-1].start)
    return sorted(taken, key=lambda made: (made.start, made.example.id))


def without_clashes(made: Iterable[MadeQuestion]) -> list[MadeQuestion]:
    """Questions of a corpus without duplicates: one that several documents ask stays once if they
    agree on the answer, and goes altogether if they do not.
    """
    by_key: dict[str, list[MadeQuestion]] = {}
    for question in made:
        by_key.setdefault(comparison_key(question.example.question), []).append(question)
    kept = []
    for same in by_key.values():
        answers = {comparison_key(question.example.answers[0]) for question in same}
        if len(answers) == 1:
            kept.append(same[0])
    return kept


def findable(
    made: Sequence[MadeQuestion], searches: Sequence[Callable[[list[str]], list[list[str]]]]
) -> list[MadeQuestion]:
    """The questions whose document at least one of the searches finds: a question that could be
    about any of them teaches nothing.

    Args:
        made: questions.
        searches: texts to the ids of the documents that are found for each.
    """
    texts = [question.example.question for question in made]
    found = [search(texts) for search in searches] if texts else []
    return [
        question
        for number, question in enumerate(made)
        if any(question.example.positive_ids[0] in ids[number] for ids in found)
    ]


def split_by_document(
    made: list[MadeQuestion], texts: dict[str, str], seed: int
) -> tuple[list[MadeQuestion], list[MadeQuestion]]:
    """Train and dev questions, about a fifth dev, no document in both (copies of one text stay
    together).

    Questions about a single document are split by place instead: dev is its last fifth.

    Args:
        made: questions.
        texts: document id -> text.
        seed: of the draw.
    """
    groups: dict[int, list[MadeQuestion]] = {}
    for question in made:
        groups.setdefault(
            stable_hash("split", seed, texts[question.example.positive_ids[0]]), []
        ).append(question)
    if len(groups) < 2:
        ordered = sorted(made, key=lambda question: question.start)
        count = round(len(ordered) * _DEV_SHARE) or min(1, len(ordered) - 1)
        return ordered[: len(ordered) - count], ordered[len(ordered) - count :]
    keys = sorted(groups)
    dev = set(keys[: max(1, round(_DEV_SHARE * len(keys)))])
    train = [question for question in made if not _is_in(question, groups, dev)]
    return train, [question for question in made if _is_in(question, groups, dev)]


def is_sound(question: str, answer: str, document: Document) -> bool:
    """Whether the answer stands in the document and not in the question, and the question has
    something to say.
    """
    content = [
        word for word in re.findall(r"[^\W_]+", question) if word.lower() not in FUNCTION_WORDS
    ]
    return (
        len(content) >= 3
        and len(answer.split()) <= 20
        and contains_answer(document.text, [answer])
        and not contains_answer(question, [answer])
    )


def _is_in(question: MadeQuestion, groups: dict[int, list[MadeQuestion]], keys: set[int]) -> bool:
    return any(question in groups[key] for key in keys)


def _drafts(document: Document) -> Iterator[MadeQuestion]:
    taken: set[str] = set()
    for start, sentence in plain_sentences(document.text):
        for kind, answer, wordings in questions_of(sentence, document.title):
            made = _made(document, kind, answer, wordings, start)
            key = comparison_key(wordings[0])
            if made is not None and key not in taken:
                taken.add(key)
                yield made


def _made(
    document: Document, kind: str, answer: str, wordings: list[str], start: int
) -> MadeQuestion | None:
    if not is_sound(wordings[0], answer, document):
        return None
    rewrites = [text for text in wordings[1:] if not contains_answer(text, [answer])]
    number = f"{stable_hash(kind, wordings[0]):016x}"[:8]
    example = Example(
        f"{document.id}:{number}",
        wordings[0],
        (answer,),
        (document.id,),
        tuple(dict.fromkeys(rewrites)),
    )
    return MadeQuestion(example, kind, start)
