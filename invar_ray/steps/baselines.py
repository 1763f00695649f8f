"""Hits that need no trained encoder of their own: BM25's, and the fusion of two systems' lists.

Both make ``hits`` artifacts of the same form as :mod:`invar_ray.steps.hits`, in this process,
without Ray.
"""

from __future__ import annotations

from collections.abc import Sequence

from invar_ray.answering.bm25 import Bm25Retriever
from invar_ray.answering.fusion import RANK_CONSTANT, fuse_hits
from invar_ray.answering.retriever import Passages
from invar_ray.config import Config
from invar_ray.errors import MixedArtifactsError
from invar_ray.schema import Example
from invar_ray.steps.hits import load_hits, load_wordings, plain_hit, write_hits
from invar_ray.store.artifacts import Artifact, Building, Plan
from invar_ray.versions import STEPS


def bm25_plan(
    config: Config, passages: Artifact, questions: Artifact, split: str, top_k: int
) -> Plan:
    """What BM25 finds for a split's questions."""
    settings = {
        "split": split,
        "top_k": top_k,
        "k1": config.evaluation.bm25_k1,
        "b": config.evaluation.bm25_b,
    }
    parents = {"passages": passages, "questions": questions}
    return Plan("hits", f"bm25-{split}", settings, parents, STEPS["baselines"].version)


def build_bm25_hits(building: Building, passages: Artifact, questions: Artifact) -> None:
    """Search every wording of every question with BM25."""
    settings = building.plan.config
    examples, families = load_wordings(questions, settings["split"])
    retriever = Bm25Retriever(Passages(passages), k1=settings["k1"], b=settings["b"])
    hits = [retriever.retrieve(families[example.id], settings["top_k"]) for example in examples]
    write_hits(
        building,
        examples,
        families,
        [[[plain_hit(h) for h in found] for found in family] for family in hits],
    )


def fused_plan(name: str, parts: Sequence[Artifact], split: str, top_k: int) -> Plan:
    """The reciprocal rank fusion of several systems' hits for the same questions."""
    settings = {"split": split, "top_k": top_k, "rank_constant": RANK_CONSTANT}
    parents = {f"hits/{number}": part for number, part in enumerate(parts)}
    return Plan("hits", f"{name}-{split}", settings, parents, STEPS["baselines"].version)


def build_fused_hits(building: Building, parts: Sequence[Artifact]) -> None:
    """Fuse, wording by wording.

    Raises:
        MixedArtifactsError: the parts are hits of different questions.
    """
    loaded = [load_hits(part) for part in parts]
    first = loaded[0]
    for part, families in zip(parts, loaded, strict=True):
        if [(f.question_id, f.wordings) for f in families] != [
            (f.question_id, f.wordings) for f in first
        ]:
            raise MixedArtifactsError(
                f"{part.uri} holds hits of other questions than {parts[0].uri}",
                action="search the same questions in both indexes",
            )
    top_k = building.plan.config["top_k"]
    fused = [
        [
            [plain_hit(hit) for hit in fuse_hits(lists, top_k)]
            for lists in zip(*(families.hits for families in same), strict=True)
        ]
        for same in zip(*loaded, strict=True)
    ]
    examples = [Example(f.question_id, f.wordings[0], f.answers, f.positive_ids) for f in first]
    write_hits(building, examples, {f.question_id: f.wordings for f in first}, fused)
