"""Parts of the tests of a Cluster's backup: a shipper for each node, writers, a restored Cluster."""

import asyncio
import contextlib
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from clusters import ClusterNode, ClusterServer
from making import NO_SEGMENTS, publish
from parts import PROGRAMS, make_settings, shipping

from storage import check, comments, posts
from storage.backup import restore
from storage.backup.shards import restore_all
from storage.db import forming
from storage.db.client import Redis
from storage.db.cluster import Cluster
from storage.errors import Unknown, Unreachable
from storage.objects import open_store
from storage.posts import FeedCursor, ranks_behind
from storage.settings import Settings

PARTITIONS = 16


def settings_in(folder: Path, kind: str, **changes) -> Settings:
    """Settings with a store and a backup store in `folder`, which all nodes share. `data` is another folder in it."""
    stores = {"store_url": (folder / "store").as_uri(), "partitions": PARTITIONS}
    return make_settings(folder / "data", PROGRAMS[kind], (folder / "backup").as_uri(), **stores, **changes)


def settings_of(node: ClusterNode, cluster: ClusterServer, settings: Settings) -> Settings:
    """Settings for the shipper of a node: its data folder has the node's folder as `redis`."""
    data = settings.data / str(node.port)
    data.mkdir(parents=True, exist_ok=True)
    if not (data / "redis").exists():
        (data / "redis").symlink_to(node.folder)
    return replace(settings, data=data, redis_url=cluster.url, redis_node=("127.0.0.1", node.port))


@contextlib.asynccontextmanager
async def shipping_all(cluster: ClusterServer, settings: Settings):
    """Runs a shipper for each node. Yields them in the order of the nodes."""
    async with contextlib.AsyncExitStack() as stack:
        each = [settings_of(node, cluster, settings) for node in cluster.nodes]
        yield [await stack.enter_async_context(shipping(one)) for one in each]


@dataclass
class Written:
    """A post or a comment: when its creation and its deletion were begun and answered (unix seconds)."""

    begun: float
    answered: float = math.inf
    deleting: float = math.inf
    deleted: float = math.inf

    def must_exist(self, end: float) -> bool:
        return self.answered < end <= self.deleting

    def may_exist(self, end: float) -> bool:
        return self.begun < end <= self.deleted


class History:
    """What writers did. A comment is known by its text, which is used once."""

    def __init__(self):
        self.posts: dict[str, Written] = {}
        self.comments: dict[str, Written] = {}
        self.unknown = 0  # calls that failed: they may have happened or not
        self.stopping = False

    async def publish(self, db: Cluster, settings: Settings, count: int) -> None:
        """Publishes posts, the user's number being that of the partition."""
        store = open_store(settings.store_url)
        for number in range(count):
            begun = time.time()
            try:
                post = await publish(db, store, f"user{number}", 0, PARTITIONS)
                self.posts[post] = Written(begun, time.time())
            except (Unreachable, Unknown):
                self.unknown += 1

    async def write(self, db: Cluster, name: str, pause: float) -> None:
        """Adds comments to random posts until `stopping` is set, and deletes every fifth of them again."""
        number = 0
        while not self.stopping:
            number += 1
            text, post = f"{name} {number}", random.choice(list(self.posts))
            one = self.comments[text] = Written(time.time())
            try:
                comment = (await comments.add(db, "bob", post, text))[0].id
                one.answered = time.time()
                if number % 5 == 0:
                    one.deleting = time.time()
                    await comments.delete(db, NO_SEGMENTS, "bob", post, comment)
                    one.deleted = time.time()
            except (Unreachable, Unknown):
                self.unknown += 1
            await asyncio.sleep(pause)

    def compare(self, found: dict[str, list[str]], at: int) -> tuple[int, int]:
        """How many posts and comments a Cluster restored to the end of second `at` lacks, and has wrongly."""
        rows = [text for texts in found.values() for text in texts]
        assert len(rows) == len(set(rows)), "a comment is double"
        missing = wrong = 0
        for names, written in ((set(found), self.posts), (set(rows), self.comments)):
            missing += sum(one.must_exist(at + 1) and name not in names for name, one in written.items())
            wrong += sum(name in written and not written[name].may_exist(at + 1) for name in names)
        assert set(rows) <= set(self.comments)
        assert len(set(found) - set(self.posts)) <= self.unknown
        return missing, wrong


@contextlib.asynccontextmanager
async def writing_to(cluster: ClusterServer, settings: Settings, history: History, count: int = 4, pause: float = 0.01):
    """Publishes posts and runs writers of comments. Yields the client of the Cluster that they use."""
    db = Cluster(cluster.url, replicas=settings.replicas)
    await history.publish(db, settings, PARTITIONS)
    tasks = [asyncio.create_task(history.write(db, f"w{number}", pause)) for number in range(count)]
    try:
        yield db
    finally:
        history.stopping = True
        await asyncio.gather(*tasks)
        await db.close()


async def read_restored(
    settings: Settings, kind: str, to: Path, at: int | None, report: Callable[[str], None] = print
) -> dict[str, list[str]]:
    """Restores to second `at`, starts the nodes, and returns the texts of the comments of each post in the feed.

    Asserts that `check` finds nothing, that the feed counts these comments, and that no key was lost by MEET.
    """
    await restore_all(settings, open_store(settings.backup_store_url), to, at, report)
    nodes = [ClusterNode(kind, shard) for shard in sorted(to.iterdir())]
    keys = [node.client.dbsize() for node in nodes]
    db = Cluster("redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in nodes))
    try:
        await forming.form(db, len(nodes), 0, lambda line: None)
        report = await check.check(db, open_store(settings.store_url))
        assert not report.flaws, report.lines
        found = await read_feed(db)
        assert [node.client.dbsize() for node in nodes] == keys and all(keys)
        return found
    finally:
        await db.close()
        for node in nodes:
            node.kill()


async def read_folders(settings: Settings, to: Path) -> dict[str, list[str]]:
    """The texts of the comments of each post in the restored folders, which must have each post once."""
    found = {}
    for shard in sorted(to.iterdir()):
        async with restore.running(settings, shard) as client:
            db = Redis(restore.url(client))
            assert not (await check.check(db, open_store(settings.store_url))).flaws
            here = await read_feed(db)
            assert not found.keys() & here.keys()
            found |= here
            await db.close()
    return found


async def read_feed(db: Redis) -> dict[str, list[str]]:
    """The texts of the comments of each post in the feed. Asserts that the feed counts them."""
    found: dict[str, list[str]] = {}
    page = await posts.feed(db, PARTITIONS, 100)
    while True:
        for row in page.posts:
            assert row.id not in found
            found[row.id] = await texts(db, row.id)
            assert row.comment_count == len(found[row.id])
        if not page.more:
            return found
        last = page.posts[-1]
        ranks = ranks_behind(page.ranks, page.posts)
        page = await posts.feed(db, PARTITIONS, 100, FeedCursor(last.comment_count, last.id, ranks))


async def texts(db: Redis, post: str) -> list[str]:
    page = await comments.page(db, NO_SEGMENTS, post, 100)
    found = page.comments
    while page.more:
        page = await comments.page(db, NO_SEGMENTS, post, 100, found[-1].id)
        found += page.comments
    return [row.text for row in found]
