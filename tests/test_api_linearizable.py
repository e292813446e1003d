"""With one partition, what was answered before a question began is in its answer, whichever process gives it."""

import asyncio
import random
import time
from collections import Counter

import pytest
from conftest import Site, connect
from making import make_post
from proxy import Proxy
from wire import Line

WRITERS, READERS, POSTS, SECONDS = 8, 24, 3, 4
VIEWS = ("feed", "post", "changes")


class History:
    """What is known of each post: comments whose writing began, and those that were answered."""

    def __init__(self):
        self.begun, self.answered, self.seen = Counter(), Counter(), Counter()  # seen: the most a finished read told


@pytest.fixture
def two(real_server, tmp_path):
    """Two API processes, each at a port of its own. One is far from Redis: its reads are long under way."""
    real_server.client.flushall()
    with Proxy(real_server.socket) as proxy:
        proxy.delay = 0.01
        sites = [Site(real_server.url, tmp_path), Site(proxy.url, tmp_path)]
        for site in sites:
            site.api()
        yield sites
        for site in sites:
            site.close()


async def write(site, posts: list[str], history: History, ends: float) -> None:
    async with Line(site.port, site.token("writer")) as line:
        while time.monotonic() < ends:
            post = random.choice(posts)
            history.begun[post] += 1
            answer = await line.ask("POST", f"/v1/posts/{post}/comments", {"text": "more"})
            assert answer.status == 201
            history.answered[post] += 1


async def read(site, posts: list[str], since: str, view: str, history: History, ends: float) -> int:
    asked = 0
    async with Line(site.port) as line:
        while time.monotonic() < ends:
            post = random.choice(posts)
            target = {
                "feed": "/v1/posts?limit=100",
                "post": f"/v1/posts/{post}",
                "changes": since,
            }[view]
            least = history.answered | history.seen
            body = (await line.ask("GET", target)).json()
            most = +history.begun
            asked += 1
            counts = {item["id"]: item["comment_count"] for item in (body["items"] if view != "post" else [body])}
            for post in posts if view == "feed" else counts.keys() & set(posts):
                assert least[post] <= counts[post] <= most[post], view
                history.seen[post] = max(history.seen[post], counts[post])
    return asked


async def follow(writer, reader, post: str, ends: float) -> int:
    """Write on one process and look for it on the other, in the newest comments."""
    asked = 0
    async with Line(writer.port, writer.token("follower")) as writing, Line(reader.port) as reading:
        while time.monotonic() < ends:
            made = (await writing.ask("POST", f"/v1/posts/{post}/comments", {"text": "mine"})).json()["id"]
            found = (await reading.ask("GET", f"/v1/posts/{post}/comments?limit=1")).json()["items"][0]["id"]
            assert tuple(map(int, found.split("-"))) >= tuple(map(int, made.split("-")))
            asked += 1
    return asked


async def test_no_answer_is_older_than_its_question(two, real_server):
    db = connect(real_server)
    posts = [await make_post(db, f"author{number}") for number in range(POSTS)]
    followed = await make_post(db, "followed")
    await db.close()
    async with Line(two[0].port) as line:
        links = (await line.ask("GET", "/v1/posts")).headers["link"]
    since = next(link for link in links.split(", ") if 'rel="changes"' in link).partition(">")[0].strip("<")
    history, ends = History(), time.monotonic() + SECONDS
    async with asyncio.TaskGroup() as tasks:
        for number in range(WRITERS):
            tasks.create_task(write(two[number % 2], posts, history, ends))
        reads = [
            tasks.create_task(read(two[number // 3 % 2], posts, since, VIEWS[number % 3], history, ends))
            for number in range(READERS)
        ]
        follows = [tasks.create_task(follow(two[n], two[1 - n], followed, ends)) for n in (0, 1)]
    assert all(task.result() > 20 for task in [*reads, *follows])
    assert min(history.answered[post] for post in posts) > 20
