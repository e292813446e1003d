"""/v1/users/{user}/posts: who sees which posts, walks, filters, revalidation and bounded calls."""

import asyncio
from base64 import b64encode
from urllib.parse import quote

import httpx
import orjson
import pytest
from conftest import NOBODY, connect
from making import make_post, make_processing
from state import unchanged

from api import rendering
from storage import keys, outbox, posts


@pytest.fixture
async def db(serving):
    """A client of an empty Redis."""
    serving.server.client.flushall()
    db = connect(serving.server)
    yield db
    await db.close()


@pytest.fixture
async def client(serving):
    async with httpx.AsyncClient(base_url=serving.url, timeout=30) as client:
        yield client


async def make_failed(db, author: str) -> str:
    post = await make_processing(db, author)
    await outbox.fail(db, post, 0, "undecodable", "the image is damaged")
    return post


async def one_of_each(db, author: str) -> dict[str, str]:
    """The ids of an author's posts by their status."""
    made = {"ready": await make_post(db, author), "failed": await make_failed(db, author)}
    return {**made, "processing": await make_processing(db, author)}


def bearer(serving, user: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {serving.token(user)}"}


async def listed(client, address: str, **headers) -> list[str]:
    """The ids of all pages."""
    found = []
    while address:
        answer = await client.get(address, headers=headers)
        assert answer.status_code == 200, answer.text
        page = answer.json()
        found += [item["id"] for item in page["items"]]
        link = answer.headers.get("link", "")
        address = link.removeprefix("<").partition(">")[0]
        assert bool(address) == bool(page["next"]) and (not address or f"cursor={page['next']}" in address)
    return found


async def test_a_user_sees_all_of_their_posts_and_others_see_the_ready_ones(db, client, serving):
    made = await one_of_each(db, "alice")
    await one_of_each(db, "bob")
    everything = sorted(made.values(), reverse=True)
    alice, bob = bearer(serving, "alice"), bearer(serving, "bob")
    assert await listed(client, "/v1/users/alice/posts", **alice) == everything
    for headers in (bob, {}):
        assert await listed(client, "/v1/users/alice/posts", **headers) == [made["ready"]]
    for status, post in made.items():
        assert await listed(client, f"/v1/users/alice/posts?status={status}&limit=1", **alice) == [post]
        shown = [post] if status == "ready" else []
        assert await listed(client, f"/v1/users/alice/posts?status={status}", **bob) == shown
    for item in (await client.get("/v1/users/alice/posts", headers=alice)).json()["items"]:
        assert item == (await client.get(f"/v1/posts/{item['id']}")).json()
    assert await listed(client, "/v1/users/nobody/posts") == []


async def test_requests_of_the_user_and_of_others_at_the_same_time_share_no_answer(db, client, serving):
    made = await one_of_each(db, "alice")
    alice = bearer(serving, "alice")
    calls = [listed(client, "/v1/users/alice/posts", **headers) for headers in (alice, {}) * 20]
    answers = await asyncio.gather(*calls)
    assert answers[::2] == [sorted(made.values(), reverse=True)] * 20 and answers[1::2] == [[made["ready"]]] * 20


async def test_a_name_with_special_characters_is_percent_encoded(db, client, serving):
    for user in ("auth0|5f7c/8ec7", "a%2Fb", "?#[]", "x" * 255):
        post = await make_post(db, user)
        assert await listed(client, f"/v1/users/{quote(user, safe='')}/posts?limit=1") == [post]
        processing = await make_processing(db, user)
        own = await listed(client, f"/v1/users/{quote(user, safe='')}/posts", **bearer(serving, user))
        assert own == sorted([processing, post], reverse=True)
    assert await listed(client, "/v1/users/%FF%00/posts") == []


async def test_a_lost_answer_is_found_again(db, client, serving):
    older = await make_post(db, "alice")
    latest = older
    while keys.created_ms(latest) == keys.created_ms(older):  # posts of the same ms are in no certain order
        latest = await make_processing(db, "alice", caption="lost")
    page = (await client.get("/v1/users/alice/posts?limit=1", headers=bearer(serving, "alice"))).json()
    assert [(item["id"], item["caption"]) for item in page["items"]] == [(latest, "lost")] and page["next"]


async def test_wrong_parameters_and_a_wrong_token_are_refused(db, client, serving):
    with unchanged(serving.server.client):
        for query, parameter in {
            "status=gone": "status",
            "status=Ready": "status",
            "limit=0": "limit",
            "limit=101": "limit",
            "cursor=!": "cursor",
            "cursor=MTow": "cursor",
            "cursor=" + quote("dTAxTThER0owOVRBWVFaTkRYSjRTQjdTWFY0LTA"): "cursor",  # an upload's id
        }.items():
            answer = await client.get(f"/v1/users/alice/posts?{query}")
            assert (answer.status_code, answer.json()["code"]) == (422, "invalid"), query
            assert answer.json()["errors"][0]["parameter"] == parameter
        for header in ("Bearer x", "Bearer " + serving.token("alice", exp=1), "Basic YTpi"):
            answer = await client.get("/v1/users/alice/posts", headers={"Authorization": header})
            assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized")
        assert (await client.get("/v1/users//posts")).status_code == 404
        assert (await client.get("/v1/users/alice/posts/")).status_code == 404


async def test_a_copy_is_revalidated_and_head_has_the_same_headers(db, client):
    for _ in range(3):
        await make_post(db, "alice")
    first = await client.get("/v1/users/alice/posts?limit=2&status=ready")
    etag, link = first.headers["etag"], first.headers["link"]
    assert link.startswith("</v1/users/alice/posts?status=ready&limit=2&cursor=")
    for method in ("GET", "HEAD"):
        known = await client.request(method, first.url, headers={"If-None-Match": etag})
        assert (known.status_code, known.headers["etag"], known.headers["link"]) == (304, etag, link)
    head = await client.head(first.url)
    assert (head.status_code, head.headers["etag"], head.content) == (200, etag, b"")
    await make_post(db, "alice")
    assert (await client.get(first.url, headers={"If-None-Match": etag})).status_code == 200


async def test_a_call_looks_at_a_bounded_number_of_posts_and_the_walk_goes_on(db, monkeypatch):
    """The filter matches only the oldest post and the newest one, with more than two calls' posts between them."""
    monkeypatch.setattr(posts, "LOOKED_POSTS", 5)
    newest, *failed, oldest = sorted([await make_processing(db, "alice") for _ in range(14)], reverse=True)
    for post in failed:
        await outbox.fail(db, post, 0, "undecodable", "the image is damaged")
    await outbox.publish(db, newest, "thumbhash")
    await outbox.publish(db, oldest, "thumbhash")
    for statuses, expected in {
        ("ready",): [[newest], [], [oldest]],
        ("processing",): [[], [], []],
        posts.STATUSES: [[newest, *failed[:4]], failed[4:9], [*failed[9:], oldest]],
    }.items():
        pages, after = [], ""
        while not pages or after:
            page = await posts.of_user(db, 1, "alice", statuses, 20, after)
            pages.append([row.id for row in page.posts])
            after = page.next
        assert pages == expected


def test_an_empty_page_that_is_followed_by_others_says_so():
    page = rendering.page("/v1/users/alice/posts", 20, (), False, rendering.post_json, "{row.id}", end=NOBODY)
    assert orjson.loads(page.body) == {"items": [], "next": b64encode(NOBODY.encode()).decode().rstrip("=")}
    assert page.headers["Link"].endswith('; rel="next"')


async def test_a_page_ends_at_256_kib_and_the_next_one_goes_on(db, client):
    made = [await make_post(db, "alice", caption="😀" * 2200) for _ in range(40)]
    first = await client.get("/v1/users/alice/posts?limit=100", headers={"Accept-Encoding": "identity"})
    assert len(first.json()["items"]) < 40 and 256 * 1024 <= len(first.content) < 270 * 1024
    assert await listed(client, "/v1/users/alice/posts?limit=100") == sorted(made, reverse=True)


async def test_damaged_posts_and_posts_of_a_user_with_the_same_digest_are_left_out(db, client, serving):
    redis = serving.server.client
    whole = await make_post(db, "alice")
    no_caption, no_hash, no_list, deleted = [await make_post(db, "alice") for _ in range(4)]
    redis.hdel(keys.post(no_caption), "caption")
    redis.set(keys.post(no_hash), "x")
    redis.set(keys.latest(no_list), "x")
    redis.delete(keys.post(deleted))
    others = await make_post(db, "bob")
    redis.zadd(keys.leaf(0, "0"), {keys.entry("alice", others): 0})
    for limit in (1, 100):
        assert await listed(client, f"/v1/users/alice/posts?limit={limit}") == [whole]


async def test_posts_of_all_partitions_are_merged_newest_first(db):
    """A user's posts are in several partitions if the number of partitions has changed."""
    made = [await make_post(db, "alice", partitions) for partitions in (1, 3, 16, 1, 16, 3) for _ in range(3)]
    assert len({keys.partition_of_post(post) for post in made}) > 1
    for limit in (1, 2, 5, 100):
        found, after = [], None
        while after != "":
            page = await posts.of_user(db, 16, "alice", posts.STATUSES, limit, after or "")
            found += [row.id for row in page.posts]
            after = page.next
        assert found == sorted(made, reverse=True)
