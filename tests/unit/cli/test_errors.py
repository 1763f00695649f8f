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


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("unable to mmap 9 bytes from file <x>: Cannot allocate memory (12)"),
        ValueError("Error while serializing: I/O error: File too large (os error 27)"),
        OSError(errno.EIO, os.strerror(errno.EIO)),
        OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), "x" * 300),
    ],
)
def test_a_fault_that_a_library_tells_in_words_is_one_line(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit), explained():
        raise error
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert "To do: " in said
    assert said.count("\n") == 1


def test_a_folder_that_is_gone_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x").mkdir()
    monkeypatch.chdir(tmp_path / "x")
    (tmp_path / "x").rmdir()
    with pytest.raises(SystemExit), explained():
        raise AssertionError("it was run")
    assert "the current folder is gone. To do: cd" in capsys.readouterr().err
    os.chdir(tmp_path)


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
