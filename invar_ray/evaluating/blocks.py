"""Blocks of questions through a Ray Data actor; small jobs run the same code in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import ray

from invar_ray.config import ScaleConfig

Block = Mapping[str, Any]


def map_blocks(
    actor: Callable[..., Callable[[dict[str, Any]], dict[str, Any]]],
    arguments: Mapping[str, Any],
    blocks: Sequence[Block],
    schema: pa.Schema,
    questions: int,
    scale: ScaleConfig,
) -> Iterator[dict[str, Any]]:
    """What the actor makes of each block; in no order where several of them run.

    Args:
        actor: a class whose instances take a block; made once for each actor.
        arguments: of its constructor.
        blocks: plain rows.
        schema: of a block: Arrow would guess a wrong type from empty lists.
        questions: how many the blocks hold together; fewer than ``scale.in_process_below`` start no actors.
        scale: ``embed_workers`` actors at most, each with its share of CPUs and GPUs.
    """
    if questions < scale.in_process_below:
        work = actor(**arguments)
        yield from (work(dict(block)) for block in blocks)
        return
    table = pa.Table.from_pylist([dict(block) for block in blocks], schema=schema)
    stream = ray.data.from_arrow([table.slice(number, 1) for number in range(len(blocks))]).map(
        actor,
        fn_constructor_kwargs=dict(arguments),
        num_cpus=scale.cpus_per_worker,
        num_gpus=scale.embed_gpus_per_worker or None,
        compute=ray.data.ActorPoolStrategy(size=min(scale.embed_workers, len(blocks))),
    )
    yield from stream.iter_rows()
