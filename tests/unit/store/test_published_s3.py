"""Published versions on an object store: conditional puts against a local S3 server."""

from __future__ import annotations

import concurrent.futures
from typing import Any

import pytest
from pyarrow import fs

from invar_ray.errors import ArtifactError, ConflictError, MissingArtifactError
from invar_ray.store.artifacts import Store
from invar_ray.store.conditional import create_if_absent, replace
from invar_ray.store.garbage import collect
from invar_ray.store.published import Published, open_published
from tests.publishing import make_generation, make_index
from tests.unit.conftest import S3


@pytest.fixture
def root(s3: S3, request: Any) -> str:
    return s3(request.node.name)


def place(root: str, name: str) -> str:
    base, _, query = root.partition("?")
    return f"{base}/{name}?{query}"


def content(uri: str) -> bytes:
    filesystem, path = fs.FileSystem.from_uri(uri)
    with filesystem.open_input_file(path) as stream:
        return bytes(stream.read())


def test_of_many_creators_one_wins(root: str) -> None:
    uri = place(root, "record")
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        won = list(
            pool.map(lambda number: create_if_absent(uri, f"writer {number}".encode()), range(16))
        )
    assert sum(won) == 1
    assert content(uri) == f"writer {won.index(True)}".encode()
    assert create_if_absent(uri, content(uri)), (
        "an answer that was lost: the writer knows its own record"
    )


def test_replace_is_made_anew_where_another_was_faster(root: str) -> None:
    uri = place(root, "pointer")
    replace(uri, lambda: b"1")
    state, looks = [2], []

    def make() -> bytes:
        looks.append(state[0])
        if len(looks) == 1:  # between this one's look at the file and its put
            state[0] = 3
            replace(uri, lambda: b"3")
        return str(state[0] if len(looks) > 1 else 2).encode()

    replace(uri, make)
    assert looks == [2, 3]
    assert content(uri) == b"3"


def test_publish_rollback_and_collect(root: str) -> None:
    store = Store(root)
    published = Published(store)
    assert published.current() is None
    for generation in (1, 2, 3):
        published.publish(make_generation(store, generation), expected=generation - 1)
    current = published.current()
    assert current is not None
    assert current.number == 3
    text = content(place(root, "published/main/CURRENT")).decode().splitlines()
    assert text[0].startswith("# version 3 of main")
    assert tuple(text[1:]) == published.uris()
    assert all("?endpoint_override=" in line for line in text[1:])
    assert open_published(published.uri).uris() == published.uris()
    with pytest.raises(ConflictError, match="is at version 3, not at 1"):
        published.publish(make_generation(store, 4), expected=1)
    assert published.rollback().source == 2
    gone = collect(published, keep=1)
    assert gone.versions == (1,)
    with pytest.raises(MissingArtifactError):
        store.open(published.read(1).index[0])
    published.open()[0].verify()


def test_publishers_at_once(root: str) -> None:
    store = Store(root)
    indexes = [make_index(store, generation) for generation in range(6)]
    Published(store).publish([indexes[0]])

    def publish(number: int) -> int | None:
        try:
            return (
                Published(Store(root)).publish([indexes[number]], expected=1, verify=False).number
            )
        except ConflictError:
            return None

    with concurrent.futures.ThreadPoolExecutor(5) as pool:
        outcomes = list(pool.map(publish, range(1, 6)))
    assert sorted(outcomes, key=str) == [2, None, None, None, None]
    winner = Published(store).current()
    assert winner is not None
    assert winner.index == (indexes[1 + outcomes.index(2)].ref,)


def test_bucket_that_is_not_there(s3: S3) -> None:
    uri = s3("x/record", "nowhere")
    with pytest.raises(
        ArtifactError, match=r"cannot write s3://nowhere/x/record.*check the bucket"
    ):
        create_if_absent(uri, b"x")
