"""A real Cluster on loopback: primaries and replicas of Valkey or Redis, each in a folder of its own."""

import random
import socket
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

import redis as redis_client
from conftest import ROOT, SERVERS, SERVING, RedisServer, until
from proxy import Proxy

from storage.db.topology import placement


class Client(redis_client.RedisCluster):
    """redis-py's client, whose commands for a whole server go to all primaries."""

    queue: RedisServer | None = None  # RQ's Redis, once a test has used it. It is emptied, too

    def flushall(self):
        if self.queue:
            self.queue.client.flushall()
        return super().flushall(target_nodes="primaries")

    def keys(self, pattern: str = "*"):
        return super().keys(pattern, target_nodes="primaries")

    def dbsize(self):
        return super().dbsize(target_nodes="primaries")


class ClusterNode:
    """With `proxied` its replicas follow it through `proxy`. Clients reach Valkey without it, and Redis through it."""

    def __init__(self, kind: str, folder: Path, *options: str, proxied: bool = False):
        self.folder, self.port = folder, cluster_port()
        self.proxy = Proxy(self.port) if proxied else None
        folder.mkdir(exist_ok=True)
        conf, cluster = (str(ROOT / "storage" / "db" / name) for name in ("redis.conf", "redis-cluster.conf"))
        self.socket = str(folder / "s")  # short: the path of a socket has at most 107 bytes
        place = ["--dir", str(folder), "--port", str(self.port), "--unixsocket", self.socket, "--logfile", "log"]
        # By default a primary waits 5 s for further replicas before it sends its data to the first one.
        place += ["--repl-diskless-sync-delay", "0"]
        # Most tests have one replica or none, and write also without it.
        self.command = [SERVERS[kind], conf, "--include", cluster, "--min-replicas-to-write", "0", *place, *options]
        if self.proxy:
            self.command += ["--cluster-announce-port", str(self.proxy.port)]
        if self.proxy and kind == "valkey":
            self.command += ["--cluster-announce-client-port", str(self.port)]
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
    """Its nodes are the primaries, then the arbiters, then the replicas. Each primary has every n-th partition."""

    def __init__(
        self,
        kind: str,
        primaries: int = 3,
        replicas: int = 1,
        *options: str,
        arbiters: int = 0,
        proxied: bool = False,
    ):
        self.kind = kind
        self.temporary = tempfile.TemporaryDirectory(prefix="ig-")
        folder = Path(self.temporary.name)
        self.nodes: list[ClusterNode] = []
        self.client: Client | None = None
        try:
            for number in range(primaries * (1 + replicas) + arbiters):
                self.nodes.append(ClusterNode(kind, folder / str(number), *options, proxied=proxied))
            self.form(primaries, placement(primaries, arbiters))
        except BaseException:
            self.close()
            raise
        self.url = "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)
        self.client = Client("127.0.0.1", self.nodes[0].port, decode_responses=True)
        SERVING[self.url] = self

    @property
    def primaries(self) -> list[redis_client.Redis]:
        """A client of each primary and arbiter."""
        return [node.client for node in self.nodes if node.client.info("replication")["role"] == "master"]

    @property
    def queue(self) -> RedisServer:
        """RQ's Redis, which is started when a test needs it."""
        self.client.queue = self.client.queue or RedisServer(self.kind)
        return self.client.queue

    def form(self, primaries: int, slots: list[list[int]]) -> None:
        for node in self.nodes[1:]:
            node.client.cluster("MEET", "127.0.0.1", self.nodes[0].port)
        for node, own in zip(self.nodes, slots, strict=False):
            node.client.cluster("ADDSLOTS", *own)
        count = len(self.nodes)
        until(lambda: all(len(node.client.cluster("NODES")) == count for node in self.nodes), 20, "all know all")
        for number, replica in enumerate(self.nodes[len(slots) :]):
            replica.client.cluster("REPLICATE", self.nodes[number % primaries].client.cluster("MYID"))
        until(self.complete, 30, "the cluster is complete")

    def complete(self) -> bool:
        infos = [node.client.cluster("INFO") for node in self.nodes]
        synced = [node.client.info("replication") for node in self.nodes]
        return all(info["cluster_state"] == "ok" for info in infos) and all(
            role["role"] == "master" or role["master_link_status"] == "up" for role in synced
        )

    def close(self) -> None:
        if self.client and self.client.queue:
            self.client.queue.close()
        for node in self.nodes:
            with suppress(ProcessLookupError):
                node.kill()
        for node in self.nodes:
            if node.proxy:
                node.proxy.close()
        self.temporary.cleanup()


def cluster_port() -> int:
    """A port that is free, as is the one 10,000 higher, for the cluster bus. Linux gives neither to connections."""
    while True:
        port = random.randrange(20_000, 22_768)
        with suppress(OSError), socket.socket() as own, socket.socket() as bus:
            own.bind(("127.0.0.1", port))
            bus.bind(("127.0.0.1", port + 10_000))
            return port
