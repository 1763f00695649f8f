"""Probes of an index: texts with the vectors that its own encoder gave them; no other encoder
reproduces them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from invar_ray.errors import MixedArtifactsError
from invar_ray.index.blocks import Vectors, column_to_matrix
from invar_ray.models.batching import refuse_not_finite
from invar_ray.models.encoder import EncoderSpec, TextEncoder
from invar_ray.schema import vector_schema
from invar_ray.store.artifacts import Artifact

NUM_PROBES = 64
"""Texts that are stored with an index, or all where it has fewer."""
PROBE_TOLERANCE = 1e-3
"""A probe's cosine with its stored vector must be at least 1 minus this, in the precision that the
index was made in: other batch shapes and devices stay well within, the other precision may not (30
layers: 1.3e-3).
"""


def write_probes(path: Path, texts: Sequence[tuple[str, str]], matrix: Vectors) -> None:
    """Store (title, text) probes with their vectors, [N, D] float32 of length 1.

    Raises:
        ModelError: a vector is not finite.
    """
    refuse_not_finite(matrix, [f"the probe {title or text[:60]!r}" for title, text in texts])
    kind = vector_schema(matrix.shape[1]).field("vector").type
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1)), type=kind)
    titles, bodies = [title for title, _ in texts], [text for _, text in texts]
    pq.write_table(pa.table({"title": titles, "text": bodies, "vector": vectors}), path)


def check_probes(artifact: Artifact, encoder: TextEncoder, *, most: int = NUM_PROBES) -> float:
    """Encode the probes again and compare.

    Args:
        artifact: the index.
        encoder: should be its own.
        most: at most so many of them, spread evenly.

    Returns:
        The lowest cosine between a probe's vector and its stored one.

    Raises:
        MixedArtifactsError: if the encoder does not reproduce them.
    """
    table = pq.read_table(artifact.path("probes.parquet"))
    step = -(-table.num_rows // most)
    stored = column_to_matrix(table.column("vector"))[::step]
    texts = list(
        zip(table.column("title").to_pylist(), table.column("text").to_pylist(), strict=True)
    )[::step]
    made_by = EncoderSpec.from_json(artifact.info["encoder"]).fingerprint
    if encoder.dimension != stored.shape[1]:
        lowest = -1.0
    else:
        lowest = float((encoder.encode_passages(texts) * stored).sum(axis=1).min())
    if not lowest >= 1.0 - PROBE_TOLERANCE:  # NaN too
        raise MixedArtifactsError(
            f"encoder {encoder.fingerprint} does not reproduce the probe vectors of "
            f"{artifact.uri}, which encoder "
            f"{made_by} made (lowest cosine {lowest:.4f})",
            expected=f"cosines of at least {1.0 - PROBE_TOLERANCE}",
            action="serve the index with its own encoder, or reindex with this one (python -m "
            "jobs.reindex)",
        )
    return lowest
