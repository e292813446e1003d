"""Starts the peer: its application, and a PostgreSQL of its own in a temporary folder with the same posts."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import httpx

from tests.bench.fill import TEXT, rows
from tests.bench.parts import SERVER, pin
from tests.conftest import ROOT, free_port, until

PROGRAMS = Path("/usr/lib/postgresql/15/bin")
HERE = Path(__file__).parent
CONNECTIONS = 10  # measured: 20 are no faster, 5 are slower with comments, 32 are slower with the feed
OPTIONS = {
    "listen_addresses": "",
    "shared_buffers": "1GB",
    "effective_cache_size": "8GB",
    "synchronous_commit": "on",
    "fsync": "on",
    "max_wal_size": "8GB",
    "checkpoint_timeout": "30min",
    "wal_buffers": "64MB",
    "random_page_cost": "1.1",
    "jit": "off",
    "autovacuum_naptime": "10s",
}


class Peer:
    """One post for each number in `counts`, with this number of comments. `secret` signs the tokens that it accepts."""

    def __init__(self, counts: list[int], secret: str):
        self.folder = Path(tempfile.mkdtemp(prefix="pg-"))
        # PostgreSQL refuses to run as root.
        run_as: list[str] = []
        if os.geteuid() == 0:
            run_as = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
            shutil.chown(self.folder, "postgres", "postgres")
        data = self.folder / "data"
        initdb = [*run_as, str(PROGRAMS / "initdb"), "-D", str(data), "-U", "peer", "-A", "trust", "-E", "UTF8"]
        subprocess.run([*initdb, "--no-locale"], check=True, stdout=subprocess.DEVNULL, cwd="/")
        options = [word for name, value in OPTIONS.items() for word in ("-c", f"{name}={value}")]
        self.database = subprocess.Popen(
            [*run_as, str(PROGRAMS / "postgres"), "-D", str(data), "-k", str(self.folder), *options],
            cwd="/",
            stderr=(self.folder / "log").open("w"),
        )
        self.dsn = f"postgresql://peer@/postgres?host={self.folder}"
        until(lambda: (self.folder / ".s.PGSQL.5432").exists(), what="PostgreSQL")
        self.ids: list[str] = []
        asyncio.run(self.fill(counts))
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        environment = {"PEER_DATABASE": self.dsn, "PEER_SECRET": secret, "PEER_CONNECTIONS": str(CONNECTIONS)}
        command = [sys.executable, "-m", "uvicorn", "tests.bench.peer.app:app", "--port", str(self.port)]
        command += ["--loop", "uvloop", "--http", "httptools", "--no-access-log", "--log-level", "warning"]
        self.process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environment})
        pin(self.process.pid, SERVER)  # not PostgreSQL: it may use both cores, because it was slower on one
        until(lambda: httpx.get(f"{self.url}/v1/posts?limit=1").status_code == 200, what="the peer")

    async def fill(self, counts: list[int]) -> None:
        import asyncpg  # here, because --help and the parts without a peer do not need it

        deadline = time.monotonic() + 20
        while True:
            try:
                connection = await asyncpg.connect(self.dsn)
                break
            except asyncpg.CannotConnectNowError:  # PostgreSQL is starting
                assert time.monotonic() < deadline, "PostgreSQL does not start"
                await asyncio.sleep(0.1)
        await connection.execute((HERE / "schema.sql").read_text())
        posts, comments = [], []
        for number, row in enumerate(rows(counts)):
            at = datetime.fromtimestamp(1_790_000_000 + number, UTC)
            posts.append((row.id, row.author, row.caption, "ready", row.thumbhash, at, len(row.comments)))
            comments += [
                (row.id, author, TEXT, datetime.fromtimestamp(int(comment.split("-")[0]) / 1000, UTC))
                for comment, author in row.comments
            ]
            self.ids.append(row.id)
        await connection.copy_records_to_table("posts", records=posts)
        columns = ["post_id", "author", "text", "created_at"]
        await connection.copy_records_to_table("comments", records=comments, columns=columns)
        for statement in (HERE / "indexes.sql").read_text().split(";"):
            if statement.strip():
                await connection.execute(statement)
        await connection.execute("CHECKPOINT")
        await connection.close()

    def cursors(self, number: int) -> list[str]:
        """Cursors spread evenly over the feed."""
        import asyncpg

        async def fetch() -> list:
            connection = await asyncpg.connect(self.dsn)
            order = "SELECT comment_count, id FROM posts ORDER BY comment_count DESC, id DESC"
            posts = await connection.fetch(order)
            await connection.close()
            return posts

        posts = asyncio.run(fetch())
        step = (len(posts) - 100) // number
        return [f"{posts[part * step][0]}:{posts[part * step][1]}" for part in range(number)]

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()
        self.database.send_signal(signal.SIGINT)  # PostgreSQL's fast shutdown
        self.database.wait(60)
        shutil.rmtree(self.folder)
