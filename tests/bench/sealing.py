"""What it brings to move old comments to the store, and what it costs: memory, the backup, and pages from the store."""

import asyncio
import contextlib
import itertools
import random
import tempfile
import time
from base64 import urlsafe_b64encode
from collections.abc import Iterable
from pathlib import Path

from storage import check, keys, sealing
from storage.db.client import Redis as Client
from storage.errors import Unknown, Unreachable
from storage.objects import Folder, ObjectStore
from storage.segments import Segments
from storage.settings import DAY_MS, HOT_COMMENTS, SEGMENT_COMMENTS
from tests.bench import fill, forecast
from tests.bench.drive import steady
from tests.bench.parts import Api, Redis
from tests.bench.table import Row
from tests.conftest import until

SIZES = ((1000, 100_000), (10_000, 1_000_000), (100_000, 10_000_000))  # posts, and comments of 62 bytes
A_YEAR = 100_000 * 24 * 365  # comments at the forecast
MONTHS = 12  # posts of one month are not quiet yet. All months bring as many
TOGETHER = 16  # posts that are sealed at the same time
QUIET_MS = 30 * DAY_MS
PAGES = 100  # cold pages a second
PAGE = 20


class Nowhere(Segments):
    """Stores nothing: compression takes most of the time, and none of Redis' memory."""

    def __init__(self):
        pass

    async def put(self, *_: object) -> None:
        pass


def zipf(posts: int, comments: int) -> list[int]:
    """The number of comments of each post: Zipf's distribution, in random order."""
    weights = [1 / rank for rank in range(1, posts + 1)]
    found = [int(weight * comments / sum(weights)) for weight in weights]
    for number in range(comments - sum(found)):
        found[number % posts] += 1
    random.Random(5).shuffle(found)
    return found


async def seal_all(url: str, segments: Segments, posts: Iterable[str], hot: int, quiet_ms: int) -> float:
    """Seals all posts as a worker does, but many at the same time. Returns the seconds that Redis took for it."""
    db, waiting = Client(url), iter(posts)

    async def work() -> None:
        for post in waiting:
            more = True
            while more:
                with contextlib.suppress(Unreachable, Unknown):  # Redis is busy with a rewrite: the same step again
                    more = await sealing.step(db, segments, post, hot, quiet_ms, DAY_MS)

    began = await db.info("commandstats")
    await asyncio.gather(*(work() for _ in range(TOGETHER)))
    took = redis_seconds(await db.info("commandstats")) - redis_seconds(began)
    await db.close()
    return took


def redis_seconds(stats: dict[str, str]) -> float:
    """The time that Redis has spent in scripts (INFO commandstats)."""
    calls = (stats.get(f"cmdstat_{name}", "usec=0") for name in ("eval", "evalsha"))
    return sum(int(one.partition("usec=")[2].split(",")[0]) for one in calls) / 1e6


def used(server: Redis) -> int:
    """Bytes that Redis has allocated."""
    return server.client.info("memory")["used_memory"]


def memory(sizes: Iterable[tuple[int, int]]) -> tuple[list[Row], dict]:
    """Memory with all comments in Redis, the newest of each post, and none. Returns rows, and lines to plot."""
    rows, lines = [], {"comments": [], "all in Redis": [], "the newest 20 of each post": [], "all posts quiet": []}
    for posts, comments in sizes:
        with contextlib.closing(Redis()) as server:
            empty = used(server)
            ids = fill.fill(server, zipf(posts, comments))
            states = [used(server) - empty]
            server.client.config_set("appendfsync", "no")  # nothing is lost here
            for hot, quiet_ms in ((HOT_COMMENTS, QUIET_MS), (0, 0)):
                asyncio.run(seal_all(server.url, Nowhere(), ids, hot, quiet_ms))
                states.append(used(server) - empty)
        for name, value in zip(lines, [comments, *states], strict=True):
            lines[name].append(value)
        before, hot, quiet = (value / comments for value in states)
        year = (quiet * (MONTHS - 1) + hot) / MONTHS * A_YEAR / 1e9
        what = f"{comments:,} comments on {posts:,} posts"
        rows += [
            Row(f"memory a comment, posts included, all in Redis: {what}", before, unit="B"),
            Row("the same, the newest 20 of each post in Redis", hot, unit="B"),
            Row("the same, all posts quiet", quiet, unit="B"),
        ]
        if comments < 1_000_000:  # what Redis takes without data is a part of these
            continue
        rows += [
            Row("memory after a year of the forecast, without sealing", before * A_YEAR / 1e9, unit="GB"),
            Row("memory after a year of the forecast", year, 15, most=True, unit="GB", note="one month not quiet"),
        ]
    return rows, lines


def rewritten(server: Redis) -> int:
    """Writes the base of the append-only file anew. Returns its bytes."""
    server.client.bgrewriteaof()
    until(server.rewrite_done, 120, "the rewrite")
    return max(path.stat().st_size for path in Path(server.folder.name, "appendonlydir").glob("*.base.*"))


def restarted(server: Redis) -> float:
    """Kills the server and starts it again. Returns the seconds until it has loaded its data."""
    server.kill()
    began = time.monotonic()
    server.start()
    until(lambda: not server.client.info("persistence")["loading"], 120, "the data")
    return time.monotonic() - began


def checked(server: Redis, store: ObjectStore) -> float:
    """Seconds that a check of all data takes."""

    async def run() -> float:
        db = Client(server.url)
        began = time.monotonic()
        await check.check(db, store)
        await db.close()
        return time.monotonic() - began

    return asyncio.run(run())


def backup(posts: int, comments: int) -> list[Row]:
    """The base, the load after a crash, and a check, before and after all comments moved to a folder store."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ig-")))
        server = stack.enter_context(contextlib.closing(Redis()))
        ids = fill.fill(server, zipf(posts, comments))
        store = Folder(folder)
        states = [(rewritten(server) / 2**20, restarted(server), checked(server, store))]
        took = asyncio.run(seal_all(server.url, Segments(store, memory=0), ids, 0, 0))
        states.append((rewritten(server) / 2**20, restarted(server), checked(server, store)))
    names = ("base of the append-only file", "loading it after a crash", "check")
    rows = []
    for name, unit, before, after in zip(names, ("MiB", "s", "s"), *states, strict=True):
        rows += [Row(f"{name}: all in Redis", before, unit=unit), Row(f"{name}: all posts quiet", after, unit=unit)]
    share = took / comments * 100_000 / 3600 * 100
    rows.append(Row("Redis' time for sealing, at the forecast", share, 2, most=True, unit="%"))
    return rows


def pages(ids: list[str], counts: list[int]) -> list[str]:
    """Addresses of pages of comments that begin at random in a post that has segments."""
    chance, found = random.Random(3), []
    eligible = [post for post, count in zip(ids, counts, strict=True) if count > HOT_COMMENTS + SEGMENT_COMMENTS]
    while len(found) < 2000:
        post = chance.choice(eligible)
        ms = chance.randrange(keys.created_ms(post), int(time.time() * 1000))
        cursor = urlsafe_b64encode(f"{ms}-0".encode()).decode().rstrip("=")
        found.append(f"/v1/posts/{post}/comments?limit={PAGE}&cursor={cursor}")
    return found


def cold(seconds: float, posts: int, comments: int) -> list[Row]:
    """Pages from a folder store, beside the forecast."""
    counts = zipf(posts, comments)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ig-")))
        server = stack.enter_context(contextlib.closing(Redis()))
        ids = fill.fill(server, counts)
        asyncio.run(seal_all(server.url, Segments(Folder(folder / "store"), memory=0), ids, HOT_COMMENTS, QUIET_MS))
        api = stack.enter_context(contextlib.closing(Api(server, folder)))
        with steady(plan(api, pages(ids, counts), ids)) as results:
            time.sleep(seconds)
    stream = results["streams"]["cold page"]
    at = dict(map(tuple, stream["percentiles"]))
    errors = sum(sum(one["errors"].values()) for one in results["streams"].values())
    note = f"p50 {at[50]:.1f} ms, the slowest {at[100]:.1f} ms, {stream['rate']:.0f} a second"
    what = "page of 20 comments from the store, beside the forecast: p99"
    return [Row(what, at[99], 50, most=True, unit="ms", note=note, errors=errors)]


def plan(api: Api, paths: list[str], ids: list[str]) -> dict:
    """The plan for `steady`: cold pages, and the forecast's feeds and comments."""
    load = forecast.LOADS[0]
    stream = {"method": "GET", "headers": {"Accept-Encoding": "br"}, "body": "", "status": 200}
    return {
        "port": api.port,
        "streams": [
            {**stream, "name": "cold page", "rate": PAGES, "paths": paths},
            {**stream, "name": "feed", "rate": load.feeds, "paths": [forecast.FEED]},
            {
                "name": "comment",
                "rate": load.comments,
                "method": "POST",
                "paths": [f"/v1/posts/{post}/comments" for post in itertools.islice(ids, 1000)],
                "headers": api.bearer("writer"),
                "body": '{"text":"' + fill.TEXT + '"}',
                "status": 201,
            },
        ],
    }


def measure(seconds: float, quick: bool) -> tuple[list[Row], dict]:
    """The rows of the table, and the lines of the plot: bytes of memory by state, against the number of comments."""
    rows, lines = memory(SIZES[:1] if quick else SIZES)
    large = SIZES[0] if quick else SIZES[1]
    return rows + backup(*large) + cold(seconds, *large), lines
