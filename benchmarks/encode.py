"""Encoding speed with MiniLM: the Ray Data pipeline against a bare loop, and our batches against
sentence-transformers.

    python -m benchmarks.encode --rows 5000 --workers 1

Texts have mixed lengths (one to four demo documents joined), in arrival order, all different.
Everything runs one thread a process.  Rates are given by the clock and by CPU time: on a machine
that others use the clock says little.

- *pipeline*: ``build_vectors`` on ``--workers`` actors of a local Ray, shards written; start-up
  (Ray, imports, weights) is listed apart.  By the clock it counts from the first finished shard to
  the last.
- *bare loop*: the same encoder over the same shards in this process, nothing written.
- *sentence-transformers*: ``encode`` with the same weights, which sorts all its input by length;
  and batch by batch in arrival order.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from invar_ray.config import load_config
from invar_ray.corpus import facts
from invar_ray.index.blocks import read_vectors
from invar_ray.models.encoder import COARSE_MAX_TOKENS, coarse_spec
from invar_ray.models.minilm import CoarseEncoder
from invar_ray.models.tiny import minilm_folder
from invar_ray.pipeline import Pipeline

BATCH = 32
SHARD_ROWS = 512


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows", type=int, default=5000, help="passages of the pipeline and of the loop"
    )
    parser.add_argument(
        "--texts", type=int, default=500, help="texts of the comparison with sentence-transformers"
    )
    parser.add_argument(
        "--runs", type=int, default=5, help="interleaved runs of that comparison; medians are given"
    )
    parser.add_argument("--workers", type=int, default=1, help="embedding actors")
    parser.add_argument("--out", default="runs/benchmarks/encode.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "sentence_transformers": against_peer(mixed_lengths(arguments.texts), arguments.runs),
        "pipeline": against_loop(mixed_lengths(arguments.rows), arguments.workers),
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("torch", "ray", "sentence-transformers")
        },
        "machine": platform.processor() or platform.machine(),
    }
    print(json.dumps(result, indent=2))
    target = Path(arguments.out)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def against_peer(texts: list[str], runs: int) -> dict[str, Any]:
    """Our batches and sentence-transformers', one process and one thread each."""
    from sentence_transformers import SentenceTransformer

    ours = CoarseEncoder("builtin:minilm", 256, "bench")
    ours.tokens_per_batch = load_config("tiny").scale.embed_tokens_per_batch
    peer = SentenceTransformer(str(minilm_folder()), device="cpu")

    def arrival_order() -> np.ndarray:
        parts = [
            peer.encode(texts[at : at + BATCH], batch_size=BATCH)
            for at in range(0, len(texts), BATCH)
        ]
        return np.concatenate(parts)

    ways: dict[str, Callable[[], np.ndarray]] = {
        "invar_ray": lambda: ours.encode_queries(texts),
        "sentence-transformers": lambda: np.asarray(peer.encode(texts, batch_size=BATCH)),
        "sentence-transformers, arrival order": arrival_order,
    }
    # warm-up, and the proof that all compute the same
    vectors = {name: way() for name, way in ways.items()}
    for name, matrix in vectors.items():
        lowest = float((matrix * vectors["invar_ray"]).sum(axis=1).min())
        if lowest < 0.9999:
            raise SystemExit(f"{name} computes other vectors (lowest cosine {lowest:.5f})")
    clock: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(runs):
        for name, way in ways.items():
            started, started_cpu = time.perf_counter(), time.process_time()
            way()
            clock[name].append(time.perf_counter() - started)
            cpu[name].append(time.process_time() - started_cpu)
    found: dict[str, Any] = {"texts": len(texts), "runs": runs, "processes x threads": "1 x 1"}
    for label, seconds in {"by the clock": clock, "by CPU time": cpu}.items():
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        found[label] = {
            "texts_per_s": {name: round(len(texts) / value, 2) for name, value in medians.items()},
            "invar_ray over": {
                name: round(value / medians["invar_ray"], 3)
                for name, value in medians.items()
                if name != "invar_ray"
            },
        }
    return found


def against_loop(texts: list[str], workers: int) -> dict[str, Any]:
    """The pipeline on Ray and a loop over the same shards with the same encoder."""
    with tempfile.TemporaryDirectory(prefix="invar-bench-") as folder:
        corpus = Path(folder) / "corpus.jsonl"
        rows = [{"id": f"t{at}", "title": "", "text": text} for at, text in enumerate(texts)]
        corpus.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        config = load_config(
            "tiny",
            [
                f"storage.root_uri={folder}/store",
                f"corpus.uri={corpus}",
                "corpus.chunk_tokens=512",
                "corpus.chunk_stride=512",
                "index.encoder=minilm",
                f"scale.shard_rows={SHARD_ROWS}",
                f"scale.embed_workers={workers}",
                "scale.cpus_per_worker=1",
            ],
        )
        with Pipeline(config) as pipeline:
            passages = pipeline.passages
            vectors = pipeline.reindexed.parent("vectors")
        written = sorted(
            (path.stat().st_mtime, json.loads(path.read_text())["rows"])
            for path in vectors.path("shards").glob("*.json")
        )
        cpu = vectors.info["usage"]["cpu_s"]
        encoder = CoarseEncoder(
            "builtin:minilm", COARSE_MAX_TOKENS, coarse_spec(config.coarse).fingerprint
        )
        encoder.tokens_per_batch = config.scale.embed_tokens_per_batch
        pairs = [("", text) for text in texts]
        encoder.encode_passages(pairs[:32])  # warm-up
        blocks = []
        started, started_cpu = time.perf_counter(), time.process_time()
        for start in range(0, len(pairs), SHARD_ROWS):
            blocks.append(encoder.encode_passages(pairs[start : start + SHARD_ROWS]))
        loop_s, loop_cpu_s = time.perf_counter() - started, time.process_time() - started_cpu
        stored = read_vectors(vectors)[1]
        lowest = float((stored * np.concatenate(blocks)).sum(axis=1).min())
        if len(stored) != len(pairs) or lowest < 0.9999:
            raise SystemExit(
                f"the pipeline computes other vectors ({len(stored)} of {len(pairs)}, cosine "
                f"{lowest:.5f})"
            )
    steady = sum(count for _, count in written[1:]) / max(1e-9, written[-1][0] - written[0][0])
    cpu_rate = len(pairs) / (cpu["encode"] + cpu["driver"])
    return {
        "passages": passages.info["passages"],
        "processes x threads": {
            "pipeline": f"{workers} actors x 1, and the driver",
            "bare loop": "1 x 1",
        },
        "start-up, CPU s": cpu["start"],
        "padding share": vectors.info["usage"]["padding_share"],
        "passages a second": {
            "pipeline": round(steady, 2),
            "bare loop": round(len(pairs) / loop_s, 2),
        },
        "passages a CPU second": {
            "pipeline, driver included": round(cpu_rate, 2),
            "bare loop": round(len(pairs) / loop_cpu_s, 2),
        },
        "pipeline over bare loop, a process": {
            "by the clock": round(steady / workers / (len(pairs) / loop_s), 3),
            "by CPU time": round(cpu_rate / (len(pairs) / loop_cpu_s), 3),
        },
        "peak memory, MB": list(vectors.info["usage"]["peak_mb"].values()),
    }


def mixed_lengths(count: int) -> list[str]:
    """Joins of one to four neighbours, in turn, each after another number: from some 40 to some 250
    tokens.
    """
    texts = [document.text for document in facts.documents()]
    joined = []
    for number in range(count):
        at, length = number * 7 % len(texts), number % 4 + 1
        joined.append(f"{number}. " + " ".join(texts[at : at + length]))
    return joined


if __name__ == "__main__":
    main()
