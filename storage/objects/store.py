"""What every object store does: the protocol `ObjectStore`, its errors, and the rule for names.

Two classes implement the protocol: `Folder` in folder.py and `S3` in s3.py. Both keep these promises:

- After `put` or `create` has returned, the object is durable.
- A reader sees an object whole or not at all. It never sees a part of one.
- There are no locks. A caller that must be the only one uses `create`: of several callers, one succeeds.
- There is no cache.

An object store does not know which objects exist or what they mean. `storage.keys` and `storage.backup.chain` make the
names.
"""

import re
from collections.abc import AsyncIterable, AsyncIterator, Iterable
from dataclasses import dataclass
from typing import Protocol

PIECE = 1024 * 1024  # bytes of a stream that are read or written at once: this bounds the memory of a stream
LEFTOVER_SECONDS = 24 * 3600  # no put takes a day: a process that died left a draft of this age

# Narrower than what a file system and S3 allow. A name means the same to both, to a shell and in a URL, and it never
# leads out of the folder.
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")


class NotFound(Exception):
    """There is no object with this name."""


class Exists(Exception):
    """`create` found that the name is taken.

    Over S3 the same call may have created the object itself: the answer to its first request was lost, and the request
    was sent again. A caller to whom the difference matters reads the object and compares the bytes.
    """


class Unavailable(Exception):
    """The store cannot be reached or cannot do what was requested: network, timeout, permissions.

    The message names the reason.
    """


class Full(Unavailable):
    """The disk of the store is full, or less of it is free than the store was opened with (`min_free`)."""


@dataclass(frozen=True)
class Entry:
    """One object in a listing."""

    name: str
    size: int  # bytes
    modified: float  # unix seconds of the last write


class ObjectStore(Protocol):
    """Bytes under names.

    Every verb that takes a name raises ValueError if the name does not match NAME.
    """

    async def put(self, name: str, data: bytes | list[bytes] | AsyncIterable[bytes]) -> None:
        """Create or replace an object, from bytes, from the pieces of them in a list, or from a stream of bytes.

        Raises Unavailable (Full if the disk is full). Also raises what iterating `data` raises. After an error nothing
        has changed.
        """

    async def create(self, name: str, data: bytes) -> None:
        """Create an object. Never replaces one.

        Raises Exists if the name is taken, and Unavailable.
        """

    async def get(self, name: str) -> bytes:
        """Return the bytes of an object.

        Raises NotFound and Unavailable.
        """

    def read(self, name: str) -> AsyncIterator[bytes]:
        """Yield the bytes of an object in order, in pieces of at most PIECE bytes (1 MiB).

        Raises NotFound before the first piece, and Unavailable.
        """

    async def size(self, name: str) -> int:
        """Return the number of bytes of an object.

        Raises NotFound and Unavailable.
        """

    async def delete(self, names: Iterable[str]) -> None:
        """Delete objects. A name without an object counts as deleted.

        Raises Unavailable. Some of the objects may be deleted by then.
        """

    def list(self, prefix: str = "") -> AsyncIterator[Entry]:
        """Yield the objects below a folder in ascending order of their names.

        `prefix` is "" for all objects, or a path that ends in "/". An object that is put or deleted during the listing
        may appear or not. Raises ValueError for any other prefix, and Unavailable.
        """

    async def ping(self) -> None:
        """Raise Unavailable if the store cannot be reached."""

    def check_free_space(self) -> None:
        """Raise Full if less than `min_free` bytes of the disk are free.

        Takes 2 µs and waits for no disk, so it may run on the event loop. A bucket does not fill up: `S3` never raises.
        """


def require_name(name: str) -> str:
    """Return `name`. Raises ValueError if it does not match NAME."""
    if not NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not a valid object name")
    return name


def require_prefix(prefix: str) -> str:
    """Return `prefix`. Raises ValueError unless it is "" or a name followed by "/".

    >>> require_prefix("images/")
    'images/'
    """
    if prefix and not prefix.endswith("/"):
        raise ValueError(f"{prefix!r} is not a folder: expected '' or a path that ends in '/'")
    return prefix and require_name(prefix[:-1]) + "/"
