"""Blocks of questions through a Ray Data actor; small jobs run the same code in this process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import ray

from invar_ray.config import ScaleConfig
from invar_ray.errors import ResourceError

Block = Mapping[str, Any]


def map_blocks(
    actor: Callable[..., Callable[[dict[str, Any]], dict[str, Any]]],
    arguments: Mapping[str, Any],
    blocks: Sequence[Block],
    schema: pa.Schema,
    texts: int,
    scale: ScaleConfig,
) -> Iterator[dict[str, Any]]:
    """What the actor makes of each block; in no order where several of them run.

    Args:
        actor: a class whose instances take a block; made once for each actor.
        arguments: of its constructor.
        blocks: plain rows.
        schema: of a block: Arrow would guess a wrong type from empty lists.
        texts: how many questions or prompts the blocks hold together; fewer than
            ``scale.in_process_below`` start no actors, unless these need GPUs, which are Ray's to
            give.
        scale: ``embed_workers`` actors at most, each with its share of CPUs and GPUs.

    Raises:
        ResourceError: if the work fails in this process otherwise than by an error of this
            package's own.
    """
    if texts < scale.in_process_below and not scale.embed_gpus_per_worker:
        with _clear_failures():
            work = actor(**arguments)
        for block in blocks:
            with _clear_failures():
                made = work(dict(block))
            yield made
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


@contextlib.contextmanager
def _clear_failures() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        last = (str(error).splitlines() or [""])[-1]
        raise ResourceError(
            f"{type(error).__name__}: {last}",
            action="close other programs, or set scale.in_process_below to 0: actors are restarted where they fail",
        ) from error
