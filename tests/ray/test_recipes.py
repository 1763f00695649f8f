"""The recipes for clusters, themselves: corpus to served answer on CPUs, in the precision and by
the code that GPUs would run.

What differs from the command in a recipe's head: the path of the base (a small random model of the
same family), sizes, counts, addresses, and numbers of GPUs (0).
"""

from __future__ import annotations

import math
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from invar_ray.cli.serving import start_service, stop_service
from invar_ray.config import load_config
from invar_ray.models import loading
from invar_ray.models.precision import made_in
from invar_ray.pipeline import Pipeline
from invar_ray.store.artifacts import Store
from serve.client import ask
from tests.support import ISLANDS, save_llama, write_inputs

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
QUESTION = f"What do farmers grow on {ISLANDS[3]}?"
_SCALED = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama3_8b": {"num_attention_heads": 8, "rope_parameters": _SCALED},
    "llama2_7b": {"num_key_value_heads": 4},
    "smollm2_135m": {
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "hidden_size": 48,
        "tie_word_embeddings": True,
    },
}
SMALL = [
    # addresses
    "scale.ray_address=null",
    "serve.port=0",
    # numbers of GPUs
    "scale.use_gpu=false",
    "scale.embed_gpus_per_worker=0",
    "serve.num_gpus_per_replica=0",
    # sizes and counts
    "scale.num_workers=2",
    "scale.cpus_per_worker=0.5",
    "scale.embed_workers=1",
    "scale.shard_rows=32",
    "serve.num_cpus_per_replica=0.2",
    "retriever.steps=3",
    "retriever.global_batch_size=6",
    "generator.steps=3",
    "generator.global_batch_size=4",
    "generator.max_new_tokens=4",
    "evaluation.num_answers=3",
]


def small(folder: Path, recipe: str) -> list[str]:
    """What of a recipe is changed."""
    base = save_llama(folder / "base", **({"max_position_embeddings": 2048} | FAMILIES[recipe]))
    given = [f"model.base={base}", f"storage.root_uri={folder / 's'}", *write_inputs(folder)]
    if recipe != "smollm2_135m":  # the share of a rank is then several parts
        given.append("scale.train_tokens_per_chunk=512")
    return [*given, *SMALL]


# Actors start slower than models this small work: what is not trained is done in this process, and
# one worker trains. The slow test below has two, and actors for everything, as on a cluster.
NEAR = ["scale.in_process_below=1000", "scale.num_workers=1"]


def check_run(store: Store, precision: str) -> None:
    """Everything that a model made was made in the precision, and training moved it."""
    (generator,) = store.list("generator")
    (retriever,) = store.list("retriever")
    vectors = {each.manifest.name: each for each in store.list("vectors")}
    indexes = {each.manifest.name: each for each in store.list("index")}
    assert vectors.keys() == indexes.keys() == {"minilm", "base", "retriever"}
    for name in vectors:
        wanted = "fp32" if name == "minilm" else precision
        assert made_in(vectors[name]) == made_in(indexes[name]) == wanted
    assert made_in(retriever) == made_in(generator) == precision
    for adapter in (retriever, generator):
        state = load_file(adapter.path("adapter/adapter_model.safetensors"))
        moved = [value for name, value in state.items() if "lora_B" in name]
        assert moved
        # Kept in fp32 while training in bf16: steps below bf16's grid are not lost.
        assert all(float(value.abs().max()) > 0 for value in moved)
        assert any(not torch.equal(value, value.bfloat16().float()) for value in moved)
        assert adapter.info["steps"] == 3
        assert math.isfinite(adapter.info["final"]["loss"])


def check_answer(url: str, passages: int = 5) -> None:
    """The service finds and generates; what its prompt had no room for is said."""
    answer = ask(url, QUESTION)
    assert len(answer["passages"]) == passages
    assert any("left out" in note for note in answer["notes"]) == (passages < 5)
    assert isinstance(answer["answer"], str)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, torch.dtype]]:
    """Every model that this process loads, and what its weights are held in."""
    found: list[tuple[str, torch.dtype]] = []
    real = loading.load_weights

    def watched(*arguments: Any, **options: Any) -> PreTrainedModel:
        model = real(*arguments, **options)
        found.extend({(type(model).__name__, weight.dtype) for weight in model.parameters()})
        return model

    monkeypatch.setattr(loading, "load_weights", watched)
    return found


def test_llama3_8b_from_corpus_to_served_answer(
    local_ray: Any, tmp_path: Path, loaded: list[tuple[str, torch.dtype]]
) -> None:
    """This test must never go red: it is what whoever pays for eight GPUs relies on."""
    config = load_config("llama3_8b", [*small(tmp_path, "llama3_8b"), *NEAR])
    recipe = load_config("llama3_8b", [])
    assert (config.model.precision, config.model.pooling) == ("bf16", "last")
    assert config.model.projection_dim == recipe.model.projection_dim == 768
    assert (config.scale.zero_stage, config.index.factory) == (2, "auto")
    with Pipeline(config, quiet=True) as pipeline:
        report = pipeline.run()
        assert [row.system for row in report.rows] == [
            "MiniLM",
            "base",
            "base, closed book",
            "base, oracle passage",
            "stage 1",
            "stage 1, rewrites fused",
            "both stages",
            "both stages, closed book",
            "both stages, oracle passage",
            "both stages, document gone",
        ]
        check_run(pipeline.store, "bf16")
        projection = load_file(pipeline.retriever.path("adapter/projection.safetensors"))["weight"]
        assert projection.shape == (768, 32)
        assert pipeline.index.info["dimension"] == 768
        assert pipeline.index.info["recall_at_10"] == 1.0, "the planner chose it, and measured it"
        assert {dtype for name, dtype in loaded if name.startswith("Llama")} == {torch.bfloat16}
        url = start_service(pipeline.index, pipeline.generator, config, log_level="WARNING")
        try:
            check_answer(url)
        finally:
            stop_service()


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("recipe", FAMILIES)
def test_each_recipe_as_jobs_with_all_work_on_actors(recipe: str, tmp_path: Path) -> None:
    given = ["--config", recipe, *small(tmp_path, recipe)]
    made = subprocess.run(
        [sys.executable, "-m", "jobs.run_pipeline", *given],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert made.returncode == 0, made.stdout[-3000:] + made.stderr[-3000:]
    assert "both stages" in made.stdout
    store = Store(str(tmp_path / "s"))
    check_run(store, load_config(recipe, []).model.precision.replace("auto", auto_of(store)))

    log = tmp_path / "serve.log"
    with open(log, "w") as stream:
        job = subprocess.Popen(
            [sys.executable, "-m", "jobs.serve_answers", *given],
            cwd=ROOT,
            stdout=stream,
            stderr=stream,
        )
    try:
        deadline = time.monotonic() + 600
        while not (found := re.search(r"serving at (\S+)", log.read_text())):
            assert job.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        # smollm2_135m's prompts have 512 tokens: three of this corpus's passages.
        check_answer(found[1], passages=3 if recipe == "smollm2_135m" else 5)
        job.send_signal(signal.SIGINT)
        assert job.wait(timeout=120) == 0, log.read_text()  # Ctrl-C is how serving ends
    finally:
        job.kill()


def auto_of(store: Store) -> str:
    """What ``precision: auto`` came to."""
    return next((each.info["precision"] for each in store.list("precision")), "")
