"""Reads that several requests share: one call to Redis, one body, one ETag.

A request joins the *next* flight, never one that has started. So no answer is older than its request. Nothing is cached
and nothing must be invalidated.
"""

import asyncio
from collections.abc import Awaitable, Callable, Hashable

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
