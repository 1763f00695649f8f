"""Vectors of all shards to the ``centroids`` that their indexes share: trained once, on a sample of
all.

They stand until the shards' size asks for another number of lists, so that a shard whose passages
did not change keeps its index: of a corpus that changed they are still the old sample's. Another
corpus gets its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from invar_ray.index.blocks import Vectors, vector_blocks
from invar_ray.index.faiss_index import centroids_of, new_index, train
from invar_ray.index.planner import POINTS_PER_LIST
from invar_ray.models.precision import made_in
from invar_ray.store.artifacts import Artifact, Building, Plan, Store, digest

VERSION = 1
_FILE = "centroids.npy"
_SEED = 0


def plan(vectors: Sequence[Artifact], name: str, factory: str, lists: int) -> Plan:
    """The centroids of these vectors, for indexes of this type and so many lists."""
    # Named by fingerprints and not as parents: who gives up old vectors need not keep them for the
    # sake of a sample that was taken of them once.
    return Plan(
        kind="centroids",
        name=name,
        config=_settings(vectors[0], factory, lists)
        | {"vectors": digest([artifact.fingerprint for artifact in vectors])},
        parents={},
        version=VERSION,
    )


def standing(
    store: Store, vectors: Artifact, name: str, factory: str, lists: int
) -> Artifact | None:
    """The newest centroids that an index of these vectors can take, of whatever sample."""
    wanted = _settings(vectors, factory, lists)

    def fits(artifact: Artifact) -> bool:
        manifest = artifact.manifest
        same = all(manifest.config.get(key) == value for key, value in wanted.items())
        return same and (manifest.name, manifest.version) == (name, VERSION)

    return store.newest("centroids", fits)


def build(building: Building, vectors: Sequence[Artifact]) -> None:
    """Train them on a random sample, from each shard by its rows.

    Args:
        building: gets ``centroids.npy``: [L, D] float32.
        vectors: of all shards.
    """
    settings = building.plan.config
    factory, lists = settings["factory"], settings["lists"]
    sources = [vector_blocks(artifact) for artifact in vectors]
    rows = sum(source.rows for source in sources)
    share = min(1.0, POINTS_PER_LIST * lists / rows)
    parts = [source.sample(round(share * source.rows), _SEED)[0] for source in sources]
    sample = np.concatenate([part for part in parts if len(part)])
    index = new_index(sample.shape[1], factory, rows)
    train(index, sample, factory)
    np.save(building.path / _FILE, centroids_of(index), allow_pickle=False)
    building.info |= {"rows": rows, "sample": len(sample), "dimension": sample.shape[1]}


def load_centroids(artifact: Artifact) -> Vectors:
    """[L, D] centroids.

    Raises:
        CorruptArtifactError: the file is not the one that was written.
    """
    artifact.verify_copy()
    return np.asarray(np.load(artifact.path(_FILE), allow_pickle=False), dtype=np.float32)


def _settings(vectors: Artifact, factory: str, lists: int) -> dict[str, object]:
    return {
        "corpus": vectors.parent("passages").info["source"],
        "encoder": vectors.manifest.config["encoder"],
        "precision": made_in(vectors),
        "factory": factory.partition(",")[0] + ",Flat",  # codes are each index's own
        "lists": lists,
    }
