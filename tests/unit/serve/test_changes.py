"""Changes of the index as jobs: they outlive who asked for them, can be looked at and cancelled."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve.replicas.retriever import load_retriever
from serve.versions import Current
from tests.serving import Artifacts, Live, copy_of, fault, root_of, shared_artifacts
from tests.unit.serve.test_index import ADMIN, FERRY, ROOT, active, published, ready


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    return shared_artifacts(tmp_path_factory)


@pytest.fixture
def artifacts(shared: Artifacts, tmp_path: Path) -> Artifacts:
    return copy_of(shared, tmp_path)


class Gate:
    """A loader that waits, once the service runs, until it is let go."""

    def __init__(self) -> None:
        self.closed, self.open, self.reached = False, threading.Event(), threading.Event()

    def __call__(self, uri: str) -> Any:
        if self.closed:
            self.reached.set()
            assert self.open.wait(60)
        return load_retriever(uri)


def serving(artifacts: Artifacts, gate: Gate) -> Live:
    live = Live(artifacts, published="main", keys=(ADMIN,), loader=gate)
    gate.closed = True
    return live


def post(live: Live, **body: Any) -> httpx.Response:
    return live("POST", "/admin/index", json=body, headers=ROOT)


def state(live: Live, place: str) -> dict[str, Any]:
    answer = live("GET", place, headers=ROOT)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_store_that_writes_slowly_does_not_hold_up_the_next_change(
    artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a reader is told is done is done: its state may still be on the way to the store."""
    writing, written = Current.write_change, threading.Event()

    def slowly(self: Current, name: str, values: dict[str, Any]) -> None:
        if values.get("state") == "done":
            assert written.wait(60)
        writing(self, name, values)

    monkeypatch.setattr(Current, "write_change", slowly)
    gate = Gate()
    gate.open.set()
    with closing(serving(artifacts, gate)) as live:
        first = post(live, index_uri=artifacts.other_index_uri)
        until(lambda: state(live, first.headers["Location"])["state"] == "done")
        second = post(live, index_uri=artifacts.index_uri)
        written.set()
        assert second.status_code == 202, second.text
        until(lambda: state(live, second.headers["Location"])["state"] == "done")
        assert active(live) == [artifacts.index_uri]


def test_a_change_is_a_job(artifacts: Artifacts) -> None:
    gate = Gate()
    with closing(serving(artifacts, gate)) as live:
        begun = post(live, index_uri=artifacts.other_index_uri)
        assert begun.status_code == 202
        place = begun.headers["Location"]
        assert place == f"/admin/index/{begun.json()['id']}"
        assert gate.reached.wait(60)
        assert (state(live, place)["state"], state(live, place)["step"]) == ("running", "loading")
        assert active(live) == [artifacts.index_uri]
        # A second one does not wait behind it: it is refused, and so cannot win later.
        fault(post(live, index_uri=artifacts.tenants_index_uri), 409, "conflict")
        gate.open.set()
        until(lambda: state(live, place)["state"] != "running")
        done = state(live, place)
        assert (done["state"], done["step"], done["error"]) == ("done", "switching", None)
        assert done["report"]["new_recall"] == 1.0
        assert active(live) == [artifacts.other_index_uri]
        fault(live("DELETE", place, headers=ROOT), 409, "conflict")
        # What cannot be served is refused in the job, with the reason of a response.
        refused = post(live, index_uri=artifacts.generator_uri).headers["Location"]
        until(lambda: state(live, refused)["state"] == "refused")
        assert state(live, refused)["code"] == "conflict"
        assert "kind 'index'" in state(live, refused)["error"]
        for place in (f"/admin/index/{'0' * 32}", f"/admin/index/{'0' * 31}"):
            assert live("GET", place, headers=ROOT).status_code in {404, 422}
            fault(live("GET", place), 401, "unauthorized")


def test_a_change_outlives_the_client_that_waits_for_it(artifacts: Artifacts) -> None:
    gate = Gate()
    with closing(serving(artifacts, gate)) as live:
        body = {"index_uri": artifacts.other_index_uri, "wait": True}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                f"{live.url}/admin/index", json=body, headers=ROOT, timeout=0.5, trust_env=False
            )
        assert gate.reached.wait(60)
        gate.open.set()
        until(lambda: active(live) == [artifacts.other_index_uri])
        assert published(artifacts).uris() == (artifacts.other_index_uri,)


def test_a_cancelled_change_leaves_the_old_index(artifacts: Artifacts) -> None:
    gate = Gate()
    with closing(serving(artifacts, gate)) as live:
        place = post(live, index_uri=artifacts.other_index_uri).headers["Location"]
        assert gate.reached.wait(60)
        assert live("DELETE", place, headers=ROOT).json()["state"] == "cancelled"
        gate.open.set()
        assert active(live) == [artifacts.index_uri]
        assert published(artifacts).current() is None
        # The next one is not harmed by what is still being loaded for the first.
        again = post(live, index_uri=artifacts.other_index_uri, wait=True)
        assert again.status_code == 200, again.text
        assert active(live) == [artifacts.other_index_uri]


def test_another_http_replica_tells_of_it_and_cancels_it(artifacts: Artifacts) -> None:
    gate = Gate()
    first, second = serving(artifacts, gate), serving(artifacts, Gate())
    with closing(first), closing(second):
        place = post(first, index_uri=artifacts.other_index_uri).headers["Location"]
        assert gate.reached.wait(60)
        until(lambda: second("GET", place, headers=ROOT).status_code == 200)
        assert state(second, place)["state"] == "running"
        assert second("DELETE", place, headers=ROOT).status_code == 200
        until(lambda: state(first, place)["state"] == "cancelled")
        gate.open.set()
        until(lambda: state(second, place)["state"] == "cancelled")
        assert published(artifacts).current() is None


def test_a_full_disk_leaves_the_old_index(
    artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(Live(artifacts, published="main", keys=(ADMIN,))) as live:

        def full(*args: Any) -> bool:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as disk:
            disk.setattr("invar_ray.store.conditional.create_if_absent", full)
            disk.setattr("invar_ray.store.conditional.replace", full)
            message = fault(
                post(live, index_uri=artifacts.other_index_uri, wait=True), 409, "conflict"
            )
            assert "No space left" in message
            assert active(live) == [artifacts.index_uri]
            assert ready(live) == 200
            asked = live("POST", "/v1/retrieve", json={"question": FERRY}, headers=ROOT)
            assert asked.status_code == 200
        assert post(live, index_uri=artifacts.other_index_uri, wait=True).status_code == 200


def test_a_damaged_record_leaves_the_index_that_is_served(artifacts: Artifacts) -> None:
    with closing(Live(artifacts, published="main", keys=(ADMIN,))) as live:
        assert post(live, index_uri=artifacts.other_index_uri, wait=True).status_code == 200
        number = published(artifacts).need().number + 1
        damaged = Path(root_of(artifacts)) / f"published/main/versions/{number:08d}.json"
        damaged.write_text("{")
        live.follow()
        fault(post(live, index_uri=artifacts.index_uri, wait=True), 503, "unavailable")
        assert active(live) == [artifacts.other_index_uri]
        assert ready(live) == 200
        damaged.unlink()
        assert post(live, index_uri=artifacts.index_uri, wait=True).status_code == 200
        assert active(live) == [artifacts.index_uri]


@pytest.mark.parametrize("damage", [b"{", b"\xff\x00"])
def test_a_damaged_record_is_mended_through_the_service(
    artifacts: Artifacts, damage: bytes
) -> None:
    with closing(Live(artifacts, published="main", keys=(ADMIN,))) as live:
        assert post(live, index_uri=artifacts.other_index_uri, wait=True).status_code == 200
        damaged = published(artifacts).need().number + 1
        record = Path(root_of(artifacts)) / f"published/main/versions/{damaged:08d}.json"
        record.write_bytes(damage)
        fault(post(live, index_uri=artifacts.index_uri, wait=True), 503, "unavailable")
        fault(post(live, index_uri=artifacts.index_uri, mend=True), 422, "invalid_request")
        mended = post(live, mend=True, wait=True)
        assert mended.status_code == 200, mended.text
        assert active(live) == [artifacts.other_index_uri], "it is what was served"
        assert record.read_bytes() == damage, "nothing is removed"
        assert post(live, index_uri=artifacts.index_uri, wait=True).status_code == 200
        assert active(live) == [artifacts.index_uri]
        assert published(artifacts).need().number == damaged + 2
        # What was before can be gone back to, past the damaged number.
        assert post(live, rollback=True, wait=True).status_code == 200
        assert active(live) == [artifacts.other_index_uri]
        fault(post(live, mend=True, wait=True), 422, "invalid_request")
