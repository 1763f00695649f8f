"""One rank of the loss parity test: ``python loss_parity_worker.py RANK WORLD FOLDER``.

Computes every case on its share of one fixed global batch through a small encoder, averages
gradients over ranks as DDP does, and lets rank 0 write them to FOLDER/world<WORLD>.safetensors.
World 1 is the reference: the same batch in one process.  Shape legend: B rows, R rewrites, P
windows, E = R * P environments, C slots, F features, D embedding size.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import normalize

from invar_ray.config import ExperimentalRetriever, RetrieverConfig
from invar_ray.losses import gather
from invar_ray.losses.alignment import alignment_loss, blend_teacher_scores
from invar_ray.losses.answer import answer_loss
from invar_ray.losses.contrastive import ContrastiveOutput, contrastive_loss
from invar_ray.losses.gather import gather_rows
from invar_ray.losses.invariance import invariance_loss
from invar_ray.losses.risk import environment_risks, risk_variance
from invar_ray.training.objective import Rows, objective

SHARES, ROWS, SLOTS, REWRITES, WINDOWS, FEATURES, HIDDEN, SIZE, TOKENS, WORDS = (
    2,
    4,
    6,
    2,
    2,
    12,
    16,
    8,
    5,
    11,
)


class Encoder(nn.Module):
    """Two linear layers for queries and passages, and a head for the answer loss."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, HIDDEN)
        self.second = nn.Linear(HIDDEN, SIZE)
        self.head = nn.Linear(HIDDEN, WORDS)

    def forward(self, x: Tensor) -> Tensor:
        return normalize(self.second(torch.tanh(self.first(x))), dim=-1)

    def logits(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(x)))


class Batch:
    """The global batch, and the rows and slots of it that are this rank's."""

    def __init__(self, rank: int, world: int) -> None:
        torch.manual_seed(7)
        self.world = world
        rows, slots = SHARES * ROWS, SHARES * SLOTS
        self.all_queries = torch.randn(rows, REWRITES, FEATURES)
        self.all_passages = torch.randn(slots, WINDOWS, FEATURES)
        # [B]
        self.positive = torch.cat([torch.arange(ROWS) + share * SLOTS for share in range(SHARES)])
        self.allowed = torch.rand(rows, slots) > 0.2
        # the last rank holds padding
        self.weights = torch.tensor([1.0, 1.0, 0.5, 1.0, 1.0, 1.0, 0.0, 0.0])
        self.environments = torch.rand(rows, REWRITES * WINDOWS) > 0.3
        self.environments[:, 0] = True
        teacher = [normalize(torch.randn(count, 6), dim=-1) for count in (rows, slots, slots)]
        self.teacher = blend_teacher_scores(*teacher, document_weight=0.3)
        self.answer_inputs = torch.randn(rows, TOKENS, FEATURES)
        self.labels = torch.randint(WORDS, (rows, TOKENS))
        self.labels[torch.rand(rows, TOKENS) > 0.5] = -100
        self.labels[5:] = -100  # ranks hold different numbers of answer tokens
        self.mine = slice(0, rows) if world == 1 else slice(rank * ROWS, (rank + 1) * ROWS)
        self.my_slots = slice(0, slots) if world == 1 else slice(rank * SLOTS, (rank + 1) * SLOTS)

    @property
    def normaliser(self) -> float:
        return float(self.weights.sum()) / self.world

    @property
    def answer_normaliser(self) -> float:
        return float((self.labels[:, 1:] != -100).sum()) / self.world


def cosines_of(queries: Tensor, passages: Tensor) -> Tensor:
    """[B, R, D] and [C, P, D] to [B, E, C]."""
    return torch.einsum("brd,cpd->brpc", queries, passages).flatten(1, 2)


def cosines(batch: Batch, model: Encoder) -> Tensor:
    """Local queries against gathered passages: the way that is right."""
    return cosines_of(
        model(batch.all_queries[batch.mine]), gather_rows(model(batch.all_passages[batch.my_slots]))
    )


def contrastive(batch: Batch, scores: Tensor, masked: bool = True) -> ContrastiveOutput:
    return contrastive_loss(
        scores,
        batch.positive[batch.mine],
        batch.allowed[batch.mine],
        temperature=0.2,
        weights=batch.weights[batch.mine],
        normaliser=batch.normaliser,
        environment_mask=batch.environments[batch.mine] if masked else None,
    )


def alignment(batch: Batch, scores: Tensor) -> Tensor:
    return alignment_loss(
        scores[:, 0],
        batch.teacher[batch.mine],
        batch.allowed[batch.mine],
        temperature=0.2,
        teacher_temperature=0.3,
        weights=batch.weights[batch.mine],
        normaliser=batch.normaliser,
    ).loss


def invariance(batch: Batch, scores: Tensor, pattern: str) -> Tensor:
    return invariance_loss(
        scores,
        batch.positive[batch.mine],
        batch.allowed[batch.mine],
        temperature=0.3,
        pattern="hard" if pattern == "hard" else "soft",
        top_m=7,
        share=0.5,
        kappa=1.0,
        weights=batch.weights[batch.mine],
        normaliser=batch.normaliser,
        environment_mask=batch.environments[batch.mine],
    ).loss


def answer(batch: Batch, model: Encoder) -> Tensor:
    logits = model.logits(batch.answer_inputs[batch.mine])
    return answer_loss(logits, batch.labels[batch.mine], normaliser=batch.answer_normaliser).loss


def all_together(batch: Batch, model: Encoder) -> Tensor:
    scores = cosines(batch, model)
    output = contrastive(batch, scores)
    return (
        output.loss
        + 0.7 * alignment(batch, scores)
        + 3.0 * invariance(batch, scores, "soft")
        + 0.5 * risk_variance(*environment_risks(output))
        + 0.3 * answer(batch, model)
    )


def matryoshka(batch: Batch, model: Encoder) -> Tensor:
    """The stage's own objective at three sizes, every term on."""
    settings = RetrieverConfig(
        invariance_ramp_steps=1, invariance_weight=3.0, invariance_temperature=0.3
    )
    extra = ExperimentalRetriever(
        risk_variance_weight=0.5,
        contrastive_temperature=0.2,
        matryoshka_dims=(2, 5),
        matryoshka_weights=(2.0, 0.5),
    )
    rows = Rows(
        positive=batch.positive[batch.mine],
        weights=batch.weights[batch.mine],
        normaliser=batch.normaliser,
        environments=batch.environments[batch.mine],
        teacher=batch.teacher[batch.mine],
        no_copies=batch.allowed[batch.mine],
        no_answers=batch.allowed[batch.mine],
    )
    queries, passages = (
        model(batch.all_queries[batch.mine]),
        gather_rows(model(batch.all_passages[batch.my_slots])),
    )
    return objective(queries, passages, rows, settings, extra, 3)[0]


def through_older_names(batch: Batch, model: Encoder, name: str | None) -> Tensor:
    """The contrastive loss through another rung of the gather's fallback chain."""
    newest = gather._functional_all_gather
    if name is None:
        found = None
    else:
        from torch.distributed import _functional_collectives as functional

        found = getattr(functional, name)
    gather._functional_all_gather = lambda: found  # the version of torch is what is simulated here
    try:
        return contrastive(batch, cosines(batch, model)).loss
    finally:
        gather._functional_all_gather = newest


def detached(x: Tensor) -> Tensor:
    """The known wrong gather: other ranks' rows without gradient, the local ones spliced in."""
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    parts[dist.get_rank()] = x
    return torch.cat(parts)


def detached_everything(batch: Batch, model: Encoder, factor: float) -> Tensor:
    """Every rank computes the full matrix from detached gathers: right only if multiplied by the
    number of ranks.
    """
    scores = cosines_of(
        detached(model(batch.all_queries[batch.mine])),
        detached(model(batch.all_passages[batch.my_slots])),
    )
    output = contrastive_loss(
        scores,
        batch.positive,
        batch.allowed,
        temperature=0.2,
        weights=batch.weights,
        environment_mask=batch.environments,
    )
    return factor * output.loss


def detached_documents(batch: Batch, model: Encoder) -> Tensor:
    """Local rows against detached documents: wrong whatever the factor."""
    queries = model(batch.all_queries[batch.mine])
    return contrastive(
        batch, cosines_of(queries, detached(model(batch.all_passages[batch.my_slots])))
    ).loss


CASES: dict[str, Callable[[Batch, Encoder], Tensor]] = {
    "contrastive": lambda batch, model: contrastive(batch, cosines(batch, model)).loss,
    "alignment": lambda batch, model: alignment(batch, cosines(batch, model)),
    "invariance_soft": lambda batch, model: invariance(batch, cosines(batch, model), "soft"),
    "invariance_hard": lambda batch, model: invariance(batch, cosines(batch, model), "hard"),
    "risk_variance": lambda batch, model: risk_variance(
        *environment_risks(contrastive(batch, cosines(batch, model)))
    ),
    "risk_of_averaged_losses": lambda batch, model: risk_variance(
        gather.mean_over_ranks(
            contrastive(batch, cosines(batch, model), masked=False).per_environment
        )
    ),
    "answer": answer,
    "all": all_together,
    "matryoshka": matryoshka,
    # The same right answer by other ways.
    "contrastive@all_gather_tensor_autograd": lambda batch, model: through_older_names(
        batch, model, "all_gather_tensor_autograd"
    ),
    "contrastive@torch.distributed.nn": lambda batch, model: through_older_names(
        batch, model, None
    ),
    "contrastive@detached_times_world": lambda batch, model: detached_everything(
        batch, model, float(batch.world)
    ),
    # Wrong ways, compared with the right reference.
    "contrastive@wrong_detached": lambda batch, model: detached_everything(batch, model, 1.0),
    "contrastive@wrong_detached_documents": detached_documents,
    "risk_variance@wrong_local": lambda batch, model: risk_variance(
        contrastive(batch, cosines(batch, model)).per_environment
    ),
}


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder / 'rendezvous'}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=60),
        )
    batch = Batch(rank, world)
    torch.manual_seed(11)
    model = Encoder()
    found = {}
    for name, case in CASES.items():
        model.zero_grad(set_to_none=True)
        loss = case(batch, model)
        loss.backward()
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        flat = torch.cat([loss.detach().reshape(1), *(part.flatten() for part in parts)])
        if world > 1:
            dist.all_reduce(flat)
            flat /= world
        found[f"{name}/loss"], found[f"{name}/grad"] = flat[:1].clone(), flat[1:].clone()
    if rank == 0:
        save_file(found, folder / f"world{world}.safetensors")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
