"""A Redis Cluster: calls reach the primary of their slot, also while slots move and after a primary was lost."""

import asyncio
import time

import pytest
from clusters import ClusterServer
from making import make_post

from storage import comments, keys, posts
from storage.db.cluster import Cluster, slot_of
from storage.errors import NoPost, Unknown, Unreachable

PARTITIONS = 16


@pytest.fixture(scope="module", params=["valkey", "redis"])
def cluster(request):
    server = ClusterServer(request.param, partitions=PARTITIONS)
    yield server
    server.close()


@pytest.fixture
async def db(cluster):
    client = Cluster(cluster.url)
    yield client
    await client.close()


async def publish(db, count: int) -> list[str]:
    return [await make_post(db, f"user{number}", PARTITIONS) for number in range(count)]


async def test_calls_reach_all_primaries_and_the_feed_has_the_posts_of_all(cluster, db):
    cluster.client.flushall()
    found = await publish(db, 30)
    await asyncio.gather(*(comments.add(db, "bob", post, str(n)) for post in found for n in range(5)))
    held = [await primary.call("count_keys", []) for primary in await db.primaries()]
    assert len(held) == 3 and all(held) and sum(held) == len(cluster.client.keys())
    feed = await posts.feed(db, PARTITIONS, 40)
    assert {row.id for row in feed.posts} == set(found) and {row.comment_count for row in feed.posts} == {5}


async def test_refusals_are_those_of_one_redis(cluster, db):
    post = (await publish(db, 1))[0]
    with pytest.raises(NoPost):
        await comments.add(db, "bob", "01JD4Q7ZK5W8Y3N6R2T9V0XABC-7", "lost")
    await db.ping()
    assert (await comments.add(db, "bob", post, "found"))[0].id
    assert "used_memory" in await db.info("memory")


async def test_a_client_with_one_address_and_an_old_map_follows_moved(cluster, db):
    post = (await publish(db, 1))[0]
    one = Cluster("redis+cluster://" + cluster.url.rpartition(",")[2])
    await comments.add(one, "bob", post, "finds it")
    wrong = next(node for node in one._nodes.values() if node is not one._owners[slot_of(keys.post(post))])
    one._owners = dict.fromkeys(range(16384), wrong)
    await comments.add(one, "bob", post, "is redirected")
    assert len((await comments.page(one, post, 9)).comments) == 2
    await one.close()


async def test_a_write_that_too_few_replicas_have_is_unknown_and_a_refusal_or_a_read_is_not(cluster, db):
    """Each shard has one replica, and two are asked for."""
    post = (await publish(db, 1))[0]
    strict = Cluster(cluster.url, replicas=2)
    with pytest.raises(Unknown, match="only 1 replicas have it, of 2"):
        await comments.add(strict, "bob", post, "is there")
    assert [row.text for row in (await comments.page(strict, post, 9)).comments] == ["is there"]
    with pytest.raises(NoPost):
        await comments.add(strict, "bob", keys.new_post_id(0), "lost")
    await strict.close()


async def write(db, found: list[str], seconds: float) -> list[tuple[float, str, str]]:
    """Adds comments by 16 writers. Returns for each its time in s, its post and id, or why it failed."""
    began, done = time.monotonic(), []

    async def writer(number: int) -> None:
        while time.monotonic() - began < seconds:
            post = found[number % len(found)]
            started = time.monotonic()
            try:
                outcome = (await comments.add(db, "bob", post, "x"))[0].id
            except (Unreachable, Unknown) as error:
                outcome = error.word
            done.append((time.monotonic() - started, post, outcome))

    await asyncio.gather(*(writer(number) for number in range(16)))
    return done


async def test_after_a_primary_is_lost_no_answered_write_is_lost_and_the_other_shards_go_on(tmp_path):
    """Each write must have reached one of two replicas. Nothing delays them here, so few would be lost without that."""
    cluster = ClusterServer("valkey", 3, 2, PARTITIONS, "--min-replicas-to-write", "1")
    db = Cluster(cluster.url, replicas=1)
    try:
        found = await publish(db, 16)
        shard = {node.port: [] for node in cluster.nodes}
        for post in found:
            place = await db._find(slot_of(keys.post(post)))
            shard[int(place_of(db, place).rpartition(":")[2])].append(post)
        victim = next(node for node in cluster.nodes if shard[node.port])
        writing = asyncio.create_task(write(db, found, 8))
        await asyncio.sleep(1)
        victim.process.kill()
        done = await writing
        assert max(seconds for seconds, _, _ in done) < 1.9
        lost = shard[victim.port]
        others = [outcome for _, post, outcome in done if post not in lost]
        assert all("-" in outcome for outcome in others), "the other shards answered all the time"
        kept = {post: {row.id for row in (await comments.page(db, post, 100_000)).comments} for post in lost}
        answered = [(post, outcome) for _, post, outcome in done if post in lost and "-" in outcome]
        assert all(outcome in kept[post] for post, outcome in answered)
        assert "-" in [outcome for _, post, outcome in done if post in lost][-1], "and this one answers again"
    finally:
        await db.close()
        cluster.close()


def place_of(db: Cluster, node) -> str:
    return next(place for place, known in db._nodes.items() if known is node)
