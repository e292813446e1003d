"""/v1/changes: refreshing a feed with few bytes, completing a walk through it, and tokens that are no longer valid."""

import asyncio
import re

import httpx
import pytest
from conftest import connect
from making import NO_SEGMENTS, make_post, make_processing

from storage import changes, comments, keys, outbox, posts
from storage.errors import Outdated
from storage.settings import DAY_MS, HOUR_MS

LINK = re.compile(r'<(/v1/changes\?since=[^>]+)>; rel="changes"')


@pytest.fixture
async def db(serving):
    """A client of an empty Redis."""
    serving.server.client.flushall()
    db = connect(serving.server)
    yield db
    await db.close()


@pytest.fixture
def objects(serving):
    return serving.open_store()


@pytest.fixture
async def client(serving):
    async with httpx.AsyncClient(base_url=serving.url, timeout=30) as client:
        yield client


def changes_link(answer) -> str:
    """The address of the changes since a page, from its Link header."""
    return LINK.search(answer.headers["link"])[1]


async def test_the_first_page_links_to_its_changes_and_so_does_its_304(db, client):
    for _ in range(3):
        await make_post(db, "alice")
    first = await client.get("/v1/posts?limit=2")
    following = await client.get(f"/v1/posts?limit=2&cursor={first.json()['next']}")
    assert 'rel="next"' in first.headers["link"] and changes_link(first)
    assert "changes" not in following.headers.get("link", "")
    known = await client.get("/v1/posts?limit=2", headers={"If-None-Match": first.headers["etag"]})
    assert (known.status_code, changes_link(known)) == (304, changes_link(first))
    # A change that this page does not show gives a new token, and the same ETag.
    await make_processing(db, "alice")
    hidden = following.json()["items"][0]["id"]
    assert hidden not in [item["id"] for item in first.json()["items"]]
    comment, _ = await comments.add(db, "alice", hidden, "x")
    await comments.delete(db, NO_SEGMENTS, "alice", hidden, comment.id)
    known = await client.get("/v1/posts?limit=2", headers={"If-None-Match": first.headers["etag"]})
    assert known.status_code == 304 and changes_link(known) != changes_link(first)


async def test_changes_have_each_changed_post_once_as_it_is_now_and_each_deleted_post(db, client, objects):
    quiet, busy, doomed = [await make_post(db, "alice", caption=text) for text in ("quiet", "busy", "doomed")]
    since = changes_link(await client.get("/v1/posts"))
    for n in range(5):
        await comments.add(db, "bob", busy, str(n))
    await comments.add(db, "bob", doomed, "last words")
    await posts.delete(db, objects, "alice", doomed)
    added = await make_post(db, "alice", caption="new")
    brief = await make_post(db, "alice")
    await posts.delete(db, objects, "alice", brief)
    page = (await client.get(since)).json()
    assert page["more"] is False
    items = {item["id"]: item for item in page["items"]}
    assert len(items) == len(page["items"]) == 4 and quiet not in items
    assert items[doomed] == {"id": doomed, "deleted": True}
    assert items[brief] == {"id": brief, "deleted": True}, "a client may have seen it"
    assert (items[busy]["comment_count"], items[added]["caption"]) == (5, "new")
    assert items[busy] == (await client.get(f"/v1/posts/{busy}")).json(), "the same as in the answer for the post"
    again = (await client.get(f"/v1/changes?since={page['next']}")).json()
    assert (again["items"], again["more"]) == ([], False)


async def test_without_a_token_the_answer_has_the_current_token_and_no_posts(db, client):
    await make_post(db, "alice")
    answer = (await client.get("/v1/changes")).json()
    assert (answer["items"], answer["more"]) == ([], False)
    assert f"/v1/changes?since={answer['next']}" == changes_link(await client.get("/v1/posts"))


async def test_many_changes_come_in_pages(db, client):
    since = changes_link(await client.get("/v1/posts"))
    made = {await make_post(db, "alice") for _ in range(7)}
    found, pages, more = [], 0, True
    while more:
        page = (await client.get(f"{since}&limit=3")).json()
        since, more = f"/v1/changes?since={page['next']}", page["more"]
        found += [item["id"] for item in page["items"]]
        pages += 1
    assert (set(found), len(found), pages) == (made, 7, 3)


async def test_a_post_in_processing_is_no_change_until_it_is_ready(db, client):
    since = changes_link(await client.get("/v1/posts"))
    post = await make_processing(db, "alice")
    assert (await client.get(since)).json()["items"] == []
    await outbox.publish(db, post, "hash")
    assert [item["id"] for item in (await client.get(since)).json()["items"]] == [post]


async def test_a_token_from_before_a_restore_is_refused_with_the_advice_to_walk_again(db, client, serving):
    await make_post(db, "alice")
    since = changes_link(await client.get("/v1/posts"))
    assert (await client.get(since)).status_code == 200
    serving.server.client.set(keys.epoch(0), "1")
    refused = await client.get(since)
    assert (refused.status_code, refused.json()["code"]) == (410, "outdated")
    assert "walk" in refused.json()["detail"]
    assert (await client.get(changes_link(await client.get("/v1/posts")))).status_code == 200


async def test_deletions_are_reported_for_seven_days_and_an_older_token_is_refused(db, objects):
    db.clock = start = 1_800_000_000_000
    post = await make_post(db, "alice")
    token = changes.issue(db, (await posts.feed(db, 1, 1)).seen)
    await posts.delete(db, objects, "alice", post)
    db.clock = start + 7 * DAY_MS - HOUR_MS
    assert (await changes.since(db, 1, 10, token)).posts == [post]
    db.clock = start + 7 * DAY_MS + 1
    with pytest.raises(Outdated):
        await changes.since(db, 1, 10, token)


async def test_a_deletion_that_no_valid_token_can_ask_for_is_removed(db, objects, serving):
    db.clock = start = 1_800_000_000_000
    first, second = [await make_post(db, "alice") for _ in range(2)]
    await posts.delete(db, objects, "alice", first)
    db.clock = start + 6 * DAY_MS
    token = changes.issue(db, (await posts.feed(db, 1, 1)).seen)
    await posts.delete(db, objects, "alice", second)
    assert serving.server.client.zcard(keys.gone(0)) == 2
    db.clock = start + 8 * DAY_MS
    third = await make_post(db, "alice")
    await posts.delete(db, objects, "alice", third)
    assert serving.server.client.zrange(keys.gone(0), 0, -1) == [second, third]
    assert (await changes.since(db, 1, 10, token)).posts == [second, third]


async def test_a_token_from_before_partitions_were_added_is_still_valid(db):
    """All changes of the new partitions are reported."""
    await make_post(db, "alice")
    token = changes.issue(db, (await posts.feed(db, 1, 1)).seen)
    made = {await make_post(db, f"user{n}", 3) for n in range(9)}
    assert {keys.partition_of_post(post) for post in made} == {0, 1, 2}
    found, more = [], True
    while more:
        page = await changes.since(db, 3, 4, token)
        found, token, more = found + page.posts, page.token, page.more
    assert {row.id for row in found} == made and len(found) == 9
    with pytest.raises(Outdated):
        await changes.since(db, 1, 4, token)


async def test_nothing_is_missed_by_a_client_that_refreshes_while_others_write(db, client):
    """Five writers add comments as fast as they can. The client asks for the changes again and again."""
    made = [await make_post(db, "alice") for _ in range(10)]
    since = changes_link(await client.get("/v1/posts"))
    held = {item["id"]: item for item in (await client.get("/v1/posts")).json()["items"]}

    async def write(worker: int):
        for n in range(60):
            await comments.add(db, f"user{worker}", made[(n * 7 + worker) % 10], str(n))

    async def refresh():
        nonlocal since
        page = (await client.get(f"{since}&limit=4")).json()
        since = f"/v1/changes?since={page['next']}"
        held.update({item["id"]: item for item in page["items"]})
        return page["more"]

    writing = asyncio.gather(*(write(worker) for worker in range(5)))
    while not writing.done():
        await refresh()
    await writing
    while await refresh():
        pass
    walked = (await client.get("/v1/posts")).json()["items"]
    assert sorted(held.values(), key=lambda post: (post["comment_count"], post["id"]), reverse=True) == walked


async def test_damaged_entries_of_the_feed_and_the_changes_are_skipped_on_every_page(db, client, serving):
    """Damage: ids without a post, posts that lack a field, and posts whose keys have a wrong type."""
    redis = serving.server.client
    since = changes_link(await client.get("/v1/posts"))
    whole = [await make_post(db, "alice", caption=str(number)) for number in range(7)]
    for post in whole[:3]:
        await comments.add(db, "bob", post, "a")
    damaged = [await make_post(db, "eve") for _ in range(12)]
    for post in damaged[:4]:
        redis.hdel(keys.post(post), "caption")
    for post in damaged[4:8]:
        redis.delete(keys.post(post))
        redis.set(keys.post(post), "x")
    for post in damaged[8:]:
        redis.set(keys.latest(post), "x")
    newest = redis.zrange(keys.changes(0), -1, -1, withscores=True)[0][1]
    missing = ["0" * 26 + "-0", *(keys.new_post_id(0) for _ in range(12))]
    redis.zadd(keys.feed(0), {post: number % 5 for number, post in enumerate(missing)})
    redis.zadd(keys.changes(0), {post: newest + 1 + number for number, post in enumerate(missing)})
    last = await make_post(db, "alice", caption="last")
    for limit in (1, 2, 3, 100):
        found, address = [], f"/v1/posts?limit={limit}"
        while address:
            page = (await client.get(address)).json()
            assert len(page["items"]) <= limit
            found += [item["id"] for item in page["items"]]
            address = page["next"] and f"/v1/posts?limit={limit}&cursor={page['next']}"
        assert found == [*whole[2::-1], last, *whole[:2:-1]]
        found, address, more = [], since, True
        while more:
            page = (await client.get(f"{address}&limit={limit}")).json()
            assert len(page["items"]) <= limit
            address, more = f"/v1/changes?since={page['next']}", page["more"]
            found += [item["id"] for item in page["items"]]
        assert sorted(found) == sorted([*whole, last])


async def test_changes_between_skipped_entries_come_in_order_and_none_is_missed(db, client, objects, serving):
    """Posts, deletions and entries without a post take turns."""
    redis, expected = serving.server.client, []
    since = changes_link(await client.get("/v1/posts"))
    for number in range(30):
        post = await make_post(db, "alice")
        if number % 3:
            redis.delete(keys.post(post))
        elif number % 2:
            await posts.delete(db, objects, "alice", post)
            expected.append(post)
        else:
            expected.append(post)
    found, more = [], True
    while more:
        page = (await client.get(f"{since}&limit=2")).json()
        since, more = f"/v1/changes?since={page['next']}", page["more"]
        found += [item["id"] for item in page["items"]]
    assert found == expected


async def test_latest_comments_that_are_damaged_are_shown_as_none(db, client, serving):
    post = await make_post(db, "alice")
    for text in ("rubbish", '["a"]', "1"):
        serving.server.client.delete(keys.latest(post))
        serving.server.client.rpush(keys.latest(post), text)
        (item,) = (await client.get("/v1/posts")).json()["items"]
        assert (item["id"], item["latest_comments"]) == (post, [])
