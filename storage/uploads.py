"""Uploads: images that arrive in pieces, by tus (https://tus.io/protocols/resumable-upload) or by a form.

The bytes of an upload are immutable chunks in the object store. Redis holds the names of the chunks and the offset.

    received ──► buffer ──put──► chunks/<upload>/<offset>-<random> ──append_chunk──► offset

A chunk becomes durable first. Then the script append_chunk moves the offset past it, by compare-and-set. So there are
no locks, and several processes may append to one upload: of two chunks at one offset the script accepts one, and the
other is erased.

The fields of `upload:{p}:<id>` in each state (docs/keys.md):

| state | fields | then |
|---|---|---|
| open | `owner`, `offset`, `expires`, `length`, `metadata` | takes chunks until `offset` is `length` |
| open, of a form | `owner`, `offset`, `expires` | takes chunks; its length is known when the form ends |
| complete | as open; `offset` is `length` | create_post makes a post of it |
| finished | `owner`, `post`, `length` (the sum of the chunks) | its chunks are erased once the post has its original |
| dropped | none: the hash is gone | its chunks are erased |
| expired | `owner`, `expires` = 0 | its chunks are erased; for a day it is refused as expired, not as unknown |
| used | `final`, `length` | it was a part, and its chunks are now those of the upload that `final` names |

`expires` is an hour after an upload was opened. Each chunk moves it to 24 hours later, or to an hour later in a form.
After that time the upload is refused as expired at once. The outbox then drops it and leaves the fields of that row. In
the last four states `chunks:{p}:<id>` exists until the chunks are erased: for a post that failed, until it is deleted.

Partial and final uploads (tus, "Concatenation") have one more field while they are open, `concat`. A final upload is
complete from the start. Its list of chunks has the ids of its parts, and scripts that read the list put the chunks of
each part in its place.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, NamedTuple, TypeVar

from storage import keys, metrics
from storage.db.client import Redis, now_ms
from storage.errors import (
    Empty,
    Expired,
    Format,
    Incomplete,
    NoUpload,
    Refusal,
    TooLarge,
    Unknown,
    Unreachable,
)
from storage.formats import LONGEST_MAGIC, sniff
from storage.objects import NotFound, ObjectStore, Unavailable
from storage.settings import (
    CHUNKS,
    DAY_MS,
    FORM_BYTES,
    HOUR_MS,
    IMAGE_BYTES,
    MIB,
    OPEN_UPLOADS,
    PROCESSING,
    RESERVED_BYTES,
)

CHUNK = MIB  # bytes of a full chunk. Storing one with fsync takes less time than receiving it over a phone's network
# Bytes of a small chunk, for a slow connection. What is in the buffer when the connection breaks is lost, so a slow
# connection must not wait until it has a full chunk.
SMALL_CHUNK = 64 * 1024
SLOW_SECONDS = 1.0  # once a chunk's first byte is older than this, SMALL_CHUNK bytes are enough for a chunk
# Bytes of a large chunk, for a fast connection: fewer fsyncs, and fewer requests to S3. A chunk grows to it from CHUNK
# by doubling. Each time the bytes before must have come within QUICK_SECONDS, so on an even line no chunk waits longer
# than twice that. If the line becomes slow, SLOW_SECONDS ends the chunk.
LARGE_CHUNK = 8 * MIB
QUICK_SECONDS = 0.05
# A chunk doubles only if the store has taken half of it within this time: a put to S3 must end within 5 s.
PUT_SECONDS = 0.5
# By which all chunks of a process together may be larger than CHUNK. With it eight uploads at once take 60 MiB at most.
GROWN_BYTES = 18 * MIB
PARALLEL_PUTS = 2  # chunks that are stored at the same time. An fsync is mostly waiting
RECENT_MS = 1000  # if an upload took a chunk within this time, another chunk may be on its way to the store
STILL_SECONDS = 0.05  # an upload that took no chunk in this time stands still. The last chunk takes 20 ms
STILL_POLLS = 10  # maximum number of polls: half a second, if the old connection is alive and still sending
GRACE_MS = 60_000  # the caller of `drop` has this time to erase the chunks; then the outbox does it

Result = TypeVar("Result")


class Upload(NamedTuple):
    """An upload as the script read_upload returns it, in any state. Sizes are in bytes."""

    owner: str | None  # None: dropped, or it never existed
    offset: int  # bytes that are durable; 0 where the upload is not open
    length: int | None  # None: open, of a form, or not known any more
    metadata: str  # Upload-Metadata as the client sent it (tus, "Creation")
    expires: int  # ms since 1970; 0 where the upload is not open
    post: str | None  # the id of the post that it became
    concat: str  # Upload-Concat as the client sent it (tus, "Concatenation"): "partial", "final;…", or empty
    final: str | None  # the id of the final upload that this part was used for
    expired: bool
    chunks: list[str]  # their names, in order; empty where they were not requested


async def create(
    db: Redis,
    owner: str,
    partitions: int,
    length: int | None = None,
    metadata: str = "",
    idempotency: keys.IdempotencyKey | None = None,
    form_bytes: int = IMAGE_BYTES,
    processing: int = PROCESSING,
    partial: bool = False,
) -> tuple[str, bool]:
    """Open an upload of `length` bytes. Without `length` it is the upload of a form, and reserves `form_bytes`.

    A form reserves FORM_BYTES at least and IMAGE_BYTES at most. A `partial` upload is a part for `concatenate`, and
    becomes no post by itself. Returns the upload's id, and whether the idempotency key was used before. In that case it
    is the id of the upload that was opened with that key.

    Raises Reused where the idempotency key was used for another request, TooLarge above IMAGE_BYTES, Quota where the
    owner has too many open uploads or reserved bytes (`again` says for how long), and, for a form, Busy where
    `processing` posts of the owner are being processed.
    """
    partition = keys.partition_of_user(owner, partitions)
    upload = keys.new_upload_id(partition)
    script_keys = [
        keys.upload(upload),
        keys.uploads(partition, owner),
        keys.due(partition),
        keys.making(partition, owner),
    ]
    if idempotency:
        script_keys.append(keys.once(partition, owner, idempotency.scoped_key))
    upload, repeated = await db.call(
        "create_upload",
        script_keys,
        db.clock,
        upload,
        owner,
        min(max(form_bytes, FORM_BYTES), IMAGE_BYTES) if length is None else length,
        int(length is None),
        metadata,
        HOUR_MS,
        IMAGE_BYTES,
        OPEN_UPLOADS,
        RESERVED_BYTES,
        keys.upload_prefix(partition),
        idempotency.digest if idempotency else "-",
        DAY_MS,
        processing,
        keys.post_prefix(partition),
        "partial" if partial else "",
    )
    if not repeated:
        metrics.OPENED.add()
    return upload, bool(repeated)


async def concatenate(
    db: Redis,
    objects: ObjectStore,
    owner: str,
    parts: list[str],
    concat: str,
    metadata: str = "",
    idempotency: keys.IdempotencyKey | None = None,
) -> tuple[str, bool]:
    """Make one complete upload of partial ones, in this order (tus, "Concatenation"). No bytes are copied.

    The parts are used then. Returns the final upload's id, and whether it existed: the idempotency key was used before,
    or these parts were made one upload before. `concat` is the text of Upload-Concat, which HEAD returns.

    Raises NoUpload where a part does not exist, belongs to somebody else, was used or became a post, Expired, Concat
    where it is no partial upload, Incomplete, TooLarge, Chunks, Format where the first bytes are not those of an image,
    Reused, Unavailable.
    """
    partition = keys.partition_of_upload(parts[0])
    if any(keys.partition_of_upload(part) != partition for part in parts):  # partitions were added between two parts
        raise NoUpload("these uploads cannot be concatenated: send all parts again")
    await _check_first_bytes(db, objects, owner, parts)
    upload = keys.new_upload_id(partition)
    script_keys = [keys.upload(upload), keys.chunks(upload), keys.uploads(partition, owner), keys.due(partition)]
    if idempotency:
        script_keys.append(keys.once(partition, owner, idempotency.scoped_key))
    upload, repeated = await db.call(
        "concat_uploads",
        script_keys,
        db.clock,
        upload,
        owner,
        " ".join(parts),
        concat,
        metadata,
        DAY_MS,
        IMAGE_BYTES,
        CHUNKS,
        keys.upload_prefix(partition),
        keys.chunks_prefix(partition),
        idempotency.digest if idempotency else "-",
        DAY_MS,
    )
    if not repeated:
        metrics.OPENED.add()
        metrics.CONCATENATED.add(len(parts))
    return upload, bool(repeated)


async def _check_first_bytes(db: Redis, objects: ObjectStore, owner: str, parts: list[str]) -> None:
    """Raises Format where complete parts do not begin as an image does, and Incomplete where that cannot be told yet.

    It is true for ever: the bytes of an upload do not change. A part that cannot be used is left to the script, which
    also knows the answer to a repeated request.
    """
    head = b""
    for part in parts:
        row = await inspect(db, part)
        if row.owner != owner or row.expired or row.post:
            return
        for name in row.chunks[: LONGEST_MAGIC - len(head)]:  # a chunk has a byte at least
            try:
                head += await objects.get(keys.chunk(part, name))
            except NotFound:  # another request has deleted the part
                raise NoUpload(f"no such upload: {part}") from None
        if row.offset != row.length:
            raise Incomplete(f"the upload {part} is at {row.offset} of {row.length}")
        if len(head) >= LONGEST_MAGIC:
            break
    if not sniff(head[:LONGEST_MAGIC]):
        raise Format("only PNG, JPEG and BMP images are accepted")


async def inspect(db: Redis, upload: str, names: bool = True) -> Upload:
    """An upload of any owner and in any state. With `names` it includes the names of its chunks, up to 10,000.

    Raises NoUpload where `upload` is not the id of an upload. An id that is not in use gives a row whose owner is None.
    """
    partition = keys.partition_of_upload(upload)
    owner, offset, length, metadata, expires, post, concat, final, expired, chunks = await db.call(
        "read_upload",
        [keys.upload(upload), keys.chunks(upload)],
        db.clock,
        int(names),
        keys.chunks_prefix(partition),
    )
    return Upload(
        owner,
        int(offset or 0),
        int(length) if length else None,
        metadata or "",
        int(expires or 0),
        post,
        concat or "",
        final,
        bool(expired),
        chunks,
    )


async def read(db: Redis, owner: str, upload: str) -> Upload:
    """An open upload of a user, without the names of its chunks.

    Raises NoUpload where the upload does not exist, belongs to somebody else or became a post. Raises Expired.
    """
    row = await inspect(db, upload, names=False)
    if row.owner != owner or row.post:
        raise NoUpload("no such upload")
    if row.expired:
        raise Expired("this upload has expired")
    return row


class OpenUpload(NamedTuple):
    """An open upload that its owner can continue. Sizes are in bytes."""

    id: str
    offset: int
    length: int
    metadata: str  # Upload-Metadata as the client sent it (tus, "Creation")
    expires: int  # ms since 1970
    concat: str  # as in Upload


async def list_open(db: Redis, owner: str, partitions: int) -> list[OpenUpload]:
    """A user's open uploads, newest first, without those of forms: nobody can continue a form."""
    partition = keys.partition_of_user(owner, partitions)
    rows = await db.call("list_uploads", [keys.uploads(partition, owner)], db.clock, keys.upload_prefix(partition))
    opened = [
        OpenUpload(upload, int(offset), int(length), metadata, int(expires), concat or "")
        for upload, offset, length, metadata, expires, concat in rows
    ]
    return sorted(opened, reverse=True)


async def read_used_part(db: Redis, owner: str, upload: str) -> Upload:
    """A part that was used, as a complete upload that expires with its final one.

    A client that did not get the answer to its final request asks for its parts before it repeats that request. If they
    were unknown, it would send all bytes again.

    Raises NoUpload where `upload` is no part of an open final upload of the owner, and Expired.
    """
    part = await inspect(db, upload, names=False)
    if not part.final or part.length is None:
        raise NoUpload("no such upload")
    final = await read(db, owner, part.final)
    return part._replace(owner=owner, offset=part.length, expires=final.expires, concat="partial")


async def read_when_still(db: Redis, owner: str, upload: str) -> Upload:
    """Like `read`, but if the offset has moved a moment ago, wait until it stops. At most half a second.

    A client whose connection broke is back within milliseconds. The last bytes that the server received are then still
    being stored, in this process or in another one. With an earlier offset the client would send those bytes again, and
    they would be refused.
    """
    row = await read(db, owner, upload)
    for _ in range(STILL_POLLS):
        moved_ms = row.expires - (DAY_MS if row.offset else HOUR_MS)
        if moved_ms < now_ms(db) - RECENT_MS:
            break
        await asyncio.sleep(STILL_SECONDS)
        before = row.offset
        row = await read(db, owner, upload)
        if row.offset == before:
            break
    return row


class Growth:
    """How far chunks may grow. All uploads of a process share its memory, and have the same store."""

    def __init__(self) -> None:
        self.free = GROWN_BYTES
        self.largest = CHUNK  # bytes of a chunk that the store is expected to take quickly

    def take(self, more: int) -> bool:
        """Take the memory to double a chunk of `more` bytes. Returns whether the chunk may grow."""
        allowed = more <= self.free and 2 * more <= self.largest
        if allowed:
            self.free -= more
        return allowed

    def learn(self, chunk_bytes: int, seconds: float) -> None:
        """The store has taken a chunk in this time. Infinite: it has failed."""
        if seconds > PUT_SECONDS:
            self.largest = CHUNK
        else:
            self.largest = max(self.largest, min(2 * chunk_bytes, LARGE_CHUNK))


growth = Growth()


class Appender:
    """Appends received bytes to an upload, starting at its offset. It receives the next chunk while it stores others.

        image = Appender(db, objects, upload, offset, length, partial)
        await image.resume()              # if the upload was begun by another request
        await image.write(data)           # for each piece that arrives
        await image.commit()              # or `finish`, for a form, at the end; on an error `abandon`

    | error | when |
    |---|---|
    | Format | the first bytes are not those of a PNG, JPEG or BMP. Those of a `partial` upload may be any |
    | TooLarge | more bytes than the upload's length arrived |
    | Offset | another request has moved the offset in the meantime |
    | Chunks | the upload came in more than CHUNKS pieces |
    | Expired, NoUpload | the upload has expired, was deleted or became a post |
    | Full, Unavailable | the object store has no space, or is unavailable |
    | Unreachable, Unknown | Redis is unavailable, or its reply was lost |

    Chunks that were committed before an error stay in the upload.
    """

    def __init__(
        self,
        db: Redis,
        objects: ObjectStore,
        upload: str,
        offset: int = 0,
        length: int | None = None,
        partial: bool = False,
    ) -> None:
        self.upload = upload
        self.offset = offset  # bytes that are durable
        self.expires = 0  # ms since 1970; 0 until a chunk was committed
        self._received = offset  # bytes, with those that came before this Appender
        self._db = db
        self._objects = objects
        self._max_bytes = IMAGE_BYTES if length is None else length
        self._expiry_ms = HOUR_MS if length is None else DAY_MS  # nobody can continue a form that has stopped
        self._buffer: list[bytes] = []  # received, and not yet in a chunk
        self._buffered = 0  # bytes in the buffer
        self._began = 0.0  # loop time when the first byte in the buffer arrived
        self._grown = 0  # bytes that the chunk in the buffer has of `growth`
        # A chunk begins when the buffer has this many bytes. The first chunk is small: if another request has moved the
        # offset, the client notices after few bytes.
        self._chunk_bytes = SMALL_CHUNK
        self._next_offset = offset  # where the next chunk begins
        self._commits: deque[asyncio.Task] = deque()  # each one waits for the one before it
        self._timer: asyncio.TimerHandle | None = None
        self._sniffed_bytes = 0 if partial else LONGEST_MAGIC
        self._first_bytes = b""  # of the image, until they are enough for `sniff`

    async def resume(self) -> None:
        """Prepare to append to an upload that another request began.

        If so few bytes arrived before that the image's format is not known yet, it reads them from the store.

        Raises Full, NoUpload where the upload was deleted, Unavailable, Unreachable.
        """
        if self._received < self._max_bytes:
            self._objects.check_free_space()
        if self.offset:
            metrics.RESUMED.add()
        if 0 < self.offset < self._sniffed_bytes:
            # A chunk has a byte at least, so these bytes are in the first `offset` chunks. Another request may have
            # appended more in the meantime.
            names = (await inspect(self._db, self.upload)).chunks[: self.offset]
            try:
                pieces = [await self._objects.get(keys.chunk(self.upload, name)) for name in names]
            except NotFound:  # another request has deleted the upload
                raise NoUpload("no such upload") from None
            self._first_bytes = b"".join(pieces)[: self.offset]

    async def write(self, data: bytes) -> None:
        """Append bytes. It waits only if the client sends faster than the store writes."""
        if self._commits and self._commits[-1].done():
            self._commits[-1].result()  # raises the error of a chunk. Bytes after that chunk cannot be appended
        if self._received < self._sniffed_bytes:
            self._first_bytes += data
            self._check_format(whole=False)
        self._received += len(data)
        if self._received > self._max_bytes:
            raise TooLarge(f"this image may have up to {self._max_bytes} bytes")
        if not self._buffer:
            loop = asyncio.get_running_loop()
            self._began = loop.time()
            if self._chunk_bytes > SMALL_CHUNK:
                self._timer = loop.call_later(SLOW_SECONDS, self._put_slow_chunk)
        self._buffer.append(data)
        self._buffered += len(data)
        if self._buffered >= self._chunk_bytes and not self._grow():
            while len(self._commits) >= PARALLEL_PUTS:
                await asyncio.shield(self._commits[0])
                self._commits.popleft()
            if self._buffered:  # `_put_slow_chunk` may have emptied the buffer during the wait
                self._start_commit()

    def _grow(self) -> bool:
        """Let a full chunk grow if the connection has filled it quickly. Returns whether it has space again."""
        while self._buffered >= self._chunk_bytes >= CHUNK:
            quick = asyncio.get_running_loop().time() - self._began <= QUICK_SECONDS
            if not (quick and growth.take(self._chunk_bytes)):
                return False
            self._grown += self._chunk_bytes
            self._chunk_bytes *= 2
        return self._buffered < self._chunk_bytes

    def _put_slow_chunk(self) -> None:
        """The timer's callback: the buffer's first byte is SLOW_SECONDS old. Stores the buffer as a small chunk.

        The timer is needed because a silent connection calls nothing.
        """
        if sum(not commit.done() for commit in self._commits) >= PARALLEL_PUTS:
            # The store is slower than the connection. One longer chunk costs it less than two, and no more memory.
            self._timer = asyncio.get_running_loop().call_later(SLOW_SECONDS, self._put_slow_chunk)
            return
        self._chunk_bytes = SMALL_CHUNK
        if self._buffered >= SMALL_CHUNK:
            self._start_commit()

    def _check_format(self, whole: bool) -> None:
        """Raises Format. `whole` says that no more bytes follow."""
        kind = sniff(self._first_bytes[:LONGEST_MAGIC])
        if kind is None or (whole and not kind):
            raise Format("only PNG, JPEG and BMP images are accepted")

    async def commit(self) -> None:
        """Store all bytes received so far, and move the offset past them."""
        if self._buffered:
            self._start_commit()
        if self._commits:
            await asyncio.shield(self._commits[-1])

    async def finish(self) -> None:
        """Like `commit`, at the end of the image. Raises also Empty, and Format where the image is too short."""
        if not self._received:
            raise Empty("the image is empty")
        if self._received < LONGEST_MAGIC:
            self._check_format(whole=True)
        await self.commit()

    async def abandon(self) -> None:
        """Discard the buffer, and wait for the chunks that are being stored.

        Their tasks are not cancelled: a chunk that is stored, but not yet added to the upload, would belong to nothing.
        """
        self._buffer = []
        self._buffered = 0
        growth.free += self._grown
        self._grown = 0
        if self._timer:
            self._timer.cancel()
        if self._commits:
            await asyncio.wait(self._commits)

    def _start_commit(self) -> None:
        """Begin to commit the buffer as the next chunk."""
        if self._timer:
            self._timer.cancel()
        before = self._commits[-1] if self._commits else None
        commit = asyncio.create_task(self._commit_chunk(before, self._next_offset, self._buffered, self._buffer))
        commit.add_done_callback(partial(_end_commit, self._grown))
        self._commits.append(commit)
        self._next_offset += self._buffered
        self._buffer = []
        self._buffered = self._grown = 0
        self._chunk_bytes = CHUNK

    async def _commit_chunk(self, before: asyncio.Task | None, offset: int, size: int, data: list[bytes]) -> None:
        """Store a chunk of `size` bytes, then move the offset past it.

        The bytes of several chunks are stored at the same time. The offset moves in the order of the chunks.
        """
        name = keys.chunk_name(offset)
        chunk = keys.chunk(self.upload, name)
        self._objects.check_free_space()
        began = time.monotonic()
        try:
            await self._objects.put(chunk, data)
        except Unavailable:
            growth.learn(size, math.inf)
            raise
        growth.learn(size, time.monotonic() - began)
        offset_offered = False
        try:
            if before:
                await before
            offset_offered = True
            self.offset, self.expires = await self._db.call(
                "append_chunk",
                [keys.upload(self.upload), keys.chunks(self.upload), keys.due(keys.partition_of_upload(self.upload))],
                self._db.clock,
                self.upload,
                offset,
                size,
                name,
                self._expiry_ms,
                IMAGE_BYTES,
                CHUNKS,
            )
            metrics.UPLOAD_BYTES.add(size)
        except Exception as error:
            if not (offset_offered and isinstance(error, Unknown)):  # Unknown: the upload may have the chunk now
                await self._objects.delete([chunk])
            raise


def _end_commit(grown: int, commit: asyncio.Task) -> None:
    """The callback of a commit that is done. Gives back the memory by which its chunk had grown."""
    growth.free += grown
    # `write` and `commit` raise the task's error. `abandon` does not: reading the error here keeps asyncio from logging
    # it as never retrieved.
    if not commit.cancelled():
        commit.exception()


async def discard(db: Redis, objects: ObjectStore, owner: str, upload: str, remember_ms: int | str = "") -> None:
    """End an upload that did not become a post, and erase its chunks.

    For `remember_ms` ms the upload is refused as expired; with an empty string it is unknown at once. The outbox erases
    the chunks of an upload that is older than the last restore, because a backup may name them.

    Raises NoUpload, Unavailable.
    """
    chunks = await drop(db, owner, upload, remember_ms)
    if stored_ms(upload, chunks) > await last_restore_ms(db, keys.partition_of_upload(upload)):
        await erase_chunks(db, objects, upload, chunks)


def stored_ms(upload: str, chunks: list[str]) -> int:
    """When the upload that the oldest of these chunks was sent to was created, in ms since 1970.

    This is the upload itself, or the oldest of its parts. `chunks` are the names in the list of the upload.
    """
    return keys.created_ms(min([upload, *(name.partition("/")[0] for name in chunks if "/" in name)]))


async def last_restore_ms(db: Redis, partition: int) -> int:
    """When a partition's data was last restored from a backup, in ms since 1970. 0: never."""
    return await db.call("read_restored", [keys.restored(partition)])


async def drop(db: Redis, owner: str, upload: str, remember_ms: int | str = "") -> list[str]:
    """End an upload that did not become a post. Returns the names of its chunks.

    For `remember_ms` ms the upload is refused as expired; with an empty string it is unknown at once. The caller may
    erase the chunks within GRACE_MS; then the outbox does it.

    Raises NoUpload where the upload does not exist or became a post.
    """
    partition = keys.partition_of_upload(upload)
    script_keys = [keys.upload(upload), keys.chunks(upload), keys.uploads(partition, owner), keys.due(partition)]
    prefix = keys.chunks_prefix(partition)
    chunks = await db.call("drop_upload", script_keys, db.clock, upload, GRACE_MS, remember_ms, prefix)
    (metrics.EXPIRED if remember_ms else metrics.DROPPED).add()
    return chunks


async def erase_chunks(db: Redis, objects: ObjectStore, upload: str, chunks: list[str]) -> None:
    """Erase an upload's chunks from the store, then from Redis. For an upload that has ended and that nobody needs.

    An upload that became a post is known for another day, so that its post can be requested again. Raises Unavailable.
    """
    await objects.delete([keys.chunk(upload, name) for name in chunks])
    partition = keys.partition_of_upload(upload)
    script_keys = [keys.upload(upload), keys.chunks(upload), keys.due(partition)]
    prefixes = keys.upload_prefix(partition), keys.chunks_prefix(partition)
    await db.call("forget_chunks", script_keys, upload, DAY_MS, *prefixes)


@asynccontextmanager
async def form_upload(
    db: Redis,
    objects: ObjectStore,
    owner: str,
    partitions: int,
    form_bytes: int = IMAGE_BYTES,
    processing: int = PROCESSING,
) -> AsyncIterator[Appender]:
    """An Appender for the upload of a form. If the `async with` block raises, the upload is discarded.

        async with form_upload(db, objects, user, partitions) as image:
            await image.write(data)
            await image.finish()

    `form_bytes` is what the form may contain; see `create`. Raises Full, Quota and Busy before anything is received.
    """
    objects.check_free_space()
    upload, _ = await run_to_completion(create(db, owner, partitions, form_bytes=form_bytes, processing=processing))
    image = Appender(db, objects, upload)
    try:
        yield image
    except BaseException as error:
        # BaseException, because a client that disconnects causes a cancellation. The first error is the one to report.
        # An error of discarding is not: the upload became a post, or the store is unavailable and the outbox erases the
        # chunks later.
        with suppress(Refusal, Unavailable):
            await run_to_completion(_discard_form(db, objects, owner, image, error))
        raise


async def _discard_form(db: Redis, objects: ObjectStore, owner: str, image: Appender, error: BaseException) -> None:
    await image.abandon()
    if not isinstance(error, (Unreachable, Unknown)):  # Redis is unavailable: do not wait for it again
        await discard(db, objects, owner, image.upload)


async def run_to_completion(work: Coroutine[Any, Any, Result]) -> Result:
    """Run `work` to completion even if the caller is cancelled. Returns its result, or raises its error.

    It is for work that would leave something half done, such as an upload that was opened in Redis and whose id nobody
    knows. A cancellation that arrives during the work is raised at the caller's next await.
    """
    task = asyncio.ensure_future(work)
    cancelled = False
    try:
        while True:
            try:
                return await asyncio.shield(task)
            except asyncio.CancelledError:
                if task.cancelled():
                    raise
                cancelled = True
    finally:
        if cancelled:
            asyncio.current_task().cancel()
