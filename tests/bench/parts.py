"""The servers that are measured: processes of their own, on loopback, with free ports and temporary folders.

The API, bare Sanic and the peer's application share one core. Redis, wrk and the other drivers share the other core.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

from tests.conftest import ROOT, RedisServer, Site, free_port, until

SERVER, DRIVER = 0, 1  # cores
DAY = 24 * 3600  # seconds


def pin(pid: int, *cores: int) -> None:
    """Restricts a process to cores, and also what it starts afterwards."""
    os.sched_setaffinity(pid, cores)


class Filling:
    """A mixin for a server that can switch its append-only file off while a data set is written."""

    @contextlib.contextmanager
    def filling(self) -> Iterator[None]:
        """Switches the append-only file off during the `with`. Afterwards waits until it holds all data."""
        self.client.config_set("appendonly", "no")
        yield
        self.client.config_set("appendonly", "yes")
        until(self.rewrite_done, 120, "the append-only file is rewritten")

    def rewrite_done(self) -> bool:
        info = self.client.info("persistence")
        return not info["aof_rewrite_in_progress"] and not info["aof_rewrite_scheduled"]


class Redis(Filling, RedisServer):
    """A Redis on the drivers' core."""

    def __init__(self, kind: str = "valkey", *options: str):
        super().__init__(kind, *options)
        pin(self.process.pid, DRIVER)


class Api(Site):
    """Our API: one process on one core. `root` is the checkout whose code runs."""

    def __init__(self, redis: RedisServer, folder: Path, root: Path = ROOT, **settings):
        super().__init__(redis.url, folder, **settings)
        self.root = root
        self.process = self.start("api")
        if self.environment["IMAGEGRAM_WORKERS"] == "1":
            pin(self.process.pid, SERVER)
        until(lambda: httpx.get(f"{self.url}/readyz").status_code == 200, what="the API")

    def bearer(self, user: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token(user, exp=int(time.time()) + DAY)}"}

    def pids(self) -> list[int]:
        """The processes that serve requests."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in children.split()]


class Bare:
    """Bare Sanic with the API's server settings. Answers each name in `answers` with fixed bytes."""

    def __init__(self, folder: Path, answers: dict[str, dict]):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        file = folder / "bare.json"
        file.write_text(json.dumps(answers))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.bare", str(self.port), str(file), str(folder)], cwd=ROOT
        )
        pin(self.process.pid, SERVER)
        until(lambda: httpx.get(f"{self.url}/healthz").status_code == 200, what="bare Sanic")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def fixed_answer(answer: httpx.Response) -> dict:
    """An answer of the API as JSON from which bare Sanic can give the same. Leaves out the headers that Sanic sets."""
    by_sanic = ("content-length", "connection", "content-type", "keep-alive")
    return {
        "status": answer.status_code,
        "content_type": answer.headers.get("content-type"),
        "headers": {name.title(): value for name, value in answer.headers.items() if name not in by_sanic},
        "body": answer.content.decode("latin-1"),
    }
