"""The outbox decides what is to be done. Every post ends as ready or failed, even if the queue or workers are lost."""

import asyncio
import logging
import time
from contextlib import asynccontextmanager

import pytest
from conftest import SERVERS, RedisServer, connect, create_post, photograph, until, wait_until_processed
from making import jpeg, make_post, make_processing, png
from parts import make_settings
from parts import until as eventually

from storage import comments, keys, objects, outbox, posts, sealing, uploads
from storage.db.client import Redis
from storage.segments import Segments
from storage.settings import DAY_MS
from workers import dispatcher


def test_an_image_is_404_with_retry_after_until_its_picture_is_created(site):
    with site.client("alice") as client:
        post = create_post(client, photograph())
        for request in (client.get, client.head):
            missing = request(f"/v1/images/{post['id']}.jpg")
            assert (missing.status_code, missing.headers["Retry-After"]) == (404, "1")
            assert missing.headers["Content-Type"] == "application/problem+json"
            assert "immutable" not in missing.headers.get("Cache-Control", "")
        assert client.get("/v1/posts").json()["items"] == []
        site.worker()
        wait_until_processed(client, post)
        assert client.get(f"/v1/images/{post['id']}.jpg").status_code == 200


def test_every_post_becomes_ready_although_the_queue_is_lost_again_and_again(site, real_server):
    """Deletes all keys of RQ while pictures are created. Ends leases early, so that the test need not wait a minute."""
    client, queue = real_server.client, real_server.queue.client
    with site.client("alice") as alice:
        posts = [create_post(alice, png(40 + n, 40)) for n in range(6)]
        worker = site.worker()
        deleted = 0
        until(lambda: queue.exists("rq:workers"), what="the worker")
        for _ in range(8):
            deleted += queue.delete("rq:workers", "rq:workers:images", *queue.keys("rq:*"))
            client.zadd("making:{0}:alice", dict.fromkeys((post["id"] for post in posts), 0), xx=True)
            client.zadd("turns:{0}", {"alice": 0}, xx=True)
            until(
                lambda: queue.keys("rq:*") or not client.exists("making:{0}:alice"),
                what="the next hint",
            )
        for post in posts:
            wait_until_processed(alice, post)
        assert deleted > 0 and worker.poll() is None
        assert {item["id"] for item in alice.get("/v1/posts").json()["items"]} == {
            post["id"] for post in posts
        }


def test_only_living_workers_count_for_the_capacity_of_the_queue(real_server):
    """The names of workers that died stay in RQ's register until a living worker cleans it up."""
    client = real_server.queue.client
    client.flushall()
    hints = dispatcher.queue(real_server.queue.url)
    assert dispatcher.queue_capacity(hints, 1) == dispatcher.HINTS_PER_WORKER
    names = [f"rq:worker:{number}" for number in range(5)]
    client.sadd("rq:workers:images", *names)
    assert dispatcher.queue_capacity(hints, 1) == dispatcher.HINTS_PER_WORKER
    for name in names[:3]:
        client.hset(name, "state", "idle")
    assert dispatcher.queue_capacity(hints, 1) == 3 * dispatcher.HINTS_PER_WORKER
    dispatcher.hint(hints, "a post", 1)
    assert dispatcher.queue_capacity(hints, 1) == 3 * dispatcher.HINTS_PER_WORKER - 1
    hints.connection.close()


# One bad entry must not stop the others

PARTITIONS = 2


@asynccontextmanager
async def dispatching(real_server, tmp_path, **changes):
    """Runs the dispatcher without workers, so hints stay in the queue. Yields storage's Redis client and the store."""
    real_server.client.flushall()
    changes |= {"partitions": PARTITIONS, "converters": 100}
    chosen = make_settings(tmp_path, "", (tmp_path / "backup").as_uri(), **changes)
    db, hints = connect(real_server), dispatcher.queue(real_server.queue.url)
    task = asyncio.create_task(dispatcher.dispatch(db, chosen, hints))
    try:
        yield db, objects.open_store(chosen.store_url)
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await db.close()
        hints.connection.close()


async def make_dropped_upload(db, store, user: str) -> str:
    """Creates an upload whose one chunk is due to be erased. Returns its id."""
    upload, _ = await uploads.create(db, user, PARTITIONS)
    image = uploads.Appender(db, store, upload)
    await image.write(jpeg())
    await image.commit()
    await uploads.drop(db, user, upload)
    return upload


def users_of(partition: int) -> list[str]:
    names = (f"user{number}" for number in range(100))
    return [name for name in names if keys.partition_of_user(name, PARTITIONS) == partition]


async def check_that_other_work_goes_on(server, db, store, partition: int) -> None:
    """Checks that in this partition an upload is ended, a post's image is erased, and a post is handed out."""
    client, queue = server.client, server.queue.client
    user = users_of(partition)[0]
    upload = await make_dropped_upload(db, store, user)
    deleted = await make_post(db, user, PARTITIONS)
    processing = await make_processing(db, user, PARTITIONS)
    await posts.delete(db, store, user, deleted)
    await store.put(keys.image(deleted), jpeg())  # as a late job does
    client.zadd(keys.due(partition), {upload: 0, deleted: 0})
    await eventually(lambda: not client.exists(keys.chunks(upload)), "the end of an upload")
    await eventually(lambda: not (store._root / keys.image(deleted)).exists(), "an erasure")

    def hinted() -> list[str]:
        return [queue.hget(f"rq:job:{job}", "description") for job in queue.lrange("rq:queue:images", 0, -1)]

    await eventually(lambda: any(processing in job for job in hinted()), "a hint")


def messages(caplog, about: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if about in record.getMessage()]


async def test_a_delete_that_fails_is_retried_with_growing_pauses_and_stops_nothing_else(real_server, tmp_path, caplog):
    client = real_server.client
    async with dispatching(real_server, tmp_path) as (db, store):
        upload = await make_dropped_upload(db, store, users_of(0)[0])
        folder = store._root / "chunks" / upload
        folder.rename(folder.with_name("aside"))
        folder.symlink_to(upload)  # to itself, so that unlink(2) of a file in it fails with ELOOP
        pauses = []
        for _ in range(3):
            client.zadd(keys.due(0), {upload: 1})
            await eventually(lambda: client.zscore(keys.due(0), upload) > 1, "a lease")
            now = client.time()[0] * 1000
            await eventually(lambda: messages(caplog, upload), "a try")
            await eventually(lambda now=now: client.zscore(keys.due(0), upload) != now + outbox.LEASE_MS, "its pause")
            await check_that_other_work_goes_on(real_server, db, store, 0)
            pauses.append(round((client.zscore(keys.due(0), upload) - now) / outbox.LEASE_MS))
        assert pauses == [1, 2, 4]
        assert len(messages(caplog, upload)) == 1
        folder.unlink()
        folder.with_name("aside").rename(folder)
        caplog.set_level(logging.INFO)
        client.zadd(keys.due(0), {upload: 1})
        await eventually(lambda: not client.exists(keys.chunks(upload)) and not folder.exists(), "its end")
        await eventually(lambda: messages(caplog, "works again"), "the end of the failures")


@pytest.mark.parametrize("member", ["garbage", "", "u", "uuu-0", "01JD4Q7ZK5W8Y3N6R2T9V0XABC-x", "../../etc", "a b"])
async def test_a_malformed_member_of_due_is_postponed_and_stops_nothing_else(real_server, tmp_path, caplog, member):
    client = real_server.client
    async with dispatching(real_server, tmp_path) as (db, store):
        client.zadd(keys.due(0), {member: 1})
        await eventually(lambda: messages(caplog, repr(member)), "its failure")
        await check_that_other_work_goes_on(real_server, db, store, 0)
        assert len(messages(caplog, repr(member))) == 1
        assert client.zscore(keys.due(0), member) > client.time()[0] * 1000


async def test_malformed_members_of_retired_stop_nothing_else(real_server, tmp_path, caplog):
    client = real_server.client
    async with dispatching(real_server, tmp_path) as (db, store):
        right = f"{await make_post(db, users_of(0)[0], PARTITIONS)}/1795459382641.5f0c2a9be41d7783"
        await store.put(f"comments/{right}", b"old")
        malformed = ["garbage", "", "../../etc/", "01JD4Q7ZK5W8Y3N6R2T9V0XABC-x/"]
        client.zadd(keys.retired(0), dict.fromkeys([*malformed, right], 1))
        await eventually(lambda: client.zscore(keys.retired(0), right) is None, "the removal of the right one")
        assert not [one async for one in store.list("comments/")]
        await check_that_other_work_goes_on(real_server, db, store, 0)
        for member in malformed:
            assert len(messages(caplog, f"old comments {member!r} ")) == 1
            assert client.zscore(keys.retired(0), member) > client.time()[0] * 1000


@pytest.mark.parametrize("broken", [keys.due, keys.turns])
async def test_a_partition_that_cannot_answer_stops_no_other(real_server, tmp_path, caplog, broken):
    client = real_server.client
    async with dispatching(real_server, tmp_path) as (db, store):
        client.set(broken(0), "not a zset")
        await eventually(lambda: messages(caplog, "partition 0"), "its failure")
        for _ in range(2):
            await check_that_other_work_goes_on(real_server, db, store, 1)
        assert len(messages(caplog, "partition 0")) == 1 and not messages(caplog, "partition 1")
        client.delete(broken(0))
        await check_that_other_work_goes_on(real_server, db, store, 0)


async def test_a_store_that_is_unreachable_does_not_delay_image_work(real_server, tmp_path, caplog):
    client = real_server.client
    async with dispatching(real_server, tmp_path) as (db, store):
        upload = await make_dropped_upload(db, store, users_of(0)[0])
        store._root.rename(tmp_path / "aside")
        store._root.touch()
        client.zadd(keys.due(0), {upload: 1})
        await eventually(lambda: messages(caplog, "cleaning up partition 0"), "its failure")
        post = await make_processing(db, users_of(0)[0], PARTITIONS)
        await eventually(lambda: real_server.queue.client.llen("rq:queue:images"), f"a hint of {post}")
        store._root.unlink()
        (tmp_path / "aside").rename(store._root)
        client.zadd(keys.due(0), {upload: 1})
        await eventually(lambda: not client.exists(keys.chunks(upload)), "the end of the upload")
        assert len(messages(caplog, "cleaning up")) == 1


async def test_comments_are_sealed_only_while_no_process_of_another_version_calls_scripts(
    real_server, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(dispatcher, "PAUSES_OTHERS", (0.1, 0.1))
    client = real_server.client
    old = client.connection_pool.make_connection()
    old.connect()
    old.send_command("EVAL", "return 1", 0)
    old.read_response()
    async with dispatching(real_server, tmp_path) as (db, store):
        post = await make_post(db, users_of(0)[0], PARTITIONS)
        await comments.add(db, "bob", post, "old enough")
        client.zadd(keys.changes(0), {post: 1})
        await eventually(lambda: messages(caplog, "while others call scripts"), "the other process")
        await check_that_other_work_goes_on(real_server, db, store, 0)
        assert client.xlen(keys.comments(post)) == 1
        old.disconnect()
        await eventually(lambda: client.exists(keys.segments(post)), "the segment")
        assert len(messages(caplog, "while others call scripts")) == 1


async def test_posts_that_wait_for_sealing_follow_one_another_without_pauses(real_server, tmp_path):
    client = real_server.client
    async with dispatching(real_server, tmp_path) as (_, _):
        began = time.monotonic()
        client.zadd(keys.sealing(0), {keys.new_post_id(0): 1 for _ in range(4 * sealing.LEASE_BATCH)})
        await eventually(lambda: not client.exists(keys.sealing(0)), "the end of the work")
        assert time.monotonic() - began < 3 * dispatcher.PAUSE_SEALING


@pytest.mark.one_redis
@pytest.mark.parametrize("kind", SERVERS)
async def test_other_versions_are_also_found_where_the_path_of_the_socket_has_spaces(kind):
    server = RedisServer(kind)
    server.kill()
    server.socket = f"{server.folder.name}/my name=x data.sock"
    server.start()
    db = Redis(f"unix://{server.socket}")
    try:
        await db.call("count_keys", [])
        assert not await db.others()
        server.client.eval("return 1", 0)
        assert len(await db.others()) == 1
        server.client.ping()  # as an older API does that is only probed
        async with asyncio.timeout(5):
            while not await db.others():
                await asyncio.sleep(0.05)
        server.client.set("key", "value")  # as RQ does
        assert not await db.others()
    finally:
        await db.close()
        server.close()


@pytest.mark.parametrize("member", ["garbage", "", "../../etc", "01JD4Q7ZK5W8Y3N6R2T9V0XABC-x"])
async def test_a_malformed_member_of_sealing_and_a_damaged_segment_are_postponed_and_stop_nothing_else(
    real_server, tmp_path, caplog, member
):
    client = real_server.client
    async with dispatching(real_server, tmp_path) as (db, store):
        post, damaged = [await make_post(db, users_of(0)[0], PARTITIONS) for _ in range(2)]
        client.rpush(keys.segments(damaged), "5-1 2 1.missing")
        client.sadd(keys.erased(damaged), "5-1")
        await comments.add(db, "bob", post, "old enough")
        client.zadd(keys.changes(0), {post: 1})
        client.zadd(keys.sealing(0), {member: 1, damaged: 2})
        await eventually(lambda: client.exists(keys.segments(post)), "the segment of another post")
        for failed in (member, damaged):
            await eventually(lambda failed=failed: messages(caplog, repr(failed)), "its failure")
            assert client.zscore(keys.sealing(0), failed) > client.time()[0] * 1000


async def test_without_quiet_days_nothing_is_sealed_and_deleted_comments_still_leave_their_segments(
    real_server, tmp_path
):
    client = real_server.client
    async with dispatching(real_server, tmp_path, quiet_days=0) as (db, store):
        post = await make_post(db, users_of(0)[0], PARTITIONS)
        segments = Segments(store)
        rows = [(await comments.add(db, "bob", post, text))[0] for text in ("first", "second")]
        assert await sealing.step(db, segments, post, 0, -1000, DAY_MS)
        await comments.add(db, "bob", post, "third", seal_at=1)  # as a process with other settings does
        await comments.delete(db, segments, "bob", post, rows[0].id)
        client.zadd(keys.sealing(0), {post: 1})
        await eventually(lambda: not client.exists(keys.erased(post)), "the compaction")
        await eventually(lambda: not client.exists(keys.sealing(0)), "its end")
        assert client.xlen(keys.comments(post)) == 1 and client.llen(keys.segments(post)) == 1
