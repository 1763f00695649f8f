"""The ablation's systems, and how each is trained: the stage and losses of this package, plain
AdamW, one process.
"""

from __future__ import annotations

import json
import time
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from invar_ray.config import Config, RetrieverConfig
from invar_ray.models.batching import length_batches
from invar_ray.models.encoder import llm_spec
from invar_ray.pipeline import Pipeline
from invar_ray.store.artifacts import Artifact
from invar_ray.training.objective import invariance_weight
from invar_ray.training.retriever_stage import RetrieverStage
from invar_ray.training.stage import MAX_GRAD_NORM, WEIGHT_DECAY, Forward, learning_rate

GROUP_TOKENS = 1536


@dataclass(frozen=True)
class System:
    """What is trained: which losses, over which environments.

    Attributes:
        trained: False for the bare base.
        anchor_only: only each question's own wording and each passage's own cut.
        alignment, invariance: whether the loss keeps its configured weight (else 0).
        heavy: the contrastive loss is multiplied by 1 + b(t).
        second: instead of the invariance loss a second contrastive one, with its weight, ramp and
            temperature.
        fused: also measured with reciprocal rank fusion over rewrites at query time.
    """

    trained: bool = True
    anchor_only: bool = False
    alignment: bool = False
    invariance: bool = False
    heavy: bool = False
    second: bool = False
    fused: bool = False


SYSTEMS = {
    "base": System(trained=False, fused=True),
    "anchor": System(anchor_only=True, fused=True),
    "environments": System(),
    "environments_heavy": System(heavy=True),
    "second_contrastive": System(second=True),
    "alignment": System(alignment=True),
    "invariance": System(invariance=True),
    "all": System(alignment=True, invariance=True),
}


def used_settings(system: System, config: Config) -> RetrieverConfig:
    """The stage's settings with the weights of what the system leaves out at 0."""
    settings = config.retriever
    return replace(
        settings,
        alignment_weight=settings.alignment_weight if system.alignment else 0.0,
        invariance_weight=settings.invariance_weight if system.invariance else 0.0,
    )


def train(
    system: System, config: Config, pipeline: Pipeline, trainset: Artifact, seed: int, log: Path
) -> tuple[RetrieverStage, float]:
    """Stage 1 with plain AdamW in this process; the stage and the seconds of its steps."""
    settings = used_settings(system, config)
    spec = llm_spec(config.model, pipeline.base, ("retriever/ablation", "ablation"))
    inputs = {"trainset": trainset.ref, "encoder": spec.to_json()}
    stage = RetrieverStage(
        replace(config, retriever=settings, seed=seed), pipeline.store, inputs, 0, 1
    )
    if not system.trained:
        return stage, 0.0
    if system.anchor_only:
        _keep_anchors(stage)
    parameters = [parameter for parameter in stage.module.parameters() if parameter.requires_grad]
    forward = _by_length(stage.module)
    optimizer = torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.999), weight_decay=WEIGHT_DECAY)
    stage.module.train()
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with open(log, "w", encoding="utf-8") as stream:
        for step in range(stage.steps):
            torch.manual_seed(seed * 1_000_003 + step)
            b, once = invariance_weight(config.retriever, step), _Once(forward)
            loss, metrics = stage.loss(once, step)
            if system.heavy:
                loss = loss * (1.0 + b)
            if system.second:
                loss = loss + b * _at_temperature(
                    stage, settings.invariance_temperature, once.again, step
                )
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(settings.optimizer, step, stage.steps)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            stream.write(
                json.dumps({"step": step + 1, "gradient_norm": float(norm), **metrics}) + "\n"
            )
            if (step + 1) % 10 == 0:
                pace = (time.monotonic() - started) / (step + 1)
                print(
                    f"  step {step + 1}/{stage.steps}, loss {metrics['loss']:.3f}, {pace:.2f} s a "
                    "step, "
                    f"ETA {pace * (stage.steps - step - 1):.0f} s",
                    flush=True,
                )
    return stage, time.monotonic() - started


def _by_length(module: torch.nn.Module) -> Forward:
    """The encoder over groups of rows of like length: the same vectors with a third of the tokens
    less to compute.
    """

    def forward(ids: Tensor, mask: Tensor) -> Tensor:
        lengths: list[int] = mask.sum(dim=1).tolist()
        groups = list(length_batches(lengths, GROUP_TOKENS))
        widths = [max(lengths[row] for row in rows) for rows in groups]
        parts = [
            module(ids[rows, :width], mask[rows, :width])
            for rows, width in zip(groups, widths, strict=True)
        ]
        return torch.cat(parts)[torch.tensor([row for rows in groups for row in rows]).argsort()]

    return forward


class _Once:
    """A forward whose results can be had again, in the order of the calls."""

    def __init__(self, forward: Forward) -> None:
        self._forward, self._kept = forward, deque[Tensor]()

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        self._kept.append(self._forward(ids, mask))
        return self._kept[-1]

    def again(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self._kept.popleft()


def _at_temperature(
    stage: RetrieverStage, temperature: float, forward: Forward, step: int
) -> Tensor:
    """The stage's loss, contrastive alone here, of the same batch at another temperature."""
    own = stage.config
    extra = replace(own.experimental.retriever, contrastive_temperature=temperature)
    stage.config = replace(own, experimental=replace(own.experimental, retriever=extra))
    loss, _ = stage.loss(forward, step)
    stage.config = own
    return loss


def _keep_anchors(stage: RetrieverStage) -> None:
    trainset = stage.trainset
    # which slots hold an answer stays the same: the losses differ, not the masks
    _ = trainset._searchable
    trainset.wordings = [family[:1] for family in trainset.wordings]
    trainset.positive_texts = [texts[:1] for texts in trainset.positive_texts]
    trainset.slot_texts = [texts[:1] for texts in trainset.slot_texts]
