"""Old comments move to segments in the store, and nothing that a reader sees changes."""

import asyncio

import pytest
from conftest import connect
from making import make_post
from state import unchanged

from storage import changes, comments, errors, keys, posts, sealing
from storage.objects import Unavailable
from storage.segments import Segments, Unreadable
from storage.settings import COMPACT_MS, DAY_MS, LATEST_COMMENTS, SEGMENT_COMMENTS

NOW = 1_763_971_200_000
QUIET_MS = 30 * DAY_MS
MONTH_MS = 31 * DAY_MS  # after which a post is quiet
REACH = 31 * DAY_MS


async def never(_: int) -> bool:
    """No kept backup names anything."""
    return False


@pytest.fixture
async def db(server):
    db = connect(server)
    db.clock = NOW
    yield db
    await db.close()


@pytest.fixture
def segments(store):
    return Segments(store)


async def fill(db, post: str, count: int) -> list[comments.Comment]:
    """Adds comments, of which some have the same ms. Returns them, oldest first."""
    added = []
    for number in range(count):
        db.clock += number % 3
        added.append((await comments.add(db, "bob" if number % 2 else "alice", post, f"{number} / \\ \" é"))[0])
    return added


async def work(db, segments, post: str, hot: int = 20) -> int:
    """Does all sealing and compacting of a post, and ends its lease. Returns the number of steps."""
    leased, steps = await sealing.lease(db, 0), 0
    while await sealing.step(db, segments, post, hot, QUIET_MS, REACH):
        steps += 1
    for one in leased:
        await sealing.end(db, one)
    return steps


async def walk(db, segments, post: str, limit: int = 7) -> list[comments.Comment]:
    """All comments of a post by pages, oldest first."""
    found, before = [], ""
    while True:
        page = await comments.page(db, segments, post, limit, before)
        found += page.comments
        if not page.more:
            return found[::-1]
        assert len(page.comments) == limit
        before = page.comments[-1].id


async def seen(db, segments, post: str) -> tuple:
    """All that readers see of a post and its comments."""
    token = changes.issue(db, (await posts.feed(db, 1, 10)).seen)
    feed = [row for row in (await posts.feed(db, 1, 10)).posts if row.id == post]
    pages = [await comments.page(db, segments, post, limit) for limit in (1, 20, 100)]
    return token.seen, feed, await posts.read(db, post), pages, await walk(db, segments, post)


async def test_a_post_with_many_comments_keeps_the_newest_in_redis_and_readers_see_no_change(server, db, segments):
    post = await make_post(db, "alice")
    added = await fill(db, post, SEGMENT_COMMENTS + 20)
    before = await seen(db, segments, post)
    assert server.client.zrange(keys.sealing(0), 0, -1) == [post]
    assert await work(db, segments, post) == 1
    assert not server.client.exists(keys.sealing(0))
    assert server.client.xlen(keys.comments(post)) == 20
    assert len(server.client.lrange(keys.segments(post), 0, -1)) == 1
    assert await seen(db, segments, post) == before and before[-1] == added
    for row in (added[0], added[SEGMENT_COMMENTS - 1], added[SEGMENT_COMMENTS]):
        assert await comments.read(db, segments, post, row.id) == row


async def test_a_quiet_post_keeps_only_its_latest_comments_and_takes_new_ones(server, db, store, segments):
    post, other = await make_post(db, "alice"), await make_post(db, "alice")
    added = await fill(db, post, 600)
    db.clock += MONTH_MS
    await comments.add(db, "bob", other, "not quiet")
    assert not await sealing.find_quiet(db, 0, QUIET_MS)
    assert server.client.zrange(keys.sealing(0), 0, -1) == [post]
    before = await seen(db, segments, post)
    assert await work(db, segments, post) == 3 and await work(db, segments, other) == 0
    assert not server.client.exists(keys.comments(post))
    assert await seen(db, segments, post) == before
    db.clock -= MONTH_MS + 100  # the clock goes back
    added.append((await comments.add(db, "bob", post, "again"))[0])
    assert keys.order(added[-1].id) > keys.order(added[-2].id)
    assert await walk(db, segments, post) == added and (await posts.read(db, post)).comment_count == 601


@pytest.mark.parametrize("hot", [0, 1, 5])
async def test_a_sealed_comment_is_deleted_by_its_author_alone_and_shows_at_once(server, db, store, segments, hot):
    post = await make_post(db, "alice")
    added = await fill(db, post, 300)
    db.clock += MONTH_MS
    await work(db, segments, post)
    added += await fill(db, post, hot)
    for row in [added[299], added[298], added[0], added[150], *added[300:], added[297]]:
        if row in added[:300]:
            with unchanged(server.client), pytest.raises(errors.Forbidden):
                await comments.delete(db, segments, "eve", post, row.id)
        await comments.delete(db, segments, row.author, post, row.id)
        with unchanged(server.client), pytest.raises(errors.NoComment):
            await comments.delete(db, segments, row.author, post, row.id)
        added.remove(row)
        assert await walk(db, segments, post) == added
        shown = await posts.read(db, post)
        assert shown.comment_count == len(added) == server.client.zscore(keys.feed(0), post)
        assert [comments.Comment(*entry) for entry in shown.latest] == added[: -LATEST_COMMENTS - 1 : -1]
    with unchanged(server.client), pytest.raises(errors.NoComment):
        await comments.delete(db, segments, "bob", post, f"{keys.comment_ms(added[0].id)}-7")


async def test_a_deletion_reads_no_segment_but_the_one_of_its_comment_if_redis_has_the_latest_comments(
    server, db, store, segments
):
    post = await make_post(db, "alice")
    added = await fill(db, post, 3)
    for _ in range(2):
        db.clock += MONTH_MS
        await work(db, segments, post)
        await fill(db, post, 3)
    entries, _ = await sealing.read_segments(db, post)
    await segments.delete(post, sealing.Entry.parse(entries[-1]).name)
    await comments.delete(db, segments, added[0].author, post, added[0].id)
    assert server.client.smembers(keys.erased(post)) == {added[0].id}


async def test_a_post_with_many_erased_comments_is_compacted_at_once(server, db, segments):
    post = await make_post(db, "alice")
    added = await fill(db, post, 3)
    db.clock += MONTH_MS
    await work(db, segments, post)
    server.client.sadd(keys.erased(post), *[f"1-{number}" for number in range(998)])
    await comments.delete(db, segments, added[0].author, post, added[0].id)
    assert server.client.zscore(keys.sealing(0), post) == db.clock + COMPACT_MS
    await comments.delete(db, segments, added[1].author, post, added[1].id)
    assert [due.id for due in await sealing.lease(db, 0)] == [post]


async def test_the_text_of_a_deleted_comment_leaves_the_store_and_the_old_segment_waits_for_the_backups(
    server, db, store, segments
):
    post = await make_post(db, "alice")
    added = await fill(db, post, 600)
    db.clock += MONTH_MS
    await work(db, segments, post)
    old = [name async for name in _names(store)]
    for row in (added[0], added[255], added[300]):
        await comments.delete(db, segments, row.author, post, row.id)
        added.remove(row)
    assert server.client.zscore(keys.sealing(0), post) == db.clock + COMPACT_MS
    assert not await sealing.lease(db, 0)
    db.clock += COMPACT_MS
    before = await seen(db, segments, post)
    assert await work(db, segments, post) == 2
    assert not server.client.exists(keys.sealing(0), keys.erased(post))
    assert await seen(db, segments, post) == before and before[-1] == added
    entries, _ = await sealing.read_segments(db, post)
    assert [sealing.Entry.parse(entry).through for entry in entries] == [254, 509, 597]
    db.clock += REACH - 1
    await sealing.remove_retired(db, store, never, 0, REACH)
    assert len([name async for name in _names(store)]) == 5
    db.clock += 1
    await sealing.remove_retired(db, store, never, 0, REACH)
    left = [name async for name in _names(store)]
    assert len(left) == 3 and len(set(left) & set(old)) == 1
    assert not server.client.exists(keys.retired(0))
    assert await walk(db, Segments(store), post) == added


async def test_the_segments_behind_a_damaged_one_are_compacted_and_new_ones_are_sealed(
    server, db, store, segments, monkeypatch
):
    monkeypatch.setattr(sealing, "SEGMENT_COMMENTS", 3)
    post = await make_post(db, "alice")
    added = await fill(db, post, 9)
    db.clock += MONTH_MS
    await work(db, segments, post)
    damaged = sealing.Entry.parse((await sealing.read_segments(db, post))[0][0])
    for row in (added[0], added[4], added[8]):
        await comments.delete(db, segments, row.author, post, row.id)
    await store.put(keys.segment(post, damaged.name), b"rubbish")
    added += await fill(db, post, 3)
    db.clock += MONTH_MS
    with pytest.raises(Unreadable):
        await work(db, Segments(store), post)
    entries, erased = await sealing.read_segments(db, post)
    assert erased == {added[0].id} and [sealing.Entry.parse(entry).through for entry in entries] == [3, 5, 7, 10]
    assert not server.client.exists(keys.comments(post))


async def _names(store):
    async for entry in store.list(keys.SEGMENTS):
        yield entry.name


async def test_all_comments_of_a_quiet_post_can_be_deleted_and_new_ones_have_greater_ids(server, db, store, segments):
    post = await make_post(db, "alice")
    added = await fill(db, post, 5)
    db.clock += MONTH_MS
    await work(db, segments, post)
    for row in added:
        await comments.delete(db, segments, row.author, post, row.id)
    assert (await posts.read(db, post))[1::7] == (0, ())
    await work(db, segments, post)
    entries, erased = await sealing.read_segments(db, post)
    assert (entries, erased) == ([f"{added[-1].id} 0 {keys.NO_SEGMENT}"], set())
    db.clock -= 2 * MONTH_MS
    newest, _ = await comments.add(db, "bob", post, "new")
    assert keys.order(newest.id) > keys.order(added[-1].id)
    assert await walk(db, segments, post) == [newest]


async def test_the_id_of_a_deleted_newest_comment_is_never_used_again(db, store, segments):
    post = await make_post(db, "alice")
    added = await fill(db, post, 3)
    db.clock += 1000
    deleted, _ = await comments.add(db, "bob", post, "deleted")
    await comments.delete(db, segments, "bob", post, deleted.id)
    db.clock += MONTH_MS
    await work(db, segments, post)
    db.clock = keys.comment_ms(deleted.id) - 500
    newest, _ = await comments.add(db, "bob", post, "new")
    assert keys.order(newest.id) > keys.order(deleted.id)
    assert await walk(db, segments, post) == [*added, newest]


async def test_a_post_that_is_deleted_leaves_no_segment_behind(server, db, store, segments):
    post = await make_post(db, "alice")
    await fill(db, post, 600)
    db.clock += MONTH_MS
    await work(db, segments, post)
    await posts.delete(db, store, "alice", post, REACH)
    await store.put(keys.segment(post, keys.segment_name("1-1")), b"stored by a process that died before the script")
    db.clock += REACH
    await sealing.remove_retired(db, store, never, 0, REACH)
    assert not [name async for name in _names(store)]
    assert not [key for key in server.client.keys("*") if post in key and not key.startswith("leaf")]


@pytest.mark.parametrize("meanwhile", ["deleted", "sealed", "the post is deleted", "nothing, but the reply was lost"])
async def test_a_segment_is_named_only_if_the_stream_still_begins_with_its_comments(db, store, segments, meanwhile):
    post = await make_post(db, "alice")
    added = await fill(db, post, 10)
    db.clock += MONTH_MS

    class Late(Segments):
        """After this stores a segment, something else happens before its script."""

        async def put(self, *args):
            await super().put(*args)
            match meanwhile:
                case "deleted":
                    await comments.delete(db, segments, added[3].author, post, added[3].id)
                    added.pop(3)
                    db.clock += MONTH_MS
                case "sealed":
                    assert await sealing.step(db, segments, post, 0, QUIET_MS, REACH)
                case "the post is deleted":
                    await posts.delete(db, store, "alice", post)

    class Twice:
        """Sends the script twice, as if the first reply was lost."""

        def __getattr__(self, name):
            return getattr(db, name)

        async def call(self, name, *args):
            if name == "seal_comments":
                assert await db.call(name, *args) == 10
                assert await db.call(name, *args) == 0
                raise errors.Stale("as after one more segment")
            return await db.call(name, *args)

    if meanwhile.startswith("nothing"):
        await sealing.step(Twice(), segments, post, 0, QUIET_MS, REACH)
    else:
        await sealing.step(db, Late(store), post, 0, QUIET_MS, REACH)
        await work(db, segments, post)
    named, _ = await sealing.read_segments(db, post)
    stored = {name async for name in _names(store)}
    assert stored == {keys.segment(post, sealing.Entry.parse(entry).name) for entry in named}
    if meanwhile != "the post is deleted":
        assert await walk(db, segments, post) == added


async def test_without_the_store_only_what_is_in_it_is_refused(server, db, store, segments):
    class Away:
        async def get(self, *_):
            raise Unavailable("the store is away")

        put = get

    away = Segments(Away())
    post = await make_post(db, "alice")
    added = await fill(db, post, 300)
    assert await work(db, segments, post) == 1
    added += await fill(db, post, 1)
    await comments.delete(db, away, added[-1].author, post, added[-1].id)
    first = await comments.page(db, away, post, 20)
    assert first.more and first.comments == added[-2:-22:-1]
    for refused in (
        comments.page(db, away, post, 100),
        comments.read(db, away, post, added[0].id),
        comments.delete(db, away, added[0].author, post, added[0].id),
    ):
        with unchanged(server.client), pytest.raises(Unavailable):
            await refused
    db.clock += MONTH_MS
    with unchanged(server.client), pytest.raises(Unavailable):
        await sealing.step(db, away, post, 20, QUIET_MS, REACH)


async def test_comments_are_deleted_while_segments_are_replaced(db, store, segments):
    """Every caller is answered, and each comment is deleted once."""
    post = await make_post(db, "alice")
    added = await fill(db, post, 60)
    db.clock += MONTH_MS
    await work(db, segments, post)
    stop = asyncio.Event()

    async def compact():
        while not stop.is_set():
            await work(db, segments, post)

    task = asyncio.create_task(compact())
    await asyncio.gather(*(comments.delete(db, segments, row.author, post, row.id) for row in added[:58]))
    stop.set()
    await task
    assert await walk(db, segments, post) == added[58:]
    assert (await posts.read(db, post)).comment_count == 2


async def test_a_hidden_comment_of_a_segment_comes_back_as_the_newest(server, db, store, segments):
    post = await make_post(db, "alice")
    added = await fill(db, post, 30)
    db.clock += MONTH_MS
    await work(db, segments, post)
    row = await posts.inspect(db, post)
    for comment in (added[0], added[-1]):
        assert [await comments.hide(db, segments, row, comment.id) for _ in range(2)] == [True, False]
        added.remove(comment)
        assert await walk(db, segments, post) == added
    await work(db, segments, post)
    with pytest.raises(errors.NoComment):
        await comments.unhide(db, segments, row, "1-1")
    assert await comments.unhide(db, segments, row, added[0].id) == added[0].id
    kept = await comments.kept(db, post)
    for old in kept.values():
        new = await comments.unhide(db, segments, row, old.id)
        assert await comments.unhide(db, segments, row, old.id) == new
        added.append(old._replace(id=new))
    assert await walk(db, segments, post) == added
    assert (await posts.read(db, post)).comment_count == 30


async def test_a_post_that_was_found_quiet_by_a_clock_that_had_jumped_is_found_again(server, db, segments):
    post = await make_post(db, "alice")
    await fill(db, post, 3)
    db.clock += 2 * MONTH_MS
    assert not await sealing.find_quiet(db, 0, QUIET_MS)
    db.clock -= 2 * MONTH_MS
    assert await work(db, segments, post) == 0 and not server.client.exists(keys.sealing(0))
    assert not await sealing.find_quiet(db, 0, QUIET_MS)
    assert not server.client.exists(keys.sealing(0))
    db.clock += MONTH_MS
    assert not await sealing.find_quiet(db, 0, QUIET_MS)
    assert server.client.zrange(keys.sealing(0), 0, -1) == [post] and await work(db, segments, post) == 1


async def test_a_deletion_that_read_the_store_before_a_restore_shows_what_the_restore_brought_back(
    server, db, store, segments
):
    post = await make_post(db, "alice")
    added = await fill(db, post, 5)
    db.clock += MONTH_MS
    await work(db, segments, post)
    before = {key: server.client.dump(key) for key in server.client.keys("*")}
    await comments.delete(db, segments, added[4].author, post, added[4].id)

    class Restoring(Segments):
        """Redis is restored while this is read."""

        async def read(self, *args):
            server.client.flushall()
            for key, value in before.items():
                server.client.restore(key, 0, value)
            return await super().read(*args)

    await comments.delete(db, Restoring(store), added[0].author, post, added[0].id)
    assert await walk(db, segments, post) == added[1:]
    shown = await posts.read(db, post)
    assert [comments.Comment(*entry) for entry in shown.latest] == [added[4], added[3]]


async def test_a_post_may_be_deleted_while_a_segment_is_compacted_of_which_nothing_is_left(db, store, segments):
    post = await make_post(db, "alice")
    added = await fill(db, post, 2)
    db.clock += MONTH_MS
    await work(db, segments, post)
    for row in added:
        await comments.delete(db, segments, row.author, post, row.id)

    class Overtaken:
        """The post is deleted before the segment is compacted."""

        def __getattr__(self, name):
            return getattr(db, name)

        async def call(self, name, *args):
            if name == "compact_segment":
                await posts.delete(db, store, "alice", post)
            return await db.call(name, *args)

    assert await sealing.step(Overtaken(), segments, post, 20, QUIET_MS, REACH)
    assert await work(db, segments, post) == 0
