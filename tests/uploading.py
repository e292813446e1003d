"""What the tests of resumable uploads share: they create uploads, and read what is stored of them."""

import secrets

import httpx
from conftest import connect
from wire import head
from wiretrace import play

from storage import keys, uploads

BODY = "Content-Type: application/offset+octet-stream"
TUS = "Tus-Resumable: 1.0.0"


def picture(size: int) -> bytes:
    """`size` bytes that begin as a PNG does. The API reads no further than that; only a worker would."""
    return (b"\x89PNG\r\n\x1a\n" + secrets.token_bytes(size))[:size]


def begin(site, length: int, user: str = "alice", *more: str, **bodies: bytes) -> str:
    """Creates an upload, and returns its id. `more` are further lines of the request, as in a wire trace."""
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


def begin_finished(site, user: str = "alice") -> str:
    """Creates an upload of 100 bytes that has all of them, and returns its id."""
    return begin(site, 100, user, BODY, "[picture]", picture=picture(100))


def patch_head(site, upload: str, offset: int, *headers: str) -> bytes:
    """The head of a PATCH of alice's, for `offset`."""
    return head(
        "PATCH", f"/v1/uploads/{upload}", site.authorization(), TUS, BODY, f"Upload-Offset: {offset}", *headers
    )


def offset(site, upload: str, user: str = "alice") -> int:
    """The offset that HEAD reports."""
    with httpx.Client(base_url=site.url, timeout=30) as client:
        headers = {"Authorization": f"Bearer {site.token(user)}", "Tus-Resumable": "1.0.0"}
        answer = client.head(f"/v1/uploads/{upload}", headers=headers)
    assert answer.status_code == 200, answer
    return int(answer.headers["upload-offset"])


async def joined(site, server, upload: str) -> bytes:
    """The bytes of an upload: its chunks in order, as the worker joins them. Checks their number against the offset."""
    db, objects = connect(server), site.open_store()
    try:
        state = await uploads.inspect(db, upload)
    finally:
        await db.close()
    data = b"".join([await objects.get(keys.chunk(upload, name)) for name in state.chunks])
    assert state.post or len(data) == state.offset
    return data


def count_chunks(site, upload: str) -> int:
    """The number of chunk objects that the store has of an upload."""
    folder = site.folder / "store" / "chunks" / upload
    return sum(1 for path in folder.iterdir()) if folder.exists() else 0
