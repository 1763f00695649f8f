"""Faults of the machine: one line, and this machine's own addresses without a proxy."""

from __future__ import annotations

import errno
import io
import os
import sys
from pathlib import Path

import pytest

from invar_ray.cli.doctor import check_folders
from invar_ray.cli.errors import explained, reach_loopback_directly
from invar_ray.errors import ResourceError
from invar_ray.session import _ray_folder


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_fault_of_the_machine_is_one_line(
    number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught, explained():
        raise OSError(number, os.strerror(number), "/data/runs/x")
    assert caught.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {os.strerror(number)} (/data/runs/x). To do: ")
    assert said.count("\n") == 1
    with pytest.raises(FileNotFoundError), explained():  # a mistake of ours keeps its traceback
        raise FileNotFoundError(errno.ENOENT, "none", "x")


def test_an_ascii_terminal_shows_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    with explained():
        print("Zürich", flush=True)
    assert raw.getvalue() == b"Z\\xfcrich\n"


def test_loopback_goes_without_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setenv("no_proxy", "example.org")
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    assert check_folders()[-1].status == "warn"
    reach_loopback_directly()
    for name in ("no_proxy", "NO_PROXY"):
        assert os.environ[name] == "example.org,localhost,127.0.0.1,::1"


def test_a_long_temporary_folder_gives_way_to_a_short_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 90)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    folder = _ray_folder()
    assert folder.startswith("/tmp/invar-ray-")
    os.rmdir(folder)
    assert any("too long for Ray" in check.detail for check in check_folders())
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(ResourceError, match="set TMPDIR to a shorter path"):
        _ray_folder()
