"""How time and memory grow with the data: Redis' own time for a page and a comment, requests per second, and memory."""

import contextlib
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from storage import keys
from storage.db.client import SCRIPTS
from storage.posts import feed_names
from storage.settings import DAY_MS, HOT_COMMENTS, LATEST_COMMENTS, PAGE_BYTES, SEGMENT_COMMENTS
from tests.bench import fill
from tests.bench.drive import Load, in_turns, middle, ratio
from tests.bench.parts import Api, Redis
from tests.bench.table import Row, of_runs

SIZES = (10_000, 100_000, 1_000_000)  # posts
LENGTHS = (1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000)  # comments of a post
CALLS = 300  # in one pipeline, whose time Redis counts
PAGE = 10
FEED = f"/v1/posts?limit={PAGE}"

# The calls whose time Redis counts. The ties are the posts that have as many comments as the feed shows.
FIRST = "feed, first page"
TIES = "feed, at the start of the ties"
MIDDLE = "feed, in the middle of the ties"
MOVED = "the same, the cursor's post has moved"
NEAR = "the same, and 100 other posts have moved past it"
UNHINTED = "the same, a cursor without a hint"
LYING = "the same, a hint that is far away"
COMMENT = "add a comment"
# The requests to the API.
FIRST_REQUEST = "feed, first page"
CURSORS = "feed, 100 cursors at random"


def page(count: str = "", post: str = "", hint: int | str = "") -> tuple:
    """The command for a feed page after a cursor, as `storage.posts` sends it."""
    arguments = [count, post, PAGE, PAGE_BYTES, PAGE + 1, "", hint, *feed_names((0,))]
    return "EVALSHA", SCRIPTS["feed_page"].sha, 1, keys.feed(0), *arguments


def comment(post: str) -> tuple:
    """The command that adds a comment, as `storage.comments` sends it."""
    key_names = [*keys.post_and_lists(post), keys.sealing(0)]
    arguments = ["", post, "user-00001", fill.TEXT, LATEST_COMMENTS, "-", DAY_MS, HOT_COMMENTS + SEGMENT_COMMENTS]
    return "EVALSHA", SCRIPTS["add_comment"].sha, len(key_names), *key_names, *arguments


def redis_time(server: Redis, calls: list[tuple]) -> float:
    """Microseconds that Redis itself takes for a call (INFO commandstats)."""
    client = server.client
    for script in SCRIPTS.values():
        client.script_load(script.text)
    client.config_resetstat()
    with client.pipeline(transaction=False) as pipeline:
        for call in calls:
            pipeline.execute_command(*call)
        pipeline.execute()
    return client.info("commandstats")["cmdstat_evalsha"]["usec_per_call"]


def page_at(server: Redis, rank: int, moved: bool = False, hint: int | str | None = None) -> tuple:
    """The command for the page behind the post at a rank of the feed.

    `moved`: the cursor's post is no longer at this place. `hint`: the cursor's, if it is not the right one.
    """
    ((post, count),) = server.client.zrange(keys.feed(0), rank, rank, desc=True, withscores=True)
    if moved:
        post = post[:20] + ("0" if post[20] != "0" else "1") + post[21:]
    return page(f"{count:.0f}", post, rank + 1 if hint is None else hint)


def calls_on(server: Redis, ids: list[str]) -> dict[str, Callable[[], tuple]]:
    """For each kind of call a function that returns a command, on a server filled by `fill.tied`."""
    above = len(ids) * 5 // 1000  # posts with more comments than the ties
    half = len(ids) * 300 // 1000  # half of the ties
    spread = min(1000, half // 2)

    def in_the_middle(moved: bool, off: int | None = 0) -> tuple:
        rank = above + half + random.randrange(spread)
        return page_at(server, rank, moved, "" if off is None else rank + 1 + off)

    return {
        FIRST: page,
        TIES: lambda: page_at(server, above + 1),
        MIDDLE: lambda: in_the_middle(moved=False),
        MOVED: lambda: in_the_middle(moved=True),
        NEAR: lambda: in_the_middle(moved=True, off=-100),
        UNHINTED: lambda: in_the_middle(moved=True, off=None),
        LYING: lambda: in_the_middle(moved=True, off=half // 2),
        COMMENT: lambda: comment(random.choice(ids)),
    }


def times(rounds: int, seconds: float, sizes: tuple[int, ...] = SIZES) -> tuple[list[Row], dict]:
    """Measures data sets of each size. Returns the rows of the table and what the plots show.

    The latter has `posts`, `memory` (bytes), `redis` (µs by call) and `rates` (requests per second by request). Each
    list has a value for each size.
    """
    with contextlib.ExitStack() as stack:
        servers: dict[int, Redis] = {}
        calls: dict[int, dict[str, Callable[[], tuple]]] = {}
        memory: list[int] = []
        for size in sizes:
            server = servers[size] = Redis()
            stack.callback(server.close)
            calls[size] = calls_on(server, fill.fill(server, fill.tied(size)))
            memory.append(server.client.info("memory")["used_memory"])
        spent = {size: {name: [] for name in calls[size]} for size in sizes}
        for number in range(rounds + 1):
            for name in calls[sizes[0]]:
                for size in sizes:
                    microseconds = redis_time(servers[size], [calls[size][name]() for _ in range(CALLS)])
                    if number:  # the first round warms the caches
                        spent[size][name].append(microseconds)
        loads: dict[tuple[str, int], Load] = {}
        for size, server in servers.items():
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ig-")))
            api = Api(server, folder)
            stack.callback(api.close)
            loads[FIRST_REQUEST, size] = Load(api.url, [FEED])
            cursors = fill.cursors(server, api.url, 100)
            loads[CURSORS, size] = Load(api.url, [f"{FEED}&cursor={cursor}" for cursor in cursors])
        runs = in_turns({who: lambda load=load: load.run(seconds) for who, load in loads.items()}, rounds)
    def rates(name: str) -> list[float]:
        return [middle(runs[name, size], lambda run: run.rate) for size in sizes]

    grown = {
        "posts": list(sizes),
        "memory": memory,
        "redis": {name: [median(spent[size][name]) for size in sizes] for name in calls[sizes[0]]},
        "rates": {name: rates(name) for name in (FIRST_REQUEST, CURSORS)},
    }
    return growth_rows(sizes, spent, runs), grown


def growth_rows(sizes: tuple[int, ...], spent: dict[int, dict[str, list[float]]], runs: dict) -> list[Row]:
    """The rows of the table. They compare the smallest with the largest data set."""
    small, large = spent[sizes[0]], spent[sizes[-1]]
    fewest, most = f"{sizes[0]:,}", f"{sizes[-1]:,}"
    ties = f"{sizes[-1] * 600 // 1000:,}"

    def row(what: str, one: list[float], other: list[float], target: float | None) -> Row:
        quotient = median(a / b for a, b in zip(one, other, strict=True))
        return Row(what, quotient, target, note=f"{median(one):.1f} and {median(other):.1f} µs of Redis a call")

    first = [runs[FIRST_REQUEST, size] for size in (sizes[-1], sizes[0])]
    return [
        row(f"first page, Redis' time: {fewest} posts ÷ {most}", small[FIRST], large[FIRST], 0.95),
        of_runs(f"first page, requests/s: {most} posts ÷ {fewest}", first[0], ratio(*first), 0.95),
        row(f"page in {ties} ties, Redis' time: start ÷ middle", large[TIES], large[MIDDLE], 0.60),
        row(MOVED, large[TIES], large[MOVED], 0.65),
        *[row(what, large[TIES], large[what], None) for what in (NEAR, UNHINTED, LYING)],
        row(f"add a comment, Redis' time: {fewest} posts ÷ {most}", small[COMMENT], large[COMMENT], 0.67),
    ]


def used(kind: str, filling: Callable[[Redis], object]) -> int:
    """Bytes by which the memory of a server grows. Starts a new server: FLUSHALL does not return all memory."""
    server = Redis(kind)
    try:
        empty = server.client.info("memory")["used_memory"]
        filling(server)
        return server.client.info("memory")["used_memory"] - empty
    finally:
        server.close()


def fill_keys(server: Redis, number: int) -> None:
    """Writes `number` Idempotency-Keys of comments."""
    value = f"{keys.digest(b'body')} 1790000000000-0"
    names = (keys.once(0, fill.AUTHOR % (each % 100_000), f"POST /v1/posts {each}") for each in range(number))
    with server.filling():
        fill.send(server, (fill.pack("SET", name, value, "PX", str(DAY_MS)) for name in names))


# How the posts are spread over users: for each shape the users of 100,000 posts, in the order of time.
SHAPES: dict[str, Callable[[int], list[int]]] = {
    "1 post a user": lambda posts: list(range(posts)),
    "Zipf": lambda posts: [int(random.paretovariate(1)) for _ in range(posts)],
    "1,000 posts a user": lambda posts: [random.randrange(posts // 1000) for _ in range(posts)],
}


def fill_lists(server: Redis, shape: str, posts: int) -> None:
    """Writes the lists of users' posts, without the posts themselves."""
    start = int(time.time() * 1000) - 1000 * posts
    ids = (fill.post_id(start + 1000 * number) for number in range(posts))
    authors = (fill.AUTHOR % user for user in SHAPES[shape](posts))
    with server.filling():
        fill.send(server, (fill.listed(author, post) for author, post in zip(authors, ids, strict=True)))


def memory(kind: str, quick: bool) -> tuple[list[Row], dict[int, float]]:
    """Measures Redis' memory, with all its keys. Returns the rows of the table, and bytes a comment by post length."""

    def bytes_a_comment(length: int, posts: int) -> float:
        without = used(kind, lambda server: fill.fill(server, [0] * posts))
        return (used(kind, lambda server: fill.fill(server, [length] * posts)) - without) / (length * posts)

    entries, posts, length = (10_000, 1000, 100) if quick else (100_000, 10_000, 100)
    post = used(kind, lambda server: fill.fill(server, [0] * entries)) / entries
    key = used(kind, lambda server: fill_keys(server, entries)) / entries
    by_length = {each: bytes_a_comment(each, max(20, 20_000 // each)) for each in LENGTHS}
    lists = {shape: used(kind, lambda server, shape=shape: fill_lists(server, shape, entries)) for shape in SHAPES}
    rows = [
        Row(f"memory a comment, {length} a post ({kind})", bytes_a_comment(length, posts), 125, most=True, unit="B"),
        Row(f"memory a post without comments ({kind})", post, 700, most=True, unit="B"),
        Row(f"memory an Idempotency-Key ({kind})", key, 220, most=True, unit="B"),
        *(
            Row(f"memory a post in its author's list, {shape} ({kind})", size / entries, 80, most=True, unit="B")
            for shape, size in lists.items()
        ),
    ]
    return rows, by_length
