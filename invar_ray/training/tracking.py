"""Scalars of a run for TensorBoard, MLflow or W&B; only rank 0 writes.

Ray Train V2 takes no Tune callbacks, so the loop writes by itself.  Every number of ``log.jsonl``
is a scalar under its own name, over the optimizer step; a resumed run goes on in the same place.
"""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from invar_ray.errors import ResourceError
from invar_ray.store.files import join_uri, resolve_uri

_PACKAGES = {"tensorboard": "tensorboardX", "mlflow": "mlflow", "wandb": "wandb"}


class Tracker(Protocol):
    """Where scalars go."""

    def log(self, record: Mapping[str, Any]) -> None:
        """One step's numbers; ``step`` is among them."""
        ...

    def flush(self) -> None:
        """Make what was logged durable; called with each checkpoint."""
        ...

    def close(self) -> None:
        """After the last step, or after a failure."""
        ...


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers whose package is missing, before anything is trained.

    Raises:
        ResourceError: naming the package.
    """
    for name in names:
        if importlib.util.find_spec(_PACKAGES[name]) is None:
            raise ResourceError(
                f"scale.trackers asks for {name!r}, but the package {_PACKAGES[name]} is not "
                "installed",
                action=f"pip install {_PACKAGES[name]} on every node, or take {name!r} out of "
                "scale.trackers",
            )


def open_trackers(
    names: Sequence[str], root_uri: str, run: str, settings: Mapping[str, Any], first_step: int
) -> list[Tracker]:
    """Open the named trackers.

    Args:
        names: of ``tensorboard``, ``mlflow``, ``wandb``.
        root_uri: of the store; TensorBoard's files go below its ``tensorboard/``.
        run: name of the run; the same after a restart.
        settings: the run's config as plain values, shown beside the curves where the tracker can.
        first_step: steps that are done; curves of a cut-off attempt beyond it are replaced.
    """
    check_trackers(names)
    made: list[Tracker] = []
    for name in names:
        if name == "tensorboard":
            made.append(_TensorBoard(root_uri, run, first_step))
        elif name == "mlflow":
            made.append(_Mlflow(run, settings))
        else:
            made.append(_Wandb(run, settings))
    return made


class _TensorBoard:
    """Event files through tensorboardX, which needs neither torch's TensorBoard nor TensorFlow.

    Its ``SummaryWriter`` is not used: it writes from a thread, and its ``flush`` does not wait for
    that.
    """

    def __init__(self, root_uri: str, run: str, first_step: int) -> None:
        self._target = join_uri(root_uri, f"tensorboard/{run}")
        self._temporary = "://" in root_uri
        self._folder = Path(
            tempfile.mkdtemp(prefix="invar-tensorboard-") if self._temporary else self._target
        )
        self._folder.mkdir(parents=True, exist_ok=True)
        self._events = importlib.import_module("tensorboardX.proto.event_pb2")
        self._summary = importlib.import_module("tensorboardX.proto.summary_pb2")
        writer = importlib.import_module("tensorboardX.event_file_writer").EventsWriter
        # Names go by the second: the suffix keeps a quick restart from writing over the first
        # attempt's file.
        self._writer = writer(str(self._folder / "events"), f".{first_step}")
        if first_step:
            start = self._events.SessionLog(status=self._events.SessionLog.START)
            self._writer.write_event(
                self._events.Event(wall_time=time.time(), step=first_step + 1, session_log=start)
            )

    def log(self, record: Mapping[str, Any]) -> None:
        values = [
            self._summary.Summary.Value(tag=key, simple_value=value)
            for key, value in _scalars(record).items()
        ]
        summary = self._summary.Summary(value=values)
        self._writer.write_event(
            self._events.Event(wall_time=time.time(), step=record["step"], summary=summary)
        )

    def flush(self) -> None:
        self._writer.flush()
        if self._temporary:
            filesystem, prefix = resolve_uri(self._target)
            filesystem.create_dir(prefix, recursive=True)
            for path in self._folder.iterdir():
                with filesystem.open_output_stream(f"{prefix}/{path.name}") as stream:
                    stream.write(path.read_bytes())

    def close(self) -> None:
        self.flush()
        self._writer.close()
        if self._temporary:
            shutil.rmtree(self._folder, ignore_errors=True)


class _Mlflow:
    """A run in the server or folder that ``MLFLOW_TRACKING_URI`` names."""

    def __init__(self, run: str, settings: Mapping[str, Any]) -> None:
        self._mlflow = importlib.import_module("mlflow")
        # A restarted run goes on where the cut-off one stopped.
        found = self._mlflow.search_runs(
            filter_string=f"tags.`mlflow.runName` = '{run}'",
            output_format="list",
            search_all_experiments=True,
        )
        self._mlflow.start_run(run_id=found[0].info.run_id if found else None, run_name=run)
        if not found:
            self._mlflow.log_dict(dict(settings), "config.json")

    def log(self, record: Mapping[str, Any]) -> None:
        self._mlflow.log_metrics(_scalars(record), step=record["step"])

    def flush(self) -> None:
        pass  # it writes at once

    def close(self) -> None:
        self._mlflow.end_run()


class _Wandb:
    """A run in the project that ``WANDB_PROJECT`` names; ``WANDB_MODE=offline`` keeps it on
    disk.
    """

    def __init__(self, run: str, settings: Mapping[str, Any]) -> None:
        wandb = importlib.import_module("wandb")
        self._run = wandb.init(id=run, name=run, resume="allow", config=dict(settings))

    def log(self, record: Mapping[str, Any]) -> None:
        self._run.log(_scalars(record), step=record["step"])

    def flush(self) -> None:
        pass  # it writes from a thread of its own

    def close(self) -> None:
        self._run.finish()


def _scalars(record: Mapping[str, Any]) -> dict[str, float]:
    return {
        key: float(value)
        for key, value in record.items()
        if key != "step" and isinstance(value, (int, float))
    }
