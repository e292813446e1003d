"""Nothing is sent to Redis twice, and whoever asks is told the truth within a second: done, not done, or unknown."""

import asyncio
import os
import random
import signal
import time
from collections import Counter
from contextlib import asynccontextmanager

import pytest
from conftest import RedisServer, Site, connect, until
from making import make_post
from proxy import Proxy
from state import unchanged
from wire import Line

from storage import comments, errors, keys, posts
from storage.db import client
from storage.db.client import ENOUGH, Channel, Redis

WRITERS = 32


def written(server, post: str) -> dict[str, list[str]]:
    """The ids under which each text stands in a post's stream."""
    found: dict[str, list[str]] = {}
    for id, fields in server.client.xrange(keys.comments(post)):
        found.setdefault(fields["text"], []).append(id)
    return found


@asynccontextmanager
async def through(proxy):
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
    made = await make_post(db, "alice")
    await db.close()
    return made


@pytest.mark.parametrize("how", ["fin", "rst", "silence"])
async def test_a_lost_reply_doubles_nothing_and_nobody_is_told_wrong(server, proxy, post, how):
    chance = random.Random(how)
    told: dict[str, str] = {}  # text -> comment id, or the word of the refusal
    losses = 3 if how == "silence" else 40

    async def write(db, writer: int):
        number = 0
        while not done.is_set():
            text, number = f"{writer} {number}", number + 1
            try:
                told[text] = (await comments.add(db, "bob", post, text))[0].id
            except errors.Refusal as refusal:
                told[text] = refusal.word

    async with through(proxy) as db:
        done = asyncio.Event()
        writers = [asyncio.create_task(write(db, writer)) for writer in range(WRITERS)]
        for _ in range(losses):
            await asyncio.sleep(chance.random() * 0.01)
            proxy.lose(after=chance.randrange(200), how=how)
            assert await asyncio.to_thread(proxy.lost.wait, 10)
        await asyncio.sleep(0.05 if how != "silence" else 1.2)
        done.set()
        await asyncio.gather(*writers)
        after = (await comments.add(db, "bob", post, "after"))[0].id
        assert (await comments.page(db, post, 1)).comments == [comments.Comment(after, "bob", "after")]

    stream = written(server, post)
    assert all(len(ids) == 1 for ids in stream.values())
    outcomes = Counter(word if word in errors.REFUSALS else "done" for word in told.values())
    assert set(outcomes) <= {"done", "UNKNOWN", "UNREACHABLE"}
    assert outcomes["UNKNOWN"] >= losses and outcomes["done"] > 100
    for text, word in told.items():
        if word == "UNREACHABLE":
            assert text not in stream
        elif word != "UNKNOWN":
            assert stream[text] == [word]
    assert set(stream) <= {*told, "after"}
    assert server.client.zscore("feed:{0}", post) == len(stream)


async def test_a_client_of_the_api_hears_unknown_when_the_answer_was_lost(server, proxy, post, tmp_path):
    site = Site(proxy.url, tmp_path)
    site.api()
    try:
        told = {}

        async def write(writer: int):
            async with Line(site.port, site.token("bob")) as line:
                for number in range(20):
                    text = f"{writer} {number}"
                    answer = await line.ask("POST", f"/v1/posts/{post}/comments", {"text": text})
                    told[text] = answer
                    if number % 4 == 0 and writer % 8 == 0:
                        proxy.lose()

        await asyncio.gather(*(write(writer) for writer in range(WRITERS)))
        stream = written(server, post)
        assert all(len(ids) == 1 for ids in stream.values())
        codes = Counter(answer.json().get("code", "done") for answer in told.values())
        assert (
            codes["unknown"] > 0 and codes["done"] > 100 and set(codes) <= {"unknown", "unreachable", "done"}
        )
        for text, answer in told.items():
            if answer.status == 201:
                assert stream[text] == [answer.json()["id"]]
            else:
                assert (answer.status, answer.headers["retry-after"]) == (503, "1")
                assert answer.json()["code"] == "unknown" or text not in stream
    finally:
        site.close()


async def test_scripts_that_redis_forgot_are_sent_again_and_run_once(server, post):
    db = connect(server)
    flushing = True

    async def forget():
        while flushing:
            await asyncio.to_thread(server.client.script_flush)

    async def write(writer: int) -> list[str]:
        return [(await comments.add(db, "bob", post, f"{writer} {number}"))[0].id for number in range(20)]

    forgetting = asyncio.create_task(forget())
    made = await asyncio.gather(*(write(writer) for writer in range(WRITERS)))
    flushing = False
    await forgetting
    assert sorted(id for ids in made for id in ids) == sorted(
        id for ids in written(server, post).values() for id in ids
    )
    assert len(written(server, post)) == WRITERS * 20
    await db.close()


async def test_a_caller_that_leaves_harms_no_other(server, post):
    db = connect(server)
    for attempt in range(20):
        calls = [asyncio.create_task(comments.add(db, "bob", post, f"{attempt} {n}")) for n in range(WRITERS)]
        for _ in range(attempt % 5):
            await asyncio.sleep(0)
        for call in calls[::2]:
            call.cancel()
        stayed = await asyncio.gather(*calls[1::2])
        assert [comment.text for comment, _ in stayed] == [f"{attempt} {n}" for n in range(1, WRITERS, 2)]
        stream = written(server, post)
        assert all(stream[comment.text] == [comment.id] for comment, _ in stayed)
    await db.close()


async def test_a_caller_that_asks_nonsense_harms_no_other(server, post):
    db = connect(server)
    for nonsense in ("\ud83d", None, object()):
        calls = [comments.add(db, "bob", post, text) for text in ("one", nonsense, "other")]
        async with asyncio.timeout(5):
            one, error, other = await asyncio.gather(*calls, return_exceptions=True)
        assert (one[0].text, other[0].text) == ("one", "other")
        assert isinstance(error, Exception)
    await db.close()


async def test_many_callers_share_few_pipelines_in_order(server, proxy, post):
    async with through(proxy) as db:
        first, _ = await comments.add(db, "bob", post, "the connection stands, the script is known")
        proxy.delay = 0.05
        began = time.monotonic()
        made = await asyncio.gather(*(comments.add(db, "bob", post, str(n)) for n in range(200)))
        assert time.monotonic() - began < 1  # a round trip takes 0.1 s
        assert [first.text, *(comment.text for comment, _ in made)] == list(written(server, post))


async def test_what_waits_leaves_behind_a_pipeline_under_way_once_it_is_enough(server, monkeypatch):
    monkeypatch.setattr(client, "DEADLINE", 20)
    channel = Channel(server.url, lost=errors.Unknown, enough=ENOUGH)

    def unread() -> int | None:
        """Bytes that Redis has of a connection whose command blocks; None when no connection is blocked."""
        blocked = [int(client["qbuf"]) for client in server.client.client_list() if "b" in client["flags"]]
        return blocked[0] if blocked else None

    async def comes(condition):
        await asyncio.to_thread(until, condition)

    first = channel.ask("BLPOP", "nothing", 0)
    await comes(lambda: unread() is not None)
    waiting = [channel.ask("ECHO", number) for number in range(ENOUGH - 1)]
    await asyncio.to_thread(server.client.ping)  # the loop goes round
    assert unread() == 0
    waiting.append(channel.ask("ECHO", "the last one"))
    await comes(lambda: unread())
    after = channel.ask("ECHO", "after")
    server.client.rpush("nothing", "now")
    assert await first == ["nothing", "now"]
    assert await asyncio.gather(*waiting) == [*map(str, range(ENOUGH - 1)), "the last one"]
    assert await after == "after"
    await channel.close()


async def test_a_slow_redis_is_given_up_after_a_second(server, proxy, post):
    async with through(proxy) as db:
        await comments.add(db, "bob", post, "both connections stand")
        await posts.read(db, post)
        proxy.delay = 2.0
        for ask, word in (
            (posts.read(db, post), "UNREACHABLE"),
            (comments.add(db, "b", post, "late"), "UNKNOWN"),
        ):
            began = time.monotonic()
            with pytest.raises(errors.Refusal) as refused:
                await ask
            assert refused.value.word == word
            assert 0.9 < time.monotonic() - began < 1.3
        proxy.delay = 0.0
        assert (await posts.read(db, post)).id == post


REFUSING = {"memory is full": ("maxmemory", 1, 0), "no replica is there": ("min-replicas-to-write", 1, 0)}


@pytest.mark.parametrize("why", REFUSING)
async def test_a_redis_that_refuses_to_write_has_not_written(server, post, why):
    name, refusing, usual = REFUSING[why]
    db = connect(server)
    comment = (await comments.add(db, "bob", post, "before"))[0]
    server.client.config_set(name, refusing)
    try:
        with unchanged(server.client):
            for _ in range(2):
                with pytest.raises(errors.Unreachable):
                    await comments.add(db, "bob", post, "refused")
            assert (await comments.page(db, post, 1)).comments == [comment]
        if why == "memory is full":
            await comments.delete(db, "bob", post, comment.id)  # deleting makes room
            assert (await posts.read(db, post)).comment_count == 0
    finally:
        server.client.config_set(name, usual)
    await comments.add(db, "bob", post, "after")
    await db.close()


@pytest.fixture(params=["valkey", "redis"])
def own_server(request):
    server = RedisServer(request.param)
    yield server
    server.close()


def asked(client, post: str):
    """(status, code, seconds) of a read and of a write."""
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


def test_the_api_says_so_within_a_second_when_redis_is_killed_and_heals_when_it_is_back(own_server, tmp_path):
    site = Site(own_server.url, tmp_path)
    site.api()
    try:
        db = connect(own_server)

        async def make() -> str:
            made = await make_post(db, "alice")
            await db.close()
            return made

        post = asyncio.run(make())
        with site.client("bob") as client:
            for _ in range(3):
                assert [status for status, *_ in asked(client, post)] == [200, 201]
                count = own_server.client.xlen(keys.comments(post))
                own_server.kill()
                for _ in range(3):
                    for status, code, seconds in asked(client, post):
                        assert (status, code) == (503, "unreachable")
                        assert seconds < 1.1
                assert client.get("/readyz").status_code == 503
                assert client.get("/healthz").status_code == 200
                own_server.start()
                assert [status for status, *_ in asked(client, post)] == [200, 201]
                assert own_server.client.xlen(keys.comments(post)) == count + 1
    finally:
        site.close()


def test_the_api_answers_within_about_a_second_when_redis_hangs_and_mistakes_no_late_reply(
    own_server, tmp_path
):
    site = Site(own_server.url, tmp_path)
    site.api()
    try:
        db = connect(own_server)

        async def make() -> str:
            made = await make_post(db, "alice")
            await db.close()
            return made

        post = asyncio.run(make())
        with site.client("bob") as client:
            assert [status for status, *_ in asked(client, post)] == [200, 201]
            os.kill(own_server.process.pid, signal.SIGSTOP)
            try:
                (read, code, took), (write, doubt, wrote) = asked(client, post)
                assert (read, code, write, doubt) == (503, "unreachable", 503, "unknown")
                assert took < 1.5 and wrote < 1.5
            finally:
                os.kill(own_server.process.pid, signal.SIGCONT)
            until(lambda: client.get("/readyz").status_code == 200)
            for number in range(5):
                made = client.post(f"/v1/posts/{post}/comments", json={"text": f"after {number}"})
                assert client.get(made.headers["Location"]).json() == made.json()
                assert (
                    client.get(f"/v1/posts/{post}").json()["latest_comments"][0]["text"] == f"after {number}"
                )
            stream = written(own_server, post)
            assert all(len(stream[f"after {number}"]) == 1 for number in range(5))
            assert len(stream["a"]) in (1, 2)  # the one of which nobody heard
    finally:
        site.close()
