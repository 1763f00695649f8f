"""What an embedding run took: passages a second, padding, memory and CPU time of each process."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class _Process:
    rows: int = 0
    shards: int = 0
    cpu_s: float = 0.0
    start_cpu_s: float = 0.0
    peak_mb: float = 0.0


@dataclass
class Usage:
    """Sums up the rows that :class:`invar_ray.index.shards.EmbedShard` returns.

    Attributes:
        load_cpu_s: CPU seconds of this process for starting: Ray, or the encoder.
        driver_cpu_s: its CPU seconds for everything else but encoding.
        here_cpu_s: its CPU seconds for encoding, where it encoded itself.
    """

    load_cpu_s: float = 0.0
    driver_cpu_s: float = 0.0
    here_cpu_s: float = 0.0
    tokens: int = 0
    slots: int = 0
    halvings: int = 0
    processes: dict[str, _Process] = field(default_factory=dict)

    def add(self, row: dict[str, Any], *, here: bool = False) -> int:
        """Count a shard; returns its passages."""
        process = self.processes.setdefault(f"{row['node']}/{row['pid']}", _Process())
        process.rows += int(row["rows"]) * bool(row["made"])
        process.shards += bool(row["made"])
        process.cpu_s += float(row["cpu_s"])
        process.start_cpu_s = 0.0 if here else float(row["start_cpu_s"])
        process.peak_mb = max(process.peak_mb, float(row["peak_mb"]))
        self.here_cpu_s += float(row["cpu_s"]) * here
        self.tokens += int(row["tokens"])
        self.slots += int(row["slots"])
        self.halvings += int(row["halvings"])
        return int(row["rows"])

    @property
    def padding_share(self) -> float:
        """Share of the places in batches that held padding."""
        return 1.0 - self.tokens / self.slots if self.slots else 0.0

    def to_json(self) -> dict[str, Any]:
        """For the manifest."""
        encoding = sum(process.cpu_s for process in self.processes.values())
        starting = sum(process.start_cpu_s for process in self.processes.values())
        return {
            "padding_share": round(self.padding_share, 4),
            "tokens": self.tokens,
            "halvings": self.halvings,
            "cpu_s": {
                "start": round(self.load_cpu_s + starting, 2),
                "encode": round(encoding, 2),
                "driver": round(self.driver_cpu_s, 2),
            },
            "peak_mb": {name: process.peak_mb for name, process in self.processes.items()},
        }

    def table(self, seconds: float) -> list[str]:
        """Lines for people; none where nothing was embedded."""
        rows = sum(process.rows for process in self.processes.values())
        if not rows:
            return []
        lines = [
            f"{'process':<28}{'shards':>8}{'passages':>10}{'per CPU s':>11}{'peak memory':>13}"
        ]
        for name, process in self.processes.items():
            rate = process.rows / process.cpu_s if process.cpu_s else 0.0
            lines.append(
                f"{name[-28:]:<28}{process.shards:>8,}{process.rows:>10,}{rate:>11.1f}{process.peak_mb:>10,.0f} MB"  # noqa: E501
            )
        lines.append(
            f"{rows:,} passages in {seconds:.1f} s: {rows / seconds:.1f} a second, start-up "
            "included"
        )
        lines.append(
            f"{self.tokens:,} tokens, padding {self.padding_share:.1%} of the places in batches"
        )
        if self.halvings:
            lines.append(
                f"{self.halvings} batches did not fit into memory: set "
                "scale.embed_tokens_per_batch lower"
            )
        return lines
