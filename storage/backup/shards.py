"""`imagegram-storage restore` of a Redis Cluster: makes a data folder for each shard, as of any kept second.

    FOLDER/1    what one node needs in its --dir: the data of its slots, and nodes.conf
    FOLDER/2
    FOLDER/3

A node that is started on such a folder owns the recorded slots and no others. What remains is to make the nodes known
to each other (CLUSTER MEET) and to add replicas. `owners` says whose chain has which slots at that second.

- Keys of other slots are removed before the node starts in cluster mode. A node that finds keys of a slot that it does
  not own, and that nobody owns, would claim the slot: all nodes claimed the same slots, and the losers deleted theirs.
- For the same reason only partitions in own slots get a new epoch.
- Config epochs are higher than all recorded ones. So the records of the nodes that were lost are never taken for newer.
- The append-only file is rewritten. Valkey writes `CLUSTER SYNCSLOTS` into it when slots are moved to a node, and would
  remove the data of a move that has no end in the file.
"""

import asyncio
import math
import os
import secrets
import shutil
import socket
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from redis.asyncio import Redis
from redis.crc import key_slot

from storage import changes, files, keys
from storage.backup import chain, owners, restore
from storage.backup.aof import Damaged
from storage.backup.restore import Refused, Restored, format_utc
from storage.db import client as db_client
from storage.db.topology import partitions_in, written
from storage.objects import Below, ObjectStore
from storage.settings import Settings

KEYS = 1000  # that are read or removed at once


async def restore_all(
    settings: Settings, store: ObjectStore, to: Path, at: int | None = None, report: Callable[[str], None] = print
) -> Restored:
    """Restore what the store holds: a Cluster, or a single server. See `restore.restore`."""
    records = await owners.read(store)
    if not records:
        return await restore.restore(settings, store, to, at, report)
    to, part = restore.begin(to)
    end = math.inf if at is None else at + 1.0
    if (known := owners.known_from(records, end)) > end:
        raise Refused(f"the oldest second kept of the whole Cluster is {format_utc(math.ceil(known))}")
    described = {node: await chain.descriptions(Below(store, node)) for node in records}
    kept = {node for node, bases in described.items() if any(base["second"] < end for base in bases.values())}
    found = owners.candidates(records, end, kept)
    restored: dict[str, Restored] = {}

    async def fetch(node: str) -> Restored:
        if node not in restored:
            report(f"node {node}")
            restored[node] = await restore.write_folder(settings, Below(store, node), part / node, at, report)
        return restored[node]

    for _ in range(2):
        for node in sorted({node for nodes in found for node in nodes} - restored.keys()):
            if (await fetch(node)).goes_on:
                continue
            # The last second of a lost primary was never shipped. Its successor was its replica then, and has it.
            for other in [one for one in owners.successors(records, node, end) if one in kept]:
                if (await fetch(other)).goes_on or restored[other].reach > restored[node].reach:
                    report(f"node {other} was its replica then, and has more")
                    found = [tuple(dict.fromkeys(other if one == node else one for one in nodes)) for nodes in found]
                    break
        # What is left of a node may be older than its slots: then the node that had a slot before takes part, too.
        for node, done in restored.items():
            if not done.exact:
                earlier = owners.candidates(records, done.second + 1.0, kept)
                for slot, before in enumerate(earlier):
                    if node in found[slot]:
                        found[slot] += tuple(one for one in before if one in kept and one not in found[slot])
    found = [tuple(node for node in nodes if node in restored) for nodes in found]
    shards = await _decide(settings, part, found, report)
    if not shards:
        raise Refused("the backup store has no slots of that time")
    epoch = max(record["epoch"] for history in records.values() for record in history)
    whole = Restored(0, at, 0, True, shards=len(shards))
    for number, (node, slots) in enumerate(sorted(shards.items(), key=lambda shard: min(shard[1])), 1):
        report(f"shard {number} of {len(shards)}: {len(slots)} slots of node {node}")
        counts = await _fit_shard(settings, part / node, slots, report)
        _write_nodes(part / node, slots, epoch + number, epoch + len(shards))
        os.rename(part / node, part / str(number))
        whole.second = max(whole.second, restored[node].second)
        whole.exact = whole.exact and restored[node].exact
        whole.counts = {name: whole.counts.get(name, 0) + count for name, count in counts.items()}
    for node in restored.keys() - shards.keys():
        shutil.rmtree(part / node)
    files.sync(part)
    restore.finish(part, to)
    return whole


async def restore_node(
    settings: Settings, store: ObjectStore, to: Path, node: str, report: Callable[[str], None] = print
) -> Restored:
    """Restore the newest data of one node, which is a primary or a replica, for a trial.

    `store` is that of the Cluster. Raises the same as `restore.restore`.
    """
    to, part = restore.begin(to)
    records = await owners.read(store)
    last = records[node][-1]
    if last["follows"] in records:
        last = records[last["follows"]][-1]
    restored = await restore.write_folder(settings, Below(store, node), part, None, report)
    restored.counts = await _fit_shard(settings, part, owners.expand(last["slots"]), report)
    restore.finish(part, to)
    return restored


@asynccontextmanager
async def running(settings: Settings, folder: Path) -> AsyncIterator[Redis]:
    """Like `restore.running`, for what a node of a Cluster has written.

    A base that was written while slots were moved to the node says so. Valkey 9.1 loads that only in cluster mode;
    otherwise it ends by an assertion. So if the server does not load the folder, one in cluster mode rewrites it first.
    """
    async with AsyncExitStack() as stack:
        try:
            redis = await stack.enter_async_context(restore.running(settings, folder))
        except Damaged:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = str(free.getsockname()[1])
            async with restore.running(settings, folder, "--cluster-enabled", "yes", "--cluster-port", port) as node:
                await _rewrite(node)
            (folder / "nodes.conf").unlink()
            redis = await stack.enter_async_context(restore.running(settings, folder))
        yield redis


async def _decide(
    settings: Settings, part: Path, found: list[tuple[str, ...]], report: Callable[[str], None]
) -> dict[str, set[int]]:
    """The slots of each node. Of several candidates for a slot the one that has most of it gets it."""
    disputed = {slot: nodes for slot, nodes in enumerate(found) if len(nodes) > 1}
    weights: dict[tuple[str, int], tuple[int, int]] = {}
    for node in sorted({node for nodes in disputed.values() for node in nodes}):
        report(f"slots were moved then: reading what node {node} has of them")
        slots = {slot for slot, nodes in disputed.items() if node in nodes}
        async with running(settings, part / node) as redis:
            weights |= {(node, slot): weight for slot, weight in (await _weigh(redis, slots)).items()}
    shards: dict[str, set[int]] = {}
    for slot, nodes in enumerate(found):
        if len(nodes) == 1:
            shards.setdefault(nodes[0], set()).add(slot)
        elif nodes:
            # The first one of equals: the others got the slot only later.
            best = max(nodes, key=lambda node: weights[node, slot])
            shards.setdefault(best, set()).add(slot)
    return shards


async def _weigh(redis: Redis, slots: set[int]) -> dict[int, tuple[int, int]]:
    """How much of each slot a server has: the newest revision of its partitions, and the number of its keys.

    While slots are moved the target has some of the keys, and all at the end. Then the source deletes its own, and
    never writes again. So of two copies the one that lacks keys is never newer.
    """
    counts = dict.fromkeys(slots, 0)
    partitions: dict[int, set[int]] = {slot: set() for slot in slots}
    async for name in redis.scan_iter(count=KEYS):
        if (slot := key_slot(name)) in slots:
            counts[slot] += 1
            text = name.decode(errors="replace")
            if keys.well_formed(text) and (partition := keys.parts(text)[1]) is not None:
                partitions[slot].add(partition)
    db = db_client.Redis(restore.url(redis))
    try:
        weights = {}
        for slot, count in counts.items():
            revisions = [(await changes.poll(db, partition, [])).revision for partition in partitions[slot]]
            weights[slot] = max(map(int, revisions), default=0), count
    finally:
        await db.close()
    return weights


async def _fit_shard(
    settings: Settings, folder: Path, slots: set[int], report: Callable[[str], None]
) -> dict[str, int]:
    """Reduce a data folder to some slots, fit the data to the store, and check it. Returns what `check_data` does."""
    async with running(settings, folder) as redis:
        await _drop_others(redis, slots)
        counts = await restore.check_data(redis, settings, partitions_in(slots, settings.partitions), report)
        await _rewrite(redis)
    return counts


async def _drop_others(redis: Redis, slots: set[int]) -> None:
    dropped: list[bytes] = []
    async for name in redis.scan_iter(count=KEYS):
        if key_slot(name) not in slots:
            dropped.append(name)
        if len(dropped) >= KEYS:
            await redis.unlink(*dropped)
            dropped = []
    if dropped:
        await redis.unlink(*dropped)


async def _rewrite(redis: Redis) -> None:
    """Rewrite the append-only file. Raises Damaged if the server cannot."""
    await redis.bgrewriteaof()
    while (info := await redis.info("persistence"))["aof_rewrite_in_progress"] or info["aof_rewrite_scheduled"]:
        await asyncio.sleep(0.02)
    if info["aof_last_bgrewrite_status"] != "ok":
        raise Damaged("the server cannot rewrite its append-only file")


def _write_nodes(folder: Path, slots: Iterable[int], epoch: int, newest: int) -> None:
    """Write nodes.conf: a new primary that owns some slots (Redis Cluster specification, "Cluster configuration").

    `newest` is the highest config epoch of the Cluster. The node writes its own address when it starts.
    """
    path = folder / "nodes.conf"
    path.write_text(
        f"{secrets.token_hex(20)} :0@0 myself,master - 0 0 {epoch} connected {written(slots)}\n"
        f"vars currentEpoch {newest} lastVoteEpoch 0\n"
    )
    files.sync(path)
    files.sync(folder)
