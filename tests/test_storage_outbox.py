"""The outbox: leases that expire, turns of authors, counted attempts, and the removal of what deleted posts leave."""

import asyncio
import io

import pytest
from conftest import NOBODY
from making import jpeg, make_post, make_processing
from state import contents, unchanged

from storage import (
    check,
    comments,
    errors,
    keys,
    originals,
    outbox,
    posts,
    retry,
    uploads,
)
from storage.backup import chain
from storage.backup.retain import KeptBackups
from storage.objects import Folder, NotFound
from storage.outbox import ATTEMPTS, JOB_MS, LEASE_MS
from storage.settings import DAY_MS

NOW = 1_763_971_200_000  # ms since 1970
HOUR_MS = 3_600_000
JUMPS = [90_000, 10 * LEASE_MS, 365 * DAY_MS]  # ms


@pytest.fixture
def db(db):
    """storage's client, at a time that only the test changes."""
    db.clock = NOW
    return db


async def lease_post(db, post: str) -> outbox.ImageWork:
    """Leases image work. Returns the lease of this post."""
    return next(image for image in await outbox.lease_images(db, 0, 10) if image.id == post)


async def lease_erasure(db, post: str) -> outbox.DueEntry:
    """Leases what is due. Returns the lease of this post."""
    return next(due for due in await outbox.lease(db, 0) if due.id == post)


async def refused(server, error: type[Exception], call) -> None:
    """A call raises exactly this error with a message, and changes nothing in Redis."""
    with unchanged(server.client), pytest.raises(error) as raised:
        await call
    assert raised.type is error and str(raised.value)


async def object_names(store) -> list[str]:
    return [entry.name async for entry in store.list("")]


async def create_post_with_chunks(db, store) -> tuple[str, str]:
    """A processing post whose upload has two chunks in the store. Returns the ids of both."""
    async with uploads.form_upload(db, store, "alice", 1) as image:
        await image.write(b"BM" + bytes(100))
        await image.commit()
        await image.write(bytes(100))
        await image.finish()
    post, _ = await posts.create(db, "alice", image.upload, "")
    return post, image.upload


async def make_image(db, store, due: outbox.ImageWork) -> None:
    """Does what the job does, with a JPEG that shows another picture."""
    _, upload = await outbox.start_image(db, due.id, due.lease)
    await store.put(keys.original(due.id), await join_chunks(db, store, upload))
    await posts.put_image(store, due.id, jpeg())
    await outbox.publish(db, due.id, "thumbhash")


async def join_chunks(db, store, upload: str) -> bytes:
    """The bytes of an upload's chunks in the store."""
    return b"".join([await store.get(keys.chunk(upload, name)) for name in (await uploads.inspect(db, upload)).chunks])


async def queue_posts(db, author: str, count: int) -> None:
    for _ in range(count):
        await make_processing(db, author)


async def lease_next_author(db) -> str:
    """Leases one post. Returns its author."""
    (image,) = await outbox.lease_images(db, 0, 1)
    return (await posts.read(db, image.id)).author


async def make_next_image(db) -> str:
    """Leases one post and publishes it. Returns its author."""
    (image,) = await outbox.lease_images(db, 0, 1)
    author = (await posts.read(db, image.id)).author
    await outbox.start_image(db, image.id, image.lease)
    await outbox.publish(db, image.id, "thumbhash")
    return author


async def move_to_due(server, author: str, post: str, score: int) -> None:
    """Moves a post's image work to `due`, where older versions had it."""
    server.client.zrem(keys.making(0, author), post)
    server.client.zrem(keys.turns(0), author)
    server.client.zadd(keys.due(0), {post: score})


def backup_store(store) -> Folder:
    """The backup store, in a folder beside that of the store."""
    return Folder(store._root.parent / "backup")


async def run_outbox(db, store) -> None:
    """Does what the dispatcher does at this moment."""
    for due in await outbox.lease(db, 0):
        end = outbox.end_upload if due.kind == "upload" else outbox.erase
        await end(db, store, KeptBackups(backup_store(store)).may_name, due, DAY_MS)


async def create_finished_post(db, store, failed: bool) -> str:
    """A ready post with its objects, or one that has failed. The outbox has run since."""
    post, _ = await create_post_with_chunks(db, store)
    due = await lease_post(db, post)
    if failed:
        attempt, _ = await outbox.start_image(db, post, due.lease)
        await outbox.fail(db, post, attempt, "damaged", "it is damaged")
    else:
        await make_image(db, store, due)
    await run_outbox(db, store)
    return post


def store_that_is_away(folder) -> Folder:
    """A store that cannot be reached: its folder is a file."""
    store = Folder(folder / "away")
    (folder / "away").rmdir()
    (folder / "away").touch()
    return store


async def seconds_readable(db, store, post: str, seconds: int) -> list[int]:
    """Runs the outbox once a second. Returns the seconds after which the JPEG of a post could still be read."""
    readable = []
    for second in range(seconds):
        await run_outbox(db, store)
        if keys.image(post) in await object_names(store):
            readable.append(second)
        db.clock += 1000
    return readable


async def add_kept_backup(store, generation: int, ms: int) -> None:
    """Writes the description of a kept backup, as the shipper does. Its base holds the state of this moment."""
    body = chain.seal({"generation": generation, "second": ms // 1000}, b"")
    await backup_store(store).put(chain.description_name(generation), body)


class CountingStore:
    """A backup store that counts how often it is listed. With `vanishing` its objects are gone when they are read."""

    def __init__(self, store, vanishing: bool = False):
        self.store, self.vanishing, self.lists = store, vanishing, 0

    async def list(self, prefix):
        self.lists += 1
        async for entry in self.store.list(prefix):
            yield entry

    async def get(self, name):
        if self.vanishing:
            await self.store.delete([name])
        return await self.store.get(name)


class Paused(Folder):
    """A store whose `read` of a missing object waits for the test before it raises NotFound."""

    def __init__(self, root):
        super().__init__(root)
        self.missed, self.go_on = asyncio.Event(), asyncio.Event()

    async def read(self, name):
        try:
            async for piece in super().read(name):
                yield piece
        except NotFound:
            self.missed.set()
            await self.go_on.wait()
            raise


# Leases


async def test_a_post_is_leased_once_and_again_when_its_lease_has_expired(server, db):
    post = await make_processing(db, "alice")
    first = await lease_post(db, post)
    assert first.lease == NOW + LEASE_MS
    assert await outbox.lease_images(db, 0, 10) == []
    db.clock += LEASE_MS - 1
    with unchanged(server.client):
        assert await outbox.lease_images(db, 0, 10) == []
    db.clock += 1
    second = await lease_post(db, post)
    assert second.lease == first.lease + LEASE_MS
    await refused(server, errors.Stale, outbox.start_image(db, post, first.lease))
    db.clock += 1
    assert (await outbox.start_image(db, post, second.lease))[0] == 1
    await refused(server, errors.Stale, outbox.start_image(db, post, second.lease))


async def test_no_more_posts_are_leased_than_asked_for(server, db):
    created = sorted([await make_processing(db, f"user{n}") for n in range(5)])
    with unchanged(server.client):
        assert await outbox.lease_images(db, 0, 0) == []
    leases = [[image.id for image in await outbox.lease_images(db, 0, 2)] for _ in range(3)]
    assert [len(ids) for ids in leases] == [2, 2, 1]
    assert sorted(sum(leases, [])) == created


async def test_a_deleted_post_is_due_however_many_posts_wait_for_their_image(server, db, store):
    deleted = await make_post(db, "alice")
    for _ in range(30):
        await make_processing(db, "alice")
    await posts.delete(db, store, "alice", deleted)
    assert [due.id for due in await outbox.lease(db, 0) if due.kind == "erase"] == [deleted]
    assert len(await outbox.lease_images(db, 0, 100)) == 30


# Turns of authors


@pytest.mark.parametrize("pause", [0, 1, 1000, 59_000], ids=lambda ms: f"{ms} ms")
async def test_no_author_waits_behind_the_posts_of_another(server, db, pause):
    """Two of alice's posts are leased when bob posts. One of them is being made, one waits in the worker."""
    await queue_posts(db, "alice", 30)
    for _ in range(2):
        assert await lease_next_author(db) == "alice"
        db.clock += pause
    await queue_posts(db, "bob", 1)
    assert [await lease_next_author(db) for _ in range(3)] == ["bob", "alice", "alice"]


@pytest.mark.parametrize("polled", [False, True])
async def test_an_author_who_posted_a_moment_ago_waits_no_longer_than_others(server, db, polled):
    """Bob's first post is ready when alice queues hers. Meanwhile the dispatcher may have polled and found no work."""
    first = await make_processing(db, "bob")
    assert await lease_next_author(db) == "bob"
    if polled:
        assert await outbox.lease_images(db, 0, 1) == []
    db.clock += 500
    await outbox.publish(db, first, "thumbhash")
    await queue_posts(db, "alice", 30)
    for _ in range(2):
        db.clock += 500
        assert await lease_next_author(db) == "alice"
    db.clock += 500
    await queue_posts(db, "bob", 1)
    assert [await lease_next_author(db) for _ in range(3)] == ["bob", "alice", "alice"]


async def test_authors_take_turns_also_within_one_call_and_one_millisecond(server, db):
    for author, count in (("zoe", 5), ("alice", 4), ("mallory", 6)):
        await queue_posts(db, author, count)
        db.clock += 1
    images = await outbox.lease_images(db, 0, 4)
    images += await outbox.lease_images(db, 0, 20)
    authors = [(await posts.read(db, image.id)).author for image in images]
    assert authors == ["zoe", "alice", "mallory"] * 4 + ["zoe", "mallory"] + ["mallory"]
    for author in ("zoe", "alice", "mallory"):
        ids = [image.id for image, other in zip(images, authors, strict=True) if other == author]
        assert ids == sorted(ids), "an author's oldest post comes first"


async def test_an_author_who_posts_one_at_a_time_gains_nothing_over_those_who_queue_many(server, db):
    """Mallory queues her next post as soon as her last one is ready."""
    await queue_posts(db, "carol", 30)
    await queue_posts(db, "dave", 30)
    made = []
    for number in range(30):
        if "mallory" not in made[-1:]:
            await queue_posts(db, "mallory", 1)
        made.append(await make_next_image(db))
        db.clock += 1 + number % 3
    assert max(made.count(author) for author in ("carol", "dave", "mallory")) <= 11


async def test_a_stream_of_new_authors_delays_another_by_two_leases_at_most(server, db):
    await queue_posts(db, "alice", 3)
    assert await lease_next_author(db) == "alice"
    began = db.clock
    for number in range(4 * LEASE_MS // 1000):
        db.clock += 1000
        await queue_posts(db, f"new{number}", 1)
        if await lease_next_author(db) == "alice":
            break
    assert 0 < db.clock - began <= 2 * LEASE_MS + 1000


async def test_an_author_without_image_work_is_removed_from_the_turns(server, db, store):
    await make_post(db, "alice")
    doomed = await make_processing(db, "bob")
    await posts.delete(db, store, "bob", doomed)
    assert await outbox.lease_images(db, 0, 1) == []
    assert not server.client.exists(keys.turns(0), keys.making(0, "alice"), keys.making(0, "bob"))


async def test_entries_that_are_no_work_are_removed_and_not_leased(server, db):
    """A post that does not exist, and one that has failed. No script leaves such entries."""
    failed, post = await make_processing(db, "alice"), await make_processing(db, "alice")
    await outbox.fail(db, failed, 0, "damaged", "it is damaged")
    server.client.zadd(keys.making(0, "alice"), {NOBODY: 0, failed: 0})
    assert [image.id for image in await outbox.lease_images(db, 0, 9)] == [post]
    assert server.client.zrange(keys.making(0, "alice"), 0, -1) == [post]


async def test_a_leased_post_does_not_delay_its_authors_next_one(server, db):
    first = await make_processing(db, "alice")
    await lease_post(db, first)
    assert await outbox.lease_images(db, 0, 1) == []
    db.clock += 5
    second = await make_processing(db, "alice")
    assert [image.id for image in await outbox.lease_images(db, 0, 9)] == [second]
    db.clock = NOW + LEASE_MS
    assert [image.id for image in await outbox.lease_images(db, 0, 9)] == [first]


# A clock that jumps, and data of older versions


@pytest.mark.parametrize("ms", JUMPS)
@pytest.mark.parametrize("script", ["create_post", "lease_images", "start_image"])
async def test_a_clock_that_jumped_forward_and_back_delays_a_post_by_one_lease_at_most(server, db, script, ms):
    other = await make_processing(db, "bob")
    if script == "create_post":
        db.clock += ms
    post = await make_processing(db, "alice")
    if script == "lease_images":
        db.clock += ms
    if script != "create_post":
        image = await lease_post(db, post)
    if script == "start_image":
        db.clock += ms
        await outbox.start_image(db, post, image.lease)
    assert await outbox.lease_images(db, 0, 0) == []
    db.clock = NOW + 1000
    leases = {image.id for image in await outbox.lease_images(db, 0, 9)}
    db.clock += LEASE_MS
    leases |= {image.id for image in await outbox.lease_images(db, 0, 9)}
    assert leases == {post, other}


async def test_a_clock_that_jumped_forward_and_back_delays_no_other_post_of_the_same_author(server, db):
    for post in [await make_post(db, "alice") for _ in range(100)]:
        await check.make_again(db, post)
    db.clock += 365 * DAY_MS
    assert len(await outbox.lease_images(db, 0, 80)) == 80
    db.clock = NOW
    assert len(await outbox.lease_images(db, 0, 200)) == 100


async def test_the_long_leases_of_later_attempts_are_not_mistaken_for_those_of_a_wrong_clock(server, db):
    post = await make_processing(db, "alice")
    for attempt in range(ATTEMPTS):
        image = await lease_post(db, post)
        await outbox.start_image(db, post, image.lease)
        end = db.clock + LEASE_MS * 2**attempt
        while db.clock < end:
            assert await outbox.lease_images(db, 0, 9) == []
            db.clock += LEASE_MS // 2


async def test_image_work_of_an_older_version_moves_to_its_authors_by_itself(server, db):
    processing = {author: [await make_processing(db, author) for _ in range(3)] for author in ("alice", "bob")}
    remade, failed = await make_post(db, "carol"), await make_processing(db, "dave")
    await outbox.fail(db, failed, 0, "damaged", "it is damaged")
    for author, ids in {**processing, "carol": [remade], "dave": [failed]}.items():
        for post in ids:
            await move_to_due(server, author, post, NOW)
    assert {due.id for due in await outbox.lease(db, 0) if due.kind == "erase"} == {failed}
    assert all(entry.startswith("u") or entry == failed for entry in server.client.zrange(keys.due(0), 0, -1))
    images = await outbox.lease_images(db, 0, 99)
    assert sorted(image.id for image in images) == sorted([*sum(processing.values(), []), remade])
    for image in images:
        assert (await outbox.start_image(db, image.id, image.lease))[0] == 1


# Attempts


async def test_each_attempt_has_twice_the_time_and_after_the_last_one_the_post_has_failed(server, db):
    post = await make_processing(db, "alice")
    spans = []  # in leases
    for attempt in range(1, ATTEMPTS + 1):
        due = await lease_post(db, post)
        assert (await outbox.start_image(db, post, due.lease))[0] == attempt
        end = int(server.client.zscore(keys.making(0, "alice"), post))
        spans.append((end - db.clock) // LEASE_MS)
        db.clock = end
    assert spans == [2**n for n in range(ATTEMPTS)]
    due = await lease_post(db, post)
    assert (await outbox.start_image(db, post, due.lease))[0] == 0
    row = await posts.read(db, post)
    assert (row.status, row.code) == ("failed", "exhausted")
    assert row.detail == f"the image could not be made in {ATTEMPTS} attempts"
    assert not server.client.exists(keys.making(0, "alice"))
    assert (await lease_erasure(db, post)).ended == db.clock
    await refused(server, errors.Stale, outbox.start_image(db, post, due.lease))
    await refused(server, errors.Stale, outbox.publish(db, post, "too late"))
    await refused(server, errors.Failed, comments.add(db, "bob", post, "a"))
    assert not (await posts.feed(db, 1, 10)).posts


async def test_a_lease_that_expires_before_the_work_begins_is_no_attempt(server, db):
    post = await make_processing(db, "alice")
    for _ in range(ATTEMPTS * 3):
        due = await lease_post(db, post)
        db.clock = due.lease
    due = await lease_post(db, post)
    assert (await outbox.start_image(db, post, due.lease))[0] == 1


async def test_only_the_current_attempt_can_fail_a_post(server, db):
    post = await make_processing(db, "alice")
    due = await lease_post(db, post)
    await outbox.start_image(db, post, due.lease)
    db.clock += LEASE_MS
    due = await lease_post(db, post)
    assert (await outbox.start_image(db, post, due.lease))[0] == 2
    await refused(server, errors.Stale, outbox.fail(db, post, 1, "damaged", "late"))
    await refused(server, errors.Stale, outbox.fail(db, post, 3, "damaged", "early"))
    await refused(server, errors.NoPost, outbox.fail(db, NOBODY, 1, "damaged", "never"))
    await outbox.fail(db, post, 2, "damaged", "the image is cut off")
    row = await posts.read(db, post)
    assert (row.status, row.code, row.detail) == ("failed", "damaged", "the image is cut off")
    await refused(server, errors.Stale, outbox.fail(db, post, 2, "damaged", "again"))
    assert not server.client.exists(keys.making(0, "alice"))


async def test_attempts_that_are_returned_do_not_count(server, db):
    post = await make_processing(db, "alice")
    for _ in range(ATTEMPTS * 3):
        due = await lease_post(db, post)
        attempt, _ = await outbox.start_image(db, post, due.lease)
        assert attempt == 1
        await outbox.return_image(db, post, attempt, attempt - 1)
        with unchanged(server.client):
            await outbox.return_image(db, post, attempt, attempt - 1)
        db.clock += LEASE_MS
    assert (await posts.read(db, post)).status == "processing"


async def test_only_the_current_attempt_is_returned(server, db):
    post, other = await make_processing(db, "alice"), await make_post(db, "alice")
    for _ in range(2):
        due = await lease_post(db, post)
        attempt, _ = await outbox.start_image(db, post, due.lease)
        db.clock += ATTEMPTS * LEASE_MS
    with unchanged(server.client):
        for target, attempt in ((post, 1), (post, 3), (other, 0), (NOBODY, 1)):
            await outbox.return_image(db, target, attempt, 0)
    await outbox.return_image(db, post, 2, 0)
    due = await lease_post(db, post)
    assert (await outbox.start_image(db, post, due.lease))[0] == 1


async def test_a_retry_puts_only_posts_whose_attempts_are_exhausted_back(server, db):
    exhausted, damaged = await make_processing(db, "alice"), await make_processing(db, "alice")
    ready = await make_post(db, "alice")
    await outbox.fail(db, damaged, 0, "undecodable", "it is damaged")
    for _ in range(ATTEMPTS + 1):
        due = await lease_post(db, exhausted)
        await outbox.start_image(db, exhausted, due.lease)
        db.clock = int(server.client.zscore(keys.making(0, "alice"), exhausted) or db.clock)
    assert (await posts.read(db, exhausted)).code == "exhausted"
    server.client.hset("post:{0}:garbage", "status", "failed")
    assert await retry.retry(db) == 1
    row = await posts.read(db, exhausted)
    assert (row.status, row.code, row.detail) == ("processing", None, None)
    due = await lease_post(db, exhausted)
    assert (await outbox.start_image(db, exhausted, due.lease))[0] == 1
    with unchanged(server.client):
        assert await retry.retry(db) == 0
    assert [(await posts.read(db, post)).status for post in (damaged, ready)] == ["failed", "ready"]


async def test_an_earlier_attempt_may_publish_a_post_and_a_later_one_changes_nothing(server, db):
    post = await make_processing(db, "alice")
    for _ in range(3):
        due = await lease_post(db, post)
        await outbox.start_image(db, post, due.lease)
        db.clock = int(server.client.zscore(keys.making(0, "alice"), post))
    await outbox.publish(db, post, "thumbhash", (4712, 13001))
    assert (await posts.read(db, post)).status == "ready"
    assert [row.id for row in (await posts.feed(db, 1, 10)).posts] == [post]
    with unchanged(server.client):
        await outbox.publish(db, post, "thumbhash", (4712, 13001))
    await refused(server, errors.Stale, outbox.fail(db, post, 3, "damaged", "late"))
    await refused(server, errors.NoPost, outbox.publish(db, NOBODY, "never"))
    assert (await posts.read(db, post)).image == posts.Image("thumbhash", (4712, 13001))


async def test_a_jpeg_that_is_made_again_brings_its_own_scans_and_the_post_stays_where_it_is(server, db):
    post = await make_post(db, "alice")
    shown, revision = await posts.read(db, post), server.client.zscore(keys.changes(0), post)
    assert shown.image == posts.Image("thumbhash")
    await outbox.make_again(db, post)
    await outbox.publish(db, post, "thumbhash", (4712, 13001))
    assert await posts.read(db, post) == shown._replace(image=posts.Image("thumbhash", (4712, 13001)))
    assert server.client.zscore(keys.changes(0), post) > revision, "readers of the changes hear of it"
    assert not server.client.exists(keys.making(0, "alice"))
    assert server.client.zscore(keys.feed(0), post) == 0


async def test_a_post_from_before_scans_were_known_is_read_without_and_another_client_breaks_no_page(server, db):
    for field, image in {
        "1RcK": posts.Image("1RcK"),
        "1RcK 1 4712 13001": posts.Image("1RcK", (4712, 13001)),
        "1RcK one  2": posts.Image("1RcK", (), 2),
    }.items():
        post = await make_post(db, "alice")
        server.client.hset(keys.post(post), "thumbhash", field)
        assert (await posts.read(db, post)).image == image
        assert (await posts.feed(db, 1, 1)).posts[0].image == image


async def test_a_post_that_is_deleted_while_its_image_is_made_stays_deleted_and_leaves_no_object(server, db, store):
    post, upload = await create_post_with_chunks(db, store)
    due = await lease_post(db, post)
    await outbox.start_image(db, post, due.lease)
    await posts.delete(db, store, "alice", post)
    await refused(server, errors.NoPost, outbox.publish(db, post, "late"))
    await refused(server, errors.NoPost, outbox.fail(db, post, 1, "damaged", "late"))
    await refused(server, errors.NoPost, outbox.start_image(db, post, due.lease))
    await refused(server, errors.NoPost, posts.read(db, post))
    # The job does not know, and stores both objects.
    await store.put(keys.original(post), b"BM" + bytes(200))
    await posts.put_image(store, post, jpeg())
    await run_outbox(db, store)
    assert keys.image(post) not in await object_names(store)
    db.clock += DAY_MS + LEASE_MS
    await run_outbox(db, store)
    assert await object_names(store) == []
    assert not server.client.exists(keys.due(0))


# Erasing


async def test_a_ready_post_has_an_original_and_a_jpeg_and_no_chunk(server, db, store):
    post, upload = await create_post_with_chunks(db, store)
    await make_image(db, store, await lease_post(db, post))
    await run_outbox(db, store)
    assert await object_names(store) == [keys.image(post), keys.original(post)]
    assert (await posts.create(db, "alice", upload, ""))[0] == post
    assert 0 < server.client.pttl(keys.upload(upload)) <= DAY_MS
    assert not server.client.exists(keys.due(0))


async def test_chunks_stay_while_their_post_has_no_original(server, db, store):
    """The post is ready, but its original is missing, as after a restore."""
    post, upload = await create_post_with_chunks(db, store)
    await make_image(db, store, await lease_post(db, post))
    original = await store.get(keys.original(post))
    await store.delete([keys.original(post)])
    await run_outbox(db, store)
    chunks = [name for name in await object_names(store) if name.startswith("chunks/")]
    assert await join_chunks(db, store, upload) == original
    assert len(chunks) == 2


async def test_a_post_can_be_deleted_while_the_store_is_away_and_the_outbox_erases_its_jpeg_later(
    server, db, store, tmp_path
):
    post, _ = await create_post_with_chunks(db, store)
    await make_image(db, store, await lease_post(db, post))
    await run_outbox(db, store)
    await posts.delete(db, store_that_is_away(tmp_path), "alice", post)
    await refused(server, errors.NoPost, posts.read(db, post))
    assert keys.image(post) in await object_names(store)
    await run_outbox(db, store)
    assert await object_names(store) == [keys.original(post)]


@pytest.mark.parametrize("failed", [False, True], ids=["deleted", "failed"])
@pytest.mark.parametrize("late", [1, 29, 61, 119, JOB_MS // 1000 - 1])
async def test_a_jpeg_that_a_job_stores_after_its_post_ended_is_erased_within_half_a_minute(
    server, db, store, late, failed
):
    """The job was running when the post was deleted or failed. It is killed before it can erase its JPEG."""
    post, _ = await create_post_with_chunks(db, store)
    due = await lease_post(db, post)
    attempt, _ = await outbox.start_image(db, post, due.lease)
    if failed:
        await outbox.fail(db, post, attempt, "damaged", "it is damaged")
    else:
        await posts.delete(db, store, "alice", post)
    assert await seconds_readable(db, store, post, late) == []
    await posts.put_image(store, post, jpeg())
    assert len(await seconds_readable(db, store, post, 60)) <= 30
    db.clock += JOB_MS
    await run_outbox(db, store)
    assert keys.image(post) not in await object_names(store)
    assert (server.client.zscore(keys.due(0), post) is None) is failed


async def test_the_jpeg_of_a_deleted_post_is_erased_at_once_and_its_original_after_a_day(server, db, store):
    post, _ = await create_post_with_chunks(db, store)
    await make_image(db, store, await lease_post(db, post))
    await run_outbox(db, store)
    await comments.add(db, "bob", post, "a")
    db.clock += 7
    await posts.delete(db, store, "alice", post)
    assert await object_names(store) == [keys.original(post)]
    await run_outbox(db, store)
    db.clock += DAY_MS - 1
    await run_outbox(db, store)
    assert await object_names(store) == [keys.original(post)]
    db.clock += LEASE_MS + 1
    await run_outbox(db, store)
    assert await object_names(store) == []
    assert not server.client.exists(keys.due(0))
    assert await outbox.lease_images(db, 0, 10) == []  # this also removes alice from the turns
    assert {key.split(":")[0] for key in contents(server.client)} <= {"gone", "leaves", "upload"}


async def test_the_bytes_of_a_failed_post_stay_until_a_day_after_it_is_deleted(server, db, store):
    post, upload = await create_post_with_chunks(db, store)
    due = await lease_post(db, post)
    attempt, _ = await outbox.start_image(db, post, due.lease)
    await outbox.fail(db, post, attempt, "damaged", "it is damaged")
    before = await object_names(store)
    for _ in range(3):
        await run_outbox(db, store)
        db.clock += 10 * DAY_MS
    assert await object_names(store) == before and len(before) == 2
    await posts.delete(db, store, "alice", post)
    db.clock += DAY_MS - 1
    await run_outbox(db, store)
    assert await object_names(store) == before
    for _ in range(2):
        db.clock += LEASE_MS + 1
        await run_outbox(db, store)
    assert await object_names(store) == []
    assert not server.client.exists(keys.due(0))


# Kept backups and restores


@pytest.mark.parametrize("failed", [False, True], ids=["ready", "failed"])
async def test_the_bytes_of_a_deleted_post_outlive_every_backup_that_may_name_it(server, db, store, failed):
    post = await create_finished_post(db, store, failed)
    await add_kept_backup(store, 1, db.clock - 5000)
    db.clock += 10_000
    await posts.delete(db, store, "alice", post)
    left = await object_names(store)
    assert left
    for days in (1, 1, 30):  # verify fails for a month: so retention keeps the old backup, and the bytes stay
        db.clock += days * DAY_MS + LEASE_MS
        await run_outbox(db, store)
        await run_outbox(db, store)
        assert await object_names(store) == left
        await posts.delete(db, store, "bob", await make_post(db, "bob"))  # this forgets old deletions in `gone`
    db.clock += DAY_MS + LEASE_MS
    await add_kept_backup(store, 2, db.clock)
    await backup_store(store).delete([chain.description_name(1)])
    await run_outbox(db, store)
    assert await object_names(store) == []


@pytest.mark.parametrize("failed", [False, True], ids=["ready", "failed"])
async def test_the_bytes_of_a_deleted_post_outlive_younger_backups_of_an_abandoned_timeline(
    server, db, store, failed
):
    """The post was deleted in this timeline. In another one it still existed when a restore abandoned that timeline.

    A backup of the other timeline is younger than the deletion, and is still kept.
    """
    post = await create_finished_post(db, store, failed)
    await posts.delete(db, store, "alice", post)
    gone = server.client.zrange(keys.gone(0), 0, -1, withscores=True)
    left = await object_names(store)
    assert left
    db.clock += 10 * HOUR_MS
    await add_kept_backup(store, 2, db.clock)
    db.clock += 10 * HOUR_MS
    assert (await check.fit_restored(db, store, range(1))).flaws == 0
    for hours in (5, 20, 24):  # in the end the deletion and the restore are a day old, and the backup is still kept
        db.clock += hours * HOUR_MS
        await run_outbox(db, store)
        assert await object_names(store) == left
    assert server.client.zrange(keys.gone(0), 0, -1, withscores=True) == gone, "a restore changes no revision"
    await backup_store(store).delete([chain.description_name(2)])
    for _ in range(2):
        db.clock += DAY_MS
        await run_outbox(db, store)
    assert await object_names(store) == [] and not server.client.exists(keys.due(0))


@pytest.mark.parametrize("how", ["discarded", "expired", "joined"])
async def test_chunks_from_before_a_restore_outlive_the_backups_of_the_abandoned_timeline(
    server, db, store, monkeypatch, how
):
    """In that timeline the upload may have become a post whose only bytes these chunks are."""
    monkeypatch.setattr(keys.time, "time_ns", lambda: NOW * 1_000_000)  # when uploads are made
    post, upload = await create_post_with_chunks(db, store)
    if how != "joined":
        upload, _ = await uploads.create(db, "alice", 1, 1000)
        image = uploads.Appender(db, store, upload, 0, 1000)
        await image.write(b"BM" + bytes(200))
        await image.commit()
    left = [keys.chunk(upload, name) for name in (await uploads.inspect(db, upload)).chunks]
    await add_kept_backup(store, 1, db.clock)
    db.clock += 1000
    assert (await check.fit_restored(db, store, range(1))).flaws == 0
    if how == "discarded":
        await uploads.discard(db, store, "alice", upload)
    elif how == "expired":
        db.clock += 2 * DAY_MS
    else:
        await make_image(db, store, await lease_post(db, post))
    for _ in range(4):
        await run_outbox(db, store)
        db.clock += DAY_MS
        assert [name for name in await object_names(store) if upload in name] == left
    await backup_store(store).delete([chain.description_name(1)])
    for _ in range(2):
        await run_outbox(db, store)
        db.clock += DAY_MS
    assert not [name for name in await object_names(store) if upload in name]


async def test_an_original_outlives_a_base_that_was_complete_after_the_deletion(server, db, store):
    """A base holds the state in which its rewrite began, which may be from before the deletion."""
    post, _ = await create_post_with_chunks(db, store)
    await make_image(db, store, await lease_post(db, post))
    await posts.delete(db, store, "alice", post)
    await add_kept_backup(store, 1, db.clock + HOUR_MS // 2)
    db.clock += DAY_MS + LEASE_MS
    await run_outbox(db, store)
    assert keys.original(post) in await object_names(store)


async def test_while_the_backups_cannot_be_read_originals_stay_and_jpegs_are_erased(server, db, store):
    """One description is damaged. So the outbox does not know which moments the backups hold."""
    post, _ = await create_post_with_chunks(db, store)
    await make_image(db, store, await lease_post(db, post))
    await posts.delete(db, store, "alice", post)
    await add_kept_backup(store, 1, db.clock + 5000)
    await backup_store(store).put(chain.description_name(2), b"rubbish")
    for _ in range(3):
        await run_outbox(db, store)
        db.clock += DAY_MS + LEASE_MS
    assert await object_names(store) == [keys.original(post)]


async def test_the_backup_store_is_listed_once_for_many_posts(server, db, store):
    await add_kept_backup(store, 1, NOW - 5000)
    backup = CountingStore(backup_store(store))
    may_name = KeptBackups(backup).may_name
    for number in range(20):
        await posts.delete(db, store, f"user{number}", await make_post(db, f"user{number}"))
    db.clock += DAY_MS + LEASE_MS
    due = [due for due in await outbox.lease(db, 0) if due.kind == "erase"]
    lists = []
    for one in due:
        await outbox.erase(db, store, may_name, one, DAY_MS)
        lists.append(backup.lists)
    assert len(due) == 20 and lists == [2] * 20, "its descriptions, and the nodes of a Cluster"
    assert {int(server.client.zscore(keys.due(0), one.id)) for one in due} == {db.clock + DAY_MS}


async def test_a_backup_that_is_removed_while_it_is_read_delays_the_erasing_by_a_day(server, db, store):
    post = await make_post(db, "alice")
    await store.put(keys.original(post), b"BM" + bytes(100))
    await posts.delete(db, store, "alice", post)
    await add_kept_backup(store, 1, NOW - 5000)
    db.clock += DAY_MS + LEASE_MS
    backup = CountingStore(backup_store(store), vanishing=True)
    await outbox.erase(db, store, KeptBackups(backup).may_name, await lease_erasure(db, post), DAY_MS)
    assert await object_names(store) == [keys.original(post)]
    db.clock += DAY_MS
    await outbox.erase(db, store, KeptBackups(backup).may_name, await lease_erasure(db, post), DAY_MS)
    assert await object_names(store) == []


async def test_an_expired_lease_that_was_given_again_changes_nothing(server, db, store):
    post, _ = await create_post_with_chunks(db, store)
    await make_image(db, store, await lease_post(db, post))
    await run_outbox(db, store)
    await posts.delete(db, store, "alice", post)
    stale = await lease_erasure(db, post)
    db.clock += LEASE_MS
    current = await lease_erasure(db, post)
    with unchanged(server.client):
        await outbox.erase(db, store, KeptBackups(backup_store(store)).may_name, stale, DAY_MS)
    await outbox.erase(db, store, KeptBackups(backup_store(store)).may_name, current, DAY_MS)
    assert int(server.client.zscore(keys.due(0), post)) > db.clock


async def test_dispatchers_that_lease_at_the_same_time_share_the_work(server, db):
    created = {await make_processing(db, f"user{n}") for n in range(40)}
    answers = await asyncio.gather(*(outbox.lease_images(db, 0, 3) for _ in range(20)))
    leases = [image.id for images in answers for image in images]
    assert len(leases) == len(set(leases)) and set(leases) == created


# Originals


async def test_a_late_attempt_leaves_the_original_that_another_attempt_stored(server, db, store):
    """The late one found no original. Before it reads the chunks, another one publishes and the chunks are erased."""
    post, upload = await create_post_with_chunks(db, store)
    paused, copy = Paused(store._root), io.BytesIO()
    late = asyncio.create_task(originals.store(db, paused, post, upload, copy))
    await paused.missed.wait()
    await originals.store(db, store, post, upload, io.BytesIO())
    await posts.put_image(store, post, jpeg())
    await outbox.publish(db, post, "thumbhash")
    await run_outbox(db, store)
    assert await object_names(store) == [keys.image(post), keys.original(post)]
    paused.go_on.set()
    with pytest.raises(NotFound):
        await late
    assert await store.get(keys.original(post)) == b"BM" + bytes(200)
    assert copy.getvalue() == b""


@pytest.mark.parametrize("lost", [1, 2])
async def test_no_original_is_stored_where_chunks_of_the_upload_are_missing(server, db, store, lost):
    post, upload = await create_post_with_chunks(db, store)
    server.client.rpop(keys.chunks(upload), lost)
    before = await object_names(store)
    with unchanged(server.client), pytest.raises(NotFound):
        await originals.store(db, store, post, upload, io.BytesIO())
    assert await object_names(store) == before


async def test_an_upload_without_a_length_is_joined_too(server, db, store):
    """Older versions removed the length of an upload when it became a post."""
    post, upload = await create_post_with_chunks(db, store)
    assert server.client.hgetall(keys.upload(upload)) == {"owner": "alice", "post": post, "length": "202"}
    server.client.hdel(keys.upload(upload), "length")
    copy = io.BytesIO()
    await originals.store(db, store, post, upload, copy)
    assert await store.get(keys.original(post)) == copy.getvalue() == b"BM" + bytes(200)
