"""Encoding speed: MiniLM through our token-budget batches against sentence-transformers on the same weights.

Texts have mixed lengths (one to four demo documents joined), in arrival order.  Both run one thread, five interleaved
runs, medians.  sentence-transformers sorts all its input by length; its arrival-order row encodes batch by batch as
texts come.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from invar_ray.models.coarse import CoarseEncoder
from invar_ray.models.tiny import minilm_folder
from invar_ray.text import facts

RUNS = 5
BATCH = 32


def main() -> None:
    """Measure, print, and write the JSON."""
    torch.set_num_threads(1)
    texts = mixed_lengths([document.text for document in facts.documents()])
    ours = CoarseEncoder("builtin:minilm", 256, "bench")
    peer = SentenceTransformer(str(minilm_folder()), device="cpu")

    def arrival_order() -> np.ndarray:
        parts = [peer.encode(texts[at : at + BATCH], batch_size=BATCH) for at in range(0, len(texts), BATCH)]
        return np.concatenate(parts)

    ways: dict[str, Callable[[], np.ndarray]] = {
        "invar_ray": lambda: ours.encode_queries(texts),
        "sentence-transformers": lambda: np.asarray(peer.encode(texts, batch_size=BATCH)),
        "sentence-transformers, arrival order": arrival_order,
    }
    vectors = {name: way() for name, way in ways.items()}  # warm-up, and the proof that all compute the same
    for name, matrix in vectors.items():
        lowest = float((matrix * vectors["invar_ray"]).sum(axis=1).min())
        if lowest < 0.9999:
            raise SystemExit(f"{name} computes other vectors (lowest cosine {lowest:.5f})")
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(RUNS):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    result = {
        "texts": len(texts),
        "threads": 1,
        "texts_per_s": {name: len(texts) / value for name, value in medians.items()},
        "ratio": {name: value / medians["invar_ray"] for name, value in medians.items() if name != "invar_ray"},
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "sentence-transformers")},
        "machine": platform.processor() or platform.machine(),
    }
    print(json.dumps(result, indent=2))
    target = Path("runs/benchmarks/encode.json")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def mixed_lengths(texts: list[str]) -> list[str]:
    """Joins of one to four neighbours, in turn: lengths from some 40 to some 400 tokens."""
    joined, at, count = [], 0, 1
    while at + count <= len(texts):
        joined.append(" ".join(texts[at : at + count]))
        at, count = at + count, count % 4 + 1
    return joined


if __name__ == "__main__":
    main()
