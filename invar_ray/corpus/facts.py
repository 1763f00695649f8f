"""The demo corpus: checkable facts as tables, turned into short documents and families of
questions.

Everything is the project's own writing [ours]: ``data/<table>.csv`` holds the facts (one subject a
row, ``|`` between aliases of a value, the first is the one that documents state),
``data/<table>.yaml`` the sentences.  Its keys are:

``prefix``      of document ids: ``facts-<prefix>-<subject>``;
``group``       the column whose equals are named as neighbours, so that subjects turn up in each
other's documents; ``documents``   slots, each a pool of sentences of which one is taken (the ones
that fill the most columns go first); ``questions``   relation -> ``answer`` (a column; ``name``
asks for the subject itself), ``needs`` (columns that must be
                filled), ``skip`` (subjects left out), and the wordings ``train`` and ``dev``.

Every choice hangs on a hash of the subject's name, never on Python's ``hash`` or a random state:
two processes, or two versions of Python, see the same corpus.  Dev questions are about held-out
subjects *and* in held-out wordings.
"""

from __future__ import annotations

import csv
import io
import re
import unicodedata
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from string import Formatter
from typing import Literal

import yaml

from invar_ray.schema import Document, Example
from invar_ray.text.answers import contains_answer
from invar_ray.text.stable import stable_hash

TABLES = (
    "books",
    "countries",
    "elements",
    "inventions",
    "mountains",
    "paintings",
    "planets",
    "rivers",
    "scientists",
    "states",
)
"""Names of the fact tables, in the order of their documents in the corpus."""

DEV_SHARE = 0.23
"""Share of each table's subjects that only dev questions are about."""

MIN_WORDINGS = 4
"""A question with fewer fitting wordings is left out: columns can be empty, and wordings can hold
the answer.
"""

NUM_REWRITES = 4
"""Rewrites that come with an example, where as many wordings fit."""

URI = "builtin:facts"

Split = Literal["train", "dev"]


@dataclass(frozen=True)
class _Relation:
    """One kind of question about the subjects of a table."""

    name: str
    answer: str
    needs: tuple[str, ...]
    skip: frozenset[str]
    wordings: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class _Subject:
    """A row: first aliases as template fields, all aliases as answers."""

    id: str
    name: str
    fields: dict[str, str]
    aliases: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class _Table:
    """A fact table with its sentences; subjects stand in file order."""

    prefix: str
    subjects: tuple[_Subject, ...]
    slots: tuple[tuple[str, ...], ...]
    relations: tuple[_Relation, ...]
    dev: frozenset[str]


def documents() -> list[Document]:
    """All documents of the demo corpus, train and dev subjects alike, in a fixed order.

    Each is a few sentences (about 25 to 110 words) that state the facts of one subject and name
    neighbours of it.
    """
    return [
        Document(
            id=subject.id,
            title=_title(subject),
            text=_text(table, subject),
            uri=f"{URI}#{subject.id}",
        )
        for table in map(_table, TABLES)
        for subject in table.subjects
    ]


def questions(split: Split) -> list[Example]:
    """The question families of a split: an anchor wording, up to four rewrites, answers and
    positive documents.

    The examples are mixed over tables and relations by a stable hash, so that any first n of them
    are a fair sample.

    Args:
        split: ``train`` or ``dev``.  No subject and no wording of the one occurs in the other.

    Raises:
        ValueError: for any other split.
    """
    if split not in ("train", "dev"):
        raise ValueError(f"split is {split!r}, expected 'train' or 'dev'")
    examples = []
    for table in map(_table, TABLES):
        for subject in table.subjects:
            if (subject.id in table.dev) == (split == "dev"):
                examples += [
                    made
                    for relation in table.relations
                    if (made := _example(subject, relation, split))
                ]
    return sorted(examples, key=lambda example: stable_hash("order", example.id))


def _example(subject: _Subject, relation: _Relation, split: str) -> Example | None:
    needed = (relation.answer, *relation.needs)
    if subject.name in relation.skip or not all(subject.fields[column] for column in needed):
        return None
    answers = subject.aliases[relation.answer]
    rendered = [
        _render(wording, subject)
        for wording in relation.wordings[split]
        if _filled(wording, subject)
    ]
    # "Which country is governed from Kuwait City?" gives itself away.
    fitting = [text for text in rendered if not contains_answer(text, answers)]
    if len(fitting) < MIN_WORDINGS:
        return None
    fitting.sort(key=lambda text: stable_hash("wording", subject.id, relation.name, text))
    # The anchor is a whole sentence; keyword queries come as rewrites only.
    anchor = next((text for text in fitting if text[-1] in "?."), fitting[0])
    fitting.remove(anchor)
    return Example(
        id=f"{subject.id}-{relation.name}",
        question=anchor,
        answers=answers,
        positive_ids=(subject.id,),
        rewrites=tuple(fitting[:NUM_REWRITES]),
    )


def _text(table: _Table, subject: _Subject) -> str:
    sentences = []
    for number, slot in enumerate(table.slots):
        fitting = [sentence for sentence in slot if _filled(sentence, subject)]
        # A slot may hold sentences for two facts together and for either alone: the fullest that
        # fit say it all.
        most = max((len(_columns(sentence)) for sentence in fitting), default=0)
        fullest = [sentence for sentence in fitting if len(_columns(sentence)) == most]
        if fullest:
            chosen = fullest[stable_hash("slot", subject.id, number) % len(fullest)]
            sentences.append((number, _render(chosen, subject)))
    # The first sentence introduces the subject; the others ("It ...") may stand in any order.
    rest = sorted(sentences[1:], key=lambda item: stable_hash("order", subject.id, item[0]))
    return " ".join(text for _, text in sentences[:1] + rest)


def _title(subject: _Subject) -> str:
    return subject.name[0].upper() + subject.name[1:]


@cache
def _columns(template: str) -> tuple[str, ...]:
    return tuple(name for _, name, _, _ in Formatter().parse(template) if name)


def _filled(template: str, subject: _Subject) -> bool:
    return all(subject.fields[column] for column in _columns(template))


def _render(template: str, subject: _Subject) -> str:
    text = template.format_map(subject.fields)
    # Keyword queries (no closing mark) keep their case.
    return text[0].upper() + text[1:] if text[-1] in ".?" else text


@cache
def _table(name: str) -> _Table:
    folder = files("invar_ray.corpus") / "data"
    spec = yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8"))
    rows = list(csv.DictReader(io.StringIO((folder / f"{name}.csv").read_text(encoding="utf-8"))))
    group = spec["group"]
    subjects = tuple(_subject(row, spec["prefix"], _neighbours(row, rows, group)) for row in rows)
    by_hash = sorted(
        (subject.id for subject in subjects), key=lambda identity: stable_hash("split", identity)
    )
    relations = tuple(
        _Relation(
            name=relation,
            answer=entry["answer"],
            needs=tuple(entry.get("needs", ())),
            skip=frozenset(entry.get("skip", ())),
            wordings={split: tuple(entry[split]) for split in ("train", "dev")},
        )
        for relation, entry in spec["questions"].items()
    )
    return _Table(
        prefix=spec["prefix"],
        subjects=subjects,
        slots=tuple(tuple(slot) for slot in spec["documents"]),
        relations=relations,
        dev=frozenset(by_hash[: round(DEV_SHARE * len(by_hash))]),
    )


def _subject(row: dict[str, str], prefix: str, neighbours: list[dict[str, str]]) -> _Subject:
    aliases = {column: tuple(value.split("|")) for column, value in row.items()}
    fields = {column: values[0] for column, values in aliases.items()}
    fields["subject"] = _phrase(row)
    fields["peer"], fields["peer2"] = (_phrase(other) for other in neighbours)
    for column in row:
        fields[f"a_{column}"] = _with_article(fields[column])
    return _Subject(
        id=f"facts-{prefix}-{_slug(row['name'])}", name=row["name"], fields=fields, aliases=aliases
    )


def _neighbours(
    row: dict[str, str], rows: list[dict[str, str]], group: str | None
) -> list[dict[str, str]]:
    """The next two of a ring, in hash order, of the rows alike in ``group`` (of all where that is
    too few).
    """
    alike = [other for other in rows if group and other[group] == row[group]]
    ring = sorted(
        alike if len(alike) >= 3 else rows, key=lambda other: stable_hash("ring", other["name"])
    )
    place = ring.index(row)
    return [ring[(place + step) % len(ring)] for step in (1, 2)]


def _phrase(row: dict[str, str]) -> str:
    """The subject as it stands inside a sentence ("the Danube")."""
    return row.get("phrase") or row["name"]


def _with_article(text: str) -> str:
    return f"{'an' if text[:1].lower() in tuple('aeiou') else 'a'} {text}" if text else ""


def _slug(name: str) -> str:
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode("ascii").lower()
    return re.sub(r"[^a-z0-9]+", "-", plain.replace("'", "")).strip("-")
