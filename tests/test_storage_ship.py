"""The shipper on real servers: what is in the store is what Redis wrote, whatever dies."""

import asyncio
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from parts import (
    PROGRAMS,
    make_settings,
    redis_on,
    restored,
    s3_url,
    shipped,
    shipping,
    until,
    writing,
)

from storage.backup import chain, retain, ship
from storage.backup import state as shipper_state
from storage.objects import Unavailable, open_store

pytestmark = pytest.mark.asyncio


@pytest.fixture(params=["valkey-folder", "redis-s3"])
def settings(request, tmp_path, monkeypatch):
    program, kind = request.param.split("-")
    backup = (tmp_path / "backup").as_uri()
    if kind == "s3":
        backup = s3_url(monkeypatch)
    return make_settings(tmp_path / "data", PROGRAMS[program], backup)


@pytest.fixture
def store(settings):
    return open_store(settings.backup_store_url)


async def whole(store) -> dict[int, list[str]]:
    """Reads every described generation, verifying all; the files of each."""
    files = {}
    for number, description in (await chain.descriptions(store)).items():
        async for header, _ in chain.read(store, number, description["base"]):
            names = files.setdefault(number, [])
            if header["file"] not in names:
                names.append(header["file"])
    return files


async def test_the_store_holds_the_bytes_of_the_files_as_they_grow(settings, store):
    async with redis_on(settings) as redis, shipping(settings, store) as shipper:
        async with writing(settings, 4):
            for _ in range(3):
                await shipped(shipper)
        await shipped(shipper)
        description = (await chain.descriptions(store))[1]
        copied: dict[str, bytes] = {}
        previous = ""
        async for header, body in chain.read(store, 1, description["base"]):
            assert header["previous"] == previous
            previous = (await store.get(chain.segment_name(1, header["file"], header["offset"])))[-32:].hex()
            copied[header["file"]] = copied.get(header["file"], b"") + body
        assert {name: (redis.aof / name).read_bytes() for name in copied} == copied
        assert redis.increment().name in copied
        assert (description["server"], description["base"]) == (shipper_family(settings), redis.base())


def shipper_family(settings):
    return "redis" if settings.redis_server else "valkey"


async def test_redis_is_asked_for_nothing_but_info_and_rewrites(settings, store):
    async with redis_on(settings) as redis:
        await redis.client.config_resetstat()
        async with shipping(settings, store) as shipper:
            await shipped(shipper)
            sent = set(await redis.client.info("commandstats"))
    ours = {"cmdstat_config|resetstat"}
    greeting = {"cmdstat_hello", "cmdstat_client|setinfo"}  # what redis-py says first on each connection
    assert sent - ours - greeting == {"cmdstat_info", "cmdstat_bgrewriteaof"}


async def test_a_generation_begins_on_schedule(settings, store):
    settings = replace(settings, snapshot_every=1)
    async with redis_on(settings), shipping(settings, store) as shipper:
        shipper.rewrite_requested_at = -1e9
        await shipped(shipper)
        shipper.rewrite_requested_at = -1e9
        await until(lambda: shipper.chain.generation >= 2, "a second generation")
    assert list(await chain.descriptions(store)) == [1, 2]


async def test_what_a_stopped_shipper_began_its_successor_goes_on_with(settings, store, tmp_path):
    async with redis_on(settings), writing(settings) as writers:
        for _ in range(3):
            async with shipping(settings, store) as shipper:
                await shipped(shipper)
                assert shipper.chain.generation == 1
        writers[0].stopping = True
    done, (found,) = await restored(settings, store, writers, tmp_path)
    assert found == list(range(1, len(found) + 1)) and len(found) >= 20


async def test_a_restart_that_cut_nothing_goes_on_with_the_chain(settings, store, tmp_path):
    async with redis_on(settings) as redis, shipping(settings, store) as shipper:
        async with writing(settings, 4) as writers:
            await shipped(shipper)
            redis.kill()
            await redis.start()
            await shipped(shipper)
        await shipped(shipper)
        assert shipper.chain.generation == 1
    _, found = await restored(settings, store, writers, tmp_path)
    for writer, numbers in zip(writers, found, strict=True):
        assert set(writer.answered) <= set(numbers) <= set(writer.begun)


@pytest.mark.parametrize("damage", ["cut", "cut and grown", "older copy"])
async def test_nothing_is_added_to_a_chain_that_the_files_left(settings, store, tmp_path, damage):
    async with redis_on(settings) as redis, shipping(settings, store) as shipper:
        async with writing(settings) as writers:
            await shipped(shipper)
            shutil.copytree(redis.folder, tmp_path / "older", ignore=shutil.ignore_patterns("*.sock"))
            await until(lambda n=writers[0].number: writers[0].number > n + 50, "more writes")
            first = shipper.chain.second
            await until(lambda: time.time() >= first + 2, "the next base is of a later second")
        await shipped(shipper)
        before = [entry.name async for entry in store.list()]
        redis.kill()
        if damage == "older copy":
            shutil.rmtree(redis.folder)
            shutil.copytree(tmp_path / "older", redis.folder)
        else:
            tail = redis.increment()
            os.truncate(tail, tail.stat().st_size - 40)
            if damage == "cut and grown":  # by what Redis would load: longer than what was shipped
                await redis.start()
                await redis.client.set("grown", "x" * 1000)
        if not await redis.answers():
            await redis.start()
        await until(lambda: shipper.chain.generation == 2, "a new generation")
        async with writing(settings):
            await shipped(shipper)
        await shipped(shipper)
        live = [int(number) for number in await redis.client.lrange(writers[0].key, 0, -1)]
    _, (found,) = await restored(settings, store, writers, tmp_path)
    assert found == live
    after = [entry.name async for entry in store.list()]
    added = [name for name in after if name not in before and name.startswith("00000001/")]
    assert len(added) == 1 and set(before) <= set(after)  # the close mark, and nothing was taken away
    assert (await chain.load(store, 1)).end["gap"] is True
    # What was shipped of the old timeline can still be had
    second = (await chain.descriptions(store))[2]["second"] - 1
    done, (old,) = await restored(settings, store, writers, tmp_path, second)
    assert done.generation == 1


def begin(settings) -> ship.Shipper:
    """A shipper whose end the test looks at itself."""
    shipper = ship.Shipper(settings, open_store(settings.backup_store_url))
    shipper.task = asyncio.ensure_future(shipper.run())
    return shipper


async def end(shipper) -> None:
    shipper.stop.set()
    await asyncio.wait_for(shipper.task, 20)


async def test_of_two_shippers_one_stops_and_says_so(settings, store):
    async with redis_on(settings), writing(settings, 2):
        first = begin(settings)
        await shipped(first)
        second = begin(settings)
        done, _ = await asyncio.wait([first.task, second.task], return_when="FIRST_COMPLETED", timeout=20)
        assert len(done) == 1
        with pytest.raises(ship.Stopped, match="another shipper"):
            done.pop().result()
        alive = second if first.task.done() else first
        await shipped(alive)
        await end(alive)
    assert list(await whole(store)) == [1]


@pytest.mark.parametrize("busy", [True, False])
async def test_a_shipper_of_another_redis_does_not_take_over_a_chain_that_grows(
    settings, store, tmp_path, busy
):
    """A strayed one must not stop a living backup. One that stood still it closes; the first then stops."""
    other = replace(settings, data=tmp_path / "other", redis_url=f"unix://{tmp_path}/other/redis/redis.sock")
    async with redis_on(settings) as redis, redis_on(other):
        first = begin(settings)
        await shipped(first)
        async with writing(settings, 1 if busy else 0):
            second = begin(other)
            if not busy:
                await shipped(second)
                await redis.client.set("a", "write")
            loser, winner = (second, first) if busy else (first, second)
            with pytest.raises(ship.Stopped, match="another shipper"):
                await asyncio.wait_for(loser.task, 20)
            await shipped(winner)
            await end(winner)
    assert list(await whole(store)) == ([1] if busy else [1, 2])


class Faulty:
    """A store that fails at random, before or after it did as it was told."""

    def __init__(self, store, rate: float):
        self._store, self.rate, self.failed = store, rate, 0

    def __getattr__(self, verb):
        return getattr(self._store, verb)

    async def create(self, name, data):
        await self._maybe()
        await self._store.create(name, data)
        await self._maybe()

    async def get(self, name):
        await self._maybe()
        return await self._store.get(name)

    async def _maybe(self):
        if random.random() < self.rate:
            self.failed += 1
            raise Unavailable("at random")


async def test_a_store_that_fails_half_way_leaves_no_gap_and_is_caught_up_with(
    settings, store, tmp_path, monkeypatch
):
    monkeypatch.setattr(ship, "PUT_RETRY", 0.01)
    faulty = Faulty(store, 0.3)
    async with redis_on(settings) as redis, shipping(settings, faulty) as shipper:
        async with writing(settings, 2) as writers:
            for _ in range(3):
                await shipped(shipper)
                await redis.rewrite()
        await shipped(shipper)
        assert faulty.failed > 5
        faulty.rate = 0
    await whole(store)
    _, found = await restored(settings, store, writers, tmp_path)
    for writer, numbers in zip(writers, found, strict=True):
        assert set(writer.answered) <= set(numbers) <= set(writer.begun)


async def test_while_the_store_is_away_the_lag_is_known_and_rewrites_lose_nothing(settings, store, tmp_path):
    faulty = Faulty(store, 0)
    async with redis_on(settings) as redis, shipping(settings, faulty) as shipper:
        async with writing(settings, 2) as writers:
            await shipped(shipper)
            assert shipper_state.read(settings)["lag"] < 5 and not shipper_state.read(settings)["trouble"]
            faulty.rate = 1
            await until(lambda: shipper_state.read(settings)["trouble"], "the trouble is told")
            away = time.time()
            for _ in range(3):
                await redis.rewrite()
            await until(lambda: shipper_state.read(settings)["lag"] > time.time() - away, "the lag grows")
            faulty.rate = 0
            await shipped(shipper)
            await until(lambda: not shipper_state.read(settings)["trouble"], "all is well again")
        await shipped(shipper)
    # Every increment of the time away was held open: the first chain joins the newest without a gap
    ends = [(await chain.load(store, number)).end for number in await chain.descriptions(store)]
    assert [end["gap"] for end in ends if "closed" in end] == [False] * (len(ends) - 1) and len(ends) > 1
    _, found = await restored(settings, store, writers, tmp_path)
    for writer, numbers in zip(writers, found, strict=True):
        assert set(writer.answered) <= set(numbers) <= set(writer.begun)


class SlowBases:
    """A store that takes its time for each piece of a base: 5 s for one of 4 MiB, in pieces of 64 KiB."""

    def __init__(self, store):
        self._store = store

    def __getattr__(self, verb):
        return getattr(self._store, verb)

    async def create(self, name, data):
        if ".base." in name:
            await asyncio.sleep(0.08)
        await self._store.create(name, data)


async def lags(settings, shipper, generation: int) -> tuple[float, float, set[str]]:
    """Until a generation is the current one: the seconds it took, the longest lag, and the troubles told meanwhile."""
    began, worst, troubles = time.monotonic(), 0.0, set()
    while not shipper.chain or shipper.chain.generation != generation or not shipper.chain.second:
        assert not shipper.task.done() and time.monotonic() < began + 60
        known = shipper_state.read(settings)
        worst = max(worst, float("inf") if known["lag"] is None else known["lag"])
        troubles.add(known["trouble"])
        await asyncio.sleep(0.02)
    return time.monotonic() - began, worst, troubles


@pytest.fixture
def slow(settings, store, monkeypatch):
    monkeypatch.setattr(chain, "SEGMENT", 64 * 1024)
    return SlowBases(store)


one_server = pytest.mark.parametrize("settings", ["valkey-folder"], indirect=True)


@one_server
async def test_there_is_no_lag_while_a_large_base_is_shipped_beside_a_chain_that_grows(settings, store, tmp_path, slow):
    async with redis_on(settings) as redis, shipping(settings, slow) as shipper:
        await shipped(shipper)
        await redis.client.set("large", os.urandom(4 << 20))
        await shipped(shipper)
        async with writing(settings) as writers:
            await redis.rewrite()
            watched = asyncio.ensure_future(lags(settings, shipper, 2))
            await until(lambda: writers[0].number > 50 and shipper.next_chain, "writes while the base is on its way")
            await shipped(shipper)
            moment = time.time() - shipper_state.read(settings)["lag"]
            done, (found,) = await restored(settings, store, writers, tmp_path)
            assert done.generation == 1 and shipper.next_chain, "the base was shipped too early"
            took, worst, troubles = await watched
        assert took > 4 and worst < took / 2 and troubles == {""}
    # What the lag claims is true: without the new base, nothing older than that is missing
    assert {number for number, at in writers[0].answered.items() if at <= moment} <= set(found)


@one_server
async def test_the_lag_grows_and_is_explained_while_the_first_base_or_that_after_a_break_is_shipped(settings, slow):
    async with redis_on(settings) as redis:
        await redis.client.set("large", os.urandom(2 << 20))
        await redis.rewrite()
        async with shipping(settings, slow) as shipper:
            _, worst, troubles = await lags(settings, shipper, 1)
            assert worst == float("inf")  # never caught up
            assert len([told for told in troubles if re.fullmatch(r"generation 1 begins: .* of 2.0 MiB .*", told)]) > 5
            await redis.client.set("lost", "by the cut")
            await shipped(shipper)
            assert not shipper_state.read(settings)["trouble"]
            redis.kill()
            os.truncate(redis.increment(), 0)
            await redis.start()
            took, worst, troubles = await lags(settings, shipper, 2)
            assert took > 2 and worst > took - 1
            assert any(told.startswith("generation 2 begins: ") for told in troubles)


@one_server
async def test_the_lag_grows_while_the_newest_data_are_in_the_coming_generation_only(settings, slow, monkeypatch):
    async with redis_on(settings) as redis, shipping(settings, slow) as shipper:
        await redis.client.set("large", os.urandom(4 << 20))
        await shipped(shipper)
        monkeypatch.setattr(shipper.files, "refresh", lambda: None)  # as if both rewrites came between two looks
        await redis.rewrite()
        await redis.rewrite()
        monkeypatch.undo()
        monkeypatch.setattr(chain, "SEGMENT", 64 * 1024)
        await until(lambda: shipper.next_chain, "the next base is on its way")
        took, worst, troubles = await lags(settings, shipper, shipper.next_chain.generation)
        assert took > 4 and worst > took - 1
        assert any(told.startswith("generation 2 begins: ") for told in troubles)
    assert (await chain.load(slow, 1)).end["gap"] is True


async def test_ten_rewrites_in_a_row_lose_nothing(settings, store, tmp_path):
    async with redis_on(settings) as redis, shipping(settings, store) as shipper:
        async with writing(settings, 2) as writers:
            await shipped(shipper)
            for _ in range(10):
                await redis.rewrite()
        await shipped(shipper)
        await until(lambda: shipper.chain.base == redis.base(), "the newest base is shipped")
    files = await whole(store)
    assert len(files) > 1
    _, found = await restored(settings, store, writers, tmp_path)
    for writer, numbers in zip(writers, found, strict=True):
        assert set(writer.answered) <= set(numbers) <= set(writer.begun)


async def test_a_shipper_killed_at_any_moment_leaves_a_chain_to_go_on_with(settings, store, tmp_path):
    environ = {
        **os.environ,
        "IMAGEGRAM_DATA": str(settings.data),
        "IMAGEGRAM_BACKUP_STORE": settings.backup_store_url,
        "IMAGEGRAM_VERIFY_EVERY": "0",
    }
    program = "from storage import settings; from storage.backup import ship; ship.main(settings.load())"
    command = [sys.executable, "-c", program]

    async def count():
        return len([entry async for entry in store.list()])

    async with redis_on(settings) as redis, writing(settings, 2) as writers:
        for _ in range(6):
            before = await count()
            process = subprocess.Popen(command, env=environ)
            await until(lambda n=before: after(count, n), "something is shipped")
            await redis.rewrite()
            await asyncio.sleep(random.random() / 5)  # the moment of the kill is meant to be any
            process.send_signal(signal.SIGKILL)
            process.wait()
        for writer in writers:
            writer.stopping = True
        async with shipping(settings, store) as shipper:
            await shipped(shipper)
    await whole(store)
    _, found = await restored(settings, store, writers, tmp_path)
    for writer, numbers in zip(writers, found, strict=True):
        assert set(writer.answered) <= set(numbers) <= set(writer.begun)


async def after(count, before):
    return await count() > before


# Retention


def described(*ages_in_hours, now=100 * 86400.0):
    return {n: {"second": int(now - age * 3600)} for n, age in enumerate(ages_in_hours, 1)}


async def test_every_second_of_a_day_is_kept_and_one_base_a_day_of_a_month(tmp_path):
    settings = make_settings(tmp_path, "", "file:///x")
    ages = [*range(35 * 24, 0, -6)]
    one_a_quarter_day = described(*ages)
    whole, bases = retain.select_kept(one_a_quarter_day, settings, len(ages), 100 * 86400.0)
    assert sorted(ages[n - 1] for n in whole) == [6, 12, 18, 24, 30]
    days = [one_a_quarter_day[n]["second"] // 86400 for n in sorted(bases)]
    assert len(days) == len(set(days)) == 29 and days == list(range(days[0], days[0] + 29))
    assert not whole & bases


@pytest.mark.parametrize("good", [0, 3])
async def test_nothing_is_removed_below_what_was_verified(tmp_path, good):
    settings = make_settings(tmp_path, "", "file:///x")
    old = described(*[90 * 24 - n for n in range(5)])
    whole, bases = retain.select_kept(old, settings, good, 100 * 86400.0)
    assert whole >= set(range(good or 1, 6))
    assert whole | bases == set(range(good or 1, 6))


async def test_a_sweep_removes_what_is_not_kept_and_leaves_chains_that_can_be_read(settings, store, tmp_path):
    settings = replace(settings, keep_seconds=0)
    async with redis_on(settings) as redis, shipping(settings, store) as shipper, writing(settings):
        for number in range(1, 5):
            await until(lambda n=number: shipper.chain and shipper.chain.generation == n, "a generation")
            await shipped(shipper)
            if number == 1:  # which is restored below by its second: no other may have the same
                await until(lambda: time.time() >= shipper.chain.second + 2, "a later second")
            if number < 4:
                await redis.rewrite()
    assert list(await whole(store)) == [1, 2, 3, 4]  # nothing was verified yet
    await store.put("verified", b'{"good": 3, "ok": true, "time": 0}')
    assert await retain.remove_old(store, settings, 4) > 0
    left = await whole(store)
    assert list(left) == [1, 3, 4] and len(left[1]) == 1 and len(left[3]) > 1
    done, _ = await restored(settings, store, [], tmp_path, (await chain.descriptions(store))[1]["second"])
    assert done.generation == 1
    assert await retain.remove_old(store, settings, 4) == 0


async def test_a_state_nobody_wrote_says_that_no_shipper_ran(tmp_path):
    assert shipper_state.read(make_settings(tmp_path, "", "file:///x"))["lag"] is None
    with suppress(FileNotFoundError):
        Path(tmp_path, "shipping.json").unlink()
