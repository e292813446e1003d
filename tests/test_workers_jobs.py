"""A job is right when it is run twice, at the same time or again, and when its post goes meanwhile."""

import asyncio
import os
import re
import resource
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest
from conftest import ROOT, RedisServer, free_port, photograph, until
from parts import s3_url
from proxy import Proxy
from test_storage_outbox import leased, make_image, names, served, work_off

from storage import keys, objects, outbox, posts, uploads
from storage.db.client import SCRIPTS, Redis
from storage.outbox import JOB_MS, LEASE_MS
from workers import jobs, sandbox


@pytest.fixture
def server(embedded):
    embedded.client.flushall()
    return embedded


@pytest.fixture
async def db(server, tmp_path, monkeypatch):
    monkeypatch.setenv("IMAGEGRAM_REDIS_URL", server.url)
    monkeypatch.setenv("IMAGEGRAM_DATA", str(tmp_path))
    db = Redis(server.url)
    yield db
    await db.close()


@pytest.fixture
def store(tmp_path):
    return objects.open_store((tmp_path / "store").as_uri())


@pytest.fixture
async def due(db, store) -> outbox.Image:
    async with uploads.form_upload(db, store, "alice", 1) as image:
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
    assert await outbox.lease(db, 0) == [] and await outbox.lease_images(db, 0, 10) == []


async def test_two_runs_of_one_hint_at_the_same_time_are_one_attempt(db, store, due, monkeypatch):
    begun = meanwhile(monkeypatch, lambda: jobs._attempt(due.id, due.lease))
    await asyncio.gather(*(jobs._attempt(due.id, due.lease) for _ in range(3)))
    assert len(begun) == 1
    await shown(db, store, due.id)


async def test_two_attempts_at_the_same_time_give_one_result(server, db, store, due, monkeypatch):
    """The second begins and ends while the first is still at it, whose lease has run out."""

    async def again():
        other = Redis(server.url)
        second = await handed_out(server, other, due.id)
        await other.close()
        await jobs._attempt(second.id, second.lease)

    begun = meanwhile(monkeypatch, again)
    await jobs._attempt(due.id, due.lease)
    assert len(begun) == 2
    await shown(db, store, due.id)


async def test_a_job_that_finds_its_post_deleted_removes_what_it_put(server, db, store, due, monkeypatch):
    async def delete():
        other = Redis(server.url)
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


async def test_a_failed_post_has_a_written_sentence_and_the_log_has_the_cause(db, store, caplog):
    caplog.set_level("INFO")
    whole = photograph()
    async with uploads.form_upload(db, store, "alice", 1) as image:
        await image.write(whole[: len(whole) // 2])
        await image.finish()
    post, _ = await posts.create(db, "alice", image.upload, "")
    await jobs._attempt(post, (await leased(db, post)).lease)
    row = await posts.read(db, post)
    assert (row.code, row.detail) == ("truncated", "the file ends before the image is complete")
    assert re.search(rf"image of {post}: failed, truncated: .+ \(.+\)", caplog.text)


# Failures that are not the image's


@contextmanager
def no_store(store, tmp_path, monkeypatch):
    """The folder of the store is not there: something else has its name."""
    folder, aside = tmp_path / "store", tmp_path / "aside"
    folder.rename(aside)
    folder.touch()
    yield
    folder.unlink()
    aside.rename(folder)


@contextmanager
def no_disk(store, tmp_path, monkeypatch):
    """This process may write no file of more than some bytes, which ends a write as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("away", [no_store, no_disk])
async def test_a_store_or_a_disk_that_is_away_uses_up_no_attempt(db, store, due, tmp_path, monkeypatch, server, away):
    with away(store, tmp_path, monkeypatch):
        await fail_often(server, db, due)
    await jobs._attempt(due.id, (await handed_out(server, db, due.id)).lease)
    await shown(db, store, due.id)


async def test_an_s3_that_is_away_uses_up_no_attempt(db, server, tmp_path, monkeypatch):
    monkeypatch.setenv("IMAGEGRAM_STORE", s3_url(monkeypatch))
    store = objects.open_store(jobs.settings.load().store_url)
    async with uploads.form_upload(db, store, "alice", 1) as image:
        await image.write(photograph())
        await image.finish()
    post, _ = await posts.create(db, "alice", image.upload, "")
    due = await leased(db, post)
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
        await fail_often(server, db, due)
    await jobs._attempt(post, (await handed_out(server, db, post)).lease)
    assert (await posts.read(db, post)).status == "ready"


async def handed_out(server, db, post: str) -> outbox.Image:
    """The next hint, as if the lease of the last one had run out."""
    server.client.zadd(keys.making(0, "alice"), {post: 0}, xx=True)
    server.client.zadd(keys.turns(0), {"alice": 0}, xx=True)
    return await leased(db, post)


async def fail_often(server, db, due: outbox.Image) -> None:
    for _ in range(outbox.ATTEMPTS + 2):
        await jobs._attempt(due.id, due.lease)
        assert (await posts.read(db, due.id)).status == "processing"
        due = await handed_out(server, db, due.id)


@pytest.fixture
async def mortal(tmp_path, monkeypatch):
    """A Redis of this test's own, which it may kill."""
    server = RedisServer("valkey")
    monkeypatch.setenv("IMAGEGRAM_REDIS_URL", server.url)
    monkeypatch.setenv("IMAGEGRAM_DATA", str(tmp_path))
    monkeypatch.setattr(jobs, "RETRY_PAUSE", 0.05)
    yield server
    server.close()


async def published(server, store) -> tuple[Redis, str]:
    db = Redis(server.url)
    async with uploads.form_upload(db, store, "alice", 1) as image:
        await image.write(photograph())
        await image.finish()
    return db, (await posts.create(db, "alice", image.upload, ""))[0]


async def test_a_picture_is_shown_when_redis_is_back(mortal, store, monkeypatch):
    """Redis goes away while the picture is made, and comes back later. It is not made a second time."""
    db, post = await published(mortal, store)
    due = await leased(db, post)

    async def kill():
        mortal.kill()

    begun = meanwhile(monkeypatch, kill)
    job = asyncio.create_task(jobs._attempt(post, due.lease))
    await asyncio.to_thread(until, lambda: begun and (store._root / keys.image(post)).exists(), what="the picture")
    await asyncio.to_thread(mortal.start)
    await job
    await shown(db, store, post)
    assert len(begun) == 1
    await db.close()


async def test_a_redis_that_is_away_when_the_picture_is_made_uses_up_no_attempt(mortal, store, monkeypatch):
    """Each time Redis goes away during the conversion, and RQ's time for the job ends before it is back."""
    db, post = await published(mortal, store)

    def convert(path, chosen):
        mortal.kill()
        return sandbox.convert(path, chosen)

    monkeypatch.setattr(jobs, "convert", convert)
    for _ in range(outbox.ATTEMPTS + 2):
        due = await handed_out(mortal, db, post)
        job = asyncio.create_task(jobs._attempt(post, due.lease))
        await asyncio.to_thread(until, lambda: mortal.process.returncode is not None, what="the conversion")
        await asyncio.to_thread(until, (store._root / keys.image(post)).exists, what="the picture")
        while not job.done():
            job.cancel()
            await asyncio.sleep(0)
        await asyncio.to_thread(mortal.start)
        assert (await posts.read(db, post)).status == "processing"
    monkeypatch.setattr(jobs, "convert", sandbox.convert)
    await jobs._attempt(post, (await handed_out(mortal, db, post)).lease)
    await shown(db, store, post)
    await db.close()


async def test_a_decoder_that_dies_uses_up_an_attempt(db, store, due, server, monkeypatch):
    def dies(path, chosen):
        raise ChildProcessError("the decoder ended with -9")

    monkeypatch.setattr(jobs, "convert", dies)
    for _ in range(outbox.ATTEMPTS):
        with pytest.raises(ChildProcessError):
            await jobs._attempt(due.id, due.lease)
        due = await handed_out(server, db, due.id)
    await jobs._attempt(due.id, due.lease)
    assert (await posts.read(db, due.id)).code == "exhausted"


# Jobs that are killed


def run_job(proxy, due: outbox.Due, before: dict) -> None:
    """Run a job in a process of its own. `before`: what happens before it calls a script, None: it is killed."""
    command = "import sys; from workers import jobs; jobs.make_image(sys.argv[1], int(sys.argv[2]))"
    environment = {**os.environ, "IMAGEGRAM_REDIS_URL": proxy.url}
    job = subprocess.Popen([sys.executable, "-c", command, due.id, str(due.lease)], cwd=ROOT, env=environment)
    for name, happens in before.items():
        proxy.before[SCRIPTS[name].sha.encode()] = happens or job.kill
    assert job.wait(60) == -signal.SIGKILL


@pytest.mark.parametrize("how", ["deleted", "failed"])
async def test_an_image_whose_job_was_killed_before_its_publish_was_refused_is_erased(server, db, store, due, how):
    async def end():
        """The post ends while the job is at work, and the outbox looks at once."""
        other = Redis(server.url)
        db.clock = other.clock = due.lease + LEASE_MS
        if how == "deleted":
            await posts.delete(other, store, "alice", due.id)
        else:
            second = await leased(other, due.id)
            attempt, _ = await outbox.start_image(other, due.id, second.lease)
            await outbox.fail(other, due.id, attempt, "damaged", "it is damaged")
        await work_off(other, store)
        await other.close()

    with Proxy(server.socket) as proxy:
        before = {"read_upload": lambda: asyncio.run(end()), "publish_post": None}
        await asyncio.to_thread(run_job, proxy, due, before)
    assert keys.image(due.id) in await names(store)
    assert len(await served(db, store, due.id, 60)) <= 30
    assert await served(db, store, due.id, JOB_MS // 1000) == []
