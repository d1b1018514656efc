"""/console/: a page for people, of files that are read once. It holds no data: what it shows it asks the APIs for, with
the credentials that its user gives it.
"""

import hashlib
from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import Final

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

_MEDIA_TYPES: Final = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
PAGE: Final = "index.html"
HEADERS: Final = {
    # Nothing that stands in the page itself runs, nothing comes from elsewhere, and no text can become a script.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}
"""Of every answer. A browser keeps the files and asks each time whether they have changed."""

_CONTENTS: Final = {
    file.name: file.read_bytes()
    for file in sorted(files(__package__).joinpath("static").iterdir(), key=lambda f: f.name)
}
PATHS: Final = frozenset({"/console", "/console/", *(f"/console/{name}" for name in _CONTENTS if name != PAGE)})
"""They ask for no credentials."""


def console_routes() -> list[Route]:
    """One for each file: there is no path that could lead to another one."""
    contents = dict(_CONTENTS)
    page = contents.pop(PAGE)
    return [
        Route("/console", _to_the_page),
        Route("/console/", _answering(PAGE, page)),
        *(Route(f"/console/{name}", _answering(name, content)) for name, content in contents.items()),
    ]


async def _to_the_page(request: Request) -> Response:
    """Relative, as everything in the page is: it also works below a gateway's prefix."""
    return RedirectResponse("console/", headers=HEADERS)


def _answering(name: str, content: bytes) -> Callable[[Request], Awaitable[Response]]:
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    media_type = _MEDIA_TYPES[name[name.rindex(".") :]]

    async def answer(request: Request) -> Response:
        headers = {**HEADERS, "etag": tag}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=media_type)

    return answer
