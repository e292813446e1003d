"""A real Cluster on loopback: primaries and replicas of Valkey or Redis, each in a folder of its own."""

import random
import socket
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

import redis as redis_client
from conftest import ROOT, SERVERS, until

from storage.db.cluster import SLOTS, slot_of


class Client(redis_client.RedisCluster):
    """redis-py's client, whose commands for a whole server go to all primaries."""

    def flushall(self):
        return super().flushall(target_nodes="primaries")

    def keys(self, pattern: str = "*"):
        return super().keys(pattern, target_nodes="primaries")

    def dbsize(self):
        return super().dbsize(target_nodes="primaries")


class ClusterNode:
    def __init__(self, kind: str, folder: Path, *options: str):
        self.folder, self.port = folder, cluster_port()
        folder.mkdir()
        conf, cluster = (str(ROOT / "storage" / "db" / name) for name in ("redis.conf", "redis-cluster.conf"))
        place = ["--dir", str(folder), "--port", str(self.port), "--logfile", "log"]
        # Most tests have one replica or none, and write also without it.
        self.command = [SERVERS[kind], conf, "--include", cluster, "--min-replicas-to-write", "0", *place, *options]
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self.command, restore_signals=False)
        self.client = redis_client.Redis(port=self.port, decode_responses=True)
        try:
            until(self.client.ping, what="Redis")
        except AssertionError:
            self.kill()
            raise

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class ClusterServer:
    """Its slots are placed so that each primary has every n-th of the partitions 0 to `partitions` - 1."""

    def __init__(self, kind: str, primaries: int = 3, replicas: int = 1, partitions: int = 16, *options: str):
        self.kind = kind
        self.temporary = tempfile.TemporaryDirectory(prefix="ig-")
        folder = Path(self.temporary.name)
        count = primaries * (1 + replicas)
        self.nodes: list[ClusterNode] = []
        try:
            self.form(kind, folder, primaries, count, partitions, options)
        except BaseException:
            self.close()
            raise
        self.url = "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)
        self.client = Client("127.0.0.1", self.nodes[0].port, decode_responses=True)

    def form(self, kind: str, folder: Path, primaries: int, count: int, partitions: int, options: tuple) -> None:
        for number in range(count):
            self.nodes.append(ClusterNode(kind, folder / str(number), *options))
        for node in self.nodes[1:]:
            node.client.cluster("MEET", "127.0.0.1", self.nodes[0].port)
        for node, slots in zip(self.nodes, placement(primaries, partitions), strict=False):
            node.client.cluster("ADDSLOTS", *slots)
        until(lambda: all(len(node.client.cluster("NODES")) == count for node in self.nodes), 20, "all know all")
        for number, replica in enumerate(self.nodes[primaries:]):
            replica.client.cluster("REPLICATE", self.nodes[number % primaries].client.cluster("MYID"))
        until(self.complete, 30, "the cluster is complete")

    def complete(self) -> bool:
        infos = [node.client.cluster("INFO") for node in self.nodes]
        synced = [node.client.info("replication") for node in self.nodes]
        return all(info["cluster_state"] == "ok" for info in infos) and all(
            role["role"] == "master" or role["master_link_status"] == "up" for role in synced
        )

    def close(self) -> None:
        for node in self.nodes:
            with suppress(ProcessLookupError):
                node.kill()
        self.temporary.cleanup()


def placement(primaries: int, partitions: int) -> list[list[int]]:
    """The slots of each primary."""
    found: list[list[int]] = [[] for _ in range(primaries)]
    taken = {slot_of(f"x:{{{partition}}}"): partition % primaries for partition in range(partitions)}
    for slot in range(SLOTS):
        found[taken.get(slot, slot * primaries // SLOTS)].append(slot)
    return found


def cluster_port() -> int:
    """A port that is free, as is the one 10,000 higher, for the cluster bus. Linux gives neither to connections."""
    while True:
        port = random.randrange(20_000, 22_768)
        with suppress(OSError), socket.socket() as own, socket.socket() as bus:
            own.bind(("127.0.0.1", port))
            bus.bind(("127.0.0.1", port + 10_000))
            return port
