"""Who waits for an answer, and who would wait in vain: those are told at once."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from serve.errors import Overloaded

T = TypeVar("T")
_FEWEST, _MOST = 8, 32  # answers that a pace is taken from
_BATCH_S = 0.02  # answers no further apart than this are of one batch
_FULL = 16  # a shorter line does not fill the replicas' batches: its pace says nothing of theirs


@dataclass(eq=False, slots=True)
class Place:
    """One request in the line.

    Attributes:
        deadline: when it has to be answered, on the line's clock.
        refused: set once it is clear that it will not be.
        begun: it is being answered already, and is let alone.
        wait_s: how long those before it take, in seconds, when it was refused.
    """

    deadline: float
    refused: asyncio.Event = field(default_factory=asyncio.Event)
    begun: bool = False
    wait_s: float = 0.0


class Line:
    """Requests in the order in which they came, and the pace at which they are answered.

    The pace is that of the last answers while the line was long, over the time in which it was.  A
    request is refused when those before it take longer than it may: when it comes, or later, if the
    pace turns out to be slower.  Before the first answers nobody is.  A pace is taken once a batch
    has been answered as a whole: the time that it took is not that of its first answer alone.

    Args:
        clock: seconds, for tests; by default ``time.monotonic``.
    """

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        self._clock = clock = clock or time.monotonic
        self._places: list[Place] = []
        self._full_s, self._seen = 0.0, clock()  # seconds with a long line, up to when
        self._answered: deque[float] = deque([0.0], maxlen=_MOST + 1)  # those, at each answer
        self._pace_s: float | None = None  # seconds an answer
        self._taken: asyncio.TimerHandle | None = None

    async def run(self, work: Awaitable[T], left_s: float) -> T:
        """The result of ``work``, which is cancelled if it cannot come in time.

        Raises:
            Overloaded: those before it take longer than ``left_s`` seconds.
        """
        with self.place(left_s) as place:
            return await self.first(work, place)

    async def first(self, work: Awaitable[T], place: Place) -> T:
        """The result of ``work``, after which its ``place`` has begun; errors as :meth:`run`."""
        task = asyncio.ensure_future(work)
        refused = asyncio.ensure_future(place.refused.wait())
        try:
            await asyncio.wait({task, refused}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                place.begun = True
                return task.result()
            raise Overloaded(
                "too many requests are waiting: this one would not be answered in time",
                place.wait_s,
            )
        finally:
            refused.cancel()
            if not task.done():
                task.cancel()
                await asyncio.wait({task})

    @contextmanager
    def place(self, left_s: float) -> Iterator[Place]:
        """A place in the line for as long as the block runs; whoever leaves without an error has
        been answered.
        """
        place = Place(self._now() + left_s)
        self._places.append(place)
        self._look()
        try:
            yield place
            self._now()
            if len(self._places) >= _FULL:
                self._answered.append(self._full_s)
                if self._taken is None:
                    loop = asyncio.get_running_loop()
                    self._taken = loop.call_later(_BATCH_S, self._take_pace)
        finally:
            self._now()
            self._places.remove(place)
            self._look()

    def _now(self) -> float:
        """The time; to be called before the line changes."""
        now = self._clock()
        if len(self._places) >= _FULL:
            self._full_s += now - self._seen
        self._seen = now
        return now

    def _take_pace(self) -> None:
        self._taken = None
        self._now()
        if len(self._answered) > _FEWEST:
            took_s = self._answered[-1] - self._answered[0]
            self._pace_s = took_s / (len(self._answered) - 1)
        self._look()

    def _look(self) -> None:
        """Refuse those who wait in vain."""
        if (seconds := self._pace_s) is None:
            return
        now = self._seen
        ahead = 0
        for place in self._places:
            if place.refused.is_set():
                continue
            ahead += 1
            # The first ones are being answered, and a pace of long ago may say nothing of them.
            vain = ahead > _FULL and ahead * seconds > place.deadline - now
            if vain and not place.begun:
                place.wait_s = ahead * seconds
                place.refused.set()
                ahead -= 1  # nobody waits for it
