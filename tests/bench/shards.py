"""What partitions and a Cluster cost: the feed merged from 16 partitions, and comments that replicas must have.

Four sites have the same posts. All are measured in one run, in turns:

| site | Redis | partitions |
|---|---|---|
| one | one server | 1 |
| sixteen | one server | 16 |
| spread | a Cluster of three primaries | 16 |
| copied | a Cluster of three primaries with two replicas each | 16 |

All API processes share one core. All servers of Redis share the other one, with wrk.
"""

import asyncio
import contextlib
import tempfile
from functools import partial
from pathlib import Path

import orjson

from storage.db.cluster import connect
from storage.posts import feed
from tests.bench import fill
from tests.bench.drive import Load, Run, in_turns, middle, ratio
from tests.bench.parts import DRIVER, Api, Redis, pin
from tests.bench.table import Row, of_runs
from tests.clusters import ClusterServer

POSTS, COMMENTS = 10_000, 100_000
PARTITIONS = 16
LIMIT = 25
FEED = f"/v1/posts?limit={LIMIT}"
PAGES = 1600  # for which Redis' time is counted
TOGETHER = 16  # of them are read at the same time: a server that waits between two calls is slower at the next one
BODY = orjson.dumps({"text": fill.TEXT})


def cluster(stack: contextlib.ExitStack, kind: str, replicas: int) -> tuple[ClusterServer, list]:
    """Starts a Cluster of three primaries. Returns it and the node of each partition."""
    server = ClusterServer(kind, 3, replicas)
    stack.callback(server.close)
    for node in server.nodes:
        pin(node.process.pid, DRIVER)
    owners = []
    for partition in range(PARTITIONS):
        place = server.client.get_node_from_key(f"{{{partition}}}").port
        owners.append(next(node for node in server.nodes if node.port == place))
    return server, owners


def seconds_of(nodes: list) -> float:
    """Seconds that servers have spent on scripts."""
    stats = [node.client.info("commandstats") for node in nodes]
    return sum(about[name]["usec"] for about in stats for name in about if name.startswith("cmdstat_eval")) / 1e6


def redis_time(server, nodes: list, partitions: int) -> float:
    """Microseconds of Redis for a page of the feed, merged from `partitions`."""

    async def read() -> None:
        db = connect(server.url)
        for _ in range(PAGES // TOGETHER):
            pages = await asyncio.gather(*(feed(db, partitions, LIMIT) for _ in range(TOGETHER)))
            assert all(len(page.posts) == LIMIT for page in pages)
        await db.close()

    before = seconds_of(nodes)
    asyncio.run(read())
    return (seconds_of(nodes) - before) / PAGES * 1e6


def measure(rounds: int, seconds: float, kind: str = "valkey") -> list[Row]:
    counts = fill.counts(POSTS, COMMENTS)
    with contextlib.ExitStack() as stack:
        one, sixteen = Redis(kind), Redis(kind)
        stack.callback(one.close)
        stack.callback(sixteen.close)
        spread, owners = cluster(stack, kind, 0)
        copied, copied_owners = cluster(stack, kind, 2)
        sites = {
            "one": (one, [one], [one], 1),
            "sixteen": (sixteen, [sixteen] * PARTITIONS, [sixteen], PARTITIONS),
            "spread": (spread, owners, spread.nodes, PARTITIONS),
            "copied": (copied, copied_owners, copied.nodes, PARTITIONS),
        }
        ids, apis, times = {}, {}, {}
        for name, (server, servers, nodes, partitions) in sites.items():
            ids[name] = fill.spread(servers, counts)
            times[name] = redis_time(server, nodes, partitions)

        def api(name: str, **settings) -> Api:
            server, _, _, partitions = sites[name]
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ig-")))
            started = Api(server, folder, partitions=partitions, queue_url=one.url, **settings)
            stack.callback(started.close)
            return started

        for name in sites:
            apis[name] = api(name)
        apis["barrier"] = api("copied", replicas=1)

        def runs(loads: dict[str, Load]) -> dict[str, list[Run]]:
            for load in loads.values():
                load.run(1)
            return in_turns({name: partial(load.run, seconds) for name, load in loads.items()}, rounds)

        def comments(name: str, posts: list[str]) -> Load:
            paths = [f"/v1/posts/{post}/comments" for post in posts]
            return Load(apis[name].url, paths, "POST", apis[name].bearer("commenter1"), BODY)

        pages = runs({name: Load(apis[name].url, [FEED]) for name in ("one", "sixteen", "spread")})
        written = runs(
            {
                "one": comments("one", ids["one"]),
                "spread": comments("spread", ids["spread"]),
                "copied": comments("copied", ids["copied"]),
                "barrier": comments("barrier", ids["copied"]),
            }
        )
    titles = {
        "one": "one server, 1 partition",
        "sixteen": "one server, 16 partitions",
        "spread": "3 primaries, 16 partitions",
        "copied": "3 primaries and 6 replicas",
        "barrier": "the same, IMAGEGRAM_REPLICAS=1",
    }
    rows = []
    for name, measured in pages.items():
        value, target = (ratio(measured, pages["one"]), 0.70) if name != "one" else (None, None)
        rows.append(of_runs(f"feed, first page of {LIMIT}: {titles[name]}", measured, value, target))
    for name in ("sixteen", "spread"):
        note = f"{times[name]:,.0f} and {times['one']:,.0f} µs a page"
        rows.append(Row(f"the same, Redis' time: {titles[name]}", times[name] / times["one"], 5, most=True, note=note))
    for name, measured in written.items():
        value, target = (ratio(measured, written["copied"]), 0.75) if name == "barrier" else (None, None)
        rows.append(of_runs(f"comment: {titles[name]}", measured, value, target))
    p99 = middle(written["barrier"], lambda run: run.percentiles[99])
    rows.append(Row("comment: IMAGEGRAM_REPLICAS=1, p99", p99, 20, most=True, unit="ms"))
    return rows
