"""``invar-ray serve`` before Ray starts: what stands is found, nothing is made, port and keys are
checked.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from invar_ray.cli.serving import example_questions, serve_until_stopped, service_args
from invar_ray.config import Config, ServeConfig, StorageConfig, load_config, recipe_names
from invar_ray.errors import ConfigError, InvarError, MissingArtifactError, ResourceError
from invar_ray.executor import Here
from invar_ray.pipeline import Pipeline
from invar_ray.steps import readings
from invar_ray.steps.questions import load_examples
from invar_ray.store.artifacts import Building, Plan, open_artifact
from serve.http.keys import ApiKey
from tests.serving import Artifacts, Live, shared_artifacts
from tests.support import World, small_config


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    return shared_artifacts(tmp_path_factory)


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield int(listening.getsockname()[1])


@pytest.fixture(autouse=True)
def _no_ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert not ray.is_initialized()
    yield
    assert not ray.is_initialized()


def config(folder: Path, port: int = 0) -> Config:
    return replace(
        Config(),
        storage=StorageConfig(str(folder)),
        serve=ServeConfig(port=port),
    )


def test_serving_makes_nothing(tmp_path: Path) -> None:
    settings = small_config(tmp_path)
    store = Path(settings.storage.root_uri)
    with pytest.raises(MissingArtifactError, match=f"no index below {store}"):
        serve_until_stopped(settings)
    assert not store.exists()
    with Pipeline(settings, quiet=True, executor=Here()) as making:
        index = making.base_index
    before = sorted(store.rglob("*"))
    with pytest.raises(MissingArtifactError, match=f"no generator of the base of {index.ref}"):
        serve_until_stopped(settings)
    assert sorted(store.rglob("*")) == before


def test_a_taken_port_shows_before_ray_starts(
    artifacts: Artifacts, tmp_path: Path, taken: int
) -> None:
    with pytest.raises(
        ResourceError, match=f"cannot listen on 127.0.0.1:{taken}.* To do: choose another port"
    ):
        serve_until_stopped(config(tmp_path, taken), artifacts.index_uri, artifacts.generator_uri)


@pytest.mark.parametrize("name", ["INVAR_API_KEY", "INVAR_API_KEYS"])
def test_wrong_keys_show_before_ray_starts(
    name: str, artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, " \n")
    with pytest.raises(ConfigError, match=f"^{name} is set and empty"):
        serve_until_stopped(config(tmp_path), artifacts.index_uri, artifacts.generator_uri)


def test_artifacts_that_are_not_there_show_before_ray_starts(
    artifacts: Artifacts, tmp_path: Path
) -> None:
    for index, generator in (
        (f"{tmp_path}/index/x-1", artifacts.generator_uri),
        (artifacts.index_uri, str(tmp_path)),
    ):
        with pytest.raises(InvarError):
            serve_until_stopped(config(tmp_path), index, generator)
    assert not list(tmp_path.iterdir())


def test_the_page_offers_dev_questions_of_the_generator_s_run(
    artifacts: Artifacts, tmp_path: Path
) -> None:
    small = World(tmp_path)
    found = small.hits(small.base_index, "train")
    read = small.step(
        "readings",
        readings.plan(small.config, found, small.passages),
        lambda to: readings.build(to, found, small.passages),
    )
    plan = Plan("generator", "asked", {}, {"readings": read})
    generator, _ = small.store.get_or_build(plan, lambda building: None)
    dev = [example.question for example in load_examples(small.questions, "dev")]
    offered = example_questions(small.base_index, generator)
    assert len(offered) == 4
    assert len(set(offered)) == 4
    assert set(offered) <= set(dev)
    # What a report shows as right and given is offered first.
    told = [
        {"refused": [False], "unsure": [False], "texts": ["the answer"], "answers": ["answer"]},
        {"refused": [False], "unsure": [True], "texts": ["the answer"], "answers": ["answer"]},
        {"refused": [False], "unsure": [False], "texts": ["another"], "answers": ["answer"]},
    ]

    def write(building: Building) -> None:
        lines = [
            json.dumps({"system": "both stages", "question": question} | how)
            for question, how in zip(dev[::-1], told, strict=False)
        ]
        (building.path / "answers.jsonl").write_text("\n".join(lines))

    reported = Plan("report", "asked", {}, {"generator/both stages": generator})
    small.store.get_or_build(reported, write)
    offered = example_questions(small.base_index, generator)
    assert offered[0] == dev[-1]
    assert len(set(offered)) == 4
    other = open_artifact(artifacts.index_uri, "index")
    assert example_questions(other, generator) == [], "they are of other documents"
    bare = open_artifact(artifacts.generator_uri, "generator")
    assert example_questions(other, bare) == []
    shutil.rmtree(Path(small.questions.path()))
    assert example_questions(small.base_index, generator) == []


def test_a_key_that_is_bound_to_passages_sees_no_examples(artifacts: Artifacts) -> None:
    where = {"equals": {"tenant": "sea"}}
    keys = [
        ApiKey(name=name, sha256=hashlib.sha256(name.encode()).hexdigest(), **more)
        for name, more in (("free", {}), ("bound", {"where": where}))
    ]
    live = Live(
        artifacts, shards=[artifacts.tenants_index_uri], keys=keys, examples=["When does it leave?"]
    )
    try:
        for name, expected in (("free", ["When does it leave?"]), ("bound", [])):
            served = live("GET", "/v1/index", headers={"X-API-Key": name}).json()
            assert served["examples"] == expected
    finally:
        live.close()


@pytest.mark.parametrize("recipe", recipe_names())
def test_the_service_takes_what_a_recipe_says_of_it(artifacts: Artifacts, recipe: str) -> None:
    index = open_artifact(artifacts.index_uri, "index")
    generator = open_artifact(artifacts.generator_uri, "generator")
    settings = load_config(recipe, ["search.mode=dense"])
    args = service_args(index, generator, settings)
    assert (args.mode, args.top_k) == ("dense", settings.serve.top_k)
    assert args.max_new_tokens == 32, "this generator does not say how long its answers are"


@pytest.mark.parametrize(("cores", "most"), [(1, 1), (2, 1), (6, 3), (64, 4)])
def test_no_more_replicas_than_the_machine_has_cores_for(
    artifacts: Artifacts, cores: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = open_artifact(artifacts.index_uri, "index")
    generator = open_artifact(artifacts.generator_uri, "generator")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    args = service_args(index, generator, load_config("demo"))
    assert args.retriever_replicas == args.generator_replicas == (1, most)
    assert args.reranker_replicas == (1, most)
    assert args.ingress_replicas == (1, min(most, 2))
    joined = service_args(index, generator, load_config("demo", ["scale.ray_address=auto"]))
    assert joined.generator_replicas == (1, 4), "nodes may come"
