"""On what it runs, and the endpoint: never part of a fingerprint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field, NonNegativeInt, PositiveInt

from invar_ray.config.fields import FORBID, Workers


@dataclass(frozen=True)
class ServeConfig:
    """The endpoint.  Scale only: what is served comes from the artifacts' manifests.

    What a recipe may set of the service; beside ``host`` and ``port``, the names are those of
    ``AppArgs`` in ``serve/args.py``, where all its settings stand (``serve deploy`` takes them).
    """

    __pydantic_config__: ClassVar[ConfigDict] = FORBID

    host: str = "127.0.0.1"
    """Address to listen on; loopback unless you say otherwise."""
    port: int = 8000
    """HTTP port; 0 takes a free one."""
    num_gpus_per_replica: float = 0.0
    """GPU share of each replica."""
    num_cpus_per_replica: float = 0.5
    """CPU share of each replica."""
    top_k: Annotated[int, Field(gt=0, le=20)] = 5
    """Passages per answer unless the request says otherwise."""


@dataclass(frozen=True)
class ScaleConfig:
    """On what it runs. Never part of a fingerprint."""

    __pydantic_config__: ClassVar[ConfigDict] = FORBID

    ray_address: str | None = None
    """``auto`` or a ``ray://`` address joins a cluster; ``null`` joins one that ``RAY_ADDRESS``
    names, else starts a local Ray for the run and stops it afterwards."""
    num_workers: Workers = 2
    """Training workers; ``[fewest, most]`` takes what the cluster has and follows it (elastic): the
    group restarts from its last checkpoint with another size, and the global batch stays the
    same."""
    use_gpu: bool = False
    """One GPU per training worker."""
    cpus_per_worker: float = 0.5
    """Logical CPUs per training worker."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO stage; 3 loads the base in shards, for one that no GPU can hold whole."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass (non-reentrant)."""
    trackers: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = ("tensorboard",)
    """Where rank 0 writes the training's scalars beside ``log.jsonl``: ``tensorboard`` (files below
    ``<root>/tensorboard``), ``mlflow`` and ``wandb`` (installed by you, configured by their
    environment variables).
    """
    train_tokens_per_chunk: PositiveInt | None = None
    """Token budget (padding included) of one training pass through the model; a larger share of the
    global batch is taken in parts: GradCache in stage 1, gradient accumulation in stage 2, both
    exact.  Memory is then bounded by this and not by the global batch, at the price of one forward
    more in stage 1.  ``null`` takes everything at once.
    """
    pack_tokens: int | None = None
    """Stage 2: put short sequences behind each other in rows of up to this many tokens, so that
    less is padding; they do not see each other, and loss and gradients stay the same.  ``null``
    pads each sequence by itself.
    """
    keep_freed_memory: bool = False
    """Training workers keep the memory that they free instead of giving it back, so that the kernel
    need not clear every page anew: a quarter less time for a step of the demo's stage 2 on a CPU,
    for 1.45 times the memory.
    """
    checkpoint_every: PositiveInt = 50
    """Steps between checkpoints."""
    max_failures: int = 2
    """How many times a training run is restarted from its last checkpoint."""
    incremental: bool = True
    """Take what is unchanged from the version before: where documents were cut, vectors of
    passages.  ``false`` makes everything anew."""
    embed_workers: Workers = 2
    """Embedding actors; with ``[fewest, most]`` the pool grows while shards wait, and shrinks when
    they do not."""
    cpu_workers: NonNegativeInt | None = None
    """Workers on CPUs beside the models: Ray tasks that cut documents, actors that tokenise for the
    embedding ones, threads that build an index (each a part of it; graphs are built by one).  0
    leaves all three to the processes that need them; ``null`` does, too, but gives embedding actors
    on GPUs as many that tokenise."""
    embed_gpus_per_worker: float = 0.0
    """GPU share of an embedding actor: 0.5 puts two on a GPU."""
    embed_tokens_per_batch: PositiveInt = 4096
    """Token budget of an encoding batch (padding included): 2,000 to 4,000 suit a CPU, 16,000 and
    more a GPU.  A batch that does not fit into memory is halved."""
    shard_rows: PositiveInt = 512
    """Passages per shard: the unit that is embedded, checked and resumed."""
    in_process_below: NonNegativeInt = 0
    """Searches for fewer questions than this, and answers to fewer prompts, run in the job's own
    process: starting actors takes some 10 s of a CPU.  For models that fit there; not where actors
    use GPUs."""

    @property
    def fewest_embed_workers(self) -> int:
        """Embedding actors to start with."""
        return self.embed_workers if isinstance(self.embed_workers, int) else self.embed_workers[0]

    @property
    def most_embed_workers(self) -> int:
        """Embedding actors that the pool may grow to."""
        return self.embed_workers if isinstance(self.embed_workers, int) else self.embed_workers[1]
