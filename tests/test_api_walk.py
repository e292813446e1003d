"""A walk through the feed while posts change returns every post that did not change exactly once."""

import asyncio
import random
from collections import Counter

import pytest
from conftest import connect, running_site
from making import NO_SEGMENTS, make_post
from wire import Line

from storage import comments, errors
from storage import posts as storage_posts
from storage.settings import PAGE_BYTES

POSTS = 2000
TIED = 1500  # posts without a comment: only their ids order them


async def fill(db, partitions: int) -> list[str]:
    """Makes 2,000 posts, of which 1,500 have no comment and the others have 1 to 20. Returns their ids."""
    made = []
    for start in range(0, POSTS, 100):
        made += await asyncio.gather(*(make_post(db, f"user{start + n}", partitions) for n in range(100)))
    chance = random.Random(partitions)
    counts = {post: chance.randint(1, 20) for post in chance.sample(made, POSTS - TIED)}
    for number in range(20):
        some = [post for post, count in counts.items() if count > number]
        await asyncio.gather(*(comments.add(db, "bob", post, str(number)) for post in some))
    return made


async def change(db, store, moving: list[str], partitions: int, changed: Counter) -> None:
    """Adds and deletes comments and posts until it is cancelled. `moving` are the posts that may change."""
    chance = random.Random(7)
    added: dict[str, list[str]] = {}
    while True:
        post, what = chance.choice(moving), chance.random()
        try:
            if what < 0.7:
                comment, _ = await comments.add(db, "carol", post, "moves")
                added.setdefault(post, []).append(comment.id)
            elif what < 0.95 and added.get(post):
                await comments.delete(db, NO_SEGMENTS, "carol", post, added[post].pop())
            elif what < 0.97:
                author = (await storage_posts.read(db, post)).author
                await storage_posts.delete(db, store, author, post)
            else:
                moving.append(await make_post(db, f"new{chance.random()}", partitions))
            changed[post] += 1
        except errors.NoPost:
            moving.remove(post)


async def walk(site, limit: int) -> list[tuple[str, int]]:
    """Walks through the feed over one HTTP connection. Returns (id, number of comments) of every post."""
    found, cursor = [], ""
    async with Line(site.port) as line:
        while True:
            answer = await line.ask("GET", f"/v1/posts?limit={limit}{cursor}")
            assert answer.status == 200
            page = answer.json()
            assert len(page["items"]) == limit or not page["next"]
            found += [(item["id"], item["comment_count"]) for item in page["items"]]
            if not page["next"]:
                return found
            cursor = f"&cursor={page['next']}"
            assert f'</v1/posts?limit={limit}{cursor}>; rel="next"' in answer.headers["link"]


@pytest.mark.parametrize("partitions", [1, 3])
async def test_every_post_that_did_not_change_is_returned_exactly_once(real_server, tmp_path, store, partitions):
    real_server.client.flushall()
    db = connect(real_server)
    with running_site(real_server, tmp_path, partitions=partitions) as site:
        made = await fill(db, partitions)
        if partitions > 1:
            assert len({post.rpartition("-")[2] for post in made}) == partitions
        moving = random.Random(1).sample(made, 300)
        still = set(made) - set(moving)
        counted = {row.id: row.comment_count for row in await read_feed(db, partitions)}
        order = sorted(still, key=lambda post: (counted[post], post), reverse=True)
        for limit in (1, 7, 100):
            changed = Counter()
            changing = asyncio.create_task(change(db, store, moving, partitions, changed))
            found = await walk(site, limit)
            changing.cancel()
            assert not changing.done(), changing.exception()
            await asyncio.gather(changing, return_exceptions=True)
            assert changed, "posts changed during the walk"
            returned = Counter(post for post, _ in found)
            assert {post: returned[post] for post in still} == dict.fromkeys(still, 1)
            assert [post for post, _ in found if post in still] == order
            places = [(count, post) for post, count in found]
            assert places == sorted(places, reverse=True)
    await db.close()


async def read_feed(db, partitions: int) -> list[storage_posts.Post]:
    rows, after = [], None
    while True:
        page = await storage_posts.feed(db, partitions, 100, after)
        rows += page.posts
        if not page.more:
            return rows
        ranks = storage_posts.ranks_behind(page.ranks, page.posts)
        after = storage_posts.FeedCursor(rows[-1].comment_count, rows[-1].id, ranks)


async def test_a_page_is_whole_also_if_its_posts_are_all_of_one_partition(server, db):
    made = [await make_post(db, "alice", 16) for _ in range(40)]
    await asyncio.gather(*(comments.add(db, "bob", post, "x") for post in made))
    others = [await make_post(db, f"user{n}", 16) for n in range(40)]
    assert len({post.rpartition("-")[2] for post in others}) > 8
    order = sorted(made, reverse=True) + sorted(others, reverse=True)
    for limit in (1, 7, 25, 100):
        page = await storage_posts.feed(db, 16, limit)
        assert [row.id for row in page.posts] == order[:limit]
        assert page.more == (limit < len(order)) and len(page.seen) == 16


@pytest.mark.parametrize("character", ["/", "\x7f", "\0", "é", "😀"])
async def test_pages_that_end_because_of_their_bytes_skip_no_post_of_any_partition(server, tmp_path, character):
    """The comments are so long that the answer of one partition ends before its limit, and another's does not."""
    db = connect(server)
    made = [await make_post(db, f"user{n}", 3) for n in range(90)]
    for number, post in enumerate(sorted(made)):
        long = post.endswith("-1")
        for _ in range(2 if long or number % 2 else 1):
            await comments.add(db, "bob", post, character * 2200 if long else "short")
    found = [row.id for row in await read_feed(db, 3)]
    assert sorted(found) == sorted(made)
    await db.close()
    if server.kind == "fake":
        return
    with running_site(server, tmp_path, partitions=3) as site:
        async with Line(site.port) as line:
            walked, cursor = [], ""
            while cursor is not None:
                answer = await line.ask("GET", f"/v1/posts?limit=100{cursor}")
                assert len(answer.body) < PAGE_BYTES + 64 * 1024
                walked += [item["id"] for item in answer.json()["items"]]
                cursor = answer.json()["next"] and f"&cursor={answer.json()['next']}"
    assert walked == found


@pytest.mark.parametrize("character", ["/", "\x7f", "\0", "é", "😀"])
async def test_a_walk_through_long_comments_returns_each_exactly_once_while_others_are_added_and_deleted(
    real_server, site, character
):
    db = connect(real_server)
    post = await make_post(db, "alice")
    left = [(await comments.add(db, "bob", post, character * (2200 - n)))[0] for n in range(250)]
    async with Line(site.port) as line:
        for limit in (3, 100):
            walked, cursor = [], ""
            while cursor is not None:
                answer = await line.ask("GET", f"/v1/posts/{post}/comments?limit={limit}{cursor}")
                assert len(answer.body) < PAGE_BYTES + 64 * 1024
                walked += [(item["id"], item["text"]) for item in answer.json()["items"]]
                cursor = answer.json()["next"] and f"&cursor={answer.json()['next']}"
                await comments.add(db, "carol", post, "newer")
                await comments.delete(db, NO_SEGMENTS, "bob", post, walked[-1][0])  # the comment of the cursor
                left = [comment for comment in left if comment.id != walked[-1][0]]
            ids = {comment.id for comment in left}
            assert [row for row in walked if row[0] in ids] == [
                (comment.id, comment.text) for comment in left[::-1]
            ]
    await db.close()
