"""From a name to weights that stay the same: hub names at a commit, folders that a URI names."""

from __future__ import annotations

import http.server
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants, file_download

from invar_ray.config import ModelConfig
from invar_ray.errors import ModelError
from invar_ray.models import meta
from invar_ray.models.base import BaseRef, resolve_base
from invar_ray.models.loading import open_model
from tests.support import World, world
from tests.unit.conftest import S3

OLD, NEW, TAGGED = ("a" * 40, "b" * 40, "c" * 40)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> World:
    return world(tmp_path_factory)


class Hub:
    """A hub on the loopback address: what ``main`` of ``known/model`` is, and a tag."""

    main = OLD
    asked = 0


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    state = Hub()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.asked += 1
            known = {
                "/api/models/known/model": state.main,
                "/api/models/known/model/revision/v1": TAGGED,
            }
            commit = known.get(self.path.partition("?")[0])
            body = json.dumps({"id": "known/model", "sha": commit}).encode()
            self.send_response(200 if commit else 404)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield state
    server.shutdown()
    server.server_close()
    thread.join()


def resolve(base: str) -> BaseRef:
    return resolve_base(ModelConfig(base=base), None)


def test_a_hub_name_is_pinned_to_what_it_stands_for(hub: Hub) -> None:
    first = resolve("known/model")
    assert (first.location, first.revision) == ("known/model", OLD)
    assert resolve("known/model").fingerprint == first.fingerprint
    hub.main = NEW
    moved = resolve("known/model")
    assert moved.revision == NEW
    assert moved.fingerprint != first.fingerprint  # never two weights under one name
    # Whoever wants the old ones says so; the hub is not asked then.
    asked = hub.asked
    assert resolve(f"known/model@{OLD}") == first
    assert hub.asked == asked
    assert resolve("known/model@v1").revision == TAGGED


def test_where_the_hub_cannot_be_asked_the_cache_knows(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="unknown/model"):
        resolve("unknown/model")
    folder = tmp_path / "models--known--model"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(NEW)
    (folder / "snapshots" / NEW).mkdir(parents=True)
    (folder / "snapshots" / NEW / "config.json").write_text("{}")
    for module in (constants, file_download):
        if hasattr(module, "HF_HUB_CACHE"):
            monkeypatch.setattr(module, "HF_HUB_CACHE", str(tmp_path))
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        assert resolve("known/model").revision == NEW
        with pytest.raises(ModelError, match="other/model"):
            resolve("other/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve("known/model").revision == NEW


def test_a_base_in_a_bucket_is_taken_into_the_store(
    s3: S3, small: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from invar_ray.config import load_config
    from invar_ray.pipeline import Pipeline
    from invar_ray.store.files import resolve_uri

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    uri = s3("bases/llama")
    filesystem, root = resolve_uri(uri)
    filesystem.create_dir(root, recursive=True)

    def put(name: str, content: bytes) -> None:
        with filesystem.open_output_stream(f"{root}/{name}") as stream:
            stream.write(content)

    source = small.base_artifact.path()
    for path in source.iterdir():
        if path.name != "manifest.json":
            put(path.name, path.read_bytes())
    put("pytorch_model.bin", b"a pickle")
    options = [f"model.base={uri}", f"storage.root_uri={tmp_path / 'store'}"]
    with Pipeline(load_config("tiny", options), quiet=True) as pipeline:
        found, store = pipeline.base, pipeline.store
    folder = Path(found.folder_or_name(store))
    assert folder.is_relative_to(tmp_path / "store")
    assert not (folder / "pytorch_model.bin").exists()
    model, _ = open_model(found, store)
    wanted, _ = open_model(small.base, small.store)
    for name, weight in wanted.named_parameters():
        assert torch.equal(weight, model.get_parameter(name)), name
    assert meta.known_description(uri).hidden_size == wanted.config.hidden_size
    # Other weights there are another base.
    weights = (source / "model.safetensors").read_bytes()
    put("model.safetensors", weights + b"\0")
    with Pipeline(load_config("tiny", options), quiet=True) as pipeline:
        assert pipeline.base.fingerprint != found.fingerprint
    filesystem.delete_file(f"{root}/config.json")
    with pytest.raises(ModelError, match=r"lacks config\.json"):
        _ = Pipeline(load_config("tiny", options), quiet=True).base
