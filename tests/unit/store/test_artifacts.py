"""What the store promises: names that follow content, publication all at once, and damage that is
found and named.
"""

from __future__ import annotations

import json
import pickle
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from invar_ray.errors import (
    ArtifactError,
    CorruptArtifactError,
    IncompleteArtifactError,
    MissingArtifactError,
)
from invar_ray.store.artifacts import (
    MANIFEST,
    Artifact,
    Building,
    Plan,
    Store,
    canonical_json,
    digest,
    join_uri,
    open_artifact,
)
from invar_ray.store.files import write_atomic
from invar_ray.store.manifest import SCHEMA_VERSION

PLAN = Plan("vectors", "demo", {"encoder": "abc", "num_probes": 4})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "runs"))


def fill(building: Building) -> None:
    (building.path / "shards").mkdir(exist_ok=True)
    (building.path / "shards" / "part-0.bin").write_bytes(b"\x00\x01" * 500)
    (building.path / "notes.txt").write_text("hello", encoding="utf-8")
    building.info["rows"] = 1000


def make(store: Store, plan: Plan = PLAN, body: Callable[[Building], None] = fill) -> Artifact:
    return store.get_or_build(plan, body)[0]


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


# Names


def test_canonical_json_is_one_text_for_equal_values() -> None:
    assert canonical_json({"b": (1, 2), "a": None}) == '{"a":null,"b":[1,2]}'
    assert digest({"b": 1, "a": 2}) == digest({"a": 2, "b": 1})
    assert len(digest({})) == 16


def test_fingerprint_changes_with_everything_but_the_name(store: Store) -> None:
    parent, other = (
        make(store, Plan("passages", "p", {"x": 1})),
        make(store, Plan("passages", "p", {"x": 2})),
    )
    plan = replace(PLAN, parents={"passages": parent})
    changed = [
        replace(plan, kind="index"),
        replace(plan, config={**PLAN.config, "num_probes": 5}),
        replace(plan, config={**PLAN.config, "more": None}),
        replace(plan, parents={}),
        replace(plan, parents={"passages": other}),
        replace(plan, parents={"corpus": parent}),
        replace(plan, parents={"passages": parent, "other": other}),
        replace(plan, version=2),
    ]
    fingerprints = [plan.fingerprint, *(item.fingerprint for item in changed)]
    assert len(set(fingerprints)) == len(fingerprints)
    renamed = replace(plan, name="another")
    assert renamed.fingerprint == plan.fingerprint
    assert renamed.ref == f"vectors/another-{plan.fingerprint}"


def test_fingerprint_is_stable_over_releases() -> None:
    # Recorded: a change here would orphan every stored artifact.
    assert PLAN.fingerprint == "3ac87c9be518b2c0"


def test_fingerprint_ignores_the_order_of_settings() -> None:
    assert replace(PLAN, config={"num_probes": 4, "encoder": "abc"}).fingerprint == PLAN.fingerprint


# Publishing


def test_published_artifact_holds_files_info_and_parents(store: Store) -> None:
    parent = make(store, Plan("passages", "p", {}))
    artifact = make(store, replace(PLAN, parents={"passages": parent}, version=3))
    opened = store.open(artifact.ref)
    assert opened.manifest == artifact.manifest
    assert opened.path("notes.txt").read_text(encoding="utf-8") == "hello"
    assert opened.info == {"rows": 1000}
    assert opened.manifest.config == {"encoder": "abc", "num_probes": 4}
    assert opened.manifest.version == 3
    assert opened.parent("passages").fingerprint == parent.fingerprint
    assert set(opened.manifest.files) == {"notes.txt", "shards/part-0.bin"}
    assert opened.manifest.files["shards/part-0.bin"]["bytes"] == 1000
    opened.verify()
    assert entries(Path(store.root) / ".staging") == []


def test_unknown_parent_is_named(store: Store) -> None:
    artifact = make(
        store, replace(PLAN, parents={"passages": make(store, Plan("passages", "p", {}))})
    )
    with pytest.raises(
        MissingArtifactError, match=r"records no parent 'adapter'.*Expected: one of passages"
    ):
        artifact.parent("adapter")


def test_second_call_reuses_what_stands(store: Store) -> None:
    calls: list[int] = []

    def body(building: Building) -> None:
        calls.append(1)
        fill(building)

    first, reused = store.get_or_build(PLAN, body)
    second, reused_again = store.get_or_build(PLAN, body)
    assert (reused, reused_again, len(calls)) == (False, True, 1)
    assert second.manifest == first.manifest
    assert store.find(PLAN) is not None
    assert store.find(replace(PLAN, version=2)) is None


def fail_half_way(building: Building) -> None:
    (building.path / "half.bin").write_bytes(b"half")
    raise RuntimeError("cut off")


def test_body_that_raises_leaves_nothing(store: Store) -> None:
    with pytest.raises(RuntimeError, match="cut off"):
        make(store, PLAN, fail_half_way)
    assert store.find(PLAN) is None
    assert [path for path in Path(store.root).rglob("*") if path.is_file()] == []
    assert entries(Path(store.root) / ".staging") == []


KILLED = """
import os, signal, sys
from invar_ray.store.artifacts import Plan, Store

def body(building):
    (building.path / "half.bin").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)

Store(sys.argv[1]).get_or_build(Plan("index", "small", {}), body)
"""


def test_what_a_killed_writer_left_is_removed_and_a_living_one_stays(store: Store) -> None:
    plan, staging = Plan("index", "small", {}), Path(store.root) / ".staging"
    subprocess.run([sys.executable, "-c", KILLED, store.root], check=False)
    [dead] = entries(staging)
    elsewhere = dead.replace(platform.node(), "another-machine")
    (staging / elsewhere).mkdir()
    (Path(store.root) / ".locks" / f"staging-{elsewhere}").touch()
    with store.build(plan) as living:
        assert set(entries(staging)) == {living.path.name, elsewhere}
        with store.build(plan) as other:
            fill(other)
            assert living.path.exists()
        fill(living)
    assert store.find(plan) is not None
    assert entries(staging) == [elsewhere], "its writer may be alive"
    left = [path.name for path in (Path(store.root) / ".locks").glob("staging-*")]
    assert left == [f"staging-{elsewhere}"]


def test_resumable_body_that_raises_leaves_its_staging_for_the_next_run(store: Store) -> None:
    with pytest.raises(RuntimeError, match="cut off"):
        store.get_or_build(PLAN, fail_half_way, resumable=True)
    assert store.find(PLAN) is None
    assert not Path(store.location(PLAN.ref)).exists()

    def resume(building: Building) -> None:
        assert (building.path / "half.bin").read_bytes() == b"half"
        (building.path / "other.bin").write_bytes(b"other")

    artifact, reused = store.get_or_build(PLAN, resume, resumable=True)
    assert not reused
    assert set(artifact.manifest.files) == {"half.bin", "other.bin"}
    assert entries(Path(store.root) / ".staging") == []


def test_reader_never_sees_a_folder_without_its_manifest(store: Store) -> None:
    plans = [replace(PLAN, config={"number": number}) for number in range(12)]
    folders = [Path(store.location(plan.ref)) for plan in plans]
    stop, faults, seen = threading.Event(), [], set()

    def read() -> None:
        while not stop.is_set():
            for plan, folder in zip(plans, folders, strict=True):
                if folder.exists():
                    seen.add(plan.ref)
                    try:
                        store.open(plan.ref).verify()
                    except ArtifactError as error:
                        faults.append(str(error))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for plan in plans:
            make(store, plan)
    finally:
        stop.set()
        reader.join()
    assert not faults
    assert seen


def write_together(store: Store, plan: Plan) -> list[Any]:
    """Two writers that leave their bodies at the same time; what each ended with."""
    barrier = threading.Barrier(2, timeout=20)
    results: list[Any] = []

    def body(building: Building) -> None:
        barrier.wait()
        write_atomic(building.path / "shards" / "part-0.bin", b"\x00\x01" * 500)
        write_atomic(building.path / "notes.txt", b"hello")
        barrier.wait()

    def write() -> None:
        try:
            results.append(store.get_or_build(plan, body)[0])
        except Exception as error:
            results.append(error)

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    return results


def test_two_writers_of_one_plan_end_well_with_one_result(store: Store) -> None:
    for number in range(8):
        plan = replace(PLAN, config={"number": number})
        results = write_together(store, plan)
        assert [type(result) for result in results] == [Artifact, Artifact], results
        assert set(results[0].manifest.files) == {"notes.txt", "shards/part-0.bin"}
        assert results[0].manifest.files == results[1].manifest.files
        store.open(plan.ref).verify()
    assert entries(Path(store.root) / "vectors") == sorted(
        Path(replace(PLAN, config={"number": number}).ref).name for number in range(8)
    )
    assert entries(Path(store.root) / ".staging") == []


def test_second_writer_of_a_resumable_plan_waits_and_takes_the_result(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    inside, made = threading.Event(), []
    results: list[tuple[Artifact, bool]] = []

    def body(building: Building) -> None:
        made.append(building)
        inside.set()
        time.sleep(0.5)
        write_atomic(building.path / "notes.txt", b"hello")

    first = threading.Thread(
        target=lambda: results.append(store.get_or_build(PLAN, body, resumable=True))
    )
    first.start()
    assert inside.wait(10)
    artifact, reused = store.get_or_build(PLAN, body, resumable=True)
    first.join()
    assert len(made) == 1
    assert reused
    assert [item.ref for item, _ in results] == [artifact.ref]
    assert f"another run is making {PLAN.ref}: waiting" in capsys.readouterr().err
    artifact.verify()


def test_file_that_another_writer_has_not_finished_is_not_published(store: Store) -> None:
    """In a shared staging folder ``write_atomic`` of the slower writer has its temporary file
    beside the whole ones.
    """

    def body(building: Building) -> None:
        write_atomic(building.path / "shards" / "part-0.bin", b"whole")
        (building.path / "shards" / ".part-1.bin.1a2b3c4d").write_bytes(b"ha")

    artifact = store.get_or_build(PLAN, body, resumable=True)[0]
    assert set(artifact.manifest.files) == {"shards/part-0.bin"}


# Damage


def test_folder_without_manifest_is_refused_and_set_aside_by_a_new_run(store: Store) -> None:
    folder = Path(store.location(PLAN.ref))
    folder.mkdir(parents=True)
    (folder / "part.bin").write_bytes(b"precious")
    with pytest.raises(IncompleteArtifactError) as caught:
        store.open(PLAN.ref)
    assert str(caught.value) == (
        f"{folder} has no manifest.json: it is incomplete, whatever wrote it was cut off. "
        "To do: run the step again; it sets the incomplete folder aside."
    )
    assert store.find(PLAN) is None

    artifact = make(store)
    artifact.verify()
    assert "part.bin" not in artifact.manifest.files
    (aside,) = (Path(store.root) / ".incomplete").iterdir()
    assert (aside / "part.bin").read_bytes() == b"precious"


def test_deleted_manifest_makes_an_artifact_incomplete(store: Store) -> None:
    artifact = make(store)
    artifact.path(MANIFEST).unlink()
    with pytest.raises(IncompleteArtifactError, match=r"has no manifest\.json"):
        open_artifact(artifact.uri)
    again, reused = store.get_or_build(PLAN, fill)
    assert not reused
    again.verify()


def test_nothing_there_is_missing_not_incomplete(store: Store) -> None:
    with pytest.raises(MissingArtifactError, match="no artifact at") as caught:
        store.open(PLAN.ref)
    assert "run the step that makes it" in str(caught.value)


def test_corrupt_content_of_equal_size_is_found_by_verify(store: Store) -> None:
    artifact = make(store)
    shard = artifact.path("shards/part-0.bin")
    content = bytearray(shard.read_bytes())
    content[500] ^= 1
    shard.write_bytes(content)
    store.open(artifact.ref)  # sizes are right
    with pytest.raises(
        CorruptArtifactError, match=r"shards/part-0\.bin differs from its recorded sha256"
    ) as caught:
        artifact.verify()
    assert "notes.txt" not in str(caught.value)
    assert "delete that folder and run the step that makes it (kind 'vectors') again" in str(
        caught.value
    )


def test_changed_size_is_found_on_opening(store: Store) -> None:
    artifact = make(store)
    artifact.path("notes.txt").write_text("hello!", encoding="utf-8")
    with pytest.raises(CorruptArtifactError, match=r"notes\.txt has 6 bytes instead of 5"):
        store.open(artifact.ref)
    with pytest.raises(CorruptArtifactError, match=r"notes\.txt"):
        store.find(PLAN)


def test_missing_file_is_found_on_opening(store: Store) -> None:
    artifact = make(store)
    artifact.path("shards/part-0.bin").unlink()
    with pytest.raises(CorruptArtifactError, match=r"shards/part-0\.bin is missing"):
        store.open(artifact.ref)


def test_many_faults_are_counted(store: Store) -> None:
    def body(building: Building) -> None:
        for number in range(8):
            (building.path / f"file-{number}").write_bytes(b"x")

    artifact = make(store, PLAN, body)
    for number in range(8):
        artifact.path(f"file-{number}").unlink()
    with pytest.raises(
        CorruptArtifactError, match=r"file-0 is missing; .*file-4 is missing; and 3 more"
    ):
        artifact.verify()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"schema_version": 1}', '{"schema_version": "x"}']
)
def test_manifest_that_is_none_is_corrupt(store: Store, text: str) -> None:
    artifact = make(store)
    artifact.path(MANIFEST).write_text(text, encoding="utf-8")
    with pytest.raises(CorruptArtifactError, match=r"manifest\.json is not a manifest"):
        store.open(artifact.ref)


def edit_manifest(artifact: Artifact, **values: Any) -> None:
    path = artifact.path(MANIFEST)
    path.write_text(
        json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8"
    )


def test_manifest_of_a_newer_release_is_refused(store: Store) -> None:
    artifact = make(store)
    edit_manifest(artifact, schema_version=SCHEMA_VERSION + 1, colour="blue")
    with pytest.raises(
        ArtifactError, match=f"manifest has schema version {SCHEMA_VERSION + 1}"
    ) as caught:
        store.open(artifact.ref)
    assert type(caught.value) is ArtifactError
    assert "use the invar_ray release that wrote it, or a newer one" in str(caught.value)


def test_manifest_of_an_older_release_is_refused(store: Store) -> None:
    artifact = make(store)
    edit_manifest(artifact, schema_version=SCHEMA_VERSION - 1)
    with pytest.raises(
        ArtifactError, match=f"schema version {SCHEMA_VERSION - 1}.*Expected: {SCHEMA_VERSION}"
    ) as caught:
        store.open(artifact.ref)
    assert type(caught.value) is ArtifactError
    assert "run the step again" in str(caught.value)


# Opening


def test_open_by_uri_gives_the_same_artifact(store: Store, tmp_path: Path) -> None:
    artifact = make(store)
    for uri in (
        artifact.uri,
        f"{artifact.uri}/",
        f"file://{artifact.path()}",
        str(artifact.path()),
    ):
        opened = open_artifact(uri, "vectors")
        assert opened.fingerprint == artifact.fingerprint
        assert opened.path("notes.txt").read_text(encoding="utf-8") == "hello"
        opened.verify()


def test_open_by_relative_path(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = make(store)
    monkeypatch.chdir(tmp_path)
    assert open_artifact(f"runs/{artifact.ref}").uri == artifact.uri
    assert Store("runs").root_uri == store.root_uri


def test_wrong_kind_is_refused(store: Store) -> None:
    artifact = make(store)
    with pytest.raises(
        ArtifactError, match=r"is an artifact of kind 'vectors'.*Expected: kind 'index'"
    ):
        open_artifact(artifact.uri, "index")


@pytest.mark.parametrize("uri", ["/", "/folder", "s3://bucket"])
def test_uri_that_cannot_be_an_artifact(uri: str) -> None:
    with pytest.raises(ArtifactError):
        open_artifact(uri)


def test_unknown_scheme_is_refused() -> None:
    with pytest.raises(
        ArtifactError, match=r"cannot open 'carrier-pigeon://x/y'.*Expected: a local path"
    ):
        Store("carrier-pigeon://x/y")


def test_list_gives_what_is_published(store: Store) -> None:
    assert store.list("vectors") == []
    refs = {make(store, replace(PLAN, config={"number": number})).ref for number in range(3)}
    (Path(store.root) / "vectors" / "incomplete-0").mkdir()
    (Path(store.root) / "vectors" / "stray.txt").write_text("x", encoding="utf-8")
    assert {artifact.ref for artifact in store.list("vectors")} == refs


def test_list_is_oldest_first(store: Store) -> None:
    created = ["2026-01-03T00:00:00Z", "2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"]
    for number, when in enumerate(created):
        edit_manifest(make(store, replace(PLAN, config={"number": number})), created=when)
    assert [artifact.manifest.created for artifact in store.list("vectors")] == sorted(created)


def test_store_travels_to_workers(store: Store) -> None:
    artifact = make(store)
    copy = pickle.loads(pickle.dumps(artifact))
    assert copy.uri == artifact.uri
    copy.verify()


def test_moved_root_stays_usable(store: Store, tmp_path: Path) -> None:
    parent = make(store, Plan("passages", "p", {}))
    artifact = make(store, replace(PLAN, parents={"passages": parent}))
    shutil.move(store.root, tmp_path / "elsewhere")
    moved = open_artifact(str(tmp_path / "elsewhere" / artifact.ref))
    moved.verify()
    assert moved.parent("passages").fingerprint == parent.fingerprint


def test_join_uri_keeps_the_query_at_the_end() -> None:
    assert join_uri("/data/runs/", "index/a-1") == "/data/runs/index/a-1"
    assert (
        join_uri("s3://bucket/runs?scheme=http", "index/a-1")
        == "s3://bucket/runs/index/a-1?scheme=http"
    )


def test_write_atomic_replaces_whole_files(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "file.json"
    write_atomic(target, b"one")
    write_atomic(target, b"two")
    assert target.read_bytes() == b"two"
    assert entries(target.parent) == ["file.json"]


def test_newest_is_what_was_made_last_though_a_clock_was_ahead(store: Store) -> None:
    first = make(store)
    place = first.path(MANIFEST)
    manifest = json.loads(place.read_text())
    place.write_text(json.dumps({**manifest, "created": "2199-01-01T00:00:00.000000Z"}))
    second = make(store, replace(PLAN, name="later"))
    third = make(store, replace(PLAN, name="last"))
    newest = store.newest("vectors")
    assert newest is not None
    assert newest.ref == third.ref
    assert [each.ref for each in store.list("vectors")] == [first.ref, second.ref, third.ref]
