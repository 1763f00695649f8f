"""What actors really hold at their peak, against what ``invar-ray plan`` says of them.

``python -m benchmarks.footprint`` runs embedding, stage 1 and stage 2 on the CPU, a step each, once
with SmolLM2-135M in fp32 and once with a random LLaMA of another shape in bf16: wider, fewer
layers, grouped heads, a head of its own. Exit status 1 where ledger and measurement are more than
15 % apart.

A process's peak is its ``VmHWM``, read ten times a second.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from invar_ray.config import load_config
from invar_ray.footprint import Corpus, footprint
from invar_ray.models.smollm2 import smollm2_tokenizer
from invar_ray.pipeline import Pipeline

TOLERANCE = 0.15
SETTINGS = (
    "corpus.uri=builtin:facts",
    "corpus.distractors=48",
    "questions.train_uri=builtin:facts",
    "questions.dev_uri=builtin:facts",
    "questions.train_limit=12",
    "questions.dev_limit=4",
    "rewrites.num_windows=0",
    "retriever.steps=1",
    "retriever.global_batch_size=8",
    "retriever.num_hard_negatives=1",
    "generator.steps=1",
    "generator.global_batch_size=3",
    "scale.embed_workers=1",
    "scale.num_workers=1",
    "scale.trackers=[]",
    "scale.shard_rows=16",
    "scale.train_tokens_per_chunk=640",
)
TITLES = {"embed": "EmbedShard", "stage 1": "RayTrainWorker", "stage 2": "RayTrainWorker"}
"""Part of the title of a phase's processes."""


@dataclass
class Peaks:
    """Highest resident bytes of this process's children, by phase and process."""

    phase: str = ""
    found: dict[tuple[str, int], tuple[str, int]] = field(default_factory=dict)

    def look(self) -> None:
        """Read all of them once."""
        for child in psutil.Process().children(recursive=True):
            try:
                title = " ".join(child.cmdline())
                status = Path(f"/proc/{child.pid}/status").read_text(encoding="utf-8")
                peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
            except (psutil.Error, OSError, IndexError):
                continue  # it has ended
            begun = next((phase for phase, pid in self.found if pid == child.pid), self.phase)
            self.found[begun, child.pid] = title, peak

    def of(self, phase: str) -> float:
        """The highest of the processes that began in a phase and belong to it."""
        return max(
            peak
            for (begun, _), (title, peak) in self.found.items()
            if begun == phase and TITLES[phase] in title
        )


@contextmanager
def watched() -> Iterator[Peaks]:
    """Read the peaks of all children ten times a second, inside."""
    peaks, done = Peaks(), threading.Event()

    def look() -> None:
        while not done.wait(0.1):
            peaks.look()

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield peaks
    finally:
        done.set()
        thread.join()


def other_base(folder: Path) -> Path:
    """A random LLaMA of another shape, with SmolLM2's tokenizer."""
    tokenizer = smollm2_tokenizer()
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=49152,
        hidden_size=1024,
        intermediate_size=3584,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(shape).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def measure(root: Path, overrides: list[str]) -> Iterator[tuple[str, float, float]]:
    """(phase, bytes by the ledger, bytes measured) of one run, as its steps end."""
    settings = [*SETTINGS, *overrides, f"storage.root_uri={root / 'store'}"]
    config = load_config("smollm2_135m", settings)
    with watched() as peaks, Pipeline(config) as pipeline:
        _ = pipeline.base, pipeline.passages, pipeline.questions
        peaks.phase = "embed"
        vectors = pipeline.base_index.parent("vectors")
        tokens = vectors.info["usage"]["tokens"] / vectors.info["rows"]
        corpus = Corpus(vectors.info["rows"], round(tokens), 12, 4)
        said = {
            step.label: step.actors[1].host
            for step in footprint(config, corpus)[:-1]
            if len(step.actors) > 1
        }
        yield "embed", said["embed passages (base)"], peaks.of("embed")
        peaks.phase = "between"
        _ = pipeline.trainset
        peaks.phase = "stage 1"
        _ = pipeline.retriever
        yield "stage 1", said["stage 1: retriever"], peaks.of("stage 1")
        peaks.phase = "between"
        _ = pipeline.readings
        peaks.phase = "stage 2"
        _ = pipeline.generator
        yield "stage 2", said["stage 2: generator"], peaks.of("stage 2")


def main() -> None:
    """Print the table; exit 1 where a row is off."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=("smollm2", "other"), help="one of the two bases")
    only = parser.parse_args().only
    off = 0
    print("| base | process | ledger, MB | measured, MB | off by |\n|" + " --- |" * 5, flush=True)
    with tempfile.TemporaryDirectory(prefix="invar-footprint-") as name:
        runs: dict[str, list[str]] = {}
        if only != "other":
            runs["SmolLM2-135M, fp32"] = ["model.precision=fp32"]
        if only != "smollm2":
            folder = other_base(Path(name) / "base")
            runs["random LLaMA, bf16"] = [f"model.base={folder}", "model.precision=bf16"]
        for number, (base, overrides) in enumerate(runs.items()):
            for phase, said, peak in measure(Path(name) / str(number), overrides):
                share = said / peak - 1.0
                off += abs(share) > TOLERANCE
                print(
                    f"| {base} | {phase} | {said / 1e6:,.0f} | {peak / 1e6:,.0f} | {share:+.0%} |",
                    flush=True,
                )
    sys.exit(1 if off else 0)


if __name__ == "__main__":
    main()
