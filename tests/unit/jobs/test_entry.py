"""What a job says of a store that would vanish."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.entry import warn_of_a_store_in_the_upload

UPLOAD = Path("/tmp/ray/session_x/runtime_resources/working_dir_files/_ray_pkg_0123456789abcdef")


@pytest.mark.parametrize(
    ("root_uri", "folder", "warns"),
    [
        ("runs/demo", UPLOAD, True),
        ("runs/demo", Path("/home/me/project"), False),
        ("/data/invar", UPLOAD, False),
        ("s3://bucket/invar", UPLOAD, False),
    ],
)
def test_a_relative_store_inside_an_upload_is_named(
    root_uri: str, folder: Path, warns: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    warn_of_a_store_in_the_upload(root_uri, folder)
    said = capsys.readouterr()
    assert said.out == ""
    assert ("storage.root_uri=runs/demo is relative" in said.err) == warns
