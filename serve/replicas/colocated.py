"""Both adapters over one base in one process: two module trees over the same tensors, each with its
own adapter.

Switching one tree between adapters is not thread-safe; two trees that are never switched are.
Adapters stay unmerged: merging would change the tensors that the other tree reads. A retriever
whose base is an encoder shares nothing: it is loaded beside the generator's base.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from invar_ray.config import SearchConfig
from invar_ray.errors import MixedArtifactsError
from invar_ray.schema import Mode
from serve.records import GeneratorStatus, Question, Reply
from serve.replicas.generator import TransformersEngine
from serve.replicas.retriever import RetrieverReplica
from serve.telemetry.metrics import Meter
from serve.telemetry.tracing import Tracer

if TYPE_CHECKING:  # imports torch: only replicas pay for that
    from invar_ray.answering.retriever import Retriever
    from invar_ray.models.generator import Generator
    from invar_ray.models.precision import Precision
    from invar_ray.store.artifacts import Artifact


class SharedBase:
    """Opens retrievers and generators over one base, which is loaded once.

    Args:
        device: where it runs.
        precision: ``fp32`` or ``bf16``; ``None``: as each artifact was made.
        search: ``memory_map``, ``mode``, ``collapse``, see
            :func:`invar_ray.answering.retriever.open_retriever`.
    """

    def __init__(
        self,
        device: str = "cpu",
        precision: Precision | None = None,
        **search: Any,
    ) -> None:
        self._device, self._precision, self._search = device, precision, search
        self._lock = threading.Lock()
        self._bases: dict[str, Any] = {}  # one, unless they were made in two precisions
        self._fingerprint = ""

    def retriever(self, uri: str) -> Retriever:
        """The retriever of an index artifact.

        Raises:
            MixedArtifactsError: if its encoder has another base.  ArtifactError, ModelError: as
                :func:`invar_ray.answering.retriever.open_retriever`.
        """
        from invar_ray.answering.retriever import open_retriever
        from invar_ray.store.artifacts import open_artifact

        index = open_artifact(uri, "index")
        shares = index.info["encoder"]["kind"] == "llm"
        return open_retriever(
            uri,
            device=self._device,
            precision=self._precision,
            open_base_tree=self._opener(index) if shares else None,
            **self._search,
        )

    def generator(self, uri: str) -> Generator:
        """The generator of a generator artifact; errors as :meth:`retriever`."""
        from invar_ray.models.loading import open_generator
        from invar_ray.store.artifacts import open_artifact

        opener = self._opener(open_artifact(uri, "generator"))
        return open_generator(uri, open_base_tree=opener)

    def _opener(self, artifact: Artifact) -> Callable[[Any, Any], tuple[Any, Any]]:
        from invar_ray.models.precision import made_in

        return partial(self._tree, self._precision or made_in(artifact))

    def _tree(self, precision: Precision, ref: Any, store: Any) -> tuple[Any, Any]:
        """A module tree over the shared tensors, and a tokenizer of its own (a tokenizer does not
        bear two threads).
        """
        from invar_ray.models.adapters import share_base
        from invar_ray.models.base import load_tokenizer
        from invar_ray.models.loading import open_model

        source = ref.folder_or_name(store)
        with self._lock:
            self._fingerprint = self._fingerprint or ref.fingerprint
            if ref.fingerprint != self._fingerprint:
                raise MixedArtifactsError(
                    f"the artifact's base is {ref.fingerprint}, this replica's {self._fingerprint}",
                    expected="an index and a generator of one base",
                    action="serve them in the split topology, or reindex with the generator's base",
                )
            if precision not in self._bases:
                self._bases[precision], _ = open_model(ref, store, precision, self._device)
            return share_base(self._bases[precision]), load_tokenizer(source, ref.revision)


class ColocatedReplica(RetrieverReplica):
    """Retriever and generator in one replica over one base, each in a thread of its own.

    Args:
        generator_uri: generator artifact.
        device, precision, memory_map, mode, collapse: see :class:`SharedBase`.
        max_batch_size, batch_wait_s, meter, tracer: of both.
        retriever: see :class:`~serve.replicas.retriever.RetrieverReplica`.
    """

    def __init__(
        self,
        generator_uri: str,
        device: str = "cpu",
        precision: Precision | None = None,
        max_batch_size: int = 8,
        batch_wait_s: float = 0.005,
        *,
        memory_map: bool = False,
        mode: Mode = SearchConfig.mode,
        collapse: bool = False,
        meter: Meter | None = None,
        tracer: Tracer | None = None,
        **retriever: Any,
    ) -> None:
        shared = SharedBase(device, precision, memory_map=memory_map, mode=mode, collapse=collapse)
        super().__init__(
            shared.retriever, max_batch_size, batch_wait_s, meter=meter, tracer=tracer, **retriever
        )
        self._engine = TransformersEngine(
            generator_uri,
            shared.generator,
            max_batch_size,
            batch_wait_s,
            meter=meter,
            tracer=tracer,
        )

    async def answer(self, question: Question) -> Reply:
        """See :class:`serve.replicas.generator.AnswerEngine`."""
        return await self._engine.answer(question)

    async def stream(self, question: Question) -> AsyncIterator[str | Reply]:
        """See :class:`serve.replicas.generator.AnswerEngine`."""
        items = self._engine.stream(question)
        try:
            async for item in items:
                yield item
        finally:
            await items.aclose()  # type: ignore[attr-defined]

    async def describe_generator(self) -> GeneratorStatus:
        """See :class:`serve.replicas.generator.AnswerEngine`."""
        return await self._engine.describe_generator()

    async def check_generator(self) -> None:
        """See :class:`serve.replicas.generator.AnswerEngine`."""
        await self._engine.check_generator()

    async def check_health(self) -> None:
        """Search and generate for real."""
        await asyncio.gather(super().check_health(), self.check_generator())
