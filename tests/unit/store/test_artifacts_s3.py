"""The store on an object store: a local S3 server, reached over HTTP through pyarrow as a real one
would be.
"""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from invar_ray.errors import (
    ArtifactError,
    CorruptArtifactError,
    IncompleteArtifactError,
    MissingArtifactError,
)
from invar_ray.store.artifacts import MANIFEST, Artifact, Building, Plan, Store, open_artifact
from tests.unit.conftest import S3

PLAN = Plan("vectors", "demo", {"encoder": "abc"})


@pytest.fixture
def store(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: Any) -> Store:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    place = request.node.name
    return Store(s3(f"{place}/runs"))


def fill(building: Building) -> None:
    (building.path / "deep").mkdir()
    (building.path / "deep" / "notes.txt").write_text("hello", encoding="utf-8")
    (building.path / "shards").mkdir()
    (building.path / "shards" / "part-0.bin").write_bytes(b"\x00\x01" * 500)
    building.info["rows"] = 1000


def make(store: Store) -> Artifact:
    return store.get_or_build(PLAN, fill)[0]


def write(store: Store, artifact: Artifact, name: str, content: bytes) -> None:
    with store.filesystem.open_output_stream(f"{store.location(artifact.ref)}/{name}") as stream:
        stream.write(content)


def test_publish_find_open_verify_and_download(store: Store, tmp_path: Path) -> None:
    assert not store.is_local
    assert store.find(PLAN) is None
    with pytest.raises(MissingArtifactError, match="no artifact at s3://"):
        store.open(PLAN.ref)

    artifact = make(store)
    assert set(artifact.manifest.files) == {"deep/notes.txt", "shards/part-0.bin"}
    artifact.verify()
    found = store.find(PLAN)
    assert found is not None
    assert found.manifest == artifact.manifest
    assert store.get_or_build(PLAN, fill)[1]
    assert [item.ref for item in store.list("vectors")] == [artifact.ref]

    opened = open_artifact(artifact.uri, "vectors")
    assert "?endpoint_override=" in opened.uri
    folder = opened.path()
    assert folder.is_relative_to(tmp_path / "cache")
    assert (folder / "deep" / "notes.txt").read_text(encoding="utf-8") == "hello"
    assert (folder / "shards" / "part-0.bin").read_bytes() == b"\x00\x01" * 500
    assert opened.path("deep/notes.txt") == folder / "deep" / "notes.txt"
    left = {path.name for path in (tmp_path / "cache" / "invar_ray").iterdir()}
    assert left == {folder.name, ".locks"}, "no rests of downloads"


READ = """
import sys
from invar_ray.store.artifacts import open_artifact
artifact = open_artifact(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
artifact.verify_copy()
print(len(artifact.path("large.bin").read_bytes()))
"""
LARGE = 20_000_000


def test_four_processes_of_a_machine_read_an_artifact_once(store: Store, tmp_path: Path) -> None:
    def body(building: Building) -> None:
        (building.path / "large.bin").write_bytes(bytes(LARGE))

    made = store.get_or_build(PLAN, body)[0]
    uri, query = made.uri.split("?")
    found = re.search(r"127\.0\.0\.1(?::|%3A)(\d+)", query)
    assert found is not None
    with counting(int(found[1])) as (port, bytes_read):
        asked = f"{uri}?{query.replace(found[1], str(port))}"
        command = [sys.executable, "-c", READ, asked]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        readers = [subprocess.Popen(command, **pipes) for _ in range(4)]
        for reader in readers:
            assert reader.stdout.readline() == "ready\n"
        for reader in readers:
            reader.stdin.write("now\n")
            reader.stdin.flush()
        assert [reader.communicate(timeout=120)[0] for reader in readers] == [f"{LARGE}\n"] * 4
        assert LARGE < bytes_read() < 1.1 * LARGE


@contextlib.contextmanager
def counting(upstream: int) -> Iterator[tuple[int, Callable[[], int]]]:
    """A port before a server's, and how many bytes the server sent through it."""
    counts: list[int] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def copy(source: socket.socket, target: socket.socket, sent: list[int]) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                sent.append(len(data))
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(("127.0.0.1", upstream))
                for pair in ((client, server, []), (server, client, counts)):
                    threading.Thread(target=copy, args=pair, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield listener.getsockname()[1], lambda: sum(counts)
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def test_parent_is_found_below_the_same_root(store: Store) -> None:
    parent = make(store)
    child = store.get_or_build(Plan("index", "demo", {}, {"vectors": parent}), fill)[0]
    assert open_artifact(child.uri).parent("vectors").fingerprint == parent.fingerprint


def test_body_that_raises_publishes_nothing(store: Store) -> None:
    def body(building: Building) -> None:
        fill(building)
        raise RuntimeError("cut off")

    with pytest.raises(RuntimeError, match="cut off"):
        store.get_or_build(PLAN, body)
    assert store.find(PLAN) is None
    with pytest.raises(MissingArtifactError):
        store.open(PLAN.ref)
    artifact = make(store)
    assert set(artifact.manifest.files) == {"deep/notes.txt", "shards/part-0.bin"}
    artifact.verify()


def test_rest_of_a_run_that_was_cut_off_is_not_published(store: Store) -> None:
    with store.filesystem.open_output_stream(f"{store.location(PLAN.ref)}/stale.bin") as stream:
        stream.write(b"of an earlier try")
    assert set(make(store).manifest.files) == {"deep/notes.txt", "shards/part-0.bin"}


def test_damage_is_found_before_it_is_used(store: Store) -> None:
    artifact = make(store)
    write(store, artifact, "shards/part-0.bin", b"\x00\x02" * 500)
    with pytest.raises(CorruptArtifactError, match=r"shards/part-0\.bin differs"):
        artifact.verify()
    with pytest.raises(CorruptArtifactError, match=r"shards/part-0\.bin differs"):
        artifact.path()
    write(store, artifact, "shards/part-0.bin", b"short")
    with pytest.raises(CorruptArtifactError, match="has 5 bytes instead of 1000"):
        store.open(artifact.ref)


def test_deleted_manifest_makes_it_incomplete(store: Store) -> None:
    artifact = make(store)
    store.filesystem.delete_file(f"{store.location(artifact.ref)}/{MANIFEST}")
    with pytest.raises(IncompleteArtifactError):
        open_artifact(artifact.uri)


def test_bucket_that_is_not_there(s3: S3) -> None:
    store = Store(s3("runs", "nowhere"))
    with pytest.raises(ArtifactError, match="nowhere"):
        store.get_or_build(PLAN, lambda building: None)
