"""Which node of a Redis Cluster had which slots, and when: the records that shippers put beside their chains.

    owners/4402aeeb…/001795791848256     a record of node 4402aeeb…, named by its `seen` in ms
    4402aeeb…/generations/00000007       the node's chain, as of a single server, below the node's id
    4402aeeb…/00000007/…

The shipper of a node creates a record at its first start and whenever something in it has changed. It looks before it
puts bytes into the chain. So the newest record is at least as new as the chain.

A change happened between `looked` and `seen`. What may have happened by a second T, and what a restore does:

| between the two, the node | at T | a restore takes |
|---|---|---|
| was a replica, and became a primary | T is before `looked` | the chain of the old primary, as far as it was shipped |
| | T is later | the chain of the new primary. It has all that the old one had acknowledged with IMAGEGRAM_REPLICAS |
| was a primary, and got a slot | T is before `looked` | the chain of the node that had the slot |
| | T is between | the one of the two that has more of the slot: one was complete, the other had only a part |
| | T is later | the chain of the node that got it |

Of two nodes that both say that a slot is theirs, the one with the higher config epoch is right (Redis Cluster
specification, "Cluster current epoch"): the other one is dead or cut off, and has not learned it.
"""

import json
from collections.abc import Mapping
from itertools import pairwise
from typing import NamedTuple, TypedDict

from storage.db import topology
from storage.db.cluster import SLOTS
from storage.objects import ObjectStore

PREFIX = "owners/"


class Record(TypedDict):
    """What a node was. JSON, in an object of the store."""

    looked: float  # unix seconds at which the shipper saw the state before the last time; `seen`, if there was none
    seen: float  # unix seconds at which it saw this state first
    follows: str  # id of the primary of which the node was a replica; "" for a primary
    epoch: int  # config epoch; a replica has that of its primary
    slots: list[tuple[int, int]]  # first and last slot of each range; a replica has none


class View(NamedTuple):
    """What a node says of itself and of the others in its reply to CLUSTER NODES."""

    node: str  # its id, 40 hex digits
    follows: str  # as in `Record`, as the next two
    epoch: int
    slots: list[tuple[int, int]]
    known: set[str]  # the ids of all nodes of the Cluster
    is_first: bool  # of the data primaries that live, it has the smallest id


def view(reply: str) -> View:
    """Read a reply to CLUSTER NODES.

    >>> view("ab 127.0.0.1:7000@17000 myself,master - 0 0 3 connected 0-99 200 [300->-cd]").slots
    [(0, 99), (200, 200)]
    """
    members = topology.parse(reply)
    own = next(member for member in members if "myself" in member.flags)
    data = [member.id for member in members if member.lives and member.is_primary and member.holds_data]
    is_first = min(data, default="") == own.id
    return View(own.id, own.primary, own.epoch, topology.ranges(own.slots), {member.id for member in members}, is_first)


def name(node: str, record: Record) -> str:
    """The name of a record's object."""
    return f"{PREFIX}{node}/{round(record['seen'] * 1000):015}"


def encode(record: Record) -> bytes:
    """The bytes of a record's object."""
    return json.dumps(record).encode()


async def nodes(store: ObjectStore) -> dict[str, list[str]]:
    """The nodes that have records, each with the names of its records, oldest first. Empty for a single server.

    Raises Unavailable.
    """
    found: dict[str, list[str]] = {}
    async for entry in store.list(PREFIX):
        found.setdefault(entry.name.split("/")[1], []).append(entry.name)
    return found


async def read(store: ObjectStore) -> dict[str, list[Record]]:
    """All records by node, oldest first. Raises NotFound if one is removed meanwhile, and Unavailable."""
    return {node: [await _get(store, one) for one in names] for node, names in (await nodes(store)).items()}


async def newest(store: ObjectStore, node: str) -> Record | None:
    """The newest record of a node, None if it has none. Raises Unavailable."""
    names = [entry.name async for entry in store.list(f"{PREFIX}{node}/")]
    return await _get(store, names[-1]) if names else None


async def remove_old(store: ObjectStore, node: str, oldest: int) -> None:
    """Remove the records of a node that no restore needs: those that ended before second `oldest`. Raises Unavailable.

    A record ends at the `seen` of the next one, which is in its name.
    """
    names = [entry.name async for entry in store.list(f"{PREFIX}{node}/")]
    ended = [one for one, after in pairwise(names) if int(after.rpartition("/")[2]) < oldest * 1000]
    if ended:
        await store.delete(ended)


async def _get(store: ObjectStore, one: str) -> Record:
    record: Record = json.loads(await store.get(one))
    record["slots"] = [(first, last) for first, last in record["slots"]]
    return record


def expand(slots: list[tuple[int, int]]) -> set[int]:
    """The numbers of all slots in some ranges."""
    return {slot for first, last in slots for slot in range(first, last + 1)}


def is_arbiter(record: Record) -> bool:
    """Whether a primary only votes."""
    return bool(record["slots"]) and record["slots"][0][0] >= SLOTS - topology.ARBITERS


def candidates(records: Mapping[str, list[Record]], end: float, kept: set[str]) -> list[tuple[str, ...]]:
    """For each slot the nodes whose chains may be the right one at `end` (unix seconds). See the table at the top.

    | nodes | the slot |
    |---|---|
    | none | had no node with data |
    | one | had this node |
    | several | was moved about then, or its node is not in the records: the one that has most of it is right |

    A later node takes part only if it is in `kept`: those whose chains reach back to `end`.
    """
    now = {node: record for node, history in records.items() if (record := _at(history, end))}
    owner = _owners(now)
    moved: dict[int, list[str]] = {}
    promoted: dict[int, tuple[int, float, str]] = {}
    for node, history in records.items():
        later = next((record for record in history if record["looked"] < end <= record["seen"]), None)
        if not later or node not in kept:
            continue
        for slot in expand(later["slots"]):
            before = owner.get(slot)
            if before and (before[2] == node or before[0] > later["epoch"]):
                continue
            if before and node in now and now[node]["follows"] == before[2]:
                promoted[slot] = max(promoted.get(slot, before), (later["epoch"], later["seen"], node))
            else:
                moved.setdefault(slot, []).append(node)
    ever = {slot for history in records.values() for record in history if record["seen"] < end for slot in _own(record)}
    primaries = tuple(sorted(node for node, record in now.items() if not record["follows"] and node in kept))
    found: list[tuple[str, ...]] = []
    for slot in range(SLOTS):
        sure = promoted.get(slot) or owner.get(slot)
        nodes = ((sure[2],) if sure else ()) + tuple(moved.get(slot, ()))
        found.append(nodes or (primaries if slot in ever else ()))
    return found


def successors(records: Mapping[str, list[Record]], node: str, end: float) -> list[str]:
    """The nodes that were replicas of `node` at `end` (unix seconds) and became primaries later, in this order."""
    promoted = []
    for other, history in records.items():
        now = _at(history, end)
        if now and now["follows"] == node:
            later = [record["seen"] for record in history if record["seen"] >= end and not record["follows"]]
            promoted += [(min(later), other)] if later else []
    return [other for _, other in sorted(promoted)]


def known_from(records: Mapping[str, list[Record]], end: float) -> float:
    """From when on (unix seconds) it is known who had each slot; at most `end` if it is known at `end`.

    The first record of a node says what it had already. If no other node had it at `end`, this node may have had it.
    """
    owned = set(_owners({node: record for node, history in records.items() if (record := _at(history, end))}))
    first = [history[0] for history in records.values() if history[0]["looked"] == history[0]["seen"]]
    return max((one["seen"] for one in first if one["seen"] >= end and _own(one) - owned), default=end)


def _at(history: list[Record], end: float) -> Record | None:
    """The newest record that was true at `end`."""
    return next((record for record in reversed(history) if record["seen"] < end), None)


def _own(record: Record) -> set[int]:
    """The slots of a primary that has data."""
    return set() if is_arbiter(record) else expand(record["slots"])


def _owners(now: Mapping[str, Record]) -> dict[int, tuple[int, float, str]]:
    """The owner of each slot: config epoch, `seen`, node."""
    found: dict[int, tuple[int, float, str]] = {}
    for node, record in now.items():
        claim = record["epoch"], record["seen"], node
        for slot in _own(record):
            found[slot] = max(found.get(slot, claim), claim)
    return found
