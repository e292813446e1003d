"""Computes docs/capacity.md from measured figures: nodes, memory, files, backups, store and requests at a given size.

    make capacity     writes the tables of the page and draws its pictures

Change a figure of MEASURED or of PRICES, or add a site to SITES, and run it again.
"""

import argparse
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from tests.bench import plots
from tests.conftest import ROOT

PAGE = ROOT / "docs" / "capacity.md"
HOUR, DAY, GIB = 3600, 86400, 2**30

# name: value, unit, the command that prints it
MEASURED = {
    "comment in memory, of a post that changes": (51, "B", "python -m tests.bench --part sealing"),
    "comment in memory, of a quiet post": (5.8, "B", "python -m tests.bench --part sealing"),
    "post in memory": (504, "B", "python -m tests.bench --part memory"),
    "Idempotency-Key in memory, for a day": (148, "B", "python -m tests.bench --part memory"),
    "comment in the increments": (614, "B", "python -m tests.bench --part costs"),
    "post in the increments": (2114, "B", "python -m tests.bench --part costs"),
    "base for each byte in memory": (0.39, "B", "python -m tests.bench --part costs"),
    "rewrite, memory a second": (235, "MiB/s", "python -m tests.bench --part costs"),
    "fork, for each GiB in memory": (24, "ms", "python -m tests.bench --part rewrite"),
    "increments in the backup, for each of their bytes": (0.16, "B", "python -m tests.bench --part shipping"),
    "comment, CPU of Redis": (32, "µs", "python -m tests.bench --part costs"),
    "post, CPU of Redis": (118, "µs", "python -m tests.bench --part costs"),
    "page of the feed in Redis: each node": (44, "µs", "python -m tests.bench --part shards"),
    "page of the feed in Redis: each row": (1.8, "µs", "python -m tests.bench --part shards"),
    "page of the feed in Redis: each partition": (8, "µs", "python -m tests.bench --part shards"),
    "one post, CPU of Redis": (15, "µs", "python -m tests.bench --part requests"),
    "comment, CPU of the API": (100, "µs", "python -m tests.bench --part requests"),
    "shared page, CPU of the API": (35, "µs", "python -m tests.bench --part requests"),
    "page behind a cursor, CPU of the API": (85, "µs", "python -m tests.bench --part requests"),
    "further node of a page, CPU of the API": (100, "µs", "estimated: rates of --part shards"),
    "one post, CPU of the API": (60, "µs", "python -m tests.bench --part requests"),
    "image of 60 kB, CPU of the API": (100, "µs", "python -m tests.bench --part requests"),
    "comment in the store": (38, "B", "python -m tests.bench --part segments"),
    "comment, CPU of a worker": (110, "µs", "python -m tests.bench --part segments"),
    "conversion of an image": (60_000, "µs", "make bench-jpegs"),
    "image of 3 MB, requests to S3 that write": (5, "", "python -m tests.bench --part costs"),
    "image of 3 MB, requests to S3 that read": (3, "", "python -m tests.bench --part costs"),
}
# What a large provider of object storage charges, as a multiple of its price for a GB that is stored for a month.
PRICES = {"1,000 requests that write": 0.22, "1,000 requests that read": 0.017}

NODE = 0.9 * GIB  # memory of a primary's data: so calls stay within 50 ms during a rewrite (`--part rewrite`)
MOST_NODES = 1000  # primaries and replicas together of a Redis Cluster (its specification, "Main properties")
COPIES = 3  # a primary and two replicas
ROOM = 1.5  # memory of a machine for each byte of data: a rewrite copies the pages that are written meanwhile
BUSY = 0.5  # of a core, at the peak
PEAK = 4  # times the mean rate of requests
CORES = 64  # of the API at most, before the feed needs another design
SNAPSHOTS = 4  # a day
KEPT_BASES = 30 + SNAPSHOTS + 1  # one a day for a month, and those of the last day
IMAGE, PICTURE = 3_000_000, 60_000  # bytes
QUIET_DAYS = 30  # a post without a change has no comments in memory after this time. Here each post changes for a day
SEGMENT = 256  # comments
# The shares of all requests that read. The pictures are half of them, and half of these come from a CDN.
MIX = {"picture": 0.25, "first page": 0.2, "cursor": 0.1, "post": 0.2}


def of(name: str) -> float:
    return MEASURED[name][0]


def page_in_redis(nodes: int) -> float:
    """µs of all nodes for a page of the feed of 25 posts. Each node returns its share, and three rows more."""
    rows = 25 if nodes == 1 else nodes * (ceil(25 / nodes) + 3)
    partitions = max(16, nodes)
    costs = {"node": nodes, "row": rows, "partition": partitions}
    return sum(number * of(f"page of the feed in Redis: each {each}") for each, number in costs.items())


@dataclass(frozen=True)
class Site:
    """A size: what was stored until now, and what happens now."""

    name: str
    days: float  # at this rate
    images: float = 1000  # an hour
    comments: float = 100_000  # an hour
    reads: float = 300  # requests a second, at the peak

    @property
    def all_comments(self) -> float:
        return self.comments * 24 * self.days

    @property
    def all_posts(self) -> float:
        return self.images * 24 * self.days

    @property
    def memory(self) -> float:
        """Bytes of data in all primaries."""
        keys = (self.comments + 2 * self.images) * 24 * of("Idempotency-Key in memory, for a day")
        recent = self.comments * 24 * min(self.days, QUIET_DAYS + 1)
        comments = recent * of("comment in memory, of a post that changes")
        comments += (self.all_comments - recent) * of("comment in memory, of a quiet post")
        return comments + self.all_posts * of("post in memory") + keys

    def node_load(self, nodes: int) -> float:
        """The share of a core that a primary needs at the peak."""
        writes = self.comments * of("comment, CPU of Redis") + self.images * of("post, CPU of Redis")
        pages = self.reads * MIX["cursor"] * page_in_redis(nodes) / nodes
        posts = self.reads * MIX["post"] * of("one post, CPU of Redis") / nodes
        return (PEAK * writes / HOUR / nodes + pages + posts) / 1e6

    @property
    def primaries(self) -> int:
        """The data primaries that memory and load need. Where no number of them bears the load, as memory needs."""
        least = max(1, ceil(self.memory / NODE))
        return next((nodes for nodes in range(least, MOST_NODES // COPIES) if self.node_load(nodes) <= BUSY), least)

    @property
    def api_cores(self) -> float:
        nodes = self.primaries
        more = (nodes - 1) * of("further node of a page, CPU of the API")
        reads = MIX["picture"] * of("image of 60 kB, CPU of the API") + MIX["post"] * of("one post, CPU of the API")
        reads += MIX["first page"] * of("shared page, CPU of the API")
        reads += MIX["cursor"] * (of("page behind a cursor, CPU of the API") + more)
        return (self.reads * reads + PEAK * self.comments / HOUR * of("comment, CPU of the API")) / 1e6 / BUSY

    @property
    def worker_cores(self) -> float:
        work = self.images * of("conversion of an image") + self.comments * of("comment, CPU of a worker")
        return PEAK * work / HOUR / 1e6 / BUSY

    @property
    def increments(self) -> float:
        """Bytes a day."""
        return 24 * (
            self.comments * of("comment in the increments") + self.images * of("post in the increments")
        )

    @property
    def backup(self) -> float:
        """Bytes in the backup store: each node is shipped, also the replicas."""
        base = self.memory * of("base for each byte in memory")
        return COPIES * (KEPT_BASES * base + self.increments * of("increments in the backup, for each of their bytes"))

    @property
    def shipped(self) -> float:
        """Bytes a day that go to the backup store."""
        base = self.memory * of("base for each byte in memory")
        return COPIES * (SNAPSHOTS * base + self.increments * of("increments in the backup, for each of their bytes"))

    @property
    def stored(self) -> float:
        """Bytes of originals, pictures and old comments."""
        return self.all_posts * (IMAGE + PICTURE) + self.all_comments * of("comment in the store")

    @property
    def store_writes(self) -> float:
        """Requests a day. A shipper writes once a second. Each post has one segment that is not full."""
        segments = self.images + self.comments / SEGMENT
        images = self.images * of("image of 3 MB, requests to S3 that write")
        return 24 * (images + segments) + COPIES * self.primaries * DAY

    @property
    def store_reads(self) -> float:
        """Requests a day: of workers, and of pictures that no node has in its cache."""
        pictures = self.reads / PEAK * MIX["picture"] * DAY
        return self.images * 24 * of("image of 3 MB, requests to S3 that read") + pictures

    @property
    def cost(self) -> float:
        """Of the stores a month, in units: the price of a GB that is stored for a month."""
        writes, reads = 30 * self.store_writes / 1000, 30 * self.store_reads / 1000
        requests = writes * PRICES["1,000 requests that write"] + reads * PRICES["1,000 requests that read"]
        return (self.stored + self.backup) / 1e9 + requests


SITES = [
    Site("the forecast, after a day", 1),
    Site("after a month", 30),
    Site("after a quarter", 91),
    Site("after a year", 365),
    Site("after ten years", 3650),
    Site("1 billion comments, 10,000 requests/s", 417, reads=10_000),
    Site("1 billion comments, 100,000 requests/s", 417, reads=100_000),
    Site("ten times the forecast, after a quarter", 91, 10_000, 1_000_000, 3000),
]


def size(value: float) -> str:
    """A number of bytes, with two digits.

    >>> size(2.5e9), size(1.2e13)
    ('2.5 GB', '12 TB')
    """
    for unit in ("kB", "MB", "GB", "TB"):
        value /= 1000
        if value < 1000:
            return f"{value:.2g} {unit}" if value < 100 else f"{value:.0f} {unit}"
    return f"{value / 1000:.1f} PB"


def count(value: float) -> str:
    """A number, with two digits, with its thousands or millions.

    >>> count(2_400_000), count(12)
    ('2.4 M', '12')
    """
    for unit, each in (("billion", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= each:
            short = value / each
            return f"{short:.2g} {unit}" if short < 100 else f"{short:.0f} {unit}"
    return f"{value:.2g}" if value < 100 else f"{value:.0f}"


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def measured() -> str:
    rows = [[name, f"{value:,} {unit}".strip(), f"`{source}`"] for name, (value, unit, source) in MEASURED.items()]
    return table(["figure", "value", "printed by"], rows)


def redis() -> str:
    rows = []
    for site in SITES:
        nodes = site.primaries
        each = site.memory / nodes
        load = site.node_load(nodes)
        rows.append(
            [
                site.name,
                count(site.all_comments),
                size(site.memory),
                f"{nodes}" + (" are not enough" if load > BUSY else ""),
                f"{COPIES * nodes}",
                size(COPIES * site.memory * ROOM),
                f"{each / GIB * of('fork, for each GiB in memory'):.0f} ms",
                f"{each / 2**20 / of('rewrite, memory a second'):.0f} s",
                f"{load:.1%}" if load < 0.1 else f"{load:.0%}",
            ]
        )
    columns = ["size", "comments", "data", "primaries", "nodes", "RAM", "fork", "rewrite", "core of a primary"]
    return table(columns, rows)


def others() -> str:
    rows = []
    for site in SITES:
        writes = PEAK * (site.comments + 3 * site.images) / HOUR
        rows.append(
            [
                site.name,
                count(COPIES * writes),
                f"{ceil(site.api_cores)}",
                f"{ceil(site.worker_cores)}",
                size(site.stored),
                size(site.backup),
                size(site.shipped),
                f"{count(site.store_writes)} and {count(site.store_reads)}",
                count(site.cost),
            ]
        )
    columns = ["size", "fsyncs/s, at most", "cores of the API", "of workers", "images", "backup", "shipped a day"]
    return table([*columns, "store: writes and reads a day", "cost a month"], rows)


def feed() -> str:
    rows = []
    for nodes in (1, 3, 10, 30, 56, 100):
        in_redis = page_in_redis(nodes)
        in_api = of("page behind a cursor, CPU of the API") + (nodes - 1) * of("further node of a page, CPU of the API")
        rows.append(
            [
                f"{nodes}",
                f"{in_redis:,.0f} µs",
                f"{in_redis / nodes:,.0f} µs",
                f"{in_api:,.0f} µs",
                f"{BUSY * nodes * 1e6 / in_redis:,.0f}/s",
                f"{CORES * BUSY * 1e6 / in_api:,.0f}/s",
            ]
        )
    columns = ["primaries", "Redis, all nodes", "Redis, each node", "API", "pages that the nodes bear"]
    return table([*columns, f"pages that {CORES} cores of the API bear"], rows)


def page(text: str) -> str:
    """The page with its tables computed again."""
    for name, part in {"measured": measured(), "redis": redis(), "others": others(), "feed": feed()}.items():
        before, _, rest = text.partition(f"<!-- {name} -->\n")
        text = f"{before}<!-- {name} -->\n{part}{rest[rest.index('<!-- end -->') :]}"
    return text


def main() -> None:
    argparse.ArgumentParser(prog="python -m tests.bench.capacity", description=__doc__).parse_args()
    PAGE.write_text(page(PAGE.read_text()))
    days = [10 ** (step / 10) for step in range(0, 28)]
    picture = Path(ROOT / "docs" / "performance" / "capacity.png")
    plots.capacity([Site("", day) for day in days], of("fork, for each GiB in memory"), picture)


if __name__ == "__main__":
    main()
