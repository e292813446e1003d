"""Restores a whole Cluster to 20 random seconds across failovers and migrations.

    PYTHONPATH=tests python -m tests.drills.cluster_restore [SECONDS]

Three primaries with two replicas each, a shipper for each node, and writers whose writes must reach a replica. For
SECONDS (100) primaries are killed together with their shippers, and come back as replicas. Meanwhile one partition
after the other moves to another primary. Then each restored Cluster is started. At the end of its second it must have
each write that was answered before, and none that was begun later or whose deletion was answered before. Joining the
nodes must cost no key, and `check` must find nothing.
"""

import asyncio
import logging
import os
import random
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import redis
from clusters import ClusterNode, ClusterServer
from conftest import ROOT
from parts import until
from shards import PARTITIONS, History, read_restored, settings_in, settings_of, writing_to

from storage.backup import owners
from storage.backup import state as shipper_state
from storage.db import forming, topology
from storage.db.cluster import Cluster
from storage.objects import open_store
from storage.settings import Settings

ROUNDS = 20  # restores
END = 570  # seconds after which no further restore begins


class Shipped:
    """A Cluster with a shipper process for each node."""

    def __init__(self, settings: Settings):
        self.cluster = ClusterServer("valkey", 3, 2, "--min-replicas-to-write", "1")
        self.each = {node.port: settings_of(node, self.cluster, settings) for node in self.cluster.nodes}
        self.shippers: dict[int, subprocess.Popen] = {}
        self.ids = {node.port: node.client.cluster("MYID") for node in self.cluster.nodes}
        for node in self.cluster.nodes:
            self.ship(node)

    def ship(self, node: ClusterNode) -> None:
        chosen = self.each[node.port]
        environment = {
            **os.environ,
            "IMAGEGRAM_DATA": str(chosen.data),
            "IMAGEGRAM_REDIS_URL": chosen.redis_url,
            "IMAGEGRAM_REDIS_NODE": f"127.0.0.1:{node.port}",
            "IMAGEGRAM_QUEUE_URL": "redis://127.0.0.1:1",
            "IMAGEGRAM_BACKUP_STORE": chosen.backup_store_url,
            "IMAGEGRAM_VERIFY_EVERY": "0",
            "IMAGEGRAM_SNAPSHOT_EVERY": "30",
        }
        command = [sys.executable, "-m", "storage", "ship"]
        with (chosen.data / "ship.log").open("ab") as log:
            self.shippers[node.port] = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=log)

    def close(self) -> None:
        for shipper in self.shippers.values():
            shipper.kill()
            shipper.wait()
        self.cluster.close()

    def members(self) -> dict[str, topology.Member]:
        """The nodes by their ids, as one that lives knows them."""
        for node in random.sample(self.cluster.nodes, len(self.cluster.nodes)):
            with suppress(redis.RedisError):
                connection = redis.Redis(port=node.port, decode_responses=True, socket_timeout=1)
                return {one.id: one for one in topology.parse(connection.execute_command("CLUSTER", "NODES"))}
        raise AssertionError("no node answers")

    def primaries(self) -> list[ClusterNode]:
        members = self.members()
        return [node for node in self.cluster.nodes if members[self.ids[node.port]].slots]

    def caught_up(self) -> bool:
        lags = [shipper_state.read(one)["lag"] for one in self.each.values()]
        return all(lag is not None and lag < 2 for lag in lags)


async def fail_over(site: Shipped) -> None:
    """Kills a primary and its shipper, waits for another primary, and starts both again as those of a replica."""
    victim = random.choice(await asyncio.to_thread(site.primaries))
    site.shippers[victim.port].kill()
    victim.kill()
    await until(lambda: not site.members()[site.ids[victim.port]].slots, "a replica was promoted", 30)
    await asyncio.sleep(random.random() * 2)
    site.shippers[victim.port].wait()
    await asyncio.to_thread(victim.start)
    site.ship(victim)

    def follows() -> bool:
        with suppress(redis.RedisError):
            return victim.client.info("replication").get("master_link_status") == "up"
        return False

    with suppress(AssertionError):
        return await until(follows, "the old primary follows the new one", 5)
    # If some of its slots have been moved to another shard meanwhile, it is a primary without slots now.
    db = Cluster(site.cluster.url)
    await forming.form(db, 3, 0, lambda line: None)
    await db.close()
    await until(follows, "the node is a replica again", 30)


async def migrate(site: Shipped) -> bool:
    """Moves a partition to another primary. Returns whether it moved: a failover may come between."""
    slot = topology.partition_slot(random.randrange(PARTITIONS))
    members = await asyncio.to_thread(site.members)
    primaries = await asyncio.to_thread(site.primaries)
    source = next((node for node in primaries if slot in members[site.ids[node.port]].slots), None)
    targets = [node for node in primaries if node is not source]
    if source is None or not targets:
        return False
    target = site.ids[random.choice(targets).port]
    with suppress(redis.RedisError):
        await asyncio.to_thread(source.client.execute_command, *topology.command(target, [slot]))
        end = time.monotonic() + 10
        while time.monotonic() < end:
            if slot in (await asyncio.to_thread(site.members))[target].slots:
                return True
            await asyncio.sleep(0.1)
    return False


async def run(seconds: int) -> None:
    began = time.monotonic()
    history, moved, killed = History(), 0, 0
    with tempfile.TemporaryDirectory(prefix="ig-") as folder:
        settings = replace(settings_in(Path(folder), "valkey"), replicas=1)
        site = await asyncio.to_thread(Shipped, settings)
        try:
            async with writing_to(site.cluster, settings, history, 8, 0.02) as db:
                await until(site.caught_up, "all nodes are shipped", 60)
                await asyncio.sleep(2)
                first, end = int(time.time()), time.monotonic() + seconds

                async def move_all_the_time() -> None:
                    nonlocal moved
                    while time.monotonic() < end:
                        moved += await migrate(site)
                        await asyncio.sleep(random.random())

                async def publish_all_the_time() -> None:
                    while time.monotonic() < end:
                        await history.publish(db, settings, 1 + random.randrange(PARTITIONS))
                        await asyncio.sleep(5)

                others = [asyncio.create_task(work()) for work in (move_all_the_time, publish_all_the_time)]
                while time.monotonic() < end - 10:
                    await fail_over(site)
                    killed += 1
                    await asyncio.sleep(random.random() * 4)
                await asyncio.gather(*others)
                last = int(time.time())
                history.stopping = True
                await asyncio.sleep(1)
                await until(site.caught_up, "all nodes are shipped", 60)
        finally:
            site.close()
        records = sum(map(len, (await owners.read(open_store(settings.backup_store_url))).values()))
        answered = sum(one.answered < float("inf") for one in history.comments.values())
        print(
            f"{last - first} s: {answered} comments and {len(history.posts)} posts answered, {history.unknown} calls"
            f" unknown or refused; {killed} primaries killed with their shippers, {moved} partitions moved,"
            f" {records} records",
            flush=True,
        )
        lacks = wrongs = disputed = succeeded = done = 0
        durations = []
        for second in random.sample(range(first, last), ROUNDS):
            if time.monotonic() - began > END:
                break
            lines: list[str] = []
            started = time.monotonic()
            to = Path(folder, f"restored-{second}")
            found = await read_restored(settings, "valkey", to, second, lines.append)
            durations.append(time.monotonic() - started)
            missing, wrong = history.compare(found, second)
            lacks, wrongs, done = lacks + missing, wrongs + wrong, done + 1
            disputed += any("slots were moved then" in line for line in lines)
            succeeded += any("was its replica then" in line for line in lines)
            if missing or wrong:
                print(f"second {second}: {missing} missing, {wrong} wrong", *lines, sep="\n  ", flush=True)
        durations.sort()
        print(
            f"{done} random seconds restored: {lacks} answered writes missing, {wrongs} of other seconds; 0 keys lost"
            f" by MEET, 0 flaws; {disputed} within a move of slots, {succeeded} after the end of"
            f" a lost primary's chain;"
            f" {durations[len(durations) // 2]:.1f} s each (p50), {durations[-1]:.1f} s at most"
        )
        assert done == ROUNDS and not lacks and not wrongs


if __name__ == "__main__":
    logging.getLogger("imagegram.ship").setLevel(logging.CRITICAL)
    asyncio.run(run(int(sys.argv[1]) if len(sys.argv) > 1 else 100))
