"""Reads shared by all who wait for the same: one call to Redis, one body, one ETag.

A request joins the *next* flight to start, never one already under way, so no answer is older than its question.
Nothing is cached and nothing must be invalidated.
"""

import asyncio
from collections.abc import Awaitable, Callable, Hashable

from storage.errors import Unreachable


class Flights:
    """Flights by key: at most one under way and one boarding for each."""

    def __init__(self):
        self._loop = asyncio.get_running_loop()  # asked for once: Python 3.11 makes a system call each time
        self._boarding: dict[Hashable, tuple[Callable[[], Awaitable], list[asyncio.Future]]] = {}
        self._flying: dict[Hashable, asyncio.Task] = {}

    def join(self, key: Hashable, fly: Callable[[], Awaitable]) -> asyncio.Future:
        """Awaits what `fly` returns, called once for all who join until it starts. Its error goes to all of them.

        Everybody has a seat of their own, and the flight is nobody's task: whoever leaves takes nothing from the
        others. (`asyncio.shield` on one task would do the same, at 4 µs a request instead of 1.)
        """
        boarding = self._boarding.get(key)
        if boarding is None:
            boarding = self._boarding[key] = fly, []
            if key not in self._flying:
                self._flying[key] = self._loop.create_task(self._fly(key))
        seat = self._loop.create_future()
        boarding[1].append(seat)
        return seat

    async def _fly(self, key: Hashable) -> None:
        """One flight after the other, as long as somebody boards."""
        try:
            while key in self._boarding:
                fly, seats = self._boarding.pop(key)
                try:
                    answer, error = await fly(), None
                except Unreachable as raised:
                    # Those who board would wait as long again for the same server: they are told now.
                    answer, error = None, raised
                    seats += self._boarding.pop(key, (None, []))[1]
                except Exception as raised:
                    answer, error = None, raised
                for seat in seats:
                    if seat.done():  # whoever sat there has gone
                        continue
                    if error:
                        seat.set_exception(error)
                    else:
                        seat.set_result(answer)
        finally:
            del self._flying[key]
