"""Callers with the same key share one call. A caller never joins a call that has already begun."""

import asyncio

import pytest

from api.flights import Flights
from storage.errors import Unreachable


class Source:
    """A call that ends when the test lets it: it returns its number, or raises what `errors` has for that."""

    def __init__(self):
        self.calls = 0
        self.errors: dict[int, Exception] = {2: ValueError("the second call fails")}
        self.called, self.may_end = asyncio.Event(), asyncio.Semaphore(0)

    async def call(self) -> int:
        self.calls += 1
        number = self.calls
        self.called.set()
        await self.may_end.acquire()
        if number in self.errors:
            raise self.errors[number]
        return number

    def end(self, count: int) -> None:
        """Lets `count` calls end."""
        for _ in range(count):
            self.may_end.release()


@pytest.fixture
async def begun():
    """Flights with one call that has begun, its source, and the caller who waits for it."""
    flights, source = Flights(), Source()
    first = asyncio.ensure_future(flights.join("page", source.call))
    await source.called.wait()
    return flights, source, first


async def join(flights, source, count: int) -> list[asyncio.Task]:
    callers = [asyncio.ensure_future(flights.join("page", source.call)) for _ in range(count)]
    await asyncio.sleep(0)  # now all of them have joined
    return callers


async def test_callers_who_come_later_share_the_next_call(begun):
    flights, source, first = begun
    later = await join(flights, source, 50)
    assert source.calls == 1
    source.end(2)
    assert await first == 1
    results = await asyncio.gather(*later, return_exceptions=True)
    assert {str(result) for result in results} == {"the second call fails"}
    third = await join(flights, source, 50)
    source.end(1)
    assert set(await asyncio.gather(*third)) == {3}
    assert source.calls == 3


async def test_an_error_reaches_all_who_waited_and_the_next_call_begins_nevertheless(begun):
    flights, source, first = begun
    second = await join(flights, source, 3)
    source.end(1)
    assert await first == 1
    while source.calls < 2:
        await asyncio.sleep(0)
    third = await join(flights, source, 3)
    source.end(2)
    failed = await asyncio.gather(*second, return_exceptions=True)
    assert [type(error) for error in failed] == [ValueError] * 3
    assert await asyncio.gather(*third) == [3, 3, 3]


async def test_where_redis_is_unreachable_the_next_callers_get_the_error_without_another_call(begun):
    flights, source, first = begun
    source.errors[1] = Unreachable("Redis is away")
    second = await join(flights, source, 3)
    source.end(1)
    results = await asyncio.gather(first, *second, return_exceptions=True)
    assert [type(error) for error in results] == [Unreachable] * 4
    assert source.calls == 1


async def test_a_caller_who_is_cancelled_does_not_disturb_the_others(begun):
    flights, source, first = begun
    first.cancel()
    second = await join(flights, source, 3)
    second[1].cancel()
    source.calls += 1  # so that the next call is the third, which does not fail
    source.end(2)
    assert await asyncio.gather(second[0], second[2]) == [3, 3]
    assert first.cancelled() and second[1].cancelled()


async def test_calls_with_different_keys_do_not_wait_for_each_other(begun):
    flights, source, first = begun

    async def other() -> str:
        return "other"

    assert await flights.join("other", other) == "other"
    source.end(1)
    assert await first == 1
