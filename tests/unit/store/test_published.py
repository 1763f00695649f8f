"""Published versions: what is current, going back, two writers at once, and what may be removed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from invar_ray.errors import (
    ArtifactError,
    ConflictError,
    CorruptArtifactError,
    IncompleteArtifactError,
    MissingArtifactError,
    MixedArtifactsError,
)
from invar_ray.store.artifacts import Building, Plan, Store
from invar_ray.store.conditional import create_if_absent, replace
from invar_ray.store.garbage import collect
from invar_ray.store.published import Published, open_published
from serve.versions import Current
from tests.publishing import make_generation, make_index


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "runs"))


@pytest.fixture
def published(store: Store) -> Published:
    return Published(store)


def numbers(published: Published) -> list[tuple[int, str, int]]:
    return [(version.number, version.action, version.source) for version in published.history()]


# One writer


def test_nothing_published(published: Published) -> None:
    assert published.current() is None
    assert published.history() == []
    for read in (published.open, published.uris, published.rollback):
        with pytest.raises(MissingArtifactError, match="nothing has been published"):
            read()


def test_publish_read_and_open(store: Store, published: Published) -> None:
    first, second = make_generation(store, 1), make_generation(store, 2)
    version = published.publish(first, note="nightly")
    assert (version.number, version.action, version.source, version.note) == (
        1,
        "publish",
        1,
        "nightly",
    )
    assert version.info["rows"] == 10 + 11 + 12
    published.publish(second)
    assert published.current() == published.read(2)
    assert published.uris() == tuple(artifact.uri for artifact in second)
    assert [artifact.ref for artifact in published.open()] == [artifact.ref for artifact in second]
    assert [artifact.ref for artifact in published.open(published.read(1))] == [
        artifact.ref for artifact in first
    ]
    lines = (Path(store.root) / "published/main/CURRENT").read_text().splitlines()
    assert lines[0].startswith("# version 2 of main")
    assert lines[1:] == [artifact.uri for artifact in second]


def test_publishing_what_is_current_changes_nothing(store: Store, published: Published) -> None:
    first = published.publish([make_index(store, 1)])
    assert published.publish([make_index(store, 1)]) == first
    assert numbers(published) == [(1, "publish", 1)]


def test_moved_store_is_read_where_it_lies_now(
    store: Store, published: Published, tmp_path: Path
) -> None:
    published.publish([make_index(store, 1)])
    Path(store.root).rename(tmp_path / "moved")
    found = Published(Store(str(tmp_path / "moved")))
    assert found.uris()[0].startswith(str(tmp_path / "moved"))
    found.open()[0].verify()


def test_place_of_versions_by_its_uri(store: Store, published: Published) -> None:
    published.publish([make_index(store, 1)])
    assert open_published(published.uri).current() == published.current()
    with pytest.raises(MissingArtifactError, match="no place of published versions"):
        open_published(store.root_uri)


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden"])
def test_name_that_is_no_folder(store: Store, name: str) -> None:
    with pytest.raises(ArtifactError, match="cannot name an index"):
        Published(store, name)


def test_what_may_not_be_published(store: Store, published: Published, tmp_path: Path) -> None:
    other = Store(str(tmp_path / "other"))
    vectors, _ = store.get_or_build(Plan("vectors", "v", {}), lambda building: None)
    with pytest.raises(ArtifactError, match="no index to publish"):
        published.publish([])
    with pytest.raises(ArtifactError, match=r"is of kind 'vectors'\. Expected: kind 'index'"):
        published.publish([vectors])
    with pytest.raises(MixedArtifactsError, match="is not below"):
        published.publish([make_index(other, 1)])
    with pytest.raises(MixedArtifactsError, match="the shards belong to 2 encoders"):
        published.publish([make_index(store, 1), make_index(store, 1, 1, encoder="f")])
    with pytest.raises(MixedArtifactsError, match="named twice"):
        published.publish([make_index(store, 1), make_index(store, 1)])
    with pytest.raises(
        ArtifactError, match=r"has recall@10 0\.810 against exact search. Expected: 0\.900 or more"
    ):
        published.publish([make_index(store, 2, recall_at_10=0.81, recall_target=0.9)])
    assert published.current() is None
    published.publish([make_index(store, 3, recall_at_10=0.93, recall_target=0.9)])


def test_damaged_index_is_not_published(store: Store, published: Published) -> None:
    index = make_index(store, 1)
    index.path("index.faiss").write_text("1/9")
    with pytest.raises(CorruptArtifactError):
        published.publish([index])
    assert published.current() is None


# Going back


def test_rollback_steps_back_one_publication_each_time(store: Store, published: Published) -> None:
    for generation in (1, 2, 3):
        published.publish(make_generation(store, generation))
    assert published.rollback(note="bad answers").source == 2
    assert published.rollback().source == 1
    assert numbers(published)[3:] == [(4, "rollback", 2), (5, "rollback", 1)]
    assert published.current().index == published.read(1).index  # type: ignore[union-attr]
    with pytest.raises(MissingArtifactError, match="there is no version before 1 to go back to"):
        published.rollback()
    assert published.rollback(to=4).source == 2, "a rollback stands for what it restored"
    with pytest.raises(MissingArtifactError, match="has no version 99"):
        published.rollback(to=99)
    assert published.publish(make_generation(store, 4)).number == 7
    assert published.rollback().source == 3


# Several writers


def test_version_made_against_an_older_one_loses(store: Store, published: Published) -> None:
    published.publish(make_generation(store, 1), expected=0)
    published.publish(make_generation(store, 2), expected=1)
    with pytest.raises(ConflictError) as caught:
        published.publish(make_generation(store, 3), expected=1)
    message = str(caught.value)
    assert "is at version 2, not at 1" in message
    assert "nothing was changed" in message
    assert published.read(2).index[0] in message
    assert len(published.history()) == 2


def test_slow_writer_loses_its_number(
    store: Store, published: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other publishes between this one's look at the state and its record."""
    mine, theirs = make_generation(store, 1), make_generation(store, 2)
    looked = published.current

    def look() -> Any:
        state = looked()
        if len(published.history()) == 0:
            Published(store).publish(theirs)
        return state

    monkeypatch.setattr(published, "current", look)
    with pytest.raises(ConflictError, match="got version 1 from another writer in this moment"):
        published.publish(mine)
    assert Published(store).open()[0].ref == theirs[0].ref


def process(role: str, root: str, *arguments: object, go: Path) -> subprocess.Popen[str]:
    env = os.environ | {"GO": str(go), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.publishing", role, root, *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=Path(__file__).parents[3], env=env, stdout=subprocess.PIPE, text=True
    )


def start_together(running: list[subprocess.Popen[str]], go: Path) -> None:
    for each in running:
        assert each.stdout is not None
        assert each.stdout.readline() == "ready\n"
    go.touch()


def last_line(running: subprocess.Popen[str]) -> dict[str, Any]:
    out, _ = running.communicate(timeout=300)
    assert running.returncode == 0
    found: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    return found


@pytest.mark.parametrize("expected", ["none", "1"])
def test_of_publishers_at_once_one_wins(
    store: Store, published: Published, tmp_path: Path, expected: str
) -> None:
    published.publish(make_generation(store, 0))
    go = tmp_path / "go"
    running = [
        process("once", store.root_uri, generation, expected, go=go) for generation in (1, 2, 3, 4)
    ]
    start_together(running, go)
    outcomes = [last_line(each) for each in running]
    won = [outcome["won"] for outcome in outcomes if "won" in outcome]
    assert len(set(won)) == len(won), "no number is won twice"
    assert sorted(won) == list(range(2, 2 + len(won)))
    if expected == "1":
        assert won == [2], "all were made against version 1: one wins"
    assert all(
        "nothing was changed" in outcome["lost"] for outcome in outcomes if "lost" in outcome
    )
    assert len(published.history()) == 1 + len(won)


def test_reader_never_sees_a_mixture(store: Store, published: Published, tmp_path: Path) -> None:
    """3 publishers and 2 readers, each a process; INVAR_READS=10000 is the acceptance run."""
    reads = int(os.environ.get("INVAR_READS", "400"))
    published.publish(make_generation(store, 0))
    go, per_publisher = tmp_path / "go", max(20, reads // 100)
    readers = [process("read", store.root_uri, reads, go=go) for _ in range(2)]
    writers = [
        process("publish", store.root_uri, 1000 * (1 + n), per_publisher, go=go) for n in range(3)
    ]
    start_together([*readers, *writers], go)
    wrote, read = [last_line(each) for each in writers], [last_line(each) for each in readers]
    assert all(each["wrong"] == [] for each in read), read
    history = published.history()
    assert [version.number for version in history] == list(range(1, 2 + 3 * per_publisher))
    assert len({version.index for version in history}) == len(history), (
        "each publication won one number"
    )
    assert max(each["versions"] for each in read) > 1, f"the readers saw no change: {read} {wrote}"
    (Path(store.root) / "outcome.json").write_text(json.dumps({"wrote": wrote, "read": read}))
    print(wrote, read)


def test_writer_that_was_killed_before_the_pointer_leaves_a_version(
    store: Store, published: Published
) -> None:
    published.publish(make_generation(store, 1))
    pointer = Path(store.root) / "published/main/CURRENT"
    before = pointer.read_bytes()
    published.publish(make_generation(store, 2))
    pointer.write_bytes(before)  # as if it had been killed after its record
    current = published.current()
    assert current is not None
    assert current.number == 2
    published.publish(make_generation(store, 2))
    assert pointer.read_text().startswith("# version 2 "), "the next writer repairs it"
    pointer.unlink()
    assert published.current() == current


def test_damaged_record_is_named(store: Store, published: Published) -> None:
    published.publish(make_generation(store, 1))
    record = Path(store.root) / "published/main/versions/00000001.json"
    record.write_text("{}")
    with pytest.raises(CorruptArtifactError, match=r"00000001\.json is not a version record"):
        published.current()
    record.write_text(json.dumps({"schema_version": 99}))
    with pytest.raises(ArtifactError, match="has schema version 99"):
        published.current()


# Conditional writes


@pytest.mark.parametrize("damage", [b"{", b"\xff\x00", None])
def test_a_damaged_record_is_passed_over_when_asked(
    store: Store, published: Published, damage: bytes | None
) -> None:
    first, second, third = (make_generation(store, number) for number in (1, 2, 3))
    assert published.mend() is None
    published.publish(first)
    assert published.mend() is None
    published.publish(second)
    published.publish(third)
    record = Path(store.root_uri) / "published/main/versions/00000003.json"
    if damage is None:
        record.unlink()
    else:
        record.write_bytes(damage)
    with pytest.raises(CorruptArtifactError):
        published.publish(third)
    mended = published.mend()
    assert mended is not None
    # Number 3 was seen by readers: only a higher one is news to them.
    assert (mended.number, mended.action, mended.source) == (4, "rollback", 2)
    assert published.need() == mended
    assert published.uris() == tuple(artifact.uri for artifact in second)
    assert numbers(published)[:2] == [(1, "publish", 1), (2, "publish", 2)]
    assert published.publish(third).number == 5
    assert published.rollback().index == tuple(artifact.ref for artifact in second)
    assert published.mend() is None
    # The service reads the same log.
    current = Current(published.uri)
    newest = current.newest()
    assert newest is not None
    assert [version.number for version, _ in current.earlier(newest)] == [1]


def test_a_mend_forgets_no_collection(store: Store, published: Published) -> None:
    for number in (1, 2, 3):
        published.publish(make_generation(store, number))
    collect(published, 1)
    record = Path(store.root_uri) / "published/main/versions/00000004.json"
    assert json.loads(record.read_text())["action"] == "gc"
    record.write_text("{")
    mended = published.mend()
    assert mended is not None
    assert (mended.number, mended.source, mended.collected) == (5, 3, (1, 2))
    with pytest.raises(MissingArtifactError):
        published.rollback()
    # A version whose artifacts are gone is nothing to go back to.
    for number in (5, 4, 3):
        (record.parent / f"{number:08d}.json").write_text("{")
    with pytest.raises(CorruptArtifactError):
        published.mend()


def test_what_cannot_be_mended_is_said(store: Store, published: Published) -> None:
    published.publish(make_generation(store, 1))
    record = Path(store.root_uri) / "published/main/versions/00000001.json"
    record.write_text("{")
    with pytest.raises(CorruptArtifactError, match="00000001"):
        published.mend()
    record.unlink()
    with pytest.raises(CorruptArtifactError, match="version 1, which is gone"):
        published.mend()


def test_a_store_that_does_not_answer_has_collected_nothing(
    store: Store, published: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (1, 2):
        published.publish(make_generation(store, number))
    (Path(store.root_uri) / "published/main/versions/00000002.json").write_text("{")

    def unreachable(*args: object) -> None:
        raise ArtifactError("cannot read the bucket")

    with monkeypatch.context() as network:
        network.setattr(Store, "open", unreachable)
        with pytest.raises(ArtifactError, match="cannot read the bucket"):
            published.mend()
    mended = published.mend()
    assert mended is not None
    assert (mended.source, mended.collected) == (1, ())


def test_create_if_absent_knows_its_own_content(tmp_path: Path) -> None:
    place = str(tmp_path / "deep/file")
    assert create_if_absent(place, b"mine")
    assert create_if_absent(place, b"mine"), "sent again"
    assert not create_if_absent(place, b"theirs")
    assert Path(place).read_bytes() == b"mine"
    assert [path.name for path in Path(place).parent.iterdir()] == ["file"], "no rests"


def test_replace_calls_for_the_newest_content(tmp_path: Path) -> None:
    place = str(tmp_path / "deep/file")
    replace(place, lambda: b"1")
    replace(place, lambda: b"2")
    assert Path(place).read_bytes() == b"2"


# Garbage


def test_collect_keeps_the_newest_and_the_current(store: Store, published: Published) -> None:
    generations = {n: make_generation(store, n) for n in range(1, 6)}
    for n in range(1, 6):
        published.publish(generations[n])
    published.rollback(to=2)
    plan = collect(published, keep=2, dry_run=True)
    assert plan.versions == (1, 3)
    assert set(plan.removed) == {artifact.ref for n in (1, 3) for artifact in generations[n]}
    assert len(published.history()) == 6
    assert collect(published, keep=2) == plan
    assert numbers(published)[-1] == (7, "gc", 2)
    for n in (2, 4, 5):
        for artifact in generations[n]:
            artifact.verify()
    for n in (1, 3):
        with pytest.raises(MissingArtifactError):
            store.open(generations[n][0].ref)
    with pytest.raises(MissingArtifactError, match=r"version 3 of .* has been collected"):
        published.rollback(to=3)
    with pytest.raises(MissingArtifactError, match="no version before 2"):
        published.rollback()
    assert collect(published, keep=2).versions == ()
    assert len(published.history()) == 7, "nothing to do takes no number"
    with pytest.raises(ArtifactError, match="keep is 0"):
        collect(published, keep=0)


def test_collection_that_was_cut_off_is_finished_later(store: Store, published: Published) -> None:
    first = make_generation(store, 1)
    published.publish(first)
    published.publish(make_generation(store, 2))
    collect(published, keep=1)
    make_generation(store, 1)
    assert {artifact.ref for artifact in first} == set(collect(published, keep=1).removed)


def test_young_versions_stay(store: Store, published: Published) -> None:
    for n in (1, 2, 3):
        published.publish(make_generation(store, n))
    assert collect(published, keep=1, min_age_s=3600, dry_run=True).versions == ()
    assert collect(published, keep=1, dry_run=True).versions == (1, 2)


def test_shards_that_a_later_version_uses_stay(store: Store, published: Published) -> None:
    """An incremental version replaces one shard only."""
    old, shared, new = make_index(store, 1, 0), make_index(store, 1, 1), make_index(store, 2, 0)
    published.publish([old, shared])
    published.publish([new, shared])
    assert collect(published, keep=1).removed == (old.ref,)


def test_what_another_name_serves_stays(store: Store, published: Published) -> None:
    shared = make_index(store, 1)
    Published(store, "canary").publish([shared])
    published.publish([shared])
    published.publish([make_index(store, 2)])
    found = collect(published, keep=1)
    assert (found.versions, found.removed) == ((1,), ())
    shared.verify()


def test_parents_go_only_where_nobody_needs_them(store: Store, published: Published) -> None:
    def fill(building: Building) -> None:
        building.info |= {"encoder": {"name": "e"}, "rows": 1}

    passages = [store.get_or_build(Plan("passages", "p", {"n": n}), fill)[0] for n in (1, 2)]
    vectors = [
        store.get_or_build(Plan("vectors", "v", {"n": n}, {"passages": each}), fill)[0]
        for n, each in enumerate(passages)
    ]
    indexes = [
        store.get_or_build(Plan("index", "i", {"n": n}, {"vectors": v, "passages": p}), fill)[0]
        for n, (v, p) in enumerate(zip(vectors, passages, strict=True))
    ]
    store.get_or_build(Plan("trainset", "t", {}, {"vectors": vectors[0]}), fill)
    for index in indexes:
        published.publish([index])
    published.publish([make_index(store, 9)])
    gone = collect(published, keep=1, parents=True)
    assert set(gone.removed) == {indexes[0].ref, indexes[1].ref, vectors[1].ref, passages[1].ref}
    vectors[0].verify()


def test_half_removed_artifact_is_refused(store: Store) -> None:
    index = make_index(store, 1)
    index.path("manifest.json").unlink()
    with pytest.raises(IncompleteArtifactError):
        store.open(index.ref)
