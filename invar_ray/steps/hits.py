"""Questions to hits: the ``hits`` artifact, materialised once for stage 2 and for every table.

Two ways to make one: a search in an index, by its vectors or with its BM25, and BM25 alone.

``hits.parquet``: a row per question with its wordings, answers and gold documents, and for each
wording the passages found.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from invar_ray.answering.bm25 import Bm25Retriever
from invar_ray.answering.fusion import fuse_hits, query_rewrites
from invar_ray.answering.rerank import PassageRetriever, Reranked, Reranking, open_reranker
from invar_ray.answering.retriever import Passages, open_exact_retriever, open_retriever
from invar_ray.config import Config
from invar_ray.console import Progress
from invar_ray.evaluation.measure import FoundFamily
from invar_ray.executor import Executor, Work
from invar_ray.models.precision import Precision, inference_device, made_in
from invar_ray.schema import Example, Hit, Mode
from invar_ray.steps.questions import load_examples, load_wordings
from invar_ray.store.artifacts import Artifact, Building, Plan, open_artifact

VERSION = 5
_QUESTIONS_PER_BATCH = 64
HIT_TYPE = pa.struct(
    [
        ("passage_id", pa.string()),
        ("document_id", pa.string()),
        ("rank", pa.int32()),
        ("score", pa.float32()),
        ("title", pa.string()),
        ("text", pa.string()),
        ("uri", pa.string()),
        ("place", pa.string()),
    ]
)
"""Arrow type of a :class:`invar_ray.schema.Hit` inside a row."""
_BLOCK = pa.schema([("block", pa.int64()), ("wordings", pa.list_(pa.list_(pa.string())))])
_ROW = pa.schema(
    [
        ("question_id", pa.string()),
        ("wordings", pa.list_(pa.string())),
        ("answers", pa.list_(pa.string())),
        ("positive_ids", pa.list_(pa.string())),
        ("hits", pa.list_(pa.list_(HIT_TYPE))),
    ]
)


@dataclass(frozen=True)
class SearchMode:
    """How an index is searched, where that is not as it will be served.

    Attributes:
        num_rewrites: fuse each wording's list with those of this many rewrites, made from it at
            query time.
        exact: compare with every vector, whatever the index's kind.
        precision: encode the questions in this precision; ``None`` in the index's.
        mode: by vectors, by words, or both.
        reranking: sort the best hits anew.
    """

    num_rewrites: int = 0
    exact: bool = False
    precision: Precision | None = None
    mode: Mode = "dense"
    reranking: Reranking | None = None

    @property
    def label(self) -> str:
        """For people: what is not as usual, each after a comma."""
        parts: list[str] = []
        if self.mode != "dense":
            parts.append(self.mode)
        if self.reranking:
            parts.append("reranked")
        if self.num_rewrites:
            parts.append("rewrites fused")
        if self.exact:
            parts.append("exact")
        if self.precision:
            parts.append(self.precision)
        return "".join(f", {part}" for part in parts)

    def settings(self, seed: int) -> dict[str, Any]:
        """What of it enters the fingerprint; the seed decides rewrites only."""
        settings = asdict(self) | {"seed": seed if self.num_rewrites else None}
        del settings["reranking"]
        if self.reranking is not None:  # by its weights, wherever they lie
            settings["reranker"] = self.reranking.ref.fingerprint
            settings["rerank_depth"] = self.reranking.depth
        return settings


PLAIN = SearchMode()


def plan(
    config: Config,
    index: Artifact,
    questions: Artifact,
    split: str,
    top_k: int,
    mode: SearchMode = PLAIN,
) -> Plan:
    """The hits of a split's questions in one index version."""
    return Plan(
        kind="hits",
        name=f"{index.manifest.name}-{split}",
        config={"split": split, "top_k": top_k} | mode.settings(config.seed),
        parents={"index": index, "questions": questions},
        version=VERSION,
    )


def build(
    building: Building,
    config: Config,
    index: Artifact,
    questions: Artifact,
    mode: SearchMode = PLAIN,
    *,
    executor: Executor,
) -> None:
    """Search every wording of every question, on ``scale.embed_workers`` actors where the executor
    has them.
    """
    split, top_k = building.plan.config["split"], building.plan.config["top_k"]
    examples, families = load_examples(questions, split), load_wordings(questions, split)
    asked = [families[example.id] for example in examples]
    write_hits(
        building,
        examples,
        families,
        search(config, index, asked, top_k, mode, label=f"search {split}", executor=executor),
    )


def search(
    config: Config,
    index: Artifact,
    families: Sequence[Sequence[str]],
    top_k: int,
    mode: SearchMode = PLAIN,
    *,
    label: str,
    executor: Executor,
) -> list[list[list[dict[str, Any]]]]:
    """What each wording of each family finds, as plain rows, in the families' order.

    Args:
        config: the run.
        index: is searched.
        families: the wordings of each question.
        top_k: hits for each wording.
        mode: how.
        label: of the progress display.
        executor: see :func:`build`.
    """
    starts = range(0, len(families), _QUESTIONS_PER_BATCH)
    blocks = [
        {"block": number, "wordings": families[start : start + _QUESTIONS_PER_BATCH]}
        for number, start in enumerate(starts)
    ]
    progress = Progress(label, len(families), "questions")
    scale = config.scale
    work = Work(
        label=progress.label,
        worker=SearchBlock,
        arguments={
            "index_uri": index.uri,
            "top_k": top_k,
            "mode": mode.mode,
            "precision": mode.precision,
            "device": inference_device(scale),
            "num_rewrites": mode.num_rewrites,
            "seed": config.seed,
            "exact": mode.exact,
            "reranking": mode.reranking,
        },
        rows=blocks,
        texts=len(families),
        leaves_from=scale.in_process_below,
        schema=_BLOCK,
        workers=(scale.fewest_embed_workers, scale.fewest_embed_workers),
        num_cpus=scale.cpus_per_worker,
        num_gpus=scale.embed_gpus_per_worker,
    )
    found: dict[int, list[list[list[dict[str, Any]]]]] = {}
    for row in executor.run(work):
        found[int(row["block"])] = row["hits"]
        progress.advance(len(row["hits"]))
    return [hits for number in sorted(found) for hits in found[number]]


def write_hits(
    building: Building,
    examples: Sequence[Example],
    families: Mapping[str, Sequence[str]],
    hits: Sequence[Sequence[Sequence[Mapping[str, Any]]]],
) -> None:
    """Write ``hits.parquet``: for each example, for each wording, its hits as plain rows."""
    rows = [
        {
            "question_id": example.id,
            "wordings": list(families[example.id]),
            "answers": list(example.answers),
            "positive_ids": list(example.positive_ids),
            "hits": found,
        }
        for example, found in zip(examples, hits, strict=True)
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=_ROW), building.path / "hits.parquet")
    settings = building.plan.config
    building.info |= {
        "questions": len(rows),
        "split": settings["split"],
        "top_k": settings["top_k"],
    }


def load_hits(artifact: Artifact) -> list[FoundFamily]:
    """The families of a ``hits`` artifact, in the order of their file."""
    return [
        FoundFamily(
            question_id=row["question_id"],
            wordings=tuple(row["wordings"]),
            answers=tuple(row["answers"]),
            positive_ids=tuple(row["positive_ids"]),
            hits=tuple(tuple(Hit(**hit) for hit in hits) for hits in row["hits"]),
        )
        for row in pq.read_table(artifact.path("hits.parquet")).to_pylist()
    ]


class SearchBlock:
    """Opens an index version once, then searches blocks of question families."""

    def __init__(
        self,
        index_uri: str,
        top_k: int,
        precision: Precision | None = None,
        device: str = "cpu",
        num_rewrites: int = 0,
        seed: int = 0,
        exact: bool = False,
        mode: Mode = "dense",
        reranking: Reranking | None = None,
    ) -> None:
        opened = open_exact_retriever if exact else open_retriever
        # Mapped: the actors of a node share the pages of one file.
        self._retriever: PassageRetriever = opened(
            index_uri, precision=precision, device=device, mode=mode, memory_map=True
        )
        if reranking is not None:
            precision = precision or made_in(open_artifact(index_uri, "index"))
            reranker = open_reranker(reranking.ref, precision, device)
            self._retriever = Reranked(self._retriever, reranker, reranking.depth)
        self._top_k = top_k
        self._num_rewrites = num_rewrites
        self._seed = seed

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """One block: for each question, for each wording, its hits."""
        families = [list(wordings) for wordings in row["wordings"]]
        hits = iter(self._search([text for family in families for text in family]))
        return {
            "block": int(row["block"]),
            "hits": [
                [[plain_hit(hit) for hit in next(hits)] for _ in family] for family in families
            ],
        }

    def _search(self, wordings: list[str]) -> list[list[Hit]]:
        if not self._num_rewrites:
            return self._retriever.retrieve(wordings, self._top_k)
        asked = [[text, *query_rewrites(text, self._num_rewrites, self._seed)] for text in wordings]
        found = iter(
            self._retriever.retrieve([text for texts in asked for text in texts], self._top_k)
        )
        return [fuse_hits([next(found) for _ in texts], self._top_k) for texts in asked]


def plain_hit(hit: Hit) -> dict[str, Any]:
    """A hit as a row of ``hits.parquet``."""
    return {entry.name: getattr(hit, entry.name) for entry in HIT_TYPE}


def bm25_plan(passages: Artifact, questions: Artifact, split: str, top_k: int) -> Plan:
    """What BM25 finds for a split's questions."""
    settings = {"split": split, "top_k": top_k}
    parents = {"passages": passages, "questions": questions}
    return Plan("hits", f"bm25-{split}", settings, parents, VERSION)


def build_bm25(building: Building, passages: Artifact, questions: Artifact) -> None:
    """Search every wording of every question with BM25."""
    settings = building.plan.config
    split = settings["split"]
    examples, families = load_examples(questions, split), load_wordings(questions, split)
    retriever = Bm25Retriever(Passages(passages))
    hits = [retriever.retrieve(families[example.id], settings["top_k"]) for example in examples]
    write_hits(
        building,
        examples,
        families,
        [[[plain_hit(h) for h in found] for found in family] for family in hits],
    )
