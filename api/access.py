"""The log line and the span of a request. They have nothing that a client chose, but the id, which was checked.

So they have the template of the route, not the address: an address may be long, and a query may hold anything.
"""

import re
from functools import lru_cache
from time import monotonic

from sanic.constants import HTTP_METHODS

from api.headers import request_id
from storage import logs, traces

METHODS = frozenset(map(str, HTTP_METHODS))  # as strings: a comparison with Sanic's own objects takes a µs


@lru_cache(256)
def readable(path: str) -> str:
    """The path of a route, with its parameters as the README writes them.

    >>> readable("v1/posts/<post>/comments"), readable("v1/images/<name:.+\\\\.jpg>")
    ('/v1/posts/{post}/comments', '/v1/images/{name}')
    """
    return "/" + re.sub(r"<(\w+)(:[^>]*)?>", r"{\1}", path)


def template(request) -> str:
    """`POST /v1/posts/{post}/comments`, or `-` for a part that is not known: a request without a route."""
    method = request.method if request.method in METHODS else "-"
    return f"{method} {readable(request.route.path) if request.route else '-'}"


def log(stream, response) -> None:
    """Write the line of the request that `stream`, an api.protocol.StrictHttp, answers by `response`.

    | field | what |
    |---|---|
    | `method`, `route` | null where the request is malformed or has no route |
    | `ms` | from the first byte of the request until the answer is ready to be sent |
    | `received`, `sent` | bytes of the bodies |
    | `user` | whose token was accepted, or null |
    | `id` | the answer's Request-Id |
    | `created` | the answer's Location, for a 201: it has the id of the post, which the worker's line has too |
    """
    request, status = stream.request, response.status
    user = request.ctx.user if hasattr(request.ctx, "user") else None
    logs.write(
        {
            "level": "ERROR" if status >= 500 else "INFO",
            "logger": "imagegram.request",
            "method": request.method if request.method in METHODS else None,
            "route": readable(request.route.path) if request.route else None,
            "status": status,
            "ms": round((monotonic() - stream.protocol.header_began) * 1000, 2),
            "received": (stream.request_bytes or 0) - (stream.request_bytes_left or 0),
            "sent": 0 if stream.head_only else len(response.body or b""),
            "user": user,
            "id": request_id(request),
            **({"created": response.headers.get("Location")} if status == 201 else {}),
        }
    )


def end_span(request, response) -> None:
    """End the span of a request. A request whose header is malformed has none."""
    if span := getattr(request.ctx, "span", None):
        attributes = {"http.request.method": request.method if request.method in METHODS else "_OTHER"}
        if request.route:
            attributes["http.route"] = readable(request.route.path)
        traces.end(span, template(request), response.status, attributes)
        request.ctx.span = None
