"""The templates in cluster/: valid by Ray's own schemas, and in step with the package."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from invar_ray.config import load_config, recipe_names

ROOT = Path(__file__).parents[3]
CLUSTER = ROOT / "cluster"
KUBERAY = sorted((CLUSTER / "kuberay").glob("*.yaml"))


def load(path: Path) -> dict[str, Any]:
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(values, dict)
    return values


def cluster_spec(manifest: dict[str, Any]) -> dict[str, Any]:
    spec = manifest["spec"]
    return {
        "RayCluster": spec,
        "RayJob": spec.get("rayClusterSpec"),
        "RayService": spec.get("rayClusterConfig"),
    }[manifest["kind"]]


def pod_groups(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    spec = cluster_spec(manifest)
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def pinned(name: str) -> str:
    match = re.search(
        rf"^{name}==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert match is not None
    return match.group(1)


def test_ray_up_fits_rays_schema() -> None:
    import ray

    schema_file = Path(ray.__file__).parent / "autoscaler" / "ray-schema.json"
    schema = json.loads(schema_file.read_text(encoding="utf-8"))
    values = load(CLUSTER / "ray-up.yaml")
    jsonschema.validate(values, schema)
    with pytest.raises(jsonschema.ValidationError):  # the schema does refuse what it does not know
        jsonschema.validate({**values, "no_such_key": 1}, schema)


def test_ray_up_node_types() -> None:
    values = load(CLUSTER / "ray-up.yaml")
    types = values["available_node_types"]
    assert values["head_node_type"] in types
    workers = [kind for name, kind in types.items() if name != values["head_node_type"]]
    assert sum(kind["max_workers"] for kind in workers) <= values["max_workers"]


def test_serve_config_fits_serves_schema() -> None:
    from ray.serve.schema import ServeDeploySchema

    from serve.app import AppArgs

    manifest = load(CLUSTER / "kuberay" / "rayservice.yaml")
    text = manifest["spec"]["serveConfigV2"]
    assert isinstance(text, str)
    values = yaml.safe_load(text)
    schema = ServeDeploySchema.model_validate(values)
    # it ignores unknown keys, so look for them here
    assert set(values) <= set(ServeDeploySchema.model_fields)
    application = schema.applications[0]
    assert application.import_path == "serve.app:build_app"
    args = AppArgs.model_validate(application.args)
    assert args.require_api_key  # the cluster's network reaches it
    assert schema.http_options.host == "0.0.0.0"
    # The fewest replicas fit on the fewest nodes, the most on the most.
    (group,) = cluster_spec(manifest)["workerGroupSpecs"]
    gpus = int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    for which, nodes in enumerate([group["minReplicas"], group["maxReplicas"]]):
        replicas = args.retriever_replicas[which] + args.generator_replicas[which]
        assert replicas * args.num_gpus_per_replica <= nodes * gpus


@pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.stem)
def test_kuberay_manifests(path: Path) -> None:
    manifest = load(path)
    assert manifest["apiVersion"] == "ray.io/v1"
    assert manifest["kind"].lower() == path.stem
    spec = cluster_spec(manifest)
    assert spec["rayVersion"] == pinned("ray")
    assert spec["authOptions"] == {"mode": "token"}
    for group in pod_groups(manifest):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        for container in pod["containers"]:
            resources = container["resources"]
            assert resources["requests"] == resources["limits"]
            mounts = {mount["name"] for mount in container.get("volumeMounts", [])}
            assert mounts <= {volume["name"] for volume in pod.get("volumes", [])}
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_the_job_runs_a_recipe_with_known_overrides_on_the_gpus_it_asks_for() -> None:
    manifest = load(CLUSTER / "kuberay" / "rayjob.yaml")
    words = shlex.split(manifest["spec"]["entrypoint"])
    assert words[:4] == ["python", "-m", "jobs.run_pipeline", "--config"]
    assert words[4] in recipe_names()
    config = load_config(words[4], words[5:])
    groups = cluster_spec(manifest)["workerGroupSpecs"]
    gpus, cpus = 0, 0
    for group in groups:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        gpus += group["replicas"] * int(limits["nvidia.com/gpu"])
        cpus += group["replicas"] * int(limits["cpu"])
    assert config.scale.num_workers == gpus
    assert config.scale.most_embed_workers * config.scale.embed_gpus_per_worker == gpus
    assert config.scale.num_workers * config.scale.cpus_per_worker < cpus


def test_one_ray_and_one_python_version() -> None:
    text = (CLUSTER / "Dockerfile").read_text(encoding="utf-8")
    assert f"ARG RAY_VERSION={pinned('ray')}\n" in text
    assert "-py311-" in text
    for name in re.findall(r"^COPY --chown=\S+ (.+) \S+$", text, re.MULTILINE):
        for source in name.split():
            assert (ROOT / source).exists(), f"the Dockerfile copies {source}"


def test_images_carry_the_package_version() -> None:
    from invar_ray import __version__

    texts = [
        path.read_text(encoding="utf-8")
        for path in [*KUBERAY, CLUSTER / "ray-up.yaml", CLUSTER / "Dockerfile"]
    ]
    versions = {
        version for text in texts for version in re.findall(r"invar-ray:([0-9.]+)-[cg]pu", text)
    }
    assert versions == {__version__}
