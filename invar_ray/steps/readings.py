"""What stage 2 reads: the ``readings`` artifact, made of the training questions' hits and the
corpus.

``readings.parquet``: a row per question with its wordings, answers and gold documents; for each
wording the passages found, each rendered in every window (METHOD "Environments": the indexed
passage, then other cuts of its document around it); and the *oracle*, a passage of a gold document
that holds an answer, for questions whose hits hold none.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from invar_ray.config import Config
from invar_ray.evaluation.measure import FoundFamily
from invar_ray.schema import Passage, from_table
from invar_ray.steps.hits import load_hits
from invar_ray.steps.passages import load_documents
from invar_ray.store.artifacts import Artifact, Building, Plan
from invar_ray.text.answers import contains_answer
from invar_ray.text.windows import resize_windows

VERSION = 1
READINGS = "readings.parquet"
READING_TYPE = pa.struct(
    [
        ("passage_id", pa.string()),
        ("document_id", pa.string()),
        ("title", pa.string()),
        ("texts", pa.list_(pa.string())),
    ]
)
"""A passage in its windows: ``texts[0]`` is the indexed cut; fewer others where the document allows
no more.
"""
READING_SCHEMA = pa.schema(
    [
        ("question_id", pa.string()),
        ("wordings", pa.list_(pa.string())),
        ("answers", pa.list_(pa.string())),
        ("positive_ids", pa.list_(pa.string())),
        ("hits", pa.list_(pa.list_(READING_TYPE))),
        ("oracle", READING_TYPE),
    ]
)


def plan(config: Config, hits: Artifact, passages: Artifact) -> Plan:
    """What is read of these hits."""
    return Plan(
        kind="readings",
        name=hits.manifest.name,
        config={"num_windows": config.rewrites.num_windows, "seed": config.seed},
        parents={"hits": hits, "passages": passages},
        version=VERSION,
    )


def build(building: Building, hits: Artifact, passages: Artifact) -> None:
    """Cut the windows of every passage found, and look up the oracles."""
    settings = building.plan.config
    families = load_hits(hits)
    gold = {name for family in families for name in family.positive_ids}
    gold_passages = _passages(passages, "document_id", gold)
    of_document: dict[str, list[Passage]] = {}
    for passage in gold_passages:
        of_document.setdefault(passage.document_id, []).append(passage)
    found = {hit.passage_id for family in families for wording in family.hits for hit in wording}
    by_id = {passage.id: passage for passage in (*gold_passages, *_passages(passages, "id", found))}
    documents = load_documents(passages, {passage.document_id for passage in by_id.values()})

    windows = {"passages": 0, "other cuts": 0}

    def rendered(passage: Passage, answers: Sequence[str]) -> dict[str, Any]:
        document = documents[passage.document_id]
        cuts = resize_windows(
            document, passage.start, passage.end, answers, settings["num_windows"], settings["seed"]
        )
        windows["passages"] += 1
        windows["other cuts"] += len(cuts)
        return {
            "passage_id": passage.id,
            "document_id": passage.document_id,
            "title": passage.title,
            "texts": [passage.text, *(document.text[cut.start : cut.end] for cut in cuts)],
        }

    rows = []
    for family in families:
        seen: dict[str, dict[str, Any]] = {}  # wordings find the same passages
        for hit in (hit for wording in family.hits for hit in wording):
            if hit.passage_id not in seen:
                seen[hit.passage_id] = rendered(by_id[hit.passage_id], family.answers)
        oracle = oracle_of(family, of_document)
        rows.append(
            {
                "question_id": family.question_id,
                "wordings": list(family.wordings),
                "answers": list(family.answers),
                "positive_ids": list(family.positive_ids),
                "hits": [[seen[hit.passage_id] for hit in wording] for wording in family.hits],
                "oracle": None if oracle is None else rendered(oracle, family.answers),
            }
        )
    pq.write_table(pa.Table.from_pylist(rows, schema=READING_SCHEMA), building.path / READINGS)
    building.info |= {
        "questions": len(rows),
        "oracles": sum(row["oracle"] is not None for row in rows),
        "windows_per_passage": round(windows["other cuts"] / max(1, windows["passages"]), 3),
    }


def oracle_of(family: FoundFamily, of_document: dict[str, list[Passage]]) -> Passage | None:
    """The first passage of the question's gold documents that holds an answer; ``None`` where none
    does.
    """
    return next(
        (
            passage
            for name in family.positive_ids
            for passage in of_document.get(name, [])
            if contains_answer(passage.text, family.answers)
        ),
        None,
    )


def _passages(artifact: Artifact, column: str, values: Collection[str]) -> list[Passage]:
    """The passages whose ``column`` is one of ``values``, in row order."""
    if not values:
        return []
    chosen: list[Passage] = from_table(
        pq.read_table(artifact.path("passages.parquet"), filters=[(column, "in", sorted(values))]),
        Passage,
    )
    return chosen
