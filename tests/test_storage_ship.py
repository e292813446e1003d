"""The shipper on real servers: the backup store holds what Redis wrote, whichever process is killed."""

import asyncio
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from parts import (
    make_settings,
    redis_on,
    restored,
    shipped,
    shipping,
    until,
    writing,
)

from storage.backup import chain, retain, ship
from storage.backup import state as shipper_state
from storage.objects import Unavailable, open_store


async def read_all(backup) -> dict[int, list[str]]:
    """Reads every described generation and checks all digests. Returns the names of each generation's files."""
    files = {}
    for number, description in (await chain.descriptions(backup)).items():
        async for header, _ in chain.read(backup, number, description["base"]):
            names = files.setdefault(number, [])
            if header["file"] not in names:
                names.append(header["file"])
    return files


async def assert_nothing_lost(settings, backup, writers, tmp_path) -> None:
    """A restore has every write that was answered, and none that was not begun."""
    _, lists = await restored(settings, backup, writers, tmp_path)
    for writer, numbers in zip(writers, lists, strict=True):
        assert set(writer.answered) <= set(numbers) <= set(writer.begun)


async def more_writes(writer, count: int = 50) -> None:
    """Waits until a writer has begun `count` more writes."""
    goal = writer.number + count
    await until(lambda: writer.number >= goal, "more writes")


async def test_the_backup_holds_the_bytes_of_the_files_as_they_grow(settings, backup):
    async with redis_on(settings) as redis, shipping(settings, backup) as shipper:
        async with writing(settings, 4):
            for _ in range(3):
                await shipped(shipper)
        await shipped(shipper)
        description = (await chain.descriptions(backup))[1]
        copied: dict[str, bytes] = {}
        previous = ""
        async for header, body in chain.read(backup, 1, description["base"]):
            assert header["previous"] == previous
            previous = (await backup.get(chain.segment_name(1, header["file"], header["offset"])))[-32:].hex()
            copied[header["file"]] = copied.get(header["file"], b"") + body
        assert {name: (redis.aof / name).read_bytes() for name in copied} == copied
        assert redis.increment().name in copied
        family = "redis" if settings.redis_server else "valkey"
        assert (description["server"], description["base"]) == (family, redis.base())


async def test_the_shipper_sends_redis_only_info_and_bgrewriteaof(settings, backup):
    async with redis_on(settings) as redis:
        await redis.client.config_resetstat()
        async with shipping(settings, backup) as shipper:
            await shipped(shipper)
            sent = set(await redis.client.info("commandstats"))
    of_the_test = {"cmdstat_config|resetstat"}
    greeting = {"cmdstat_hello", "cmdstat_client|setinfo"}  # redis-py sends these on each new connection
    assert sent - of_the_test - greeting == {"cmdstat_info", "cmdstat_bgrewriteaof"}


async def test_a_new_generation_begins_on_schedule(settings, backup, monkeypatch):
    monkeypatch.setattr(ship, "REWRITE_RETRY", 0.1)
    settings = replace(settings, snapshot_every=2)
    async with redis_on(settings), shipping(settings, backup) as shipper:
        await until(lambda: shipper.chain and shipper.chain.generation >= 2, "a second generation")
    descriptions = await chain.descriptions(backup)
    assert list(descriptions)[:2] == [1, 2]
    assert descriptions[2]["second"] >= descriptions[1]["second"] + 2


async def test_a_shipper_continues_the_chain_of_the_one_before_it(settings, backup, tmp_path):
    async with redis_on(settings), writing(settings) as writers:
        for _ in range(3):
            async with shipping(settings, backup) as shipper:
                await more_writes(writers[0])
                before = writers[0].number
                await shipped(shipper)
                assert shipper.chain.generation == 1
        writers[0].stopping = True
    _, (numbers,) = await restored(settings, backup, writers, tmp_path)
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) >= before - 1  # the last may not be answered


async def test_a_restart_of_redis_that_cut_nothing_continues_the_chain(settings, backup, tmp_path):
    async with redis_on(settings) as redis, shipping(settings, backup) as shipper:
        async with writing(settings, 4) as writers:
            await shipped(shipper)
            redis.kill()
            await redis.start()
            await shipped(shipper)
        await shipped(shipper)
        assert shipper.chain.generation == 1
    await assert_nothing_lost(settings, backup, writers, tmp_path)


@pytest.mark.parametrize("damage", ["cut", "cut and grown", "older copy"])
async def test_a_chain_ends_where_redis_files_are_no_longer_those_that_were_shipped(
    settings, backup, tmp_path, damage
):
    async with redis_on(settings) as redis, shipping(settings, backup) as shipper:
        async with writing(settings) as writers:
            await shipped(shipper)
            shutil.copytree(redis.folder, tmp_path / "older", ignore=shutil.ignore_patterns("*.sock"))
            await more_writes(writers[0])
            first = shipper.chain.second
            await until(lambda: time.time() >= first + 2, "the next base is of a later second")
        await shipped(shipper)
        before = [entry.name async for entry in backup.list()]
        redis.kill()
        if damage == "older copy":
            shutil.rmtree(redis.folder)
            shutil.copytree(tmp_path / "older", redis.folder)
        else:
            tail = redis.increment()
            os.truncate(tail, tail.stat().st_size - 40)
            if damage == "cut and grown":  # Redis can load the file, and it is longer than what was shipped
                await redis.start()
                await redis.client.set("grown", "x" * 1000)
        if not await redis.answers():
            await redis.start()
        await until(lambda: shipper.chain.generation == 2, "a new generation")
        async with writing(settings):
            await shipped(shipper)
        await shipped(shipper)
        live = [int(number) for number in await redis.client.lrange(writers[0].key, 0, -1)]
    _, (numbers,) = await restored(settings, backup, writers, tmp_path)
    assert numbers == live
    after = [entry.name async for entry in backup.list()]
    added = [name for name in after if name not in before and name.startswith("00000001/")]
    assert len(added) == 1 and set(before) <= set(after), "only the close mark was added, and nothing was removed"
    assert (await chain.load(backup, 1)).end["gap"] is True
    # The shipped part of the old timeline can still be restored.
    second = (await chain.descriptions(backup))[2]["second"] - 1
    done, (old,) = await restored(settings, backup, writers, tmp_path, second)
    assert done.generation == 1 and old


def begin(settings) -> ship.Shipper:
    """A running shipper. The test itself must await its task."""
    shipper = ship.Shipper(settings, open_store(settings.backup_store_url))
    shipper.task = asyncio.ensure_future(shipper.run())
    return shipper


async def end(shipper) -> None:
    shipper.stop.set()
    await asyncio.wait_for(shipper.task, 20)


async def test_one_of_two_shippers_of_one_redis_stops_and_says_why(settings, backup):
    async with redis_on(settings), writing(settings, 2):
        first = begin(settings)
        await shipped(first)
        second = begin(settings)
        done, _ = await asyncio.wait([first.task, second.task], return_when="FIRST_COMPLETED", timeout=20)
        assert len(done) == 1
        with pytest.raises(ship.Stopped, match="another shipper"):
            done.pop().result()
        survivor = second if first.task.done() else first
        await shipped(survivor)
        await end(survivor)
    assert list(await read_all(backup)) == [1]


@pytest.mark.parametrize("busy", [True, False])
async def test_a_shipper_of_another_redis_does_not_take_over_a_chain_that_grows(
    settings, backup, tmp_path, busy
):
    """A misconfigured second shipper must not end a backup that grows.

    A chain that does not grow looks abandoned: the second shipper closes it, and the first one stops at its next write.
    """
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
    assert list(await read_all(backup)) == ([1] if busy else [1, 2])


class Faulty:
    """A store whose calls fail at random, before or after the operation was done."""

    def __init__(self, backup, rate: float):
        self._store, self.rate, self.failed = backup, rate, 0

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


async def test_a_store_that_fails_at_random_leaves_no_gap_and_loses_nothing(settings, backup, tmp_path, monkeypatch):
    monkeypatch.setattr(ship, "PUT_RETRY", 0.01)
    faulty = Faulty(backup, 0.3)
    async with redis_on(settings) as redis, shipping(settings, faulty) as shipper:
        async with writing(settings, 2) as writers:
            for _ in range(3):
                await shipped(shipper)
                await redis.rewrite()
            await until(lambda: faulty.failed > 5, "failures of the store")
        await shipped(shipper)
        faulty.rate = 0
    await read_all(backup)
    await assert_nothing_lost(settings, backup, writers, tmp_path)


def test_an_outage_is_logged_once_also_if_each_error_says_how_long_it_took(settings, caplog):
    caplog.set_level("INFO")
    shipper = ship.Shipper(settings, open_store(settings.backup_store_url))
    for text in ("no answer after 3 retries in 141.18ms", "no answer after 3 retries in 98.2ms", "access denied", ""):
        shipper._report(text)
    lines = [record.message for record in caplog.records if record.name == "imagegram.ship"]
    assert lines == ["no answer after 3 retries in 141.18ms", "access denied", "the store is available again"]


async def test_while_the_store_is_away_the_lag_grows_and_rewrites_lose_nothing(settings, backup, tmp_path):
    faulty = Faulty(backup, 0)
    async with redis_on(settings) as redis, shipping(settings, faulty) as shipper:
        async with writing(settings, 2) as writers:
            await shipped(shipper)
            assert shipper_state.read(settings)["lag"] is not None and not shipper_state.read(settings)["trouble"]
            faulty.rate = 1
            await until(lambda: shipper_state.read(settings)["trouble"], "the trouble is reported")
            away = time.time()
            for _ in range(3):
                await redis.rewrite()
            await until(lambda: shipper_state.read(settings)["lag"] > time.time() - away, "the lag grows")
            faulty.rate = 0
            await shipped(shipper)
            await until(lambda: not shipper_state.read(settings)["trouble"], "no trouble is reported any more")
        await shipped(shipper)
    # The shipper held every increment of this time open. So the first chain joins the newest without a gap.
    ends = [(await chain.load(backup, number)).end for number in await chain.descriptions(backup)]
    assert [end["gap"] for end in ends if "closed" in end] == [False] * (len(ends) - 1) and len(ends) > 1
    await assert_nothing_lost(settings, backup, writers, tmp_path)


class SlowBases:
    """A store that takes 0.08 s for each piece of a base: 5 s for 4 MiB in pieces of 64 KiB."""

    def __init__(self, backup):
        self._store = backup

    def __getattr__(self, verb):
        return getattr(self._store, verb)

    async def create(self, name, data):
        if ".base." in name:
            await asyncio.sleep(0.08)
        await self._store.create(name, data)


async def lags_until(settings, shipper, generation: int) -> tuple[list[float], set[str]]:
    """Watches the reported state until a generation is the current one: the lags in order, and all troubles.

    A shipper that never caught up has no lag: it counts as infinite.
    """
    deadline = time.monotonic() + 60
    lags, troubles = [], set()
    while not shipper.chain or shipper.chain.generation != generation or not shipper.chain.second:
        assert not shipper.task.done() and time.monotonic() < deadline
        state = shipper_state.read(settings)
        lags.append(float("inf") if state["lag"] is None else state["lag"])
        troubles.add(state["trouble"])
        await asyncio.sleep(0.02)
    return lags, troubles


@pytest.fixture
def slow(backup, monkeypatch):
    monkeypatch.setattr(chain, "SEGMENT", 64 * 1024)
    return SlowBases(backup)


one_server = pytest.mark.parametrize("settings", ["valkey-folder"], indirect=True)


@one_server
async def test_the_lag_stays_low_while_a_large_base_is_shipped_beside_the_growing_chain(
    settings, backup, tmp_path, slow
):
    async with redis_on(settings) as redis, shipping(settings, slow) as shipper:
        await shipped(shipper)
        await redis.client.set("large", os.urandom(4 << 20))
        await shipped(shipper)
        async with writing(settings) as writers:
            await redis.rewrite()
            watcher = asyncio.ensure_future(lags_until(settings, shipper, 2))
            await until(lambda: shipper.next_chain, "the base is being shipped")
            for _ in range(3):
                await more_writes(writers[0], 20)
                await shipped(shipper)
            moment = time.time() - shipper_state.read(settings)["lag"]
            done, (numbers,) = await restored(settings, backup, writers, tmp_path)
            assert done.generation == 1 and shipper.next_chain, "the base was shipped before the chain had caught up"
            lags, troubles = await watcher
        assert lags != sorted(lags) and troubles == {""}
    # The reported lag is true: the backup without the new base has every write that is older.
    assert {number for number, at in writers[0].answered.items() if at <= moment} <= set(numbers)


@one_server
async def test_while_no_chain_can_grow_the_lag_grows_and_the_state_says_why(settings, slow):
    """First, while the first base is shipped. Then, while the base after a cut file is shipped."""
    async with redis_on(settings) as redis:
        await redis.client.set("large", os.urandom(2 << 20))
        await redis.rewrite()
        async with shipping(settings, slow) as shipper:
            lags, troubles = await lags_until(settings, shipper, 1)
            assert set(lags) == {float("inf")}
            progress = [text for text in troubles if re.fullmatch(r"generation 1 begins: .* of 2.0 MiB .*", text)]
            assert len(progress) > 1
            await redis.client.set("lost", "by the cut")
            await shipped(shipper)
            assert not shipper_state.read(settings)["trouble"]
            redis.kill()
            os.truncate(redis.increment(), 0)
            await redis.start()
            lags, troubles = await lags_until(settings, shipper, 2)
            assert len(lags) > 1 and lags == sorted(lags)
            assert any(text.startswith("generation 2 begins: ") for text in troubles)


@one_server
async def test_the_lag_grows_while_only_the_coming_generation_has_the_newest_data(settings, slow, monkeypatch):
    async with redis_on(settings) as redis, shipping(settings, slow) as shipper:
        await redis.client.set("large", os.urandom(4 << 20))
        await shipped(shipper)
        with monkeypatch.context() as patch:  # the shipper misses both rewrites, as if they were a moment apart
            patch.setattr(shipper.files, "refresh", lambda: None)
            await redis.rewrite()
            await redis.rewrite()
        await until(lambda: shipper.next_chain, "the next base is being shipped")
        lags, troubles = await lags_until(settings, shipper, shipper.next_chain.generation)
        assert len(lags) > 1 and lags == sorted(lags)
        assert any(text.startswith("generation 2 begins: ") for text in troubles)
    assert (await chain.load(slow, 1)).end["gap"] is True


async def test_ten_rewrites_in_a_row_lose_nothing(settings, backup, tmp_path):
    async with redis_on(settings) as redis, shipping(settings, backup) as shipper:
        async with writing(settings, 2) as writers:
            await shipped(shipper)
            for _ in range(10):
                await redis.rewrite()
        await shipped(shipper)
        await until(lambda: shipper.chain.base == redis.base(), "the newest base is shipped")
    assert len(await read_all(backup)) > 1
    await assert_nothing_lost(settings, backup, writers, tmp_path)


async def test_a_shipper_that_is_killed_at_any_moment_leaves_a_chain_that_the_next_one_continues(
    settings, backup, tmp_path
):
    environ = {
        **os.environ,
        "IMAGEGRAM_DATA": str(settings.data),
        "IMAGEGRAM_BACKUP_STORE": settings.backup_store_url,
        "IMAGEGRAM_VERIFY_EVERY": "0",
    }
    program = "from storage import settings; from storage.backup import ship; ship.main(settings.load())"
    command = [sys.executable, "-c", program]

    async def count() -> int:
        return len([entry async for entry in backup.list()])

    async def grown(before: int) -> bool:
        return await count() > before

    async with redis_on(settings) as redis, writing(settings, 2) as writers:
        for _ in range(6):
            before = await count()
            process = subprocess.Popen(command, env=environ)
            await until(lambda n=before: grown(n), "something is shipped")
            await redis.rewrite()
            await asyncio.sleep(random.random() / 5)  # the kill comes at a random moment
            process.send_signal(signal.SIGKILL)
            process.wait()
        for writer in writers:
            writer.stopping = True
        async with shipping(settings, backup) as shipper:
            await shipped(shipper)
    await read_all(backup)
    await assert_nothing_lost(settings, backup, writers, tmp_path)


# Retention


NOW = 100 * 86400.0  # unix seconds


def descriptions_of_ages(*hours: int) -> dict[int, dict]:
    """The descriptions of generations whose bases are so old, numbered from 1."""
    return {number: {"second": int(NOW - age * 3600)} for number, age in enumerate(hours, 1)}


async def test_retention_keeps_every_second_of_a_day_and_one_base_a_day_of_a_month(tmp_path):
    settings = make_settings(tmp_path, "", "file:///x")
    ages = [*range(35 * 24, 0, -6)]
    descriptions = descriptions_of_ages(*ages)
    whole, bases = retain.select_kept(descriptions, settings, len(ages), NOW)
    assert sorted(ages[number - 1] for number in whole) == [6, 12, 18, 24, 30]
    days = [descriptions[number]["second"] // 86400 for number in sorted(bases)]
    assert len(days) == len(set(days)) == 29 and days == list(range(days[0], days[0] + 29))
    assert not whole & bases


@pytest.mark.parametrize("good", [0, 3])
async def test_retention_keeps_everything_from_the_last_verified_generation_on(tmp_path, good):
    """However old the generations are. Without a verified generation it keeps all."""
    settings = make_settings(tmp_path, "", "file:///x")
    descriptions = descriptions_of_ages(*[90 * 24 - number for number in range(5)])
    whole, bases = retain.select_kept(descriptions, settings, good, NOW)
    assert whole >= set(range(good or 1, 6))
    assert whole | bases == set(range(good or 1, 6))


async def test_only_what_retention_does_not_keep_is_removed_from_the_backup(settings, backup, tmp_path):
    settings = replace(settings, keep_seconds=0)
    async with redis_on(settings) as redis, shipping(settings, backup) as shipper, writing(settings):
        for number in range(1, 5):
            await until(lambda n=number: shipper.chain and shipper.chain.generation == n, "a generation")
            await shipped(shipper)
            if number == 1:  # it is restored below by its second, which no other generation may have
                await until(lambda: time.time() >= shipper.chain.second + 2, "a later second")
            if number < 4:
                await redis.rewrite()
    assert list(await read_all(backup)) == [1, 2, 3, 4], "nothing is removed before a generation is verified"
    await backup.put("verified", b'{"good": 3, "ok": true, "time": 0}')
    assert await retain.remove_old(backup, settings, 4) > 0
    left = await read_all(backup)
    assert list(left) == [1, 3, 4] and len(left[1]) == 1 and len(left[3]) > 1
    done, _ = await restored(settings, backup, [], tmp_path, (await chain.descriptions(backup))[1]["second"])
    assert done.generation == 1
    assert await retain.remove_old(backup, settings, 4) == 0


def test_without_a_state_file_the_state_says_that_no_shipper_has_run(tmp_path):
    state = shipper_state.read(make_settings(tmp_path, "", "file:///x"))
    assert state == {"lag": None, "generation": None, "trouble": "no shipper has run here", "verified": None}
