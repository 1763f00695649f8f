"""Ask a running service: what ``invar-ray ask`` and ``invar-ray mcp`` call.  Needs neither Ray nor
torch, nor httpx, whose import takes longer than the question: it brings a program for terminals.
"""

from __future__ import annotations

import json
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import HTTPRedirectHandler, Request, build_opener

from invar_ray.console import label
from invar_ray.errors import RequestError, ResourceError


class _Stay(HTTPRedirectHandler):
    """Follows no redirection: the key would go along, whoever it leads to."""

    def redirect_request(self, *_: Any) -> None:
        return None


def ask(
    url: str,
    question: str,
    top_k: int | None = None,
    api_key: str | None = None,
    timeout_s: float = 60.0,
) -> dict[str, Any]:
    """Ask a service for an answer.

    Args:
        url: its address, e.g. ``http://127.0.0.1:8000``.
        question: the question.
        top_k: number of passages; ``None`` takes the service's default.
        api_key: its key, if it asks for one.
        timeout_s: longest wait in seconds.

    Returns:
        The response of ``POST /v1/answer``: see :class:`serve.http.protocol.AnswerResponse`.

    Raises:
        RequestError: if the service refuses the request (4xx).
        ResourceError: if it cannot be reached, fails, or is too busy.
    """
    body: dict[str, Any] = {"question": question}
    if top_k is not None:
        body["top_k"] = top_k
    answer = post(url, "/v1/answer", body, api_key, timeout_s)
    if "answer" not in answer:
        raise ResourceError(f"{url} sent something else than an answer", action="check the address")
    return answer


def post(
    url: str, path: str, body: dict[str, Any], api_key: str | None, timeout_s: float
) -> dict[str, Any]:
    """Send a request to one of a service's routes, such as ``/v1/retrieve``.

    Args:
        url, api_key, timeout_s: see :func:`ask`.
        path: of the route.
        body: of the request.

    Returns:
        The response's JSON object.

    Raises:
        RequestError, ResourceError: see :func:`ask`.
    """
    key = (api_key or "").strip()  # a mounted secret's line break is no part of it
    if not (key.isascii() and key.isprintable()):  # http.client would show it in its error
        raise RequestError(
            "the key holds characters that no HTTP header may hold",
            expected="printable ASCII",
            action="look at INVAR_API_KEY: was a whole file pasted?",
        )
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    address = f"{url.rstrip('/')}{path}"
    try:
        status, text, wait = _send(address, json.dumps(body).encode(), headers, timeout_s)
    except TimeoutError as error:
        raise ResourceError(
            f"no answer from {address} within {timeout_s:g} s",
            action="wait longer, or look at the service's log",
        ) from error
    except (OSError, HTTPException, ValueError) as error:
        raise ResourceError(
            f"cannot reach {address}: {error}",
            action="start the service with `invar-ray serve`, or correct the address",
        ) from error
    if status == 200:
        try:
            answer = json.loads(text)
        except ValueError:
            answer = None
        if isinstance(answer, dict):
            return answer
        raise ResourceError(
            f"{address} sent something else than an answer", action="check the address"
        )
    message = _message(text)
    if 400 <= status < 500 and status != 429:
        action = "set INVAR_API_KEY to the service's key" if status == 401 else ""
        raise RequestError(
            f"{address} refused the request (HTTP {status}): {message}", action=action
        )
    raise ResourceError(
        f"{address} cannot answer now (HTTP {status}): {message}",
        action=f"try again in {wait} s" if wait else "look at the service's log",
    )


def _send(
    address: str, body: bytes, headers: dict[str, str], timeout_s: float
) -> tuple[int, str, str | None]:
    """Status, text and ``Retry-After`` of a response."""
    if not address.startswith(("http://", "https://")):
        raise ValueError("an address starts with http:// or https://")
    request = Request(address, body, {**headers, "Content-Type": "application/json"})
    try:
        with build_opener(_Stay).open(request, timeout=timeout_s) as response:
            return response.status, response.read().decode("utf-8", "replace"), None
    except HTTPError as error:
        with error:
            text = error.read().decode("utf-8", "replace")
        return error.code, text, error.headers.get("Retry-After")
    except URLError as error:
        if isinstance(error.reason, OSError):
            raise error.reason from error
        raise


def _message(text: str) -> str:
    try:
        error = json.loads(text)["error"]
        return label(f"{error['message']} (request {error['request_id']})")
    except (ValueError, KeyError, TypeError):
        return label(text[:200])
