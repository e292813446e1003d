"""Originals: joined of an upload's chunks, kept byte for byte as they came, never served."""

from typing import BinaryIO

from storage import keys, uploads
from storage.objects import S3, Folder, NotFound
from storage.scripts import Redis


async def keep(db: Redis, objects: Folder | S3, post: str, upload: str | None, copy: BinaryIO) -> None:
    """Store a post's original, unless it is stored already, and write its bytes to `copy`.

    Raises objects.NotFound where neither original nor chunks are there: another run has just joined them, or the
    post was deleted.
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
        for name in (await uploads.look(db, upload)).chunks:
            piece = await objects.get(keys.chunk(upload, name))
            copy.write(piece)
            yield piece

    await objects.put(original, joined())
