"""The outbox: leases that come back, attempts that are counted, and what deleted posts leave."""

import asyncio
import io

import pytest
from conftest import NOBODY, connect
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

NOW = 1_763_971_200_000


@pytest.fixture
async def db(server):
    db = connect(server)
    db.clock = NOW
    yield db
    await db.close()


async def leased(db, post: str) -> outbox.ImageWork:
    return next(image for image in await outbox.lease_images(db, 0, 10) if image.id == post)


async def erasure(db, post: str) -> outbox.DueEntry:
    return next(due for due in await outbox.lease(db, 0) if due.id == post)


async def refused(server, db, error, work):
    with unchanged(server.client), pytest.raises(error) as raised:
        await work
    assert raised.type is error and str(raised.value)


async def names(store) -> list[str]:
    return [entry.name async for entry in store.list("")]


async def stored_post(db, store) -> tuple[str, str]:
    """A processing post of two real chunks, and its upload."""
    async with uploads.form_upload(db, store, "alice", 1) as image:
        await image.write(b"BM" + bytes(100))
        await image.commit()
        await image.write(bytes(100))
        await image.finish()
    post, _ = await posts.create(db, "alice", image.upload, "")
    return post, image.upload


async def make_image(db, store, due: outbox.ImageWork) -> None:
    """What the job does, without the picture."""
    attempt, upload = await outbox.start_image(db, due.id, due.lease)
    whole = b"".join([await store.get(keys.chunk(upload, n)) for n in (await uploads.inspect(db, upload)).chunks])
    await store.put(keys.original(due.id), whole)
    await posts.put_image(store, due.id, jpeg())
    await outbox.publish(db, due.id, "thumbhash")


async def test_a_post_is_leased_once_and_again_when_its_lease_has_run_out(server, db):
    post = await make_processing(db, "alice")
    first = await leased(db, post)
    assert first.lease == NOW + LEASE_MS
    assert await outbox.lease_images(db, 0, 10) == []
    db.clock += LEASE_MS - 1
    with unchanged(server.client):
        assert await outbox.lease_images(db, 0, 10) == []
    db.clock += 1
    second = await leased(db, post)
    assert second.lease == first.lease + LEASE_MS
    await refused(server, db, errors.Stale, outbox.start_image(db, post, first.lease))
    db.clock += 1
    assert (await outbox.start_image(db, post, second.lease))[0] == 1
    await refused(server, db, errors.Stale, outbox.start_image(db, post, second.lease))


async def test_no_more_is_leased_than_there_is_room_for(server, db):
    made = sorted([await make_processing(db, f"user{n}") for n in range(5)])
    with unchanged(server.client):
        assert await outbox.lease_images(db, 0, 0) == []
    found = []
    for room in (2, 2, 2):
        found.append([image.id for image in await outbox.lease_images(db, 0, room)])
    assert [len(ids) for ids in found] == [2, 2, 1]
    assert sorted(sum(found, [])) == made


async def test_erasing_does_not_wait_behind_posts_for_which_there_is_no_room(server, db, store):
    deleted = await make_post(db, "alice")
    for _ in range(30):
        await make_processing(db, "alice")
    await posts.delete(db, store, "alice", deleted)
    assert [due.id for due in await outbox.lease(db, 0) if due.kind == "erase"] == [deleted]
    assert len(await outbox.lease_images(db, 0, 100)) == 30


async def queued(db, author: str, count: int, partitions: int = 1) -> None:
    for _ in range(count):
        await make_processing(db, author, partitions)


async def turn(db) -> str:
    """Whose post is handed out next."""
    (image,) = await outbox.lease_images(db, 0, 1)
    return (await posts.read(db, image.id)).author


async def show(db, store) -> str:
    """Hand out one post and make its image. Its author."""
    (image,) = await outbox.lease_images(db, 0, 1)
    author = (await posts.read(db, image.id)).author
    await outbox.start_image(db, image.id, image.lease)
    await outbox.publish(db, image.id, "thumbhash")
    return author


@pytest.mark.parametrize("apart", [0, 1, 1000, 59_000], ids=lambda ms: f"{ms} ms")
async def test_no_author_waits_behind_the_posts_of_another(server, db, apart):
    """One post of alice's is under way and one is at hand, when bob's comes."""
    await queued(db, "alice", 30)
    for _ in range(2):
        assert await turn(db) == "alice"
        db.clock += apart
    await queued(db, "bob", 1)
    assert [await turn(db) for _ in range(3)] == ["bob", "alice", "alice"]


@pytest.mark.parametrize("looked", [False, True])
async def test_who_posted_a_moment_ago_waits_no_longer(server, db, looked):
    """Bob's first post is ready when alice queues hers. Between, the dispatcher may have found nothing to hand out."""
    first = await make_processing(db, "bob")
    assert await turn(db) == "bob"
    if looked:
        assert await outbox.lease_images(db, 0, 1) == []
    db.clock += 500
    await outbox.publish(db, first, "thumbhash")
    await queued(db, "alice", 30)
    for _ in range(2):
        db.clock += 500
        assert await turn(db) == "alice"
    db.clock += 500
    await queued(db, "bob", 1)
    assert [await turn(db) for _ in range(3)] == ["bob", "alice", "alice"]


async def test_turns_go_round_also_within_one_call_and_one_millisecond(server, db):
    for author, count in (("zoe", 5), ("alice", 4), ("mallory", 6)):
        await queued(db, author, count)
        db.clock += 1
    images = await outbox.lease_images(db, 0, 4)
    images += await outbox.lease_images(db, 0, 20)
    authors = [(await posts.read(db, image.id)).author for image in images]
    assert authors == ["zoe", "alice", "mallory"] * 4 + ["zoe", "mallory"] + ["mallory"]
    by_author = [[image.id for image, author in zip(images, authors, strict=True) if author == one] for one in authors]
    assert all(ids == sorted(ids) for ids in by_author)  # the oldest post of each first


async def test_a_post_at_a_time_gains_nothing_over_many_at_once(server, db, store):
    """Mallory posts again the moment her post is ready, and the moment it is handed out."""
    await queued(db, "carol", 30)
    await queued(db, "dave", 30)
    served = []
    for number in range(30):
        if "mallory" not in served[-1:]:
            await queued(db, "mallory", 1)
        served.append(await show(db, store))
        db.clock += 1 + number % 3
    assert max(served.count(one) for one in ("carol", "dave", "mallory")) <= 11


async def test_new_users_hold_up_nobody_for_longer_than_their_head_start(server, db):
    await queued(db, "alice", 3)
    assert await turn(db) == "alice"
    began = db.clock
    for number in range(4 * LEASE_MS // 1000):
        db.clock += 1000
        await queued(db, f"new{number}", 1)
        if await turn(db) == "alice":
            break
    assert 0 < db.clock - began <= 2 * LEASE_MS + 1000


async def test_who_has_nothing_to_make_leaves_the_turns(server, db, store):
    await make_post(db, "alice")
    doomed = await make_processing(db, "bob")
    await posts.delete(db, store, "bob", doomed)
    assert await outbox.lease_images(db, 0, 1) == []
    assert not server.client.exists(keys.turns(0), keys.making(0, "alice"), keys.making(0, "bob"))


async def test_what_is_no_work_is_not_handed_out_and_does_not_stay(server, db):
    """As no script leaves it: a post that is not there, and one that has failed."""
    failed, post = await make_processing(db, "alice"), await make_processing(db, "alice")
    await outbox.fail(db, failed, 0, "damaged", "it is damaged")
    server.client.zadd(keys.making(0, "alice"), {NOBODY: 0, failed: 0})
    assert [image.id for image in await outbox.lease_images(db, 0, 9)] == [post]
    assert server.client.zrange(keys.making(0, "alice"), 0, -1) == [post]


async def test_a_post_that_waits_for_later_does_not_hold_up_its_authors_next_one(server, db):
    first = await make_processing(db, "alice")
    await leased(db, first)
    assert await outbox.lease_images(db, 0, 1) == []
    db.clock += 5
    second = await make_processing(db, "alice")
    assert [image.id for image in await outbox.lease_images(db, 0, 9)] == [second]
    db.clock = NOW + LEASE_MS
    assert [image.id for image in await outbox.lease_images(db, 0, 9)] == [first]


JUMPS = [90_000, 10 * LEASE_MS, 365 * DAY_MS]


@pytest.mark.parametrize("ms", JUMPS)
@pytest.mark.parametrize("script", ["create_post", "lease_images", "start_image"])
async def test_a_clock_that_jumped_forward_delays_a_post_by_no_more_than_its_lease(server, db, script, ms):
    other = await make_processing(db, "bob")
    if script == "create_post":
        db.clock += ms
    post = await make_processing(db, "alice")
    if script == "lease_images":
        db.clock += ms
    if script != "create_post":
        image = await leased(db, post)
    if script == "start_image":
        db.clock += ms
        await outbox.start_image(db, post, image.lease)
    assert await outbox.lease_images(db, 0, 0) == []
    db.clock = NOW + 1000
    found = {image.id for image in await outbox.lease_images(db, 0, 9)}
    db.clock += LEASE_MS
    found |= {image.id for image in await outbox.lease_images(db, 0, 9)}
    assert found == {post, other}


async def test_a_clock_that_jumped_delays_no_other_post_of_the_same_author(server, db):
    for post in [await make_post(db, "alice") for _ in range(100)]:
        await check.make_again(db, post)
    db.clock += 365 * DAY_MS
    assert len(await outbox.lease_images(db, 0, 80)) == 80
    db.clock = NOW
    assert len(await outbox.lease_images(db, 0, 200)) == 100


async def test_a_long_lease_is_not_taken_for_that_of_a_wrong_clock(server, db):
    post = await make_processing(db, "alice")
    for attempt in range(ATTEMPTS):
        image = await leased(db, post)
        await outbox.start_image(db, post, image.lease)
        until = db.clock + LEASE_MS * 2**attempt
        while db.clock < until:
            assert await outbox.lease_images(db, 0, 9) == []
            db.clock += LEASE_MS // 2


async def as_before(server, author: str, post: str, score: int) -> None:
    """Data as it was when image work stood in `due`."""
    server.client.zrem(keys.making(0, author), post)
    server.client.zrem(keys.turns(0), author)
    server.client.zadd(keys.due(0), {post: score})


async def test_image_work_of_former_data_moves_to_its_authors_by_itself(server, db):
    made = {author: [await make_processing(db, author) for _ in range(3)] for author in ("alice", "bob")}
    remade, failed = await make_post(db, "carol"), await make_processing(db, "dave")
    await outbox.fail(db, failed, 0, "damaged", "it is damaged")
    for author, ids in {**made, "carol": [remade], "dave": [failed]}.items():
        for post in ids:
            await as_before(server, author, post, NOW)
    assert {due.id for due in await outbox.lease(db, 0) if due.kind == "erase"} == {failed}
    assert all(id.startswith("u") or id == failed for id in server.client.zrange(keys.due(0), 0, -1))
    images = await outbox.lease_images(db, 0, 99)
    assert sorted(image.id for image in images) == sorted([*sum(made.values(), []), remade])
    for image in images:
        await outbox.start_image(db, image.id, image.lease)


async def test_attempts_have_more_time_each_and_when_all_are_used_the_post_has_failed(server, db):
    post = await make_processing(db, "alice")
    spans = []
    for attempt in range(1, ATTEMPTS + 1):
        due = await leased(db, post)
        assert (await outbox.start_image(db, post, due.lease))[0] == attempt
        until = int(server.client.zscore(keys.making(0, "alice"), post))
        spans.append((until - db.clock) // LEASE_MS)
        db.clock = until
    assert spans == [2**n for n in range(ATTEMPTS)]
    due = await leased(db, post)
    assert (await outbox.start_image(db, post, due.lease))[0] == 0
    row = await posts.read(db, post)
    assert (row.status, row.code) == ("failed", "exhausted")
    assert row.detail == f"the image could not be made in {ATTEMPTS} attempts"
    assert not server.client.exists(keys.making(0, "alice"))
    assert (await erasure(db, post)).ended == db.clock
    await refused(server, db, errors.Stale, outbox.start_image(db, post, due.lease))
    await refused(server, db, errors.Stale, outbox.publish(db, post, "too late"))
    await refused(server, db, errors.Failed, comments.add(db, "bob", post, "a"))
    assert not (await posts.feed(db, 1, 10)).posts


async def test_work_that_only_waited_is_no_attempt(server, db):
    post = await make_processing(db, "alice")
    for _ in range(ATTEMPTS * 3):
        due = await leased(db, post)
        db.clock = due.lease
    due = await leased(db, post)
    assert (await outbox.start_image(db, post, due.lease))[0] == 1


async def test_only_the_current_attempt_fails_a_post(server, db):
    post = await make_processing(db, "alice")
    due = await leased(db, post)
    await outbox.start_image(db, post, due.lease)
    db.clock += LEASE_MS
    due = await leased(db, post)
    assert (await outbox.start_image(db, post, due.lease))[0] == 2
    await refused(server, db, errors.Stale, outbox.fail(db, post, 1, "damaged", "late"))
    await refused(server, db, errors.Stale, outbox.fail(db, post, 3, "damaged", "early"))
    await refused(server, db, errors.NoPost, outbox.fail(db, NOBODY, 1, "damaged", "never"))
    await outbox.fail(db, post, 2, "damaged", "the image is cut off")
    assert ((row := await posts.read(db, post)).status, row.code, row.detail) == (
        "failed",
        "damaged",
        "the image is cut off",
    )
    await refused(server, db, errors.Stale, outbox.fail(db, post, 2, "damaged", "again"))
    assert not server.client.exists(keys.making(0, "alice"))


async def test_attempts_that_are_taken_back_do_not_count(server, db):
    post = await make_processing(db, "alice")
    for _ in range(ATTEMPTS * 3):
        due = await leased(db, post)
        attempt, _ = await outbox.start_image(db, post, due.lease)
        assert attempt == 1
        await outbox.return_image(db, post, attempt, attempt - 1)
        with unchanged(server.client):
            await outbox.return_image(db, post, attempt, attempt - 1)
        db.clock += LEASE_MS
    assert (await posts.read(db, post)).status == "processing"


async def test_only_the_current_attempt_is_taken_back(server, db):
    post, other = await make_processing(db, "alice"), await make_post(db, "alice")
    for _ in range(2):
        due = await leased(db, post)
        attempt, _ = await outbox.start_image(db, post, due.lease)
        db.clock += ATTEMPTS * LEASE_MS
    with unchanged(server.client):
        for id, number in ((post, 1), (post, 3), (other, 0), (NOBODY, 1)):
            await outbox.return_image(db, id, number, 0)
    await outbox.return_image(db, post, 2, 0)
    due = await leased(db, post)
    assert (await outbox.start_image(db, post, due.lease))[0] == 1


async def test_posts_whose_attempts_are_exhausted_are_handed_out_again(server, db):
    exhausted, damaged = await make_processing(db, "alice"), await make_processing(db, "alice")
    ready = await make_post(db, "alice")
    await outbox.fail(db, damaged, 0, "undecodable", "it is damaged")
    for _ in range(ATTEMPTS + 1):
        due = await leased(db, exhausted)
        await outbox.start_image(db, exhausted, due.lease)
        db.clock = int(server.client.zscore(keys.making(0, "alice"), exhausted) or db.clock)
    assert (await posts.read(db, exhausted)).code == "exhausted"
    server.client.hset("post:{0}:garbage", "status", "failed")
    assert await retry.retry(db) == 1
    row = await posts.read(db, exhausted)
    assert (row.status, row.code, row.detail) == ("processing", None, None)
    due = await leased(db, exhausted)
    assert (await outbox.start_image(db, exhausted, due.lease))[0] == 1
    with unchanged(server.client):
        assert await retry.retry(db) == 0
    assert [(await posts.read(db, post)).status for post in (damaged, ready)] == ["failed", "ready"]


async def test_any_attempt_publishes_a_post(server, db):
    post = await make_processing(db, "alice")
    for _ in range(3):
        due = await leased(db, post)
        await outbox.start_image(db, post, due.lease)
        db.clock = int(server.client.zscore(keys.making(0, "alice"), post))
    await outbox.publish(db, post, "of the first attempt")
    assert (await posts.read(db, post)).status == "ready"
    assert [row.id for row in (await posts.feed(db, 1, 10)).posts] == [post]
    with unchanged(server.client):
        await outbox.publish(db, post, "of the third attempt")
    await refused(server, db, errors.Stale, outbox.fail(db, post, 3, "damaged", "late"))
    await refused(server, db, errors.NoPost, outbox.publish(db, NOBODY, "never"))
    assert (await posts.read(db, post)).thumbhash == "of the first attempt"


async def test_a_post_deleted_while_its_image_is_made_stays_deleted_and_leaves_nothing(server, db, store):
    post, upload = await stored_post(db, store)
    due = await leased(db, post)
    await outbox.start_image(db, post, due.lease)
    await posts.delete(db, store, "alice", post)
    await refused(server, db, errors.NoPost, outbox.publish(db, post, "late"))
    await refused(server, db, errors.NoPost, outbox.fail(db, post, 1, "damaged", "late"))
    await refused(server, db, errors.NoPost, outbox.start_image(db, post, due.lease))
    await refused(server, db, errors.NoPost, posts.read(db, post))
    # The job joined and put all the same.
    await store.put(keys.original(post), b"BM" + bytes(200))
    await posts.put_image(store, post, jpeg())
    await work_off(db, store)
    assert keys.image(post) not in await names(store)
    db.clock += DAY_MS + LEASE_MS
    await work_off(db, store)
    assert await names(store) == []
    assert not server.client.exists(keys.due(0))


def backups(store) -> Folder:
    """The backup store beside a store."""
    return Folder(store._root.parent / "backup")


async def work_off(db, store) -> None:
    """What the dispatcher does at this moment."""
    for due in await outbox.lease(db, 0):
        end = outbox.end_upload if due.kind == "upload" else outbox.erase
        await end(db, store, KeptBackups(backups(store)).may_name, due, DAY_MS)


async def test_a_ready_post_has_its_original_and_image_and_no_chunk(server, db, store):
    post, upload = await stored_post(db, store)
    await make_image(db, store, await leased(db, post))
    await work_off(db, store)
    assert await names(store) == [keys.image(post), keys.original(post)]
    assert (await posts.create(db, "alice", upload, ""))[0] == post
    assert 0 < server.client.pttl(keys.upload(upload)) <= DAY_MS
    assert not server.client.exists(keys.due(0))


async def test_chunks_stay_as_long_as_no_original_is_seen(server, db, store):
    """The outbox looks at an upload whose post is ready; its original is missing, as after a restore."""
    post, upload = await stored_post(db, store)
    await make_image(db, store, await leased(db, post))
    original = await store.get(keys.original(post))
    await store.delete([keys.original(post)])
    await work_off(db, store)
    chunks = [name for name in await names(store) if name.startswith("chunks/")]
    assert (
        b"".join([await store.get(keys.chunk(upload, n)) for n in (await uploads.inspect(db, upload)).chunks])
        == original
    )
    assert len(chunks) == 2


def unplugged(folder):
    """A store that is out of reach: its folder is a file."""
    store = Folder(folder / "away")
    (folder / "away").rmdir()
    (folder / "away").touch()
    return store


async def test_a_post_is_deleted_while_the_store_is_away_and_the_outbox_erases_its_image(
    server, db, store, tmp_path
):
    post, _ = await stored_post(db, store)
    await make_image(db, store, await leased(db, post))
    await work_off(db, store)
    await posts.delete(db, unplugged(tmp_path), "alice", post)
    await refused(server, db, errors.NoPost, posts.read(db, post))
    assert keys.image(post) in await names(store)
    await work_off(db, store)
    assert await names(store) == [keys.original(post)]


async def served(db, store, post: str, seconds: int) -> list[int]:
    """The seconds at whose end the image of a post can be read, while the outbox works each second."""
    found = []
    for second in range(seconds):
        await work_off(db, store)
        if keys.image(post) in await names(store):
            found.append(second)
        db.clock += 1000
    return found


@pytest.mark.parametrize("failed", [False, True], ids=["deleted", "failed"])
@pytest.mark.parametrize("late", [1, 29, 61, 119, JOB_MS // 1000 - 1])
async def test_an_image_that_a_job_stores_after_its_post_ended_is_served_for_half_a_minute(
    server, db, store, late, failed
):
    """The job was running when the post was deleted or failed, and dies before it hears of it."""
    post, _ = await stored_post(db, store)
    due = await leased(db, post)
    attempt, _ = await outbox.start_image(db, post, due.lease)
    if failed:
        await outbox.fail(db, post, attempt, "damaged", "it is damaged")
    else:
        await posts.delete(db, store, "alice", post)
    assert await served(db, store, post, late) == []
    await posts.put_image(store, post, jpeg())
    assert len(await served(db, store, post, 60)) <= 30
    db.clock += JOB_MS
    await work_off(db, store)
    assert keys.image(post) not in await names(store)
    assert (server.client.zscore(keys.due(0), post) is None) is failed


async def test_a_deleted_posts_image_goes_at_once_and_its_original_after_a_day(server, db, store):
    post, _ = await stored_post(db, store)
    await make_image(db, store, await leased(db, post))
    await work_off(db, store)
    await comments.add(db, "bob", post, "a")
    db.clock += 7
    await posts.delete(db, store, "alice", post)
    assert await names(store) == [keys.original(post)]
    await work_off(db, store)
    db.clock += DAY_MS - 1
    await work_off(db, store)
    assert await names(store) == [keys.original(post)]
    db.clock += LEASE_MS + 1
    await work_off(db, store)
    assert await names(store) == []
    assert not server.client.exists(keys.due(0))
    assert await outbox.lease_images(db, 0, 10) == []  # takes alice's turn away
    assert {key.split(":")[0] for key in contents(server.client)} <= {"gone", "upload"}


async def test_a_failed_posts_bytes_stay_until_it_is_deleted_and_for_a_day(server, db, store):
    post, upload = await stored_post(db, store)
    due = await leased(db, post)
    attempt, _ = await outbox.start_image(db, post, due.lease)
    await outbox.fail(db, post, attempt, "damaged", "it is damaged")
    before = await names(store)
    for _ in range(3):
        await work_off(db, store)
        db.clock += 10 * DAY_MS
    assert await names(store) == before and len(before) == 2
    await posts.delete(db, store, "alice", post)
    db.clock += DAY_MS - 1
    await work_off(db, store)
    assert await names(store) == before
    for _ in range(2):
        db.clock += LEASE_MS + 1
        await work_off(db, store)
    assert await names(store) == []
    assert not server.client.exists(keys.due(0))


async def describe(store, generation: int, ms: int) -> None:
    """A kept backup whose base is of that moment, as the shipper describes it."""
    body = chain.seal({"generation": generation, "second": ms // 1000}, b"")
    await backups(store).put(chain.description_name(generation), body)


@pytest.mark.parametrize("failed", [False, True], ids=["ready", "failed"])
async def test_the_bytes_of_a_deleted_post_outlive_every_backup_that_may_name_it(server, db, store, failed):
    post, _ = await stored_post(db, store)
    due = await leased(db, post)
    if failed:
        attempt, _ = await outbox.start_image(db, post, due.lease)
        await outbox.fail(db, post, attempt, "damaged", "it is damaged")
    else:
        await make_image(db, store, due)
    await work_off(db, store)
    await describe(store, 1, db.clock - 5000)
    db.clock += 10_000
    await posts.delete(db, store, "alice", post)
    left = await names(store)
    assert left
    for days in (1, 1, 30):  # verify fails for a month: the old backup stays, and this with it
        db.clock += days * DAY_MS + LEASE_MS
        await work_off(db, store)
        await work_off(db, store)
        assert await names(store) == left
        await posts.delete(db, store, "bob", await make_post(db, "bob"))  # which forgets what is told of no more
    db.clock += DAY_MS + LEASE_MS
    await describe(store, 2, db.clock)
    await backups(store).delete([chain.description_name(1)])
    await work_off(db, store)
    assert await names(store) == []


HOUR_MS = 3_600_000


@pytest.mark.parametrize("failed", [False, True], ids=["ready", "failed"])
async def test_what_a_deleted_post_left_outlives_the_younger_backups_of_a_timeline_that_a_restore_left(
    server, db, store, failed
):
    """The post was deleted here. It lived on in a timeline that was left later, and whose backup is still kept."""
    post, _ = await stored_post(db, store)
    due = await leased(db, post)
    if failed:
        attempt, _ = await outbox.start_image(db, post, due.lease)
        await outbox.fail(db, post, attempt, "damaged", "it is damaged")
    else:
        await make_image(db, store, due)
    await work_off(db, store)
    await posts.delete(db, store, "alice", post)
    gone = server.client.zrange(keys.gone(0), 0, -1, withscores=True)
    left = await names(store)
    assert left
    db.clock += 10 * HOUR_MS
    await describe(store, 2, db.clock)
    db.clock += 10 * HOUR_MS
    assert (await check.fit_restored(db, store, 1)).flaws == 0
    for hours in (5, 20, 24):  # the deletion is a day old, the restore is, the backup is still kept
        db.clock += hours * HOUR_MS
        await work_off(db, store)
        assert await names(store) == left
    assert server.client.zrange(keys.gone(0), 0, -1, withscores=True) == gone, "revisions stay as they are"
    await backups(store).delete([chain.description_name(2)])
    for _ in range(2):
        db.clock += DAY_MS
        await work_off(db, store)
    assert await names(store) == [] and not server.client.exists(keys.due(0))


@pytest.mark.parametrize("how", ["discarded", "expired", "joined"])
async def test_chunks_from_before_a_restore_outlive_the_backups_of_the_timeline_that_was_left(
    server, db, store, monkeypatch, how
):
    """There the upload may have become a post that has no other bytes."""
    monkeypatch.setattr(keys.time, "time_ns", lambda: NOW * 1_000_000)  # when uploads are made
    post, upload = await stored_post(db, store)
    if how != "joined":
        upload, _ = await uploads.create(db, "alice", 1, 1000)
        image = uploads.Appender(db, store, upload, 0, 1000)
        await image.write(b"BM" + bytes(200))
        await image.commit()
    left = [keys.chunk(upload, name) for name in (await uploads.inspect(db, upload)).chunks]
    await describe(store, 1, db.clock)
    db.clock += 1000
    assert (await check.fit_restored(db, store, 1)).flaws == 0
    if how == "discarded":
        await uploads.discard(db, store, "alice", upload)
    elif how == "expired":
        db.clock += 2 * DAY_MS
    else:
        await make_image(db, store, await leased(db, post))
    for _ in range(4):
        await work_off(db, store)
        db.clock += DAY_MS
        assert [name for name in await names(store) if upload in name] == left
    await backups(store).delete([chain.description_name(1)])
    for _ in range(2):
        await work_off(db, store)
        db.clock += DAY_MS
    assert not [name for name in await names(store) if upload in name]


async def test_a_base_that_was_complete_after_a_deletion_may_name_the_post(server, db, store):
    """A base holds the moment at which its rewrite began."""
    post, _ = await stored_post(db, store)
    await make_image(db, store, await leased(db, post))
    await posts.delete(db, store, "alice", post)
    await describe(store, 1, db.clock + HOUR_MS // 2)
    db.clock += DAY_MS + LEASE_MS
    await work_off(db, store)
    assert keys.original(post) in await names(store)


async def test_a_backup_store_that_is_away_keeps_originals_and_hinders_nothing_else(server, db, store):
    post, _ = await stored_post(db, store)
    await make_image(db, store, await leased(db, post))
    await posts.delete(db, store, "alice", post)
    await describe(store, 1, db.clock + 5000)
    await backups(store).put(chain.description_name(2), b"rubbish")
    for _ in range(3):
        await work_off(db, store)
        db.clock += DAY_MS + LEASE_MS
    assert await names(store) == [keys.original(post)]


class Counted:
    """A backup store as it is, that counts the looks into it, and whose objects may go once they are listed."""

    def __init__(self, store, going: bool = False):
        self.store, self.going, self.looks = store, going, 0

    async def list(self, prefix):
        self.looks += 1
        async for entry in self.store.list(prefix):
            yield entry

    async def get(self, name):
        if self.going:
            await self.store.delete([name])
        return await self.store.get(name)


async def test_the_backup_store_is_asked_once_for_many_posts(server, db, store):
    await describe(store, 1, NOW - 5000)
    backup = Counted(backups(store))
    kept = KeptBackups(backup).may_name
    for number in range(20):
        await posts.delete(db, store, f"user{number}", await make_post(db, f"user{number}"))
    db.clock += DAY_MS + LEASE_MS
    due = [due for due in await outbox.lease(db, 0) if due.kind == "erase"]
    for one in due:
        await outbox.erase(db, store, kept, one, DAY_MS)
    assert len(due) == 20 and backup.looks == 1
    assert {int(server.client.zscore(keys.due(0), one.id)) for one in due} == {db.clock + DAY_MS}


async def test_a_backup_that_is_removed_while_it_is_asked_for_keeps_originals_a_day_longer(server, db, store):
    post = await make_post(db, "alice")
    await store.put(keys.original(post), b"BM" + bytes(100))
    await posts.delete(db, store, "alice", post)
    await describe(store, 1, NOW - 5000)
    db.clock += DAY_MS + LEASE_MS
    backup = Counted(backups(store), going=True)
    await outbox.erase(db, store, KeptBackups(backup).may_name, await erasure(db, post), DAY_MS)
    assert await names(store) == [keys.original(post)]
    db.clock += DAY_MS
    await outbox.erase(db, store, KeptBackups(backup).may_name, await erasure(db, post), DAY_MS)
    assert await names(store) == []


async def test_a_lease_that_was_given_again_settles_nothing(server, db, store):
    post, _ = await stored_post(db, store)
    await make_image(db, store, await leased(db, post))
    await work_off(db, store)
    await posts.delete(db, store, "alice", post)
    stale = await erasure(db, post)
    db.clock += LEASE_MS
    current = await erasure(db, post)
    with unchanged(server.client):
        await outbox.erase(db, store, KeptBackups(backups(store)).may_name, stale, DAY_MS)
    await outbox.erase(db, store, KeptBackups(backups(store)).may_name, current, DAY_MS)
    assert int(server.client.zscore(keys.due(0), post)) > db.clock


async def test_dispatchers_that_lease_at_the_same_time_share_the_work(server, db):
    made = {await make_processing(db, f"user{n}") for n in range(40)}
    answers = await asyncio.gather(*(outbox.lease_images(db, 0, 3) for _ in range(20)))
    found = [due.id for answer in answers for due in answer]
    assert len(found) == len(set(found)) == len(made) and set(found) == made


# Originals


class Paused(Folder):
    """Waits where an object is missing, before it says so."""

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


async def test_an_attempt_that_is_late_leaves_the_original_of_another_as_it_is(server, db, store):
    """It saw no original. Before it looks for the chunks, another attempt publishes and the chunks are erased."""
    post, upload = await stored_post(db, store)
    paused, copy = Paused(store._root), io.BytesIO()
    late = asyncio.create_task(originals.store(db, paused, post, upload, copy))
    await paused.missed.wait()
    await originals.store(db, store, post, upload, io.BytesIO())
    await posts.put_image(store, post, jpeg())
    await outbox.publish(db, post, "thumbhash")
    await work_off(db, store)
    assert await names(store) == [keys.image(post), keys.original(post)]
    paused.go_on.set()
    with pytest.raises(NotFound):
        await late
    assert await store.get(keys.original(post)) == b"BM" + bytes(200)
    assert copy.getvalue() == b""


@pytest.mark.parametrize("lost", [1, 2])
async def test_no_original_is_stored_that_is_shorter_than_its_upload(server, db, store, lost):
    post, upload = await stored_post(db, store)
    server.client.rpop(keys.chunks(upload), lost)
    before = await names(store)
    with unchanged(server.client), pytest.raises(NotFound):
        await originals.store(db, store, post, upload, io.BytesIO())
    assert await names(store) == before


async def test_an_upload_that_ended_before_its_length_was_kept_is_joined_all_the_same(server, db, store):
    """As in a backup of an older version."""
    post, upload = await stored_post(db, store)
    assert server.client.hgetall(keys.upload(upload)) == {"owner": "alice", "post": post, "length": "202"}
    server.client.hdel(keys.upload(upload), "length")
    copy = io.BytesIO()
    await originals.store(db, store, post, upload, copy)
    assert await store.get(keys.original(post)) == copy.getvalue() == b"BM" + bytes(200)
