"""Originals: images as they were uploaded, byte for byte. They are joined from an upload's chunks and never served."""

from collections.abc import AsyncIterator
from typing import BinaryIO

from storage import keys, uploads
from storage.db.client import Redis
from storage.objects import NotFound, ObjectStore


async def store(db: Redis, objects: ObjectStore, post: str, upload: str | None, copy: BinaryIO) -> None:
    """Store a post's original unless it is already stored, and write its bytes to `copy`.

    `upload` is the upload that the post was created from. It is None for a post that was ready once: such a post must
    have its original.

    Raises objects.NotFound where the original and some chunks are missing; then nothing was stored. The post was
    deleted, or another attempt joined the chunks after this call had looked for the original. Raises Unavailable and
    Full of the store, and Unreachable.
    """
    original = keys.original(post)
    try:
        async for piece in objects.read(original):
            copy.write(piece)
        return
    except NotFound:
        if not upload:
            raise

    async def joined() -> AsyncIterator[bytes]:
        """The bytes of the chunks. Raises at the end if bytes are missing; then `put` stores nothing."""
        row = await uploads.inspect(db, upload)
        size = 0
        for name in row.chunks:
            async for piece in objects.read(keys.chunk(upload, name)):
                copy.write(piece)
                yield piece
                size += len(piece)
        # An upload that became a post under an older version of this software has no `length`.
        if not size or size != (row.length or size):
            raise NotFound(f"the chunks of {upload} have {size} bytes, the upload had {row.length}")

    await objects.put(original, joined())
