"""SIGTERM: the API accepts no new connections, answers the requests it has, and loses nothing that it received."""

import asyncio
import http.client
import os
import signal
import threading
import time

import psutil
import pytest
from conftest import connect, running_site, until
from making import jpeg, make_post
from uploading import BODY, begin, joined, picture
from wire import FORM, Answer, dial, form, head, hear, request

from storage import uploads


@pytest.fixture
def stopping(embedded, tmp_path):
    """A site with two API processes, which the test stops."""
    embedded.client.flushall()
    with running_site(embedded, tmp_path, workers=2) as site:
        yield site


async def test_an_api_that_stops_stores_what_it_received_and_finishes_short_requests(stopping):
    alice = stopping.authorization()
    db = connect(stopping.server)
    post = await make_post(db, "alice")
    image = picture(900_000)
    upload, other = begin(stopping, len(image)), begin(stopping, len(image))
    tus = (alice, "Tus-Resumable: 1.0.0", BODY, "Upload-Offset: 0")
    uploading, idle, publishing, stalled = (dial(stopping.port) for _ in range(4))
    uploading.sendall(head("PATCH", f"/v1/uploads/{upload}", *tus, f"Content-Length: {len(image)}") + image[:500_123])
    with_creation = dial(stopping.port)
    creation = (alice, "Tus-Resumable: 1.0.0", BODY, f"Upload-Length: {len(image)}")
    with_creation.sendall(head("POST", "/v1/uploads", *creation, f"Content-Length: {len(image)}") + image[:70_000])
    body = form(("image", "a.jpg", jpeg()), ("caption", None, b"Hello"))
    asked = head("POST", "/v1/posts", alice, FORM, f"Content-Length: {len(body)}")
    publishing.sendall(asked + body[:-10])
    stalled.sendall(asked + body[:-10])
    idle.sendall(head("GET", "/healthz"))
    assert hear(idle).status == 200

    def all_arrived() -> bool:
        """Whether the API has read from every connection above."""
        client = stopping.server.client
        offsets = [int(client.hget(f"upload:{{0}}:{key}", "offset")) for key in client.hkeys("uploads:{0}:alice")]
        return len(offsets) == 5 and sum(offset > 0 for offset in offsets) == 2

    await asyncio.to_thread(until, all_arrived)
    answered: list[Answer] = []
    commenting = threading.Thread(target=add_comments, args=(stopping, post, answered))
    commenting.start()
    await asyncio.to_thread(until, lambda: len(answered) > 20, what="20 comments")

    # honcho and terminals send a signal to the whole process group of the parent. Each child has a group of its own, so
    # that it does not get the signal twice.
    children = [child.pid for child in psutil.Process(stopping.processes[0].pid).children()]
    assert [os.getpgid(child) for child in children] == children

    began = time.monotonic()
    stopping.processes[0].send_signal(signal.SIGTERM)
    answer = hear(uploading)
    assert (answer.status, answer.json()["code"], answer.headers["connection"]) == (503, "stopping", "close")
    assert "retry-after" in answer.headers and answer.headers["tus-resumable"] == "1.0.0"
    answer = hear(with_creation)
    assert (answer.status, answer.headers["upload-offset"]) == (201, "70000"), "the client learns the address"
    assert idle.recv(1) == b"", "an idle connection is closed"
    await asyncio.to_thread(until, lambda: refuses_connections(stopping), what="the close of the port")
    publishing.sendall(body[-10:])
    answer = hear(publishing)
    assert (answer.status, answer.headers["connection"]) == (201, "close"), "a short request is finished"
    commenting.join(10)
    assert time.monotonic() - began < 5

    status = await asyncio.to_thread(stopping.processes[0].wait, 30)
    assert (status, time.monotonic() - began < 30) == (0, True)
    assert await joined(stopping, stopping.server, upload) == image[:500_123]
    assert (await uploads.inspect(db, other)).offset == 0
    stream = {entry for entry, _ in stopping.server.client.xrange(f"comments:{{0}}:{post}")}
    assert {answer.status for answer in answered} == {201}
    assert {answer.json()["id"] for answer in answered} <= stream, "every comment that was answered is there"
    await db.close()
    for line in (uploading, idle, publishing, stalled, with_creation):
        line.close()


def add_comments(site, post: str, answered: list[Answer]) -> None:
    """Sends comments one after the other on one connection, until it closes. Appends each answer to `answered`."""
    text = request("POST", f"/v1/posts/{post}/comments", site.token("bob"), b'{"text": "Hm"}')
    with dial(site.port) as line:
        while True:
            try:
                line.sendall(text)
                answer = hear(line)
            except (OSError, http.client.HTTPException):
                return
            answered.append(answer)
            if answer.headers["connection"] == "close":
                return


def refuses_connections(site) -> bool:
    try:
        dial(site.port).close()
    except ConnectionRefusedError:
        return True
    return False
