"""The two stages as the training loop sees them: a module, a loss for each step, and what to save."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from invar_ray.artifacts import Store
from invar_ray.config import Config
from invar_ray.losses.alignment import alignment_loss
from invar_ray.losses.answer import IGNORED, AnswerOutput, answer_loss
from invar_ray.losses.contrastive import contrastive_loss
from invar_ray.losses.gather import gather_rows
from invar_ray.losses.invariance import invariance_loss
from invar_ray.losses.masks import contrastive_allowed, copies_allowed
from invar_ray.losses.risk import environment_risks, risk_variance
from invar_ray.models.adapters import new_adapter, save_adapter
from invar_ray.models.batching import pad_right
from invar_ray.models.encoder import PROJECTION_FILE, BiEncoder, EncoderSpec, passage_ids, query_ids
from invar_ray.models.locate import BaseRef, open_base
from invar_ray.training.batches import StepPlan, Trainset
from invar_ray.training.sequences import HitSet, tokenize_sequences

Forward = Callable[..., Tensor]
Metrics = dict[str, float]


class Stage(Protocol):
    """What the loop needs of a stage."""

    module: nn.Module
    steps: int

    def loss(self, forward: Forward, step: int) -> tuple[Tensor, Metrics]:
        """The local share of the step's global loss (its average over ranks is the global one), and numbers to log."""
        ...

    def save(self, parameters: dict[str, Tensor], folder: Path) -> None:
        """Write the adapter from complete parameters (named as in ``module``)."""
        ...


class RetrieverStage:
    """Stage 1: contrastive + alignment + invariance over environments, candidates gathered over ranks."""

    def __init__(self, config: Config, store: Store, inputs: dict[str, Any], rank: int, world_size: int) -> None:
        self.config, self.rank, self.world_size = config, rank, world_size
        self.steps = config.retriever.steps
        self.spec = EncoderSpec.from_json(inputs["encoder"])
        self.trainset = Trainset(store.open(inputs["trainset"], "trainset"))
        base, self.tokenizer = open_base(self.spec.base, store, _dtype(config))
        self._base_name = config.model.base
        _recompute(base, config)
        self._adapted = new_adapter(base, config.retriever.lora, config.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.module: nn.Module = BiEncoder(
                self._adapted.get_base_model(), self.spec.pooling, config.model.projection_dim
            )

    def loss(self, forward: Forward, step: int) -> tuple[Tensor, Metrics]:
        """See :class:`Stage`; METHOD "Stage 1" names the terms."""
        settings, trainset = self.config.retriever, self.trainset
        plan = trainset.plan(
            self.config.seed, step, settings.global_batch_size, settings.num_hard_negatives, self.world_size
        )
        share = len(plan.rows) // self.world_size
        mine = slice(self.rank * share, (self.rank + 1) * share)
        queries, tokens = self._encode_queries(forward, plan, mine)  # [b, R, D]
        candidates, missing, more_tokens = self._encode_candidates(forward, plan)  # [C, N, D]
        cosines = torch.einsum("brd,cnd->brnc", queries, candidates).flatten(1, 2)  # [b, E, C], (0, 0) first

        device = cosines.device
        positive = torch.tensor(plan.positive[mine], device=device)
        weights = torch.tensor(plan.weights[mine], device=device)
        normaliser = sum(plan.weights) / self.world_size
        environments = trainset.environment_mask(plan)[mine].to(device)
        slots, teacher = trainset.slot_metadata(plan), trainset.teacher_scores(plan, self.config.coarse.document_weight)
        positives = torch.tensor(plan.positive)
        no_copies = copies_allowed(slots, positives)[mine].to(device)
        no_answers = contrastive_allowed(
            slots,
            positives,
            teacher_scores=teacher,
            holds_answer=trainset.holds_answer(plan),
            teacher_margin=settings.false_negative_margin,
        )[mine].to(device)

        nce = contrastive_loss(
            cosines,
            positive,
            no_answers,
            temperature=settings.contrastive_temperature,
            weights=weights,
            normaliser=normaliser,
            environment_mask=environments,
        )
        total = nce.loss
        metrics = {"loss_contrastive": nce.loss.item(), "accuracy": nce.accuracy.item()}
        alignment_weight = self.alignment_weight(step)
        if settings.alignment_weight > 0:
            aligned = alignment_loss(
                cosines[:, 0],
                teacher[mine].to(device),
                no_copies,
                temperature=settings.contrastive_temperature,
                teacher_temperature=settings.alignment_temperature,
                weights=weights,
                normaliser=normaliser,
            )
            total = total + alignment_weight * aligned.loss
            metrics |= {"loss_alignment": aligned.loss.item(), "teacher_agreement": aligned.agreement.item()}
        if settings.invariance_weight > 0:
            steady = invariance_loss(
                cosines,
                positive,
                no_copies,
                temperature=settings.invariance_temperature,
                pattern=settings.invariance_pattern,
                top_m=settings.pattern_top_m,
                share=settings.pattern_share,
                kappa=settings.pattern_kappa,
                weights=weights,
                normaliser=normaliser,
                environment_mask=environments,
            )
            total = total + self.invariance_weight(step) * steady.loss
            metrics |= {
                "loss_invariance": steady.loss.item(),
                "pattern_share": steady.pattern_share.item(),
                "consensus_perplexity": steady.perplexity.item(),
                "wrong_consensus_share": steady.wrong_consensus_share.item(),
            }
        if settings.risk_variance_weight > 0:
            variance = risk_variance(*environment_risks(nce))
            total = total + settings.risk_variance_weight * variance
            metrics["loss_risk_variance"] = variance.item()
        metrics |= {
            "loss": total.item(),
            "candidates": float(sum(plan.present)),
            # Of real rows and slots: padding depends on the number of ranks, what is logged must not.
            "masked_share": float((~no_answers[:, plan.present]).float().mean(dim=1) @ weights) / normaliser,
            "missing_windows": missing,
            "tokens": float(tokens + more_tokens),
        }
        return total, metrics

    def alignment_weight(self, step: int) -> float:
        """a(t) = a0 max(0, 1 - t / T_a)."""
        settings = self.config.retriever
        return settings.alignment_weight * max(0.0, 1.0 - step / max(1, settings.alignment_decay_steps))

    def invariance_weight(self, step: int) -> float:
        """b(t) = b0 min(1, t / T_b)."""
        settings = self.config.retriever
        return settings.invariance_weight * min(1.0, step / max(1, settings.invariance_ramp_steps))

    def save(self, parameters: dict[str, Tensor], folder: Path) -> None:
        """See :class:`Stage`; an optional projection goes beside the PEFT folder's files."""
        _save_lora(self._adapted, parameters, "causal_lm.", folder, self._base_name)
        if "projection.weight" in parameters:
            save_file({"weight": parameters["projection.weight"]}, str(folder / PROJECTION_FILE))

    def _encode_queries(self, forward: Forward, plan: StepPlan, mine: slice) -> tuple[Tensor, int]:
        families = [self.trainset.wordings[row] for row in plan.rows[mine]]
        width = self.trainset.num_wordings
        # A missing wording is encoded as the anchor and masked out: every rank runs the same shapes.
        texts = [family[r] if r < len(family) else family[0] for family in families for r in range(width)]
        vectors, tokens = self._forward(forward, query_ids(self.tokenizer, texts, self.spec))
        return vectors.view(len(families), width, -1), tokens

    def _encode_candidates(self, forward: Forward, plan: StepPlan) -> tuple[Tensor, float, int]:
        share = len(plan.slots) // self.world_size
        columns = range(self.rank * share, (self.rank + 1) * share)
        windows = self.trainset.num_windows
        rendered = [self.trainset.render(plan, column, window) for column in columns for window in range(windows)]
        ids = passage_ids(self.tokenizer, [(title, text) for title, text, _ in rendered], self.spec)
        vectors, tokens = self._forward(forward, ids)
        gathered = gather_rows(vectors.view(share, windows, -1))
        return gathered, sum(missing for _, _, missing in rendered) / max(1, len(rendered)), tokens

    def _forward(self, forward: Forward, ids: list[list[int]]) -> tuple[Tensor, int]:
        device = next(self.module.parameters()).device
        tokens, mask = pad_right(ids, int(self.tokenizer.pad_token_id))
        return forward(tokens.to(device), mask.to(device)), int(mask.sum())


class _CausalLm(nn.Module):
    """A causal LM under one forward, for the engine."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.causal_lm: Any = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, predicts: Tensor) -> Tensor:
        """[B, T] ids, mask and choice of positions -> logits [N, V] of the N chosen positions.

        The head is most of a small model's work, and logits most of its memory: only those are made that the loss
        reads.
        """
        hidden = self.causal_lm.model(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state  # [B, T, H]
        logits: Tensor = self.causal_lm.lm_head(hidden[predicts])
        return logits


def answer_loss_at(
    forward: Forward, ids: Tensor, mask: Tensor, labels: Tensor, *, normaliser: float | Tensor
) -> AnswerOutput:
    """:func:`invar_ray.losses.answer.answer_loss` of [B, T] sequences, through logits of the answers' positions only.

    Args:
        forward: (ids, mask, choice of positions) -> logits [N, V].
        ids, mask: [B, T].
        labels: [B, T], ``IGNORED`` outside the answers.
        normaliser: see there.
    """
    targets = labels[:, 1:]  # position t predicts the token at t + 1
    predicts = torch.zeros_like(mask, dtype=torch.bool)
    predicts[:, :-1] = targets != IGNORED
    logits = forward(ids, mask, predicts)  # [N, V]
    # answer_loss shifts by one: a row after the last, a label before the first.
    return answer_loss(
        torch.cat([logits, logits.new_zeros(1, logits.shape[1])])[None],
        torch.cat([targets.new_full((1,), IGNORED), targets[targets != IGNORED]])[None],
        normaliser=normaliser,
    )


class GeneratorStage:
    """Stage 2: answers from what the frozen stage-1 retriever found; loss on answer tokens only."""

    def __init__(self, config: Config, store: Store, inputs: dict[str, Any], rank: int, world_size: int) -> None:
        self.config, self.rank, self.world_size = config, rank, world_size
        self.steps = config.generator.steps
        reference = BaseRef(**inputs["base"])
        base, self.tokenizer = open_base(reference, store, _dtype(config))
        self._base_name = config.model.base
        _recompute(base, config)
        self._adapted = new_adapter(base, config.generator.lora, config.seed)
        self.module: nn.Module = _CausalLm(self._adapted.get_base_model())
        self.hits = HitSet(store.open(inputs["hits"], "hits"))

    def loss(self, forward: Forward, step: int) -> tuple[Tensor, Metrics]:
        """See :class:`Stage`; METHOD "Stage 2"."""
        settings = self.config.generator
        rows = self.hits.step_rows(self.config.seed, step, settings.global_batch_size)
        sequences = [
            self.hits.sequence(row, settings, self.tokenizer, random.Random(f"{self.config.seed}-{step}-{place}"))
            for place, row in enumerate(rows)
        ]
        mine = sequences[self.rank :: self.world_size]
        # Every rank knows the whole batch, hence the global token count, without asking the others.
        ids, mask, labels = tokenize_sequences(mine or sequences[:1], self.tokenizer, settings.max_tokens)
        if not mine:
            labels.fill_(IGNORED)
        _, _, all_labels = tokenize_sequences(sequences, self.tokenizer, settings.max_tokens)
        normaliser = int((all_labels[:, 1:] != IGNORED).sum()) / self.world_size
        device = next(self.module.parameters()).device
        output = answer_loss_at(forward, ids.to(device), mask.to(device), labels.to(device), normaliser=normaliser)
        metrics = {
            "loss": output.loss.item(),
            "token_accuracy": output.accuracy.item(),
            "answer_tokens": float(output.tokens),
            "tokens": float(mask.sum()),
        }
        return output.loss, metrics

    def save(self, parameters: dict[str, Tensor], folder: Path) -> None:
        """See :class:`Stage`."""
        _save_lora(self._adapted, parameters, "causal_lm.", folder, self._base_name)


STAGES: dict[str, Callable[[Config, Store, dict[str, Any], int, int], Stage]] = {
    "retriever": RetrieverStage,
    "generator": GeneratorStage,
}


def _dtype(config: Config) -> torch.dtype:
    return torch.bfloat16 if config.model.precision == "bf16" else torch.float32


def _recompute(base: Any, config: Config) -> None:
    if config.scale.gradient_checkpointing:
        # The reentrant form fails under ZeRO 2 and 3.
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _save_lora(model: Any, parameters: dict[str, Tensor], prefix: str, folder: Path, base_name: str) -> None:
    state = {
        f"base_model.model.{name.removeprefix(prefix)}": value
        for name, value in parameters.items()
        if name.startswith(prefix)
    }
    save_adapter(model, state, folder, base_name)
