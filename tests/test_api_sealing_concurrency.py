"""Fifty clients add, delete and read comments on five posts while two workers seal and compact segments of 8.

`LONG=1` makes it twelve times as long.
"""

import asyncio
import itertools
import os
import random

import httpx
from conftest import connect, running_site, until
from making import make_post
from wire import Line

from storage import comments, keys
from storage.settings import LATEST_COMMENTS

CLIENTS, POSTS = 50, 5
ROUNDS = 200 if os.environ.get("LONG") else 16


async def walk(line, post: str, limit: int) -> list[str]:
    """The ids of all comments of a post by pages, newest first."""
    found, url = [], f"/v1/posts/{post}/comments?limit={limit}"
    while True:
        answer = await line.ask("GET", url)
        assert answer.status == 200
        page = answer.json()
        found += [comment["id"] for comment in page["items"]]
        if not page["next"]:
            return found
        url = f"/v1/posts/{post}/comments?limit={limit}&cursor={page['next']}"


async def comment_delete_and_walk(site, posts: list[str], number: int, mine: dict[str, list[str]]) -> None:
    """Adds comments, deletes old and new ones, and walks. `mine` has the ids that are still there, by post."""
    chance = random.Random(number)
    async with Line(site.port, site.token(f"user{number}")) as line:
        for step in range(ROUNDS):
            post = chance.choice(posts)
            if mine[post] and chance.random() < 0.4:
                comment = mine[post].pop(chance.choice([0, -1]))
                answer = await line.ask("DELETE", f"/v1/posts/{post}/comments/{comment}")
                assert (answer.status, answer.body) == (204, b"")
                continue
            answer = await line.ask("POST", f"/v1/posts/{post}/comments", {"text": f"{number} {step}"})
            assert answer.status == 201
            mine[post].append(answer.json()["id"])
            if step % 8 == 7:
                walked = await walk(line, post, chance.choice([20, 50]))
                assert walked == sorted(walked, key=keys.order, reverse=True) and len(walked) == len({*walked})
                assert {*mine[post]} <= {*walked}, "nobody else deletes these"


async def test_counts_order_and_walks_are_right_while_comments_move_to_the_store(embedded, tmp_path):
    embedded.client.flushall()
    with running_site(embedded, tmp_path, workers=2, converters=1, hot_comments=4) as site:
        site.processes[0].terminate()
        site.processes[0].wait()
        site.start("tests.small", "api")
        until(lambda: httpx.get(f"{site.url}/readyz").status_code == 200, what="the API")
        for _ in range(2):
            site.start("tests.small", "workers")
        client, db = embedded.client, connect(embedded)
        posts = [await make_post(db, f"author{n}") for n in range(POSTS)]
        left = [{post: [] for post in posts} for _ in range(CLIENTS)]
        for number, post in itertools.product(range(CLIENTS), posts):
            comment, _ = await comments.add(db, f"user{number}", post, "the first", seal_at=4 + 8)
            left[number][post].append(comment.id)
        await db.close()
        until(lambda: all(client.llen(keys.segments(post)) > 3 for post in posts), what="the workers")
        async with Line(site.port) as line:
            clients = (comment_delete_and_walk(site, posts, number, left[number]) for number in range(CLIENTS))
            await asyncio.gather(*clients)
            until(lambda: not client.exists(keys.sealing(0)), what="the end of all sealing")
            assert client.exists(keys.retired(0)), "segments were compacted"
            for post in posts:
                expected = sorted(sum((mine[post] for mine in left), []), key=keys.order, reverse=True)
                assert await walk(line, post, 7) == await walk(line, post, 100) == expected
                assert client.xlen(keys.comments(post)) < 4 + 8 and not client.exists(keys.erased(post))
                shown = (await line.ask("GET", f"/v1/posts/{post}")).json()
                assert shown["comment_count"] == len(expected) == client.zscore(keys.feed(0), post)
                assert [one["id"] for one in shown["latest_comments"]] == expected[:LATEST_COMMENTS]
