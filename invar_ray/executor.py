"""Where work runs: in this process, or on Ray.

One rule decides (:meth:`OnRay.leaves`), one function turns what fails there into one error
(:func:`one_error`).  This file is the door to Ray Data: rows go in, a pool of actors works on them,
rows come out.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

import pyarrow as pa
import ray
from ray.exceptions import RayError

from invar_ray import errors
from invar_ray.config import ScaleConfig
from invar_ray.errors import InvarError, ResourceError
from invar_ray.session import RaySession, check_room


def own_cores(scale: ScaleConfig) -> int | None:
    """How many cores the machine has whose Ray a run starts itself; ``None``: it joins a
    cluster.
    """
    return None if RaySession(scale).joins else len(os.sched_getaffinity(0))


class Worker(Protocol):
    """Made once for each actor; takes a row and returns one."""

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """What comes of one row."""
        ...


@dataclass(frozen=True)
class Work:
    """Rows that equal workers turn into rows.

    Attributes:
        label: what is done, for messages.
        worker: made once for each actor, with ``arguments``.
        arguments: of its constructor; small, they travel.
        rows: plain values.
        texts: how many texts the workers' model sees in all.
        leaves_from: so many texts leave this process; fewer are done before actors have started.
        schema: of the rows, where Arrow could not guess it (from empty lists).
        workers: fewest and most actors.
        num_cpus: of each.
        num_gpus: of each; work that needs some always leaves, since GPUs are Ray's to give.
        in_flight: rows that an actor holds: the one in hand, and those that wait at it.
        prepare: worker, arguments and number of actors that see the rows before, on CPUs.  Only
            where the work leaves the process: alone, it would not overlap with anything.
    """

    label: str
    worker: Callable[..., Worker]
    arguments: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    texts: int
    leaves_from: int
    schema: pa.Schema | None = None
    workers: tuple[int, int] = (1, 1)
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    in_flight: int = 2
    prepare: tuple[Callable[..., Worker], Mapping[str, Any], int] | None = None


class Executor(Protocol):
    """Where the steps' work runs."""

    def leaves(self, work: Work) -> bool:
        """Whether the work leaves this process."""
        ...

    def run(self, work: Work) -> Iterator[dict[str, Any]]:
        """What comes of each row; in no order where several workers run.

        Raises:
            InvarError: the workers' own.  ResourceError: for anything else that went wrong.
        """
        ...

    def in_order(
        self,
        function: Callable[[Any], Any],
        items: Iterable[Any],
        workers: int,
        *,
        num_cpus: float = 1.0,
        memory: float = 0.0,
    ) -> Iterator[Any]:
        """As ``map(function, items)``, on ``workers`` tasks of Ray; 0 stays in this process.

        Args:
            function: what is done; it travels.
            items: each travels to a task.
            workers: how many tasks at the same time.
            num_cpus: of each.
            memory: bytes that each holds; with some, tasks go to different nodes where they can,
                and to none that has not that much.
        """
        ...

    def connect(self) -> None:
        """Start Ray, or join it, for what only runs there, unless that has been done."""
        ...

    def on_cluster(self, label: str) -> contextlib.AbstractContextManager[None]:
        """As :meth:`connect`; what fails inside becomes one error."""
        ...

    def close(self) -> None:
        """Stop a Ray that was started."""
        ...


class Here:
    """Everything in this process, one row after the other.  It cannot train."""

    def leaves(self, work: Work) -> bool:
        """Nothing does."""
        return False

    def run(self, work: Work) -> Iterator[dict[str, Any]]:
        """See :meth:`Executor.run`; in order."""
        if not work.rows:
            return
        with one_error(work.label):
            worker = work.worker(**work.arguments)
        for row in work.rows:
            with one_error(work.label):
                made = worker(dict(row))
            yield made

    def in_order(
        self,
        function: Callable[[Any], Any],
        items: Iterable[Any],
        workers: int,
        *,
        num_cpus: float = 1.0,
        memory: float = 0.0,
    ) -> Iterator[Any]:
        """See :meth:`Executor.in_order`; in this process, whatever ``workers`` is."""
        return map(function, items)

    def connect(self) -> None:
        """Refused.

        Raises:
            ResourceError: always.
        """
        raise ResourceError(
            "this work runs on Ray, and the executor was told to do all work in this process",
            action="use executor.OnRay",
        )

    @contextlib.contextmanager
    def on_cluster(self, label: str) -> Iterator[None]:
        """Refused, as :meth:`connect`."""
        self.connect()
        yield

    def close(self) -> None:
        """Nothing was started."""


class OnRay:
    """Work leaves this process for Ray where that pays; Ray is started, or joined, only then.

    Args:
        scale: which Ray, and with how many CPUs.

    Use as a context manager, or close it: that stops a Ray which it started.
    """

    def __init__(self, scale: ScaleConfig) -> None:
        self._session = RaySession(scale)

    def leaves(self, work: Work) -> bool:
        """The one rule: work leaves where it needs GPUs, where a cluster is joined (a driver holds
        no model), and where it is ``leaves_from`` texts or more.
        """
        if work.texts == 0:
            return False
        return work.num_gpus > 0 or self._session.joins or work.texts >= work.leaves_from

    def run(self, work: Work) -> Iterator[dict[str, Any]]:
        """See :meth:`Executor.run`; a Ray Data dataset of the rows, through a pool of actors."""
        if not self.leaves(work):
            yield from Here().run(work)
            return
        with self.on_cluster(work.label):
            one = {"CPU": work.num_cpus} | ({"GPU": work.num_gpus} if work.num_gpus else {})
            check_room(
                work.label,
                [one],
                "lower scale.cpus_per_worker or scale.embed_gpus_per_worker, or add nodes",
            )
            yield from _dataset(work).iter_rows()

    def in_order(
        self,
        function: Callable[[Any], Any],
        items: Iterable[Any],
        workers: int,
        *,
        num_cpus: float = 1.0,
        memory: float = 0.0,
    ) -> Iterator[Any]:
        """See :meth:`Executor.in_order`."""
        if workers == 0:
            yield from map(function, items)
            return
        self.connect()
        needs: dict[str, Any] = {"num_cpus": num_cpus}
        if memory:
            one = {"CPU": num_cpus, "memory": memory}
            check_room("a task", [one], "set index.shards higher, or scale.cpu_workers lower")
            needs |= {"memory": math.ceil(memory), "scheduling_strategy": "SPREAD"}
        shared = ray.put(function)
        task = ray.remote(_apply).options(max_retries=3, **needs)
        running: deque[Any] = deque()
        try:
            for item in items:  # what fails in reading them is none of Ray's
                running.append(task.remote(shared, item))
                while len(running) > 2 * workers:  # one each at work and one waiting
                    yield _result(running.popleft())
            while running:
                yield _result(running.popleft())
        finally:
            for waiting in running:
                ray.cancel(waiting)

    @contextlib.contextmanager
    def on_cluster(self, label: str) -> Iterator[None]:
        """See :meth:`Executor.on_cluster`."""
        self.connect()
        with one_error(label):
            yield

    @property
    def joins(self) -> bool:
        """Whether :meth:`connect` finds a Ray that runs already."""
        return ray.is_initialized() or self._session.joins

    def connect(self) -> None:
        """See :meth:`Executor.connect`."""
        self._session.ensure()

    def close(self) -> None:
        """Stop a Ray that was started, leave one that was joined."""
        self._session.close()

    def __enter__(self) -> OnRay:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _RowByRow:
    """A worker as an actor of Ray Data: takes a table of one row, returns one."""

    def __init__(self, worker: Callable[..., Worker], arguments: Mapping[str, Any]) -> None:
        self._work = worker(**arguments)

    def __call__(self, table: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([self._work(row) for row in table.to_pylist()])


def _dataset(work: Work) -> Any:
    rows = [dict(row) for row in work.rows]
    table = pa.Table.from_pylist(rows, schema=work.schema)
    data = ray.data.from_arrow([table.slice(number, 1) for number in range(len(rows))])
    form = {"batch_size": 1, "batch_format": "pyarrow", "zero_copy_batch": True}
    if work.prepare is not None:
        worker, arguments, size = work.prepare
        data = data.map_batches(
            _named(worker),
            fn_constructor_args=(worker, arguments),
            num_cpus=work.num_cpus,
            compute=ray.data.ActorPoolStrategy(size=min(size, len(rows))),
            **form,
        )
    fewest, most = (min(number, len(rows)) for number in work.workers)
    return data.map_batches(
        _named(work.worker),
        fn_constructor_args=(work.worker, work.arguments),
        num_cpus=work.num_cpus,
        num_gpus=work.num_gpus or None,
        compute=ray.data.ActorPoolStrategy(
            min_size=fewest, max_size=most, max_tasks_in_flight_per_actor=work.in_flight
        ),
        **form,
    )


def _named(worker: Callable[..., Worker]) -> type[_RowByRow]:
    """Ray calls an actor by its class: who looks at the cluster wants to read the work's name."""
    return type(worker.__name__, (_RowByRow,), {})


def _apply(function: Callable[[Any], Any], item: Any) -> Any:
    return function(item)


def _result(task: Any) -> Any:
    with one_error("work on a Ray task"):
        return ray.get(task)


@contextlib.contextmanager
def one_error(label: str) -> Iterator[None]:
    """Turn what fails on its way through Ray, or for want of memory, into one error.

    Raises:
        InvarError: the work's own, where it raised one.  ResourceError: for anything else; it
            names what was raised first.
    """
    try:
        yield
    except RayError as error:  # its doubles of other errors too, whose text is a traceback
        raise as_one_error(error, label) from error
    except (InvarError, NotImplementedError, RecursionError):
        raise  # the user's own error, or a mistake in the program
    except (RuntimeError, MemoryError) as error:
        raise as_one_error(error, label) from error


def as_one_error(error: BaseException, label: str) -> InvarError:
    """What :func:`one_error` raises for an error."""
    for cause in _causes(error):
        if isinstance(cause, InvarError) and not isinstance(cause, RayError):
            return cause
    # Of what an actor's constructor raised Ray keeps the text alone.
    named = re.findall(r"^invar_ray\.errors\.(\w+): (.+)$", str(error), re.MULTILINE)
    if named:
        kind: type[InvarError] = getattr(errors, named[-1][0])
        return kind(named[-1][1])
    lines = str(error).strip().splitlines() or [repr(error)]
    if not isinstance(error, RayError):
        lines = [f"{type(error).__name__}: {lines[-1]}"]
    # What was raised first stands first; Ray's own words follow.
    raised = [
        line
        for line in lines
        if re.match(r"(?!ray\.)[A-Za-z_][\w.]*(Error|Exception|Exit): ", line)
    ]
    return ResourceError(
        f"{label} failed: {(raised or lines[-1:])[0].strip()}",
        action="run it again with -v to see the workers' log; what is finished stands",
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, what caused it, and so on; of a training those of its workers too."""
    while error is not None:
        yield error
        for failure in (getattr(error, "worker_failures", None) or {}).values():
            yield getattr(failure, "cause", failure)
        error = getattr(error, "cause", None) or error.__cause__
