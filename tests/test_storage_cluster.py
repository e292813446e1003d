"""A Redis Cluster: calls reach the primary of their slot, also while slots move and after a primary was lost."""

import asyncio
import gc
import time
from contextlib import contextmanager

import pytest
from clusters import ClusterServer
from conftest import until
from making import NO_SEGMENTS, make_post
from proxy import Proxy

from storage import changes, comments, keys, posts, sealing
from storage.db.client import DEADLINE
from storage.db.cluster import SLOTS, Cluster, slot_of
from storage.errors import Forbidden, NoPost, Outdated, Unknown, Unreachable
from storage.objects import open_store
from storage.segments import Segments
from storage.settings import DAY_MS, LEAF_ENTRIES

PARTITIONS = 16


@pytest.fixture(scope="module", params=["valkey", "redis"])
def cluster(request):
    server = ClusterServer(request.param)
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
    assert await db.ping() == []
    assert (await comments.add(db, "bob", post, "found"))[0].id


async def test_a_ping_names_the_primaries_that_do_not_answer_and_fails_if_most_do_not(cluster, db):
    """They only refuse PING. They still reach each other, so the state of the Cluster is ok."""
    refusing = cluster.primaries[:2]
    try:
        refusing[0].execute_command("ACL", "SETUSER", "default", "-ping")
        assert await db.ping() == [f"127.0.0.1:{cluster.nodes[0].port}"]
        refusing[1].execute_command("ACL", "SETUSER", "default", "-ping")
        with pytest.raises(Unreachable, match="no answer from 127.0.0.1:"):
            await db.ping()
    finally:
        for client in refusing:
            client.execute_command("ACL", "SETUSER", "default", "+ping")
    assert await db.ping() == []


async def test_a_client_with_one_address_and_an_old_map_follows_moved(cluster, db):
    post = (await publish(db, 1))[0]
    one = Cluster("redis+cluster://" + cluster.url.rpartition(",")[2])
    await comments.add(one, "bob", post, "finds it")
    wrong = next(node for node in one._nodes.values() if node is not one._owners[slot_of(keys.post(post))])
    one._owners = dict.fromkeys(range(16384), wrong)
    await comments.add(one, "bob", post, "is redirected")
    assert len((await comments.page(one, NO_SEGMENTS, post, 9)).comments) == 2
    await one.close()


async def test_a_client_that_waits_for_replicas_and_takes_a_replica_for_the_primary_follows_moved(cluster, db):
    """A primary that hung has become a replica. It does not answer WAIT with a number then."""
    post = (await publish(db, 1))[0]
    slot, client = slot_of(keys.post(post)), Cluster(cluster.url, replicas=1)
    replicas = [node for node in cluster.nodes if node.client.info("replication")["role"] == "slave"]
    for number, node in enumerate(replicas):
        client._owners = {slot: client.node(f"127.0.0.1:{node.port}")}
        await comments.add(client, "bob", post, str(number))
    assert [row.text for row in (await comments.page(db, NO_SEGMENTS, post, 9)).comments] == ["2", "1", "0"]
    await client.close()


async def test_a_write_that_too_few_replicas_have_is_unknown_and_a_refusal_or_a_read_is_not(cluster, db):
    """Each shard has one replica, and two are asked for."""
    post = (await publish(db, 1))[0]
    strict = Cluster(cluster.url, replicas=2)
    with pytest.raises(Unknown, match="only 1 replicas have it, of 2"):
        await comments.add(strict, "bob", post, "is there")
    assert [row.text for row in (await comments.page(strict, NO_SEGMENTS, post, 9)).comments] == ["is there"]
    with pytest.raises(NoPost):
        await comments.add(strict, "bob", keys.new_post_id(0), "lost")
    await strict.close()


async def primary_of(cluster, db, post: str):
    """The process that is the primary of a post."""
    place = place_of(db, await db._find(slot_of(keys.post(post))))
    return next(node for node in cluster.nodes if node.port == int(place.rpartition(":")[2]))


async def test_a_node_that_has_left_is_forgotten_and_its_connection_is_closed(cluster, db):
    gone = db.node(f"localhost:{cluster.nodes[0].port}")  # another name, which no node says
    await gone.ping()
    await db.primaries()
    assert gone not in db.nodes() and len(db.nodes()) == len(cluster.nodes)
    await asyncio.gather(*db._tasks)
    assert not gone._reads._connection.is_connected
    assert len(await db.primaries()) == 3


async def test_a_search_that_nobody_waits_for_any_more_is_not_logged_and_says_why_it_failed():
    failures, client = [], Cluster("redis+cluster://127.0.0.1:1")
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
    asking = asyncio.create_task(client.groups(1))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    searching = client._looking
    asking.cancel()
    await asyncio.wait([searching])
    await asyncio.sleep(0)
    del asking, searching
    gc.collect()
    assert client._looking is None and not failures
    with pytest.raises(Unreachable, match="can be reached: .*127.0.0.1:1"):
        await client.ping()
    await client.close()


async def test_what_a_node_says_of_slots_is_learned_in_a_few_ms_also_if_all_slots_are_in_use():
    """Ids that anybody may ask for name any slot, and each call to a lost shard asks anew."""
    client = Cluster("redis+cluster://127.0.0.1:1,127.0.0.1:2")
    found = [(slot, slot + 7, f"127.0.0.1:{slot // 8 % 2 + 1}") for slot in range(0, SLOTS, 8)]
    client._owners = dict.fromkeys(range(SLOTS), client.nodes()[0])
    times = []
    for _ in range(3):
        began = time.perf_counter()
        client._learn(found)
        times.append(time.perf_counter() - began)
    assert min(times) < 0.05
    assert [client._owners[slot].port for slot in (0, 7, 8, SLOTS - 1)] == [1, 1, 2, 2]


class Moving:
    """Moves the slot of a post to another primary, key by key, as Redis 7 does it."""

    def __init__(self, cluster, source, post: str):
        self.slot, self.source = slot_of(keys.post(post)), source
        primaries = [node for node in cluster.nodes if node.client.info("replication")["role"] == "master"]
        self.target = next(node for node in primaries if node is not source)
        self.target.client.cluster("SETSLOT", self.slot, "IMPORTING", source.client.cluster("MYID"))
        source.client.cluster("SETSLOT", self.slot, "MIGRATING", self.target.client.cluster("MYID"))

    def move(self, *names: str) -> None:
        self.source.client.execute_command("MIGRATE", "127.0.0.1", self.target.port, "", 0, 5000, "KEYS", *names)

    def finish(self) -> None:
        if left := self.source.client.cluster("GETKEYSINSLOT", self.slot, 10_000):
            self.move(*left)
        for node in (self.target, self.source):
            node.client.cluster("SETSLOT", self.slot, "NODE", self.target.client.cluster("MYID"))


def refused(node, word: str) -> int:
    """How many commands a node has answered with this error."""
    return node.client.info("errorstats").get(f"errorstat_{word}", {}).get("count", 0)


async def test_calls_follow_a_slot_whose_keys_have_moved_and_happen_once(cluster, db, tmp_path):
    post, other = [await make_post(db, "alice", PARTITIONS) for _ in range(2)]
    segments = Segments(open_store(tmp_path.as_uri()))
    await posts.delete(db, open_store(tmp_path.as_uri()), "alice", other)
    sealed = [(await comments.add(db, "bob", post, text))[0].id for text in ("deleted", "sealed")]
    assert await sealing.step(db, segments, post, 0, -1000, DAY_MS)
    await comments.add(db, "bob", post, "0")
    await comments.delete(db, segments, "bob", post, sealed[0])  # now each key that a comment names is there
    source = await primary_of(cluster, db, post)
    moving = Moving(cluster, source, post)
    asked = refused(source, "ASK")
    moving.move(*source.client.cluster("GETKEYSINSLOT", moving.slot, 10_000))
    for text in ("1", "2"):
        await comments.add(db, "bob", post, text)
    page = await comments.page(db, segments, post, 9)
    assert [row.text for row in page.comments] == ["2", "1", "0", "sealed"]
    newest = (await comments.page(db, NO_SEGMENTS, post, 1)).comments[0].id
    with pytest.raises(Forbidden):
        await comments.delete(db, NO_SEGMENTS, "eve", post, newest)
    late = asyncio.get_running_loop().create_future()
    named = keys.post_and_lists(post)[:4]
    db.call_late("comments_page", named[0], lambda: (named, ["", 9, 9]), lambda *reply: late.set_result(reply))
    assert len((await late)[0][1]) == 3
    assert refused(source, "ASK") - asked >= 5, "each call was redirected"
    moving.finish()
    assert (await posts.read(db, post)).comment_count == 4


async def test_a_call_whose_keys_are_on_two_nodes_waits_until_they_are_on_one(cluster, db):
    post = await make_post(db, "carol", PARTITIONS)
    source = await primary_of(cluster, db, post)
    moving = Moving(cluster, source, post)
    moving.move(keys.latest(post), keys.feed(keys.partition_of_post(post)), keys.post(post))
    began = time.monotonic()
    with pytest.raises((Unreachable, Unknown)):  # Unknown if its time ends during an attempt
        await comments.add(db, "bob", post, "lost")
    assert DEADLINE <= time.monotonic() - began < 3 * DEADLINE
    tried = refused(source, "TRYAGAIN")
    adding = asyncio.create_task(comments.add(db, "bob", post, "waits"))
    await asyncio.to_thread(until, lambda: refused(source, "TRYAGAIN") > tried)
    await asyncio.to_thread(moving.finish)
    await adding
    assert [row.text for row in (await comments.page(db, NO_SEGMENTS, post, 9)).comments] == ["waits"]


async def test_a_script_that_stopped_at_a_key_that_has_moved_is_unknown_and_a_read_is_not(cluster, db):
    post = await make_post(db, "dave", PARTITIONS)
    partition = keys.partition_of_post(post)
    source = await primary_of(cluster, db, post)
    moving = Moving(cluster, source, post)
    leaves = [name for name in source.client.cluster("GETKEYSINSLOT", moving.slot, 10_000) if name.startswith("leaf:")]
    moving.move(*leaves)
    named, args = [keys.post(post), keys.leaves(partition)], ["dave", keys.entry("dave", post)]
    with pytest.raises(Unknown, match="the data were moved"):
        await db.call("index_post", named, *args, keys.leaf_prefix(partition), LEAF_ENTRIES, 1)
    with pytest.raises(Unreachable, match="the data were moved"):
        await posts.of_user(db, PARTITIONS, "dave", posts.STATUSES, 9)
    moving.finish()
    assert [row.id for row in (await posts.of_user(db, PARTITIONS, "dave", posts.STATUSES, 9)).posts] == [post]


@contextmanager
def announced(cluster, node):
    """A proxy before a node. All nodes say that it is the node."""
    with Proxy(node.port) as proxy:
        announce(cluster, node, proxy.port)
        yield proxy
        announce(cluster, node, node.port)


def announce(cluster, node, port: int) -> None:
    """Makes all nodes say that a node has this port. They learn it from the node within a second."""

    def all_say() -> bool:
        known = [other.client.execute_command("CLUSTER SLOTS") for other in cluster.nodes]
        return all(port in [primary[1] for _, _, primary, *_ in ranges] for ranges in known)

    node.client.config_set("cluster-announce-port", port)
    until(all_say, what="all nodes know the port")


async def test_a_write_whose_reply_was_lost_is_unknown_and_not_repeated_and_a_read_is(cluster, db):
    post = (await publish(db, 1))[0]
    with announced(cluster, await primary_of(cluster, db, post)) as proxy:
        client = Cluster(cluster.url)
        await asyncio.gather(comments.add(client, "bob", post, "0"), posts.read(client, post))
        assert proxy.down, "its calls pass the proxy"
        for how in ("fin", "rst", "silence"):
            proxy.lose(how=how)
            with pytest.raises(Unknown):
                await comments.add(client, "bob", post, f"lost by {how}")
            assert proxy.lost.is_set()
            await comments.add(client, "bob", post, f"after {how}")
        expected = [f"{when} {how}" for how in ("fin", "rst", "silence") for when in ("lost by", "after")]
        for how in ("fin", "rst"):
            proxy.lose(how=how)
            found = (await comments.page(client, NO_SEGMENTS, post, 9)).comments
            assert proxy.lost.is_set() and [row.text for row in found] == [*reversed(expected), "0"]
        proxy.lose(how="silence")
        with pytest.raises(Unreachable):  # its time is over, too
            await comments.page(client, NO_SEGMENTS, post, 9)
        await client.close()


async def test_after_a_lost_reply_the_next_call_goes_to_the_node_that_has_the_slot_then(cluster, db):
    """A primary that hangs accepts connections and never answers. Meanwhile a replica may have taken its place."""
    post = (await publish(db, 1))[0]
    client, node = Cluster(cluster.url), await primary_of(cluster, db, post)
    with announced(cluster, node) as proxy:
        await comments.add(client, "bob", post, "0")
        await asyncio.to_thread(announce, cluster, node, node.port)
        proxy.delay = 60
        with pytest.raises(Unknown):
            await comments.add(client, "bob", post, "lost")
        added, _ = await comments.add(client, "bob", post, "1")
    assert (await comments.read(client, NO_SEGMENTS, post, added.id)).text == "1"
    await client.close()


async def test_a_page_of_the_feed_is_whole_although_the_client_has_an_old_map(cluster, db):
    """A primary is asked for all of its partitions at once, and only the first of them names the slot of the call."""
    cluster.client.flushall()
    found = await publish(db, 40)
    before = await posts.feed(db, PARTITIONS, 40)
    assert {row.id for row in before.posts} == set(found)
    right = await db.groups(PARTITIONS)
    one, other = right[:2]
    db._owners[slot_of(keys.feed(other[0]))] = db._owners[slot_of(keys.feed(one[0]))]
    assert sorted(await db.groups(PARTITIONS)) != sorted(right)
    assert await posts.feed(db, PARTITIONS, 40) == before
    assert sorted(await db.groups(PARTITIONS)) == sorted(right)


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
    cluster = ClusterServer("valkey", 3, 2, "--min-replicas-to-write", "1")
    db = Cluster(cluster.url, replicas=1)
    try:
        found = await publish(db, 16)
        shard = {node.port: [] for node in cluster.nodes}
        for post in found:
            shard[(await primary_of(cluster, db, post)).port].append(post)
        victim = next(node for node in cluster.nodes if shard[node.port])
        token = (await changes.since(db, PARTITIONS, 1, None)).token
        assert (await changes.since(db, PARTITIONS, 1, token)).token == token
        writing = asyncio.create_task(write(db, found, 8))
        await asyncio.sleep(1)
        victim.process.kill()
        done = await writing
        assert max(seconds for seconds, _, _ in done) < 1.9
        lost = shard[victim.port]
        others = [outcome for _, post, outcome in done if post not in lost]
        assert all("-" in outcome for outcome in others), "the other shards answered all the time"
        pages = {post: await comments.page(db, NO_SEGMENTS, post, 100_000) for post in lost}
        kept = {post: {row.id for row in page.comments} for post, page in pages.items()}
        answered = [(post, outcome) for _, post, outcome in done if post in lost and "-" in outcome]
        assert all(outcome in kept[post] for post, outcome in answered)
        assert "-" in [outcome for _, post, outcome in done if post in lost][-1], "and this one answers again"

        with pytest.raises(Outdated):  # it may have seen comments that are lost
            await changes.since(db, PARTITIONS, 1, token)
        another = Cluster(cluster.url)
        tokens = [(await changes.since(client, PARTITIONS, 1, None)).token for client in (db, another)]
        await another.close()
        assert tokens[0] == tokens[1] and not (await changes.since(db, PARTITIONS, 1, tokens[0])).posts
        timelines = [[timeline for timeline, _ in each.seen] for each in (token, tokens[0])]
        changed = {partition for partition, pair in enumerate(zip(*timelines, strict=True)) if pair[0] != pair[1]}
        assert changed == set(range(cluster.nodes.index(victim), PARTITIONS, 3))
        feed = await posts.feed(db, PARTITIONS, 9)
        assert changes.issue(db, feed.seen) == tokens[0]
    finally:
        await db.close()
        cluster.close()


def place_of(db: Cluster, node) -> str:
    return next(place for place, known in db._nodes.items() if known is node)
