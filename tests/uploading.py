"""What the tests of resumable uploads share: a standing site, images of any size, and what became of their bytes."""

import secrets

import httpx
from conftest import connect
from wiretrace import play

from storage import keys, uploads
from storage.objects import open_store

BODY = "Content-Type: application/offset+octet-stream"


def picture(size: int) -> bytes:
    """Bytes that begin like a PNG; only a worker would look further."""
    return (b"\x89PNG\r\n\x1a\n" + secrets.token_bytes(size))[:size]


def begin(site, length: int, user: str = "alice", *more: str, **bodies: bytes) -> str:
    """Open an upload; its id."""
    lines = "\n".join(f"> {line}" for line in more)
    return play(
        site,
        f"""
        > POST /v1/uploads
        > Upload-Length: {length}
        {lines}
        < 201
        < Location: /v1/uploads/<upload>
        """,
        user,
        **bodies,
    )["upload"]


def offset(site, upload: str, user: str = "alice") -> int:
    with httpx.Client(base_url=site.url, timeout=30) as client:
        headers = {"Authorization": f"Bearer {site.token(user)}", "Tus-Resumable": "1.0.0"}
        answer = client.head(f"/v1/uploads/{upload}", headers=headers)
    assert answer.status_code == 200, answer
    return int(answer.headers["upload-offset"])


async def joined(site, server, upload: str) -> bytes:
    """The bytes of an upload as the worker would join them, checked against its offset."""
    db, objects = connect(server), open_store((site.folder / "store").as_uri())
    try:
        found = await uploads.inspect(db, upload)
    finally:
        await db.close()
    data = b"".join([await objects.get(keys.chunk(upload, name)) for name in found.chunks])
    assert found.post or len(data) == found.offset
    return data


def stored(site, upload: str) -> int:
    """How many chunk objects of an upload there are."""
    folder = site.folder / "store" / "chunks" / upload
    return sum(1 for path in folder.iterdir()) if folder.exists() else 0
