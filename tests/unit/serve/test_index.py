"""Which index a service serves: changes by its route, versions that others publish, replicas that
start late or while something cannot be read; over small real artifacts.
"""

from __future__ import annotations

import hashlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from invar_ray.errors import ConfigError, MissingArtifactError
from invar_ray.store.artifacts import Store, open_artifact
from invar_ray.store.garbage import collect
from invar_ray.store.publication import Version
from invar_ray.store.published import Published
from serve.args import AppArgs
from serve.http.index_forms import IndexChangeResponse, IndexResponse
from serve.http.keys import ApiKey
from serve.replicas.retriever import load_retriever
from serve.versions import FIXED, Current
from tests.serving import Artifacts, Live, copy_of, fault, root_of, shared_artifacts

FERRY = "When does the ferry leave?"
ADMIN = ApiKey(name="ops", sha256=hashlib.sha256(b"root").hexdigest(), scopes=("query", "admin"))
ROOT = {"X-API-Key": "root"}
SOON = {"again_s": 0.001, "differ_s": 0.0}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    return shared_artifacts(tmp_path_factory)


@pytest.fixture
def artifacts(shared: Artifacts, tmp_path: Path) -> Artifacts:
    return copy_of(shared, tmp_path)


def published(artifacts: Artifacts) -> Published:
    return Published(Store(root_of(artifacts)))


def publish(artifacts: Artifacts, *uris: str) -> Version:
    return published(artifacts).publish([open_artifact(uri, "index") for uri in uris])


def state(live: Live) -> IndexResponse:
    return IndexResponse.model_validate(live("GET", "/v1/index", headers=ROOT).json())


def active(live: Live) -> list[str]:
    """What every replica searches, ordered by shard."""
    return [replica.active_uri for replica in state(live).replicas]


def change(live: Live, **body: Any) -> httpx.Response:
    return live("POST", "/admin/index", json={"wait": True} | body, headers=ROOT)


def ready(live: Live) -> int:
    return live("GET", "/readyz").status_code


# Changes by the route


def test_an_index_change_is_probed_and_published(artifacts: Artifacts) -> None:
    live = Live(artifacts, published="main", keys=(ADMIN,))
    try:
        first = state(live).versions["index"]
        assert "kind 'index'" in fault(
            change(live, index_uri=artifacts.generator_uri), 409, "conflict"
        )
        assert "shadow search" in fault(
            change(live, index_uri=artifacts.scrambled_index_uri), 409, "conflict"
        )
        after = state(live)
        assert (after.index.requested_uri, after.index.active_uri) == (
            artifacts.scrambled_index_uri,
            artifacts.index_uri,
        )
        assert after.index.error is not None
        assert after.versions["index"] == first
        assert (
            live("POST", "/v1/retrieve", json={"question": FERRY}, headers=ROOT).json()["versions"][
                "index"
            ]
            == first
        )
        fault(change(live), 422, "invalid_request")
        fault(change(live, index_uri="x", rollback=True), 422, "invalid_request")
        fault(change(live, index_uri=["a", "b"]), 422, "invalid_request")
        assert "no earlier" in fault(change(live, rollback=True), 422, "invalid_request")
        assert published(artifacts).history() == [], "nothing that was refused is published"

        done = IndexChangeResponse.model_validate(
            change(live, index_uri=f"{artifacts.other_index_uri}/").json()
        )
        assert (done.index.active_uri, done.index.error) == (artifacts.other_index_uri, None)
        assert done.report["new_recall"] == 1.0
        assert 0 <= done.report["same_hits"] <= 1
        assert done.versions["index"] != first
        assert state(live).history == [artifacts.index_uri]
        assert published(artifacts).uris() == (artifacts.other_index_uri,)
        # A replica that starts now serves what was switched to, not what was configured.
        again = Live(artifacts, published="main", keys=(ADMIN,))
        found = again("POST", "/v1/retrieve", json={"question": FERRY}, headers=ROOT).json()
        assert found["versions"]["index"] == done.versions["index"]
        # One that was there and missed a change is told of it at a health check.
        assert change(live, rollback=True).json()["versions"]["index"] == first
        assert active(again) == [artifacts.other_index_uri]
        again.follow()
        assert again("GET", "/v1/index", headers=ROOT).json()["versions"]["index"] == first
        assert state(live).history == []
        again.close()
        assert [(each.action, each.source) for each in published(artifacts).history()] == [
            ("publish", 1),
            ("publish", 2),
            ("rollback", 1),
        ]
    finally:
        live.close()


def test_of_two_changes_at_once_one_wins(
    artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [artifacts.other_index_uri, artifacts.tenants_index_uri]
    both, started, alone = threading.Barrier(2), threading.Event(), threading.Lock()
    # Each service stands for a process of its own, with a lock of its own.
    monkeypatch.setattr("serve.replicas.retriever.loading", threading.Semaphore(2))

    def loader(uri: str) -> Any:
        if started.is_set():
            both.wait(60)  # each has seen what is current, neither has published
        with alone:
            return load_retriever(uri)

    services = [Live(artifacts, published="main", keys=(ADMIN,), loader=loader) for _ in range(2)]
    with closing(services[0]), closing(services[1]), ThreadPoolExecutor(2) as pool:
        started.set()
        asked = [
            pool.submit(change, live, index_uri=uri)
            for live, uri in zip(services, wanted, strict=True)
        ]
        responses = [each.result() for each in asked]
        started.clear()
        codes = [response.status_code for response in responses]
        assert sorted(codes) == [200, 409]
        winner = wanted[codes.index(200)]
        assert "nothing was changed" in fault(responses[codes.index(409)], 409, "conflict")
        assert published(artifacts).uris() == (winner,)
        for live in services:
            live.follow()
            assert active(live) == [winner]


def test_an_index_of_another_store_is_refused(artifacts: Artifacts, shared: Artifacts) -> None:
    with closing(Live(artifacts, published="main", keys=(ADMIN,))) as live:
        message = fault(change(live, index_uri=shared.other_index_uri), 422, "invalid_request")
        assert f"{root_of(artifacts)}/index/" in message
        assert active(live) == [artifacts.index_uri]
        assert state(live).index.error is None, "nothing was opened"


def test_without_versions_the_index_stays(artifacts: Artifacts) -> None:
    with closing(Live(artifacts, keys=(ADMIN,))) as live:
        fault(change(live, index_uri=artifacts.other_index_uri), 409, "conflict")
        publish(artifacts, artifacts.other_index_uri)
        live.follow()
        assert active(live) == [artifacts.index_uri]
        assert not (Path(root_of(artifacts)) / "published/main/deployed").exists()


# What counts as newer


def test_the_deployed_index_is_served_until_something_newer_is_published(
    artifacts: Artifacts,
) -> None:
    publish(artifacts, artifacts.other_index_uri)
    live = Live(artifacts, published="main", keys=(ADMIN,))
    live.follow()
    assert active(live) == [artifacts.index_uri], "what was published before the deployment is not"
    assert state(live).history == []
    collect(published(artifacts), 1, min_age_s=0)
    publish(artifacts, artifacts.other_index_uri)  # current already: takes no number
    live.follow()
    assert active(live) == [artifacts.index_uri]
    publish(artifacts, artifacts.tenants_index_uri)
    live.follow()
    assert active(live) == [artifacts.tenants_index_uri]
    assert live.add().active_uri == artifacts.tenants_index_uri
    live.close()
    with closing(Live(artifacts, published="main")) as again:
        assert active(again) == [artifacts.tenants_index_uri], "kept over a restart"
    with closing(Live(artifacts, shards=[artifacts.left_index_uri], published="main")) as other:
        other.follow()
        assert active(other) == [artifacts.left_index_uri], "another deployment decides"
        published(artifacts).rollback(1)
        other.follow()
        assert active(other) == [artifacts.other_index_uri]


def test_a_collection_is_no_news(artifacts: Artifacts) -> None:
    for uri in (artifacts.other_index_uri, artifacts.tenants_index_uri):
        publish(artifacts, uri)
    with closing(Live(artifacts, published="main")) as live:
        versions = published(artifacts)
        newest = versions.need()
        versions.commit(newest, None, "gc", newest.index, source=2, collected=(1,))
        live.follow()
        assert live.add().active_uri == artifacts.index_uri
        assert active(live) == [artifacts.index_uri] * 2


def test_a_store_that_cannot_be_written_keeps_the_deployed_index(
    artifacts: Artifacts, tmp_path: Path
) -> None:
    folder = Path(root_of(artifacts)) / "published/main"
    folder.mkdir(parents=True)
    (folder / "deployed").write_text("a file where a folder is needed")
    current = Current(str(folder))
    assert current.since((artifacts.index_uri,)) == FIXED
    with closing(Live(artifacts, published="main", index=SOON)) as live:
        publish(artifacts, artifacts.other_index_uri)
        (folder / "deployed").unlink()
        (folder / "deployed").write_text("still")
        live.follow()
        assert active(live) == [artifacts.index_uri]
        assert ready(live) == 200


def test_index_uri_may_be_a_place_of_published_versions(artifacts: Artifacts) -> None:
    place = f"{root_of(artifacts)}/published/nightly"
    args = AppArgs(index_uri=place, generator_uri=artifacts.generator_uri)
    with pytest.raises(MissingArtifactError, match="nothing has been published"):
        args.resolved()
    nightly = Published(Store(root_of(artifacts)), "nightly")
    nightly.publish([open_artifact(artifacts.index_uri)])
    resolved = args.resolved()
    assert resolved.configured == (artifacts.index_uri,)
    assert resolved.versions_uri() == place
    nightly.publish(
        [open_artifact(uri) for uri in (artifacts.left_index_uri, artifacts.right_index_uri)]
    )
    assert args.resolved().configured == (artifacts.left_index_uri, artifacts.right_index_uri)
    with pytest.raises(ConfigError, match="2 shards"):
        args.model_copy(update={"topology": "colocated"}).resolved()
    with pytest.raises(ValidationError, match="shard_uris"):
        AppArgs(index_uri=place, generator_uri="g", shard_uris=["a"])
    with pytest.raises(ValidationError, match="published"):
        AppArgs(index_uri="i", generator_uri="g", published="../main")


def test_versions_lie_in_the_index_s_store() -> None:
    args = AppArgs(index_uri="s3://b/x/index/a-1?region=eu", generator_uri="g")
    assert args.versions_uri() == "s3://b/x/published/main?region=eu"
    assert args.model_copy(update={"published": ""}).versions_uri() == ""


# Following


def test_published_versions_are_followed(artifacts: Artifacts) -> None:
    live = Live(artifacts, published="main")
    try:
        live.follow()  # nothing has been published: nothing happens
        publish(artifacts, artifacts.other_index_uri)
        live.follow()
        assert live("GET", "/v1/index").json()["index"]["active_uri"] == artifacts.other_index_uri
        publish(artifacts, artifacts.scrambled_index_uri)
        for _ in range(2):
            live.follow()
        assert live("GET", "/v1/index").json()["index"]["active_uri"] == artifacts.other_index_uri
        # changed once, refused once
        assert live.memory.of("invar_index_changes_total") == [
            1.0,
            1.0,
        ]
    finally:
        live.close()


def test_what_was_refused_is_tried_again(artifacts: Artifacts) -> None:
    folder = Path(artifacts.other_index_uri)
    with closing(Live(artifacts, published="main", index=SOON)) as live:
        publish(artifacts, artifacts.other_index_uri)
        folder.rename(folder.with_name("away"))
        for tries in (1, 2, 3):
            live.follow()
            assert len(live.memory.of("invar_index_changes_total")) == tries
            assert active(live) == [artifacts.index_uri]
            assert "no artifact" in str(state(live).index.error)
            time.sleep(0.01)
        folder.with_name("away").rename(folder)
        live.follow()
        assert active(live) == [artifacts.other_index_uri]
        assert state(live).index.error is None


def test_tries_are_further_apart_each_time(artifacts: Artifacts) -> None:
    with closing(Live(artifacts, published="main", index={"again_s": 0.4})) as live:
        publish(artifacts, artifacts.scrambled_index_uri)
        begin, times = time.monotonic(), []
        while len(times) < 3:
            before = len(live.memory.of("invar_index_changes_total"))
            live.follow()
            if len(live.memory.of("invar_index_changes_total")) > before:
                times.append(time.monotonic() - begin)
            assert time.monotonic() - begin < 60
            time.sleep(0.01)
        assert times[1] - times[0] >= 0.4
        assert times[2] - times[1] >= 0.8


def test_a_version_that_is_gone_gives_way_to_the_configured_index(artifacts: Artifacts) -> None:
    with closing(Live(artifacts, published="main")):
        pass  # deployed, then something is published that nobody can load
    publish(artifacts, artifacts.other_index_uri)
    folder = Path(artifacts.other_index_uri)
    folder.rename(folder.with_name("away"))
    live = Live(artifacts, published="main")
    try:
        body = state(live)
        assert body.index.active_uri == artifacts.index_uri
        assert body.index.requested_uri == artifacts.other_index_uri
        assert "no artifact" in str(body.index.error)
        # For another deployment that version is no news.
        here = Current(published(artifacts).uri)
        newest = here.newest()
        assert newest is not None
        assert here.since((artifacts.tenants_index_uri,)) == newest.decided
    finally:
        live.close()


# Replicas that start late, and replicas that differ


def test_a_replica_that_could_not_load_the_version_gets_it_later(artifacts: Artifacts) -> None:
    folder = Path(artifacts.other_index_uri)
    with closing(Live(artifacts, published="main", replicas=2, index=SOON)) as live:
        publish(artifacts, artifacts.other_index_uri)
        live.follow()
        live.follow()
        assert active(live) == [artifacts.other_index_uri] * 2
        folder.rename(folder.with_name("away"))
        late = live.add()
        assert (late.active_uri, late.requested_uri) == (
            artifacts.index_uri,
            artifacts.other_index_uri,
        )
        for _ in range(3):  # those that have it keep it: one broken replica is no reason to go back
            live.follow()
            time.sleep(0.01)
        assert active(live) == [artifacts.other_index_uri] * 2 + [artifacts.index_uri]
        assert [each.error is None for each in state(live).replicas] == [True, True, False]
        message = fault(live("GET", "/readyz"), 503, "unavailable")
        assert "do not serve one version" in message
        folder.with_name("away").rename(folder)
        live.follow()
        assert active(live) == [artifacts.other_index_uri] * 3
        live.follow()
        assert ready(live) == 200
        assert [each.error for each in state(live).replicas] == [None] * 3


@pytest.mark.parametrize("broken", ["versions/00000001.json", "deployed"])
def test_a_replica_that_could_not_read_the_versions_is_told_later(
    artifacts: Artifacts, broken: str
) -> None:
    with closing(Live(artifacts, published="main", index=SOON)) as live:
        publish(artifacts, artifacts.other_index_uri)
        live.follow()
        live.follow()
        path = Path(root_of(artifacts)) / "published/main" / broken
        path = next(path.iterdir()) if path.is_dir() else path
        whole = path.read_text()
        path.write_text("{")
        late = live.add()
        assert late.active_uri == artifacts.index_uri
        live.follow()
        assert ready(live) == 503
        assert "not known" in str(state(live).replicas[1].error)
        path.write_text(whole)
        live.follow()
        assert active(live) == [artifacts.other_index_uri] * 2
        live.follow()
        assert ready(live) == 200
        assert state(live).index.error is None


def test_damaged_versions_leave_the_old_index_and_are_said(artifacts: Artifacts) -> None:
    with closing(Live(artifacts, published="main", keys=(ADMIN,))) as live:
        publish(artifacts, artifacts.other_index_uri)
        record = Path(root_of(artifacts)) / "published/main/versions/00000001.json"
        whole = record.read_text()
        record.write_text("{")
        live.follow()
        assert active(live) == [artifacts.index_uri]
        assert "not a version record" in str(state(live).index.error)
        fault(change(live, index_uri=artifacts.tenants_index_uri), 503, "unavailable")
        record.write_text(whole)
        assert change(live, index_uri=artifacts.tenants_index_uri).status_code == 200


def test_replicas_agree_where_a_new_one_takes_what_the_others_refuse(artifacts: Artifacts) -> None:
    with closing(Live(artifacts, published="main", replicas=2, index=SOON)) as live:
        publish(artifacts, artifacts.scrambled_index_uri)
        live.follow()
        assert active(live) == [artifacts.index_uri] * 2
        # Alone it has nothing to compare with.
        assert live.add().active_uri == artifacts.scrambled_index_uri
        assert ready(live) == 200
        live.follow()
        assert active(live) == [artifacts.index_uri] * 3
        assert state(live).index.requested_uri == artifacts.scrambled_index_uri
        assert "shadow search" in str(state(live).index.error)
        assert ready(live) == 200


def test_replicas_may_differ_for_as_long_as_a_change_takes(artifacts: Artifacts) -> None:
    options = {"again_s": 600.0, "differ_s": 0.3}
    with closing(Live(artifacts, published="main", index=options)) as live:
        publish(artifacts, artifacts.scrambled_index_uri)
        live.follow()
        late = live.add()
        live.run(late.activate(artifacts.tenants_index_uri))
        live.run(live.service.index.observe())
        assert ready(live) == 200
        time.sleep(0.35)
        assert ready(live) == 503
        live.run(late.activate(artifacts.index_uri))
        live.run(live.service.index.observe())
        assert ready(live) == 200


# Shards


def test_shards_change_together_or_not_at_all(artifacts: Artifacts) -> None:
    halves = [artifacts.left_index_uri, artifacts.right_index_uri]
    turned = halves[::-1]
    with closing(Live(artifacts, shards=halves, published="main", index=SOON)) as live:
        publish(artifacts, artifacts.index_uri)  # one shard: cannot be served by two
        live.follow()
        assert active(live) == halves
        publish(artifacts, *turned)
        right = Path(artifacts.right_index_uri)
        right.rename(right.with_name("away"))
        live.follow()
        assert active(live) == halves, "shard 0 cannot have it, so shard 1 does not"
        right.with_name("away").rename(right)
        time.sleep(0.01)
        live.follow()
        assert active(live) == turned


def test_a_shard_that_falls_back_takes_the_other_with_it(artifacts: Artifacts) -> None:
    halves = [artifacts.left_index_uri, artifacts.right_index_uri]
    whole = [artifacts.index_uri, artifacts.tenants_index_uri]
    with closing(Live(artifacts, shards=halves, published="main")):
        pass
    publish(artifacts, *whole)
    folder = Path(artifacts.tenants_index_uri)
    folder.rename(folder.with_name("away"))
    with closing(Live(artifacts, shards=halves, published="main", index=SOON)) as live:
        assert active(live) == [whole[0], halves[1]], "each starts by itself"
        assert ready(live) == 503
        live.follow()
        assert active(live) == halves
        assert ready(live) == 200
        folder.with_name("away").rename(folder)
        time.sleep(0.01)
        live.follow()
        assert active(live) == whole
