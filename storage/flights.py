"""Reads shared by all who wait for the same: one call to Redis, one body, one ETag.

A request joins the *next* flight to start, never one already under way, so no answer is older than its question.
Nothing is cached and nothing must be invalidated.
"""

import asyncio
from collections.abc import Awaitable, Callable, Hashable


class Flights:
    """Flights by key: at most one under way and one boarding for each."""

    def __init__(self):
        self._boarding: dict[Hashable, asyncio.Task] = {}
        self._under_way: dict[Hashable, asyncio.Task] = {}

    async def join(self, key: Hashable, fly: Callable[[], Awaitable]):
        """What `fly` returns, called once for all who join until it starts. Its error goes to all of them.

        A flight is a task of its own: whoever leaves does not take the others' answer away.
        """
        flight = self._boarding.get(key)
        if flight is None:
            flight = self._boarding[key] = asyncio.create_task(self._fly(key, fly))
        return await asyncio.shield(flight)

    async def _fly(self, key: Hashable, fly: Callable[[], Awaitable]):
        if previous := self._under_way.get(key):
            await asyncio.wait([previous])
        flight = self._under_way[key] = self._boarding.pop(key)
        try:
            return await fly()
        finally:
            if self._under_way[key] is flight:
                del self._under_way[key]
