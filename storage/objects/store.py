"""What every object store does: the protocol `ObjectStore`, its errors, and the rule for names.

What a verb has put is durable when it returns, and is seen whole or not at all. No locks and no cache:
whoever must be the only one uses `create`. Does not know which objects there are: names are made elsewhere.
"""

import re
from collections.abc import AsyncIterable, AsyncIterator, Iterable
from dataclasses import dataclass
from typing import Protocol

PIECE = 1024 * 1024  # bytes of a piece that is read or written at once: bounds the memory of a stream
LEFTOVER_SECONDS = 24 * 3600  # no put takes a day: a tmp file this old was left by a process that died

# Narrower than either store takes: the same to both, to a shell and in a URL, and never outside the folder.
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")


class NotFound(Exception):
    """There is no object of this name."""


class Exists(Exception):
    """`create` found the name taken: over S3 perhaps by our own first try, whose answer was lost."""


class Unavailable(Exception):
    """The store is out of reach or cannot do it: network, time, rights. The message says which."""


class Full(Unavailable):
    """The store's disk has no room, or less than is to be spared."""


@dataclass(frozen=True)
class Entry:
    name: str
    size: int  # bytes
    modified: float  # unix seconds


class ObjectStore(Protocol):
    """Immutable bytes under names. `Folder` keeps them as files, `S3` in a bucket."""

    async def put(self, name: str, data: bytes | AsyncIterable[bytes]) -> None:
        """Make or replace the object. Raises Unavailable, and what `data` raises: then nothing changed."""

    async def create(self, name: str, data: bytes) -> None:
        """Make the object. Raises Exists if the name is taken (never replaces), Unavailable."""

    async def get(self, name: str) -> bytes:
        """The object's bytes. Raises NotFound, Unavailable."""

    def read(self, name: str) -> AsyncIterator[bytes]:
        """The object in pieces of at most 1 MiB. Raises NotFound before the first, Unavailable."""

    async def size(self, name: str) -> int:
        """Bytes of the object. Raises NotFound, Unavailable."""

    async def delete(self, names: Iterable[str]) -> None:
        """Remove the objects; one that is missing is as good as removed. Raises Unavailable."""

    def list(self, prefix: str = "") -> AsyncIterator[Entry]:
        """Objects below a folder ("" or a path ending in "/"), ascending by name. Raises Unavailable."""

    async def ping(self) -> None:
        """Raises Unavailable where the store is not there."""

    def check_free_space(self) -> None:
        """Raises Full where the disk has less free than is to be spared: 2 µs, it waits for no disk."""


def require_name(name: str) -> str:
    if not NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of an object")
    return name


def require_prefix(prefix: str) -> str:
    if prefix and not prefix.endswith("/"):
        raise ValueError(f"{prefix!r} is no folder: wanted '' or a path that ends in '/'")
    return prefix and require_name(prefix[:-1]) + "/"
