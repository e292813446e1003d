"""`/metrics` for Prometheus, and the count of every answer. docs/metrics.md lists the metrics."""

import asyncio
from time import perf_counter

from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from sanic import Blueprint
from sanic.response import HTTPResponse

from api.access import METHODS, readable
from api.answers import READ, ProblemResponse
from storage import gauges, metrics
from storage.backup import state as shipper

NO_ANSWER = 499  # the status that is counted if the client has gone before its answer. nginx uses this number, too
UNKNOWN = "-"  # the route or the method of a request that has no route or is malformed

routes = Blueprint("metrics")

# (path of the route, method, status) -> the series of its count and of its duration. As many as there are answers that
# routes can give.
_series: dict[tuple[str, str, int], tuple[metrics.Series, metrics.Series]] = {}


@routes.route("/metrics", methods=READ)
async def scrape(request):
    """The numbers of all processes of this API, and what is read now. If Redis is away, without what is in Redis."""
    ctx = request.app.ctx
    readings = await gauges.redis(ctx.db, ctx.settings.partitions)

    def render() -> bytes:  # in a thread: a disk that hangs must not stop the event loop
        return metrics.render("api", readings + gauges.store(ctx.settings.store_url) + shipper.gauges(ctx.settings))

    text = await asyncio.to_thread(render)
    return HTTPResponse(text, 200, {"Cache-Control": "no-store"}, CONTENT_TYPE_PLAIN_0_0_4)


def count(http, response) -> None:
    """Count an answer as it begins. `http` is the parser, which has the request. None: no answer was possible."""
    status = NO_ANSWER if response is None or http.protocol.conn_info.lost else response.status
    request = http.request
    try:
        requests, durations = _series[request.route.path, request.method, status]
    except (AttributeError, KeyError):  # no route, or the first such answer
        requests, durations = _find(request, status)
    requests.add()
    if durations:
        durations.observe(perf_counter() - http.perft0)
    if status >= 400 and status != NO_ANSWER and isinstance(response, ProblemResponse):
        metrics.PROBLEMS.series(response.code).add()


def _find(request, status: int) -> tuple[metrics.Series, metrics.Series | None]:
    route, method = request.route, request.method
    if route is None:  # not kept: only the program's own routes are bounded
        return metrics.REQUESTS.series(UNKNOWN, method if method in METHODS else UNKNOWN, str(status)), None
    path = readable(route.path)
    found = metrics.REQUESTS.series(path, method, str(status)), metrics.DURATIONS.series(path, method)
    _series[route.path, method, status] = found
    return found
