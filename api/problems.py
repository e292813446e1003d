"""Errors as problem details: application/problem+json (RFC 9457), one table from refusal to status.

`code` is the refusal's word in small letters: stable, and what a client programs against.
"""

from contextlib import suppress
from http import HTTPStatus
from time import monotonic

import orjson
from sanic import exceptions
from sanic.constants import HTTP_METHODS
from sanic.handlers import ErrorHandler
from sanic.log import error_logger
from sanic.response import HTTPResponse

from api.access import template
from api.answers import ProblemResponse
from api.headers import request_id
from api.protocol import EncodedBody
from storage import errors, objects, segments

# Every answer below /v1/uploads has it in a header. That includes errors of the router, which know no blueprint.
TUS_VERSION = "1.0.0"


# The part of a request that is wrong: {"pointer": "#/text"}, {"parameter": "limit"} or {"header": "Idempotency-Key"}
Where = dict[str, str]


class Problem(Exception):
    """A refusal that needs no call to storage. A 422 says in `where` which part of the request is wrong."""

    def __init__(
        self,
        status: int,
        code: str,
        detail: str,
        headers: dict[str, str] | None = None,
        where: Where | None = None,
    ):
        super().__init__(detail)
        self.status, self.code, self.detail, self.headers = status, code, detail, headers or {}
        self.where = where


STATUS = {
    errors.NoPost: 404,
    errors.NoComment: 404,
    errors.NoUpload: 404,
    errors.NoImage: 404,
    errors.Forbidden: 403,
    errors.NotReady: 409,
    errors.Failed: 409,
    errors.Concat: 409,
    errors.Incomplete: 409,
    errors.Offset: 409,
    errors.Stale: 409,
    errors.Expired: 410,
    errors.Outdated: 410,
    errors.Precondition: 412,
    errors.TooLarge: 413,
    errors.Format: 415,
    errors.Empty: 422,
    errors.Reused: 422,
    errors.Quota: 429,
    errors.Busy: 429,
    errors.Chunks: 429,
    errors.Unreachable: 503,
    errors.Unknown: 503,
}
# What a client reads during an outage. The cause goes to the log, because it names paths and libraries.
OUTAGES = {
    errors.Unreachable: "the database cannot be reached: nothing has changed",
    errors.Unknown: "the database's answer was lost: the write may have happened",
    objects.Unavailable: "the store of images and old comments cannot be reached",
    objects.Full: "the store of images has no room",
    segments.Unreadable: "some of these comments cannot be read from the store",
}
LOG_PAUSE = 1.0  # seconds between two log lines about outages: an outage may fail a thousand requests a second
WHERE = {errors.Empty: {"pointer": "#/upload"}, errors.Reused: {"header": "Idempotency-Key"}}
# Retry-After in seconds. Redis is back in a second or not soon. Clearing a disk takes minutes. `Refusal.again` comes
# before these.
AGAIN = {503: "1", 507: "60"}

# Errors that Sanic raises itself, and their subclasses. Any other one is a fault of this server.
SANIC = {
    exceptions.BadRequest: ("bad_request", "the request is not HTTP as this server accepts it"),
    exceptions.ExpectationFailed: ("expectation_failed", "the only expectation that is met is 100-continue"),
    exceptions.NotFound: ("nowhere", "there is nothing at this address"),
    exceptions.MethodNotAllowed: ("method", "this address does not take this method"),
    exceptions.PayloadTooLarge: ("toolarge", "the request is too large"),
    EncodedBody: ("encoding", "a body is sent without a Content-Encoding"),
    exceptions.RequestTimeout: ("timeout", "the request did not arrive in time"),
    exceptions.ServiceUnavailable: ("stalled", "no byte arrived for too long"),
}


def problem(
    status: int, code: str, detail: str, headers: dict[str, str] | None = None, where: Where | None = None
) -> HTTPResponse:
    """A problem as a response. `type` is a relative URL (RFC 9457, section 3.1.1): the code's entry in the docs."""
    body = {
        "type": f"/docs#{code}",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "code": code,
    }
    if status == 422:
        body["errors"] = [{**(where or {}), "detail": detail}]
    # Without it a cache may reuse a 404 or 410 for as long as it likes (RFC 9111, section 4.2.2).
    headers = {"Cache-Control": "no-store", **(headers or {})}
    if status in AGAIN:
        headers.setdefault("Retry-After", AGAIN[status])
    response = ProblemResponse(orjson.dumps(body), status, headers, "application/problem+json")
    response.code = code
    return response


def answer_to(exception: Exception) -> HTTPResponse:
    """The response to an exception that a handler, storage or Sanic raised."""
    outage = OUTAGES.get(type(exception))
    if outage:
        log_outage(exception)
    match exception:
        case Problem():
            return problem(exception.status, exception.code, exception.detail, exception.headers, exception.where)
        case errors.Refusal():
            kind = type(exception)
            headers = {} if exception.again is None else {"Retry-After": str(exception.again)}
            return problem(STATUS[kind], exception.word.lower(), outage or str(exception), headers, WHERE.get(kind))
        case objects.Full():
            return problem(507, "full", outage)
        case objects.Unavailable():
            return problem(503, errors.Unreachable.word.lower(), outage)
        case exceptions.RequestCancelled():
            return problem(408, "timeout", "the connection broke off")  # nobody reads this answer
        case exceptions.SanicException() if kind := next((kind for kind in SANIC if isinstance(exception, kind)), None):
            code, detail = SANIC[kind]
            return problem(exception.status_code, code, detail, exception.headers)
        case _:
            return problem(500, "internal", "this is a fault of the server, and it is logged")


_last_logged = [-LOG_PAUSE]  # time.monotonic() of the last log line about an outage


def log_outage(exception: Exception) -> None:
    if monotonic() >= _last_logged[0] + LOG_PAUSE:
        _last_logged[0] = monotonic()
        error_logger.warning("outage: %s", exception)


def allowed(request) -> str:
    """The value of `Allow`: the methods an address takes (RFC 9110, section 15.5.6).

    Sanic knows them only for paths without parameters.
    """
    methods = []
    for method in HTTP_METHODS:
        with suppress(exceptions.MethodNotAllowed, exceptions.NotFound):
            request.app.router.get(request.path, method, None)
            methods.append(str(method))
    return ", ".join(methods)


class Errors(ErrorHandler):
    """Answers every error with a problem."""

    def response(self, request, exception):
        response = answer_to(exception)
        if response.status == 405:
            response.headers["Allow"] = allowed(request)
        if request.path.startswith("/v1/uploads"):
            response.headers["Tus-Resumable"] = TUS_VERSION
        if response.status == 500:
            error_logger.exception("%s %s", request_id(request), template(request), exc_info=exception)
        return response
