"""Start-up: seconds of whole commands, each a new process."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.contest import OURS, ROOT, Contest, Measured, Side
from invar_ray.corpus import facts

QUESTION = "Which element has the symbol Fe?"
SMALL = ["model.base=builtin:tiny", "model.retriever_layers=null"]
_CLI = [sys.executable, "-m", "invar_ray.cli.main"]


def contests(full: bool, folder: Path) -> list[Contest]:
    """From the import to a service that is ready."""
    texts = folder / "texts"
    texts.mkdir()
    for number, document in enumerate(facts.documents()[:40]):
        (texts / f"{number}.txt").write_text(document.text, encoding="utf-8")
    root = str(folder / "store")
    _run([*_CLI, "index", str(texts), f"storage.root_uri={root}", *SMALL])
    ask = [*_CLI, "ask", QUESTION, "--untrained"]
    served = {"root": root, "folder": str(folder)}

    def contest(name: str, command: list[str], target: float, by: str) -> Contest:
        side = Side(OURS, "start:command", {"command": command})
        return Contest(f"start {name}", "start", 1, (side,), target, by)

    return [
        contest("import", [sys.executable, "-c", "import invar_ray"], 0.1, "clock"),
        contest("--help", [*_CLI, "--help"], 0.4, "clock"),
        contest("doctor", [*_CLI, "doctor", f"storage.root_uri={root}", *SMALL], 10, "cpu"),
        contest("ask", [*ask, "--root", root], 6, "cpu"),
        Contest("start ask --url", "start", 1, (Side(OURS, "start:asked", served),), 0.5, "clock"),
        Contest(
            "start serve to ready", "start", 1, (Side(OURS, "start:ready", served),), None, "clock"
        ),
    ]


def command(command: list[str]) -> Callable[[], None]:
    """A command, to its end."""
    return lambda: _run(command)


class _Service:
    """``invar-ray serve`` of the store, with a generator of the bare base's shape."""

    def __init__(self, root: str, folder: str) -> None:
        generator = untrained_generator(root)
        self._log = open(Path(folder) / "serve.log", "w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [*_CLI, "serve", f"storage.root_uri={root}", "serve.port=0", "--generator", generator],
            cwd=ROOT,
            stdout=self._log,
            stderr=self._log,
            env=os.environ | {"PYTHONUNBUFFERED": "1", "TMPDIR": "/tmp"},
        )
        self.url = self._wait()

    def _wait(self) -> str:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and self._process.poll() is None:
            found = re.search(r"serving at (http\S+)", Path(self._log.name).read_text())
            if found:
                return found[1]
            time.sleep(0.1)
        self.close()
        raise SystemExit(Path(self._log.name).read_text()[-3000:])

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(120)


def untrained_generator(root: str) -> str:
    """A generator artifact of the store's base, its adapter not trained; made once."""
    from dataclasses import asdict

    from invar_ray.answering.current import current_index
    from invar_ray.config import LoraConfig
    from invar_ray.models.adapters import new_adapter, save_adapter
    from invar_ray.models.encoder import EncoderSpec
    from invar_ray.models.loading import open_model
    from invar_ray.store.artifacts import Building, Plan, Store

    store = Store(root)
    base = EncoderSpec.from_json(current_index(store).info["encoder"]).base

    def build(building: Building) -> None:
        adapted = new_adapter(open_model(base, store)[0], LoraConfig(), seed=0)
        save_adapter(adapted, adapted.state_dict(), building.path / "adapter", base.location)
        building.info |= {"base": asdict(base), "max_context": 512}

    model = store.open(base.location.removeprefix("artifact:"), "model")
    return store.get_or_build(Plan("generator", "bench", {}, {"base": model}), build)[0].uri


class asked:
    """``ask --url`` of a service that runs."""

    def __init__(self, root: str, folder: str) -> None:
        self._service = _Service(root, folder)

    def __call__(self) -> None:
        _run([*_CLI, "ask", QUESTION, "--url", self._service.url])

    def close(self) -> None:
        self._service.close()


def ready(root: str, folder: str) -> Callable[[], Measured]:
    """``serve`` until it answers ``/readyz``."""
    untrained_generator(root)

    def work() -> Measured:
        started = time.perf_counter()
        service = _Service(root, folder)
        taken = time.perf_counter() - started
        service.close()
        return Measured(clock=taken)

    return work


def _run(command: list[str]) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
