"""Vectors to what is searched: the ``index`` artifact."""

from __future__ import annotations

from collections.abc import Callable

from invar_ray.config import Config
from invar_ray.index.build import Limits, build_index, index_settings
from invar_ray.store.artifacts import Artifact, Building, Plan

VERSION = 2


def plan(config: Config, vectors: Artifact, passages: Artifact, name: str) -> Plan:
    """The index of these vectors."""
    return Plan(
        kind="index",
        name=name,
        config=index_settings(config.index),
        parents={"vectors": vectors, "passages": passages},
        version=VERSION,
    )


def build(
    building: Building,
    config: Config,
    vectors: Artifact,
    passages: Artifact,
    *,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Plan, train, fill and measure it, see :func:`invar_ray.index.build.build_index`.

    Args:
        building: gets it.
        config: the run.
        vectors: what is searched.
        passages: whose they are.
        say: gets what the planner has to say.
    """
    build_index(
        building,
        vectors,
        passages,
        config.index.factory,
        config.index.num_lists_searched,
        limits=Limits.of(config.index),
        workers=config.scale.cpu_workers or 1,
        say=say,
    )
