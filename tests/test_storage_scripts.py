"""The Redis client sends nothing twice, and every caller gets a true answer within a second.

The answer is the result, Unreachable (the write has not happened) or Unknown (the write may have happened).
"""

import asyncio
import os
import random
import signal
import time
from collections import Counter
from contextlib import asynccontextmanager
from itertools import chain

import pytest
from conftest import RedisServer, Site, connect, until
from making import NO_SEGMENTS, make_post
from parts import until as eventually
from proxy import Proxy
from state import unchanged
from wire import Line

from storage import comments, errors, keys, posts
from storage.db import client
from storage.db.client import ENOUGH, Channel, Redis

WRITERS = 32


def written(server, post: str) -> dict[str, list[str]]:
    """The comments in a post's stream: text -> ids of all comments with this text."""
    ids: dict[str, list[str]] = {}
    for comment, fields in server.client.xrange(keys.comments(post)):
        ids.setdefault(fields["text"], []).append(comment)
    return ids


@asynccontextmanager
async def through(proxy):
    """A client of storage whose connections go through the proxy."""
    db = Redis(proxy.url)
    yield db
    await db.close()


@pytest.fixture
def server(real_server):
    real_server.client.flushall()
    return real_server


@pytest.fixture
def proxy(server):
    with Proxy(server.socket) as proxy:
        yield proxy


@pytest.fixture
async def post(server):
    db = connect(server)
    created = await make_post(db, "alice")
    await db.close()
    return created


@pytest.mark.parametrize("how", ["fin", "rst", "silence"])
@pytest.mark.one_redis  # a proxy stands before the server
async def test_after_a_lost_reply_no_write_is_doubled_and_no_caller_gets_a_wrong_answer(server, proxy, post, how):
    chance = random.Random(how)
    answers: dict[str, str] = {}  # text -> comment id, or the word of the refusal
    losses = 3 if how == "silence" else 40

    async def write(db, writer: int):
        number = 0
        while not done.is_set():
            text, number = f"{writer} {number}", number + 1
            try:
                answers[text] = (await comments.add(db, "bob", post, text))[0].id
            except errors.Refusal as refusal:
                answers[text] = refusal.word

    def successes() -> int:
        return sum(answer not in errors.REFUSALS for answer in answers.values())

    async with through(proxy) as db:
        done = asyncio.Event()
        writers = [asyncio.create_task(write(db, writer)) for writer in range(WRITERS)]
        for _ in range(losses):
            await asyncio.sleep(chance.random() * 0.01)  # so that replies are lost at different moments
            proxy.lose(after=chance.randrange(200), how=how)
            assert await asyncio.to_thread(proxy.lost.wait, 10)
            before = successes()
            await eventually(lambda before=before: successes() > before, "a write that succeeds after the loss")
        done.set()
        await asyncio.gather(*writers)
        after = (await comments.add(db, "bob", post, "after"))[0].id
        assert (await comments.page(db, NO_SEGMENTS, post, 1)).comments == [comments.Comment(after, "bob", "after")]

    stream = written(server, post)
    assert all(len(ids) == 1 for ids in stream.values())
    outcomes = Counter(answer if answer in errors.REFUSALS else "done" for answer in answers.values())
    assert set(outcomes) <= {"done", "UNKNOWN", "UNREACHABLE"}
    assert outcomes["UNKNOWN"] >= losses
    for text, answer in answers.items():
        if answer == "UNREACHABLE":
            assert text not in stream
        elif answer != "UNKNOWN":
            assert stream[text] == [answer]
    assert set(stream) <= {*answers, "after"}
    assert server.client.zscore("feed:{0}", post) == len(stream)


@pytest.mark.one_redis  # a proxy stands before the server
async def test_the_api_answers_unknown_when_the_reply_to_a_write_was_lost(server, proxy, post, tmp_path):
    site = Site(proxy.url, tmp_path)
    site.api()
    try:
        answers = {}

        async def write(writer: int):
            async with Line(site.port, site.token("bob")) as line:
                for number in range(20):
                    text = f"{writer} {number}"
                    answer = await line.ask("POST", f"/v1/posts/{post}/comments", {"text": text})
                    answers[text] = answer
                    if number % 4 == 0 and writer % 8 == 0:
                        proxy.lose()

        await asyncio.gather(*(write(writer) for writer in range(WRITERS)))
        stream = written(server, post)
        assert all(len(ids) == 1 for ids in stream.values())
        codes = Counter(answer.json().get("code", "done") for answer in answers.values())
        assert codes["unknown"] > 0 and codes["done"] > 0
        assert set(codes) <= {"unknown", "unreachable", "done"}
        for text, answer in answers.items():
            if answer.status == 201:
                assert stream[text] == [answer.json()["id"]]
            else:
                assert (answer.status, answer.headers["retry-after"]) == (503, "1")
                assert answer.json()["code"] == "unknown" or text not in stream
    finally:
        site.close()


async def test_a_script_that_redis_has_forgotten_is_sent_with_its_text_and_runs_once(server, post):
    db = connect(server)
    flushing = True

    async def forget():
        while flushing:
            await asyncio.to_thread(server.client.script_flush)

    async def write(writer: int) -> list[str]:
        return [(await comments.add(db, "bob", post, f"{writer} {number}"))[0].id for number in range(20)]

    forgetting = asyncio.create_task(forget())
    created = await asyncio.gather(*(write(writer) for writer in range(WRITERS)))
    flushing = False
    await forgetting
    stream = written(server, post)
    assert sorted(chain(*created)) == sorted(chain(*stream.values()))
    assert len(stream) == WRITERS * 20
    await db.close()


async def test_a_cancelled_caller_does_not_disturb_the_others(server, post):
    db = connect(server)
    for attempt in range(20):
        calls = [asyncio.create_task(comments.add(db, "bob", post, f"{attempt} {n}")) for n in range(WRITERS)]
        for _ in range(attempt % 5):
            await asyncio.sleep(0)
        for call in calls[::2]:
            call.cancel()
        added = await asyncio.gather(*calls[1::2])
        assert [comment.text for comment, _ in added] == [f"{attempt} {n}" for n in range(1, WRITERS, 2)]
        stream = written(server, post)
        assert all(stream[comment.text] == [comment.id] for comment, _ in added)
    await db.close()


async def test_an_argument_that_cannot_be_sent_fails_only_its_own_caller(server, post):
    db = connect(server)
    for nonsense in ("\ud83d", None, object()):
        calls = [comments.add(db, "bob", post, text) for text in ("one", nonsense, "other")]
        async with asyncio.timeout(5):
            one, error, other = await asyncio.gather(*calls, return_exceptions=True)
        assert (one[0].text, other[0].text) == ("one", "other")
        assert isinstance(error, Exception)
    await db.close()


@pytest.mark.one_redis  # a proxy stands before the server
async def test_many_callers_share_a_few_pipelines_which_keep_their_order(server, proxy, post):
    async with through(proxy) as db:
        first, _ = await comments.add(db, "bob", post, "now the connection is open and Redis knows the script")
        proxy.delay = 0.05
        began = time.monotonic()
        added = await asyncio.gather(*(comments.add(db, "bob", post, str(n)) for n in range(200)))
        assert time.monotonic() - began < 1  # a round trip takes 0.1 s
        assert [first.text, *(comment.text for comment, _ in added)] == list(written(server, post))


@pytest.mark.one_redis  # it is about one connection
async def test_a_second_pipeline_is_sent_before_the_first_is_answered_if_enough_commands_wait(server, monkeypatch):
    monkeypatch.setattr(client, "DEADLINE", 20)
    channel = Channel(server.url, lost=errors.Unknown, enough=ENOUGH)

    def unread() -> int | None:
        """Bytes that Redis has received, but not read, from the connection that blocks. None if none blocks."""
        blocked = [int(client["qbuf"]) for client in server.client.client_list() if "b" in client["flags"]]
        return blocked[0] if blocked else None

    async def wait_for(condition):
        await asyncio.to_thread(until, condition)

    first = channel.ask("BLPOP", "nothing", 0)
    await wait_for(lambda: unread() is not None)
    waiting = [channel.ask("ECHO", number) for number in range(ENOUGH - 1)]
    await asyncio.to_thread(server.client.ping)  # gives the event loop time to send
    assert unread() == 0
    waiting.append(channel.ask("ECHO", "the last one"))
    await wait_for(lambda: unread())
    after = channel.ask("ECHO", "after")
    server.client.rpush("nothing", "now")
    assert await first == ["nothing", "now"]
    assert await asyncio.gather(*waiting) == [*map(str, range(ENOUGH - 1)), "the last one"]
    assert await after == "after"
    await channel.close()


@pytest.mark.one_redis  # a proxy stands before the server
async def test_a_call_of_a_slow_redis_fails_after_a_second(server, proxy, post):
    async with through(proxy) as db:
        await comments.add(db, "bob", post, "now both connections are open")
        await posts.read(db, post)
        proxy.delay = 2.0
        for call, word in (
            (posts.read(db, post), "UNREACHABLE"),
            (comments.add(db, "b", post, "late"), "UNKNOWN"),
        ):
            began = time.monotonic()
            with pytest.raises(errors.Refusal) as refused:
                await call
            assert refused.value.word == word
            assert 0.9 < time.monotonic() - began < 1.3
        proxy.delay = 0.0
        assert (await posts.read(db, post)).id == post


# reason -> setting of Redis, the value with which Redis refuses writes, the usual value
REFUSING = {"memory is full": ("maxmemory", 1, 0), "too few replicas are connected": ("min-replicas-to-write", 9, 0)}


@pytest.mark.parametrize("reason", REFUSING)
async def test_a_write_that_redis_refuses_changes_nothing(server, post, reason):
    name, refusing, usual = REFUSING[reason]
    db = connect(server)
    comment = (await comments.add(db, "bob", post, "before"))[0]
    for each in server.primaries:
        each.config_set(name, refusing)
    try:
        with unchanged(server.client):
            for _ in range(2):
                with pytest.raises(errors.Unreachable):
                    await comments.add(db, "bob", post, "refused")
            assert (await comments.page(db, NO_SEGMENTS, post, 1)).comments == [comment]
        if reason == "memory is full":
            await comments.delete(db, NO_SEGMENTS, "bob", post, comment.id)  # allowed, because it frees memory
            assert (await posts.read(db, post)).comment_count == 0
    finally:
        for each in server.primaries:
            each.config_set(name, usual)
    await comments.add(db, "bob", post, "after")
    await db.close()


@pytest.fixture(params=["valkey", "redis"])
def own_server(request):
    server = RedisServer(request.param)
    yield server
    server.close()


def read_and_write(client, post: str):
    """Sends a read and a write. Yields the status, the code and the seconds of each answer."""
    for method, target, body in (
        ("GET", "/v1/posts", None),
        ("POST", f"/v1/posts/{post}/comments", {"text": "a"}),
    ):
        began = time.monotonic()
        answer = client.request(method, target, json=body)
        took = time.monotonic() - began
        if answer.status_code == 503:
            assert answer.headers["retry-after"] == "1"
            assert answer.headers["content-type"] == "application/problem+json"
        yield answer.status_code, answer.json().get("code"), took


def test_while_redis_is_down_the_api_answers_unreachable_within_a_second_and_then_recovers(own_server, tmp_path):
    site = Site(own_server.url, tmp_path)
    site.api()
    try:
        db = connect(own_server)

        async def make() -> str:
            created = await make_post(db, "alice")
            await db.close()
            return created

        post = asyncio.run(make())
        with site.client("bob") as client:
            for _ in range(3):
                assert [status for status, *_ in read_and_write(client, post)] == [200, 201]
                count = own_server.client.xlen(keys.comments(post))
                own_server.kill()
                for _ in range(3):
                    for status, code, seconds in read_and_write(client, post):
                        assert (status, code) == (503, "unreachable")
                        assert seconds < 1.1
                assert client.get("/readyz").status_code == 503
                assert client.get("/healthz").status_code == 200
                own_server.start()
                assert [status for status, *_ in read_and_write(client, post)] == [200, 201]
                assert own_server.client.xlen(keys.comments(post)) == count + 1
    finally:
        site.close()


def test_while_redis_hangs_the_api_answers_within_about_a_second_and_later_ignores_late_replies(own_server, tmp_path):
    site = Site(own_server.url, tmp_path)
    site.api()
    try:
        db = connect(own_server)

        async def make() -> str:
            created = await make_post(db, "alice")
            await db.close()
            return created

        post = asyncio.run(make())
        with site.client("bob") as client:
            assert [status for status, *_ in read_and_write(client, post)] == [200, 201]
            os.kill(own_server.process.pid, signal.SIGSTOP)
            try:
                read, write = read_and_write(client, post)
                assert read[:2] == (503, "unreachable") and write[:2] == (503, "unknown")
                assert read[2] < 1.5 and write[2] < 1.5
            finally:
                os.kill(own_server.process.pid, signal.SIGCONT)
            until(lambda: client.get("/readyz").status_code == 200)
            for number in range(5):
                added = client.post(f"/v1/posts/{post}/comments", json={"text": f"after {number}"})
                assert client.get(added.headers["Location"]).json() == added.json()
                latest = client.get(f"/v1/posts/{post}").json()["latest_comments"]
                assert latest[0]["text"] == f"after {number}"
            stream = written(own_server, post)
            assert all(len(stream[f"after {number}"]) == 1 for number in range(5))
            assert len(stream["a"]) in (1, 2)  # the write whose answer was lost may have happened
    finally:
        site.close()
