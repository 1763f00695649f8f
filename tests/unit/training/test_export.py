"""Export: what PEFT loads outside of this project, merged weights that agree, and a card that says
what was done.
"""

from __future__ import annotations

import base64
import gc
import json
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM, modeling_utils
from typer.testing import CliRunner

from invar_ray.cli.main import app
from invar_ray.errors import DataError, MixedArtifactsError, ModelError, ResourceError
from invar_ray.evaluation.report import Report, Row, write_report
from invar_ray.models import adapters
from invar_ray.models.encoder import PROJECTION_FILE, EncoderSpec, llm_spec, open_encoder
from invar_ray.models.precision import torch_dtype
from invar_ray.store.artifacts import Artifact, Building, Plan
from invar_ray.training import export
from invar_ray.training.card import model_card
from invar_ray.training.export import (
    export_adapter,
    find_gguf_converter,
    open_adapter,
    push_folder,
    write_gguf,
)
from tests import support


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> support.World:
    return support.world(tmp_path_factory)


@pytest.fixture(scope="module")
def report(world: support.World) -> Artifact:
    rows = [Row("stage 1", "dev", {"recall_at_5": 0.5, "overlap_at_5": 0.25})]

    def body(building: Building) -> None:
        write_report(Report(rows=rows), building.path / "report.json")

    hits = Plan("hits", "h", {}, {"index": world.adapter_index})
    made = world.store.get_or_build(hits, lambda building: (building.path / "x").write_text("x"))[0]
    return world.store.get_or_build(Plan("report", "r", {}, {"hits": made}), body)[0]


def test_peft_loads_it_and_gives_the_same_states(
    world: support.World, tmp_path: Path, report: Artifact
) -> None:
    made = export_adapter(world.adapter, tmp_path / "out", report=report, merged=True)
    base = world.base.folder_or_name(world.store)
    texts = ["Who keeps the light?", "in the north sound"]
    spec = EncoderSpec.from_json(world.adapter.info["encoder"])
    wanted = open_encoder(spec, world.store).encode_queries(texts)

    def encode(model: Any) -> torch.Tensor:
        rows = [
            world.tokenizer(text)["input_ids"] + [world.tokenizer.eos_token_id] for text in texts
        ]
        with torch.no_grad():
            states = [
                model(torch.tensor([row])).last_hidden_state[0].mean(dim=0) for row in _once(rows)
            ]
        return torch.nn.functional.normalize(torch.stack(states), dim=-1)

    def _once(rows: list[list[int]]) -> list[list[int]]:
        eos = world.tokenizer.eos_token_id
        return [row[:-1] if row[-2] == eos else row for row in rows]

    peft_model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), made.folder
    )
    whole = AutoModel.from_pretrained(made.merged, dtype=torch.float32)
    bare = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for model in (peft_model.get_base_model().model, whole):
        torch.testing.assert_close(encode(model), torch.from_numpy(wanted), rtol=0, atol=1e-5)
    assert (encode(bare.model) - torch.from_numpy(wanted)).abs().max() > 1e-2, (
        "the adapter changes nothing"
    )
    assert made.lowest_cosine is not None
    assert made.lowest_cosine > 0.99999


@pytest.mark.parametrize("projection", [None, 24])
def test_sentence_transformers_gives_the_same_vectors(
    world: support.World, tmp_path: Path, projection: int | None
) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    small = support.World(
        tmp_path / "world", "model.query_prefix='Find: '", "model.pooling=last", "seed=3"
    )
    if projection is None:
        adapter = small.adapter
    else:
        adapter = _with_projection(small, projection)
    made = export_adapter(adapter, tmp_path / "out", merged=True)
    assert made.merged is not None
    model = sentence_transformers.SentenceTransformer(str(made.merged), device="cpu")
    assert model.tokenizer.chat_template is None
    ours = open_encoder(EncoderSpec.from_json(adapter.info["encoder"]), small.store)
    texts = ["Who keeps the light?", "in the north sound", "a word " * 400]
    pairs = [("", text) for text in texts]
    for wanted, found in (
        (ours.encode_queries(texts[:2]), model.encode_query(texts[:2])),
        (ours.encode_passages(pairs), model.encode_document(texts)),
    ):
        cosines = (torch.from_numpy(wanted) * torch.as_tensor(found)).sum(dim=1)
        assert cosines.min() >= 0.9999, cosines
        assert abs(float(torch.as_tensor(found).norm(dim=1).max()) - 1) < 1e-4
    assert wanted.shape[1] == (projection or wanted.shape[1])


def _with_projection(small: support.World, width: int) -> Artifact:
    plan = Plan("retriever", "projected", {"width": width}, {"base": small.base_artifact})

    def body(building: Building) -> None:
        support.write_adapter(building.path / "adapter", small.base, small.store, 5)
        weight = torch.randn(width, small.base_encoder.dimension)
        save_file({"weight": weight}, building.path / "adapter" / PROJECTION_FILE)
        model = replace(small.config.model, projection_dim=width)
        spec = llm_spec(model, small.base, (plan.ref, plan.fingerprint))
        building.info["encoder"] = spec.to_json()

    return small.get(plan, body)


def test_the_layout_is_the_one_that_servers_read(world: support.World, tmp_path: Path) -> None:
    """Names and keys as vLLM (modules.json, 1_Pooling) and text-embeddings-inference publish them;
    neither is run here.
    """
    merged = export_adapter(world.adapter, tmp_path / "out", merged=True).merged
    assert merged is not None
    modules = json.loads((merged / "modules.json").read_text())
    assert [(m["idx"], m["path"], m["type"]) for m in modules] == [
        (0, "", "sentence_transformers.models.Transformer"),
        (1, "1_Pooling", "sentence_transformers.models.Pooling"),
        (2, "2_Normalize", "sentence_transformers.models.Normalize"),
    ]
    pooling = json.loads((merged / "1_Pooling" / "config.json").read_text())
    assert pooling["pooling_mode_mean_tokens"] is True
    assert pooling["pooling_mode_lasttoken"] is False
    config = json.loads((merged / "config.json").read_text())
    assert config["architectures"] == ["LlamaModel"]
    with safe_open(merged / "model.safetensors", "pt") as weights:
        assert not [name for name in weights.keys() if name.startswith(("model.", "lm_head"))]  # noqa: SIM118
    for path in (merged, *merged.rglob("*"), merged.parent / "README.md"):
        assert oct(path.stat().st_mode & 0o777) == ("0o755" if path.is_dir() else "0o644"), path


@pytest.mark.parametrize(
    ("base", "hub"),
    [
        ("builtin:minilm", "sentence-transformers/all-MiniLM-L6-v2"),
        ("artifact:model/smollm2-4d5d87a7f352ccb2", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("somebody/minilm-of-their-own", None),  # whose licence nobody here knows
    ],
)
def test_the_card_names_built_in_bases_as_a_hub_does(
    world: support.World, tmp_path: Path, base: str, hub: str | None
) -> None:
    export_adapter(world.adapter, tmp_path / "out")
    config = tmp_path / "out" / "adapter_config.json"
    named = json.loads(config.read_text("utf-8")) | {"base_model_name_or_path": base}
    config.write_text(json.dumps(named), "utf-8")
    card = model_card(world.adapter, None, config.parent, None, "mine")
    licence = "other" if hub is None else "apache-2.0"
    told = f"license: {licence}\npipeline_tag: sentence-similarity\nbase_model: {hub or base}\n"
    assert told in card


def test_the_card_tells_data_settings_and_measures(
    world: support.World, tmp_path: Path, report: Artifact
) -> None:
    card = (
        export_adapter(world.adapter, tmp_path / "out", report=report).folder / "README.md"
    ).read_text("utf-8")
    assert card.startswith("---\nlibrary_name: peft\nlicense: other\n")
    for expected in (
        "arXiv 2411.07021",
        world.adapter.ref,
        world.base_artifact.ref,
        "- seed: 1",
        "recall@5",
        "0.250",
    ):
        assert expected in card, expected
    plain = (export_adapter(world.adapter, tmp_path / "plain").folder / "README.md").read_text(
        "utf-8"
    )
    assert "Not measured" in plain
    assert not (tmp_path / "plain" / "merged").exists()


def test_what_does_not_belong_together_is_refused(
    world: support.World, tmp_path: Path, report: Artifact
) -> None:
    with pytest.raises(MixedArtifactsError, match="does not measure"):
        export_adapter(world.other_adapter, tmp_path / "other", report=report)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(DataError, match="not empty"):
        export_adapter(world.adapter, tmp_path / "full")
    with pytest.raises(MixedArtifactsError, match="of kind 'model'"):
        open_adapter(world.base_artifact.uri)


def test_merged_weights_that_differ_are_refused(
    world: support.World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgets_to_merge(model: Any, folder: Path) -> Any:
        return model.unload()

    monkeypatch.setattr(adapters, "_merged", forgets_to_merge)
    with pytest.raises(ModelError, match=r"changes its outputs \(lowest cosine -?0\."):
        export_adapter(world.adapter, tmp_path / "out", merged=True)


def converter_on_path(folder: Path, monkeypatch: pytest.MonkeyPatch, *, then: str = "pass") -> None:
    """A program of llama.cpp's converter's name and arguments, which says what it was given."""
    folder.mkdir()
    program = folder / "convert_hf_to_gguf.py"
    program.write_text(
        f"#!{sys.executable}\n"
        "import pathlib, sys\n"
        "model, option, out, *rest = sys.argv[1:]\n"
        "assert option == '--outfile' and rest == ['--outtype', 'auto'], sys.argv\n"
        "names = sorted(path.name for path in pathlib.Path(model).iterdir())\n"
        "pathlib.Path(out).write_text(' '.join(names))\n"
        f"{then}\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def test_gguf_is_made_by_llama_cpps_own_converter(
    world: support.World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["export", world.adapter.uri, str(tmp_path / "out"), "--gguf"]
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    absent = CliRunner().invoke(app, command)
    assert absent.exit_code == 1
    assert "convert_hf_to_gguf.py" in absent.output
    assert not (tmp_path / "out").exists()
    converter_on_path(tmp_path / "bin", monkeypatch)
    made = CliRunner().invoke(app, command)
    assert made.exit_code == 0, made.output
    given = (tmp_path / "out" / "merged.gguf").read_text().split()
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(given)


def test_a_gguf_converter_that_fails_leaves_no_file(
    world: support.World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converter_on_path(tmp_path / "bin", monkeypatch, then="sys.exit('Model X is not supported')")
    with pytest.raises(ResourceError, match="Model X is not supported"):
        write_gguf(find_gguf_converter(), export_adapter(world.adapter, tmp_path / "out").folder)
    assert not list(tmp_path.glob("out.gguf*"))


def generator_of(world: support.World, precision: str) -> Artifact:
    plan = Plan("generator", "g", {"precision": precision}, {"base": world.base_artifact})

    def body(building: Building) -> None:
        support.write_adapter(building.path / "adapter", world.base, world.store, 7)
        building.info |= {
            "base": asdict(world.base),
            "precision": precision,
            "max_context": 200,
            "max_new_tokens": 8,
        }

    return world.get(plan, body)


def lowest_cosine(found: torch.Tensor, wanted: torch.Tensor) -> float:
    cosines = torch.nn.functional.cosine_similarity(found.double(), wanted.double(), dim=-1)
    return float(cosines.min())


def live_bytes() -> int:
    """Of all tensors in this process, shared memory once."""
    gc.collect()
    found = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
    storages = [x.untyped_storage() for x in found if x.device.type == "cpu"]
    return sum({one.data_ptr(): one.nbytes() for one in storages}.values())


@pytest.mark.parametrize(("precision", "alike"), [("fp32", 1.0 - 1e-6), ("bf16", 0.999)])
def test_merged_weights_are_written_in_parts_from_one_copy(
    world: support.World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    alike: float,
) -> None:
    dtype = torch_dtype(precision)
    base = AutoModelForCausalLM.from_pretrained(world.base.folder_or_name(world.store), dtype=dtype)
    whole = sum(weight.numel() * weight.element_size() for weight in base.parameters())
    adapter, parts, held = generator_of(world, precision), [], []
    write = modeling_utils.safe_save_file

    def noticing(tensors: dict[str, torch.Tensor], *args: Any, **options: Any) -> None:
        parts.append(sum(weight.numel() * weight.element_size() for weight in tensors.values()))
        held.append(live_bytes() - before)
        write(tensors, *args, **options)

    monkeypatch.setattr(modeling_utils, "safe_save_file", noticing)
    monkeypatch.setattr(export, "SHARD_BYTES", 700_000)
    before = live_bytes()
    made = export_adapter(adapter, tmp_path / "out", merged=True)

    assert len(parts) > 2
    assert sum(parts) == whole
    # The embeddings are one tensor, hence one file.
    assert sum(part > 700_000 for part in parts) == 1
    assert max(held) < 1.05 * whole
    assert made.merged is not None
    assert (made.merged / "model.safetensors.index.json").is_file()
    merged = AutoModelForCausalLM.from_pretrained(made.merged)
    assert {weight.dtype for weight in merged.parameters()} == {dtype}
    ids = torch.tensor([world.tokenizer("Who keeps the light of Arvon?")["input_ids"]])
    with torch.no_grad():
        bare, found = base(ids).logits, merged(ids).logits
        wanted = PeftModel.from_pretrained(base, made.folder)(ids).logits
    assert lowest_cosine(found, wanted) >= alike
    assert lowest_cosine(bare, wanted) < 0.999, "the adapter changes nothing"


def test_the_command(world: support.World, tmp_path: Path) -> None:
    found = CliRunner().invoke(
        app, ["export", world.adapter.uri, str(tmp_path / "out"), "--merged"]
    )
    assert found.exit_code == 0, found.output
    assert (
        "lowest cosine with the unmerged outputs 0.99999" in found.output
        or "1.0000000" in found.output
    )
    assert (tmp_path / "out" / "merged" / "model.safetensors").is_file()


class Hub(ThreadingHTTPServer):
    """Speaks as much of a model hub's protocol as an upload of small files takes."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.asked: list[tuple[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.refuses = False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Answers(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._send(404, {"error": "not here"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        self.server.asked.append((self.path, lines))
        if self.server.refuses:
            self._send(403, {"error": "no"})
        elif self.path == "/api/repos/create":
            self._send(200, {"url": f"{self.server.address}/me/mine"})
        elif "/preupload/" in self.path:
            paths = [entry["path"] for entry in lines[0]["files"]]
            self._send(
                200,
                {
                    "files": [
                        {"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths
                    ]
                },
            )
        elif "/commit/" in self.path:
            for line in lines:
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(
                        line["value"]["content"]
                    )
            place = f"{self.server.address}/me/mine/commit/{'0' * 40}"
            self._send(200, {"success": True, "commitOid": "0" * 40, "commitUrl": place})
        else:
            self._send(200, {})

    def _send(self, status: int, value: Any) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_test")
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_folder_is_pushed_as_it_is(world: support.World, tmp_path: Path, hub: Hub) -> None:
    made = export_adapter(world.adapter, tmp_path / "out")
    place = push_folder(made.folder, "me/mine", endpoint=hub.address)
    assert place.endswith("/me/mine/commit/" + "0" * 40)
    wanted = {
        path.relative_to(made.folder).as_posix(): path.read_bytes()
        for path in made.folder.rglob("*.*")
    }
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= wanted.keys()
    assert hub.files == wanted
    created = next(lines[0] for path, lines in hub.asked if path == "/api/repos/create")
    assert created["name"] == "mine"
    assert created.get("private") or created.get("visibility") == "private", (
        "nobody else sees it unless asked"
    )


def test_a_push_that_cannot_be_is_one_error(tmp_path: Path, hub: Hub) -> None:
    (tmp_path / "README.md").write_text("x")
    hub.refuses = True
    with pytest.raises(ResourceError, match="did not take me/mine") as caught:
        push_folder(tmp_path, "me/mine", endpoint=hub.address)
    assert "HF_TOKEN" in str(caught.value)
    with pytest.raises(DataError, match="is no name of a repository"):
        push_folder(tmp_path, "me/mine/too/long", endpoint=hub.address)


def test_a_retriever_of_the_first_layers_is_exported_as_such(tmp_path: Path) -> None:
    small = support.World(
        tmp_path / "world", "experimental.model.tiny.num_layers=3", "model.retriever_layers=2"
    )
    made = export_adapter(small.adapter, tmp_path / "out", merged=True)
    base = small.base.folder_or_name(small.store)
    spec = EncoderSpec.from_json(small.adapter.info["encoder"])
    [wanted] = torch.from_numpy(
        open_encoder(spec, small.store).encode_queries(["in the north sound"])
    )
    row = torch.tensor(
        [[*small.tokenizer("in the north sound")["input_ids"], small.tokenizer.eos_token_id]]
    )

    merged = AutoModel.from_pretrained(made.merged, dtype=torch.float32)
    assert len(merged.layers) == 2
    # PEFT on the whole base: the adapter lies on the first two layers only, and their states are
    # the same.
    whole = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), made.folder
    )
    body = whole.get_base_model().model
    assert not any("lora" in name for name, _ in body.layers[2].named_parameters())
    with torch.inference_mode():
        states = [
            merged(row).last_hidden_state,
            body.norm(body(row, output_hidden_states=True).hidden_states[2]),
        ]
    for state in states:
        found = torch.nn.functional.normalize(state[0].mean(dim=0), dim=-1)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert made.lowest_cosine is not None
    assert made.lowest_cosine > 0.99999


def test_more_layers_than_the_base_has_are_refused(tmp_path: Path) -> None:
    small = support.World(
        tmp_path, "experimental.model.tiny.num_layers=1", "model.retriever_layers=2"
    )
    with pytest.raises(
        ModelError, match=r"retriever_layers is 2.*between 1 and the base's 1 layers"
    ):
        open_encoder(small.base_spec, small.store)
