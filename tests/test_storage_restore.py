"""Restoring on real servers: any second, every digest, nothing half."""

import asyncio
import io
import os
import random
import re
import secrets
import time
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from making import jpeg
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

from storage import changes, comments, keys, originals, outbox, posts, uploads
from storage.backup import aof, chain, snapshots
from storage.backup import state as shipper_state
from storage.backup.aof import Damaged
from storage.backup.restore import Refused, restore, running, url
from storage.backup.retain import KeptBackups
from storage.backup.verify import last_result, verify
from storage.db.client import Redis
from storage.errors import Expired, Outdated
from storage.objects import open_store

# Microseconds a key: a rewrite of next to nothing would come and go between two looks of the shipper, and leave a gap
SLOW_REWRITES = ("--rdb-key-save-delay", "30000")


async def backed_up(settings, backup, generations: int = 1, writes: int = 50):
    """A store with that many generations, made by one writer; the writer."""
    async with redis_on(settings, *SLOW_REWRITES) as redis, shipping(settings, backup) as shipper:
        async with writing(settings) as (writer,):
            for number in range(1, generations + 1):
                await until(lambda n=number: shipper.chain and shipper.chain.generation == n, "a generation")
                await until(lambda n=writer.number: writer.number >= n + writes, "writes")
                if number < generations:
                    await redis.rewrite()
        await shipped(shipper)
        return writer


# The walk over records


def record(*words: bytes) -> bytes:
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)


TRANSACTION = record(b"MULTI") + record(b"RPUSH", b"k", b"1") + record(b"SET", b"l", b"1") + record(b"EXEC")


def walked(tmp_path, data: bytes, at=None) -> aof.Walk:
    path = tmp_path / "x.incr.aof"
    path.write_bytes(data)
    return aof.walk(path, at)


async def test_a_file_cut_at_any_byte_ends_after_its_last_whole_record(tmp_path):
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
        found = walked(tmp_path, data[:size])
        assert found.end == max(end for end in ends if end <= size)
        assert found.torn == (size not in ends)


async def test_a_second_takes_all_of_its_records_and_none_of_a_later_one(tmp_path):
    seconds = [b"#TS:%d\r\n" % second + TRANSACTION for second in (100, 101, 103)]
    data = record(b"SELECT", b"0") + b"".join(seconds)
    first = len(record(b"SELECT", b"0"))
    length = len(seconds[0])
    for at, count, second in [(99, 0, None), (100, 1, 100), (101, 2, 101), (102, 2, 101), (103, 3, 103)]:
        found = walked(tmp_path, data, at)
        assert (found.end, found.second) == (first + count * length, second)
        assert found.later == (count < 3) and not found.torn


async def test_what_looks_like_an_annotation_in_a_comment_is_a_comment(tmp_path):
    text = b"\r\n#TS:1\r\n*1\r\n$4\r\nEXEC\r\n#TS:999\r\n"
    data = b"#TS:100\r\n" + record(b"SET", b"k", text) + record(b"SET", b"k", b"v")
    found = walked(tmp_path, data, 100)
    assert (found.end, found.second, found.later) == (len(data), 100, False)


async def test_an_annotation_torn_by_a_crash_is_passed_over(tmp_path):
    data = b"#TS:100\r\n" + TRANSACTION + b"#TS:10#TS:105\r\n" + TRANSACTION
    assert walked(tmp_path, data).end == len(data)
    found = walked(tmp_path, data, 104)
    assert (found.end, found.later) == (len(b"#TS:100\r\n" + TRANSACTION), True)


async def test_bytes_that_begin_no_record_are_damage_not_an_end(tmp_path):
    for bad in (b"\0" * 20 + b"\r\n", b"*x\r\n", b"*1\r\nSET\r\n", b"*1\r\n$x\r\nSET\r\n"):
        with pytest.raises(Damaged, match="no record begins at byte"):
            walked(tmp_path, TRANSACTION + bad)
    assert walked(tmp_path, b"#TS:100\r\n" + TRANSACTION + b"#TS:101\r\n" + b"\0\r\n", 100).second == 100


async def test_a_manifest_is_read_and_written_as_redis_does(settings, tmp_path):
    async with redis_on(settings) as redis:
        await redis.rewrite()
        text = (redis.aof / aof.MANIFEST).read_text()
        manifest = aof.parse(text)
        lines = [line for line in text.splitlines() if not line.endswith("type h")]
        lines = [re.sub(r" startoffset \d+$", "", line) for line in lines]  # of Redis 8: for replicas, and optional
        assert aof.render(manifest).splitlines() == lines
        assert manifest.files == [redis.base(), redis.increment().name]
    history = "file a.aof.1.base.rdb seq 1 type h\nfile a.aof.2.incr.aof seq 2 type i\n"
    assert aof.parse(history) is None


# Any second


async def test_any_second_can_be_had_back_across_rewrites_and_a_flushall(settings, backup, tmp_path):
    async with redis_on(settings, *SLOW_REWRITES) as redis, shipping(settings, backup) as shipper:
        async with writing(settings, 2) as writers:
            await shipped(shipper)
            begun = time.time()
            for number in range(6):
                await until(lambda n=number: time.time() > begun + n + random.random(), "time goes by")
                if number == 3:
                    flush = time.time()
                    await redis.client.flushall()
                    flushed = time.time()
                await redis.rewrite()
            ended = time.time()
        await shipped(shipper)
    assert len(await chain.descriptions(backup)) >= 5
    proved = 0
    for at in random.sample(range(int(begun) + 1, int(ended)), 4):
        done, lists = await restored(settings, backup, writers, tmp_path, at)
        assert done.exact and done.second <= at
        for writer, found in zip(writers, lists, strict=True):
            since = flushed if at >= flushed else 0
            if flush < at + 1 and at < flushed:
                continue  # the FLUSHALL was in that very second
            wanted = {n for n, when in writer.answered.items() if when < at and writer.begun[n] > since}
            allowed = {n for n, when in writer.begun.items() if when < at + 1 and writer.answered[n] >= since}
            assert wanted <= set(found) <= allowed
            proved += 1
    assert proved >= 4


async def test_a_second_before_the_oldest_is_refused_and_one_after_the_newest_is_the_newest(
    settings, backup, tmp_path
):
    writer = await backed_up(settings, backup, 2)
    first = (await chain.descriptions(backup))[1]["second"]
    with pytest.raises(Refused, match="the oldest second kept is"):
        await restore(settings, backup, tmp_path / "to", first - 1)
    assert not (tmp_path / "to").exists()
    done, (found,) = await restored(settings, backup, [writer], tmp_path, int(time.time()) + 3600)
    assert done.generation == 2 and set(writer.answered) <= set(found)


async def test_a_time_nobody_shipped_is_said_to_be_missing(settings, backup, tmp_path, capsys):
    async with redis_on(settings) as redis, writing(settings) as (writer,):
        async with shipping(settings, backup) as shipper:
            await shipped(shipper)
        hole = int(time.time()) + 1
        await until(lambda: time.time() > hole + 1, "seconds without a shipper")
        await redis.rewrite()
        await redis.rewrite()
        async with shipping(settings, backup) as shipper:
            await until(lambda: shipper.chain and shipper.chain.generation == 2, "a new generation")
    done, (found,) = await restored(settings, backup, [writer], tmp_path, hole)
    assert not done.exact and "NOT EXACT" in capsys.readouterr().out
    assert {n for n, when in writer.answered.items() if when < done.second} <= set(found)


# What is refused


async def test_a_folder_that_is_not_empty_is_refused(settings, backup, tmp_path):
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "precious").write_text("x")
    with pytest.raises(Refused, match="not empty"):
        await restore(settings, backup, tmp_path / "to")
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["precious"]


async def test_a_server_of_another_family_or_an_older_version_is_refused(settings, backup, tmp_path):
    await backed_up(settings, backup)
    other = PROGRAMS["redis"] if settings.redis_server == "" else ""
    with pytest.raises(Refused, match="wrote this backup"):
        await restore(replace(settings, redis_server=other), backup, tmp_path / "to")
    name = chain.description_name(1)
    header, _ = chain.unseal(name, await backup.get(name))
    await backup.put(name, chain.seal({**header, "version": "99.0.0"}))
    with pytest.raises(Refused, match="wrote this backup"):
        await restore(settings, backup, tmp_path / "to")
    assert not (tmp_path / "to").exists()


async def test_an_empty_store_is_refused(settings, backup, tmp_path):
    with pytest.raises(Refused, match="no generation"):
        await restore(settings, backup, tmp_path / "to")


async def test_one_flipped_bit_anywhere_is_found_and_nothing_is_restored(settings, backup, tmp_path):
    await backed_up(settings, backup)
    names = [entry.name async for entry in backup.list()]
    for name in names:
        good = await backup.get(name)
        bad = bytearray(good)
        bad[random.randrange(len(bad))] ^= 1 << random.randrange(8)
        await backup.put(name, bytes(bad))
        with pytest.raises(Damaged):
            await restore(settings, backup, tmp_path / "to", say=lambda text: None)
        assert not (tmp_path / "to").exists()
        await backup.put(name, good)
    await restore(settings, backup, tmp_path / "to")


async def test_an_object_that_is_missing_or_in_anothers_place_is_found(settings, backup, tmp_path):
    await backed_up(settings, backup)
    names = [entry.name async for entry in backup.list("00000001/")]
    kept = {name: await backup.get(name) for name in names}
    for name in names[:-1]:
        await backup.delete([name])
        with pytest.raises(Damaged):
            await restore(settings, backup, tmp_path / "to", say=lambda text: None)
        await backup.put(name, kept[names[-1]])
        with pytest.raises(Damaged):
            await restore(settings, backup, tmp_path / "to", say=lambda text: None)
        await backup.put(name, kept[name])
    await restore(settings, backup, tmp_path / "to")


# What comes of it


async def test_a_restored_folder_is_a_data_folder_that_goes_on_being_shipped(settings, backup, tmp_path):
    writer = await backed_up(settings, backup)
    data = tmp_path / "new"
    data.mkdir()
    (data / "redis").mkdir()  # an empty folder is as good as none
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


async def shown(db, objects, author: str) -> str:
    """A post as upload, worker and readers leave it."""
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


async def test_a_restored_second_has_its_posts_with_their_images_and_a_new_epoch(settings, backup, tmp_path):
    objects, said = open_store(settings.store_url), []
    async with redis_on(settings), shipping(settings, backup) as shipper:
        db = Redis(settings.redis_url)
        kept, doomed = [await shown(db, objects, author) for author in ("alice", "eve")]
        token = (await changes.since(db, 1, 10, None)).token
        upload, _ = await uploads.create(db, "carol", 1, 2000)
        image = uploads.Appender(db, objects, upload, 0, 2000)
        await image.write(picture(1500))
        await image.commit()
        second = int(time.time())
        await until(lambda: int(time.time()) > second, "the next second")
        await posts.delete(db, objects, "eve", doomed, settings.backup_reach_ms)
        await uploads.discard(db, objects, "carol", upload)
        late = await shown(db, objects, "late")
        for due in await outbox.lease(db, 0):
            end = outbox.end_upload if due.kind == "upload" else outbox.erase
            await end(db, objects, KeptBackups(backup).may_name, due, settings.backup_reach_ms)
        await db.close()
        await shipped(shipper)
    done = await restore(settings, backup, tmp_path / "to", second, said.append)
    assert done.counts == {"posts": 2, "comments": 2, "open uploads": 0, "flaws": 0}
    assert not any("FLAW" in line for line in said)
    async with running(settings, tmp_path / "to") as client:
        db = Redis(url(client))
        assert [post.id for post in (await posts.feed(db, 1, 10)).posts] == [doomed, kept]
        assert [image.id for image in await outbox.lease_images(db, 0, 10)] == [doomed]
        assert not {kept, late} & {due.id for due in await outbox.lease(db, 0)}
        assert (await objects.get(keys.original(doomed)))[:8] == picture(8)
        with pytest.raises(Outdated):
            await changes.since(db, 1, 10, token)
        with pytest.raises(Expired):
            await uploads.read(db, "carol", upload)
        await db.close()


@asynccontextmanager
async def site(settings, data, backup):
    """A Redis on a data folder with its shipper. Yields storage's client, and ships all that was written."""
    here = replace(settings, data=data, redis_url=f"unix://{data}/redis/redis.sock")
    async with redis_on(here), shipping(here, backup) as shipper:
        await shipped(shipper)
        db = Redis(here.redis_url)
        yield db
        await db.close()
        await shipped(shipper)


async def next_second() -> int:
    """Waits for the next second; the one that has passed."""
    second = int(time.time())
    await until(lambda: int(time.time()) > second, "the next second")
    return second


async def outbox_at(db, objects, backup, ms: int, backup_reach_ms: int) -> None:
    """What the dispatcher does at a moment."""
    db.clock = ms
    for due in await outbox.lease(db, 0):
        end = outbox.end_upload if due.kind == "upload" else outbox.erase
        await end(db, objects, KeptBackups(backup).may_name, due, backup_reach_ms)


async def test_a_restore_can_be_undone_and_that_again_and_each_time_all_images_are_there(settings, backup, tmp_path):
    objects, day = open_store(settings.store_url), 86_400_000
    async with site(settings, settings.data, backup) as db:
        deleted_first, deleted_later = [await shown(db, objects, author) for author in ("alice", "eve")]
        both = await next_second()
        await posts.delete(db, objects, "alice", deleted_first, settings.backup_reach_ms)
        deletion = int(time.time() * 1000)
        first = await next_second()
    # Back to the second when both were there. Here the other one is deleted, and the time for its removal comes.
    assert (await restore(settings, backup, tmp_path / "b" / "redis", both)).counts["flaws"] == 0
    async with site(settings, tmp_path / "b", backup) as db:
        assert {post.id for post in (await posts.feed(db, 1, 10)).posts} == {deleted_first, deleted_later}
        await next_second()
        await posts.delete(db, objects, "eve", deleted_later, settings.backup_reach_ms)
        after = int(time.time() * 1000) + settings.backup_reach_ms + day
        await outbox_at(db, objects, backup, after, settings.backup_reach_ms)
    # The restore is undone: the post that was deleted meanwhile has its original.
    done = await restore(settings, backup, tmp_path / "c" / "redis", first)
    assert done.generation == 1 and done.counts["posts"] == 1 and done.counts["flaws"] == 0
    async with site(settings, tmp_path / "c", backup) as db:
        assert [post.id for post in (await posts.feed(db, 1, 10)).posts] == [deleted_later]
        # The first generation is kept no longer. The second is younger than the deletion, and has the post.
        await backup.delete([chain.description_name(1)])
        second = (await chain.descriptions(backup))[2]["second"]
        assert second * 1000 > deletion
        await outbox_at(db, objects, backup, deletion + settings.backup_reach_ms, settings.backup_reach_ms)
    done = await restore(settings, backup, tmp_path / "d" / "redis", second)
    assert done.generation == 2 and done.counts["posts"] == 2 and done.counts["flaws"] == 0


async def test_a_missing_original_is_told_and_stands_in_no_restores_way(settings, backup, tmp_path):
    objects, said = open_store(settings.store_url), []
    async with redis_on(settings), shipping(settings, backup) as shipper:
        db = Redis(settings.redis_url)
        post = await shown(db, objects, "alice")
        await db.close()
        await shipped(shipper)
    await objects.delete([keys.original(post)])
    before = files(settings.data / "store")
    done = await restore(settings, backup, tmp_path / "to", say=said.append)
    assert done.counts["flaws"] == 1 and f"FLAW: {post}: 3 its original is missing" in said
    assert await verify(settings, backup)
    assert files(settings.data / "store") == before
    text = snapshots.table([], shipper_state.read(settings), await last_result(backup))
    assert "0 h ago: generation 1 restored up to 20" in text and "1 posts, 1 comments, 0 open uploads, 1 FLAWS" in text


async def test_a_restore_that_broke_off_left_no_folder_and_does_not_hinder_the_next(
    settings, backup, tmp_path
):
    await backed_up(settings, backup)
    task = asyncio.ensure_future(restore(settings, backup, tmp_path / "to"))
    await until((tmp_path / "to.part").exists, "it has begun")
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert not (tmp_path / "to").exists()
    await restore(settings, backup, tmp_path / "to")
    assert os.listdir(tmp_path / "to" / "appendonlydir") and not (tmp_path / "to.part").exists()


async def test_verify_keeps_its_last_result_and_the_last_good_generation(settings, backup):
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


async def test_snapshots_tell_generations_seconds_and_lag(settings, backup):
    await backed_up(settings, backup, 3)
    found = await snapshots.snapshots(backup)
    assert [(one.generation, one.state) for one in found] == [(1, "closed"), (2, "closed"), (3, "open")]
    for one, after in zip(found, found[1:], strict=False):
        assert one.second <= after.second <= one.until + 1
    text = snapshots.table(found, {"lag": 1.25, "trouble": ""}, None)
    assert "1.2 s behind" in text and "verified: never" in text
