"""Segments: objects that hold old comments of a post, and the caches through which they are read.

The object `comments/<post>/<name>` is text, compressed with brotli (RFC 7932). Its first line is a JSON object, each
other line a JSON array: the id, the author and the text of a comment, oldest first:

    {"post":"01JD…","count":2,"first":"1732104158821-0","last":"1732104160002-0","sha256":"9f86…"}
    ["1732104158821-0","alice","nice"]
    ["1732104160002-0","bob","where is that?"]

`sha256` is of all lines below the first, as bytes (FIPS 180-4). A segment is never changed, so a cache of it never has
to be refreshed. Redis knows which of its comments were deleted since.
"""

import asyncio
import hashlib
import logging
import os
import secrets
import sys
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import repeat
from operator import lt
from pathlib import Path
from typing import NamedTuple

import brotli
import orjson

from storage import keys
from storage.objects import NotFound, ObjectStore, Unavailable
from storage.settings import MIB, Settings, store_place

logger = logging.getLogger(__name__)

INLINE_BYTES = 24 * 1024  # compressed. Such a segment is decoded in less than 1 ms, so on the event loop
ENTRY_BYTES = 300  # that Python's objects take for one entry of the cache, besides its text and its name

FOLDER_FACTOR = 64  # the folder of a machine may be so many times as large as the memory of one process
# A process looks at the folder when it has added this part of the limit, and then leaves EVICT_TO of the limit. So four
# processes together do not pass the limit. Each process more may pass it by 1/32.
LOOK_AFTER = 1 / 32
EVICT_TO = 7 / 8
DRAFT = ".tmp-"
DRAFT_SECONDS = 3600  # no draft takes an hour: a process that died left it
LOOK_SECONDS = 3600  # with the first object that is added after this time, a process looks at the folder too
# An object leaves the folder this long after its last read, also if there is space. It may hold deleted comments: then
# nobody reads it any more.
UNREAD_SECONDS = 7 * 86400
BLOCK = 4096  # bytes. A file takes whole blocks of the disk


class Comment(NamedTuple):
    """A comment as the scripts return it."""

    id: str  # `<ms since 1970>-<number>`, the id of its stream entry
    author: str
    text: str


class Damaged(ValueError):
    """An object is not a whole segment of this post. The message says what is wrong."""


def encode(post: str, rows: Sequence[Comment]) -> bytes:
    """A segment as bytes. `rows` are oldest first. Takes about 25 ms of CPU for 256 lines of a chat.

    Raises ValueError where there are no rows or their ids do not ascend.
    """
    if not rows or not _ascend(rows):
        raise ValueError("a segment needs comments whose ids ascend")
    lines = b"".join([orjson.dumps(row) + b"\n" for row in map(tuple, rows)])
    text = orjson.dumps(_header(post, rows, lines)) + b"\n" + lines
    return brotli.compress(text, quality=11)  # a window or a mode for text makes it no smaller and no faster


def decode(post: str, data: bytes) -> list[Comment]:
    """The comments of a segment, oldest first. Raises Damaged."""
    checked = _check(post, data)
    try:
        rows = checked[:]
        good = set(map(len, rows)) == {3} and _ascend(rows)
    except (ValueError, TypeError, AttributeError) as error:
        raise Damaged(f"no rows: {error!r}") from error
    if not good:
        raise Damaged("the ids do not ascend")
    return rows


def _check(post: str, data: bytes) -> "Rows":
    """The comments of a segment, if they are what its first line says. Raises Damaged.

    Does not look at each line: `encode` has done so, and the digest shows that the lines are its.
    """
    try:
        first, _, lines = brotli.decompress(data).partition(b"\n")
        header, rows = orjson.loads(first), Rows(lines)
        wrong = [name for name, value in _header(post, rows, lines).items() if header[name] != value]
    except (brotli.error, ValueError, TypeError, LookupError) as error:
        raise Damaged(f"no segment: {error!r}") from error
    if wrong:
        raise Damaged(f"no whole segment of {post}: wrong {', '.join(wrong)}")
    return rows


class Rows(Sequence[Comment]):
    """The comments of a segment, oldest first. Each is parsed when it is asked for: a page needs 20 of 256."""

    def __init__(self, lines: bytes):
        self.text = lines
        self._lines = lines[:-1].split(b"\n")  # a newline within a text is escaped

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, place):
        if not isinstance(place, slice):
            return Comment(*orjson.loads(self._lines[place]))
        # To parse all at once takes half the time. Comment(*row) would take three times as long.
        rows = orjson.loads(b"[%b]" % b",".join(self._lines[place]))
        return list(map(tuple.__new__, repeat(Comment), rows))

    def __iter__(self) -> Iterator[Comment]:
        return iter(self[:])


def _header(post: str, rows: Sequence[Comment], lines: bytes) -> dict:
    return {
        "post": post,
        "count": len(rows),
        "first": rows[0].id,
        "last": rows[-1].id,
        "sha256": hashlib.sha256(lines).hexdigest(),
    }


def _ascend(rows: Sequence[Comment]) -> bool:
    # The JSON parser reads the numbers of all ids in a fifth of the time that int() takes.
    numbers = orjson.loads("[[" + "],[".join([row.id for row in rows]).replace("-", ",") + "]]")
    return all(map(lt, numbers, numbers[1:]))


class Unreadable(Unavailable):
    """One segment is missing or damaged. Others may be read."""


class Segments:
    """Reads segments through caches, and stores them.

    | cache | holds | of |
    |---|---|---|
    | memory | the lines of comments, checked, as JSON | this process |
    | folder, if there is one | the objects as they are in the store | all processes of this machine |

    The memory holds lines, not rows. Rows take three times the memory, and Python's garbage collector would visit each
    of them.
    """

    def __init__(self, objects: ObjectStore, memory: int = 16 * MIB, folder: Path | None = None, min_free: int = 0):
        """`memory` is in bytes, 0: nothing is cached in memory. `folder` may be FOLDER_FACTOR times as large.

        `min_free` is in bytes: of the disk of `folder` so much should stay free.
        """
        self._objects = objects
        self._limit = memory
        self._folder = CacheFolder(folder, memory * FOLDER_FACTOR, min_free) if folder else None
        self._lines: OrderedDict[str, bytes] = OrderedDict()  # object name → lines; the least recently read is first
        self._reading: dict[str, asyncio.Task] = {}
        self.held = 0  # bytes of memory that the cached lines take

    async def put(self, post: str, name: str, rows: Sequence[Comment]) -> None:
        """Store a segment. When this returns, it is durable. Raises Unavailable, and Full where the disk is full."""
        data = await asyncio.to_thread(encode, post, rows)
        await self._objects.put(keys.segment(post, name), data)

    async def ping(self) -> None:
        """Raises Unavailable where the store is away."""
        await self._objects.ping()

    async def delete(self, post: str, name: str) -> None:
        """Remove a segment that nothing names. Raises Unavailable."""
        await self._objects.delete([keys.segment(post, name)])

    async def read(self, post: str, name: str) -> Rows:
        """The comments of a segment, oldest first. Readers of one segment at the same time share one read of the store.

        Raises Unavailable, and Unreadable where only this segment is missing or damaged.
        """
        key = keys.segment(post, name)
        if lines := self._lines.get(key):
            self._lines.move_to_end(key)
            return Rows(lines)
        task = self._reading.get(key)
        if task is None:
            task = self._reading[key] = asyncio.create_task(self._read(post, key))
            task.add_done_callback(lambda done: self._finish(key, done))
        return await asyncio.shield(task)  # a reader that is cancelled must not end the read of the others

    def _finish(self, key: str, task: asyncio.Task) -> None:
        del self._reading[key]
        if not task.cancelled():
            task.exception()  # all readers may have been cancelled. Otherwise asyncio would log that nobody took it

    async def _read(self, post: str, key: str) -> Rows:
        if self._folder and (data := await asyncio.to_thread(self._folder.read, key)):
            try:
                return await self._check(post, key, data)
            except Damaged as error:
                logger.warning("%s in the cache is damaged and is read again: %s", key, error)
                await asyncio.to_thread(self._folder.remove, key)
        try:
            data = await self._objects.get(key)
            rows = await self._check(post, key, data)
        except NotFound as error:
            await self.ping()  # raises Unavailable where the whole store is missing
            raise Unreadable(f"{key} is missing: run imagegram-storage check") from error
        except Damaged as error:
            raise Unreadable(f"{key} is damaged: run imagegram-storage check. {error}") from error
        if self._folder:
            await asyncio.to_thread(self._folder.add, key, data)
        return rows

    async def _check(self, post: str, key: str, data: bytes) -> Rows:
        rows = _check(post, data) if len(data) <= INLINE_BYTES else await asyncio.to_thread(_check, post, data)
        self._keep(key, rows.text)
        return rows

    def _keep(self, key: str, lines: bytes) -> None:
        size = _entry_size(key, lines)
        if size > self._limit or key in self._lines:
            return
        self._lines[key] = lines
        self.held += size
        while self.held > self._limit:
            self.held -= _entry_size(*self._lines.popitem(last=False))


def _entry_size(key: str, lines: bytes) -> int:
    return sys.getsizeof(lines) + sys.getsizeof(key) + ENTRY_BYTES


class CacheFolder:
    """A folder of cached objects, at most `limit` bytes of the disk, that processes share. Its functions block.

    Nothing in it has to be durable or whole: the reader checks what it reads, and reads damaged objects again from the
    store. If the folder cannot be written, or its disk is full, nothing is added.
    """

    def __init__(self, path: Path, limit: int, min_free: int = 0):
        self._path = path
        self._limit = limit
        self._min_free = min_free
        self._added = 0  # bytes since the last look at the whole folder
        self._looked = 0.0  # when that was, in seconds since 1970. So the first object that is added looks
        self._failed = False

    def read(self, name: str) -> bytes | None:
        """The bytes of an object, None where it is not in the folder. Marks it as read now."""
        file = self._file(name)
        try:
            data = file.read_bytes()
        except OSError:
            return None
        with suppress(OSError):  # another process may have evicted it, or the folder may be read-only
            os.utime(file)
        return data

    def remove(self, name: str) -> None:
        with suppress(OSError):
            self._file(name).unlink()

    def add(self, name: str, data: bytes) -> None:
        """Add an object, and evict others if the folder is too large.

        Does nothing where that is impossible, and where less than `min_free` bytes of the disk are free.
        """
        draft = self._path / f"{DRAFT}{secrets.token_hex(8)}"
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            disk = os.statvfs(self._path)
            if disk.f_bavail * disk.f_frsize < self._min_free:
                return
            try:
                draft.write_bytes(data)
                draft.rename(self._file(name))
            except OSError:
                draft.unlink(missing_ok=True)
                raise
            self._added += len(data) + BLOCK
            if self._added > self._limit * LOOK_AFTER or time.time() - self._looked > LOOK_SECONDS:
                self._added, self._looked = 0, time.time()
                self._evict()
        except OSError as error:
            if not self._failed:  # once, not for each page
                logger.warning("segments are not cached in %s: %s", self._path, error.strerror)
            self._failed = True

    def _evict(self) -> None:
        """Remove the objects that were read least recently, until EVICT_TO of the limit are left.

        Also removes what was not read for UNREAD_SECONDS, and drafts of processes that died.
        """
        files, total, now = [], 0, time.time()
        with os.scandir(self._path) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # another process evicts at the same time
                    status = entry.stat()
                    if entry.name.startswith(DRAFT):
                        if status.st_mtime < now - DRAFT_SECONDS:
                            os.unlink(entry.path)
                    else:
                        size = max(status.st_size, status.st_blocks * 512)  # st_blocks: see stat(2)
                        files.append((status.st_mtime, size, entry.path))
                        total += size
        files.sort()
        for read, size, path in files:
            if total <= self._limit * EVICT_TO and read > now - UNREAD_SECONDS:
                return
            with suppress(FileNotFoundError):
                os.unlink(path)
            total -= size

    def _file(self, name: str) -> Path:
        return self._path / name.removeprefix(keys.SEGMENTS).replace("/", ".")


def open_segments(settings: Settings, objects: ObjectStore) -> Segments:
    """The segments of an installation. Only objects of S3 are cached in a folder: the others are files already."""
    in_folder = store_place(settings.store_url)[0] == "s3" and settings.segment_cache
    folder = settings.data / "segments" if in_folder else None
    return Segments(objects, settings.segment_cache * MIB, folder, settings.free_space * MIB)
