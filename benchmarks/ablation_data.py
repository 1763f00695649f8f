"""Data of the ablation: what is trained on, and the three sets that it is measured on.

No Ray: the steps of the pipeline run in this process, over the same store and plans.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from invar_ray.config import Config, load_config
from invar_ray.corpus.readers import read_documents, read_examples
from invar_ray.executor import Here
from invar_ray.pipeline import Pipeline
from invar_ray.questions.rules import RuleRewriter
from invar_ray.schema import Document, Example, Rewrite
from invar_ray.store.artifacts import Artifact
from invar_ray.text.chunking import chunk_document

HELD_OUT = 600
NUM_REWORDINGS = 2
SPLITS = ("heldout", "nq", "squad", "squad_rules")
# What one CPU core trains in some ten minutes a run.
OVERRIDES = (
    "experimental.model.tiny.num_layers=2",
    "model.query_max_tokens=32",
    "model.passage_max_tokens=64",
    "corpus.chunk_tokens=52",
    "corpus.chunk_stride=52",
    "corpus.distractors=500",
    "rewrites.provider=rules",
    "rewrites.num_rewrites=2",
    "rewrites.num_windows=1",
    "retriever.global_batch_size=32",
    "retriever.num_hard_negatives=1",
    "retriever.steps=150",
    "retriever.optimizer.warmup_steps=15",
    "retriever.alignment_decay_steps=150",
    "retriever.invariance_ramp_steps=30",
)


@dataclass(frozen=True)
class EvalSet:
    """Questions in families of wordings, and the passages that they are searched in.

    Attributes:
        name: of the split.
        ids, families, gold, clusters: one entry per question: id, wordings (anchor first), gold
            document ids, and what the bootstrap draws (the gold document).
        kinds: of each question's wordings behind the anchor.
        seen: whether the gold document or its title occurs among the training questions' ones.
        passages: (title, text) of each passage; documents: the document of each passage.
        rewrites: rule-based rewrites of each wording, for fusion at query time (empty where not
            asked for).
    """

    name: str
    ids: list[str]
    families: list[list[str]]
    kinds: list[list[str]]
    gold: list[list[str]]
    clusters: list[str]
    seen: list[bool]
    passages: list[tuple[str, str]]
    documents: list[str]
    rewrites: list[list[list[str]]]


def split_by_title(data: Path, folder: Path, seed: int = 0) -> tuple[Path, Path]:
    """nq's train questions without, and only, 600 held-out ones (whole titles); written below
    ``folder``.
    """
    train, heldout = folder / "train.jsonl", folder / "heldout.jsonl"
    if train.exists() and heldout.exists():
        return train, heldout
    titles = {
        document.id: document.title
        for document in read_documents(str(data / "nq" / "corpus.jsonl.gz"))
    }
    rows = _rows(data / "nq" / "questions-train.jsonl.gz")
    by_title: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_title.setdefault(titles[row["positive_ids"][0]], []).append(row)
    order = sorted(by_title)
    random.Random(seed).shuffle(order)
    chosen: list[dict[str, Any]] = []
    taken: set[str] = set()
    for title in order:
        # A title of very many questions would be most of the set.
        if len(chosen) < HELD_OUT and len(by_title[title]) <= 10:
            chosen += by_title[title]
            taken.add(title)
    folder.mkdir(parents=True, exist_ok=True)
    rest = [row for row in rows if titles[row["positive_ids"][0]] not in taken]
    for path, kept in ((heldout, chosen), (train, rest)):
        temporary = path.with_suffix(".part")
        temporary.write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept), encoding="utf-8"
        )
        temporary.replace(path)
    return train, heldout


def ablation_config(data: Path, folder: Path, overrides: Sequence[str]) -> Config:
    """The run's config; later overrides win."""
    train, heldout = split_by_title(data, folder)
    sources = [
        "name=ablation",
        f"storage.root_uri={folder / 'store'}",
        f"corpus.uri={data / 'nq' / 'corpus.jsonl.gz'}",
        f"questions.train_uri={train}",
        f"questions.dev_uri={heldout}",
    ]
    return load_config("tiny", [*OVERRIDES, *sources, *overrides])


def prepare(config: Config) -> tuple[Pipeline, Artifact]:
    """The training set, mined with the untrained base: made once, then opened."""
    pipeline = Pipeline(config, executor=Here())
    return pipeline, pipeline.trainset


def eval_set(
    split: str,
    data: Path,
    folder: Path,
    tokenizer: Any,
    config: Config,
    num_passages: int,
    *,
    limit: int | None = None,
    rewrites: bool = False,
) -> EvalSet:
    """One of ``SPLITS``: held-out train questions or dev questions of nq with rule-based
    rewrites, or SQuAD's dev questions with NoiseQA's six, or the same ones with rule-based
    rewrites.

    The passages are the documents that hold the positives, then others until there are
    ``num_passages``.
    """
    rows = _rows(folder / "train.jsonl")
    corpus_file = data / ("squad" if split.startswith("squad") else "nq") / "corpus.jsonl.gz"
    documents = {document.id: document for document in read_documents(str(corpus_file))}
    trained = {name for row in rows for name in row["positive_ids"]}
    titles = {documents[name].title for name in trained if name in documents}
    rewriter = RuleRewriter()

    def reworded(text: str, seed: int, count: int = NUM_REWORDINGS) -> list[Rewrite]:
        example = Example(id=text, question=text, answers=("",), positive_ids=(), rewrites=())
        return rewriter.rewrite(example, count, seed)

    ids: list[str] = []
    families: list[list[str]] = []
    kinds: list[list[str]] = []
    gold: list[list[str]] = []
    if split.startswith("squad"):
        of_question: dict[str, list[dict[str, Any]]] = {}
        for row in _rows(data / "squad" / "rewrites-noiseqa.jsonl.gz"):
            of_question.setdefault(row["base_id"], []).append(row)
        for name, rewrites in of_question.items():
            ids.append(name)
            asked = rewrites[0]["original"]
            others = [(row["question"], row["kind"]) for row in rewrites]
            if split == "squad_rules":
                others = [
                    (rewrite.text, rewrite.kind) for rewrite in reworded(asked, config.seed + 7)
                ]
            families.append([asked, *(text for text, _ in others)])
            kinds.append([kind for _, kind in others])
            gold.append(list(rewrites[0]["positive_ids"]))
    else:
        source = (
            folder / "heldout.jsonl"
            if split == "heldout"
            else data / "nq" / "questions-dev.jsonl.gz"
        )
        for example in read_examples(str(source), skip_unusable=True):
            ids.append(example.id)
            variants_of = reworded(example.question, config.seed + 7)
            families.append([example.question, *(rewrite.text for rewrite in variants_of)])
            kinds.append([rewrite.kind for rewrite in variants_of])
            gold.append(list(example.positive_ids))
    ids, families, gold = ids[:limit], families[:limit], gold[:limit]
    wanted = {name for names in gold for name in names}
    chosen = [document for document in documents.values() if document.id in wanted]
    rest = [document for document in documents.values() if document.id not in wanted]
    random.Random(1).shuffle(rest)
    passages: list[tuple[str, str]] = []
    owners: list[str] = []

    def add(document: Document) -> None:
        for passage in chunk_document(
            document,
            tokenizer,
            tokens=config.corpus.chunk_tokens,
            stride=config.corpus.chunk_stride,
        ):
            passages.append((passage.title, passage.text))
            owners.append(document.id)

    for document in chosen:
        add(document)
    for document in rest:
        if len(passages) >= num_passages:
            break
        add(document)
    return EvalSet(
        split,
        ids,
        families,
        kinds[:limit],
        gold,
        [names[0] for names in gold],
        [
            any(name in trained or documents[name].title in titles for name in names)
            for names in gold
        ],
        passages,
        owners,
        [
            [[rewrite.text for rewrite in reworded(text, config.seed + 13)] for text in family]
            if rewrites
            else []
            for family in families
        ],
    )


def _rows(path: Path) -> list[dict[str, Any]]:
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in text.decode("utf-8").splitlines()]
