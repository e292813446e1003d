"""`kill -9` of the worker and of Redis while comments move to the store. `LONG=1` kills 50 times."""

import os
import random
from contextlib import suppress

from conftest import RedisServer, Site, connect, until
from making import make_post

from storage import comments, errors, keys, sealing, sweep
from storage.segments import Segments

ROUNDS = 50 if os.environ.get("LONG") else 2
POSTS = 3


async def never(_: int) -> bool:
    """No kept backup names anything."""
    return False


async def everything(db, segments, post: str) -> list[str]:
    """The texts of a post by pages, newest first."""
    found, before = [], ""
    while True:
        page = await comments.page(db, segments, post, 20, before)
        found += [row.text for row in page.comments]
        if not page.more:
            return found
        before = page.comments[-1].id


async def test_nothing_is_lost_or_double_and_the_sweep_leaves_no_orphan(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "DAY", -3600)  # seconds: the objects of this test are young
    chance, server = random.Random(1), RedisServer("valkey")
    site = Site(server.url, tmp_path, converters=1, hot_comments=4)
    db, store = connect(server), site.open_store()
    segments = Segments(store, memory=0)
    posts = [await make_post(db, "alice") for _ in range(POSTS)]
    added, deleted = {post: {} for post in posts}, set()  # text -> id
    try:
        site.start("tests.small", "workers")
        for number in range(ROUNDS):
            for text in range(40):
                post = chance.choice(posts)
                comment, _ = await comments.add(db, "bob", post, f"{number} {text}", seal_at=4 + 8)
                added[post][comment.text] = comment.id
            for post in posts:
                text, comment = chance.choice([*added[post].items()])
                await comments.delete(db, segments, "bob", post, comment)
                deleted.add(added[post].pop(text))
            named = sum(server.client.llen(keys.segments(post)) for post in posts)
            until(
                lambda named=named: sum(server.client.llen(keys.segments(post)) for post in posts) > named,
                what="a seal",
            )
            if number % 2:
                server.kill()
                server.start()
            else:
                site.processes[-1].kill()
                site.processes[-1].wait()
                site.start("tests.small", "workers")
            with suppress(errors.Unreachable, errors.Unknown):  # the first call finds that the connection is gone
                await db.ping()
        until(lambda: not server.client.exists(keys.sealing(0)), 90, "the end of all sealing and leases")
        kept = set()
        for post in posts:
            assert await everything(db, segments, post) == [*added[post]][::-1]
            assert server.client.zscore(keys.feed(0), post) == len(added[post])
            entries, erased = await sealing.read_segments(db, post)
            assert not erased
            kept |= {keys.segment(post, sealing.Entry.parse(entry).name) for entry in entries}
        kept |= {f"{keys.SEGMENTS}{entry}" for entry in server.client.zrange(keys.retired(0), 0, -1)}
        before = {entry.name async for entry in store.list(keys.SEGMENTS)}
        report = await sweep.sweep(db, store, never, 1000, remove=True)
        assert {entry.name async for entry in store.list(keys.SEGMENTS)} == {name for name in kept if name in before}
        print(f"{ROUNDS} kills, {len(before)} segments, {report.orphans} orphans removed, 0 lost, 0 double")
        assert kept - before <= {keys.segment(post, keys.NO_SEGMENT) for post in posts}
    finally:
        site.close()
        await db.close()
        server.close()


