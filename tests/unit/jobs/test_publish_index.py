"""The nightly job: what it publishes, what it does the second night, and what happens if another
job was faster.
"""

from __future__ import annotations

from typing import Any

import pytest

from invar_ray.config import config_keys
from invar_ray.errors import ConfigError, ConflictError
from invar_ray.store.artifacts import Artifact, Store
from invar_ray.store.published import Published
from jobs import publish_index, reindex
from tests.publishing import make_index


class Run:
    """A pipeline whose index is made already."""

    def __init__(self, store: Store, index: Artifact) -> None:
        self.store, self.reindexed = store, (index,)


OPTIONS = {"published": "main", "keep": "0", "note": "nightly"}


@pytest.fixture
def store(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(reindex, "report", lambda pipeline: pipeline.reindexed)  # jobs test it
    return Store(str(tmp_path))


def test_nights(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = Run(store, make_index(store, 1)), Run(store, make_index(store, 2))
    publish_index.main(first, OPTIONS)  # type: ignore[arg-type]
    assert "version 1 is current now; serve it with index_uri: " in capsys.readouterr().out
    publish_index.main(first, OPTIONS)  # type: ignore[arg-type]
    assert "version 1 is current already" in capsys.readouterr().out
    publish_index.main(second, OPTIONS | {"keep": "1"})  # type: ignore[arg-type]
    output = capsys.readouterr().out
    assert "version 2 is current now" in output
    assert "gave up 0 versions" in output, (
        "what was current within the hour may still be in somebody's hands"
    )
    current = Published(store).current()
    assert current is not None
    assert (current.index, current.note) == ((second.reindexed[0].ref,), "nightly")


def test_job_that_was_overtaken_changes_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    faster = make_index(store, 2)
    monkeypatch.setattr(
        reindex,
        "report",
        lambda pipeline: (Published(store).publish([faster]), pipeline.reindexed)[1],
    )
    with pytest.raises(ConflictError, match="is at version 1, not at 0"):
        publish_index.main(Run(store, make_index(store, 1)), OPTIONS)  # type: ignore[arg-type]
    assert Published(store).uris() == (faster.uri,)


def test_no_option_hides_a_field_of_the_config() -> None:
    assert not OPTIONS.keys() & set(config_keys())


def test_wrong_number_is_refused_before_the_work(store: Store) -> None:
    with pytest.raises(ConfigError, match="keep is 'five'"):
        publish_index.main(Run(store, make_index(store, 1)), OPTIONS | {"keep": "five"})  # type: ignore[arg-type]
    assert Published(store).current() is None
