"""Encoding: our batches against sentence-transformers' and a bare loop, in fp32 and bf16, and the
pipeline on Ray Data against a loop over the same encoder.

Texts have mixed lengths, in arrival order, all different.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.contest import OURS, Contest, Measured, Side
from benchmarks.groups.texts import mixed_lengths, write_smollm2_shape
from invar_ray.config import Config, ModelConfig, load_config
from invar_ray.models.encoder import coarse_spec, llm_spec, open_encoder
from invar_ray.store.artifacts import Store

BATCH = 32
SHARD_ROWS = 64
_PEER = "sentence-transformers"


def contests(full: bool, folder: Path) -> list[Contest]:
    """MiniLM, SmolLM2's shape, the pipeline."""
    few, some, rows = (96, 16, 256) if not full else (500, 96, 5000)
    large = write_smollm2_shape(folder / "smollm2")
    minilm = [
        Side(OURS, "encode:ours", {"base": "", "precision": "fp32", "count": few}),
        Side(f"{_PEER} fp32", "encode:peer", {"base": "", "precision": "fp32", "count": few}),
        Side(f"{_PEER} bf16", "encode:peer", {"base": "", "precision": "bf16", "count": few}),
        Side("transformers, bare loop", "encode:loop", {"count": few}),
    ]
    if importlib.util.find_spec("optimum"):  # OpenVINO int8 and ONNX, where they install
        given = {"base": "", "precision": "openvino", "count": few}
        minilm.append(Side(f"{_PEER} OpenVINO", "encode:peer", given))
    found = [Contest("encode MiniLM", "passage", few, tuple(minilm), 1.0, tolerance=0.03)]
    for precision in ("fp32", "bf16"):
        given = {"base": large, "precision": precision, "count": some}
        sides = Side(OURS, "encode:ours", given), Side(f"{_PEER} {precision}", "encode:peer", given)
        name = f"encode SmolLM2 shape {precision}"
        found.append(Contest(name, "passage", some, sides, 1.2, tolerance=0.03))
    given = {"count": rows}
    sides = Side(OURS, "encode:pipeline", given), Side("bare loop", "encode:pipeline_loop", given)
    found.append(Contest("encode pipeline", "passage", rows, sides, 0.95))
    return found


def ours(base: str, precision: str, count: int) -> Callable[[], Measured]:
    """Our encoder: MiniLM, or a base in a folder."""
    texts, folder = mixed_lengths(count), tempfile.mkdtemp(prefix="invar-bench-")
    config = Config()
    if base:
        from invar_ray.models.base import resolve_base

        model = ModelConfig(base=base, pooling="mean", query_prefix="", passage_prefix="")
        spec = llm_spec(model, resolve_base(model, None))
    else:
        spec = coarse_spec(config.coarse)
    encoder = open_encoder(spec, Store(folder), precision=precision)
    pairs = [("", text) for text in texts]
    return lambda: Measured(proof=_proof(encoder.encode_passages(pairs)))


def peer(base: str, precision: str, count: int) -> Callable[[], Measured]:
    """sentence-transformers' ``encode``, which sorts its input by length."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    from invar_ray.models.tiny import minilm_folder

    texts = mixed_lengths(count)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    given: dict[str, Any] = {"dtype": dtype}
    if base:
        defaults = ModelConfig()
        transformer = Transformer(
            base, model_kwargs=given, max_seq_length=defaults.passage_max_tokens
        )
        width = transformer.get_embedding_dimension()
        modules = [transformer, Pooling(width, "mean"), Normalize()]
        model = SentenceTransformer(modules=modules, device="cpu")
        end = model.tokenizer.eos_token  # as ours ends its passages
        texts = [f"{text}{end}" for text in texts]
    elif precision == "openvino":
        model = SentenceTransformer(str(minilm_folder()), device="cpu", backend="openvino")
    else:
        model = SentenceTransformer(str(minilm_folder()), device="cpu", model_kwargs=given)
    return lambda: Measured(proof=_proof(np.asarray(model.encode(texts, batch_size=BATCH))))


@torch.inference_mode()
def _states(model: Any, tokenizer: Any, texts: list[str]) -> np.ndarray:
    given = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
    hidden, mask = model(**given).last_hidden_state, given["attention_mask"][..., None]
    pooled = (hidden * mask).sum(1) / mask.sum(1)
    found: np.ndarray = torch.nn.functional.normalize(pooled, dim=-1).numpy()
    return found


def loop(count: int) -> Callable[[], Measured]:
    """The loop of the model's card: batches in arrival order, mean of the states."""
    from transformers import AutoModel, AutoTokenizer

    from invar_ray.models.tiny import minilm_folder

    texts = mixed_lengths(count)
    tokenizer = AutoTokenizer.from_pretrained(str(minilm_folder()))
    model = AutoModel.from_pretrained(str(minilm_folder()), dtype=torch.float32).eval()

    def work() -> Measured:
        parts = [_states(model, tokenizer, texts[at : at + BATCH]) for at in range(0, count, BATCH)]
        return Measured(proof=_proof(np.concatenate(parts)))

    return work


def _proof(vectors: np.ndarray) -> list[float]:
    """The first values of the first vector and of the mean vector."""
    return [*vectors[0, :4].tolist(), *vectors.mean(axis=0)[:4].tolist()]


def pipeline(count: int) -> Callable[[], Measured]:
    """Shards embedded by an actor of a local Ray and written; its start (Ray, imports, weights) is
    noted apart.  The clock counts from the first finished shard to the last, stretched to all.
    """
    from invar_ray.pipeline import Pipeline

    texts = mixed_lengths(count)

    def work() -> Measured:
        with tempfile.TemporaryDirectory(prefix="invar-bench-", dir="/tmp") as folder:
            with Pipeline(_config(Path(folder), texts), quiet=True) as made:
                vectors = made.reindexed[0].parent("vectors")
            entries = [
                (path.stat().st_mtime, json.loads(path.read_text())["rows"])
                for path in vectors.path("shards").glob("*.json")
            ]
            usage = vectors.info["usage"]["cpu_s"]
        entries.sort()
        counted = sum(rows for _, rows in entries[1:])
        clock = (entries[-1][0] - entries[0][0]) * count / counted
        cpu = usage["encode"] + usage["driver"]
        return Measured(clock=clock, cpu=cpu, notes={"start-up, CPU s": usage["start"]})

    return work


def pipeline_loop(count: int) -> Callable[[], Measured]:
    """The same encoder over the same shards in this process, nothing written."""
    texts = mixed_lengths(count)
    config = load_config("tiny")
    encoder: Any = open_encoder(coarse_spec(config.coarse), Store(tempfile.mkdtemp()))
    encoder.tokens_per_batch = config.scale.embed_tokens_per_batch
    pairs = [("", text) for text in texts]

    def work() -> Measured:
        clock, cpu = time.perf_counter(), time.process_time()
        for start in range(0, count, SHARD_ROWS):
            encoder.encode_passages(pairs[start : start + SHARD_ROWS])
        return Measured(time.perf_counter() - clock, time.process_time() - cpu)

    return work


def _config(folder: Path, texts: list[str]) -> Config:
    rows = [{"id": f"t{at}", "title": "", "text": text} for at, text in enumerate(texts)]
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_config(
        "tiny",
        [
            f"storage.root_uri={folder}/store",
            f"corpus.uri={corpus}",
            "corpus.chunk_tokens=512",
            "corpus.chunk_stride=512",
            "index.encoder=minilm",
            f"scale.shard_rows={SHARD_ROWS}",
            "scale.embed_workers=1",
            "scale.cpus_per_worker=1",
        ],
    )
