"""Reads that several requests share: one call to Redis, one body, one ETag.

A request joins the *next* flight, never one that has started. So no answer is older than its request. Nothing is cached
and nothing must be invalidated.
"""

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from contextlib import suppress
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
        self._flying: dict[Hashable, asyncio.Task | None] = {}  # None: a caller flies

    async def join(self, key: Hashable, fly: Callable[[], Awaitable]):
        """The result of `fly`, which is called once for all who join before it starts. All of them get its error.

        The first caller makes the call itself, because a task for it would take 5 µs. The others have futures, so none
        of them disturbs the others if it is cancelled. If the first one is, they share the next flight.
        """
        boarding = self._boarding.get(key)
        if boarding is None:
            if key not in self._flying:
                return await self._lead(key, fly)
            boarding = self._boarding[key] = traces.keep(fly) if traces.tracer else fly, []
        seat = self._loop.create_future()
        boarding[1].append(seat)
        return await seat

    async def _lead(self, key: Hashable, fly: Callable[[], Awaitable]):
        self._flying[key] = None
        seats: list[asyncio.Future] = []
        self._boarding[key] = fly, seats
        try:
            await asyncio.sleep(0)  # all who ask at this moment board
            del self._boarding[key]
            PASSENGERS.add()
            return await self._fly(key, fly, seats)
        except asyncio.CancelledError:
            waiting = self._boarding.pop(key, (fly, []))[1]
            seats = [seat for seat in {*seats, *waiting} if not seat.done()]
            if seats:
                self._boarding[key] = traces.keep(fly) if traces.tracer else fly, seats
            raise
        finally:
            if key in self._boarding:
                self._flying[key] = self._loop.create_task(self._fly_all(key))
            else:
                del self._flying[key]

    async def _fly_all(self, key: Hashable) -> None:
        """Fly one flight after the other, as long as somebody boards."""
        try:
            while key in self._boarding:
                with suppress(Exception):  # those who wait have got it
                    await self._fly(key, *self._boarding.pop(key))
        finally:
            del self._flying[key]

    async def _fly(self, key: Hashable, fly: Callable[[], Awaitable], seats: list[asyncio.Future]):
        """Call `fly` and give the result, or the error, to all who wait for it, and also to the caller."""
        try:
            answer, error = await fly(), None
        except Unreachable as unreachable:
            # The next flight would wait as long for the same server. So its passengers get the error now.
            answer, error = None, unreachable
            seats = seats + self._boarding.pop(key, (None, []))[1]
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
        if error:
            raise error
        return answer


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
