"""The tables of docs/design/scale.md: shards, memory, nodes, hours and cost by the planner's
formulas; nothing is run.

``python -m benchmarks.scale_plan``.  Every figure that is not measured here is an assumption with a
name below.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from invar_ray.index.planner import Candidate, Need, candidates

# Assumed, November 2026.
TOKENS = 140  # of a passage of 100 words
GPU_FLOPS = 0.4 * 989e12  # an H100's dense bf16 peak by its maker, at 40 %
GPU_CAP = 5000.0  # passages a second that one GPU's CPUs can read, tokenise and write
GPU_DOLLARS, NODE_DOLLARS = 3.0, 4.0  # an hour; a node has 64 virtual cores and 512 GB
NODE_CORES, NODE_BYTES = 64, 512e9
# Of a node's memory: passages, page cache and the version that is being loaded take the rest.
USABLE = 0.75
STORAGE_DOLLARS = 0.023  # a GB and month
PASSAGE_BYTES = 400  # of compressed Parquet, text and titles
READ_PER_CORE = 650.0  # documents read and cut a second; measured, docs/log.md

MAX_LATENCY_MS, MAX_SHARD_BYTES = 50.0, 128e9
SIZES = {"21 M": 21_015_324, "1 B": 10**9, "100 B": 10**11}
# Dimensions, parameters that each token passes, and the name of such an encoder.
ENCODERS = {768: (86e6, "BERT-base"), 4096: (6.5e9, "LLaMA 7B")}


@dataclass(frozen=True)
class Layout:
    """Equal shards of one index type."""

    shards: int
    each: Candidate


def layout(rows: int, dimension: int, kind: str, bytes_per_part: int = 0) -> Layout:
    """The fewest shards of which each keeps to latency and memory."""
    shards = 1
    while True:
        each = math.ceil(rows / shards)
        fitting = [
            candidate
            for candidate in candidates(Need(each, dimension, max_latency_ms=MAX_LATENCY_MS))
            if candidate.kind == kind
            and (not bytes_per_part or f"PQ{bytes_per_part}x" in candidate.factory)
        ]
        chosen = fitting[0]
        if chosen.latency_ms <= MAX_LATENCY_MS and chosen.memory_bytes <= MAX_SHARD_BYTES:
            return Layout(shards, chosen)
        shards = shards + 1 if shards < 64 else math.ceil(shards * 1.02)


def encoding(rows: int, dimension: int) -> tuple[float, float]:
    """Passages a second of one GPU, and GPU hours."""
    parameters, _ = ENCODERS[dimension]
    rate = min(GPU_CAP, GPU_FLOPS / (2.0 * parameters * TOKENS))
    return rate, rows / rate / 3600


def main() -> None:
    """Print the tables as Markdown."""
    print(
        "| passages | D | cut, core h | encode, passages/s a GPU | GPU h | cost | vectors "
        "(float16) | a month |"
    )
    print("|" + " --- |" * 8)
    for name, rows in SIZES.items():
        for dimension in ENCODERS:
            rate, hours = encoding(rows, dimension)
            stored = rows * (2 * dimension + PASSAGE_BYTES)
            print(
                f"| {name} | {dimension} | {rows / READ_PER_CORE / 3600:,.0f} | {rate:,.0f} | "
                f"{hours:,.0f} | "
                f"${hours * GPU_DOLLARS:,.0f} | {size(rows * 2 * dimension)} | "
                f"${stored / 1e9 * STORAGE_DOLLARS:,.0f} |"
            )
    print()
    print(
        "| passages | D | index | shards | rows of each | memory | nodes | build, core h | cost ",
        end="",
    )
    print("| ms a shard | queries/s | serving |")
    print("|" + " --- |" * 12)
    for name, rows in SIZES.items():
        for dimension in ENCODERS:
            for kind, code in (("IVF-SQ8", 0), ("IVF-PQ", dimension // 8)):
                found = layout(rows, dimension, kind, code)
                memory = found.shards * found.each.memory_bytes
                nodes = max(1, math.ceil(memory / (USABLE * NODE_BYTES)))
                hours = found.shards * found.each.build_seconds / 3600
                print(
                    f"| {name} | {dimension} | {kind}{f', {code} B' if code else ''} | "
                    f"{found.shards:,} | "
                    f"{math.ceil(rows / found.shards) / 1e6:,.1f} M | {size(memory)} | {nodes:,} | "
                    f"{hours:,.0f} | "
                    f"${hours / NODE_CORES * NODE_DOLLARS:,.0f} | {found.each.latency_ms:.0f} | "
                    f"{nodes * NODE_CORES * 1e3 / (found.shards * found.each.latency_ms):,.0f} | "
                    f"${nodes * NODE_DOLLARS * 730:,.0f}/month |"
                )


def size(number: float) -> str:
    """Bytes for people."""
    return f"{number / 1e12:,.1f} TB" if number >= 1e12 else f"{number / 1e9:,.0f} GB"


if __name__ == "__main__":
    main()
