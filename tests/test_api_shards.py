"""One shard of a Redis Cluster is dead. What the others hold goes on: posts, comments, uploads, pictures."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import httpx
import pytest
from clusters import ClusterServer
from conftest import Site, create_post, run_with_db, until, wait_until_processed
from making import jpeg, make_post, png
from scraping import Scrape

from storage import keys

PARTITIONS = 6  # two on each of three primaries: 0 and 3 on the first
LIVING = 1, 5


@pytest.fixture(scope="module")
def cluster():
    server = ClusterServer("valkey", 3, 0)
    yield server
    server.close()


@pytest.fixture
def site(cluster, embedded, tmp_path):
    settings = {"partitions": PARTITIONS, "queue_url": embedded.queue.url, "limits": "comment=900/m,read=900/m"}
    site = Site(cluster.url, tmp_path, **settings)
    site.api()
    site.worker()
    yield site
    site.close()


def user_of(partition: int) -> str:
    return next(name for n in range(99) if keys.partition_of_user(name := f"user{n}", PARTITIONS) == partition)


def outage(answer: httpx.Response) -> None:
    """Checks that an answer is the problem of a shard that is away, and came in time."""
    # A comment may have been sent just before the kill.
    codes = {"unreachable", "unknown"} if answer.url.path.endswith("/comments") else {"unreachable"}
    assert answer.status_code == 503 and answer.json()["code"] in codes
    assert answer.headers["Retry-After"] == "1"
    assert answer.elapsed.total_seconds() < 1.8  # mostly 0.9 to 1.0; here two cores have other work


def test_a_dead_shard_leaves_the_others_alive_and_comes_back(cluster, site):
    """The worker also has image work and clean-up of the dead shard's partitions."""
    clients = {partition: site.client(user_of(partition)) for partition in (0, 1, 5, 3)}
    users = user_of(0), user_of(1), user_of(3)
    posts = run_with_db(cluster, lambda db: asyncio.gather(*(make_post(db, user, PARTITIONS) for user in users)))
    create_post(clients[3], jpeg())
    victim = cluster.nodes[0]
    victim.kill()

    def lose(number: int) -> None:
        """One of the requests that need the dead shard."""
        feeds = "/v1/posts", "/v1/changes", f"/v1/users/{user_of(1)}/posts", f"/v1/posts/{posts[0]}"
        if number < len(feeds):
            outage(clients[1].get(feeds[number]))
        elif number == len(feeds):
            outage(clients[1].post(f"/v1/posts/{posts[2]}/comments", json={"text": "lost"}))
        else:  # a user's posts and Idempotency-Keys have one partition, so a repeat goes nowhere else
            for _ in range(2):
                outage(clients[0].post("/v1/posts", files={"image": png()}, headers={"Idempotency-Key": '"a"'}))

    def work(partition: int) -> None:
        """What somebody does whose partition is on another shard."""
        client, began = clients[partition], time.monotonic()
        post = create_post(client, jpeg())
        wait_until_processed(client, post)
        assert time.monotonic() - began < 6, "its picture was not delayed by the other shard's work"
        assert client.get(f"/v1/images/{post['id']}.jpg").status_code == 200
        path = f"/v1/posts/{post['id']}"
        answer = client.post(f"{path}/comments", json={"text": "Hello"})
        assert answer.status_code == 201 and answer.elapsed.total_seconds() < 0.9
        # The limits of this one's writes and reads are on the dead shard.
        assert clients[0].post(f"{path}/comments", json={"text": "Hello"}).status_code == 201
        assert clients[0].get(path).json()["comment_count"] == 2
        assert client.delete(path).status_code == 204
        assert client.get(f"/v1/images/{post['id']}.jpg").status_code == 404

    calls = [partial(lose, number) for number in range(6)] + [partial(work, partition) for partition in LIVING]
    with ThreadPoolExecutor() as threads:
        list(threads.map(lambda call: call(), calls))
    assert clients[1].post(f"/v1/posts/{posts[1]}/comments", json={"text": "old"}).status_code == 201
    cluster.nodes[1].client.zadd(keys.changes(1), {posts[1]: 1})
    until(lambda: cluster.nodes[1].client.exists(keys.segments(posts[1])), what="a segment of a quiet post")
    upload = clients[1].post("/v1/uploads", headers={"Tus-Resumable": "1.0.0", "Upload-Length": "9"})
    assert upload.status_code == 201
    assert len(clients[1].get("/v1/uploads").json()["items"]) == 1

    # What operators see
    place = f"127.0.0.1:{victim.port}"
    ready = httpx.get(f"{site.url}/readyz")
    assert ready.status_code == 200 and ready.json()["redis"] == f"no answer from {place}"
    scrape = Scrape(site.url)
    assert scrape("imagegram_redis_up") == 1 and scrape("imagegram_uploads_open") == 1
    assert scrape("imagegram_redis_node_up", node=place) == 0
    for node in cluster.nodes[1:]:
        place = f"127.0.0.1:{node.port}"
        assert scrape("imagegram_redis_node_up", node=place) == 1
        assert scrape("imagegram_redis_memory_bytes", node=place) > 0

    victim.start()
    until(lambda: clients[1].get("/v1/posts").status_code == 200, what="the whole feed")
    assert {post["id"] for post in clients[1].get("/v1/posts").json()["items"]} >= set(posts)
    assert httpx.get(f"{site.url}/readyz").json()["redis"] == "ok"
