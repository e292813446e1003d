"""From one Redis to a small site to a cluster, while comments are written: the runbooks of docs/production.md.

Each step is what an operator does, with the commands that the page names. Writers add comments all the time. Afterwards
every comment that was acknowledged is there once, and check finds nothing.
"""

import asyncio
import contextlib
import random
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from clusters import ClusterNode
from conftest import RedisServer, until
from making import NO_SEGMENTS, make_post
from test_storage_topology import run

from storage import check, comments
from storage.db.cluster import Cluster, connect
from storage.errors import Refusal, Unknown
from storage.objects import open_store

WRITERS = 16
PARTITIONS = 16


def url(nodes: list[ClusterNode]) -> str:
    return "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in nodes)


def cluster(nodes, *command: str, **settings: str) -> str:
    """Runs `imagegram-storage cluster`, which must succeed."""
    code, output = run(nodes, *command, **{"IMAGEGRAM_PARTITIONS": str(PARTITIONS), **settings})
    assert code == 0, output[-3000:]
    return output


def admin(*command: str) -> str:
    done = subprocess.run(["redis-cli", *command], text=True, capture_output=True, check=True, timeout=60)
    return done.stdout


class Writers:
    """Add comments to posts until they are stopped, and note the ids of those that were acknowledged."""

    def __init__(self, db, posts: list[str]):
        self.db, self.posts = db, posts
        self.acknowledged: list[tuple[str, str]] = []
        self.unknown, self.refused, self.longest = 0, 0, 0.0
        self.tasks = [asyncio.create_task(self.write(number)) for number in range(WRITERS)]

    async def write(self, number: int) -> None:
        last = time.monotonic()
        while True:
            post = random.choice(self.posts)
            try:
                comment, _ = await comments.add(self.db, f"user{number}", post, "Hello")
                self.acknowledged.append((post, comment.id))
                self.longest, last = max(self.longest, time.monotonic() - last), time.monotonic()
            except Unknown:
                self.unknown += 1
            except Refusal:
                self.refused += 1
                await asyncio.sleep(0.1)
            await asyncio.sleep(0.005)

    @contextlib.contextmanager
    def during(self, step: str):
        """Prints what writers saw during a step."""
        before, self.longest = (len(self.acknowledged), self.unknown, self.refused), 0.0
        yield
        after = len(self.acknowledged), self.unknown, self.refused
        counts = [new - old for new, old in zip(after, before, strict=True)]
        print(f"| {step} | {' | '.join(map(str, counts))} | {self.longest:.1f} s |", flush=True)

    async def stop(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


async def in_thread(work, *arguments, **named):
    return await asyncio.to_thread(work, *arguments, **named)


def primaries(nodes: list[ClusterNode]) -> list[ClusterNode]:
    return [node for node in nodes if node.client.role()[0] == "master" and node.client.dbsize()]


def replica_of(primary: ClusterNode, nodes: list[ClusterNode]) -> ClusterNode:
    return next(node for node in nodes if node.client.info("replication").get("master_port") == primary.port)


def caught_up(nodes: list[ClusterNode]) -> bool:
    roles = [node.client.info("replication") for node in nodes]
    return all(role["role"] == "master" or role["master_link_status"] == "up" for role in roles)


def restart(node: ClusterNode, nodes: list[ClusterNode]) -> None:
    node.process.terminate()
    node.process.wait(10)
    node.start()
    until(lambda: caught_up(nodes), 30, "the replicas")


def hand_over(primary: ClusterNode, nodes: list[ClusterNode]) -> None:
    """A replica takes the place of a primary, which loses nothing."""
    replica = replica_of(primary, nodes)
    assert admin("-p", str(replica.port), "CLUSTER", "FAILOVER") == "OK\n"
    until(lambda: replica.client.role()[0] == "master" and primary.client.role()[0] == "slave", 20, "the failover")


@pytest.mark.timeout(500)
async def test_one_redis_becomes_a_small_site_then_a_cluster_under_writers(tmp_path):
    one = RedisServer("valkey")
    nodes: list[ClusterNode] = []
    options = ("--min-replicas-to-write", "1")
    try:
        db = connect(one.url)
        posts = [await make_post(db, f"user{number}") for number in range(30)]
        first = [(post, (await comments.add(db, "bob", post, "first"))[0].id) for post in posts]
        await db.close()

        print("\n| step | acknowledged | unknown | refused | longest pause |\n|---|---|---|---|---|")
        began = time.monotonic()
        one.process.terminate()
        one.process.wait(10)
        nodes = [ClusterNode("valkey", Path(one.folder.name), *options)]
        nodes += [ClusterNode("valkey", tmp_path / str(number), *options) for number in range(1, 5)]
        await in_thread(cluster, nodes, "form", "--primaries", "1", "--arbiters", "2")
        print(f"| one Redis becomes a small site | | | | {time.monotonic() - began:.1f} s |")
        db = Cluster(url(nodes), replicas=1)
        writers = Writers(db, posts)

        with writers.during("a node that lost its disk is replaced"):
            lost = replica_of(nodes[0], nodes)
            old = lost.client.cluster("MYID")
            lost.kill()
            shutil.rmtree(lost.folder)
            lost.folder.mkdir()
            lost.start()
            await in_thread(run, nodes, "form", "--primaries", "1", "--arbiters", "2")
            admin("--cluster", "call", f"127.0.0.1:{nodes[0].port}", "cluster", "forget", old)
            until(lambda: run(nodes, "show")[0] == 0, 20, "the node is forgotten")

        with writers.during("two shards are added"):
            nodes += [ClusterNode("valkey", tmp_path / str(number), *options) for number in range(5, 11)]
            await in_thread(cluster, nodes, "form", "--primaries", "3", "--arbiters", "2")
        with writers.during("partitions: 1 to 16"):
            db.partitions = PARTITIONS
            posts += [await make_post(db, f"new{number}", PARTITIONS) for number in range(60)]
            await asyncio.sleep(1)
        with writers.during("partitions are placed"):
            await in_thread(cluster, nodes, "place", "--yes")
        assert len(primaries(nodes)) == 3

        with writers.during("each server is restarted, as for an upgrade"):
            for node in [node for node in nodes if node.client.role()[0] == "slave"]:
                await in_thread(restart, node, nodes)
            for node in primaries(nodes):
                await in_thread(hand_over, node, nodes)
                await in_thread(restart, node, nodes)
        with writers.during("a shard is emptied"):
            gone = primaries(nodes)[0]
            await in_thread(cluster, nodes, "place", "--yes", "--without", f"127.0.0.1:{gone.port}")
        with writers.during("and its nodes are removed"):
            copies = [node for node in nodes if node.client.info("replication").get("master_port") == gone.port]
            for node in [*copies, gone]:
                place, name = f"127.0.0.1:{nodes[3].port}", node.client.cluster("MYID")
                await in_thread(admin, "--cluster", "call", place, "cluster", "forget", name)
                node.kill()
                nodes.remove(node)
            await in_thread(cluster, nodes, "show")

        await writers.stop()
        assert writers.acknowledged
        await assert_all_there(db, first + writers.acknowledged, writers.unknown)
        report = await check.check(db, open_store((tmp_path / "store").as_uri()))
        assert not [line for line in report.lines if "original" not in line and "JPEG" not in line], report.lines
        await db.close()
    finally:
        for node in nodes:
            node.kill()
        one.close()


async def assert_all_there(db, acknowledged: list[tuple[str, str]], unknown: int) -> None:
    wanted: dict[str, set[str]] = {}
    for post, comment in acknowledged:
        wanted.setdefault(post, set()).add(comment)
    more = 0
    for post, ids in wanted.items():
        found, after = [], ""
        while True:
            page = await comments.page(db, NO_SEGMENTS, post, 1000, after)
            found += [row.id for row in page.comments]
            if not page.more:
                break
            after = found[-1]
        assert ids <= set(found) and len(found) == len(set(found))
        more += len(found) - len(ids)
    assert more <= unknown + WRITERS  # each of them was interrupted in a write
