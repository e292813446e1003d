"""`Prefer: wait=N`: a request for a post or for changes is answered when there is news, or after N seconds."""

import asyncio
import contextlib
import signal
import time

import pytest
from conftest import NOBODY, connect, running_site, start_server
from making import make_post, make_processing
from redis.exceptions import ResponseError
from wire import Answer, Line, dial, head, hear, reset

from api.app import IDLE
from api.headers import MAX_WAIT, preferred_wait
from api.waiting import BATCH, PAUSE, Waiting
from storage import changes, comments, keys, outbox, posts
from storage.db.client import DEADLINE

HEARD = 0.2  # seconds within which a waiting client hears of a change, plus SLACK
SLACK = 1.0  # seconds for a machine that runs several tests at once. `make bench` measures without it


class Asker(Line):
    """A connection whose requests prefer to wait."""

    def __init__(self, port: int, seconds: int, *headers: str):
        super().__init__(port)
        self._headers = [f"Prefer: wait={seconds}", *headers]

    async def timed(self, target: str) -> tuple[Answer, float]:
        """The answer, and when it came (time.monotonic)."""
        answer = await self.ask("GET", target)
        return answer, time.monotonic()


@pytest.fixture(scope="module")
def shared_site(real_server, tmp_path_factory):
    """A site for all tests of this file, once on each server. It has no worker."""
    with running_site(real_server, tmp_path_factory.mktemp("site")) as site:
        yield site


@pytest.fixture
def site(shared_site):
    """The site, with an empty Redis."""
    shared_site.server.client.flushall()
    return shared_site


@pytest.fixture
async def db(site):
    db = connect(site.server)
    yield db
    await db.close()


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("", 0),
        ("wait=1", 1),
        ("WAIT = 25", 25),
        ("wait=26", 25),
        ("wait=99999999999", 25),
        ("wait=" + "9" * 5000, 25),
        ("wait=007", 7),
        ('wait="7"', 7),
        ("respond-async, wait=10", 10),
        ('a="x,wait=3";b="\\",", wait=10;c=d, wait=5', 10),
        (",, ,wait=3,", 3),
        ("wait=0", 0),
        ("wait=-1", 0),
        ("wait=1.5", 0),
        ("wait", 0),
        ("wait=", 0),
        ("wait=soon, wait=5", 0),
        ("wait=٣", 0),
        ("wait=5 6", 0),
        ('wait="5', 0),
        ("a b, wait=5", 0),
        ("await=5", 0),
    ],
)
def test_a_wait_is_a_whole_number_and_at_most_25_seconds_and_anything_else_is_ignored(header, seconds):
    assert preferred_wait(header) == seconds


# Waiting itself, on all servers


@pytest.fixture
async def local(server):
    """The table of those who wait in one process, and its client of Redis."""
    db = connect(server)
    yield Waiting(db, 1), db
    await db.close()


async def begun(table: Waiting, *subjects, seconds: float = 20) -> list[asyncio.Task]:
    """Tasks that wait for the subjects."""
    tasks = [asyncio.create_task(table.wait(subject, seconds)) for subject in subjects]
    await asyncio.sleep(0)
    assert len(table) == len(subjects)
    return tasks


async def test_who_waits_for_a_post_hears_that_it_is_ready_failed_or_deleted_and_others_wait_on(local, store):
    table, db = local
    ready, failed, deleted, other = [await make_processing(db, "alice") for _ in range(4)]
    waiting = await begun(table, ready, ready, failed, deleted, other)
    await outbox.publish(db, ready, "thumbhash")
    await asyncio.gather(*waiting[:2])
    await outbox.fail(db, failed, 0, "damaged", "it is damaged")
    await waiting[2]
    await posts.delete(db, store, "alice", deleted)
    await waiting[3]
    assert not waiting[4].done() and len(table) == 1
    waiting[4].cancel()
    await asyncio.gather(waiting[4], return_exceptions=True)
    assert len(table) == 0, "a wait that is cancelled is removed at once"


async def test_who_waits_for_changes_hears_of_them_and_of_a_new_timeline(local, server):
    table, db = local
    post = await make_post(db, "alice")
    seen = (await changes.since(db, 1, 1, None)).token.seen
    older = ((seen[0][0], seen[0][1] - 1),)
    await table.wait(older, 20)
    (first,) = await begun(table, seen)
    await comments.add(db, "bob", post, "news")
    await first
    (second,) = await begun(table, (await changes.since(db, 1, 1, None)).token.seen)
    server.client.set(keys.epoch(0), "abc")
    await second


async def test_a_change_in_a_partition_that_was_added_later_is_heard(server):
    db = connect(server)
    table, seen = Waiting(db, 3), (await changes.since(db, 1, 1, None)).token.seen
    (waiting,) = await begun(table, seen)
    await make_post(db, "user7", 3)
    await waiting
    await db.close()


async def test_a_wait_ends_after_its_seconds_and_then_nothing_is_asked_any_more(local, monkeypatch):
    table, db = local
    post = await make_processing(db, "alice")
    asked = recorded(monkeypatch)
    began = time.monotonic()
    await table.wait(post, 0.35)
    assert 0.3 < time.monotonic() - began < 0.35 + SLACK
    assert len(table) == 0 and 1 <= len(asked) <= 3
    await asyncio.sleep(2.5 * PAUSE)
    assert len(asked) <= 3


def recorded(monkeypatch) -> list[list[str]]:
    """The posts of each call of changes.poll from now on."""
    asked, poll = [], changes.poll

    async def noting(db, partition, wanted):
        asked.append(wanted)
        return await poll(db, partition, wanted)

    monkeypatch.setattr(changes, "poll", noting)
    return asked


async def test_many_posts_are_asked_for_in_several_calls_and_each_post_once(local, monkeypatch):
    table, _ = local
    wanted = [keys.new_post_id(0) for _ in range(BATCH + 1)]  # they do not exist, so the first answer wakes all
    asked = recorded(monkeypatch)
    await asyncio.gather(*await begun(table, *wanted, *wanted))
    assert [len(call) for call in asked] == [BATCH, 1]
    assert sorted(asked[0] + asked[1]) == sorted(wanted)


async def test_a_post_of_a_wrong_type_wakes_who_waits_for_it_and_nobody_else(local, server):
    table, db = local
    post, damaged = [await make_processing(db, "alice") for _ in range(2)]
    other, waiting = await begun(table, post, damaged)
    server.client.set(keys.post(damaged), "x")
    await waiting
    assert not other.done()
    other.cancel()


async def test_all_who_wait_get_the_error_if_the_revisions_cannot_be_read(local, server):
    table, db = local
    post = await make_processing(db, "alice")
    waiting = await begun(table, post, (("0", 0),))
    server.client.set(keys.changes(0), "x")
    assert [type(error) for error in await asyncio.gather(*waiting, return_exceptions=True)] == [ResponseError] * 2
    assert len(table) == 0


async def test_a_stop_ends_all_waits_and_a_later_wait_ends_at_once(local):
    table, db = local
    post = await make_processing(db, "alice")
    waiting = await begun(table, post, (("0", 0),))
    table.stop()
    await asyncio.gather(*waiting)
    await table.wait(post, 20)
    assert len(table) == 0


# Over HTTP


async def polled(site, times: int = 3) -> None:
    """Returns when somebody waits: then calls of scripts go on, although no request is sent."""
    first = calls(site)
    while calls(site) < first + times:
        await asyncio.sleep(0.01)


def calls(site) -> int:
    """How many calls of scripts Redis has got."""
    return site.server.client.info("commandstats").get("cmdstat_evalsha", {}).get("calls", 0)


@contextlib.asynccontextmanager
async def asking(port: int, count: int, target: str, seconds: int = 20, *headers: str):
    """Tasks of `count` clients that have sent a request. Each returns the answer, and when it came."""
    async with contextlib.AsyncExitStack() as stack:
        lines = [await stack.enter_async_context(Asker(port, seconds, *headers)) for _ in range(count)]
        tasks = [asyncio.create_task(line.timed(target)) for line in lines]
        yield tasks
        for task in tasks:
            task.cancel()


async def test_many_who_wait_for_one_post_hear_in_time_that_it_is_ready(site, db):
    post = await make_processing(db, "alice")
    async with asking(site.port, 200, f"/v1/posts/{post}") as tasks:
        await polled(site)
        assert not any(task.done() for task in tasks)
        await outbox.publish(db, post, "thumbhash")
        published = time.monotonic()
        for answer, when in await asyncio.gather(*tasks):
            assert (answer.status, answer.json()["status"]) == (200, "ready")
            assert answer.headers["preference-applied"] == "wait=20"
            assert answer.headers["vary"] == "Accept-Encoding, Prefer"
            assert when - published < HEARD + SLACK


async def test_changes_answer_when_there_is_one_and_without_one_after_the_time_with_no_items(site, db):
    post = await make_post(db, "alice")
    async with Asker(site.port, 1) as line:
        first = (await line.ask("GET", "/v1/changes")).json()
        began = time.monotonic()
        nothing, when = await line.timed(f"/v1/changes?since={first['next']}")
        assert (nothing.status, nothing.json()["items"], nothing.headers["preference-applied"]) == (200, [], "wait=1")
        assert 1 <= when - began < 1 + SLACK
    async with asking(site.port, 2, f"/v1/changes?since={first['next']}") as tasks:
        await polled(site)
        await comments.add(db, "bob", post, "news")
        changed = time.monotonic()
        for answer, when in await asyncio.gather(*tasks):
            assert [item["id"] for item in answer.json()["items"]] == [post]
            assert when - changed < HEARD + SLACK


async def test_what_is_known_already_is_answered_at_once(site, db):
    ready = await make_post(db, "alice")
    processing = await make_processing(db, "alice")
    began = time.monotonic()
    async with Asker(site.port, 20) as line:
        answers = [await line.ask("GET", path) for path in (f"/v1/posts/{ready}", "/v1/changes", "/v1/posts")]
        assert [answer.headers.get("preference-applied") for answer in answers] == ["wait=20", "wait=20", None]
        assert (await line.ask("GET", f"/v1/posts/{NOBODY}")).status == 404
        assert (await line.ask("GET", "/v1/changes?since=rubbish")).status == 410
    async with Line(site.port) as line:
        answer = await line.ask("GET", f"/v1/posts/{processing}")
        assert (answer.json()["status"], "preference-applied" in answer.headers) == ("processing", False)
    assert time.monotonic() - began < 5


async def test_a_client_that_knows_the_answer_gets_304_after_the_wait(site, db):
    post = await make_processing(db, "alice")
    async with Line(site.port) as line:
        etag = (await line.ask("GET", f"/v1/posts/{post}")).headers["etag"]
        since = (await line.ask("GET", "/v1/changes")).json()["next"]
        known = (await line.ask("GET", f"/v1/changes?since={since}")).headers["etag"]
    async with Asker(site.port, 1, f"If-None-Match: {etag}, {known}") as line:
        for target in (f"/v1/posts/{post}", f"/v1/changes?since={since}"):
            began = time.monotonic()
            answer, when = await line.timed(target)
            assert (answer.status, answer.headers["preference-applied"]) == (304, "wait=1") and when - began >= 1
    async with asking(site.port, 1, f"/v1/posts/{post}", 20, f"If-None-Match: {etag}") as tasks:
        await polled(site)
        await outbox.publish(db, post, "thumbhash")
        ((answer, _),) = await asyncio.gather(*tasks)
        assert (answer.status, answer.json()["status"]) == (200, "ready")


async def test_a_post_that_is_deleted_meanwhile_is_answered_404(site, db, store):
    post = await make_processing(db, "alice")
    async with asking(site.port, 3, f"/v1/posts/{post}") as tasks:
        await polled(site)
        await posts.delete(db, store, "alice", post)
        assert [answer.json()["code"] for answer, _ in await asyncio.gather(*tasks)] == ["nopost"] * 3


async def test_head_waits_too(site, db):
    post = await make_processing(db, "alice")
    with dial(site.port) as line:
        line.sendall(head("HEAD", f"/v1/posts/{post}", "Prefer: wait=20"))
        await polled(site)
        await outbox.publish(db, post, "thumbhash")
        answer = await asyncio.to_thread(hear, line, "HEAD")
    assert (answer.status, answer.headers["preference-applied"], answer.body) == (200, "wait=20", b"")
    assert "retry-after" not in answer.headers


async def test_clients_that_go_away_are_forgotten_at_once(site, db):
    """Half of them close their connection, half reset it. Redis is then asked no more."""
    post = await make_processing(db, "alice")
    since = str((await changes.since(db, 1, 1, None)).token)
    lines = [dial(site.port) for _ in range(20)]
    for number, line in enumerate(lines):
        target = f"/v1/posts/{post}" if number % 3 else f"/v1/changes?since={since}"
        line.sendall(head("GET", target, "Prefer: wait=20"))
    await polled(site)
    for number, line in enumerate(lines):
        reset(line) if number % 2 else line.close()
    await asyncio.sleep(2 * PAUSE)
    before = calls(site)
    await asyncio.sleep(3 * PAUSE)
    assert calls(site) == before


@pytest.fixture
def own_server(tmp_path):
    """A Redis that the test may kill."""
    server = start_server("valkey")
    yield server
    server.close()


async def test_redis_killed_meanwhile_is_503_at_once_and_after_its_restart_waiting_works(own_server, tmp_path):
    with running_site(own_server, tmp_path) as site:
        db = connect(own_server)
        post = await make_processing(db, "alice")
        since = str((await changes.since(db, 1, 1, None)).token)
        async with asking(site.port, 2, f"/v1/posts/{post}") as one, asking(
            site.port, 2, f"/v1/changes?since={since}"
        ) as other:
            await polled(site)
            own_server.kill()
            killed = time.monotonic()
            for answer, when in await asyncio.gather(*one, *other):
                assert (answer.status, answer.json()["code"]) == (503, "unreachable")
                assert when - killed < 1 + SLACK
        await asyncio.to_thread(own_server.start)
        async with asking(site.port, 1, f"/v1/posts/{post}") as one, asking(
            site.port, 1, f"/v1/changes?since={since}"
        ) as other:
            await polled(site)
            own_server.client.script_flush()
            own_server.client.set(keys.epoch(0), "abc")
            assert [answer.status for answer, _ in await asyncio.gather(*other)] == [410]
            failed = {"status": "failed", "code": "undecodable", "detail": "the image is damaged"}
            own_server.client.hset(keys.post(post), mapping=failed)
            assert [answer.json()["status"] for answer, _ in await asyncio.gather(*one)] == ["failed"]
        await db.close()


async def test_sigterm_answers_all_who_wait_in_both_processes_with_what_is_true(embedded, tmp_path):
    embedded.client.flushall()
    with running_site(embedded, tmp_path, workers=2) as site:
        db = connect(embedded)
        post = await make_processing(db, "alice")
        since = str((await changes.since(db, 1, 1, None)).token)
        async with asking(site.port, 20, f"/v1/posts/{post}") as one, asking(
            site.port, 20, f"/v1/changes?since={since}"
        ) as other:
            await polled(site, 10)
            began = time.monotonic()
            site.processes[0].send_signal(signal.SIGTERM)
            for answer, when in await asyncio.gather(*one):
                assert (answer.json()["status"], answer.headers["connection"]) == ("processing", "close")
                assert answer.headers["retry-after"] == "1" and when - began < SLACK
            for answer, when in await asyncio.gather(*other):
                assert answer.json()["items"] == [] and when - began < SLACK
        assert await asyncio.to_thread(site.processes[0].wait, 10) == 0
        assert time.monotonic() - began < 5
        await db.close()


def test_the_longest_wait_is_shorter_than_the_time_limit_of_a_connection():
    """The API closes a connection IDLE seconds after its last byte. Before and after the wait there is a read."""
    assert MAX_WAIT + 2 * DEADLINE + PAUSE < IDLE
