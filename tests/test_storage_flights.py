"""Who waits for the same shares one call; nobody joins a call that is already under way."""

import asyncio

import pytest

from api.flights import Flights


class Source:
    """Answers with the number of the call, when it is let."""

    def __init__(self):
        self.begun = 0
        self.begins, self.ends = asyncio.Event(), asyncio.Semaphore(0)

    async def fly(self) -> int:
        self.begun += 1
        number = self.begun
        self.begins.set()
        await self.ends.acquire()
        if number == 2:
            raise ValueError("the second one fails")
        return number


@pytest.fixture
async def under_way():
    """Flights with one under way that one passenger waits for."""
    flights, source = Flights(), Source()
    first = flights.join("page", source.fly)
    await source.begins.wait()
    return flights, source, first


async def boarded(flights, source, number: int) -> list[asyncio.Task]:
    tasks = [flights.join("page", source.fly) for _ in range(number)]
    await asyncio.sleep(0)  # now they have
    return tasks


def land(source, flights: int) -> None:
    for _ in range(flights):
        source.ends.release()


async def test_who_comes_later_waits_for_the_next_call_which_is_one_for_all(under_way):
    flights, source, first = under_way
    land(source, 2)
    assert await first == 1
    with pytest.raises(ValueError):
        await flights.join("page", source.fly)
    later = await boarded(flights, source, 50)
    land(source, 1)
    assert set(await asyncio.gather(*later)) == {3}
    assert source.begun == 3


async def test_an_error_goes_to_those_who_waited_and_the_next_flight_starts_all_the_same(under_way):
    flights, source, first = under_way
    second = await boarded(flights, source, 3)
    land(source, 1)
    assert await first == 1
    while source.begun < 2:
        await asyncio.sleep(0)
    third = await boarded(flights, source, 3)
    land(source, 2)
    failed = await asyncio.gather(*second, return_exceptions=True)
    assert [type(error) for error in failed] == [ValueError] * 3
    assert await asyncio.gather(*third) == [3, 3, 3]


async def test_who_leaves_takes_nothing_from_the_others(under_way):
    flights, source, first = under_way
    first.cancel()
    second = await boarded(flights, source, 3)
    second[1].cancel()
    source.begun += 1  # the next call is the third
    land(source, 2)
    assert await asyncio.gather(second[0], second[2]) == [3, 3]
    assert first.cancelled() and second[1].cancelled()


async def test_flights_to_different_places_do_not_wait_for_each_other(under_way):
    flights, source, first = under_way

    async def elsewhere():
        return "there"

    assert await flights.join("elsewhere", elsewhere) == "there"
    land(source, 1)
    assert await first == 1
