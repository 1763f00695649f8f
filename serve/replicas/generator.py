"""The generator of a replica: the protocol of all engines, and the engine on transformers."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from invar_ray.errors import RequestError
from serve.errors import OutOfTime
from serve.records import GeneratorStatus, Question, Reply
from serve.replicas.batching import Batcher, Worker
from serve.replicas.retriever import PROBE, loading
from serve.telemetry.metrics import Meter
from serve.telemetry.tracing import Tracer

if TYPE_CHECKING:  # imports torch: only replicas pay for that
    from invar_ray.models.decoding import Sampling
    from invar_ray.models.generator import Generator
    from invar_ray.models.precision import Precision

STYLE_UNUSED = "the system prompt was not used: this model was trained on one form of prompt"
GeneratorLoader = Callable[[str], "Generator"]


class AnswerEngine(Protocol):
    """What writes answers: a Serve deployment, and a plain object where there is no Ray.

    Its names leave room for a retriever's, beside which it may stand in one replica.
    """

    async def answer(self, question: Question) -> Reply:
        """The answer to a question from its passages.

        Raises:
            RequestError: if the question does not fit the model's context.  ServiceError: if time
                ran out, or the engine cannot answer now.
        """
        ...

    def stream(self, question: Question) -> AsyncIterator[str | Reply]:
        """Pieces of the model's text as they come, then the reply; closing the iterator stops the
        model.
        """
        ...

    async def describe_generator(self) -> GeneratorStatus:
        """What it serves."""
        ...

    async def check_generator(self) -> None:
        """Generate a token for real."""
        ...

    async def check_health(self) -> None:
        """The same; Serve calls it now and then, and replaces a replica that fails."""
        ...

    def close(self) -> None:
        """Let running work end; take no more."""
        ...


def load_generator(uri: str, device: str = "cpu", precision: Precision | None = None) -> Generator:
    """The generator of a generator artifact."""
    from invar_ray.models.loading import open_generator

    return open_generator(uri, precision=precision, device=device)


@dataclass(slots=True)
class _Pending:
    """A question on its way through the engine's thread."""

    question: Question
    deadline: float
    on_text: Callable[[str], None] | None = None
    gone: threading.Event = field(default_factory=threading.Event)

    def over(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.gone.is_set() or time.monotonic() > self.deadline


class TransformersEngine:
    """Answers questions in batches; rows of a batch differ in length, sampling, streaming and when
    they are given up.

    Args:
        uri: generator artifact.
        loader: its URI in, ready generator out.
        max_batch_size: most questions that run at once.
        batch_wait_s: how long the first of them waits for others, where there are others.
    """

    def __init__(
        self,
        uri: str,
        loader: GeneratorLoader = load_generator,
        max_batch_size: int = 8,
        batch_wait_s: float = 0.005,
        *,
        meter: Meter | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        self._worker = Worker()
        self.uri, self._meter, self._tracer = uri, meter or Meter(), tracer or Tracer()
        with loading:
            self._generator = loader(uri)
        self._generate: Batcher[_Pending, Reply] = Batcher(
            self._batch, max_batch_size, batch_wait_s, self._seen
        )
        self._probe()

    async def answer(self, question: Question) -> Reply:
        """See :class:`AnswerEngine`."""
        return await self._run(_Pending(question, time.monotonic() + question.left_s))

    async def stream(self, question: Question) -> AsyncIterator[str | Reply]:
        """See :class:`AnswerEngine`."""
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[str | None]()

        def on_text(text: str) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, text)

        task = asyncio.create_task(
            self._run(_Pending(question, time.monotonic() + question.left_s, on_text))
        )
        # Behind the pieces: the engine's thread has handed them all over before its result arrives.
        task.add_done_callback(lambda _: loop.call_soon(pieces.put_nowait, None))
        try:
            while (piece := await pieces.get()) is not None:
                yield piece
            yield await task
        finally:
            task.cancel()

    async def _run(self, pending: _Pending) -> Reply:
        start = time.perf_counter()
        with self._tracer.span(
            "generate", pending.question.trace, passages=len(pending.question.hits)
        ):
            try:
                reply = await asyncio.wait_for(
                    self._generate(pending), max(0.0, pending.question.left_s)
                )
            except TimeoutError:
                raise OutOfTime("the answer took longer than the request may", 1.0) from None
            finally:
                pending.gone.set()  # also on a disconnect: the row ends at its next token
        self._meter.record("invar_stage_seconds", time.perf_counter() - start, stage="generate")
        self._meter.record("invar_tokens_total", reply.completion_tokens)
        self._meter.record("invar_answers_total", refused=str(reply.answer.refused).lower())
        return reply

    async def _batch(self, batch: list[_Pending]) -> list[Reply | Exception]:
        return await self._worker.run(self.answer_batch, batch)

    def answer_batch(self, batch: Sequence[_Pending]) -> list[Reply | Exception]:
        """Replies in order; a question that cannot be answered gets its error, and does not harm
        the others.
        """
        from invar_ray.answering.rag import build_prompt, certainty_of, read_answer
        from invar_ray.models.generator import Task

        results: dict[int, Reply | Exception] = {}
        prompts, rows = [], []
        for row, pending in enumerate(batch):
            question = pending.question
            try:
                sampling = _sampling(question)
                prompt = build_prompt(
                    self._generator,
                    question.text,
                    question.hits,
                    max_new_tokens=question.max_new_tokens,
                )
                if question.style:
                    prompt = replace(prompt, notes=(*prompt.notes, STYLE_UNUSED))
                prompts.append((prompt, Task(prompt.text, sampling, pending.on_text, pending.over)))
                rows.append(row)
            except RequestError as error:
                results[row] = error
        start, certainty = time.perf_counter(), certainty_of(self._generator)
        generations = self._generator.run([task for _, task in prompts])
        seconds = time.perf_counter() - start
        versions = {"generator": str(self._generator.version)}
        for row, (prompt, _), generation in zip(rows, prompts, generations, strict=True):
            if generation.finish == "cancelled":
                results[row] = OutOfTime("the answer took longer than the request may", 1.0)
                continue
            answer = read_answer(batch[row].question.text, prompt, generation, certainty)
            results[row] = Reply(
                answer=replace(answer, timings={"generate_s": seconds}),
                text=generation.text,
                prompt_tokens=generation.prompt_tokens,
                completion_tokens=generation.num_tokens,
                finish="length" if generation.finish == "length" else "stop",
                versions=versions,
            )
        if generations and seconds > 0:
            self._meter.record(
                "invar_tokens_per_second", sum(each.num_tokens for each in generations) / seconds
            )
        return [results[row] for row in range(len(batch))]

    def _seen(self, size: int, waiting: int) -> None:
        self._meter.record("invar_batch_size", size, engine="generator")
        self._meter.record("invar_queue", waiting, engine="generator")

    def _probe(self) -> None:
        self._generator.generate([PROBE], max_new_tokens=1)

    async def describe_generator(self) -> GeneratorStatus:
        """See :class:`AnswerEngine`."""
        return GeneratorStatus(
            "transformers",
            self.uri,
            self._generator.max_context,
            {"generator": str(self._generator.version)},
        )

    async def check_generator(self) -> None:
        """See :class:`AnswerEngine`."""
        await self._worker.check(self._probe)

    async def check_health(self) -> None:
        """See :class:`AnswerEngine`."""
        await self.check_generator()

    def close(self) -> None:
        """See :class:`AnswerEngine`."""
        self._worker.close()

    def __del__(self) -> None:
        self.close()


def _sampling(question: Question) -> Sampling:
    from invar_ray.answering.rag import STOP_STRINGS
    from invar_ray.models.decoding import Sampling

    return Sampling(
        question.max_new_tokens,
        (*STOP_STRINGS, *question.stop),
        question.temperature,
        question.top_p,
        question.seed,
    )
