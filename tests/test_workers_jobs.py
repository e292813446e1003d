"""A job is right when it is run twice, at the same time or again, and when its post goes meanwhile."""

import asyncio
import threading

import pytest
from conftest import photograph
from test_storage_outbox import leased, make_image, names, work_off

from storage import keys, objects, outbox, posts, scripts, uploads
from workers import jobs, sandbox


@pytest.fixture
def server(embedded):
    embedded.client.flushall()
    return embedded


@pytest.fixture
async def db(server, tmp_path, monkeypatch):
    monkeypatch.setenv("IMAGEGRAM_REDIS_URL", server.url)
    monkeypatch.setenv("IMAGEGRAM_DATA", str(tmp_path))
    db = scripts.Redis(server.url)
    yield db
    await db.close()


@pytest.fixture
def store(tmp_path):
    return objects.open_store((tmp_path / "store").as_uri())


@pytest.fixture
async def due(db, store) -> outbox.Due:
    async with uploads.receiving(db, store, "alice", 1) as image:
        await image.write(photograph())
        await image.finish()
    post, _ = await posts.create(db, "alice", image.upload, "")
    return await leased(db, post)


def meanwhile(monkeypatch, happens) -> list:
    """While the first conversion is under way, `happens` runs to its end. Returns the conversions that were begun."""
    begun = []

    def convert(path, chosen):
        begun.append(path)
        if len(begun) == 1:
            thread = threading.Thread(target=lambda: asyncio.run(happens()))
            thread.start()
            thread.join()
        return sandbox.convert(path, chosen)

    monkeypatch.setattr(jobs, "convert", convert)
    return begun


async def shown(db, store, post: str) -> None:
    """One result: the post is in the feed, its objects are there, nothing else is, and nothing is to be done."""
    assert [row.id for row in (await posts.feed(db, 1, 10)).posts] == [post]
    await work_off(db, store)
    assert await names(store) == [keys.image(post), keys.original(post)]
    assert await store.get(keys.original(post)) == photograph()
    assert await outbox.lease(db, 0, 10) == []


async def test_two_runs_of_one_hint_at_the_same_time_are_one_attempt(db, store, due, monkeypatch):
    begun = meanwhile(monkeypatch, lambda: jobs._attempt(due.id, due.lease))
    await asyncio.gather(*(jobs._attempt(due.id, due.lease) for _ in range(3)))
    assert len(begun) == 1
    await shown(db, store, due.id)


async def test_two_attempts_at_the_same_time_give_one_result(server, db, store, due, monkeypatch):
    """The second begins and ends while the first is still at it, whose lease has run out."""

    async def again():
        server.client.zadd(keys.due(0), {due.id: 0}, xx=True)
        other = scripts.Redis(server.url)
        second = await leased(other, due.id)
        await other.close()
        await jobs._attempt(second.id, second.lease)

    begun = meanwhile(monkeypatch, again)
    await jobs._attempt(due.id, due.lease)
    assert len(begun) == 2
    await shown(db, store, due.id)


async def test_a_job_that_finds_its_post_deleted_removes_what_it_put(server, db, store, due, monkeypatch):
    async def delete():
        other = scripts.Redis(server.url)
        await posts.delete(other, store, "alice", due.id)
        await other.close()

    put = []
    monkeypatch.setattr(jobs.posts, "put_image", spy(put, posts.put_image))
    begun = meanwhile(monkeypatch, delete)
    await jobs._attempt(due.id, due.lease)
    assert len(begun) == len(put) == 1
    assert keys.image(due.id) not in await names(store)
    assert server.client.zscore(keys.due(0), due.id) and not server.client.exists(keys.feed(0), keys.post(due.id))


def spy(calls: list, function):
    async def called(*given):
        calls.append(given)
        await function(*given)

    return called


async def test_a_job_whose_post_is_ready_does_nothing(db, store, due, monkeypatch):
    begun = meanwhile(monkeypatch, None)
    await make_image(db, store, due)
    await jobs._attempt(due.id, due.lease)
    assert begun == []
