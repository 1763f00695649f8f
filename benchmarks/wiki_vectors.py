"""Vectors with real geometry in a minute of CPU: unit means of MiniLM's token embeddings over a
file of documents.

``python -m benchmarks.wiki_vectors CORPUS.jsonl.gz FOLDER [--rows 100000] [--queries 1000]`` writes
``vectors.npy`` (texts of documents) and ``queries.npy`` (the first 12 tokens of documents that are
not among them: short, like questions).
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path

import numpy as np

from invar_ray.models.tiny import minilm_embeddings, minilm_tokenizer

QUERY_TOKENS = 12
BATCH = 4096


def main() -> None:
    """Read, embed, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=1000)
    args = parser.parse_args()
    table = minilm_embeddings().numpy()
    tokenizer = minilm_tokenizer().backend_tokenizer
    texts = []
    with gzip.open(args.corpus, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            texts.append(f"{row['title']} {row['text']}")
    if len(texts) < args.rows + args.queries:
        raise SystemExit(
            f"{args.corpus} has {len(texts)} documents, fewer than {args.rows + args.queries}"
        )
    # Neighbours in the file are parts of one article: the order is shuffled, so that both sets
    # cover all of it.
    order = np.random.default_rng(0).permutation(len(texts))
    args.folder.mkdir(parents=True, exist_ok=True)
    chosen = [texts[number] for number in order[: args.rows]]
    asked = [texts[number] for number in order[args.rows : args.rows + args.queries]]
    np.save(args.folder / "vectors.npy", embed(chosen, table, tokenizer, 0))
    np.save(args.folder / "queries.npy", embed(asked, table, tokenizer, QUERY_TOKENS))


def embed(texts: list[str], table: np.ndarray, tokenizer: object, limit: int) -> np.ndarray:
    """[N, 384] unit rows: means over the tokens of each text, over the first ``limit`` where that
    is above 0.
    """
    out = np.empty((len(texts), table.shape[1]), dtype=np.float32)
    for start in range(0, len(texts), BATCH):
        batch = texts[start : start + BATCH]
        for at, encoding in enumerate(tokenizer.encode_batch(batch, add_special_tokens=False)):  # type: ignore[attr-defined]
            ids = encoding.ids[:limit] if limit else encoding.ids
            out[start + at] = table[ids or [0]].mean(axis=0)
    return out / np.linalg.norm(out, axis=1, keepdims=True)


if __name__ == "__main__":
    main()
