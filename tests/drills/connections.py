"""Two minutes of bad connections: a trickle of 1 KiB/s, and what a crowd costs those whose connections are good.

    python -m pytest -s tests/drills/connections.py
"""

import asyncio
import time

import pytest
from conftest import connect
from making import make_post
from test_api_protocol import crowd, healthy, open_files
from uploading import BODY, begin, joined, offset, picture, stored
from wire import head

TRICKLE = 120  # seconds


async def trickle(site, upload: str, image: bytes) -> bytes:
    """A KiB a second; the answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
    alice = f"Authorization: Bearer {site.token('alice')}"
    tus = (alice, "Tus-Resumable: 1.0.0", BODY, "Upload-Offset: 0", f"Content-Length: {len(image)}")
    writer.write(head("PATCH", f"/v1/uploads/{upload}", *tus))
    for sent in range(0, len(image), 1024):
        writer.write(image[sent : sent + 1024])
        await asyncio.sleep(1)
    answer = await reader.read(12)
    writer.close()
    return answer


def p99(times: list[float]) -> float:
    return sorted(times)[int(len(times) * 0.99)] * 1000


@pytest.mark.timeout(200)
async def test_a_crowd_and_a_trickle(serving):
    db = connect(serving.server)
    post = await make_post(db, "alice")
    await db.close()
    image = picture(TRICKLE * 1024)
    upload = await asyncio.to_thread(begin, serving, len(image))
    trickling = asyncio.create_task(trickle(serving, upload, image))
    files = open_files(serving)

    idle, crowded = [], []
    await asyncio.gather(*(healthy(serving, 20, idle) for _ in range(4)))
    people = [bad for sort in crowd(serving, post, 200).values() for bad in sort]
    began = time.monotonic()
    runs = [bad.run(serving.port, 40) for bad in people]
    await asyncio.gather(*(healthy(serving, 38, crowded) for _ in range(4)), *runs)
    lasted = {sort: max((bad.lasted or 0) for bad in people if bad.name == sort) for sort in ("header", "stalled")}
    refused = max(bad.lasted for bad in people if bad.name == "refused")
    await asyncio.sleep(max(0.0, 45 - (time.monotonic() - began)))
    left = open_files(serving)
    print(f"\np99 of healthy requests: {p99(idle):.1f} ms alone, {p99(crowded):.1f} ms in the crowd of {len(people)}")
    print(f"closed: headers by {lasted['header']:.1f} s, stalled bodies by {lasted['stalled']:.1f} s, ", end="")
    print(f"refused ones by {refused:.1f} s; open files {files} before, {left} after")
    assert p99(crowded) <= 2 * p99(idle)
    assert lasted["header"] < 15 and lasted["stalled"] < 35 and refused < 6
    assert left <= files + 2

    assert await trickling == b"HTTP/1.1 204"
    print(f"{TRICKLE} KiB at 1 KiB/s: {stored(serving, upload)} objects")
    assert stored(serving, upload) <= 4
    assert await asyncio.to_thread(offset, serving, upload) == len(image)
    assert await joined(serving, serving.server, upload) == image
