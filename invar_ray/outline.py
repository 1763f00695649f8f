"""What a run will do and how long that may take, before it does it.

The seconds are those of two idle cores, by the arithmetic of the models and what the demo took
there (docs/log.md); :mod:`invar_ray.console` corrects them by how long the first steps take.
"""

from __future__ import annotations

from typing import Literal

from invar_ray.answering.fusion import QUERY_REWRITES
from invar_ray.answering.rerank import Reranking
from invar_ray.config import Config
from invar_ray.models.meta import Weights
from invar_ray.steps.hits import SearchMode
from invar_ray.steps.trainset import is_own_teacher

Goal = Literal["retriever", "generator", "report"]

_CPU_FLOPS, _GPU_FLOPS = 0.2e12, 40e12
_START_RAY_S, _START_TRAINING_S = 8.0, 25.0
_QUERY_TOKENS, _PASSAGE_SHARE = 16, 0.65
"""Tokens of a usual question, and how full passages are of ``chunk_tokens``."""


def outline(
    config: Config,
    shapes: tuple[Weights, Weights],
    goal: Goal,
    passages: int,
    train: int,
    dev: int,
    *,
    tokens: float | None = None,
    rates: tuple[float | None, float | None] = (None, None),
) -> list[tuple[str, float]]:
    """The steps on the way to a goal after corpus and questions have been read: (label, seconds).

    Args:
        config: the run.
        shapes: of the bases of retriever (as many layers as encode) and generator.
        goal: the last artifact.
        passages, train, dev: how many passages and questions there are.
        tokens: of a passage; ``None`` for what cutting usually leaves.
        rates: operations a second of all that train, and of all that encode and answer; ``None``
            for what this project was run on.
    """
    scale = config.scale
    usual = _GPU_FLOPS if scale.use_gpu else _CPU_FLOPS
    trained, flops = (usual if rate is None else rate for rate in rates)
    tokens = tokens or config.corpus.chunk_tokens * _PASSAGE_SHARE
    encoder = 2.0 * shapes[0].layer * shapes[0].layers
    # Backward through a frozen base is as much as forward; on a CPU what lies between the products
    # is as much again (the demo). Parts of a batch, and layers, may be run forward twice.
    again = (scale.train_tokens_per_chunk is not None) + scale.gradient_checkpointing
    passes = (2 if scale.use_gpu else 3) + again
    embed = _START_RAY_S + passages * tokens * encoder / flops
    teacher = _START_RAY_S + passages * tokens * 2 * 1.8e6 * 6 / flops
    wordings = 1 + config.rewrites.num_rewrites

    def search(questions: int, wordings: int) -> float:
        return 4.0 + questions * wordings * _QUERY_TOKENS * encoder / flops

    stage1, stage2 = config.retriever, config.generator
    served = SearchMode(mode=config.search.mode, reranking=Reranking.of(config.search))
    # Every candidate is encoded in every window.
    row = wordings * _QUERY_TOKENS + tokens * (1 + stage1.num_hard_negatives) * (
        1 + config.rewrites.num_windows
    )
    reading = min(stage2.max_tokens, stage2.top_k * tokens + 60)
    answer = 2.0 * (shapes[1].layer * shapes[1].layers + shapes[1].head)
    bare = [("embed passages (base)", embed), ("index (base)", 0.5)]
    steps = [
        ("embed passages (minilm)", teacher),
        ("index (minilm)", 0.5),
        *([] if is_own_teacher(config) else bare),
        ("training set", search(train, 1)),
        (
            "stage 1: retriever",
            _START_TRAINING_S
            + stage1.steps * stage1.global_batch_size * row * passes * encoder / trained,
        ),
    ]
    if goal == "retriever":
        return steps
    steps += [("embed passages (retriever)", embed), ("index (retriever)", 0.5)]
    trains = goal == "generator" or (
        "both" in config.evaluation.systems and config.evaluation.num_answers > 0
    )
    if trains:
        steps += [
            (f"hits of train questions in the retriever index{served.label}", search(train, 1)),
            ("readings of train questions", 2.0),
            (
                "stage 2: generator",
                _START_TRAINING_S
                + stage2.steps * stage2.global_batch_size * reading * 2.5 * answer / trained,
            ),
        ]
    if goal == "generator":
        return steps
    asked = 1 + config.evaluation.num_rewrites
    for name in config.evaluation.systems:
        encoder_name, _, fused = name.partition("_")
        index = {"stage1": "retriever", "both": "retriever"}.get(encoder_name, encoder_name)
        if encoder_name == "bm25":
            steps.append(("hits of dev questions by BM25", 1.0))
        else:
            label = f"hits of dev questions in the {index} index"
            more = QUERY_REWRITES if fused == "rewrites" else 0
            how = SearchMode(num_rewrites=more, mode="hybrid" if fused == "bm25" else "dense")
            if fused == "reranked" or name == "both":
                how = served
            if fused == "reranked" and how.reranking is None:
                continue
            label += how.label
            steps.append((label, search(dev, asked * (1 + more))))
    prompts = config.evaluation.num_answers * (3.25 + config.evaluation.answer_wordings)
    steps.append(("report", 15.0 + prompts * reading * answer / flops))
    return list(dict(steps).items())
