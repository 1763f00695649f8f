"""One training step: stage 1 against sentence-transformers' cached loss, stage 2 against TRL's
supervised fine-tuning; the same base, adapter, batches, tokens and optimizer, one thread.

The losses of the first step must agree: both compute the same (not with TRL's packing, which puts
other sequences into a batch).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.contest import OURS, Contest, Measured, Side
from invar_ray.config import Config, LoraConfig, ModelConfig, TinyConfig, load_config
from invar_ray.corpus import facts
from invar_ray.models.tiny import build_tiny

WARM_UP = 1  # steps that are not counted
TEMPERATURE = 0.05
MINI_BATCH = 32  # the peer's default
MAX_TOKENS = 128
LEARNING_RATE = 1e-3
BATCH = 64
SEQUENCES = 8
LORA = LoraConfig(
    rank=16,
    alpha=32,
    dropout=0.0,
    target_modules=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
)
_NAMES = ("anchor", "positive", "negative")


def contests(full: bool, folder: Path) -> list[Contest]:
    """Both stages."""
    model, tokenizer = build_tiny(TinyConfig(), 0)
    base = folder / "base"
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    steps = 12 if full else 4
    given: dict[str, Any] = {"base": str(base), "steps": steps}
    cached = (
        Side(OURS, "train:contrastive", given),
        Side("sentence-transformers, cached loss", "train:cached", given),
    )
    sequences = str(_sequences(folder, steps))
    given = {"sequences": sequences, "steps": steps}
    tuned = (
        Side(OURS, "train:answers", {**given, "packed": False}),
        Side("TRL", "train:sft", {**given, "packed": False}),
    )
    packed = (
        Side(OURS, "train:answers", {**given, "packed": True}),
        Side("TRL, packed", "train:sft", {**given, "packed": True}),
    )
    counted = steps - WARM_UP
    return [
        Contest("train stage 1", "pair", BATCH * counted, cached, 1.3, tolerance=1e-3),
        Contest("train stage 2", "sequence", SEQUENCES * counted, tuned, 1.2, tolerance=1e-3),
        Contest("train stage 2 packed", "sequence", SEQUENCES * counted, packed, 1.2),
    ]


def triples(count: int) -> list[tuple[str, str, str]]:
    """(question, its passage, a neighbour) of the demo corpus, no passage twice among 64 in a row,
    lengths mixed.
    """
    documents = {document.id: document for document in facts.documents()}
    order = list(documents)
    of_document: dict[str, list[str]] = {}
    for example in facts.questions("train"):
        of_document.setdefault(example.positive_ids[0], []).append(example.question)
    rows: list[tuple[str, str, str]] = []
    turn = 0
    while len(rows) < count:
        for place, name in enumerate(order):
            asked = of_document.get(name)
            if asked:
                negative = documents[order[(place + 1) % len(order)]]
                # One, two or three neighbours joined: passages of unequal length, as windows are.
                text = " ".join(
                    documents[order[(place + k) % len(order)]].text for k in range(1 + place % 3)
                )
                rows.append((asked[turn % len(asked)], text, negative.text))
        turn += 1
    return rows[:count]


def contrastive(base: str, steps: int) -> Callable[[], Measured]:
    """Our GradCache, bi-encoder and loss; chunks hold no more tokens than the peer's mini-batches
    can.
    """
    from invar_ray.losses.contrastive import contrastive_loss
    from invar_ray.losses.gradcache import RepresentationCache
    from invar_ray.models.adapters import new_adapter
    from invar_ray.models.base import load_tokenizer, resolve_base
    from invar_ray.models.batching import pad_right
    from invar_ray.models.encoder import BiEncoder
    from invar_ray.models.loading import open_model

    rows, tokenizer = triples(BATCH * steps), load_tokenizer(base)

    def encode(cache: RepresentationCache, texts: list[str]) -> torch.Tensor:
        ended = [f"{text}{tokenizer.eos_token}" for text in texts]
        ids = tokenizer(ended, truncation=True, max_length=MAX_TOKENS)["input_ids"]
        return cache(*pad_right(ids, int(tokenizer.pad_token_id)))

    def work() -> Measured:
        plain, _ = open_model(resolve_base(ModelConfig(base=base), None), None)
        adapted = new_adapter(plain, LORA, 0)
        module = BiEncoder(adapted.get_base_model(), "mean")  # type: ignore[arg-type]
        steps_of = _Steps(module)
        for at in range(0, len(rows), BATCH):
            part = rows[at : at + BATCH]
            cache = RepresentationCache(module, MINI_BATCH * MAX_TOKENS)
            queries = encode(cache, [row[0] for row in part])
            passages = encode(cache, [row[1] for row in part] + [row[2] for row in part])
            loss = contrastive_loss(
                (queries @ passages.T)[:, None],
                torch.arange(len(part)),
                torch.ones(len(part), len(passages), dtype=torch.bool),
                temperature=TEMPERATURE,
            ).loss
            cache.backward(loss)
            steps_of.end(float(loss))
        return steps_of.measured()

    return work


def answers(sequences: str, steps: int, packed: bool) -> Callable[[], Measured]:
    """Our stage 2, as the training loop runs it in one process without DeepSpeed."""
    from dataclasses import replace

    from invar_ray.training.generator_stage import GeneratorStage

    pipeline, inputs = _stage_2(Path(sequences).parent)
    config = pipeline.config
    if packed:
        config = replace(
            config, scale=replace(config.scale, pack_tokens=config.generator.max_tokens)
        )

    def work() -> Measured:
        stage = GeneratorStage(config, pipeline.store, inputs, 0, 1)
        steps_of = _Steps(stage.module)
        for step in range(steps):
            loss, _ = stage.loss(stage.module, step)
            loss.backward()
            steps_of.end(float(loss))
        return steps_of.measured()

    return work


class _Steps:
    """AdamW and clipping as the peers' trainers have them, and the times of the steps."""

    def __init__(self, module: torch.nn.Module) -> None:
        module.train()
        self._parameters = [value for value in module.parameters() if value.requires_grad]
        self._optimizer = torch.optim.AdamW(self._parameters, lr=LEARNING_RATE, weight_decay=0.0)
        self._losses: list[float] = []
        self._times: list[tuple[float, float]] = []

    def end(self, loss: float) -> None:
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._losses.append(loss)
        self._times.append((time.perf_counter(), time.process_time()))

    def measured(self) -> Measured:
        return _between(self._times, self._losses)


def _between(times: list[tuple[float, float]], losses: list[float]) -> Measured:
    (clock, cpu), (clock_end, cpu_end) = times[WARM_UP - 1], times[-1]
    return Measured(clock_end - clock, cpu_end - cpu, proof=[losses[0]])


def _stage_2(folder: Path) -> tuple[Any, dict[str, Any]]:
    """A small store with what stage 2 trains on, made once; and the stage's inputs."""
    from dataclasses import asdict

    from invar_ray.executor import Here
    from invar_ray.pipeline import Pipeline
    from invar_ray.steps import readings

    config: Config = load_config(
        "tiny",
        [
            f"storage.root_uri={folder / 'store'}",
            "questions.train_limit=64",
            "corpus.distractors=60",
            f"generator.global_batch_size={SEQUENCES}",
            f"generator.optimizer.learning_rate={LEARNING_RATE}",
        ],
    )
    pipeline = Pipeline(config, quiet=True, executor=Here())
    parents = pipeline.hits(pipeline.base_index, "train"), pipeline.passages
    made, _ = pipeline.store.get_or_build(
        readings.plan(config, *parents), lambda building: readings.build(building, *parents)
    )
    return pipeline, {"readings": made.ref, "base": asdict(pipeline.base)}


def _sequences(folder: Path, steps: int) -> Path:
    """The token ids and masks of our stage's sequences, step by step, for the peer."""
    from invar_ray.losses.answer import IGNORED
    from invar_ray.training.generator_stage import GeneratorStage
    from invar_ray.training.sequences import PromptAndTarget, tokenize_sequences

    pipeline, inputs = _stage_2(folder)
    stage = GeneratorStage(pipeline.config, pipeline.store, inputs, 0, 1)
    rows = []
    for step in range(steps):
        given = [PromptAndTarget(**one) for one in stage.describe(step)["sequences"]]
        ids, mask, labels = tokenize_sequences(
            given, stage.tokenizer, pipeline.config.generator.max_tokens
        )
        for each, keep, label in zip(ids, mask > 0, labels, strict=True):
            answer = label[keep] != IGNORED
            rows.append(
                {"input_ids": each[keep].tolist(), "completion_mask": answer.int().tolist()}
            )
    target = folder / "sequences.pt"
    base = str(pipeline.store.open(pipeline.base.location.removeprefix("artifact:")).path("."))
    torch.save({"rows": rows, "base": base, "tokens": pipeline.config.generator.max_tokens}, target)
    return target


class _Clock:
    """Callback of a transformers trainer: when steps ended."""

    def __init__(self) -> None:
        from transformers import TrainerCallback

        self.times: list[tuple[float, float]] = []
        outer = self

        class Note(TrainerCallback):
            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                outer.times.append((time.perf_counter(), time.process_time()))

        self.callback = Note()


def _peft() -> Any:
    from peft import LoraConfig as PeftLoraConfig

    return {
        "r": LORA.rank,
        "lora_alpha": LORA.alpha,
        "lora_dropout": LORA.dropout,
        "target_modules": list(LORA.target_modules),
    }, PeftLoraConfig


_TRAINER: dict[str, Any] = {
    "num_train_epochs": 1,
    "learning_rate": LEARNING_RATE,
    "lr_scheduler_type": "constant",
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "save_strategy": "no",
    "logging_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
}


def cached(base: str, steps: int) -> Callable[[], Measured]:
    """SentenceTransformerTrainer with CachedMultipleNegativesRankingLoss."""
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.base.sampler import DefaultBatchSampler
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    rows = triples(BATCH * steps)

    class InOrder(DefaultBatchSampler):
        def __iter__(self) -> Any:
            for at in range(0, len(rows), BATCH):
                yield list(range(at, min(at + BATCH, len(rows))))

    def work() -> Measured:
        losses: list[float] = []

        class Loss(CachedMultipleNegativesRankingLoss):
            def forward(self, *args: Any, **kwargs: Any) -> Any:
                value = super().forward(*args, **kwargs)
                losses.append(float(value))
                return value

        transformer = Transformer(
            base, model_kwargs={"dtype": torch.float32}, max_seq_length=MAX_TOKENS
        )
        width = transformer.get_embedding_dimension()
        model = SentenceTransformer(
            modules=[transformer, Pooling(width, "mean"), Normalize()], device="cpu"
        )
        if model.tokenizer.pad_token_id is None:
            model.tokenizer.pad_token = model.tokenizer.eos_token
        settings, peft = _peft()
        model.add_adapter(peft(**settings, task_type="FEATURE_EXTRACTION"))
        end = model.tokenizer.eos_token
        columns = {name: [row[k] + end for row in rows] for k, name in enumerate(_NAMES)}
        clock = _Clock()
        with tempfile.TemporaryDirectory() as folder:
            SentenceTransformerTrainer(
                model=model,
                args=SentenceTransformerTrainingArguments(
                    output_dir=folder,
                    per_device_train_batch_size=BATCH,
                    batch_sampler=InOrder,
                    **_TRAINER,
                ),
                train_dataset=Dataset.from_dict(columns),
                loss=Loss(model, scale=1.0 / TEMPERATURE, mini_batch_size=MINI_BATCH),
                callbacks=[clock.callback],
            ).train()
        return _between(clock.times, losses)

    return work


def sft(sequences: str, steps: int, packed: bool) -> Callable[[], Measured]:
    """TRL's SFTTrainer with a PEFT adapter over the same tokens, in the same order where it does
    not pack.
    """
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    given = torch.load(sequences, weights_only=True)

    class InOrder(SFTTrainer):
        first: float | None = None

        def _get_train_sampler(self, *args: Any) -> Any:
            return SequentialSampler(self.train_dataset)

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            found = super().compute_loss(*args, **kwargs)
            if self.first is None:
                self.first = float(found[0] if isinstance(found, tuple) else found)
            return found

    def work() -> Measured:
        clock, (settings, peft) = _Clock(), _peft()
        with tempfile.TemporaryDirectory() as folder:
            trainer = InOrder(
                model=AutoModelForCausalLM.from_pretrained(given["base"], dtype=torch.float32),
                args=SFTConfig(
                    output_dir=folder,
                    per_device_train_batch_size=SEQUENCES,
                    max_length=given["tokens"],
                    packing=packed,
                    completion_only_loss=True,
                    gradient_checkpointing=False,
                    bf16=False,
                    **_TRAINER,
                ),
                train_dataset=Dataset.from_list(given["rows"]),
                processing_class=AutoTokenizer.from_pretrained(given["base"]),
                peft_config=peft(**settings, task_type="CAUSAL_LM"),
                callbacks=[clock.callback],
            )
            trainer.train()
        found = _between(clock.times, [trainer.first or 0.0])
        # Packed, a step holds more sequences: as many seconds as ours would have had for as many.
        share = (steps - WARM_UP) * SEQUENCES / len(given["rows"])
        if packed:
            done = (len(clock.times) - WARM_UP) / len(clock.times)
            share /= done
            return Measured(
                *(value * share for value in (found.clock or 0.0, found.cpu or 0.0)),
                notes={"steps": float(len(clock.times))},
            )
        return found

    return work
