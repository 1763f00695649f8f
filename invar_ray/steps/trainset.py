"""What stage 1 trains on, materialised: the ``trainset`` artifact.

* ``questions.parquet``: wordings, answers, the positive slot with its windows, mined negatives.
* ``slots.parquet``: every passage that is a positive or a negative of some question, rendered in
  each window.
* ``teacher.safetensors``: MiniLM's vectors of questions, slots and the slots' documents.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.numpy import save_file

from invar_ray.answering.bm25 import Bm25
from invar_ray.answering.retriever import open_retriever
from invar_ray.config import Config
from invar_ray.console import Progress
from invar_ray.executor import Executor, Work
from invar_ray.index.blocks import read_vectors
from invar_ray.losses.alignment import mean_document_vectors
from invar_ray.models.batching import refuse_not_finite
from invar_ray.models.encoder import coarse_spec, open_encoder
from invar_ray.models.precision import inference_device
from invar_ray.schema import Document, Example, Passage
from invar_ray.steps.passages import load_documents, load_passages
from invar_ray.steps.questions import answerable, load_examples, load_wordings
from invar_ray.store.artifacts import Artifact, Building, Plan
from invar_ray.text.answers import contains_answer
from invar_ray.text.windows import resize_windows
from invar_ray.training.mining import MiningReport, select_negatives, union_by_best_rank

VERSION = 2
Floats = npt.NDArray[np.float32]
_QUERIES_PER_BATCH = 512
_BLOCK = pa.schema([("block", pa.int64()), ("texts", pa.list_(pa.string()))])


def plan(
    config: Config, passages: Artifact, questions: Artifact, index: Artifact, teacher: Artifact
) -> Plan:
    """The artifact; ``index`` is what negatives are mined from, ``teacher`` MiniLM's passage
    vectors.
    """
    return Plan(
        kind="trainset",
        name=config.name,
        config={
            "num_hard_negatives": config.retriever.num_hard_negatives,
            "mining_depth": config.experimental.retriever.mining_depth,
            "margin": config.experimental.retriever.false_negative_margin,
            "num_windows": config.rewrites.num_windows,
            "document_weight": config.experimental.coarse.document_weight,
            "seed": config.seed,
            "first_rank": config.experimental.retriever.mining_first_rank,
            "bm25": config.experimental.retriever.mining_bm25,
        },
        parents={"passages": passages, "questions": questions, "index": index, "teacher": teacher},
        version=VERSION,
    )


def build(
    building: Building,
    config: Config,
    passages: Artifact,
    questions: Artifact,
    index: Artifact,
    teacher: Artifact,
    *,
    executor: Executor,
) -> None:
    """Mine negatives, cut windows and take the teacher's vectors.

    The retriever's base searches on ``scale.embed_workers`` actors where the executor has them, so
    that a large one is never in the driver; only the teacher is.

    Raises:
        DataError: if the positive documents of many training questions are not in the corpus.
    """
    documents, rows = load_documents(passages), load_passages(passages)
    families = load_wordings(questions, "train")
    held = {passage.document_id for passage in rows}
    examples = answerable(load_examples(questions, "train"), held)
    positives = find_positives(examples, rows)
    _, passage_vectors = read_vectors(teacher)
    document_vectors = mean_by_document(passage_vectors, [passage.document_id for passage in rows])
    coarse = open_encoder(coarse_spec(config.coarse), passages.store)
    question_vectors = coarse.encode_queries([example.question for example in examples])
    refuse_not_finite(question_vectors, [f"question {example.id}" for example in examples])

    bm25 = _bm25(rows) if config.experimental.retriever.mining_bm25 else None
    report = MiningReport()
    g, depth, first_rank = (
        config.experimental.coarse.document_weight,
        config.experimental.retriever.mining_depth,
        config.experimental.retriever.mining_first_rank,
    )
    negatives: list[list[int]] = []
    row_of = {passage.id: row for row, passage in enumerate(rows)}
    found_ids = _search(config, index, [families[example.id] for example in examples], executor)
    for start in range(0, len(examples), _QUERIES_PER_BATCH):
        block = examples[start : start + _QUERIES_PER_BATCH]
        wordings = [families[example.id] for example in block]
        texts = [text for family in wordings for text in family]
        ranked = iter([[row_of[name] for name in next(found_ids)] for _ in texts])
        by_words = iter(
            [[row for row, _ in found] for found in bm25.search(texts, depth)] if bm25 else []
        )
        for offset, example in enumerate(block):
            lists = [next(ranked) for _ in wordings[offset]]
            if bm25:
                lists += [next(by_words) for _ in wordings[offset]]
            candidates = union_by_best_rank(lists, first_rank)
            if first_rank > 1:
                report.dropped["rank too high"] += len(union_by_best_rank(lists)) - len(candidates)
            number = start + offset
            scored = [*candidates, positives[number]]
            scores = (1 - g) * passage_vectors[scored] @ question_vectors[number]
            scores = scores + g * document_vectors[scored] @ question_vectors[number]
            negatives.append(
                select_negatives(
                    candidates,
                    rows,
                    positives[number],
                    example.answers,
                    scores,
                    count=config.retriever.num_hard_negatives,
                    margin=config.experimental.retriever.false_negative_margin,
                    report=report,
                    gold_documents=example.positive_ids,
                )
            )

    slots = sorted({*positives, *(row for chosen in negatives for row in chosen)})
    slot_of = {row: number for number, row in enumerate(slots)}
    windows = config.rewrites.num_windows
    question_table = pa.table(
        {
            "question_id": [example.id for example in examples],
            "wordings": [families[example.id] for example in examples],
            "answers": [list(example.answers) for example in examples],
            "positive": pa.array([slot_of[row] for row in positives], pa.int64()),
            "positive_texts": [
                _render(documents, rows[row], example.answers, windows, config.seed)
                for row, example in zip(positives, examples, strict=True)
            ],
            "negatives": pa.array(
                [[slot_of[row] for row in chosen] for chosen in negatives], pa.list_(pa.int64())
            ),
        }
    )
    slot_table = pa.table(
        {
            "passage_id": [rows[row].id for row in slots],
            "document_id": [rows[row].document_id for row in slots],
            "title": [rows[row].title for row in slots],
            "start": [rows[row].start for row in slots],
            "end": [rows[row].end for row in slots],
            "texts": [_render(documents, rows[row], (), windows, config.seed) for row in slots],
        }
    )
    pq.write_table(question_table, building.path / "questions.parquet")
    pq.write_table(slot_table, building.path / "slots.parquet")
    save_file(
        {
            "questions": question_vectors,
            "slots": np.ascontiguousarray(passage_vectors[slots]),
            "documents": np.ascontiguousarray(document_vectors[slots]),
        },
        str(building.path / "teacher.safetensors"),
    )
    mined = {"kept": report.kept, "dropped": dict(sorted(report.dropped.items()))}
    (building.path / "mining.json").write_text(json.dumps(mined, indent=2), encoding="utf-8")
    building.info |= {"questions": len(examples), "slots": len(slots), "mining": mined}


class MineBlock:
    """Opens an index version once, then searches blocks of wordings.

    Args:
        index_uri: of the index.
        top_k: passages for each wording.
        device: where its encoder runs.
    """

    def __init__(self, index_uri: str, top_k: int, device: str = "cpu") -> None:
        self._retriever = open_retriever(index_uri, device=device, memory_map=True)
        self._top_k = top_k

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """One block: for each wording the ids of the passages found, best first."""
        hits = self._retriever.retrieve(list(row["texts"]), self._top_k)
        return {"block": int(row["block"]), "ids": [[hit.passage_id for hit in h] for h in hits]}


def _search(
    config: Config, index: Artifact, families: Sequence[Sequence[str]], executor: Executor
) -> Iterator[list[str]]:
    """For each wording of each family, in order, the ids of the passages found."""
    scale = config.scale
    blocks = [
        [text for family in families[start : start + _QUERIES_PER_BATCH] for text in family]
        for start in range(0, len(families), _QUERIES_PER_BATCH)
    ]
    progress = Progress("mine", sum(map(len, blocks)), "wordings")
    work = Work(
        label=progress.label,
        worker=MineBlock,
        arguments={
            "index_uri": index.uri,
            "top_k": config.experimental.retriever.mining_depth,
            "device": inference_device(scale),
        },
        rows=[{"block": number, "texts": texts} for number, texts in enumerate(blocks)],
        texts=len(families),
        # One block is searched here: actors start slower. With GPUs it always leaves.
        leaves_from=max(scale.in_process_below, _QUERIES_PER_BATCH),
        schema=_BLOCK,
        workers=(scale.fewest_embed_workers, scale.fewest_embed_workers),
        num_cpus=scale.cpus_per_worker,
        num_gpus=scale.embed_gpus_per_worker,
    )
    found: dict[int, list[list[str]]] = {}
    for row in executor.run(work):
        found[int(row["block"])] = [list(ids) for ids in row["ids"]]
        progress.advance(len(row["ids"]))
    return itertools.chain.from_iterable(found[number] for number in sorted(found))


def _bm25(rows: Sequence[Passage]) -> Bm25:
    texts = [f"{passage.title} {passage.text}" for passage in rows]
    return Bm25(texts)


def find_positives(examples: Sequence[Example], passages: Sequence[Passage]) -> list[int]:
    """For each example that :func:`answerable` keeps the row of its positive passage: the first of
    its documents' passages that holds an answer, else the first.

    Raises:
        DataError: if too many have no document in the corpus.
    """
    of_document: dict[str, list[int]] = {}
    for row, passage in enumerate(passages):
        of_document.setdefault(passage.document_id, []).append(row)
    chosen = []
    for example in answerable(examples, of_document):
        rows = [
            row for document_id in example.positive_ids for row in of_document.get(document_id, [])
        ]
        chosen.append(
            next(
                (row for row in rows if contains_answer(passages[row].text, example.answers)),
                rows[0],
            )
        )
    return chosen


def mean_by_document(vectors: Floats, document_ids: Sequence[str]) -> Floats:
    """[N, D]: for each passage the normalised mean vector of its document's passages (METHOD
    "Alignment").
    """
    numbers: dict[str, int] = {}
    owner = np.asarray(
        [numbers.setdefault(document_id, len(numbers)) for document_id in document_ids]
    )
    means = mean_document_vectors(torch.from_numpy(vectors), torch.from_numpy(owner), len(numbers))
    return np.asarray(means.numpy()[owner], dtype=np.float32)


def _render(
    documents: dict[str, Document], passage: Passage, answers: Sequence[str], count: int, seed: int
) -> list[str]:
    """The anchor cut's text, then other cuts'; fewer where the document allows no more."""
    document = documents[passage.document_id]
    windows = (
        resize_windows(document, passage.start, passage.end, answers, count, seed) if count else []
    )
    return [passage.text, *(document.text[window.start : window.end] for window in windows)]
