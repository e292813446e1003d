"""With one partition, an answer shows everything that was answered before its request was sent, by any process."""

import asyncio
import random
import time
from collections import Counter

import pytest
from conftest import CLUSTER, connect, running_site
from making import make_post
from proxy import Proxy
from wire import Line

WRITERS, READERS, POSTS = 8, 24, 3
SECONDS = 4  # the least time that they run
ROUNDS = 20  # the least that each of them does, however slow the machine is
PATIENCE = 60  # seconds in which a slow machine must do that
FAR = 0.04  # seconds for a round trip to Redis from the second process
VIEWS = ("feed", "post", "changes")


class History:
    """By post: how many comments were begun, answered and read. By task: how many rounds it did."""

    def __init__(self):
        self.begun, self.answered = Counter(), Counter()
        self.seen = Counter()  # by post: the highest count that a finished read returned
        self.done = Counter()  # by reader, follower and written post: rounds
        self.ended = False


@pytest.fixture
def two(real_server, tmp_path):
    """Two API processes, each on a port of its own. The second is far from Redis, so its reads take long.

    On a Cluster both are near: its nodes name their own addresses, so clients go past a proxy.
    """
    real_server.client.flushall()
    with (
        Proxy(real_server.nodes[0].socket) as proxy,
        running_site(real_server, tmp_path) as near,
        running_site(real_server, tmp_path, redis_url="" if CLUSTER else proxy.url) as far,
    ):
        proxy.delay = FAR / 2
        yield near, far


async def write(site, posts: list[str], history: History) -> None:
    async with Line(site.port, site.token("writer")) as line:
        while not history.ended:
            post = random.choice(posts)
            history.begun[post] += 1
            answer = await line.ask("POST", f"/v1/posts/{post}/comments", {"text": "more"})
            assert answer.status == 201
            history.answered[post] += 1
            history.done[post] += 1


async def read(site, posts: list[str], since: str, view: str, history: History, name: str) -> None:
    async with Line(site.port) as line:
        while not history.ended:
            post = random.choice(posts)
            target = {
                "feed": "/v1/posts?limit=100",
                "post": f"/v1/posts/{post}",
                "changes": since,
            }[view]
            least = history.answered | history.seen
            body = (await line.ask("GET", target)).json()
            most = +history.begun
            counts = {item["id"]: item["comment_count"] for item in (body["items"] if view != "post" else [body])}
            for post in posts if view == "feed" else counts.keys() & set(posts):
                assert least[post] <= counts[post] <= most[post], view
                history.seen[post] = max(history.seen[post], counts[post])
            history.done[name] += 1
            # Without a pause the readers would ask in step, all at the begin of a shared read. An answer would be too
            # old only for a reader that asks while a read is under way.
            await asyncio.sleep(random.random() * FAR)


async def follow(writer, reader, post: str, history: History, name: str) -> None:
    """Adds a comment by one process, and expects it as the newest comment that the other process returns."""
    async with Line(writer.port, writer.token("follower")) as writing, Line(reader.port) as reading:
        while not history.ended:
            added = (await writing.ask("POST", f"/v1/posts/{post}/comments", {"text": "mine"})).json()["id"]
            newest = (await reading.ask("GET", f"/v1/posts/{post}/comments?limit=1")).json()["items"][0]["id"]
            assert tuple(map(int, newest.split("-"))) >= tuple(map(int, added.split("-")))
            history.done[name] += 1


async def test_no_answer_is_older_than_its_request(two, real_server):
    db = connect(real_server)
    posts = [await make_post(db, f"author{number}") for number in range(POSTS)]
    followed = await make_post(db, "followed")
    await db.close()
    async with Line(two[0].port) as line:
        links = (await line.ask("GET", "/v1/posts")).headers["link"]
    since = next(link for link in links.split(", ") if 'rel="changes"' in link).partition(">")[0].strip("<")
    history = History()
    readers = {f"reader {number}": VIEWS[number % 3] for number in range(READERS)}
    async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as tasks:
        for number in range(WRITERS):
            tasks.create_task(write(two[number % 2], posts, history))
        for number, (name, view) in enumerate(readers.items()):
            tasks.create_task(read(two[number // 3 % 2], posts, since, view, history, name))
        for number in (0, 1):
            tasks.create_task(follow(two[number], two[1 - number], followed, history, f"follower {number}"))
        everyone = [*posts, *readers, "follower 0", "follower 1"]
        began = time.monotonic()
        while time.monotonic() - began < SECONDS or min(history.done[one] for one in everyone) < ROUNDS:
            await asyncio.sleep(0.05)
        history.ended = True
