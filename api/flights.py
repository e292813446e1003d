"""Reads that several requests share: one call to Redis, one body, one ETag.

A request joins the *next* flight, never one that has started. So no answer is older than its request. Nothing is cached
and nothing must be invalidated.
"""

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from time import perf_counter
from urllib.parse import unquote

from api import tokens
from api.headers import list_header, preferred_wait
from api.limits import begin_read, end_read
from storage import traces
from storage.errors import Unreachable
from storage.metrics import FLIGHTS, PASSENGERS


class Flights:
    """Flights by key. For each key at most one is flying and one is boarding."""

    def __init__(self):
        self._loop = asyncio.get_running_loop()  # kept, because Python 3.11 makes a system call to look it up
        self._boarding: dict[Hashable, tuple[Callable[[], Awaitable], list[asyncio.Future]]] = {}
        self._flying: dict[Hashable, asyncio.Task] = {}

    def join(self, key: Hashable, fly: Callable[[], Awaitable]) -> asyncio.Future:
        """Await the result of `fly`, which is called once for all who join before it starts. All of them get its error.

        Each caller has a future of its own, and the flight is a task of its own. So a caller that is cancelled does not
        disturb the others. (`asyncio.shield` around one task would do the same, but takes 4 µs a request instead of 1.)
        """
        boarding = self._boarding.get(key)
        if boarding is None:
            if traces.tracer:
                fly = traces.keep(fly)
            boarding = self._boarding[key] = fly, []
            if key not in self._flying:
                self._flying[key] = self._loop.create_task(self._fly(key))
        seat = self._loop.create_future()
        boarding[1].append(seat)
        return seat

    async def _fly(self, key: Hashable) -> None:
        """Fly one flight after the other, as long as somebody boards."""
        try:
            while key in self._boarding:
                fly, seats = self._boarding.pop(key)
                try:
                    answer, error = await fly(), None
                except Unreachable as unreachable:
                    # The next flight would wait as long for the same server. So its passengers get the error now.
                    answer, error = None, unreachable
                    seats += self._boarding.pop(key, (None, []))[1]
                except Exception as other:
                    answer, error = None, other
                FLIGHTS.add()
                PASSENGERS.add(len(seats))
                for seat in seats:
                    if seat.done():  # its caller was cancelled
                        continue
                    if error:
                        seat.set_exception(error)
                    else:
                        seat.set_result(answer)
        finally:
            del self._flying[key]


def shared_read(read):
    """A handler from a function that makes an Answer. Requests for one address at the same time share one flight."""

    async def handler(request, **path):
        flights = request.app.ctx.flights
        if request.app.ctx.limiter:
            answer = await _join_limited(request, request.raw_url, read, path)
        else:
            answer = await flights.join(request.raw_url, lambda: read(request, **path))
        return await answer.respond(request)

    handler.__name__, handler.__doc__ = read.__name__, read.__doc__
    return handler


def awaited_read(read):
    """Like shared_read, and with `Prefer: wait=N` the handler waits while there is nothing new (RFC 7240, section 4.3).

    It waits outside of the flight: only then a client that goes away ends its wait. All who waited share a new flight.
    """

    async def handler(request, **path):
        ctx, seconds = request.app.ctx, preferred_wait(list_header(request, "prefer"))
        if ctx.limiter:
            answer = await _join_limited(request, request.raw_url, read, path)
        else:
            answer = await ctx.flights.join(request.raw_url, lambda: read(request, **path))
        if seconds and (awaited := answer.awaited):
            del answer  # 2 kB for each who waits
            try:
                await ctx.waiting.wait(awaited, seconds)
            finally:  # for api/metrics.py: the client asked for this delay, also if it goes away meanwhile
                request.stream.perft0 = perf_counter()
            answer = await ctx.flights.join(request.raw_url, lambda: read(request, **path))
        response = await answer.respond(request)
        if seconds:
            response.headers["Preference-Applied"] = f"wait={seconds}"
        return response

    handler.__name__, handler.__doc__ = read.__name__, read.__doc__
    return handler


def owned_read(read):
    """Like shared_read, for what a user of the path sees more of than others: `read` is told whether the user asks.

    A token that is not valid is refused. Otherwise its owner would take the part that others see for the whole.
    """

    async def handler(request, user: str):
        ctx, user = request.app.ctx, unquote(user)
        owns = "authorization" in request.headers and await tokens.user(request) == user
        key, path = (request.raw_url, owns), {"user": user, "owns": owns}
        if ctx.limiter:
            answer = await _join_limited(request, key, read, path)
        else:
            answer = await ctx.flights.join(key, lambda: read(request, **path))
        return await answer.respond(request)

    handler.__name__, handler.__doc__ = read.__name__, read.__doc__
    return handler


async def _join_limited(request, key: Hashable, read, path: dict):
    """Join a flight, and count the request against its limit meanwhile. Raises Problem 429.

    A request over its limit may have joined the flight already. So it is refused no later than the others are answered.
    """
    ticket = begin_read(request)
    try:
        answer = await request.app.ctx.flights.join(key, lambda: read(request, **path))
    except Exception:
        if ticket:
            await end_read(request, ticket)  # 429 comes before the error of the read
        raise
    if ticket:
        entry, number = ticket
        if entry.headers and number <= entry.allowed:
            request.stream.limits = entry.headers  # the usual case, without the calls of end_read
        else:
            await end_read(request, ticket)
    return answer
