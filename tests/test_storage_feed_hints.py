"""A cursor of the feed has the ranks of its place as a hint. A hint that is wrong changes nothing but the time."""

import pytest

from storage import posts
from storage.posts import FeedCursor

COUNTS = (0, 0, 0, 1, 1, 1, 1, 2, 2, 5)  # comments of the posts
HINTS = (*range(len(COUNTS) + 3), 1000, 2**32 - 1)


def post_id(number: int, partition: int = 0) -> str:
    return f"{number:026}-{partition}"


def write_feed(client, counts: dict[str, int]) -> None:
    """Posts with so many comments each, as the feed shows them."""
    with client.pipeline(transaction=False) as pipeline:
        for post, count in counts.items():
            tag = f"{{{post.partition('-')[2]}}}"
            pipeline.hset(f"post:{tag}:{post}", mapping={"author": "alice", "caption": "", "thumbhash": ""})
            pipeline.zadd(f"feed:{tag}", {post: count})
        pipeline.execute()


@pytest.mark.parametrize("partitions", [1, 3])
async def test_a_page_behind_any_place_is_the_same_with_every_hint(server, db, partitions):
    # The even numbers are posts. So there are cursors at places of posts, and between them.
    counts = {post_id(2 * n, n % partitions): count for n, count in enumerate(COUNTS)}
    write_feed(server.client, counts)
    order = sorted(((count, post) for post, count in counts.items()), reverse=True)
    places = [(count, post_id(number, number // 2 % partitions)) for count in range(4) for number in range(22)]
    for number, (count, post) in enumerate(places):
        following = [place for place in order if place < (count, post)]
        starts = tuple(
            sum(place >= (count, post) and place[1].endswith(f"-{partition}") for place in order)
            for partition in range(partitions)
        )
        # Partitions that were added later have no rank yet.
        few = HINTS[number % 3 :: 3]
        for ranks in [(), (1,) * (partitions - 1), starts, *((hint,) * partitions for hint in few)]:
            limit = (1, 3, 100)[number % 3]
            page = await posts.feed(db, partitions, limit, FeedCursor(count, post, ranks))
            assert [(row.comment_count, row.id) for row in page.posts] == following[:limit], (ranks, limit)
            assert page.more == (len(following) > limit)
            assert page.ranks == starts


async def test_the_ranks_behind_a_page_are_those_where_the_next_one_begins(server, db):
    write_feed(server.client, {post_id(n, n % 3): count for n, count in enumerate(COUNTS)})
    page = await posts.feed(db, 3, 4)
    while page.more:
        last, ranks = page.posts[-1], posts.ranks_behind(page.ranks, page.posts)
        page = await posts.feed(db, 3, 4, FeedCursor(last.comment_count, last.id))
        assert page.ranks == ranks


async def test_a_cursor_has_no_ranks_where_there_are_many_partitions(server, db):
    write_feed(server.client, {post_id(n, n): 0 for n in range(17)})
    page = await posts.feed(db, 17, 4)
    assert page.more and page.ranks == () and posts.ranks_behind(page.ranks, page.posts) == ()
    assert len((await posts.feed(db, 16, 4)).ranks) == 16


@pytest.mark.one_redis
async def test_a_right_hint_takes_one_read_and_a_lie_hardly_more_than_none(server, db):
    """Reads of the list of 4,000 posts with equally many comments. The cursor's post is not there any more."""
    if server.kind == "fake":
        return
    write_feed(server.client, {post_id(2 * n): 1 for n in range(4000)})

    async def reads(*ranks: int) -> int:
        """How often the feed's list is read for a page in its middle."""
        server.client.config_resetstat()
        page = await posts.feed(db, 1, 10, FeedCursor(1, post_id(4001), ranks))
        assert page.ranks == (1999,)
        used = server.client.info("commandstats")
        return sum(used.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in ("zrevrange", "zcount", "zscore"))

    unhinted = await reads()
    assert await reads(1999) == 1
    for off in (-1, 1):
        assert await reads(1999 + off) <= 6
    for off in (-100, 100):
        assert await reads(1999 + off) < unhinted + 4
    for lie in (0, 3900, 2**32 - 1):
        assert await reads(lie) <= unhinted + 12
