"""Requests that cannot be answered in time are refused at once, by the pace of the others."""

from __future__ import annotations

import asyncio
import selectors
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest

from serve.errors import Fault, OutOfTime, Overloaded
from serve.http.api import make_api
from serve.line import Line
from serve.records import Context, Embedded, Question, Reply
from serve.replicas.targets import LocalTarget
from serve.service import Service
from tests.serving import fault
from tests.unit.serve.test_protocol import HITS, LIMITS, Backend, call


class Slow(Backend):
    """Answers ten at a time, in 0.1 s: a hundred a second."""

    def __init__(self) -> None:
        super().__init__()
        self.places = asyncio.Semaphore(10)
        self.answered = 0

    async def answer(self, question: Question) -> Reply:
        async with self.places:
            await asyncio.sleep(0.1)
            self.answered += 1
            return await super().answer(question)


class Clock:
    """Seconds that pass only when somebody says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Skipping(selectors.DefaultSelector):
    """Where an event loop would wait, the clock moves on at once: what a burst comes to depends on
    no processor.
    """

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(None if timeout is None else 0)
        if not ready and timeout is not None:
            self.clock.now += timeout
        return ready


def burst(
    monkeypatch: pytest.MonkeyPatch, count: int, timeout_s: float
) -> tuple[Counter[str], Slow, Exception | None]:
    async def send() -> tuple[Counter[str], Slow, Exception | None]:
        backend = Slow()
        service = Service([LocalTarget("r", backend)], LocalTarget("generator", backend))
        context = Context("", time.monotonic() + timeout_s)
        asked = [service.answer(Question("Who?", HITS[:1], 4), context) for _ in range(count)]
        outcomes = await asyncio.gather(*asked, return_exceptions=True)
        refused = [each for each in outcomes if isinstance(each, Exception)]
        return Counter(type(each).__name__ for each in outcomes), backend, (refused or [None])[0]

    clock = Clock()
    with monkeypatch.context() as patched:
        patched.setattr(time, "monotonic", clock)
        loop = asyncio.SelectorEventLoop(Skipping(clock))
        try:
            return loop.run_until_complete(send())
        finally:
            loop.close()


def test_of_a_burst_what_cannot_be_answered_in_time_is_refused_early(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    outcomes, backend, refused = burst(monkeypatch, 300, 1.5)
    assert set(outcomes) == {"Reply", "Overloaded"}, "nobody waits until the time is up"
    assert outcomes["Reply"] == backend.answered, "and nothing is answered for nobody"
    assert 120 <= outcomes["Reply"] <= 150, "of a hundred a second for 1.5 seconds"
    seen = Fault.of(refused)  # type: ignore[arg-type]
    assert (seen.status, seen.code) == (503, "overloaded")
    assert seen.retry_after_s is not None
    assert seen.retry_after_s > 1


def test_whoever_has_time_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert burst(monkeypatch, 150, 60.0)[0] == {"Reply": 150}


def test_the_pace_is_that_of_a_long_line_alone() -> None:
    clock = Clock()

    async def scenario() -> None:
        line = Line(clock)

        async def answered(seconds: float) -> int:
            clock.now += seconds
            return 1

        for _ in range(20):  # one after the other: a batch of one takes as long as a full one
            assert await line.run(answered(5.0), 60) == 1
        gates = [asyncio.Event() for _ in range(40)]
        waiting = [asyncio.create_task(line.run(gate.wait(), 60)) for gate in gates]
        await asyncio.sleep(0.01)
        assert not any(task.done() for task in waiting), "40 times 5 s is not what they take"
        for gate in gates[:8]:  # eight in four seconds: the last of 32 comes after 16
            clock.now += 0.5
            gate.set()
            await asyncio.sleep(0.05)  # longer than the answers of a batch are apart
        assert [task.done() for task in waiting] == [True] * 8 + [False] * 32
        late = asyncio.create_task(line.run(asyncio.Event().wait(), 10))
        with pytest.raises(Overloaded) as caught:
            await late
        assert caught.value.retry_after_s == pytest.approx(33 * 0.5)
        for task in waiting:
            task.cancel()
        await asyncio.sleep(0.01)
        assert await line.run(answered(0.2), 0.4) == 1, "alone, it is answered at once"
        await asyncio.gather(*waiting, return_exceptions=True)

    asyncio.run(scenario())


def test_a_stream_that_has_begun_is_let_alone() -> None:
    async def scenario() -> None:
        line = Line()
        with line.place(0.05) as place:
            assert await line.first(asyncio.sleep(0, 7), place) == 7
            assert place.begun

    asyncio.run(scenario())


class Late(Backend):
    async def embed(self, texts: list[str], kind: str, trace: dict[str, str]) -> Embedded:
        return Embedded(np.zeros((1, 2), np.float32), 1, {"encoder": "e"})

    async def retrieve(self, *args: Any, **options: Any) -> Any:
        raise OutOfTime("the search took longer than the request may", 1.0)


def test_shards_that_all_time_out_are_a_timeout() -> None:
    shards = [LocalTarget("a", Late()), LocalTarget("b", Late())]
    app = make_api(Service(shards, LocalTarget("generator", Backend())), LIMITS)
    answer = call(Backend(), "POST", "/v1/retrieve", app=app, json={"question": "Who?"})
    fault(answer, 504, "timeout")
    assert answer.headers["Retry-After"] == "1"
