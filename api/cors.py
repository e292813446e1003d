"""Cross-origin use: which pages of other origins may call the API from a browser, and what they may send and read.

The protocol: https://fetch.spec.whatwg.org/#http-cors-protocol. Nothing here runs if IMAGEGRAM_CORS_ORIGINS is empty.

No answer has Access-Control-Allow-Credentials. A token is sent in Authorization, which a browser never adds by itself.
So a page can act only for a user whose token it has, and `*` is as safe as a list of origins.
"""

from sanic.response import HTTPResponse, empty

# Headers of a request that a page may send, besides those that every page may send
# (https://fetch.spec.whatwg.org/#cors-safelisted-request-header). `Content-Type` is there for its other values.
SENT = (
    "Authorization, Content-Type, Idempotency-Key, If-Match, If-None-Match, If-Range, Prefer, Range, Request-Id, "
    "traceparent, tracestate, "
    "Tus-Resumable, Upload-Checksum, Upload-Concat, Upload-Defer-Length, Upload-Length, Upload-Metadata, "
    "Upload-Offset, X-HTTP-Method-Override, X-Request-ID, X-Requested-With"  # the last two: tus clients can send them
)
# Headers of an answer that a page may read, besides those that every page may read
# (https://fetch.spec.whatwg.org/#cors-safelisted-response-header-name).
EXPOSED = (
    "Content-Range, ETag, Idempotent-Replayed, Link, Location, Preference-Applied, RateLimit, RateLimit-Policy, "
    "Request-Id, Retry-After, "
    "Tus-Extension, Tus-Max-Size, Tus-Resumable, Tus-Version, "
    "Upload-Concat, Upload-Expires, Upload-Length, Upload-Metadata, Upload-Offset"
)
PREFLIGHT = {
    "Access-Control-Allow-Methods": "GET, HEAD, POST, PATCH, DELETE",
    "Access-Control-Allow-Headers": SENT,
    "Access-Control-Max-Age": "86400",  # seconds. Browsers shorten it: Chromium to two hours
}

Headers = dict[str | None, dict[str, str]]


def headers_by_origin(origins: tuple[str, ...]) -> Headers:
    """For each origin the headers of every answer to it; for None those of answers to all others.

    `Vary` is in both. Otherwise a cache would give a page of one origin the answer to another one, or to an `<img>`,
    which sends no Origin. With `*` all answers are alike.
    """
    exposed = {"Access-Control-Expose-Headers": EXPOSED}
    if origins == ("*",):
        return {None: {"Access-Control-Allow-Origin": "*", **exposed}}
    vary = {"Vary": "Origin"}
    return {None: vary, **{origin: {"Access-Control-Allow-Origin": origin, **exposed, **vary} for origin in origins}}


def headers_for(request, headers: Headers) -> dict[str, str]:
    """What a request's origin gets. A request without Origin, or with another one than those allowed, is like None."""
    return headers.get(request.headers.get("origin"), headers[None])


def mark(request, response: HTTPResponse, headers: Headers) -> None:
    """Add to a response what its request's origin gets.

    The pre-encoded headers of a FastResponse stay: their `Vary` and this one are two lines of one list.
    """
    response.headers.update(headers_for(request, headers))


def answer_preflight(request) -> HTTPResponse | None:
    """204 if this is a preflight of an allowed origin, on any path. A middleware: None lets the request go on.

    A preflight of another origin gets the answer to any other OPTIONS. That grants nothing, so the browser does not
    send the request.
    """
    asked = request.headers
    if request.method != "OPTIONS" or "origin" not in asked or "access-control-request-method" not in asked:
        return None
    allowed = "Access-Control-Allow-Origin" in headers_for(request, request.app.ctx.cors)
    return empty(204, PREFLIGHT) if allowed else None
