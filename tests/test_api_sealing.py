"""What clients see of a post whose old comments a worker moves to the store: nothing, as long as the store is there."""

import httpx
import pytest
from conftest import run_with_db, running_site, until
from making import make_post

from storage import keys
from storage.settings import LATEST_COMMENTS, SEGMENT_COMMENTS

COUNT = SEGMENT_COMMENTS + LATEST_COMMENTS
ONCE = {"Idempotency-Key": "3"}


@pytest.fixture
def site(real_server, tmp_path):
    real_server.client.flushall()
    with running_site(real_server, tmp_path, hot_comments=LATEST_COMMENTS) as site:
        yield site


def write(client: httpx.Client, post: str, number: int) -> httpx.Response:
    key = {"Idempotency-Key": str(number)}
    return client.post(f"/v1/posts/{post}/comments", json={"text": f"number {number} 🦉"}, headers=key)


def seen(client: httpx.Client, post: str, comment: str) -> dict[str, tuple]:
    """All that a client sees of the post: bodies and ETags of lists, of each page of two walks, and of one comment."""
    found = {}

    def get(url: str) -> dict:
        answer = client.get(url)
        found[url] = answer.status_code, answer.content, answer.headers["ETag"], answer.headers.get("Link")
        return answer.json()

    for url in (f"/v1/posts/{post}", f"/v1/posts/{post}/comments/{comment}", "/v1/posts", "/v1/users/alice/posts"):
        get(url)
    for limit in (7, 100):
        walk = f"/v1/posts/{post}/comments?limit={limit}"
        following = get(walk)["next"]
        while following:
            following = get(f"{walk}&cursor={following}")["next"]
    assert len(found) == 4 + -(-COUNT // 7) + -(-COUNT // 100)
    return found


def test_clients_see_no_change_when_comments_move_to_the_store_and_their_authors_delete_them(site):
    client = site.server.client
    post = run_with_db(site.server, lambda db: make_post(db, "alice"))
    with site.client("alice") as alice, site.client("bob") as bob:
        answers = [write(bob if number % 2 else alice, post, number) for number in range(COUNT)]
        assert {answer.status_code for answer in answers} == {201}
        urls = [answer.headers["Location"] for answer in answers]
        oldest = answers[0].json()["id"]
        before = seen(alice, post, oldest)
        token = alice.get("/v1/changes").json()["next"]
        site.worker()
        until(lambda: client.exists(keys.segments(post)), what="the segment")
        assert client.xlen(keys.comments(post)) == LATEST_COMMENTS
        assert seen(alice, post, oldest) == before
        again = write(bob, post, 3)
        assert (again.status_code, again.json()) == (201, answers[3].json()), "the idempotency key is remembered"
        assert alice.get(f"/v1/changes?since={token}").json()["items"] == []
        assert bob.delete(urls[0]).status_code == 403
        assert alice.delete(urls[0], headers={"If-Match": '"another"'}).status_code == 412
        etag = alice.get(urls[0]).headers["ETag"]
        assert alice.delete(urls[0], headers={"If-Match": etag}).status_code == 204
        assert alice.delete(urls[0]).status_code == alice.get(urls[0]).status_code == 404
        shown = alice.get("/v1/posts").json()["items"][0]
        assert shown["comment_count"] == COUNT - 1
        (changed,) = alice.get(f"/v1/changes?since={token}").json()["items"]
        assert changed["comment_count"] == COUNT - 1


def test_without_the_store_only_comments_in_it_answer_503_and_nothing_is_lost(site):
    client = site.server.client
    post = run_with_db(site.server, lambda db: make_post(db, "alice"))
    with site.client("alice") as alice:
        urls = [write(alice, post, number).headers["Location"] for number in range(COUNT)]
        worker = site.worker()
        until(lambda: client.exists(keys.segments(post)), what="the segment")
        worker.kill()
        store = site.folder / "store"
        store.rename(site.folder / "aside")
        refused = [
            alice.get(f"/v1/posts/{post}/comments"),
            alice.get(urls[0]),
            alice.delete(urls[0]),
        ]
        assert [(answer.status_code, answer.headers["Retry-After"]) for answer in refused] == [(503, "1")] * 3
        assert {answer.headers["Content-Type"] for answer in refused} == {"application/problem+json"}
        assert alice.get(f"/v1/posts/{post}/comments?limit={LATEST_COMMENTS}").status_code == 200
        newest = write(alice, post, COUNT)
        assert newest.status_code == 201
        assert alice.delete(newest.headers["Location"]).status_code == 204
        assert alice.get("/v1/posts").json()["items"][0]["comment_count"] == COUNT
        (site.folder / "aside").rename(store)
        assert alice.delete(urls[0]).status_code == 204
        assert alice.get(f"/v1/posts/{post}").json()["comment_count"] == COUNT - 1
