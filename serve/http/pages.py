"""The pages for people: ``/``, the API docs at ``/docs``, and the files of both; nothing comes from
elsewhere.

The files in ``web/`` are served as they are, there is no build step.  Swagger UI's two come from
``fastapi-offline``.
"""

from __future__ import annotations

import hashlib
from importlib import resources
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

_TYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
_OWN = (
    "page.css",
    "page.js",
    "service.js",
    "answer.js",
    "stability.js",
    "text.js",
    "theme.js",
    "docs.js",
    "icon.svg",
)
_SWAGGER = ("swagger-ui.css", "swagger-ui-bundle.js")
_PAGES = {"/": "index.html", "/docs": "docs.html"}
PATHS = frozenset({*_PAGES, *(f"/web/{name}" for name in (*_OWN, *_SWAGGER))})
"""What needs no key: these files are the same for everyone and say nothing of what is served."""

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
# Swagger UI draws its signs from data: images and sets styles on its elements.
_DOCS_POLICY = _POLICY.replace("style-src 'self'", "style-src 'self' 'unsafe-inline'").replace(
    "img-src 'self'", "img-src 'self' data:"
)


def page_routes() -> APIRouter:
    """The routes; every file is read once, here."""
    routes = APIRouter(include_in_schema=False)
    web = Path(__file__).parents[1] / "web"
    swagger = resources.files("fastapi_offline") / "static"
    for path, name in _PAGES.items():
        _add(
            routes,
            path,
            name,
            (web / name).read_bytes(),
            _DOCS_POLICY if path == "/docs" else _POLICY,
        )
    for name in _OWN:
        _add(routes, f"/web/{name}", name, (web / name).read_bytes(), _POLICY)
    for name in _SWAGGER:
        _add(routes, f"/web/{name}", name, (swagger / name).read_bytes(), _POLICY)
    return routes


def _add(routes: APIRouter, path: str, name: str, content: bytes, policy: str) -> None:
    kind = _TYPES[Path(name).suffix]
    headers = {
        "Content-Security-Policy": policy,
        "ETag": f'"{hashlib.sha256(content).hexdigest()[:32]}"',
        "Cache-Control": "no-cache",  # kept, but asked for: a new version shows at once
    }

    async def send(request: Request) -> Any:
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=kind, headers=headers)

    routes.add_api_route(path, send, methods=["GET", "HEAD"], response_class=Response)
