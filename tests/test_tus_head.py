"""HEAD of tus: the offset of an upload, from which the client goes on."""

import asyncio

import pytest
from conftest import connect
from uploading import begin, offset, picture
from wiretrace import play

from storage import outbox, uploads
from storage.backup.retain import KeptBackups
from storage.settings import DAY_MS, HOUR_MS

TRACES = {
    "a new upload is at 0": """
        > POST /v1/uploads
        > Upload-Length: 100
        < 201
        < Location: /v1/uploads/<upload>
        > HEAD /v1/uploads/<upload>
        < 200
        < Upload-Offset: 0
        < Upload-Length: 100
        < Upload-Expires: *, * GMT
        < Cache-Control: no-store
        < Tus-Resumable: 1.0.0
        < -Upload-Metadata
        < -Upload-Defer-Length
    """,
    "a finished upload is at its length": """
        > POST /v1/uploads
        > Upload-Length: 100
        > Content-Type: application/offset+octet-stream
        > [picture]
        < 201
        < Location: /v1/uploads/<upload>
        > HEAD /v1/uploads/<upload>
        < 200
        < Upload-Offset: 100
        < Upload-Length: 100
        < Cache-Control: no-store
    """,
    "metadata comes back as it was sent": """
        > POST /v1/uploads
        > Upload-Length: 100
        > Upload-Metadata: filename d29ybGRfZG9taW5hdGlvbl9wbGFuLnBkZg==,is_confidential
        < 201
        < Location: /v1/uploads/<upload>
        > HEAD /v1/uploads/<upload>
        < 200
        < Upload-Metadata: filename d29ybGRfZG9taW5hdGlvbl9wbGFuLnBkZg==,is_confidential
    """,
    "an unknown upload has no offset": """
        > HEAD /v1/uploads/u00000000000000000000000000-0
        < 404
        < Tus-Resumable: 1.0.0
        < -Upload-Offset
    """,
    "a malformed id is unknown": """
        > HEAD /v1/uploads/nonsense
        < 404
        < Tus-Resumable: 1.0.0
        < -Upload-Offset
    """,
    "another version of tus is refused, and the answer has the supported one": """
        > HEAD /v1/uploads/u00000000000000000000000000-0
        > Tus-Resumable: 0.2.2
        < 412
        < Tus-Version: 1.0.0
        < Tus-Resumable: 1.0.0
        < -Upload-Offset
    """,
    "a request without a version is refused": """
        > HEAD /v1/uploads/u00000000000000000000000000-0
        > Tus-Resumable:
        < 412
        < Tus-Version: 1.0.0
    """,
    "by POST with an override, for networks that block HEAD": """
        > POST /v1/uploads
        > Upload-Length: 100
        < 201
        < Location: /v1/uploads/<upload>
        > POST /v1/uploads/<upload>
        > X-HTTP-Method-Override: HEAD
        < 200
        < Upload-Offset: 0
        < Cache-Control: no-store
    """,
    "GET of an upload is not allowed": """
        > GET /v1/uploads/u00000000000000000000000000-0
        < 405
        < Tus-Resumable: 1.0.0
        < Allow: *HEAD*
    """,
}


@pytest.mark.parametrize("case", TRACES)
def test_a_head_is_answered_as_in_the_trace(serving, case):
    play(serving, TRACES[case], picture=picture(100))


def test_the_uploads_of_other_users_are_unknown(serving):
    known = {"upload": begin(serving, 100)}
    play(serving, "> HEAD /v1/uploads/<upload>\n< 404\n< -Upload-Offset", "bob", known)
    play(serving, "> HEAD /v1/uploads/<upload>\n< 401\n< WWW-Authenticate: Bearer *", None, known)
    assert offset(serving, known["upload"]) == 0


@pytest.mark.parametrize("begun", [False, True], ids=["without bytes", "with bytes"])
async def test_an_expired_upload_is_gone_before_its_bytes_are_removed_and_afterwards(serving, store, begun):
    db = connect(serving.server)
    now = int(serving.server.client.time()[0] * 1000)
    db.clock = now - DAY_MS - 1000
    upload, _ = await uploads.create(db, "alice", 1, 100)
    if begun:
        image = uploads.Appender(db, store, upload, 0, 100)
        await image.write(picture(50))
        await image.commit()
    trace = """
        > HEAD /v1/uploads/<upload>
        < 410
        < Tus-Resumable: 1.0.0
        < -Upload-Offset
        > PATCH /v1/uploads/<upload>
        > Upload-Offset: 50
        > Content-Type: application/offset+octet-stream
        > [rest]
        < 410
        < code: expired
        > POST /v1/posts
        > Content-Type: application/json
        > [post]
        < 410
        < code: expired
    """

    def check():
        play(serving, trace, known={"upload": upload}, rest=picture(50), post=b'{"upload": "%b"}' % upload.encode())

    await asyncio.to_thread(check)
    db.clock = ""
    for due in await outbox.lease(db, 0):
        if due.id == upload:
            await outbox.end_upload(db, store, KeptBackups(store).may_name, due, DAY_MS)
    assert [entry async for entry in store.list("")] == []
    await asyncio.to_thread(check)
    # It does not count for the quota any more, and after another day its key expires.
    assert not serving.server.client.hexists("uploads:{0}:alice", upload)
    assert 0 < serving.server.client.pttl(f"upload:{{0}}:{upload}") <= DAY_MS
    await db.close()


async def test_each_patch_extends_the_time_until_an_upload_expires(serving, store):
    db = connect(serving.server)
    db.clock = start = 1_800_000_000_000
    upload, _ = await uploads.create(db, "alice", 1, 100)
    assert (await uploads.read(db, "alice", upload)).expires == start + HOUR_MS
    db.clock += HOUR_MS - 1
    image = uploads.Appender(db, store, upload, 0, 100)
    await image.write(picture(50))
    await image.commit()
    assert (await uploads.read(db, "alice", upload)).expires == image.expires == db.clock + DAY_MS
    assert serving.server.client.zscore("due:{0}", upload) == image.expires
    await uploads.discard(db, store, "alice", upload)
    await db.close()
