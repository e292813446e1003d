"""Fifty clients add and delete comments on five posts at once, over two API processes."""

import asyncio
import json
import random

from conftest import Site, connect
from making import make_post
from wire import Line

from storage import keys

CLIENTS, ROUNDS, POSTS = 50, 24, 5


async def busy(site, posts: list[str], number: int, mine: dict[str, set[str]]) -> None:
    """Adds comments, and deletes some of its own; keeps in `mine` those that are there, by post."""
    chance = random.Random(number)
    async with Line(site.port, site.token(f"user{number}")) as line:
        for step in range(ROUNDS):
            post = chance.choice(posts)
            if mine[post] and chance.random() < 0.4:
                comment = mine[post].pop()
                answer = await line.ask("DELETE", f"/v1/posts/{post}/comments/{comment}")
                assert (answer.status, answer.body) == (204, b"")
                continue
            answer = await line.ask("POST", f"/v1/posts/{post}/comments", {"text": f"{number} {step}"})
            assert answer.status == 201
            mine[post].add(answer.json()["id"])
            if step % 5 == 0:
                seen = (await line.ask("GET", f"/v1/posts/{post}/comments?limit=100")).json()["items"]
                # Nobody else deletes it, and what was answered is seen from then on.
                ids = [comment["id"] for comment in seen]
                assert answer.json()["id"] in ids or len(ids) == 100
                assert ids == sorted(ids, key=order, reverse=True)


def order(comment: str) -> tuple[int, int]:
    ms, _, sequence = comment.partition("-")
    return int(ms), int(sequence)


async def test_after_all_that_every_count_is_the_streams_length_and_the_two_latest_are_right(
    real_server, tmp_path
):
    real_server.client.flushall()
    site = Site(real_server.url, tmp_path, workers=2)
    await asyncio.to_thread(site.api)
    try:
        db = connect(real_server)
        posts = [await make_post(db, f"author{n}") for n in range(POSTS)]
        await db.close()
        kept = [{post: set() for post in posts} for _ in range(CLIENTS)]
        await asyncio.gather(*(busy(site, posts, number, kept[number]) for number in range(CLIENTS)))

        client = real_server.client
        expected = {post: sorted(set().union(*(mine[post] for mine in kept)), key=order) for post in posts}
        for post in posts:
            stream = client.xrange(keys.comments(post))
            assert [id for id, _ in stream] == expected[post]
            assert client.zscore(keys.feed(0), post) == client.xlen(keys.comments(post)) == len(stream)
            rows = [[id, fields["author"], fields["text"]] for id, fields in stream[:-3:-1]]
            assert [json.loads(entry) for entry in client.lrange(keys.latest(post), 0, -1)] == rows
        in_order = sorted(posts, key=lambda post: (len(expected[post]), post), reverse=True)
        heard = set()
        for _ in range(12):  # each on a connection of its own, so that both processes answer
            async with Line(site.port) as line:
                feed = await line.ask("GET", "/v1/posts?limit=100")
                heard.add(feed.body)
                for item in feed.json()["items"]:
                    assert (await line.ask("GET", f"/v1/posts/{item['id']}")).json() == item
        assert len(heard) == 1
        items = feed.json()["items"]
        assert [item["id"] for item in items] == in_order
        for item in items:
            assert item["comment_count"] == len(expected[item["id"]])
            assert [comment["id"] for comment in item["latest_comments"]] == expected[item["id"]][:-3:-1]
    finally:
        site.close()
