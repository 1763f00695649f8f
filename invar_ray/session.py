"""Ray for the length of a run: the cluster that is there, or a local one."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import ray
from ray._common import tls_utils
from ray._private import ray_constants
from ray._private import state as ray_state
from ray._private import worker as ray_worker
from ray._private.ray_logging import global_worker_stdstream_dispatcher

from invar_ray import console
from invar_ray.config import ScaleConfig
from invar_ray.errors import ResourceError

_WORKERS_START_S = "300"
"""How long to wait for training workers to start, in seconds; 60, Ray's default, is exceeded on
loaded machines."""
_NODES_JOIN_S = 20.0
"""Nodes of a cluster that is coming up have so long to join before work is refused."""
_LOCAL_CPUS = 4
"""Fewest logical CPUs of a local Ray (Ray schedules by these numbers; they may exceed the machine's
cores)."""
TEMP_CHARS = 24
"""Longest path of the temporary folder: a socket's name may have 107 characters, and Ray adds
about 80."""
_WORKER_ENV = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Batches of ever other shapes leave glibc's heap full of holes: large blocks go back to the
    # system when freed.
    "MALLOC_MMAP_THRESHOLD_": "1048576",
    "MALLOC_ARENA_MAX": "2",
    # Libraries' own progress bars and notices would drown a run's.
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore::FutureWarning,ignore::DeprecationWarning",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # it prints every line twice
    # For the service's proxies: Serve's own refusals take the service's form.
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.front:middlewares",
    # A proxy that died is replaced after the third check that finds it so, 10 s apart otherwise;
    # and one that takes long to start, on a busy machine, is not given up and started anew.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
}


def quieten_worker() -> None:
    """Runs first in each worker of a local Ray: drops a warning a second that its dashboard, which
    is off, would prevent, and Ray Train's own line for each report.
    """
    place = "ray.train.v2._internal.execution"
    logging.getLogger(f"{place}.controller.placement_group_cleaner").setLevel(logging.ERROR)
    logging.getLogger(f"{place}.context").setLevel(logging.WARNING)
    console.in_worker = True
    # Serve's replicas listen on every address for each other, without a setting; they read this
    # function when they are imported, which is later.
    tls_utils.add_port_to_grpc_server = partial(_on_loopback, tls_utils.add_port_to_grpc_server)


def _on_loopback(listen: Callable[[Any, str], int], server: Any, address: str) -> int:
    return listen(server, address.replace("[::]:", "127.0.0.1:"))


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep the entry point's SIGTERM handler: Ray puts its own there, which exits with 15 and says
    nothing.
    """
    handler = signal.getsignal(signal.SIGTERM)
    mine = callable(handler) and threading.current_thread() is threading.main_thread()
    try:
        yield
    except SystemExit as error:
        if mine and error.code == signal.SIGTERM:
            raise KeyboardInterrupt from None
        raise
    finally:
        if mine:
            signal.signal(signal.SIGTERM, handler)


@contextlib.contextmanager
def _no_token_notice() -> Iterator[None]:
    """Drop Ray's warning that it asks its clients for a token (it lies in ``~/.ray/auth_token``): a
    local Ray has none but those of the README, which speaks of it.
    """
    logger = logging.getLogger("ray._private.authentication.authentication_token_setup")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class RaySession:
    """Connects to Ray when first needed, and stops what it started.

    With ``scale.ray_address`` or the environment's ``RAY_ADDRESS`` (set inside ``ray job submit``)
    it joins that cluster and leaves it running; otherwise it starts a local Ray with its own ports
    and folder, on loopback, and stops it at the end.
    """

    def __init__(self, scale: ScaleConfig) -> None:
        self._scale = scale
        self._started = False
        self._folder: str | None = None
        self._home: str | None = None

    @property
    def joins(self) -> bool:
        """Whether it joins a cluster instead of starting a Ray of its own."""
        return self._scale.ray_address is not None or bool(os.environ.get("RAY_ADDRESS"))

    def ensure(self) -> None:
        """Connect unless connected.

        Raises:
            ResourceError: there is no Ray at the address to join.
        """
        if ray.is_initialized():
            return
        # Ray Train's controller reads it from this environment.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", _WORKERS_START_S)
        address = self._scale.ray_address or os.environ.get("RAY_ADDRESS")
        with _own_sigterm(), _no_token_notice():
            if address:
                _join(address)
            else:
                self._start_local()
        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        self._started = True

    def _start_local(self) -> None:
        self._folder = _ray_folder()
        self._home = os.environ.get("HOME")
        if not _can_write(os.path.expanduser("~")):
            # Ray keeps its token there; a container of any user has no home of its own.
            os.environ["HOME"] = self._folder
        # Ray opens its folder to everybody (0777): one within stays behind this one's 0700, also
        # where a kill leaves it behind.
        folder = os.path.join(self._folder, "r")
        # Ray takes the machine's outer address on Linux, and its ports let whoever reaches them run
        # code. This is its switch for other systems, where it stays on loopback.
        ray_constants.ENABLE_RAY_CLUSTER = False
        try:
            with _no_notices_of_the_core():
                self._init_local(folder)
        except Exception as error:  # Ray's own is a bare one
            lines = str(error).strip().splitlines() or [repr(error)]
            raise ResourceError(
                f"Ray did not start on this machine ({lines[0]})",
                action="close other programs and run it again; -v shows what Ray says",
            ) from error
        # What workers print goes through the console instead of Ray's own printer.
        global_worker_stdstream_dispatcher.remove_handler("ray_print_logs")
        global_worker_stdstream_dispatcher.add_handler("invar_ray", _hear)
        # Its reports of actors that died, ours at the end among them, take this way instead.
        ray_worker.print_to_stdstream = lambda batch, *_, **__: _hear(batch)

    def _init_local(self, folder: str) -> None:
        ray.init(
            address="local",  # never one that somebody else left an address of
            num_cpus=_local_cpus(self._scale),
            include_dashboard=False,
            log_to_driver=True,
            logging_level="warning",
            _temp_dir=folder,
            runtime_env={
                "env_vars": _WORKER_ENV
                | ({"INVAR_VERBOSE": "1"} if console.is_verbose() else {})
                | ({} if self._scale.use_gpu else {"DS_ACCELERATOR": "cpu"}),
                "worker_process_setup_hook": "invar_ray.session.quieten_worker",
            },
        )

    def close(self) -> None:
        """Disconnect, and stop a Ray that :meth:`ensure` started."""
        # also where ray.init was interrupted half way
        if self._started or self._folder is not None:
            ray.shutdown()
            self._started = False
        global_worker_stdstream_dispatcher.remove_handler("invar_ray")
        if self._folder is not None:
            if self._home is not None:
                os.environ["HOME"] = self._home
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


@contextlib.contextmanager
def _no_notices_of_the_core() -> Iterator[None]:
    """Start Ray so that its C++ side writes no notices between a run's lines: with its level set,
    which it reports itself, on the standard error that is turned away for that long.  What fails is
    raised, and stands in Ray's own files.
    """
    if console.is_verbose():
        yield
        return
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _hear(batch: dict[str, Any]) -> None:
    """Lines of one worker, as Ray's log monitor hands them on."""
    for line in batch["lines"]:
        console.from_worker(line)


def _can_write(folder: str) -> bool:
    return os.access(folder, os.W_OK | os.X_OK)


def _ray_folder() -> str:
    """A folder for a local Ray whose path leaves room for its sockets' names.

    Raises:
        ResourceError: there is none.
    """
    places = [tempfile.gettempdir(), "/tmp"]
    for place in places:
        if len(os.path.abspath(place)) <= TEMP_CHARS and _can_write(place):
            return tempfile.mkdtemp(prefix="invar-ray-", dir=place)
    raise ResourceError(
        f"no temporary folder fits a local Ray: {places[0]} has {len(places[0])} characters, and "
        "/tmp cannot be written",
        expected=f"one of at most {TEMP_CHARS} characters (names of sockets are short)",
        action="set TMPDIR to a shorter path",
    )


def _local_cpus(scale: ScaleConfig) -> int:
    """Logical CPUs of a local Ray: what the workers ask for, and two for what feeds them."""
    training = scale.num_workers if isinstance(scale.num_workers, int) else scale.num_workers[1]
    workers = max(training, scale.most_embed_workers)
    return max(_LOCAL_CPUS, math.ceil(workers * scale.cpus_per_worker) + 2)


def _join(address: str) -> None:
    try:
        ray.init(address=address, ignore_reinit_error=True, log_to_driver=True)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ResourceError(
            f"cannot join Ray at {address} ({str(error).strip().splitlines()[0]})",
            action="start it (ray start --head), or correct scale.ray_address or RAY_ADDRESS",
        ) from error


Bundle = Mapping[str, float]
"""What one actor asks for: ``CPU``, ``GPU``, and ``memory`` in bytes."""


def placed(nodes: Sequence[Bundle], bundles: Sequence[Bundle]) -> int:
    """How many of the bundles find room at the same time on nodes that do nothing else: the largest
    first, each on the first node that has room.
    """
    left = [dict(node) for node in nodes]
    count = 0
    for bundle in sorted(
        bundles, key=lambda each: (each.get("GPU", 0), each.get("CPU", 0)), reverse=True
    ):
        for node in left:
            if all(node.get(name, 0) >= amount - 1e-9 for name, amount in bundle.items()):
                for name, amount in bundle.items():
                    node[name] = node.get(name, 0) - amount
                count += 1
                break
    return count


def check_room(label: str, bundles: Sequence[Bundle], action: str) -> None:
    """Refuse work that the connected Ray could never place: Ray would wait for ever, without a
    word.  What others use at the moment counts as room, since they give it back.

    Args:
        label: what is asked for, for the message.
        bundles: one for each actor; all must be placed at the same time.
        action: what to do where they do not fit.

    Raises:
        ResourceError: they do not fit on the nodes that are there after some seconds, and no node
            is added on demand.
    """
    deadline = time.monotonic() + _NODES_JOIN_S
    while True:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        fitting = placed(nodes, bundles)
        # Where an autoscaler adds nodes, Ray Train compares with the most that it may add.
        if fitting == len(bundles) or ray_state.state.get_max_resources_from_cluster_config():
            return
        if time.monotonic() > deadline:
            break
        time.sleep(1.0)
    memory = any("memory" in bundle for bundle in bundles)
    raise ResourceError(
        f"{label} asks for {_told(bundles, memory=memory)}; Ray has room for {fitting} of these "
        f"{len(bundles)} (nodes: {_told(nodes, memory=memory) or 'none'})",
        action=action,
    )


def _told(bundles: Sequence[Bundle], *, memory: bool) -> str:
    """``8 x (8 CPUs, 1 GPU)``: equal ones together; with their ``memory`` where that counts."""
    texts = [
        ", ".join(
            f"{bundle[name]:g} {name}{'s'[: bundle[name] != 1]}"
            for name in ("CPU", "GPU")
            if bundle.get(name)
        )
        + (f", {bundle['memory'] / 1e9:.3g} GB" if memory and bundle.get("memory") else "")
        for bundle in bundles
    ]
    return " and ".join(f"{texts.count(text)} x ({text})" for text in dict.fromkeys(texts))
