"""SIGTERM: nobody new comes in, who is inside is served or told, and nothing that was answered or received is lost."""

import asyncio
import http.client
import os
import signal
import threading
import time

import psutil
import pytest
from conftest import Site, connect, until
from making import jpeg, make_post
from uploading import BODY, begin, joined, picture
from wire import FORM, dial, form, head, hear, request

from storage import uploads


@pytest.fixture
def leaving(embedded, tmp_path):
    """A site of two processes that is going to stop."""
    embedded.client.flushall()
    site = Site(embedded.url, tmp_path, workers=2)
    site.server = embedded
    site.process = site.api()
    yield site
    site.close()


async def test_a_server_that_stops_keeps_what_came_and_finishes_what_is_short(leaving):
    alice = leaving.authorization()
    db = connect(leaving.server)
    post = await make_post(db, "alice")
    image = picture(900_000)
    upload, other = begin(leaving, len(image)), begin(leaving, len(image))
    tus = (alice, "Tus-Resumable: 1.0.0", BODY, "Upload-Offset: 0")
    uploading, idle, publishing, stalled = (dial(leaving.port) for _ in range(4))
    uploading.sendall(head("PATCH", f"/v1/uploads/{upload}", *tus, f"Content-Length: {len(image)}") + image[:500_123])
    with_creation = dial(leaving.port)
    creation = (alice, "Tus-Resumable: 1.0.0", BODY, f"Upload-Length: {len(image)}")
    with_creation.sendall(head("POST", "/v1/uploads", *creation, f"Content-Length: {len(image)}") + image[:70_000])
    body = form(("image", "a.jpg", jpeg()), ("caption", None, b"Hello"))
    asked = head("POST", "/v1/posts", alice, FORM, f"Content-Length: {len(body)}")
    publishing.sendall(asked + body[:-10])
    stalled.sendall(asked + body[:-10])
    idle.sendall(head("GET", "/healthz"))
    assert hear(idle).status == 200

    def opened() -> list[str]:
        return leaving.server.client.hkeys("uploads:{0}:alice")

    def arrived() -> bool:
        """Every connection above has been read from."""
        offsets = [int(leaving.server.client.hget(f"upload:{{0}}:{key}", "offset")) for key in opened()]
        return len(offsets) == 5 and sum(offset > 0 for offset in offsets) == 2

    await asyncio.to_thread(until, arrived)
    taken, comments = [], threading.Thread(target=lambda: taken.extend(chatter(leaving, post)))
    comments.start()
    await asyncio.to_thread(until, lambda: leaving.server.client.xlen(f"comments:{{0}}:{post}") > 20)

    # A signal to the group of the parent, as honcho and terminals send it, must not reach them twice.
    children = [child.pid for child in psutil.Process(leaving.process.pid).children()]
    assert [os.getpgid(child) for child in children] == children

    began = time.monotonic()
    leaving.process.send_signal(signal.SIGTERM)
    answer = hear(uploading)
    assert (answer.status, answer.json()["code"], answer.headers["connection"]) == (503, "stopping", "close")
    assert "retry-after" in answer.headers and answer.headers["tus-resumable"] == "1.0.0"
    answer = hear(with_creation)
    assert (answer.status, answer.headers["upload-offset"]) == (201, "70000"), "the client learns where"
    assert idle.recv(1) == b"", "an idle connection is closed"
    await asyncio.to_thread(until, lambda: refused(leaving), what="the port to be closed")
    publishing.sendall(body[-10:])
    answer = hear(publishing)
    assert (answer.status, answer.headers["connection"]) == (201, "close"), "what is short is finished"
    comments.join(10)
    assert time.monotonic() - began < 5

    status = await asyncio.to_thread(leaving.process.wait, 30)
    assert (status, time.monotonic() - began < 30) == (0, True)
    assert await joined(leaving, leaving.server, upload) == image[:500_123]
    assert (await uploads.inspect(db, other)).offset == 0
    said = {entry for entry, _ in leaving.server.client.xrange(f"comments:{{0}}:{post}")}
    assert set(taken) <= said, "every comment that was answered is there"
    assert len(taken) > 20
    await db.close()
    for line in (uploading, idle, publishing, stalled, with_creation):
        line.close()


def chatter(site, post: str) -> list[str]:
    """Add comments one after the other on one connection, until it closes; the ids that were answered."""
    taken, text = [], request("POST", f"/v1/posts/{post}/comments", site.token("bob"), b'{"text": "Hm"}')
    with dial(site.port) as line:
        while True:
            try:
                line.sendall(text)
                answer = hear(line)
            except (OSError, http.client.HTTPException):
                return taken
            assert answer.status == 201
            taken.append(answer.json()["id"])
            if answer.headers["connection"] == "close":
                return taken


def refused(site) -> bool:
    try:
        dial(site.port).close()
    except ConnectionRefusedError:
        return True
    return False
