"""Server-sent events: an iterator of events becomes a response that ends with an error event, never
in silence.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.responses import StreamingResponse

from invar_ray.errors import RequestError
from serve.errors import Fault, ServiceError
from serve.http.protocol import ErrorResponse

logger = logging.getLogger("ray.serve")


def event(data: Any, name: str | None = None) -> str:
    """One event; ``data`` is a string as it is, or anything that JSON can hold."""
    text = (
        data
        if isinstance(data, str)
        else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    )
    return (f"event: {name}\n" if name else "") + f"data: {text}\n\n"


async def respond(
    events: AsyncIterator[str],
    identifier: str,
    on_error: Callable[[dict[str, Any]], str],
    last: str,
) -> StreamingResponse:
    """Stream events.  What fails before the first is an ordinary error response, later an event.

    Args:
        events: formatted ones.
        on_error: the event that tells of a failure, given the error's body.
        last: ends every stream, failed or not.

    Raises:
        Exception: what the first event raises.
    """
    first = await anext(events)

    async def body() -> AsyncIterator[str]:
        try:
            yield first
            async for each in events:
                yield each
        except Exception as error:
            fault = Fault.of(error)
            if isinstance(error, ServiceError):
                logger.warning(
                    "request %s: its stream ends: %s (%s)", identifier, fault.code, fault.message
                )
            elif not isinstance(error, RequestError):
                logger.exception("request %s: its stream ends", identifier)
            yield on_error(ErrorResponse.of(fault, identifier).model_dump())
        finally:
            await events.aclose()  # type: ignore[attr-defined]
        yield last

    # No proxy on the way may keep events back.
    return StreamingResponse(
        body(), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"}
    )
