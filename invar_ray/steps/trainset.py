"""What stage 1 trains on, materialised: the ``trainset`` artifact.

* ``questions.parquet``: wordings, answers, the positive slot with its windows, mined negatives.
* ``slots.parquet``: every passage that is a positive or a negative of some question, rendered in
  each window.
* ``teacher.safetensors``: MiniLM's vectors of questions, slots and the slots' documents.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as compute
import pyarrow.parquet as pq
import torch
from safetensors.numpy import save_file

from invar_ray.answering.bm25 import FOLDER, Bm25
from invar_ray.answering.retriever import Passages, open_retriever
from invar_ray.config import Config
from invar_ray.console import Progress
from invar_ray.executor import Executor, Work
from invar_ray.index.blocks import vector_blocks
from invar_ray.losses.alignment import mean_document_vectors
from invar_ray.models.batching import refuse_not_finite
from invar_ray.models.encoder import EncoderSpec, coarse_spec, open_encoder
from invar_ray.models.precision import inference_device
from invar_ray.schema import Document, Example, Passage
from invar_ray.steps.passages import load_documents
from invar_ray.steps.questions import answerable, load_examples, load_wordings
from invar_ray.store.artifacts import Artifact, Building, Plan, open_artifact
from invar_ray.text.answers import contains_answer
from invar_ray.text.windows import resize_windows
from invar_ray.training.mining import MiningReport, select_negatives, union_by_best_rank

VERSION = 2
Floats = npt.NDArray[np.float32]
_QUERIES_PER_BATCH = 512
_BLOCK = pa.schema(
    [
        ("block", pa.int64()),
        ("texts", pa.list_(pa.string())),
        ("questions", pa.list_(pa.string())),
    ]
)


def is_own_teacher(config: Config) -> bool:
    """Whether stage 1 starts from the very model that teaches it: its negatives are then mined from
    the teacher's index, and nothing is embedded twice.
    """
    model = config.model
    same = model.retriever_base == config.coarse.model and model.retriever_layers is None
    return same and config.retriever.init is None


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

    Retriever and teacher encode on ``scale.embed_workers`` actors where the executor has them, so
    that no model is in the driver; and of the corpus it makes those passages and documents objects
    that the questions touch.

    Raises:
        DataError: if the positive documents of many training questions are not in the corpus.
    """
    table = Passages(passages)
    families, asked = load_wordings(questions, "train"), load_examples(questions, "train")
    document_ids = table.column("document_id")
    gold = _of_documents(
        table, document_ids, {n for example in asked for n in example.positive_ids}
    )
    examples = answerable(asked, {passage.document_id for passage in gold.values()})
    positives = find_positives(examples, gold)
    bm25 = _bm25(index, passages) if config.experimental.retriever.mining_bm25 else None
    report = MiningReport()
    g, depth, first_rank = (
        config.experimental.coarse.document_weight,
        config.experimental.retriever.mining_depth,
        config.experimental.retriever.mining_first_rank,
    )
    negatives: list[list[int]] = []
    blocks = [
        examples[start : start + _QUERIES_PER_BATCH]
        for start in range(0, len(examples), _QUERIES_PER_BATCH)
    ]
    mined = _mine(config, index, _row_numbers(index, passages, table), blocks, families, executor)
    taught = _Taught(teacher, document_ids, building.path)
    for block, (found, question_vectors) in zip(blocks, mined, strict=True):
        wordings = [families[example.id] for example in block]
        texts = [text for family in wordings for text in family]
        ranked = iter(found)
        by_words = iter(
            [[row for row, _ in hits] for hits in bm25.search(texts, depth)] if bm25 else []
        )
        lists = [
            [next(ranked) for _ in family] + ([next(by_words) for _ in family] if bm25 else [])
            for family in wordings
        ]
        candidates = [union_by_best_rank(each, first_rank) for each in lists]
        seen = sorted({row for rows in candidates for row in rows})
        texts_of = gold | dict(zip(seen, table.rows(seen), strict=True))
        for example, each, rows, vector in zip(
            block, lists, candidates, question_vectors, strict=True
        ):
            if first_rank > 1:
                report.dropped["rank too high"] += len(union_by_best_rank(each)) - len(rows)
            positive = positives[len(negatives)]
            scored = [*rows, positive]
            scores = (1 - g) * taught.passages[scored] @ vector
            scores = scores + g * taught.documents(scored) @ vector
            negatives.append(
                select_negatives(
                    rows,
                    texts_of,
                    positive,
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
    held = dict(zip(slots, table.rows(slots), strict=True))
    documents = load_documents(passages, {passage.document_id for passage in held.values()})
    windows = config.rewrites.num_windows
    question_table = pa.table(
        {
            "question_id": [example.id for example in examples],
            "wordings": [families[example.id] for example in examples],
            "answers": [list(example.answers) for example in examples],
            "positive": pa.array([slot_of[row] for row in positives], pa.int64()),
            "positive_texts": [
                _render(documents, held[row], example.answers, windows, config.seed)
                for row, example in zip(positives, examples, strict=True)
            ],
            "negatives": pa.array(
                [[slot_of[row] for row in chosen] for chosen in negatives], pa.list_(pa.int64())
            ),
        }
    )
    slot_table = pa.table(
        {
            "passage_id": [held[row].id for row in slots],
            "document_id": [held[row].document_id for row in slots],
            "title": [held[row].title for row in slots],
            "start": [held[row].start for row in slots],
            "end": [held[row].end for row in slots],
            "texts": [_render(documents, held[row], (), windows, config.seed) for row in slots],
        }
    )
    pq.write_table(question_table, building.path / "questions.parquet")
    pq.write_table(slot_table, building.path / "slots.parquet")
    save_file(
        {
            "questions": np.concatenate(
                [np.empty((0, taught.passages.shape[1]), np.float32)]
                + [vectors for _, vectors in mined]
            ),
            "slots": np.ascontiguousarray(taught.passages[slots]),
            "documents": taught.documents(slots),
        },
        str(building.path / "teacher.safetensors"),
    )
    taught.close()
    told = {"kept": report.kept, "dropped": dict(sorted(report.dropped.items()))}
    (building.path / "mining.json").write_text(json.dumps(told, indent=2), encoding="utf-8")
    building.info |= {"questions": len(examples), "slots": len(slots), "mining": told}


class _Taught:
    """The teacher's vectors of all passages, in a file that is mapped: what is looked at is in
    memory, and the system may take it back.

    Args:
        teacher: the ``vectors`` artifact.
        document_ids: of each passage.
        folder: the file lies there until :meth:`close`.
    """

    def __init__(self, teacher: Artifact, document_ids: pa.Array, folder: Path) -> None:
        teacher.verify()
        blocks = vector_blocks(teacher)
        self._file = folder / "teacher.tmp"
        self.passages: Floats = np.memmap(
            self._file, np.float32, "w+", shape=(blocks.rows, blocks.dimension)
        )
        for start, matrix in blocks.some():
            self.passages[start : start + len(matrix)] = matrix
        numbered = document_ids.dictionary_encode()
        self._owner = numbered.indices.to_numpy().astype(np.int64)
        means = mean_document_vectors(
            torch.from_numpy(self.passages), torch.from_numpy(self._owner), len(numbered.dictionary)
        )
        self._means: Floats = means.numpy()

    def documents(self, rows: Sequence[int]) -> Floats:
        """[n, M]: for each passage the normalised mean vector of its document's passages (METHOD
        "Alignment").
        """
        return self._means[self._owner[rows]]

    def close(self) -> None:
        """Remove the file."""
        self._file.unlink()


class MineBlock:
    """Opens an index version and the teacher once, then searches blocks of wordings.

    Args:
        index_uri: of the index.
        top_k: passages for each wording.
        teacher: the teacher's encoder, as JSON.
        device: where both encoders run.
    """

    def __init__(
        self, index_uri: str, top_k: int, teacher: dict[str, Any], device: str = "cpu"
    ) -> None:
        self._retriever = open_retriever(index_uri, device=device, memory_map=True)
        store = open_artifact(index_uri, "index").store
        self._teacher = open_encoder(EncoderSpec.from_json(teacher), store, device=device)
        self._top_k = top_k

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """One block: for each wording the rows of the passages found, best first, and the teacher's
        vectors of the questions, float32.
        """
        queries = self._retriever.encode_queries(list(row["texts"]))
        _, rows = self._retriever.index.search(queries, self._top_k)
        vectors = self._teacher.encode_queries(list(row["questions"]))
        return {
            "block": int(row["block"]),
            "rows": [found[found >= 0].tolist() for found in rows],
            "vectors": np.ascontiguousarray(vectors, dtype=np.float32).tobytes(),
        }


def _mine(
    config: Config,
    index: Artifact,
    row_numbers: npt.NDArray[np.int64] | None,
    examples: Sequence[Sequence[Example]],
    families: Mapping[str, Sequence[str]],
    executor: Executor,
) -> list[tuple[list[list[int]], Floats]]:
    """For each block of examples: for each wording the rows of the passages found, and the
    teacher's vector [M] of each question.
    """
    scale, teacher = config.scale, coarse_spec(config.coarse)
    rows: list[dict[str, Any]] = [
        {
            "block": number,
            "texts": [text for example in block for text in families[example.id]],
            "questions": [example.question for example in block],
        }
        for number, block in enumerate(examples)
    ]
    progress = Progress("mine", sum(len(row["texts"]) for row in rows), "wordings")
    work = Work(
        label=progress.label,
        worker=MineBlock,
        arguments={
            "index_uri": index.uri,
            "top_k": config.experimental.retriever.mining_depth,
            "teacher": teacher.to_json(),
            "device": inference_device(scale),
        },
        rows=rows,
        texts=sum(map(len, examples)),
        # One block is searched here: actors start slower. With GPUs it always leaves.
        leaves_from=max(scale.in_process_below, _QUERIES_PER_BATCH),
        schema=_BLOCK,
        workers=(scale.fewest_embed_workers, scale.fewest_embed_workers),
        num_cpus=scale.cpus_per_worker,
        num_gpus=scale.embed_gpus_per_worker,
    )
    mined: dict[int, tuple[list[list[int]], Floats]] = {}
    for row in executor.run(work):
        number = int(row["block"])
        vectors = np.frombuffer(row["vectors"], np.float32).reshape(len(examples[number]), -1)
        refuse_not_finite(vectors, [f"question {example.id}" for example in examples[number]])
        found = [list(each) for each in row["rows"]]
        if row_numbers is not None:
            found = [row_numbers[each].tolist() for each in found]
        mined[number] = found, vectors
        progress.advance(len(found))
    return [mined[number] for number in sorted(mined)]


def _row_numbers(
    index: Artifact, passages: Artifact, table: Passages
) -> npt.NDArray[np.int64] | None:
    """For each row of the index the passage's row; ``None`` where they are the same (a refresh may
    search a part).
    """
    searched = index.parent("passages")
    if searched.fingerprint == passages.fingerprint:
        return None
    ids = Passages(searched).column("id")
    return np.asarray(compute.index_in(ids, value_set=table.column("id")), dtype=np.int64)


def _of_documents(
    table: Passages, document_ids: pa.Array, documents: set[str]
) -> dict[int, Passage]:
    """Row -> passage, of these documents alone, in row order."""
    wanted = compute.is_in(document_ids, value_set=pa.array(sorted(documents), pa.string()))
    rows = np.flatnonzero(wanted.to_numpy(zero_copy_only=False)).tolist()
    return dict(zip(rows, table.rows(rows), strict=True))


def _bm25(index: Artifact, passages: Artifact) -> Bm25:
    """Of all passages: the index's own, mapped, where it has one and searches no part of them."""
    has_one = any(name.startswith(f"{FOLDER}/") for name in index.manifest.files)
    if has_one and index.manifest.parents["passages"] == passages.ref:
        return Bm25.open(index.path(FOLDER))
    table = pq.read_table(passages.path("passages.parquet"), columns=["title", "text"])
    return Bm25([f"{row['title']} {row['text']}" for row in table.to_pylist()])


def find_positives(examples: Sequence[Example], passages: Mapping[int, Passage]) -> list[int]:
    """For each example that :func:`answerable` keeps the row of its positive passage: the first of
    its documents' passages that holds an answer, else the first.

    Args:
        examples: the questions.
        passages: row -> passage, in row order; of the questions' documents at least.

    Raises:
        DataError: if too many have no document in the corpus.
    """
    of_document: dict[str, list[int]] = {}
    for row, passage in passages.items():
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


def _render(
    documents: dict[str, Document], passage: Passage, answers: Sequence[str], count: int, seed: int
) -> list[str]:
    """The anchor cut's text, then other cuts'; fewer where the document allows no more."""
    document = documents[passage.document_id]
    windows = (
        resize_windows(document, passage.start, passage.end, answers, count, seed) if count else []
    )
    return [passage.text, *(document.text[window.start : window.end] for window in windows)]
