"""The parts that are measured: processes of their own, on loopback, free ports and temporary folders.

The API, bare Sanic and the peer's application have one core; Redis, wrk and other drivers have the other.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx

from tests.conftest import ROOT, RedisServer, Site, free_port, until

SERVER, DRIVER = 0, 1  # cores
DAY = 24 * 3600


def pin(pid: int, *cores: int) -> None:
    """Also what the process starts afterwards."""
    os.sched_setaffinity(pid, cores)


class Filling:
    """A server whose append-only file is off while a data set is filled in."""

    def filling(self, off: bool) -> None:
        self.client.config_set("appendonly", "no" if off else "yes")
        if not off:
            until(self.rested, 120, "the rewritten file")

    def rested(self) -> bool:
        said = self.client.info("persistence")
        return not said["aof_rewrite_in_progress"] and not said["aof_rewrite_scheduled"]


class Redis(Filling, RedisServer):
    def __init__(self, kind: str = "valkey", *options: str):
        super().__init__(kind, *options)
        pin(self.process.pid, DRIVER)


class Api(Site):
    """Our API: one process on one core, of the checkout at `root`."""

    def __init__(self, redis: RedisServer, folder: Path, root: Path = ROOT, **settings):
        super().__init__(redis.url, folder, **settings)
        self.root = root
        self.process = self.start("api")
        if self.environment["IMAGEGRAM_WORKERS"] == "1":
            pin(self.process.pid, SERVER)
        until(lambda: httpx.get(f"{self.url}/readyz").status_code == 200, what="the API")

    def bearer(self, user: str) -> dict[str, str]:
        import time

        return {"Authorization": f"Bearer {self.token(user, exp=int(time.time()) + DAY)}"}

    def pids(self) -> list[int]:
        """The serving processes."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in children.split()]


class Bare:
    """Bare Sanic with the API's server settings, which answers given bytes."""

    def __init__(self, folder: Path, answers: dict[str, dict]):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        given = folder / "bare.json"
        given.write_text(json.dumps(answers))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.bare", str(self.port), str(given), str(folder)], cwd=ROOT
        )
        pin(self.process.pid, SERVER)
        until(lambda: httpx.get(f"{self.url}/healthz").status_code == 200, what="bare Sanic")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def given(answer: httpx.Response) -> dict:
    """An answer of the API, for bare Sanic to give. What it sets by itself is left out."""
    own = ("content-length", "connection", "content-type", "keep-alive")
    return {
        "status": answer.status_code,
        "type": answer.headers.get("content-type"),
        "headers": {name.title(): value for name, value in answer.headers.items() if name not in own},
        "body": answer.content.decode("latin-1"),
    }
