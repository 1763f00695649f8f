"""How the service reaches its replicas: one interface for engines in this process and for Serve's
deployments.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Protocol


class Target(Protocol):
    """Equal replicas behind one name.

    Calls raise ``RequestError`` or :class:`~serve.errors.ServiceError` for what the caller may
    know.
    """

    name: str

    async def call(self, method: str, *args: Any, left_s: float) -> Any:
        """Call a method of one replica; sent again where a replica died, so it must only read."""
        ...

    def stream(self, method: str, *args: Any, left_s: float) -> AsyncIterator[Any]:
        """What a replica's method yields; sent again where a replica died before the first item."""
        ...

    async def broadcast(self, method: str, *args: Any, timeout_s: float) -> list[Any]:
        """Call a method of every replica; exceptions are raised."""
        ...


class LocalTarget:
    """One object in this process."""

    def __init__(self, name: str, core: Any) -> None:
        self.name, self.core = name, core

    async def call(self, method: str, *args: Any, left_s: float) -> Any:
        """See :class:`Target`."""
        return await getattr(self.core, method)(*args)

    async def stream(self, method: str, *args: Any, left_s: float) -> AsyncIterator[Any]:
        """See :class:`Target`."""
        items = getattr(self.core, method)(*args)
        try:
            async for item in items:
                yield item
        finally:
            await items.aclose()

    async def broadcast(self, method: str, *args: Any, timeout_s: float) -> list[Any]:
        """See :class:`Target`."""
        return [await getattr(self.core, method)(*args)]
