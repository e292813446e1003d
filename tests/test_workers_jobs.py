"""A job gives the right result also if it runs twice, and if its post is deleted while it runs."""

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
from conftest import ROOT, RedisServer, connect, free_port, photograph, until
from parts import s3_url
from proxy import Proxy
from state import unchanged
from test_storage_outbox import lease_post, make_image, object_names, run_outbox, seconds_readable

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
    monkeypatch.setenv("IMAGEGRAM_QUEUE_URL", server.queue.url)
    monkeypatch.setenv("IMAGEGRAM_DATA", str(tmp_path))
    db = connect(server)
    yield db
    await db.close()


@pytest.fixture
def store(tmp_path):
    return objects.open_store((tmp_path / "store").as_uri())


@pytest.fixture
async def due(db, store) -> outbox.ImageWork:
    async with uploads.form_upload(db, store, "alice", 1) as image:
        await image.write(photograph())
        await image.finish()
    post, _ = await posts.create(db, "alice", image.upload, "")
    return await lease_post(db, post)


def during_conversion(monkeypatch, event) -> list:
    """Runs the coroutine function `event` to its end before the first conversion. Returns the list of conversions."""
    conversions = []

    def convert(path, chosen):
        conversions.append(path)
        if len(conversions) == 1:
            thread = threading.Thread(target=lambda: asyncio.run(event()))
            thread.start()
            thread.join()
        return sandbox.convert(path, chosen)

    monkeypatch.setattr(jobs, "convert", convert)
    return conversions


async def check_published(db, store, post: str) -> None:
    """Checks that the post is in the feed, that the store has its two objects only, and that nothing is left to do."""
    assert [row.id for row in (await posts.feed(db, 1, 10)).posts] == [post]
    await run_outbox(db, store)
    assert await object_names(store) == [keys.image(post), keys.original(post)]
    assert await store.get(keys.original(post)) == photograph()
    assert await outbox.lease(db, 0) == [] and await outbox.lease_images(db, 0, 10) == []


async def test_several_runs_of_one_hint_at_the_same_time_are_one_attempt(db, store, due, monkeypatch):
    conversions = during_conversion(monkeypatch, lambda: jobs._attempt(due.id, due.lease))
    await asyncio.gather(*(jobs._attempt(due.id, due.lease) for _ in range(3)))
    assert len(conversions) == 1
    await check_published(db, store, due.id)


async def test_two_attempts_at_the_same_time_give_one_result(server, db, store, due, monkeypatch):
    """The first attempt's lease ends. A second attempt starts and ends while the first is still running."""

    async def second_attempt():
        other = connect(server)
        second = await handed_out(server, other, due.id)
        await other.close()
        await jobs._attempt(second.id, second.lease)

    conversions = during_conversion(monkeypatch, second_attempt)
    await jobs._attempt(due.id, due.lease)
    assert len(conversions) == 2
    await check_published(db, store, due.id)


async def test_a_job_whose_post_is_deleted_meanwhile_erases_the_image_it_stored(server, db, store, due, monkeypatch):
    async def delete():
        other = connect(server)
        await posts.delete(other, store, "alice", due.id)
        await other.close()

    stored = []
    monkeypatch.setattr(jobs.posts, "put_image", spy(stored, posts.put_image))
    conversions = during_conversion(monkeypatch, delete)
    await jobs._attempt(due.id, due.lease)
    assert len(conversions) == len(stored) == 1
    assert keys.image(due.id) not in await object_names(store)
    assert server.client.zscore(keys.due(0), due.id) and not server.client.exists(keys.feed(0), keys.post(due.id))


def spy(calls: list, function):
    """A function that does the same and appends its arguments to `calls`."""

    async def called(*arguments):
        calls.append(arguments)
        await function(*arguments)

    return called


async def test_a_job_whose_post_is_ready_changes_nothing(server, db, store, due, monkeypatch):
    conversions = during_conversion(monkeypatch, None)
    await make_image(db, store, due)
    objects_before = await object_names(store)
    with unchanged(server.client):
        await jobs._attempt(due.id, due.lease)
    assert conversions == [] and await object_names(store) == objects_before


async def test_a_failed_post_has_the_sentence_of_its_code_and_the_log_has_the_cause(db, store, caplog):
    caplog.set_level("INFO")
    whole = photograph()
    async with uploads.form_upload(db, store, "alice", 1) as image:
        await image.write(whole[: len(whole) // 2])
        await image.finish()
    post, _ = await posts.create(db, "alice", image.upload, "")
    await jobs._attempt(post, (await lease_post(db, post)).lease)
    row = await posts.read(db, post)
    assert (row.code, row.detail) == ("truncated", "the file ends before the image is complete")
    assert re.search(rf"image of {post}: failed, truncated: .+ \(.+\)", caplog.text)


# Failures that are not the image's fault


@contextmanager
def no_store(tmp_path):
    """The folder of the store is missing: a file has its name."""
    folder, aside = tmp_path / "store", tmp_path / "aside"
    folder.rename(aside)
    folder.touch()
    yield
    folder.unlink()
    aside.rename(folder)


@contextmanager
def no_disk(tmp_path):
    """This process can write at most 1,000 bytes of a file. A write then fails as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("outage", [no_store, no_disk])
async def test_an_outage_of_store_or_disk_uses_up_no_attempt(db, store, due, tmp_path, server, outage):
    with outage(tmp_path):
        await fail_often(server, db, due)
    await jobs._attempt(due.id, (await handed_out(server, db, due.id)).lease)
    await check_published(db, store, due.id)


async def test_an_outage_of_s3_uses_up_no_attempt(db, server, tmp_path, monkeypatch):
    monkeypatch.setenv("IMAGEGRAM_STORE", s3_url(monkeypatch))
    store = objects.open_store(jobs.settings.load().store_url)
    async with uploads.form_upload(db, store, "alice", 1) as image:
        await image.write(photograph())
        await image.finish()
    post, _ = await posts.create(db, "alice", image.upload, "")
    due = await lease_post(db, post)
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
        await fail_often(server, db, due)
    await jobs._attempt(post, (await handed_out(server, db, post)).lease)
    assert (await posts.read(db, post)).status == "ready"


async def handed_out(server, db, post: str) -> outbox.ImageWork:
    """The next hint, as if the last lease had ended."""
    server.client.zadd(keys.making(0, "alice"), {post: 0}, xx=True)
    server.client.zadd(keys.turns(0), {"alice": 0}, xx=True)
    return await lease_post(db, post)


async def fail_often(server, db, due: outbox.ImageWork) -> None:
    """Runs more jobs than a post has attempts. After each, the post must still be processing."""
    for _ in range(outbox.ATTEMPTS + 2):
        await jobs._attempt(due.id, due.lease)
        assert (await posts.read(db, due.id)).status == "processing"
        due = await handed_out(server, db, due.id)


@pytest.fixture
async def mortal(tmp_path, monkeypatch):
    """A Redis that only one test uses, so that the test can kill it."""
    server = RedisServer("valkey")
    monkeypatch.setenv("IMAGEGRAM_REDIS_URL", server.url)
    monkeypatch.setenv("IMAGEGRAM_QUEUE_URL", server.queue.url)
    monkeypatch.setenv("IMAGEGRAM_DATA", str(tmp_path))
    monkeypatch.setattr(jobs, "RETRY_PAUSE", 0.05)
    yield server
    server.close()


async def make_post_with_photograph(server, store) -> tuple[Redis, str]:
    """Returns a client of the server and the id of a processing post."""
    db = connect(server)
    async with uploads.form_upload(db, store, "alice", 1) as image:
        await image.write(photograph())
        await image.finish()
    return db, (await posts.create(db, "alice", image.upload, ""))[0]


async def test_a_post_is_published_when_redis_is_back_and_its_picture_is_created_only_once(mortal, store, monkeypatch):
    """Redis is killed during the conversion and started after it."""
    db, post = await make_post_with_photograph(mortal, store)
    due = await lease_post(db, post)

    async def kill():
        mortal.kill()

    conversions = during_conversion(monkeypatch, kill)
    job = asyncio.create_task(jobs._attempt(post, due.lease))
    picture = store._root / keys.image(post)
    await asyncio.to_thread(until, lambda: conversions and picture.exists(), what="the picture")
    await asyncio.to_thread(mortal.start)
    await job
    await check_published(db, store, post)
    assert len(conversions) == 1
    await db.close()


async def test_an_outage_of_redis_during_each_conversion_uses_up_no_attempt(mortal, store, monkeypatch):
    """Each time, Redis is killed during the conversion, and RQ's timeout ends the job before Redis is back."""
    db, post = await make_post_with_photograph(mortal, store)

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
    await check_published(db, store, post)
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


def run_job_until_killed(proxy, due: outbox.ImageWork, before: dict) -> None:
    """Runs a job in a process of its own. `before`: by script, what happens before it is called; None: a kill."""
    command = "import sys; from workers import jobs; jobs.make_image(sys.argv[1], int(sys.argv[2]))"
    environment = {**os.environ, "IMAGEGRAM_REDIS_URL": proxy.url}
    job = subprocess.Popen([sys.executable, "-c", command, due.id, str(due.lease)], cwd=ROOT, env=environment)
    for name, event in before.items():
        proxy.before[SCRIPTS[name].sha.encode()] = event or job.kill
    assert job.wait(60) == -signal.SIGKILL


@pytest.mark.parametrize("how", ["deleted", "failed"])
async def test_the_image_of_a_killed_job_is_erased_if_its_post_has_ended(server, db, store, due, how):
    """The post is deleted or failed while the job runs. The job stores the JPEG and is killed before it publishes."""

    async def end_post():
        """Ends the post, and then does the work that is due."""
        other = connect(server)
        db.clock = other.clock = due.lease + LEASE_MS
        if how == "deleted":
            await posts.delete(other, store, "alice", due.id)
        else:
            second = await lease_post(other, due.id)
            attempt, _ = await outbox.start_image(other, due.id, second.lease)
            await outbox.fail(other, due.id, attempt, "damaged", "it is damaged")
        await run_outbox(other, store)
        await other.close()

    with Proxy(server.nodes[0].socket) as proxy:
        before = {"read_upload": lambda: asyncio.run(end_post()), "publish_post": None}
        await asyncio.to_thread(run_job_until_killed, proxy, due, before)
    assert keys.image(due.id) in await object_names(store)
    assert len(await seconds_readable(db, store, due.id, 60)) <= 30
    assert await seconds_readable(db, store, due.id, JOB_MS // 1000) == []
