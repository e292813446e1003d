"""/v1/changes: a walk made exact, a feed refreshed for a few bytes, and tokens that no longer hold."""

import asyncio
import re

import httpx
import pytest
from conftest import connect
from making import make_post, make_processing

from storage import changes, comments, keys, outbox, posts
from storage.errors import Outdated
from storage.objects import open_store
from storage.settings import DAY_MS, HOUR_MS

LINK = re.compile(r'<(/v1/changes\?since=[^>]+)>; rel="changes"')


@pytest.fixture
async def db(serving):
    serving.server.client.flushall()
    db = connect(serving.server)
    yield db
    await db.close()


@pytest.fixture
def objects(serving):
    return open_store((serving.folder / "store").as_uri())


@pytest.fixture
async def client(serving):
    async with httpx.AsyncClient(base_url=serving.url, timeout=30) as client:
        yield client


def marked(answer) -> str:
    """The address at which the changes since a page are told."""
    return LINK.search(answer.headers["link"])[1]


async def test_the_first_page_says_where_its_changes_are_told_on_304_too(db, client):
    for _ in range(3):
        await make_post(db, "alice")
    first = await client.get("/v1/posts?limit=2")
    following = await client.get(f"/v1/posts?limit=2&cursor={first.json()['next']}")
    assert 'rel="next"' in first.headers["link"] and marked(first)
    assert "changes" not in following.headers.get("link", "")
    known = await client.get("/v1/posts?limit=2", headers={"If-None-Match": first.headers["etag"]})
    assert (known.status_code, marked(known)) == (304, marked(first))
    # A change that this page does not show gives a new token, and leaves its validator as it was.
    posts_of_page = [item["id"] for item in first.json()["items"]]
    await make_processing(db, "alice")
    hidden = following.json()["items"][0]["id"]
    assert hidden not in posts_of_page
    said, _ = await comments.add(db, "alice", hidden, "x")
    await comments.delete(db, "alice", hidden, said.id)
    known = await client.get("/v1/posts?limit=2", headers={"If-None-Match": first.headers["etag"]})
    assert known.status_code == 304 and marked(known) != marked(first)


async def test_changes_tell_each_post_once_as_it_is_now_and_the_deleted(db, client, objects):
    quiet, busy, doomed = [await make_post(db, "alice", caption=text) for text in ("quiet", "busy", "doomed")]
    since = marked(await client.get("/v1/posts"))
    for n in range(5):
        await comments.add(db, "bob", busy, str(n))
    await comments.add(db, "bob", doomed, "last words")
    await posts.delete(db, objects, "alice", doomed)
    added = await make_post(db, "alice", caption="new")
    brief = await make_post(db, "alice")
    await posts.delete(db, objects, "alice", brief)
    told = (await client.get(since)).json()
    assert told["more"] is False
    items = {item["id"]: item for item in told["items"]}
    assert len(items) == len(told["items"]) == 4 and quiet not in items
    assert items[doomed] == {"id": doomed, "deleted": True}
    assert items[brief] == {"id": brief, "deleted": True}, "a client may have seen it"
    assert (items[busy]["comment_count"], items[added]["caption"]) == (5, "new")
    assert items[busy] == (await client.get(f"/v1/posts/{busy}")).json(), "a post is the same wherever it is told"
    again = (await client.get(f"/v1/changes?since={told['next']}")).json()
    assert (again["items"], again["more"]) == ([], False)


async def test_without_a_token_the_current_one_is_given_and_nothing_else(db, client):
    await make_post(db, "alice")
    asked = (await client.get("/v1/changes")).json()
    assert (asked["items"], asked["more"]) == ([], False)
    assert f"/v1/changes?since={asked['next']}" == marked(await client.get("/v1/posts"))


async def test_many_changes_come_page_by_page(db, client):
    since = marked(await client.get("/v1/posts"))
    made = {await make_post(db, "alice") for _ in range(7)}
    found, pages, more = [], 0, True
    while more:
        told = (await client.get(f"{since}&limit=3")).json()
        since, more = f"/v1/changes?since={told['next']}", told["more"]
        found += [item["id"] for item in told["items"]]
        pages += 1
    assert (set(found), len(found), pages) == (made, 7, 3)


async def test_what_is_processing_is_no_change_until_it_shows(db, client):
    since = marked(await client.get("/v1/posts"))
    post = await make_processing(db, "alice")
    assert (await client.get(since)).json()["items"] == []
    await outbox.publish(db, post, "hash")
    assert [item["id"] for item in (await client.get(since)).json()["items"]] == [post]


async def test_a_token_of_a_timeline_that_a_restore_ended_says_to_walk_again(db, client, serving):
    await make_post(db, "alice")
    since = marked(await client.get("/v1/posts"))
    assert (await client.get(since)).status_code == 200
    serving.server.client.set(keys.epoch(0), "1")
    refused = await client.get(since)
    assert (refused.status_code, refused.json()["code"]) == (410, "outdated")
    assert "walk" in refused.json()["detail"]
    assert (await client.get(marked(await client.get("/v1/posts")))).status_code == 200


async def test_deletions_are_told_for_seven_days_and_an_older_token_is_refused(db, objects):
    db.clock = start = 1_800_000_000_000
    post = await make_post(db, "alice")
    token = changes.issue(db, (await posts.feed(db, 1, 1)).seen)
    await posts.delete(db, objects, "alice", post)
    db.clock = start + 7 * DAY_MS - HOUR_MS
    assert (await changes.since(db, 1, 10, token)).posts == [post]
    db.clock = start + 7 * DAY_MS + 1
    with pytest.raises(Outdated):
        await changes.since(db, 1, 10, token)


async def test_what_nobody_is_told_of_any_more_is_forgotten(db, objects, serving):
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


async def test_a_token_from_before_there_were_more_partitions_still_holds(db):
    """The new partitions are told from their beginning."""
    await make_post(db, "alice")
    token = changes.issue(db, (await posts.feed(db, 1, 1)).seen)
    made = {await make_post(db, f"user{n}", 3) for n in range(9)}
    assert {keys.partition_of_post(post) for post in made} == {0, 1, 2}
    told, more = [], True
    while more:
        found = await changes.since(db, 3, 4, token)
        told, token, more = told + found.posts, found.token, found.more
    assert {row.id for row in told} == made and len(told) == 9
    with pytest.raises(Outdated):
        await changes.since(db, 1, 4, token)


async def test_nothing_is_missed_by_a_client_that_refreshes_while_others_write(db, client):
    """Ten seconds of a real life in one: comments fly while the client asks again and again."""
    made = [await make_post(db, "alice") for _ in range(10)]
    since = marked(await client.get("/v1/posts"))
    held = {item["id"]: item for item in (await client.get("/v1/posts")).json()["items"]}

    async def write(worker: int):
        for n in range(60):
            await comments.add(db, f"user{worker}", made[(n * 7 + worker) % 10], str(n))

    async def refresh():
        nonlocal since
        told = (await client.get(f"{since}&limit=4")).json()
        since = f"/v1/changes?since={told['next']}"
        held.update({item["id"]: item for item in told["items"]})
        return told["more"]

    writing = asyncio.gather(*(write(worker) for worker in range(5)))
    while not writing.done():
        await refresh()
    await writing
    while await refresh():
        pass
    walked = (await client.get("/v1/posts")).json()["items"]
    assert sorted(held.values(), key=lambda post: (post["comment_count"], post["id"]), reverse=True) == walked


async def test_members_without_a_whole_post_are_skipped_on_every_page(db, client, serving):
    """Lists hold ids without a post, and posts that lack a field or whose keys have a wrong type."""
    redis = serving.server.client
    since = marked(await client.get("/v1/posts"))
    whole = [await make_post(db, "alice", caption=str(number)) for number in range(7)]
    for post in whole[:3]:
        await comments.add(db, "bob", post, "a")
    malformed = [await make_post(db, "eve") for _ in range(12)]
    for post in malformed[:4]:
        redis.hdel(keys.post(post), "caption")
    for post in malformed[4:8]:
        redis.delete(keys.post(post))
        redis.set(keys.post(post), "x")
    for post in malformed[8:]:
        redis.set(keys.latest(post), "x")
    newest = redis.zrange(keys.changes(0), -1, -1, withscores=True)[0][1]
    strangers = ["0" * 26 + "-0", *(keys.new_post_id(0) for _ in range(12))]
    redis.zadd(keys.feed(0), {id: number % 5 for number, id in enumerate(strangers)})
    redis.zadd(keys.changes(0), {id: newest + 1 + number for number, id in enumerate(strangers)})
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
            told = (await client.get(f"{address}&limit={limit}")).json()
            assert len(told["items"]) <= limit
            address, more = f"/v1/changes?since={told['next']}", told["more"]
            found += [item["id"] for item in told["items"]]
        assert sorted(found) == sorted([*whole, last])


async def test_changes_of_a_list_that_ends_early_come_in_their_order(db, client, objects, serving):
    """Members that are skipped stand between deletions: none of either is missed."""
    redis, wanted = serving.server.client, []
    since = marked(await client.get("/v1/posts"))
    for number in range(30):
        post = await make_post(db, "alice")
        if number % 3:
            redis.delete(keys.post(post))
        elif number % 2:
            await posts.delete(db, objects, "alice", post)
            wanted.append(post)
        else:
            wanted.append(post)
    found, more = [], True
    while more:
        told = (await client.get(f"{since}&limit=2")).json()
        since, more = f"/v1/changes?since={told['next']}", told["more"]
        found += [item["id"] for item in told["items"]]
    assert found == wanted


async def test_latest_comments_that_are_no_json_spoil_no_page(db, client, serving):
    post = await make_post(db, "alice")
    for text in ("rubbish", '["a"]', "1"):
        serving.server.client.delete(keys.latest(post))
        serving.server.client.rpush(keys.latest(post), text)
        (item,) = (await client.get("/v1/posts")).json()["items"]
        assert (item["id"], item["latest_comments"]) == (post, [])
