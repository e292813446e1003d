"""The outbox is the truth: whatever becomes of the queue and of the workers, every post ends."""

import asyncio
import logging
from contextlib import asynccontextmanager

import pytest
from conftest import connect, photograph, publish, turned, until
from making import jpeg, make_post, make_processing, png
from parts import make_settings
from parts import until as eventually

from storage import keys, objects, outbox, posts, uploads
from workers import dispatcher


def test_an_image_that_is_being_made_is_not_there_yet(site):
    with site.client("alice") as client:
        post = publish(client, photograph())
        for ask in (client.get, client.head):
            missing = ask(f"/v1/images/{post['id']}.jpg")
            assert (missing.status_code, missing.headers["Retry-After"]) == (404, "1")
            assert missing.headers["Content-Type"] == "application/problem+json"
            assert "immutable" not in missing.headers.get("Cache-Control", "")
        assert client.get("/v1/posts").json()["items"] == []
        site.worker()
        turned(client, post)
        assert client.get(f"/v1/images/{post['id']}.jpg").status_code == 200


def test_a_queue_that_is_lost_again_and_again_changes_nothing(site, real_server):
    """Every key of RQ is deleted while images are made. Leases end early here, so that nobody waits a minute."""
    client = real_server.client
    with site.client("alice") as alice:
        posts = [publish(alice, png(40 + n, 40)) for n in range(6)]
        worker = site.worker()
        deleted = 0
        until(lambda: client.exists("rq:workers"), what="the worker")
        for _ in range(8):
            deleted += client.delete("rq:workers", "rq:workers:images", *client.keys("rq:*"))
            client.zadd("making:{0}:alice", dict.fromkeys((post["id"] for post in posts), 0), xx=True)
            client.zadd("turns:{0}", {"alice": 0}, xx=True)
            until(
                lambda: client.keys("rq:*") or not client.exists("making:{0}:alice"),
                what="the next hint",
            )
        for post in posts:
            turned(alice, post)
        assert deleted > 0 and worker.poll() is None
        assert {item["id"] for item in alice.get("/v1/posts").json()["items"]} == {
            post["id"] for post in posts
        }


def test_workers_that_died_leave_no_room_in_the_queue(real_server):
    """Their names stay in RQ's register until one that lives cleans it up."""
    client = real_server.client
    client.flushall()
    hints = dispatcher.queue(real_server.url)
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


# One bad entry stops nothing

PARTITIONS = 2


@asynccontextmanager
async def dispatching(real_server, tmp_path):
    """The dispatcher on a server without workers: hints stay in the queue. Yields storage's client and the store."""
    real_server.client.flushall()
    chosen = make_settings(tmp_path, "", (tmp_path / "backup").as_uri(), partitions=PARTITIONS, converters=100)
    db, hints = connect(real_server), dispatcher.queue(real_server.url)
    task = asyncio.create_task(dispatcher.dispatch(db, chosen, hints))
    try:
        yield db, objects.open_store(chosen.store_url)
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await db.close()
        hints.connection.close()


async def dropped(db, store, user: str) -> str:
    """An upload whose one chunk is to be erased."""
    upload, _ = await uploads.create(db, user, PARTITIONS)
    image = uploads.Appender(db, store, upload)
    await image.write(jpeg())
    await image.commit()
    await uploads.drop(db, user, upload)
    return upload


def users_of(partition: int) -> list[str]:
    names = (f"user{number}" for number in range(100))
    return [name for name in names if keys.partition_of_user(name, PARTITIONS) == partition]


async def everything_else_goes_on(client, db, store, partition: int) -> None:
    """In a partition an upload is ended, a post's image is erased, and a post is handed out."""
    user = users_of(partition)[0]
    upload = await dropped(db, store, user)
    deleted, processing = await make_post(db, user, PARTITIONS), await make_processing(db, user, PARTITIONS)
    await posts.delete(db, store, user, deleted)
    await store.put(keys.image(deleted), jpeg())  # as a job does that was late
    client.zadd(keys.due(partition), {upload: 0, deleted: 0})
    hinted = "rq:queue:images"
    await eventually(lambda: not client.exists(keys.chunks(upload)), "the end of an upload")
    await eventually(lambda: not (store._root / keys.image(deleted)).exists(), "an erasure")
    jobs = lambda: [client.hget(f"rq:job:{job}", "description") for job in client.lrange(hinted, 0, -1)]  # noqa: E731
    await eventually(lambda: any(processing in job for job in jobs()), "a hint")


def told(caplog, about: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if about in record.getMessage()]


async def test_a_delete_that_fails_stops_nothing_and_is_tried_again_with_growing_pauses(real_server, tmp_path, caplog):
    client = real_server.client
    async with dispatching(real_server, tmp_path) as (db, store):
        upload = await dropped(db, store, users_of(0)[0])
        folder = store._root / "chunks" / upload
        folder.rename(folder.with_name("aside"))
        folder.symlink_to(upload)  # to itself, so that unlink(2) in it ends with ELOOP
        pauses = []
        for _ in range(3):
            client.zadd(keys.due(0), {upload: 1})
            await eventually(lambda: client.zscore(keys.due(0), upload) > 1, "a lease")
            now = client.time()[0] * 1000
            await eventually(lambda: told(caplog, upload), "a try")
            await eventually(lambda now=now: client.zscore(keys.due(0), upload) != now + outbox.LEASE_MS, "its pause")
            await everything_else_goes_on(client, db, store, 0)
            pauses.append(round((client.zscore(keys.due(0), upload) - now) / outbox.LEASE_MS))
        assert pauses == [1, 2, 4]
        assert len(told(caplog, upload)) == 1
        folder.unlink()
        folder.with_name("aside").rename(folder)
        caplog.set_level(logging.INFO)
        client.zadd(keys.due(0), {upload: 1})
        await eventually(lambda: not client.exists(keys.chunks(upload)) and not folder.exists(), "its end")
        await eventually(lambda: told(caplog, "works again"), "the end of the failures")


@pytest.mark.parametrize("member", ["garbage", "", "u", "uuu-0", "01JD4Q7ZK5W8Y3N6R2T9V0XABC-x", "../../etc", "a b"])
async def test_a_malformed_member_of_due_stops_nothing(real_server, tmp_path, caplog, member):
    client = real_server.client
    async with dispatching(real_server, tmp_path) as (db, store):
        client.zadd(keys.due(0), {member: 1})
        await eventually(lambda: told(caplog, repr(member)), "its failure")
        await everything_else_goes_on(client, db, store, 0)
        assert len(told(caplog, repr(member))) == 1
        assert client.zscore(keys.due(0), member) > client.time()[0] * 1000


@pytest.mark.parametrize("broken", [keys.due, keys.turns])
async def test_a_partition_that_cannot_answer_stops_no_other(real_server, tmp_path, caplog, broken):
    client = real_server.client
    async with dispatching(real_server, tmp_path) as (db, store):
        client.set(broken(0), "this is no zset")
        await eventually(lambda: told(caplog, "partition 0"), "its failure")
        for _ in range(2):
            await everything_else_goes_on(client, db, store, 1)
        assert len(told(caplog, "partition 0")) == 1 and not told(caplog, "partition 1")
        client.delete(broken(0))
        await everything_else_goes_on(client, db, store, 0)


async def test_a_store_that_is_away_keeps_no_image_work_back(real_server, tmp_path, caplog):
    client = real_server.client
    async with dispatching(real_server, tmp_path) as (db, store):
        upload = await dropped(db, store, users_of(0)[0])
        store._root.rename(tmp_path / "aside")
        store._root.touch()
        client.zadd(keys.due(0), {upload: 1})
        await eventually(lambda: told(caplog, "cleaning up partition 0"), "its failure")
        post = await make_processing(db, users_of(0)[0], PARTITIONS)
        await eventually(lambda: client.llen("rq:queue:images"), f"a hint of {post}")
        store._root.unlink()
        (tmp_path / "aside").rename(store._root)
        client.zadd(keys.due(0), {upload: 1})
        await eventually(lambda: not client.exists(keys.chunks(upload)), "the end of the upload")
        assert len(told(caplog, "cleaning up")) == 1
