"""Restores on real servers: any second, every digest is checked, and a restore that fails leaves no data folder."""

import asyncio
import io
import itertools
import os
import random
import re
import secrets
import time
from argparse import Namespace
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
from making import NO_SEGMENTS, jpeg, seal
from parts import (
    PROGRAMS,
    redis_on,
    restored,
    shipped,
    shipping,
    until,
    writing,
)
from state import files
from uploading import picture

from storage import changes, check, comments, erasure, keys, originals, outbox, posts, sealing, sweep, uploads
from storage.__main__ import _backup
from storage.backup import aof, chain, retain, snapshots
from storage.backup import state as shipper_state
from storage.backup.aof import Damaged
from storage.backup.restore import Refused, restore, running, url
from storage.backup.retain import KeptBackups
from storage.backup.verify import last_result, verify
from storage.db.client import Redis
from storage.errors import Expired, NoPost, Outdated
from storage.objects import open_store
from storage.progress import Progress
from storage.segments import Segments
from storage.settings import DAY_MS

# Microseconds a key. Otherwise a rewrite of so few keys begins and ends before the shipper reads the manifest again,
# which leaves a gap in the chain.
SLOW_REWRITES = ("--rdb-key-save-delay", "30000")


async def backed_up(settings, backup, generations: int = 1, writes: int = 50):
    """Fills the backup store with `generations` generations. Returns the writer of their data."""
    async with redis_on(settings, *SLOW_REWRITES) as redis, shipping(settings, backup) as shipper:
        async with writing(settings) as (writer,):
            for number in range(1, generations + 1):
                await until(lambda n=number: shipper.chain and shipper.chain.generation == n, "a generation")
                await until(lambda n=writer.number: writer.number >= n + writes, "writes")
                if number < generations:
                    await redis.rewrite()
        await shipped(shipper)
        return writer


def assert_nothing_restored(tmp_path) -> None:
    """Neither the folder nor its unfinished form is there."""
    assert not (tmp_path / "to").exists() and not (tmp_path / "to.part").exists()


# The walk over the records of a file


def record(*words: bytes) -> bytes:
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)


TRANSACTION = record(b"MULTI") + record(b"RPUSH", b"k", b"1") + record(b"SET", b"l", b"1") + record(b"EXEC")


def walk(tmp_path, data: bytes, at: int | None = None) -> aof.Walk:
    path = tmp_path / "x.incr.aof"
    path.write_bytes(data)
    return aof.walk(path, at)


def test_a_file_that_is_cut_at_any_byte_ends_after_its_last_whole_record(tmp_path):
    parts = [
        b"#TS:100\r\n",
        record(b"SELECT", b"0"),
        TRANSACTION,
        b"#TS:101\r\n",
        record(b"SET", b"a", b"b\r\n"),
    ]
    data = b"".join(parts)
    ends = [sum(map(len, parts[:count])) for count in range(len(parts) + 1)]
    for size in range(len(data) + 1):
        result = walk(tmp_path, data[:size])
        assert result.end == max(end for end in ends if end <= size)
        assert result.torn == (size not in ends)


def test_a_second_includes_all_of_its_records_and_none_of_a_later_second(tmp_path):
    seconds = [b"#TS:%d\r\n" % second + TRANSACTION for second in (100, 101, 103)]
    data = record(b"SELECT", b"0") + b"".join(seconds)
    first = len(record(b"SELECT", b"0"))
    length = len(seconds[0])
    for at, whole, second in [(99, 0, None), (100, 1, 100), (101, 2, 101), (102, 2, 101), (103, 3, 103)]:
        result = walk(tmp_path, data, at)
        assert (result.end, result.second) == (first + whole * length, second)
        assert result.later == (whole < 3) and not result.torn


def test_a_value_that_looks_like_an_annotation_is_a_value(tmp_path):
    text = b"\r\n#TS:1\r\n*1\r\n$4\r\nEXEC\r\n#TS:999\r\n"
    data = b"#TS:100\r\n" + record(b"SET", b"k", text) + record(b"SET", b"k", b"v")
    result = walk(tmp_path, data, 100)
    assert (result.end, result.second, result.later) == (len(data), 100, False)


def test_an_annotation_that_a_crash_cut_is_skipped(tmp_path):
    data = b"#TS:100\r\n" + TRANSACTION + b"#TS:10#TS:105\r\n" + TRANSACTION
    assert walk(tmp_path, data).end == len(data)
    result = walk(tmp_path, data, 104)
    assert (result.end, result.later) == (len(b"#TS:100\r\n" + TRANSACTION), True)


def test_bytes_that_begin_no_record_are_damage_and_not_the_end_of_the_file(tmp_path):
    for bad in (b"\0" * 20 + b"\r\n", b"*x\r\n", b"*1\r\nSET\r\n", b"*1\r\n$x\r\nSET\r\n"):
        with pytest.raises(Damaged, match="no record begins at byte"):
            walk(tmp_path, TRANSACTION + bad)
    assert walk(tmp_path, b"#TS:100\r\n" + TRANSACTION + b"#TS:101\r\n" + b"\0\r\n", 100).second == 100


async def test_a_manifest_is_read_and_written_as_redis_does(settings, tmp_path):
    async with redis_on(settings) as redis:
        await redis.rewrite()
        text = (redis.aof / aof.MANIFEST).read_text()
        manifest = aof.parse(text)
        lines = [line for line in text.splitlines() if not line.endswith("type h")]
        lines = [re.sub(r" startoffset \d+$", "", line) for line in lines]  # Redis 8 has it for replicas; optional
        assert aof.render(manifest).splitlines() == lines
        assert manifest.files == [redis.base(), redis.increment().name]
    history = "file a.aof.1.base.rdb seq 1 type h\nfile a.aof.2.incr.aof seq 2 type i\n"
    assert aof.parse(history) is None


# Any second


async def test_any_second_can_be_restored_across_rewrites_and_a_flushall(settings, backup, tmp_path):
    async with redis_on(settings, *SLOW_REWRITES) as redis, shipping(settings, backup) as shipper:
        async with writing(settings, 2) as writers:
            await shipped(shipper)
            begun = time.time()
            for number in range(7):
                await until(lambda n=number: time.time() > begun + n + random.random(), "time goes by")
                if number == 3:
                    flush = time.time()
                    await redis.client.flushall()
                    flushed = time.time()
                await redis.rewrite()
            ended = time.time()
        await shipped(shipper)
    assert len(await chain.descriptions(backup)) > 1
    seconds = [at for at in range(int(begun) + 1, int(ended)) if at + 1 <= flush or at >= flushed]
    for at in random.sample(seconds, 3):
        done, lists = await restored(settings, backup, writers, tmp_path, at)
        assert done.exact and done.second <= at
        since = flushed if at >= flushed else 0
        for writer, numbers in zip(writers, lists, strict=True):
            required = {n for n, when in writer.answered.items() if when < at and writer.begun[n] > since}
            allowed = {n for n, when in writer.begun.items() if when < at + 1 and writer.answered[n] >= since}
            assert required <= set(numbers) <= allowed


async def test_a_second_before_the_oldest_is_refused_and_one_after_the_newest_restores_the_newest(
    settings, backup, tmp_path
):
    writer = await backed_up(settings, backup, 2)
    first = (await chain.descriptions(backup))[1]["second"]
    with pytest.raises(Refused, match="the oldest second kept is"):
        await restore(settings, backup, tmp_path / "to", first - 1)
    assert_nothing_restored(tmp_path)
    done, (numbers,) = await restored(settings, backup, [writer], tmp_path, int(time.time()) + 3600)
    assert done.generation == 2 and set(writer.answered) <= set(numbers)


async def test_a_restore_to_a_second_that_was_not_shipped_says_that_it_is_not_exact(
    settings, backup, tmp_path, capsys
):
    async with redis_on(settings) as redis, writing(settings) as (writer,):
        async with shipping(settings, backup) as shipper:
            await shipped(shipper)
        hole = int(time.time()) + 1
        await until(lambda: time.time() > hole + 1, "seconds without a shipper")
        await redis.rewrite()
        await redis.rewrite()
        async with shipping(settings, backup) as shipper:
            await until(lambda: shipper.chain and shipper.chain.generation == 2, "a new generation")
    done, (numbers,) = await restored(settings, backup, [writer], tmp_path, hole)
    assert not done.exact and "NOT EXACT" in capsys.readouterr().out
    assert {n for n, when in writer.answered.items() if when < done.second} <= set(numbers)


# Refusals and damage


async def test_a_folder_that_is_not_empty_is_refused(settings, backup, tmp_path):
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "precious").write_text("x")
    with pytest.raises(Refused, match="not empty"):
        await restore(settings, backup, tmp_path / "to")
    assert files(tmp_path / "to") == {"precious": b"x"} and not (tmp_path / "to.part").exists()


async def test_a_backup_of_another_family_or_a_newer_version_is_refused(settings, backup, tmp_path):
    await backed_up(settings, backup)
    other = PROGRAMS["redis"] if settings.redis_server == "" else ""
    with pytest.raises(Refused, match="wrote this backup"):
        await restore(replace(settings, redis_server=other), backup, tmp_path / "to")
    name = chain.description_name(1)
    header, _ = chain.unseal(name, await backup.get(name))
    await backup.put(name, chain.seal({**header, "version": "99.0.0"}))
    with pytest.raises(Refused, match="wrote this backup"):
        await restore(settings, backup, tmp_path / "to")
    assert_nothing_restored(tmp_path)


async def test_an_empty_backup_store_is_refused(settings, backup, tmp_path):
    with pytest.raises(Refused, match="no generation"):
        await restore(settings, backup, tmp_path / "to")
    assert_nothing_restored(tmp_path)


async def test_one_flipped_bit_in_any_object_is_detected_and_nothing_is_restored(settings, backup, tmp_path):
    await backed_up(settings, backup)
    names = [entry.name async for entry in backup.list()]
    for name in names:
        good = await backup.get(name)
        bad = bytearray(good)
        bad[random.randrange(len(bad))] ^= 1 << random.randrange(8)
        await backup.put(name, bytes(bad))
        with pytest.raises(Damaged):
            await restore(settings, backup, tmp_path / "to", report=lambda text: None)
        assert not (tmp_path / "to").exists()
        await backup.put(name, good)
    await restore(settings, backup, tmp_path / "to")


async def test_an_object_that_is_missing_or_was_replaced_by_another_is_detected(settings, backup, tmp_path):
    await backed_up(settings, backup)
    names = [entry.name async for entry in backup.list("00000001/")]
    good = {name: await backup.get(name) for name in names}
    for name in names[:-1]:
        await backup.delete([name])
        with pytest.raises(Damaged):
            await restore(settings, backup, tmp_path / "to", report=lambda text: None)
        await backup.put(name, good[names[-1]])
        with pytest.raises(Damaged):
            await restore(settings, backup, tmp_path / "to", report=lambda text: None)
        assert not (tmp_path / "to").exists()
        await backup.put(name, good[name])
    await restore(settings, backup, tmp_path / "to")


# A restored folder


async def test_a_restored_folder_serves_as_a_data_folder_and_is_shipped_again(settings, backup, tmp_path):
    writer = await backed_up(settings, backup)
    data = tmp_path / "new"
    data.mkdir()
    (data / "redis").mkdir()  # a restore takes the place of an empty folder
    done = await restore(settings, backup, data / "redis")
    assert done.counts
    moved = replace(settings, data=data, redis_url=f"unix://{data}/redis/redis.sock")
    async with redis_on(moved) as redis, shipping(moved, backup) as shipper:
        assert set(writer.answered) <= set(await writer.read(redis.client))
        await redis.client.set("after", "the restore")
        await shipped(shipper)
    await restore(settings, backup, tmp_path / "again")
    async with running(settings, tmp_path / "again") as client:
        assert await client.get("after") == b"the restore"
    family = "redis " if settings.redis_server else "valkey "
    assert (data / "redis" / "server").read_text().startswith(family)


async def publish(db, objects, author: str) -> str:
    """A ready post with all of its objects and one comment, by the calls of the API and the worker."""
    async with uploads.form_upload(db, objects, author, 1) as image:
        await image.write(picture(1000))
        await image.finish()
    post, _ = await posts.create(db, author, image.upload, "caption")
    (due,) = await outbox.lease_images(db, 0, 10)
    _, upload = await outbox.start_image(db, post, due.lease)
    await originals.store(db, objects, post, upload, io.BytesIO())
    await posts.put_image(objects, post, jpeg())
    await outbox.publish(db, post, "thumbhash")
    await comments.add(db, "bob", post, "first")
    return post


async def next_second() -> int:
    """Waits until this second has passed. Returns it."""
    second = int(time.time())
    await until(lambda: int(time.time()) > second, "the next second")
    return second


async def run_outbox(db, objects, backup, ms: int, backup_reach_ms: int) -> None:
    """Does what the dispatcher would do at a moment, in ms since 1970."""
    db.clock = ms
    for due in await outbox.lease(db, 0):
        end = outbox.end_upload if due.kind == "upload" else outbox.erase
        await end(db, objects, KeptBackups(backup).may_name, due, backup_reach_ms)


async def test_a_restored_second_has_its_posts_with_their_images_and_a_new_epoch(settings, backup, tmp_path):
    objects, messages = open_store(settings.store_url), []
    async with redis_on(settings), shipping(settings, backup) as shipper:
        db = Redis(settings.redis_url)
        ready, deleted = [await publish(db, objects, author) for author in ("alice", "eve")]
        token = (await changes.since(db, 1, 10, None)).token
        upload, _ = await uploads.create(db, "carol", 1, 2000)
        image = uploads.Appender(db, objects, upload, 0, 2000)
        await image.write(picture(1500))
        await image.commit()
        second = await next_second()
        await posts.delete(db, objects, "eve", deleted, settings.backup_reach_ms)
        await uploads.discard(db, objects, "carol", upload)
        late = await publish(db, objects, "late")
        await run_outbox(db, objects, backup, int(time.time() * 1000), settings.backup_reach_ms)
        await db.close()
        await shipped(shipper)
    done = await restore(settings, backup, tmp_path / "to", second, messages.append)
    assert done.counts == {"posts": 2, "comments": 2, "open uploads": 0, "flaws": 0}
    assert not any("FLAW" in line for line in messages)
    async with running(settings, tmp_path / "to") as client:
        db = Redis(url(client))
        assert [post.id for post in (await posts.feed(db, 1, 10)).posts] == [deleted, ready]
        assert [image.id for image in await outbox.lease_images(db, 0, 10)] == [deleted], "its JPEG was erased"
        assert not {ready, late} & {due.id for due in await outbox.lease(db, 0)}
        assert (await objects.get(keys.original(deleted)))[:8] == picture(8)
        with pytest.raises(Outdated):
            await changes.since(db, 1, 10, token)
        with pytest.raises(Expired):
            await uploads.read(db, "carol", upload)
        await db.close()


@asynccontextmanager
async def site(settings, data, backup):
    """A Redis on a data folder with its shipper. Yields storage's client. Ships at the end all that was written."""
    here = replace(settings, data=data, redis_url=f"unix://{data}/redis/redis.sock")
    async with redis_on(here), shipping(here, backup) as shipper:
        await shipped(shipper)
        db = Redis(here.redis_url)
        yield db
        await db.close()
        await shipped(shipper)


async def test_a_restore_can_be_undone_and_redone_and_no_image_is_lost(settings, backup, tmp_path):
    objects, day_ms = open_store(settings.store_url), 86_400_000
    async with site(settings, settings.data, backup) as db:
        deleted_first, deleted_later = [await publish(db, objects, author) for author in ("alice", "eve")]
        both = await next_second()
        await posts.delete(db, objects, "alice", deleted_first, settings.backup_reach_ms)
        deletion = int(time.time() * 1000)
        first = await next_second()
    # Restore b: the second in which both posts existed. Now the other post is deleted, and its removal is due.
    assert (await restore(settings, backup, tmp_path / "b" / "redis", both)).counts["flaws"] == 0
    async with site(settings, tmp_path / "b", backup) as db:
        assert {post.id for post in (await posts.feed(db, 1, 10)).posts} == {deleted_first, deleted_later}
        await next_second()
        await posts.delete(db, objects, "eve", deleted_later, settings.backup_reach_ms)
        after = int(time.time() * 1000) + settings.backup_reach_ms + day_ms
        await run_outbox(db, objects, backup, after, settings.backup_reach_ms)
    # Restore c undoes b: the post that was deleted in b has its original.
    done = await restore(settings, backup, tmp_path / "c" / "redis", first)
    assert done.generation == 1 and done.counts["posts"] == 1 and done.counts["flaws"] == 0
    async with site(settings, tmp_path / "c", backup) as db:
        assert [post.id for post in (await posts.feed(db, 1, 10)).posts] == [deleted_later]
        # Retention removes the first generation. The second is younger than the deletion in c, and has the post.
        await backup.delete([chain.description_name(1)])
        second = (await chain.descriptions(backup))[2]["second"]
        assert second * 1000 > deletion
        await run_outbox(db, objects, backup, deletion + settings.backup_reach_ms, settings.backup_reach_ms)
    # Restore d returns to the second generation, which b wrote.
    done = await restore(settings, backup, tmp_path / "d" / "redis", second)
    assert done.generation == 2 and done.counts["posts"] == 2 and done.counts["flaws"] == 0


@pytest.mark.parametrize("settings", ["redis-folder"], indirect=True)
async def test_whatever_is_restored_and_undone_no_backup_names_a_segment_or_an_original_that_was_removed(
    settings, backup, tmp_path, monkeypatch
):
    """After each step, a worker and a sweep remove what they may: when it is due at the earliest, and much later."""
    monkeypatch.setattr(sealing, "SEGMENT_COMMENTS", 2)
    monkeypatch.setattr(retain, "LONGEST_REWRITE_MS", 0)  # an hour would hide that a second is wrong
    objects, reach, number = open_store(settings.store_url), settings.backup_reach_ms, itertools.count(1)
    unneeded = []  # when something was deleted or replaced, in ms since 1970

    async def clean(db) -> None:
        unneeded.append(int(time.time() * 1000))
        for moment in [*unneeded, unneeded[-1] + 2 * DAY_MS * next(number)]:
            db.clock = moment + reach + 1
            may_name = KeptBackups(backup).may_name
            await run_outbox(db, objects, backup, db.clock, reach)
            await sealing.remove_retired(db, objects, may_name, 0, reach)
            monkeypatch.setattr(sweep, "time", SimpleNamespace(time=lambda: db.clock / 1000))
            await sweep.sweep(db, objects, may_name, reach, remove=True)
        assert (await check.check(db, objects, deep=True)).lines == []
        db.clock = ""

    async def restorable(*seconds: int) -> None:
        for second in seconds:
            folder, messages = tmp_path / f"try{next(number)}", []
            done = await restore(settings, backup, folder, second, messages.append)
            assert done.counts["flaws"] == 0, messages

    async def erase_and_compact(db, post: str, place: int) -> None:
        row = (await comments.page(db, Segments(objects), post, 20)).comments[place]
        await comments.delete(db, Segments(objects), row.author, post, row.id)
        await seal(db, objects, post)
        unneeded.append(int(time.time() * 1000))

    async with site(settings, settings.data, backup) as db:
        kept, other = [await publish(db, objects, author) for author in ("alice", "eve")]
        for post in (kept, other):
            for text in ("second", "third", "fourth", "fifth"):
                await comments.add(db, "bob", post, text)
        hot = await next_second()
        for post in (kept, other):
            await seal(db, objects, post)
        sealed = await next_second()
        await erase_and_compact(db, kept, -1)
        await posts.delete(db, objects, "eve", other, reach)
        later = await next_second()
        await clean(db)
    await restorable(hot)
    # Restore b: other comments are deleted, and the post that was kept.
    assert (await restore(settings, backup, tmp_path / "b" / "redis", sealed)).counts["flaws"] == 0
    async with site(settings, tmp_path / "b", backup) as db:
        await erase_and_compact(db, kept, 1)
        await erase_and_compact(db, other, -1)
        b = await next_second()
        await posts.delete(db, objects, "alice", kept, reach)
        await clean(db)
    await restorable(b)
    # Restore c undoes b.
    assert (await restore(settings, backup, tmp_path / "c" / "redis", later)).counts["flaws"] == 0
    async with site(settings, tmp_path / "c", backup) as db:
        await erase_and_compact(db, kept, -1)
        c = await next_second()
        await restorable(hot)
        await backup.delete([chain.description_name(1)])  # retention removes the first generation
        await clean(db)
    await restorable(b, c)
    async with running(settings, tmp_path / "c" / "redis") as client:
        db = Redis(url(client))
        await backup.delete([chain.description_name(generation) for generation in (2, 3)])
        await posts.delete(db, objects, "alice", kept, reach)
        await clean(db)  # no backup is left
        await db.close()
    left = {entry.name async for entry in objects.list()}
    assert not {name for name in left if not name.startswith("chunks/")}


async def test_a_restore_brings_back_an_erased_user_says_so_and_keeps_hidden_what_was_hidden(
    settings, backup, tmp_path, capsys
):
    quiet, reach, objects = Progress(io.StringIO()), settings.backup_reach_ms, open_store(settings.store_url)
    async with redis_on(settings), shipping(settings, backup) as shipper:
        db = Redis(settings.redis_url)
        erased, hidden = [await publish(db, objects, author) for author in ("alice", "bob")]
        await posts.hide(db, hidden)
        good = await next_second()
        await posts.unhide(db, hidden)
        await erasure.erase(db, objects, NO_SEGMENTS, "alice", reach, quiet, remove=True)
        await db.close()
        await shipped(shipper)
    to = tmp_path / "to"
    await _backup(Namespace(command="restore", at=good, to=to), settings)
    printed = capsys.readouterr().out
    assert "1 users were erased after that: start, then run `imagegram-storage erase --again --yes`" in printed
    async with running(settings, to) as client:
        db = Redis(url(client))
        assert (await posts.inspect(db, hidden)).hidden
        assert (await posts.read(db, erased)).author == "alice"
        users, counts = await erasure.erase_again(db, objects, NO_SEGMENTS, reach, quiet, remove=True)
        assert (users, counts["posts"]) == (1, 1)
        with pytest.raises(NoPost):
            await posts.inspect(db, erased)
        assert await erasure.forget_old(db, objects, 1, KeptBackups(backup).may_name, reach) == 0
        await db.close()


async def test_a_missing_original_is_reported_and_the_restore_does_not_fail(settings, backup, tmp_path):
    objects, messages = open_store(settings.store_url), []
    async with redis_on(settings), shipping(settings, backup) as shipper:
        db = Redis(settings.redis_url)
        post = await publish(db, objects, "alice")
        await db.close()
        await shipped(shipper)
    await objects.delete([keys.original(post)])
    before = files(settings.data / "store")
    done = await restore(settings, backup, tmp_path / "to", report=messages.append)
    assert done.counts["flaws"] == 1 and f"FLAW: {post}: 3 its original is missing" in messages
    assert await verify(settings, backup)
    assert files(settings.data / "store") == before
    text = snapshots.table([], shipper_state.read(settings), await last_result(backup))
    assert "0 h ago: generation 1 restored up to 20" in text and "1 posts, 1 comments, 0 open uploads, 1 FLAWS" in text


async def test_a_restore_that_was_interrupted_leaves_no_data_folder_and_the_next_one_succeeds(
    settings, backup, tmp_path
):
    await backed_up(settings, backup)
    task = asyncio.ensure_future(restore(settings, backup, tmp_path / "to"))
    await until((tmp_path / "to.part").exists, "the restore has begun")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not (tmp_path / "to").exists()
    await restore(settings, backup, tmp_path / "to")
    assert os.listdir(tmp_path / "to" / "appendonlydir") and not (tmp_path / "to.part").exists()


async def test_verify_stores_its_last_result_and_the_last_good_generation(settings, backup):
    await backed_up(settings, backup, 2)
    assert await verify(settings, backup)
    result = await last_result(backup)
    assert result["ok"] and result["good"] == 2 and result["counts"]
    name = (await chain.descriptions(backup))[2]["base"]
    await backup.put(chain.segment_name(2, name, 0), secrets.token_bytes(100))
    assert not await verify(settings, backup)
    result = await last_result(backup)
    assert not result["ok"] and result["good"] == 2 and "digest does not hold" in result["detail"]
    assert [path.name for path in settings.data.iterdir() if path.name.startswith("verify-")] == []


async def test_snapshots_shows_generations_their_seconds_and_the_lag(settings, backup):
    await backed_up(settings, backup, 3)
    generations = await snapshots.snapshots(backup)
    assert [(one.generation, one.state) for one in generations] == [(1, "closed"), (2, "closed"), (3, "open")]
    for one, following in pairwise(generations):
        assert one.second <= following.second <= one.until + 1
    text = snapshots.table(generations, {"lag": 1.25, "trouble": ""}, None)
    assert "1.2 s behind" in text and "verified: never" in text
