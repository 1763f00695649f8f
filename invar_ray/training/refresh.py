"""Hard negatives that follow the model (ANCE): when a version is made and when it is used.

At every ``refresh_every``-th step rank 0 publishes the adapter of that moment and starts a Ray task
that mines with it (the function comes from outside: this shell does not know how negatives are
mined).  ``refresh_delay`` steps later all ranks take the new training set, and wait for it if need
be; with ``refresh_async`` they take it when it stands.

What is used and what is under way is part of the checkpoint.  A resumed run takes the same version,
and starts the job that was lost again; whatever that had finished stands as artifacts.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

import ray
from torch import Tensor

from invar_ray import console
from invar_ray.config import Config
from invar_ray.models.encoder import EncoderSpec
from invar_ray.store.artifacts import Artifact, Building, Plan, Store
from invar_ray.training.engine import broadcast_text
from invar_ray.training.stage import Mine, Stage

_POLL_S = 5.0  # between the ranks' exchanges while they wait: far below a process group's timeout
_TELL_S = 60.0


class Refreshed(Stage, Protocol):
    """A stage whose training set can be exchanged."""

    spec: EncoderSpec

    def adopt(self, trainset_ref: str) -> None:
        """Take candidates from another training set of the same questions from now on."""
        ...


class Refresh:
    """The versions of the negatives in one attempt of a run.

    Args:
        stage: of this rank.
        config: the run.
        mine: makes a version.
        root_uri: of the store.
        run: fingerprint of what is trained.
        trainset_ref: what the run began with.
        rank: of this process.
        state: of the checkpoint that it resumes from.
    """

    def __init__(
        self,
        stage: Refreshed,
        config: Config,
        mine: Mine,
        root_uri: str,
        run: str,
        trainset_ref: str,
        rank: int,
        state: Mapping[str, Any] | None,
    ) -> None:
        self._stage, self._config, self._mine = stage, config, mine
        self._root_uri, self._run, self._first, self._rank = root_uri, run, trainset_ref, rank
        self._every = config.experimental.retriever.refresh_every or 0
        self._delay = config.experimental.retriever.refresh_delay
        self._history: list[dict[str, Any]] = list(state["history"]) if state else []
        self._pending: dict[str, Any] | None = state["pending"] if state else None
        self._job: Any = None
        if self._history:
            stage.adopt(self._current)
        if self._pending is not None:
            self._start()

    @property
    def version(self) -> int:
        """Of the negatives in use; 0 are those that the run began with."""
        return len(self._history)

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as plain values."""
        return {"history": self._history, "pending": self._pending}

    def before(self, step: int, parameters: Callable[[], dict[str, Tensor]]) -> str | None:
        """Do what is due before a step; every rank must call it.

        Args:
            step: optimizer steps that are done.
            parameters: the module's complete ones; a collective.

        Returns:
            Why the run cannot go on, the same on every rank; ``None`` if it can.
        """
        asynchronous = self._config.experimental.retriever.refresh_async
        if self._pending is not None and asynchronous:
            fault = self._look(step, wait=False)
            if fault is not None:
                return fault
        is_due = step > 0 and step % self._every == 0 and self._exported < step
        in_time = asynchronous or step + self._delay < self._stage.steps
        if is_due and in_time and self._pending is None:
            found = parameters()
            ref = broadcast_text(self._publish(found, step) if self._rank == 0 else "")
            self._pending = {"step": step, "adapter": ref, "current": self._current}
            self._start()
        if (
            self._pending is not None
            and not asynchronous
            and step >= self._pending["step"] + self._delay
        ):
            return self._look(step, wait=True)
        return None

    def close(self) -> None:
        """Give up a job that nobody waits for any more."""
        if self._job is not None:
            ray.cancel(self._job, force=True)
            self._job = None

    @property
    def _current(self) -> str:
        return str(self._history[-1]["trainset"]) if self._history else self._first

    @property
    def _exported(self) -> int:
        return int(self._history[-1]["step"]) if self._history else 0

    def _publish(self, parameters: dict[str, Tensor], step: int) -> str:
        """The adapter of the moment as an artifact, named by what is in it."""
        hasher = hashlib.sha256()
        for name in sorted(parameters):
            hasher.update(name.encode())
            hasher.update(parameters[name].contiguous().numpy().tobytes())
        store = Store(self._root_uri)
        plan = Plan(
            kind="retriever",
            name=f"{self._config.name}-refresh",
            config={"run": self._run, "step": step, "parameters": hasher.hexdigest()[:32]},
            parents={"trainset": store.open(self._first, "trainset")},
        )

        def body(building: Building) -> None:
            self._stage.save(parameters, building.path / "adapter")
            spec = replace(self._stage.spec, adapter=plan.ref, adapter_fingerprint=plan.fingerprint)
            building.info |= {"encoder": spec.to_json(), "steps": step}

        artifact: Artifact = store.get_or_build(plan, body)[0]
        return artifact.ref

    def _start(self) -> None:
        if self._rank != 0 or self._pending is None:
            return
        task = ray.remote(self._mine).options(
            num_cpus=self._config.scale.cpus_per_worker, name="refresh negatives"
        )
        arguments = self._pending["adapter"], self._first, self._pending["current"]
        self._job = task.remote(self._config, self._root_uri, *arguments)

    def _look(self, step: int, *, wait: bool) -> str | None:
        """Adopt what is under way if it stands; a fault is returned."""
        started = told = time.monotonic()
        while True:
            answer: dict[str, Any] = json.loads(broadcast_text(self._ask(_POLL_S if wait else 0.0)))
            limit = self._config.experimental.scale.refresh_timeout_s
            if (
                answer.get("waiting")
                and wait
                and self._rank == 0
                and time.monotonic() - told > _TELL_S
            ):
                told = time.monotonic()
                console.say(
                    f"  step {step}: waiting for negatives since {told - started:.0f} s (the job "
                    "needs "
                    f"{self._config.scale.cpus_per_worker} CPUs beside the training)"
                )
            if not answer.get("waiting"):
                break
            if not wait:
                return None
            # The answer of rank 0's clock, so that all ranks give up together.
            if (
                float(broadcast_text(str(time.monotonic() - started) if self._rank == 0 else ""))
                > limit
            ):
                return (
                    f"step {step}: no new negatives within {limit:g} s "
                    "(experimental.scale.refresh_timeout_s)"
                )
        if "fault" in answer:
            return f"step {step}: the job that mines new negatives failed: {answer['fault']}"
        self._adopt(step, answer)
        return None

    def _ask(self, timeout_s: float) -> str:
        """Rank 0's: what the job says, as JSON."""
        if self._rank != 0:
            return ""
        done, _ = ray.wait([self._job], timeout=timeout_s)
        if not done:
            return json.dumps({"waiting": True})
        try:
            return json.dumps(ray.get(self._job))
        except Exception as error:
            return json.dumps({"fault": str(getattr(error, "cause", None) or error)})

    def _adopt(self, step: int, answer: dict[str, Any]) -> None:
        assert self._pending is not None
        found = {
            "version": self.version + 1,
            "step": self._pending["step"],
            "adopted": step,
            **answer,
        }
        self._history.append(found)
        self._pending = self._job = None
        self._stage.adopt(self._current)
        if self._rank == 0:
            dropped = ", ".join(
                f"{count:,} {rule}" for rule, count in answer["mining"]["dropped"].items()
            )
            console.say(
                f"  step {step}: negatives of version {found['version']} (adapter of step "
                f"{found['step']}, "
                f"{answer['passages']:,} passages in {answer['seconds']:.0f} s): "
                f"{answer['mining']['kept']:,} kept, "
                f"{answer['changed_share']:.0%} of them new; dropped: {dropped}"
            )
