"""Redis loads, hangs, is full or cannot write, or the store is full: errors come at once, and it recovers by itself."""

import asyncio
import os
import resource
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil
import pytest
import redis
from conftest import NOBODY, RedisServer, Site, connect, run_with_db, running_site, until
from making import make_post, publish, seal
from redis.backoff import NoBackoff
from redis.retry import Retry
from state import unchanged
from uploading import begin, count_chunks, joined, offset, picture
from wire import FORM, Line, dial, exchange, form, head, hear

from storage import keys, uploads
from storage.objects import Full

KIB = 1024
PROMISED = 1.2  # seconds: the one that the API promises, and what a busy machine adds


@pytest.fixture(params=["valkey", "redis"])
def kind(request):
    return request.param


@pytest.fixture
def start_site(tmp_path):
    """A function that starts a site on a Redis server of its own, with options for the server."""
    parts = []

    def start(kind: str, *options: str) -> Site:
        server = RedisServer(kind, *options)
        site = Site(server.url, tmp_path)
        site.server = server
        parts[:] = site, server
        site.api()
        site.post = run_with_db(server, lambda db: make_post(db, "alice"))
        return site

    yield start
    for part in parts:
        part.close()


def is_refused(answer, code: str) -> bool:
    """Whether an answer is a 503 with this code. Checks the headers that every 503 must have."""
    if answer.status_code != 503:
        return False
    assert answer.headers["retry-after"] == "1"
    assert answer.headers["content-type"] == "application/problem+json"
    return answer.json()["code"] == code


def comment(client, site, text: str = "a"):
    return client.post(f"/v1/posts/{site.post}/comments", json={"text": text})


@contextmanager
def file_limit(pid: int, size: int):
    """Lets no file of a process grow beyond `size` bytes. For this process the disk is full, and no root is needed."""
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        if psutil.pid_exists(pid):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


# Redis


def test_while_redis_loads_requests_are_refused_and_what_was_answered_is_there_afterwards(kind, start_site):
    # Redis waits 100 µs after each key that it loads, and serves its connections once in 1,024 keys.
    site = start_site(kind, "--key-load-delay", "100")
    pipeline = site.server.client.pipeline()
    for number in range(15 * 1024):
        pipeline.set(f"ballast:{number}", number)
    pipeline.execute()
    with site.client("bob") as client, ThreadPoolExecutor() as pool:
        answered = [comment(client, site).json()["id"]]
        site.server.kill()
        starting = pool.submit(site.server.start)
        loading, asked = 0, redis.Redis(unix_socket_path=site.server.socket, retry=Retry(NoBackoff(), 0))
        while not starting.done():
            with suppress(redis.ConnectionError):  # it does not listen yet
                loading += asked.info("persistence")["loading"]
            for send in (lambda: client.get("/v1/posts"), lambda: comment(client, site, "while it loads")):
                began, answer = time.monotonic(), send()
                assert time.monotonic() - began < PROMISED
                assert answer.status_code in (200, 201) or is_refused(answer, "unreachable")
                if answer.status_code == 201:
                    answered.append(answer.json()["id"])
        assert loading, "no request was sent while Redis was loading"
        answered.append(comment(client, site).json()["id"])
        stream = [entry for entry, _ in site.server.client.xrange(keys.comments(site.post))]
        assert stream == answered, "a request that was refused wrote nothing"


@pytest.mark.parametrize("policy", ["everysec", "always"])
def test_when_the_disk_of_redis_is_full_writes_are_refused_and_no_answered_write_is_lost(kind, policy, start_site):
    site = start_site(kind, "--appendfsync", policy)
    server = site.server
    with site.client("bob") as client:
        answered = []

        def write():
            answer = comment(client, site, "x" * 2000)
            if answer.status_code == 201:
                answered.append(answer.json()["id"])
            return answer

        write()
        (file,) = Path(server.folder.name).glob("appendonlydir/*.incr.aof")
        with file_limit(server.process.pid, file.stat().st_size + 10_000):
            until(lambda: write().status_code == 503, what="a refused write")
            if policy == "always":
                server.process.wait(10)  # it cannot undo the write that it executed, so it ends
                assert is_refused(client.get("/v1/posts"), "unreachable")
            else:
                assert client.get(f"/v1/posts/{site.post}").json()["comment_count"] == len(answered)
            assert is_refused(write(), "unreachable")
        if policy == "always":
            server.start()
        until(lambda: write().status_code == 201, what="a write that succeeds again")
        stream = [entry for entry, _ in server.client.xrange(keys.comments(site.post))]
        assert set(answered) <= set(stream)
        # With `always` Redis executes one write, notices, and ends without an answer. All other writes did nothing.
        assert len(stream) - len(answered) <= (1 if policy == "always" else 0)


def test_when_memory_is_full_reading_and_deleting_still_work(kind, start_site):
    site = start_site(kind)
    with site.client("alice") as alice:
        written = comment(alice, site).headers["location"]
        upload = begin(site, 100)
        site.server.client.config_set("maxmemory", 1)
        site.server.client.script_flush()  # Redis loads the scripts that read and delete even when memory is full
        with unchanged(site.server.client, site.folder):
            assert is_refused(comment(alice, site), "unreachable")
            assert is_refused(alice.post("/v1/posts", files={"image": picture(100)}), "unreachable")
            headers = {"Tus-Resumable": "1.0.0", "Upload-Length": "10"}
            assert is_refused(alice.post("/v1/uploads", headers=headers), "unreachable")
            for target in ("", f"/{site.post}", f"/{site.post}/comments"):
                assert alice.get(f"/v1/posts{target}").status_code == 200
            assert alice.get(written).status_code == alice.get("/v1/changes").status_code == 200
            assert offset(site, upload) == 0
        for target in (written, f"/v1/uploads/{upload}", f"/v1/posts/{site.post}"):
            headers = {"Tus-Resumable": "1.0.0"}
            assert alice.head(target, headers=headers).status_code == 200
            assert alice.delete(target, headers=headers).status_code == 204
            assert alice.head(target, headers=headers).status_code == 404
        site.server.client.config_set("maxmemory", 0)
        assert alice.post("/v1/posts", files={"image": picture(100)}).status_code == 201


async def test_while_redis_hangs_a_later_request_waits_no_longer_than_the_first(kind, start_site):
    site = await asyncio.to_thread(start_site, kind)
    took = []

    async def send(after: float, method: str, target: str, body=None):
        await asyncio.sleep(after)
        async with Line(site.port, site.token("bob")) as line:
            began = time.monotonic()
            answer = await line.ask(method, target, body)
            took.append(time.monotonic() - began)
            assert (answer.status, answer.headers["retry-after"]) == (503, "1")

    async def finish_form(body: bytes):
        """Sends the rest of a form whose upload has begun."""
        began = time.monotonic()
        line.sendall(body)
        answer = await asyncio.to_thread(hear, line)
        took.append(time.monotonic() - began)
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")

    body = form(("image", "a.png", picture(100 * KIB)))
    bearer = site.authorization()
    line = dial(site.port)
    line.sendall(head("POST", "/v1/posts", bearer, FORM, f"Content-Length: {len(body)}") + body[:KIB])
    until(lambda: site.server.client.exists("uploads:{0}:alice"), what="the upload of the form")
    os.kill(site.server.process.pid, signal.SIGSTOP)
    try:
        requests = [finish_form(body[KIB:])]
        requests += [send(n / 10, "GET", "/v1/posts") for n in range(8)]
        requests += [send(n / 10, "POST", f"/v1/posts/{site.post}/comments", {"text": "a"}) for n in range(8)]
        await asyncio.gather(*requests)
        assert max(took) < PROMISED
    finally:
        os.kill(site.server.process.pid, signal.SIGCONT)
        line.close()


# The store


@pytest.fixture
def crowded(real_server, tmp_path):
    """A site that must leave more space free than any disk has. Alice has an open upload."""
    real_server.client.flushall()
    with running_site(real_server, tmp_path, free_space=2**30) as site:
        site.upload, _ = run_with_db(real_server, lambda db: uploads.create(db, "alice", 1, 1000))
        yield site


SENT = "Content-Type: application/offset+octet-stream"
HEADS = {
    "a form": ["POST", "/v1/posts", FORM],
    "an upload": ["POST", "/v1/uploads", "Upload-Length: 1000", SENT],
    "a part of one": ["PATCH", "/v1/uploads/{upload}", "Upload-Offset: 0", SENT],
}


@pytest.mark.parametrize("what", HEADS)
def test_with_too_little_free_space_a_body_is_refused_before_it_is_sent(crowded, what):
    method, target, *more = HEADS[what]
    bearer = crowded.authorization()
    asked = ["Tus-Resumable: 1.0.0", "Content-Length: 900", "Expect: 100-continue", bearer, *more]
    with unchanged(crowded.server.client, crowded.folder):
        answer = exchange(crowded.port, head(method, target.format(upload=crowded.upload), *asked))
        assert (answer.status, answer.json()["code"]) == (507, "full")
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.headers["retry-after"] == "60"
    with crowded.client("alice") as alice:
        assert alice.get("/v1/posts").status_code == 200


def test_when_the_store_is_full_bytes_are_refused_and_earlier_ones_stay(serving):
    image = picture(600 * KIB)
    upload = begin(serving, len(image))
    (api,) = psutil.Process(serving.processes[0].pid).children()
    tus = {"Tus-Resumable": "1.0.0", "Content-Type": SENT.split()[1]}
    with serving.client("alice") as alice:

        def send(at: int):
            sent = {**tus, "Upload-Offset": f"{at}"}
            return alice.patch(f"/v1/uploads/{upload}", content=image[at:], headers=sent)

        # The first chunk is put once 64 KiB have come, with all of the piece that was received last: at most 157 KiB
        # were seen. The next chunk has the rest, which is too large.
        with file_limit(api.pid, 200 * KIB):
            answer = send(0)
            assert (answer.status_code, answer.json()["code"], answer.headers["retry-after"]) == (507, "full", "60")
            taken = offset(serving, upload)
            assert 64 * KIB <= taken <= 200 * KIB and count_chunks(serving, upload) == 1
        with file_limit(api.pid, 60 * KIB), unchanged(serving.server.client, serving.folder):
            assert send(taken).status_code == 507
        with file_limit(api.pid, 60 * KIB):
            assert alice.post("/v1/posts", files={"image": image}).status_code == 507
            created = alice.post("/v1/uploads", content=image, headers={**tus, "Upload-Length": f"{len(image)}"})
            assert (created.status_code, created.headers["upload-offset"]) == (201, "0")
            assert sum(1 for _ in (serving.folder / "store").glob("chunks/*/*")) == 1
        assert send(taken).status_code == 204
    assert asyncio.run(joined(serving, serving.server, upload)) == image


def test_a_lost_segment_makes_only_its_own_comments_unreadable(serving):
    store = serving.open_store()

    async def lose_a_segment(db):
        post = await publish(db, store, "alice", 300)
        await seal(db, store, post, hot=20)
        (segment,) = [entry.name async for entry in store.list(f"comments/{post}/")]
        await store.delete([segment])
        return post

    address = f"{serving.url}/v1/posts/{run_with_db(serving.server, lose_a_segment)}/comments"
    first = httpx.get(address)
    assert (first.status_code, len(first.json()["items"])) == (200, 20)
    lost = httpx.get(address, params={"cursor": first.json()["next"], "limit": 100})
    assert (lost.status_code, lost.json()["code"]) == (503, "unreachable")
    assert lost.json()["detail"] == "some of these comments cannot be read from the store"
    assert httpx.get(f"{serving.url}/v1/posts").status_code == 200


async def test_an_upload_stops_when_free_space_runs_out_and_keeps_what_it_has(real_server, store):
    db = connect(real_server)
    upload, _ = await uploads.create(db, "alice", 1, 200)
    image = uploads.Appender(db, store, upload, 0, 200)
    await image.write(picture(100))
    await image.commit()
    store._min_free = 2**60  # as if another program had filled the disk
    await image.write(picture(100))
    with pytest.raises(Full):
        await image.commit()
    assert (await uploads.inspect(db, upload)).offset == image.offset == 100
    assert len([chunk async for chunk in store.list()]) == 1
    await db.close()


def test_a_post_can_be_deleted_while_the_store_is_unavailable(start_site):
    site = start_site("valkey")
    store = site.folder / "store"
    store.rename(site.folder / "unplugged")
    store.touch()
    with site.client("alice") as alice:
        assert alice.delete(f"/v1/posts/{site.post}").status_code == 204
        assert alice.get(f"/v1/posts/{site.post}").status_code == 404
        assert alice.delete(f"/v1/posts/{site.post}").status_code == 404


def test_an_answer_during_an_outage_has_no_internal_details_and_the_log_has_them(tmp_path):
    """The log has the cause, with paths of the server and messages of libraries. It has it at most five times."""
    log = tmp_path / "log"
    site = Site(f"unix://{tmp_path}/no.sock", tmp_path)
    with log.open("wb") as out:
        site.start("api", stdout=out, stderr=out)
    try:
        with site.client("alice") as client:
            first = until(lambda: client.get("/v1/posts"), what="an answer")
            answers = [first, *(client.get("/v1/posts") for _ in range(20))]
            answers += [client.post("/v1/posts", json={"upload": f"u{NOBODY}"}), client.get("/readyz")]
    finally:
        site.close()
    for answer in answers:
        assert (answer.status_code, answer.json()["code"]) == (503, "unreachable")
        assert answer.json()["detail"] == "the database cannot be reached: nothing has changed"
    lines = [line for line in log.read_text().splitlines() if "no.sock" in line]
    assert 1 <= len(lines) <= 5
