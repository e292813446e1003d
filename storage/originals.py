"""Originals: joined of an upload's chunks, kept byte for byte as they came, never served."""

from typing import BinaryIO

from storage import keys, uploads
from storage.db.client import Redis
from storage.objects import NotFound, ObjectStore


async def store(db: Redis, objects: ObjectStore, post: str, upload: str | None, copy: BinaryIO) -> None:
    """Stores a post's original, unless it is stored already, and writes its bytes to `copy`.

    Raises objects.NotFound where neither the original nor all chunks are there: another attempt has joined them since
    we looked for the original, or the post was deleted. Then nothing was stored.
    """
    original = keys.original(post)
    try:
        async for piece in objects.read(original):
            copy.write(piece)
        return
    except NotFound:
        if not upload:
            raise

    async def joined():
        """The chunks' bytes. Raises before its end where bytes are missing, so the put leaves the store as it was."""
        row = await uploads.inspect(db, upload)
        size = 0
        for name in row.chunks:
            piece = await objects.get(keys.chunk(upload, name))
            copy.write(piece)
            yield piece
            size += len(piece)
        # Uploads that ended under an older version have no length here.
        if not size or size != (row.length or size):
            raise NotFound(f"the chunks of {upload} have {size} bytes, the upload had {row.length}")

    await objects.put(original, joined())
