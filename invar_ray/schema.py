"""Records that steps hand each other, with their Arrow schemas.

Names follow the field: a *document* is raw, a *passage* is the indexed unit, a *question* is the
user's text (a *query* is the formatted encoder input), a *rewrite* is the question in other words,
with the same answer, an *environment* is a (rewrite, window) pair.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import pyarrow as pa

from invar_ray.config.fields import Mode as Mode


@dataclass(frozen=True, slots=True)
class Place:
    """Where a part of a document's text stands in its file.

    Attributes:
        start: character offset into the text; the place reaches to the next one's start.
        label: for people: ``page 3``, ``row 12``, a heading in quotes.
    """

    start: int
    label: str


@dataclass(frozen=True, slots=True)
class Document:
    """A raw document, as read.

    Attributes:
        id: unique within the corpus.
        title: may be empty.
        text: the whole text; passages are cut from it by character offsets.
        uri: where it came from (file or URL, with a place in it if known); may be empty.
        file: its file, relative to the folder that was read; empty for documents that come from no
            file.
        places: pages, headings or rows, ascending by ``start``.
        unit: what is counted in the text beside that: ``line`` (apart by a line break),
            ``paragraph`` (by an empty line), or empty.
        metadata: (name, value) of the fields that ``corpus.metadata`` names, where the document has
            them.
    """

    id: str
    title: str
    text: str
    uri: str = ""
    file: str = ""
    places: tuple[Place, ...] = ()
    unit: str = ""
    metadata: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Passage:
    """The indexed unit: ``document.text[start:end]`` is exactly ``text``.

    Attributes:
        id: deterministic: document id, offsets and a content hash.
        document_id: the document it was cut from.
        start, end: character offsets into the document's text, half open.
        place: file and place in it, for people (``manual.pdf, page 3``); empty where the document
            has no file.
        metadata: its document's; a column of its own for each name in the passages table.
    """

    id: str
    document_id: str
    title: str
    text: str
    start: int
    end: int
    uri: str = ""
    place: str = ""
    metadata: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Example:
    """A question with its gold answers and the documents that hold them.

    Attributes:
        id: unique within its file.
        question: the wording in use as the anchor.
        answers: gold answers, any of which is right; the first that stands in the passage cited is
            the training target.
        positive_ids: ids of *documents* (corpus rows) that answer the question.
        rewrites: wordings of the same question that came with the data (may be empty).
    """

    id: str
    question: str
    answers: tuple[str, ...]
    positive_ids: tuple[str, ...]
    rewrites: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Rewrite:
    """A question in other words, with the same answer.

    Attributes:
        question_id: the example it belongs to.
        rewrite: 0 is the anchor (the question as given), 1.. are its rewrites.
        text: the wording.
        kind: how it was made, e.g. ``anchor``, ``given``, ``template``, ``typo``, ``speech``.
        provider: who made it: ``data``, ``rules``, ``file:<uri>``, ``endpoint:<model>``.
    """

    question_id: str
    rewrite: int
    text: str
    kind: str
    provider: str


@dataclass(frozen=True, slots=True)
class Window:
    """A cut of a document: ``document.text[start:end]``.  ``window`` 0 is the anchor cut (the
    indexed passage).
    """

    document_id: str
    window: int
    start: int
    end: int
    kind: str


@dataclass(frozen=True, slots=True)
class Hit:
    """A retrieved passage.

    Attributes:
        passage_id, document_id, title, text, uri, place: of the passage.
        rank: 1 is the best.
        score: cosine similarity with the query, in [-1, 1]; BM25's or the fused score where those
            ranked it.
    """

    passage_id: str
    document_id: str
    rank: int
    score: float
    title: str = ""
    text: str = ""
    uri: str = ""
    place: str = ""


@dataclass(frozen=True, slots=True)
class Citation:
    """A passage that an answer points to.

    Attributes:
        number: the [n] of the answer, 1-based position of the passage in the prompt.
        source: ``generated`` when the model wrote the [n]; ``matched`` when it wrote none, or only
            some without the answer's text, and that was found in the passage.
        place: file and place in it; empty where the document has no file.
    """

    number: int
    passage_id: str
    document_id: str
    title: str
    source: str = "generated"
    place: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the system says to a question.

    Attributes:
        text: the answer without its citation marks.
        citations: the passages it points to, checked to exist.
        hits: the passages that stood in the prompt, by rank.
        notes: anything the user must know: passages dropped for the context budget, citations
            removed, ...
        confidence: mean log-probability of the answer's tokens (nats); ``None`` where the engine
            gives none.
        refused: True where the model said that the passages do not answer, or it was not sure
            enough.
        low_confidence: it was not sure enough: ``text`` is the refusal, ``guess`` what it wrote.
        guess: what the model wrote where that is not the answer; else empty.
        probability: that what it wrote is right, calibrated; ``None`` where the generator was not
            calibrated.
        removed_citations: how often it cited a number that no passage of the prompt has; those
            marks are gone.
    """

    question: str
    text: str
    citations: tuple[Citation, ...] = ()
    hits: tuple[Hit, ...] = ()
    notes: tuple[str, ...] = ()
    confidence: float | None = None
    refused: bool = False
    removed_citations: int = 0
    low_confidence: bool = False
    guess: str = ""
    probability: float | None = None
    timings: dict[str, float] = field(default_factory=dict)


DOCUMENT_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("title", pa.string()),
        ("text", pa.string()),
        ("uri", pa.string()),
        ("file", pa.string()),
        ("places", pa.list_(pa.struct([("start", pa.int64()), ("label", pa.string())]))),
        ("unit", pa.string()),
    ]
)
PASSAGE_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("document_id", pa.string()),
        ("title", pa.string()),
        ("text", pa.string()),
        ("start", pa.int64()),
        ("end", pa.int64()),
        ("uri", pa.string()),
        ("place", pa.string()),
    ]
)


def passage_schema(metadata: Iterable[str] = ()) -> pa.Schema:
    """Arrow schema of passages with a text column for each name of ``metadata``."""
    return pa.schema([*PASSAGE_SCHEMA, *(pa.field(name, pa.string()) for name in metadata)])


EXAMPLE_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("question", pa.string()),
        ("answers", pa.list_(pa.string())),
        ("positive_ids", pa.list_(pa.string())),
        ("rewrites", pa.list_(pa.string())),
    ]
)
REWRITE_SCHEMA = pa.schema(
    [
        ("question_id", pa.string()),
        ("rewrite", pa.int32()),
        ("text", pa.string()),
        ("kind", pa.string()),
        ("provider", pa.string()),
    ]
)


DIGEST_SCHEMA = pa.schema(
    [
        ("id", pa.binary(16)),
        ("content", pa.binary(16)),
        ("first", pa.int64()),
        ("passages", pa.int64()),
    ]
)
"""What a later run compares documents with: a hash of the id, a hash of all that cutting depends
on, and the rows of the passages cut from it."""


def vector_schema(dimension: int) -> pa.Schema:
    """Arrow schema of probes: ``id`` and a FixedSizeList of ``dimension`` float32, readable by
    plain pyarrow.
    """
    return pa.schema([("id", pa.string()), ("vector", pa.list_(pa.float32(), dimension))])


def shard_schema(dimension: int) -> pa.Schema:
    """Arrow schema of a shard of vectors, readable by plain pyarrow: passage id, a hash of what was
    embedded, and a FixedSizeList of ``dimension`` float16.
    """
    return pa.schema(
        [
            ("id", pa.string()),
            ("content", pa.binary(16)),
            ("vector", pa.list_(pa.float16(), dimension)),
        ]
    )


def to_table(records: Iterable[Any], schema: pa.Schema) -> pa.Table:
    """Records (dataclasses of this module) as an Arrow table with ``schema``; fields the schema
    lacks are dropped, and a column that no field is named after holds that name of ``metadata``.
    """
    rows = list(records)
    columns = []
    for entry in schema:
        own = not rows or hasattr(rows[0], entry.name)
        values: list[Any] = [
            getattr(row, entry.name) if own else dict(row.metadata).get(entry.name) for row in rows
        ]
        if pa.types.is_list(entry.type) and pa.types.is_struct(entry.type.value_type):
            values = [[asdict(item) for item in value] for value in values]
        columns.append(pa.array(values, entry.type))
    return pa.Table.from_arrays(columns, schema=schema)


def from_table(table: pa.Table, record: type[Any]) -> list[Any]:
    """Rows of ``table`` as instances of ``record``; lists become tuples, their structs
    :class:`Place`.

    A field without a column takes the record's default; a column that no field is named after is
    ``metadata``.
    """
    own = {each.name for each in fields(record)}
    others = [name for name in table.column_names if name not in own]
    found = []
    for row in table.to_pylist():
        values = {key: _plain(value) for key, value in row.items() if key in own}
        if others:
            values["metadata"] = tuple(
                (name, row[name]) for name in others if row[name] is not None
            )
        found.append(record(**values))
    return found


def _plain(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    return tuple(Place(**item) if isinstance(item, dict) else item for item in value)
