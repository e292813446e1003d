"""Uploads: bytes that arrive as a stream, kept as immutable chunks behind an offset that moves by compare-and-set.

A chunk is made durable first, then the script moves the offset over it. Several processes may append to one upload:
of two chunks at one offset the script takes one, the other is erased. There are no locks.

    received ──► buffer ──put──► chunks/<upload>/<offset>-<random> ──append_chunk──► offset
"""

import asyncio
from contextlib import asynccontextmanager
from time import monotonic
from typing import NamedTuple

from storage import keys
from storage.errors import Empty, Expired, Format, NoUpload, Refusal, TooLarge
from storage.formats import LONGEST, sniff
from storage.objects import Folder, S3
from storage.scripts import Redis
from storage.settings import DAY_MS, IMAGE_BYTES, MIB, OPEN_UPLOADS, RESERVED_BYTES

CHUNK = MIB  # bytes at which a chunk is put: an fsync costs less than receiving it on any phone's network
SMALL_CHUNK = 64 * 1024  # bytes at which it is put once SLOW has passed: a slow line loses little when it breaks
SLOW = 1.0  # seconds
GRACE_MS = 60_000  # ms in which whoever drops an upload erases its chunks, before the outbox does it


class Upload(NamedTuple):
    """A row as the script returns it, sizes in bytes."""

    owner: str | None  # None: dropped, or never there
    offset: int
    length: int | None  # None: a form, whose end is told by the form
    metadata: str
    expires: int  # ms since 1970; 0: it has expired and was dropped
    post: str | None  # once it became one
    expired: bool
    chunks: list[str]


async def create(
    db: Redis,
    owner: str,
    partitions: int,
    length: int | None = None,
    metadata: str = "",
    once: str | None = None,
    request: str = "-",
) -> tuple[str, bool]:
    """Open an upload of `length` bytes. Returns its id, and whether the idempotency key `once` was used before.

    Raises Reused, TooLarge, Quota.
    """
    partition = keys.partition_of_user(owner, partitions)
    upload = keys.new_upload_id(partition)
    named = [keys.upload(upload), keys.uploads(partition, owner), keys.due(partition)] + ([once] if once else [])
    made, repeated = await db.call(
        "create_upload",
        named,
        db.clock,
        upload,
        owner,
        "" if length is None else length,
        metadata,
        DAY_MS,
        IMAGE_BYTES,
        OPEN_UPLOADS,
        RESERVED_BYTES,
        request,
        DAY_MS,
    )
    return made, bool(repeated)


async def look(db: Redis, upload: str) -> Upload:
    """An upload as it is, whoever owns it. Raises NoUpload where the id is none."""
    owner, offset, length, metadata, expires, post, expired, chunks = await db.call(
        "read_upload", [keys.upload(upload), keys.chunks(upload)], db.clock
    )
    length = int(length) if length else None
    return Upload(owner, int(offset or 0), length, metadata or "", int(expires or 0), post, bool(expired), chunks)


async def read(db: Redis, owner: str, upload: str) -> Upload:
    """A user's open upload. Raises NoUpload, Expired."""
    found = await look(db, upload)
    if found.owner != owner or found.post:
        raise NoUpload("no such upload")
    if found.expired:
        raise Expired("this upload has expired")
    return found


class Appender:
    """Appends received bytes to an upload, from its offset on.

    Raises Format at the first bytes that are no image of ours, TooLarge past the upload's length, Offset where
    another request has moved the offset meanwhile, Expired, NoUpload. What was committed before stays.
    """

    def __init__(self, db: Redis, objects: Folder | S3, upload: str, offset: int = 0, length: int | None = None):
        self.upload = upload
        self.offset = offset  # bytes that are durable
        self._db = db
        self._objects = objects
        self._most = IMAGE_BYTES if length is None else length
        self._buffer = bytearray()
        self._since = monotonic()  # when the buffer was last empty
        self._head = b""  # the first bytes, as long as they do not tell the format

    async def resume(self, chunks: list[str]) -> None:
        """Go on where an upload stands: its first bytes may not have told the format yet."""
        if 0 < self.offset < LONGEST:
            for name in chunks:
                self._head += await self._objects.get(keys.chunk(self.upload, name))

    async def write(self, data: bytes) -> None:
        if self.offset + len(self._buffer) + len(data) > self._most:
            raise TooLarge(f"this image may have up to {self._most} bytes")
        if self.offset + len(self._buffer) < LONGEST:
            self._head += data
            self._check(whole=False)
        if not self._buffer:
            self._since = monotonic()
        self._buffer += data
        if len(self._buffer) >= CHUNK or (
            len(self._buffer) >= SMALL_CHUNK and monotonic() - self._since >= SLOW
        ):
            await self.commit()

    def _check(self, whole: bool) -> None:
        told = sniff(self._head[:LONGEST])
        if told is None or (whole and not told):
            raise Format("only PNG, JPEG and BMP images are taken")

    async def commit(self) -> None:
        """Make what is buffered durable, then move the offset over it."""
        if not self._buffer:
            return
        data, self._buffer = bytes(self._buffer), bytearray()
        name = keys.chunk_name(self.offset)
        chunk = keys.chunk(self.upload, name)
        await self._objects.put(chunk, data)
        try:
            self.offset = await self._db.call(
                "append_chunk",
                [keys.upload(self.upload), keys.chunks(self.upload), keys.due(keys.partition_of_upload(self.upload))],
                self._db.clock,
                self.upload,
                self.offset,
                len(data),
                name,
                DAY_MS,
                IMAGE_BYTES,
            )
        except Refusal as refusal:
            if refusal.word != "UNKNOWN":
                await self._objects.delete([chunk])
            raise

    async def finish(self) -> None:
        """The whole image is here. Raises Empty, or Format where it was too short to tell."""
        if self.offset + len(self._buffer) == 0:
            raise Empty("the image is empty")
        if self.offset + len(self._buffer) < LONGEST:
            self._check(whole=True)
        await self.commit()


async def discard(db: Redis, objects: Folder | S3, owner: str, upload: str, tell: int | str = "") -> None:
    """End an upload that became no post, and erase its chunks. For `tell` ms it is still known as expired.

    Raises NoUpload.
    """
    partition = keys.partition_of_upload(upload)
    named = [keys.upload(upload), keys.chunks(upload), keys.uploads(partition, owner), keys.due(partition)]
    chunks = await db.call("drop_upload", named, db.clock, upload, GRACE_MS, tell)
    await erase_chunks(db, objects, upload, chunks)


async def erase_chunks(db: Redis, objects: Folder | S3, upload: str, chunks: list[str]) -> None:
    """Erase chunks that nothing can be appended to and nobody needs, then forget them."""
    await objects.delete([keys.chunk(upload, name) for name in chunks])
    named = [keys.upload(upload), keys.chunks(upload), keys.due(keys.partition_of_upload(upload))]
    await db.call("forget_chunks", named, upload, DAY_MS)


@asynccontextmanager
async def receiving(db: Redis, objects: Folder | S3, owner: str, partitions: int):
    """An Appender to a new upload, which is discarded unless `async with` ends well: the way of a form."""
    upload, _ = await create(db, owner, partitions)
    try:
        yield Appender(db, objects, upload)
    except BaseException:
        # Also when the client went away, which arrives as a cancellation: the work goes on without the request.
        await asyncio.shield(asyncio.ensure_future(discard(db, objects, owner, upload)))
        raise
