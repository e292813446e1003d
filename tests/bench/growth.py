"""What grows with the data and what must not: Redis' own time for a page and a comment, and its memory."""

import contextlib
import random
import tempfile
from base64 import urlsafe_b64decode
from collections.abc import Callable
from pathlib import Path
from statistics import median

from storage import keys
from storage.db.client import SCRIPTS
from storage.settings import DAY_MS, LATEST_COMMENTS, PAGE_BYTES
from tests.bench import fill
from tests.bench.drive import Load, in_turns, middle, ratio
from tests.bench.parts import Api, Redis
from tests.bench.table import Row, of_runs

SIZES = (10_000, 100_000, 1_000_000)
CALLS = 300  # in one pipeline, whose time Redis counts
PAGE = 10
FEED = f"/v1/posts?limit={PAGE}"


def page(place: str = "") -> tuple:
    """A feed page behind a cursor, as storage.posts asks for it."""
    count, _, post = urlsafe_b64decode(place + "==").decode().partition(":")
    named = [keys.feed(0), keys.changes(0), keys.gone(0), keys.epoch(0)]
    arguments = [count, post, PAGE, PAGE_BYTES, keys.post_prefix(0), keys.latest_prefix(0)]
    return "EVALSHA", SCRIPTS["feed_page"].sha, len(named), *named, *arguments


def comment(post: str) -> tuple:
    named = [keys.post(post), keys.comments(post), keys.latest(post), keys.feed(0), keys.changes(0), keys.gone(0)]
    arguments = ["", post, "user-00001", fill.TEXT, LATEST_COMMENTS, "-", DAY_MS]
    return "EVALSHA", SCRIPTS["add_comment"].sha, len(named), *named, *arguments


def spent(server: Redis, calls: list[tuple]) -> float:
    """Redis' own microseconds a call (INFO commandstats)."""
    client = server.client
    for known in SCRIPTS.values():
        client.script_load(known.text)
    client.config_resetstat()
    with client.pipeline(transaction=False) as pipeline:
        for call in calls:
            pipeline.execute_command(*call)
        pipeline.execute()
    return client.info("commandstats")["cmdstat_evalsha"]["usec_per_call"]


def place(server: Redis, rank: int, moved: bool) -> str:
    """The cursor of a post in the feed; `moved`: of one that does not stand there any more."""
    ((post, count),) = server.client.zrange(keys.feed(0), rank, rank, desc=True, withscores=True)
    if moved:
        post = post[:20] + ("0" if post[20] != "0" else "1") + post[21:]
    return fill.urlsafe_b64encode(f"{count:.0f}:{post}".encode()).decode().rstrip("=")


def times(rounds: int, seconds: float, sizes: tuple[int, ...] = SIZES) -> tuple[list[Row], list[dict]]:
    """Rows of the table, and for each size what the plots show."""
    with contextlib.ExitStack() as stack:
        servers, calls, loads, grown = {}, {}, {}, []
        for size in sizes:
            server = servers[size] = Redis()
            stack.callback(server.close)
            ids = fill.fill(server, fill.tied(size))
            more = size * 5 // 1000  # posts above the run of ties
            tie, half = more + 1, more + size * 300 // 1000
            calls[size] = {
                "first page": lambda: page(),
                "first page of the ties": lambda server=server, tie=tie: page(place(server, tie, False)),
                "middle, its post stands there": lambda server=server, half=half: page(
                    place(server, half + random.randrange(1000), False)
                ),
                "middle, its post has moved": lambda server=server, half=half: page(
                    place(server, half + random.randrange(1000), True)
                ),
                "comment": lambda ids=ids: comment(random.choice(ids)),
            }
            memory = server.client.info("memory")["used_memory"]
            grown.append({"posts": size, "memory": memory, "comments": sum(fill.tied(size))})
        found = {size: {name: [] for name in calls[size]} for size in sizes}
        for _ in range(rounds + 1):
            for name in calls[sizes[0]]:
                for size in sizes:
                    asked = [calls[size][name]() for _ in range(CALLS)]
                    found[size][name].append(spent(servers[size], asked))
        for size, server in servers.items():
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ig-")))
            api = Api(server, folder)
            stack.callback(api.close)
            cursors = fill.cursors(server, 100)
            for name, paths in (("first", [FEED]), ("cursors", [f"{FEED}&cursor={cursor}" for cursor in cursors])):
                loads[name, size] = Load(api.url, paths)
        runs = in_turns({who: lambda load=load: load.run(seconds) for who, load in loads.items()}, rounds)
    for said in grown:
        said |= {name: middle(runs[name, said["posts"]], lambda run: run.rate) for name in ("first", "cursors")}
        said |= {name: median(values[1:]) for name, values in found[said["posts"]].items()}  # the first one warms
    small, large = found[sizes[0]], found[sizes[-1]]

    def row(what: str, one: list[float], other: list[float], target: float | None) -> Row:
        ratio = median(a / b for a, b in zip(one[1:], other[1:], strict=True))
        return Row(what, ratio, target, note=f"{median(one[1:]):.1f} and {median(other[1:]):.1f} µs of Redis a page")

    ties = large["first page of the ties"]
    name = f"{sizes[-1]:,}"
    return [
        row(f"first page, Redis' time, 10,000 posts ÷ {name}", small["first page"], large["first page"], 0.95),
        of_runs(
            f"first page with {name} posts ÷ with 10,000",
            runs["first", sizes[-1]],
            ratio(runs["first", sizes[-1]], runs["first", sizes[0]]),
            0.95,
        ),
        row("first page of 600,000 ties ÷ middle", ties, large["middle, its post stands there"], 0.60),
        row("the same, its post has moved", ties, large["middle, its post has moved"], 0.60),
        Row("a comment, 10,000 posts ÷ " + name, median(small["comment"]) / median(large["comment"])),
    ], grown


def used(kind: str, filling: Callable[[Redis], object]) -> int:
    """Bytes by which a server grows. A new one each time: what a flushed one gives back is not all that it took."""
    server = Redis(kind)
    try:
        empty = server.client.info("memory")["used_memory"]
        filling(server)
        return server.client.info("memory")["used_memory"] - empty
    finally:
        server.close()


def remember(server: Redis, number: int) -> None:
    """Idempotency-Keys of comments."""
    server.filling(True)
    value = f"{keys.digest(b'body')} 1790000000000-0"
    names = (keys.once(0, fill.AUTHOR % (each % 100_000), f"POST /v1/posts {each}") for each in range(number))
    fill.send(server, (fill.pack("SET", name, value, "PX", str(DAY_MS)) for name in names))
    server.filling(False)


def memory(kind: str, quick: bool) -> tuple[list[Row], list[dict]]:
    """Redis' memory, all keys counted; and what a comment takes in posts of different lengths."""

    def comment(length: int, posts: int) -> float:
        without = used(kind, lambda server: fill.fill(server, [0] * posts))
        return (used(kind, lambda server: fill.fill(server, [length] * posts)) - without) / (length * posts)

    kept, posts, many = (10_000, 1000, 100) if quick else (100_000, 10_000, 100)
    post = used(kind, lambda server: fill.fill(server, [0] * kept)) / kept
    key = used(kind, lambda server: remember(server, kept)) / kept
    lengths = [
        {"comments": length, "bytes": comment(length, max(20, 20_000 // length))}
        for length in (1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000)
    ]
    rows = [
        Row(f"memory a comment, {many} a post ({kind})", comment(many, posts), 125, most=True, unit="B"),
        Row(f"memory a post without comments ({kind})", post, 700, most=True, unit="B"),
        Row(f"memory an Idempotency-Key ({kind})", key, 220, most=True, unit="B"),
    ]
    return rows, lengths
