"""Fifty clients add and delete comments on five posts at the same time, over two API processes."""

import asyncio
import json
import random

from conftest import connect, running_site
from making import make_post
from wire import Line

from storage import keys

CLIENTS, ROUNDS, POSTS = 50, 24, 5


async def comment_and_delete(site, posts: list[str], number: int, mine: dict[str, set[str]]) -> None:
    """Adds comments, and deletes some of them again. `mine` has the ids that are still there, by post."""
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
            added = answer.json()["id"]
            mine[post].add(added)
            if step % 5 == 0:
                page = (await line.ask("GET", f"/v1/posts/{post}/comments?limit=100")).json()["items"]
                # Nobody else deletes this comment. So it is on the page, unless 100 newer comments push it off.
                ids = [comment["id"] for comment in page]
                assert added in ids or (len(ids) == 100 and order(ids[-1]) > order(added))
                assert ids == sorted(ids, key=order, reverse=True)


def order(comment: str) -> tuple[int, int]:
    ms, _, sequence = comment.partition("-")
    return int(ms), int(sequence)


async def test_counts_and_latest_comments_are_right_after_concurrent_writes(real_server, tmp_path):
    real_server.client.flushall()
    with running_site(real_server, tmp_path, workers=2) as site:
        db = connect(real_server)
        posts = [await make_post(db, f"author{n}") for n in range(POSTS)]
        await db.close()
        left = [{post: set() for post in posts} for _ in range(CLIENTS)]
        clients = (comment_and_delete(site, posts, number, left[number]) for number in range(CLIENTS))
        await asyncio.gather(*clients)

        client = real_server.client
        expected = {post: sorted(set().union(*(mine[post] for mine in left)), key=order) for post in posts}
        for post in posts:
            stream = client.xrange(keys.comments(post))
            assert [comment for comment, _ in stream] == expected[post]
            assert client.zscore(keys.feed(0), post) == client.xlen(keys.comments(post)) == len(stream)
            rows = [[comment, fields["author"], fields["text"]] for comment, fields in stream[:-3:-1]]
            assert [json.loads(entry) for entry in client.lrange(keys.latest(post), 0, -1)] == rows
        in_order = sorted(posts, key=lambda post: (len(expected[post]), post), reverse=True)
        answers = set()
        for _ in range(12):  # new connections, so that most likely both processes answer
            async with Line(site.port) as line:
                feed = await line.ask("GET", "/v1/posts?limit=100")
                answers.add(feed.body)
                for item in feed.json()["items"]:
                    assert (await line.ask("GET", f"/v1/posts/{item['id']}")).json() == item
        assert len(answers) == 1
        items = feed.json()["items"]
        assert [item["id"] for item in items] == in_order
        for item in items:
            assert item["comment_count"] == len(expected[item["id"]])
            assert [comment["id"] for comment in item["latest_comments"]] == expected[item["id"]][:-3:-1]
