"""Uploads: bytes that arrive as a stream, kept as immutable chunks behind an offset that moves by compare-and-set.

A chunk is made durable first, then the script moves the offset over it. Several processes may append to one upload:
of two chunks at one offset the script takes one, the other is erased. There are no locks.

    received ──► buffer ──put──► chunks/<upload>/<offset>-<random> ──append_chunk──► offset
"""

import asyncio
from collections import deque
from collections.abc import Coroutine
from contextlib import asynccontextmanager, suppress
from typing import NamedTuple

from storage import keys
from storage.db.client import Redis, now_ms
from storage.errors import (
    Empty,
    Expired,
    Format,
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

CHUNK = MIB  # bytes at which a chunk is put: an fsync costs less than receiving it on any phone's network
SMALL_CHUNK = 64 * 1024  # bytes at which it is put once SLOW_SECONDS have passed: a slow line loses little at a break
PARALLEL_PUTS = 2  # chunks put at the same time: a disk's fsync waits longer than it works
SLOW_SECONDS = 1.0  # seconds since the chunk's first byte
RECENT_MS = 1000  # an upload that took a chunk within this time may be about to take another
STILL_SECONDS = 0.05  # seconds without one after which it stands still; the last chunk takes 20 ms
STILL_POLLS = 10  # so often at most: half a second, if the old connection lives after all
GRACE_MS = 60_000  # ms in which whoever drops an upload erases its chunks, before the outbox does it


class Upload(NamedTuple):
    """A row as the script returns it, sizes in bytes."""

    owner: str | None  # None: dropped, or never there
    offset: int
    length: int | None  # None: an open form's, which the form's end tells
    metadata: str
    expires: int  # ms since 1970; 0: it has expired and was dropped
    post: str | None  # once it became one
    expired: bool
    chunks: list[str]  # names, in order; empty where they were not asked for


async def create(
    db: Redis,
    owner: str,
    partitions: int,
    length: int | None = None,
    metadata: str = "",
    idempotency: keys.IdempotencyKey | None = None,
    form_bytes: int = IMAGE_BYTES,
    processing: int = PROCESSING,
) -> tuple[str, bool]:
    """Opens an upload of `length` bytes; without it the upload of a form, which may bring `form_bytes`.

    Returns its id, and whether its idempotency key was used before. Raises Reused, TooLarge, Quota, and, of a form,
    Busy where `processing` posts of its owner are being processed.
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
    )
    return upload, bool(repeated)


async def inspect(db: Redis, upload: str, names: bool = True) -> Upload:
    """An upload as it is, whoever owns it. `names`: with those of its chunks, up to 10,000.

    Raises NoUpload where the id is none.
    """
    owner, offset, length, metadata, expires, post, expired, chunks = await db.call(
        "read_upload", [keys.upload(upload), keys.chunks(upload)], db.clock, int(names)
    )
    length = int(length) if length else None
    return Upload(owner, int(offset or 0), length, metadata or "", int(expires or 0), post, bool(expired), chunks)


async def read(db: Redis, owner: str, upload: str) -> Upload:
    """A user's open upload, without the names of its chunks. Raises NoUpload, Expired."""
    row = await inspect(db, upload, names=False)
    if row.owner != owner or row.post:
        raise NoUpload("no such upload")
    if row.expired:
        raise Expired("this upload has expired")
    return row


class OpenUpload(NamedTuple):
    """An upload that its owner can go on with, sizes in bytes."""

    id: str
    offset: int
    length: int
    metadata: str  # as the client sent it
    expires: int  # ms since 1970


async def list_open(db: Redis, owner: str, partitions: int) -> list[OpenUpload]:
    """A user's open uploads, newest first; not those of forms."""
    partition = keys.partition_of_user(owner, partitions)
    rows = await db.call("list_uploads", [keys.uploads(partition, owner)], db.clock, keys.upload_prefix(partition))
    opened = [
        OpenUpload(upload, int(offset), int(length), metadata, int(expires))
        for upload, offset, length, metadata, expires in rows
    ]
    return sorted(opened, reverse=True)


async def read_when_still(db: Redis, owner: str, upload: str) -> Upload:
    """As `read`, but an upload that has just moved is waited for until it stands still.

    A client whose line broke is back within milliseconds, when what lay in the server's buffer is still being made
    durable, in this process or another. Told the offset before that, it would send those bytes again, in vain.
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


class Appender:
    """Appends received bytes to an upload, from its offset on. While some chunks are made durable the next is received.

    Raises Format at the first bytes that are no image of ours, TooLarge past the upload's length, Offset where
    another request has moved the offset meanwhile, Chunks, Expired, NoUpload. What was committed before stays.
    """

    def __init__(self, db: Redis, objects: ObjectStore, upload: str, offset: int = 0, length: int | None = None):
        self.upload = upload
        self.offset = offset  # bytes that are durable
        self.expires = 0  # ms since 1970, once something was committed
        self._received = offset
        self._db = db
        self._objects = objects
        self._max_bytes = IMAGE_BYTES if length is None else length
        self._expiry_ms = HOUR_MS if length is None else DAY_MS  # after a form's last chunk nobody can send the rest
        self._buffer: list[bytes] = []  # received, not yet put
        self._buffered = 0  # their bytes
        # The first chunk is small: if another request moved the offset, little was sent in vain.
        self._chunk_bytes = SMALL_CHUNK
        self._next_offset = offset  # where the next chunk begins
        self._commits: deque[asyncio.Task] = deque()  # each waits for the one before it
        self._timer: asyncio.TimerHandle | None = None
        self._first_bytes = b""  # the first bytes, as long as they do not tell the format

    async def resume(self) -> None:
        """Goes on where an upload stands: its first bytes may not have told the format yet. Raises Full, NoUpload."""
        if self._received < self._max_bytes:
            self._objects.check_free_space()
        if 0 < self.offset < LONGEST_MAGIC:
            # So few bytes are as few chunks. If another request has appended more meanwhile, only ours count here.
            names = (await inspect(self._db, self.upload)).chunks[: self.offset]
            try:
                pieces = [await self._objects.get(keys.chunk(self.upload, name)) for name in names]
            except NotFound:  # another request has deleted the upload
                raise NoUpload("no such upload") from None
            self._first_bytes = b"".join(pieces)[: self.offset]

    async def write(self, data: bytes) -> None:
        """Takes bytes. Waits only where the line is faster than the store."""
        if self._commits and self._commits[-1].done():
            self._commits[-1].result()  # what follows a chunk that was refused is received in vain
        if self._received < LONGEST_MAGIC:
            self._first_bytes += data
            self._check_format(whole=False)
        self._received += len(data)
        if self._received > self._max_bytes:
            raise TooLarge(f"this image may have up to {self._max_bytes} bytes")
        if not self._buffer and self._chunk_bytes > SMALL_CHUNK:
            self._timer = asyncio.get_running_loop().call_later(SLOW_SECONDS, self._put_slow_chunk)
        self._buffer.append(data)
        self._buffered += len(data)
        if self._buffered >= self._chunk_bytes:
            while len(self._commits) >= PARALLEL_PUTS:
                await asyncio.shield(self._commits[0])
                self._commits.popleft()
            if self._buffered:  # else `_put_slow_chunk` has put the buffer during the wait
                self._start_commit()

    def _put_slow_chunk(self) -> None:
        """The buffer's first byte is SLOW_SECONDS old: puts the buffer, also if the line is silent now."""
        if sum(not commit.done() for commit in self._commits) >= PARALLEL_PUTS:
            # The store is slower than the line. One longer chunk costs it less than two, and takes no more memory.
            self._timer = asyncio.get_running_loop().call_later(SLOW_SECONDS, self._put_slow_chunk)
            return
        self._chunk_bytes = SMALL_CHUNK
        if self._buffered >= SMALL_CHUNK:
            self._start_commit()

    def _check_format(self, whole: bool) -> None:
        kind = sniff(self._first_bytes[:LONGEST_MAGIC])
        if kind is None or (whole and not kind):
            raise Format("only PNG, JPEG and BMP images are taken")

    async def commit(self) -> None:
        """Make all that was taken durable, and move the offset over it."""
        if self._buffered:
            self._start_commit()
        if self._commits:
            await asyncio.shield(self._commits[-1])

    async def finish(self) -> None:
        """The whole image is here. Raises Empty, or Format where it was too short to tell."""
        if not self._received:
            raise Empty("the image is empty")
        if self._received < LONGEST_MAGIC:
            self._check_format(whole=True)
        await self.commit()

    async def abandon(self) -> None:
        """Put nothing more. Chunks that are being put are waited for: cut off, they would be nobody's."""
        self._buffer = []
        self._buffered = 0
        if self._timer:
            self._timer.cancel()
        if self._commits:
            await asyncio.wait(self._commits)

    def _start_commit(self) -> None:
        """Begin to commit what is buffered, behind the chunk before it."""
        if self._timer:
            self._timer.cancel()
        before = self._commits[-1] if self._commits else None
        data = b"".join(self._buffer)
        self._buffer = []
        self._buffered = 0
        self._chunk_bytes = CHUNK
        self._commits.append(asyncio.create_task(self._commit_chunk(before, self._next_offset, data)))
        self._next_offset += len(data)
        # Its error is raised where it is waited for; whoever gives up an upload does not want it.
        self._commits[-1].add_done_callback(lambda commit: commit.cancelled() or commit.exception())

    async def _commit_chunk(self, before: asyncio.Task | None, offset: int, data: bytes) -> None:
        """First the bytes, then the offset: the bytes beside those of other chunks, the offset behind theirs."""
        name = keys.chunk_name(offset)
        chunk = keys.chunk(self.upload, name)
        self._objects.check_free_space()
        await self._objects.put(chunk, data)
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
                len(data),
                name,
                self._expiry_ms,
                IMAGE_BYTES,
                CHUNKS,
            )
        except Exception as error:
            if not (offset_offered and isinstance(error, Unknown)):  # then it may be the upload's now
                await self._objects.delete([chunk])
            raise


async def discard(db: Redis, objects: ObjectStore, owner: str, upload: str, remember_ms: int | str = "") -> None:
    """End an upload that became no post, and erase its chunks. For `remember_ms` ms it is still known as expired.

    The chunks of an upload from before a restore are left to the outbox, because a backup may name them.

    Raises NoUpload.
    """
    chunks = await drop(db, owner, upload, remember_ms)
    if keys.created_ms(upload) > await last_restore_ms(db, keys.partition_of_upload(upload)):
        await erase_chunks(db, objects, upload, chunks)


async def last_restore_ms(db: Redis, partition: int) -> int:
    """When a partition's data were last restored, ms since 1970; 0: never."""
    return await db.call("read_restored", [keys.restored(partition)])


async def drop(db: Redis, owner: str, upload: str, remember_ms: int | str = "") -> list[str]:
    """End an upload that became no post. Returns the names of its chunks, which the outbox erases in a minute.

    Raises NoUpload.
    """
    partition = keys.partition_of_upload(upload)
    script_keys = [keys.upload(upload), keys.chunks(upload), keys.uploads(partition, owner), keys.due(partition)]
    return await db.call("drop_upload", script_keys, db.clock, upload, GRACE_MS, remember_ms)


async def erase_chunks(db: Redis, objects: ObjectStore, upload: str, chunks: list[str]) -> None:
    """Erase chunks that nothing can be appended to and nobody needs, then forget them."""
    await objects.delete([keys.chunk(upload, name) for name in chunks])
    script_keys = [keys.upload(upload), keys.chunks(upload), keys.due(keys.partition_of_upload(upload))]
    await db.call("forget_chunks", script_keys, upload, DAY_MS)


@asynccontextmanager
async def form_upload(
    db: Redis,
    objects: ObjectStore,
    owner: str,
    partitions: int,
    form_bytes: int = IMAGE_BYTES,
    processing: int = PROCESSING,
):
    """An Appender to the new upload of a form, which is discarded unless `async with` ends well.

    Raises Full, Quota, Busy before anything is received.
    """
    objects.check_free_space()
    upload, _ = await run_to_completion(create(db, owner, partitions, form_bytes=form_bytes, processing=processing))
    image = Appender(db, objects, upload)
    try:
        yield image
    except BaseException as error:
        # Also when the client went away, which arrives as a cancellation. What it is refused for counts, not what
        # stands in the way of discarding: it has become a post, or the store is away and the outbox does it.
        with suppress(Refusal, Unavailable):
            await run_to_completion(_discard_form(db, objects, owner, image, error))
        raise


async def _discard_form(db: Redis, objects: ObjectStore, owner: str, image: Appender, error: BaseException) -> None:
    await image.abandon()
    if not isinstance(error, (Unreachable, Unknown)):  # Redis is away: nobody is kept waiting for it a second time
        await discard(db, objects, owner, image.upload)


async def run_to_completion(work: Coroutine):
    """Do to its end what must not be cut in its midst. A cancellation that comes meanwhile is met at the next wait."""
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
