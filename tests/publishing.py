"""Publishers and readers as processes: ``python -m tests.publishing ROLE ROOT ..``; see
test_published.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from invar_ray.errors import ConflictError
from invar_ray.store.artifacts import Artifact, Building, Plan, Store
from invar_ray.store.published import Published

SHARDS = 3


def make_index(
    store: Store, generation: int, shard: int = 0, encoder: str = "e", **info: object
) -> Artifact:
    """An index artifact that says which generation and shard it is of."""

    def fill(building: Building) -> None:
        (building.path / "index.faiss").write_text(f"{generation}/{shard}")
        building.info |= {"encoder": {"name": encoder}, "rows": 10 + shard, **info}

    return store.get_or_build(
        Plan("index", "retriever", {"generation": generation, "shard": shard}), fill
    )[0]


def make_generation(store: Store, generation: int) -> list[Artifact]:
    return [make_index(store, generation, shard) for shard in range(SHARDS)]


def wait_to_go() -> None:
    """Say that this process is ready, and wait for the file ``GO``: all begin together, however
    long a loaded machine takes to start them.
    """
    place = Path(os.environ["GO"])
    print("ready", flush=True)
    deadline = time.monotonic() + 240
    while not place.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(str(place))
        time.sleep(0.001)


def publish_once(root: str, generation: int, expected: str) -> None:
    """Publish when all go; prints the number, or the error."""
    store = Store(root)
    indexes, published = make_generation(store, generation), Published(store)
    wait_to_go()
    try:
        number = published.publish(
            indexes, expected=None if expected == "none" else int(expected)
        ).number
        print(json.dumps({"won": number}), flush=True)
    except ConflictError as error:
        print(json.dumps({"lost": str(error)}), flush=True)


def publish_on(root: str, first: int, count: int) -> None:
    """Publish ``count`` generations, again and again until each has won a number."""
    store, lost = Store(root), 0
    wait_to_go()
    for generation in range(first, first + count):
        indexes, published = make_generation(store, generation), Published(store)
        while True:
            try:
                published.publish(indexes, verify=False)
                break
            except ConflictError:
                lost += 1
    print(json.dumps({"published": count, "lost": lost}), flush=True)


def read_on(root: str, reads: int) -> None:
    """Read the current version and the pointer file ``reads`` times; prints what was wrong, and how
    many were seen.
    """
    store = Store(root)
    published, pointer = Published(store), Path(root) / "published/main/CURRENT"
    seen, wrong, last = set(), [], 0
    wait_to_go()
    for _ in range(reads):
        version = published.current()
        assert version is not None
        texts = [Path(uri, "index.faiss").read_text() for uri in published.uris(version)]
        lines = [line for line in pointer.read_text().splitlines() if not line.startswith("#")]
        pointed = [Path(line, "index.faiss").read_text() for line in lines]
        for found in (texts, pointed):
            generations = {text.partition("/")[0] for text in found}
            if len(generations) != 1 or [text.partition("/")[2] for text in found] != [
                "0",
                "1",
                "2",
            ]:
                wrong.append(found)
        if version.number < last:
            wrong.append(["backwards", str(last), str(version.number)])
        last = version.number
        seen.add(version.number)
    print(json.dumps({"wrong": wrong[:5], "versions": len(seen), "last": last}), flush=True)


if __name__ == "__main__":
    role, root, *rest = sys.argv[1:]
    if role == "once":
        publish_once(root, int(rest[0]), rest[1])
    elif role == "publish":
        publish_on(root, int(rest[0]), int(rest[1]))
    else:
        read_on(root, int(rest[0]))
