"""Calls Lua scripts on a Redis Cluster. Each call goes to the primary that serves the slot of its keys.

For each primary there is a `Redis`, with its two connections that all callers share. redis-py's own client for clusters
does not group the commands that wait, which takes a third of the throughput, and it repeats writes.

What a node answers instead of running a script (Redis Cluster specification, "Redirection and resharding"):

| answer | what follows, within DEADLINE |
|---|---|
| MOVED | the slot belongs to the node that is named: the call is sent there |
| ASK | the slot is being moved: the call is sent once to the node that is named, behind ASKING |
| TRYAGAIN, CLUSTERDOWN, READONLY, LOADING | the call is sent again after a pause, to the node that has the slot then |
| none, and the call was not sent or it was a read | the same |
| none, and the call was a write | Unknown: it may have happened, and is never sent again |

After each call without an answer the next one asks where its slot is. A primary that hangs still accepts connections,
so only another node can say that a replica has taken its place.
"""

import asyncio
import binascii
import random
import re
from collections.abc import Coroutine
from contextlib import nullcontext
from copy import copy
from functools import lru_cache
from typing import Any, Literal
from urllib.parse import urlsplit

from redis.exceptions import (
    AskError,
    BusyLoadingError,
    ClusterCrossSlotError,
    ClusterDownError,
    MovedError,
    ReadOnlyError,
    TryAgainError,
)

from storage.db.client import DEADLINE, REPLIED, SCRIPTS, Collect, Done, Redis, Script, meaning
from storage.errors import Unknown, Unreachable

SLOTS = 16384
PORT = 6379  # of a host that is named without a port
PAUSE = 0.02  # seconds before a call is sent again, and up to twice as long, so that not all callers come at once
LOOK = 0.3  # seconds in which a node must say where the slots are
ASKED = 3  # nodes that are asked for it at once
SCHEMES = {"redis+cluster": "redis", "rediss+cluster": "rediss"}
NOT_RUN = (TryAgainError, ClusterDownError, ReadOnlyError, BusyLoadingError)
# A script had run some of its commands when it met data that are not here: its slot was moved away key by key, or it
# reads several partitions and one of them has moved.
STOPPED = "non local key"
NO_TIMER: nullcontext[None] = nullcontext()


@lru_cache(1024)
def slot_of(key: str) -> int:
    """The slot of a key that has a hash tag (Redis Cluster specification, "Hash tags").

    >>> slot_of("feed:{0}") == slot_of("post:{0}:x") == 13907
    True
    """
    return binascii.crc_hqx(key[key.index("{") + 1 : key.index("}")].encode(), 0) % SLOTS


@lru_cache(16)
def partition_slots(partitions: int) -> tuple[int, ...]:
    """The slot of each partition."""
    return tuple(slot_of(f"{{{partition}}}") for partition in range(partitions))


@lru_cache(256)
def grouped(places: tuple[str, ...]) -> list[tuple[int, ...]]:
    """The partitions of each node, from the place of each partition's node. The cache saves 5 µs of a feed page."""
    found: dict[str, list[int]] = {}
    for partition, place in enumerate(places):
        found.setdefault(place, []).append(partition)
    return [tuple(group) for group in found.values()]


def address(host: str, port: int) -> str:
    """The host and the port of a node, as in a URL.

    >>> address("h1", 7000), address("::1", 7000)
    ('h1:7000', '[::1]:7000')
    """
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def node_url(url: str, place: str) -> str:
    """The URL of one node, with user, password and options of the URL of its Cluster.

    >>> node_url("rediss+cluster://user:pw@h1,h2?ssl_cert_reqs=none", "h3:7000")
    'rediss://user:pw@h3:7000?ssl_cert_reqs=none'
    """
    parts = urlsplit(url)
    user = "".join(parts.netloc.rpartition("@")[:2])
    return f"{SCHEMES[parts.scheme]}://{user}{place}?{parts.query}"


class Node(Redis):
    """One node. Its errors are those that the server replies, so that `Cluster` can follow them."""

    meaning = staticmethod(lambda error: error)

    @property
    def host(self) -> str:
        """Without brackets, also if it is an IPv6 address."""
        return self.place.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        return int(self.place.rpartition(":")[2])

    async def ask(self, *command: str | int) -> Any:
        """The reply to a command about this node. Raises one of REPLIED, and Unreachable."""
        return await self._reads.ask(*command)

    async def call_asking(self, name: str, keys: list[str], *args: Any) -> Any:
        """Like `call`, for a slot that is being moved to this node."""
        called = self._scripts[name]
        channel = self._reads if called.reads else self._writes
        # EVAL, because a second attempt would need ASKING once more.
        asking = channel.ask("ASKING")
        answer = channel.ask("EVAL", called.text, len(keys), *keys, *args)
        await asyncio.gather(asking, answer, return_exceptions=True)
        return await answer

    async def slots(self) -> list[tuple[int, int, str]]:
        """The ranges of slots and their primaries, as this node knows them: first, last, `host:port`.

        Raises one of REPLIED, and Unreachable, also if the node is cut off from most of the primaries.
        """
        state, rows = await asyncio.gather(self._reads.ask("CLUSTER", "INFO"), self._reads.ask("CLUSTER", "SLOTS"))
        if "cluster_state:ok" not in state:
            raise Unreachable("the cluster is down")
        return [(first, last, address(host or self.host, port)) for first, last, (host, port, *_), *_ in rows]


class Cluster(Redis):
    """Has the interface of `Redis`. `url` is `redis+cluster://host1:port,host2:port,…`, or `rediss+cluster://` for TLS.

    The named nodes are asked for the others. User, password and options of the URL hold for all nodes.
    """

    cluster: Literal["", "1"] = "1"

    def __init__(
        self, url: str, scripts: dict[str, Script] = SCRIPTS, undecodable: str = "replace", replicas: int = 0
    ):
        self._url = url
        self._options = scripts, undecodable, replicas
        self._nodes: dict[str, Node] = {}  # by `host:port`
        self._primaries: set[str] = set()  # `host:port` of each, as `_look` has learned
        self._served: list[Node | None] = [None] * SLOTS  # the primary of each slot, as `_look` has learned
        self._owners: dict[int, Node] = {}  # slot -> its primary, as far as it was needed and no call has failed since
        self._looking: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.clock: int | Literal[""] = ""
        for place in urlsplit(url).netloc.rpartition("@")[2].split(","):
            self.node(place if re.search(r":[0-9]+$", place) else f"{place}:{PORT}")
        self._in_url = set(self._nodes)

    def node(self, place: str) -> Node:
        """The node at `host:port`."""
        node = self._nodes.get(place)
        if node is None:
            node = self._nodes[place] = Node(node_url(self._url, place), *self._options)
            node.place = place
        return node

    def nodes(self) -> list[Node]:
        """The nodes in the URL, in its order, then those that were learnt from them."""
        return list(self._nodes.values())

    async def call(self, name: str, keys: list[str], *args: Any) -> Any:
        """Like `Redis.call`. All keys must be in one slot. A call without keys goes to any primary."""
        slot, reads = slot_of(keys[0]) if keys else 0, self._options[0][name].reads
        loop = asyncio.get_running_loop()
        end, limit, asked = loop.time() + DEADLINE, None, None
        while True:
            found = bool(asked)
            try:
                async with asyncio.timeout_at(limit) if limit else NO_TIMER:
                    if asked:
                        node, asked = asked, None
                        return await node.call_asking(name, keys, *args)
                    node = self._owners.get(slot) or await self._find(slot)
                    found = True
                    return await node.call(name, keys, *args)
            except TimeoutError:
                self._owners.pop(slot, None)
                lost = Unknown if found and not reads else Unreachable
                raise lost("Redis' answer did not come in time") from None
            except Unknown:
                self._owners.pop(slot, None)
                raise
            except MovedError as error:
                self._owners[slot] = self._named(error, node)
                failure: Exception = error
            except AskError as error:
                asked, failure = self._named(error, node), error
            except (*NOT_RUN, Unreachable) as error:
                self._owners.pop(slot, None)
                failure = error
                await asyncio.sleep(PAUSE * (1 + random.random()))
            except ClusterCrossSlotError:
                raise  # a bug of the caller
            except REPLIED as error:
                if STOPPED in str(error):
                    self._owners = {}
                    if not reads:
                        raise Unknown("the data were moved meanwhile") from None
                    stopped = Unreachable("the data were moved meanwhile")
                    stopped.moved = True
                    raise stopped from None
                raise meaning(error) from None
            limit = end  # the first attempt needs no timer: the node has the same deadline
            if loop.time() > end:
                raise failure if isinstance(failure, Unreachable) else Unreachable(f"Redis refuses: {failure}")

    def call_late(self, name: str, key: str, collect: Collect, done: Done) -> None:
        """Like `Redis.call_late`. If the slot's primary is not known, or has changed, it costs a task."""
        sent: list[tuple[list[str], list[Any]]] = []

        def collect_once() -> tuple[list[str], list[Any]]:
            sent.append(collect())
            return sent[0]

        def answered(reply: Any, error: Exception | None) -> None:
            if isinstance(error, (AskError, *NOT_RUN)) or (isinstance(error, Unreachable) and not sent):
                self._start(self._call_again(name, *(sent[0] if sent else collect()), done))
            else:
                if isinstance(error, (Unknown, Unreachable)):
                    self._owners.pop(slot_of(key), None)
                done(reply, meaning(error) if isinstance(error, REPLIED) else error)

        if node := self._owners.get(slot_of(key)):
            node.call_late(name, key, collect_once, answered)
        else:
            answered(None, Unreachable("the primary is not known yet"))

    async def _call_again(self, name: str, keys: list[str], args: list[Any], done: Done) -> None:
        try:
            reply, error = await self.call(name, keys, *args), None
        except Exception as failure:
            reply, error = None, failure
        done(reply, error)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def ping(self) -> list[str]:
        """The primaries that do not answer. Raises Unreachable if most of them do not, or if no node reaches most."""
        primaries = await self.primaries()
        answers = await asyncio.gather(*(node.ping() for node in primaries), return_exceptions=True)
        silent = [one.place for one, answer in zip(primaries, answers, strict=True) if isinstance(answer, Unreachable)]
        if len(silent) * 2 > len(primaries):
            raise Unreachable(f"no answer from {', '.join(silent)}")
        return silent

    async def primaries(self) -> list[Redis]:
        """The primaries of all slots, for a walk over all keys. Raises Unreachable."""
        await self._look()
        found: list[Redis] = []
        for place in sorted(self._primaries):
            node = copy(self.node(place))
            node.meaning = meaning
            found.append(node)
        return found

    async def groups(self, partitions: int) -> list[tuple[int, ...]]:
        """Like `Redis.groups`, as far as is known: a partition may just have moved. Raises Unreachable."""
        slots = partition_slots(partitions)
        nodes = [self._owners.get(slot) or await self._find(slot) for slot in slots]
        return [*grouped(tuple([node.place for node in nodes]))]

    async def close(self) -> None:
        """Wait for all replies, then disconnect."""
        await asyncio.gather(*self._tasks, *(node.close() for node in self._nodes.values()))

    def _named(self, error: AskError, node: Node) -> Node:
        """The node that a redirection names. Without a host it is the one that answered, with another port."""
        return self.node(address(error.host or node.host, error.port))

    async def _find(self, slot: int) -> Node:
        """Ask where the slots are, and return the primary of one. Raises Unreachable if nobody knows."""
        if self._looking is None:  # all who wait share one question
            self._looking = asyncio.create_task(self._look())
            self._looking.add_done_callback(self._looked)
        await asyncio.shield(self._looking)
        if node := self._served[slot]:
            self._owners[slot] = node
            return node
        raise Unreachable("no node of the cluster serves these data")

    def _looked(self, task: asyncio.Task[None]) -> None:
        self._looking = None
        if not task.cancelled():
            task.exception()  # if nobody waits any more, asyncio must not log it

    async def _look(self) -> None:
        """Learn the primaries of all slots from the first node that answers, of a few at a time. Raises Unreachable."""
        nodes = random.sample(self.nodes(), len(self._nodes))
        failure: Exception | str = "no answer"
        for start in range(0, len(nodes), ASKED):
            asking = [asyncio.ensure_future(node.slots()) for node in nodes[start : start + ASKED]]
            try:
                async with asyncio.timeout(LOOK):
                    for answer in asyncio.as_completed(asking):
                        try:
                            self._learn(await answer)
                            return
                        except (*REPLIED, Unreachable) as error:
                            failure = error
            except TimeoutError:
                continue
            finally:
                for request in asking:
                    request.cancel()
        raise Unreachable(f"no node of the cluster can be reached: {failure}")

    def _learn(self, found: list[tuple[int, int, str]]) -> None:
        """Keep what a node has said, and forget nodes that have left: they would be asked again and again."""
        self._primaries = {place for _, _, place in found}
        for place in self._nodes.keys() - self._in_url - self._primaries:
            self._start(self._nodes.pop(place).close())
        # A list, because a search in the ranges for each of 16384 slots would stop the event loop for 100 ms. Clients
        # may name any slot in the ids that they ask for.
        self._served = [None] * SLOTS
        for first, last, place in found:
            self._served[first : last + 1] = [self.node(place)] * (last + 1 - first)
        # The calls of other shards must not ask again while one shard is looked for all the time.
        self._owners = {slot: node for slot in self._owners if (node := self._served[slot])}


def connect(url: str, replicas: int = 0, undecodable: str = "replace") -> Redis:
    """The client of the Redis, or of the Cluster, at `url`."""
    kind = Cluster if urlsplit(url).scheme in SCHEMES else Redis
    return kind(url, undecodable=undecodable, replicas=replicas)
