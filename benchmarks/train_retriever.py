"""Speed and memory of contrastive training with GradCache, against sentence-transformers' trainer.

    python benchmarks/train_retriever.py [--base FOLDER] [--batch 64] [--steps 12] [--runs 5]

Both train a LoRA adapter of the same shape on the same base, over the same batches of (question,
passage, hard negative) in the same order, the same tokens, AdamW, one thread: sentence-transformers
through ``CachedMultipleNegativesRankingLoss`` and its trainer, invar_ray through its GradCache,
bi-encoder and loss.  Chunks hold no more tokens than the peer's mini-batches can.  Each run is a
process of its own; runs interleave; medians.  The losses of the first step must agree: both compute
the same.  Needs the extra ``bench``.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from invar_ray.config import LoraConfig, TinyConfig
from invar_ray.corpus import facts
from invar_ray.losses.contrastive import contrastive_loss
from invar_ray.losses.gradcache import RepresentationCache
from invar_ray.models.adapters import new_adapter
from invar_ray.models.base import load_causal_lm, load_tokenizer
from invar_ray.models.batching import pad_right
from invar_ray.models.encoder import BiEncoder
from invar_ray.models.tiny import build_tiny

WARM_UP = 2  # steps that are not counted
TEMPERATURE = 0.05
MINI_BATCH = 32  # the peer's default
MAX_TOKENS = 128
LEARNING_RATE = 1e-3
LORA = LoraConfig(
    rank=16,
    alpha=32,
    dropout=0.0,
    target_modules=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
)


def main() -> None:
    """Start the runs, compare, print, and write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--base", help="folder of a LLaMA-family model; without it the embedded base"
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument(
        "--side", choices=["invar_ray", "sentence-transformers"], help=argparse.SUPPRESS
    )
    arguments = parser.parse_args()
    if arguments.steps <= WARM_UP:
        parser.error(f"--steps: more than {WARM_UP}, which are not counted")
    if arguments.side:
        torch.set_num_threads(1)
        run = ours if arguments.side == "invar_ray" else theirs
        found = run(arguments.base, triples(arguments.batch * arguments.steps), arguments.batch)
        found["peak_memory_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps(found))
        return
    sides = ("invar_ray", "sentence-transformers")
    results: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        base = arguments.base or _write_base(Path(folder))
        for number in range(arguments.runs):
            for side in sides:
                results[side].append(_start(side, base, arguments.batch, arguments.steps))
                last = results[side][-1]
                spent = f"{last['seconds']:.1f} s, {last['cpu_seconds']:.1f} s of CPU time"
                print(
                    f"run {number + 1}, {side}: {spent}, {last['peak_memory_mb']:.0f} MB",
                    flush=True,
                )
    first = {side: runs[0]["first_loss"] for side, runs in results.items()}
    if abs(first["invar_ray"] - first["sentence-transformers"]) > 1e-3 * first["invar_ray"]:
        raise SystemExit(f"the two compute different losses at the first step: {first}")
    pairs = arguments.batch * (arguments.steps - WARM_UP)
    seconds, cpu_seconds = (
        {side: statistics.median(run[key] for run in runs) for side, runs in results.items()}
        for key in ("seconds", "cpu_seconds")
    )
    result = {
        "settings": {
            **vars(arguments),
            "threads": 1,
            "mini_batch": MINI_BATCH,
            "max_tokens": MAX_TOKENS,
        },
        "pairs_per_s": {side: pairs / value for side, value in seconds.items()},
        "ratio": seconds["sentence-transformers"] / seconds["invar_ray"],
        # Other work on the machine stretches this one less.
        "ratio_by_cpu_time": cpu_seconds["sentence-transformers"] / cpu_seconds["invar_ray"],
        "peak_memory_mb": {
            side: statistics.median(run["peak_memory_mb"] for run in runs)
            for side, runs in results.items()
        },
        "first_loss": first,
        "runs": results,
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("torch", "transformers", "peft", "sentence-transformers")
        },
        "machine": platform.processor() or platform.machine(),
    }
    print(json.dumps({key: value for key, value in result.items() if key != "runs"}, indent=2))
    target = Path("runs/benchmarks/train_retriever.json")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


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


def ours(base: str, rows: list[tuple[str, str, str]], batch: int) -> dict[str, float]:
    """Seconds of all steps but the first ones, by the clock and of CPU time, and the first loss."""
    tokenizer = load_tokenizer(base)
    adapted = new_adapter(load_causal_lm(base), LORA, 0)
    module = BiEncoder(adapted.get_base_model(), "mean")  # type: ignore[arg-type]
    module.train()
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    budget = MINI_BATCH * MAX_TOKENS

    def encode(cache: RepresentationCache, texts: list[str]) -> torch.Tensor:
        ids = tokenizer(
            [f"{text}{tokenizer.eos_token}" for text in texts],
            truncation=True,
            max_length=MAX_TOKENS,
        )
        return cache(*pad_right(ids["input_ids"], int(tokenizer.pad_token_id)))

    first_loss, started, used = 0.0, 0.0, 0.0
    for step, at in enumerate(range(0, len(rows), batch)):
        if step == WARM_UP:
            started, used = time.perf_counter(), time.process_time()
        part = rows[at : at + batch]
        cache = RepresentationCache(module, budget)
        queries = encode(cache, [row[0] for row in part])
        passages = encode(cache, [row[1] for row in part] + [row[2] for row in part])
        loss = contrastive_loss(
            (queries @ passages.T)[:, None],
            torch.arange(len(part)),
            torch.ones(len(part), len(passages), dtype=torch.bool),
            temperature=TEMPERATURE,
        ).loss
        cache.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step == 0:
            first_loss = loss.item()
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - used,
        "first_loss": first_loss,
    }


def theirs(base: str, rows: list[tuple[str, str, str]], batch: int) -> dict[str, float]:
    """The same through SentenceTransformerTrainer."""
    from datasets import Dataset
    from peft import LoraConfig as PeftLoraConfig
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.base.sampler import DefaultBatchSampler
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    from transformers import TrainerCallback

    class InOrder(DefaultBatchSampler):
        def __iter__(self) -> Any:
            for at in range(0, len(rows), batch):
                yield list(range(at, min(at + batch, len(rows))))

    times: list[tuple[float, float]] = []
    losses: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            times.append((time.perf_counter(), time.process_time()))

    class Loss(CachedMultipleNegativesRankingLoss):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            value = super().forward(*args, **kwargs)
            losses.append(float(value))
            return value

    transformer = Transformer(
        base, model_kwargs={"dtype": torch.float32}, max_seq_length=MAX_TOKENS
    )
    model = SentenceTransformer(
        modules=[transformer, Pooling(transformer.get_embedding_dimension(), "mean"), Normalize()],
        device="cpu",
    )
    if model.tokenizer.pad_token_id is None:
        model.tokenizer.pad_token = model.tokenizer.eos_token
    model.add_adapter(
        PeftLoraConfig(
            r=LORA.rank,
            lora_alpha=LORA.alpha,
            lora_dropout=LORA.dropout,
            target_modules=list(LORA.target_modules),
            task_type="FEATURE_EXTRACTION",
        )
    )
    end = model.tokenizer.eos_token
    names = ("anchor", "positive", "negative")
    dataset = Dataset.from_dict(
        {name: [row[k] + end for row in rows] for k, name in enumerate(names)}
    )
    with tempfile.TemporaryDirectory() as folder:
        settings = SentenceTransformerTrainingArguments(
            output_dir=folder,
            num_train_epochs=1,
            per_device_train_batch_size=batch,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=1.0,
            batch_sampler=InOrder,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        loss = Loss(model, scale=1.0 / TEMPERATURE, mini_batch_size=MINI_BATCH)
        trainer = SentenceTransformerTrainer(
            model=model, args=settings, train_dataset=dataset, loss=loss, callbacks=[Clock()]
        )
        trainer.train()
    (started, used), (ended, used_up) = times[WARM_UP - 1], times[-1]
    return {"seconds": ended - started, "cpu_seconds": used_up - used, "first_loss": losses[0]}


def _write_base(folder: Path) -> str:
    model, tokenizer = build_tiny(TinyConfig(), 0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def _start(side: str, base: str, batch: int, steps: int) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", __file__, "--side", side, "--base", base]
    command += ["--batch", str(batch), "--steps", str(steps)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
