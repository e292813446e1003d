"""Two minutes of bad connections: an upload at 1 KiB/s, and what a crowd of bad connections costs healthy ones.

    python -m pytest -s tests/drills/connections.py
"""

import asyncio

import pytest
from conftest import connect, until
from making import make_post
from test_api_protocol import Bad, crowd, healthy, open_files
from uploading import BODY, begin, count_chunks, joined, offset, picture
from wire import head

TRICKLE = 120  # seconds of the slow upload, which sends 1 KiB in each
STARVED = 250  # ms: a p99 below this may come from other load. A request that the crowd starves waits for seconds


async def trickle(site, upload: str, image: bytes) -> bytes:
    """Sends an image in one PATCH at 1 KiB a second. Returns the first line of the answer, up to the status."""
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
    """In ms, of seconds."""
    return sorted(times)[int(len(times) * 0.99)] * 1000


def longest(connections: list[Bad]) -> float:
    """Seconds until the server closed the last of them. Asserts that it closed all."""
    still_open = sum(bad.lasted is None for bad in connections)
    assert not still_open, f"{still_open} of {len(connections)} connections were never closed"
    return max(bad.lasted for bad in connections)


@pytest.mark.timeout(200)
async def test_a_crowd_and_a_trickle(serving):
    db = connect(serving.server)
    post = await make_post(db, "alice")
    await db.close()
    image = picture(TRICKLE * 1024)
    upload = await asyncio.to_thread(begin, serving, len(image))
    trickling = asyncio.create_task(trickle(serving, upload, image))
    files = open_files(serving)

    idle: list[float] = []
    await asyncio.gather(*(healthy(serving, 20, idle) for _ in range(4)))
    crowded: list[float] = []
    kinds = crowd(serving, post, 200)
    everyone = [bad for connections in kinds.values() for bad in connections]
    runs = [bad.run(serving.port, 40) for bad in everyone]
    await asyncio.gather(*(healthy(serving, 38, crowded) for _ in range(4)), *runs)
    headers, stalled, refused = (longest(kinds[kind]) for kind in ("header", "stalled", "refused"))
    print(f"\np99 of healthy requests: {p99(idle):.1f} ms alone, {p99(crowded):.1f} ms in the crowd of {len(everyone)}")
    print(f"closed: headers by {headers:.1f} s, stalled bodies by {stalled:.1f} s, refused ones by {refused:.1f} s")
    assert p99(crowded) <= max(STARVED, 2 * p99(idle))
    assert headers < 15 and stalled < 35 and refused < 6
    await asyncio.to_thread(until, lambda: open_files(serving) <= files + 2, 20, "the API closes the sockets")
    print(f"open files: {files} before, {open_files(serving)} after")

    assert await trickling == b"HTTP/1.1 204"
    print(f"{TRICKLE} KiB at 1 KiB/s: {count_chunks(serving, upload)} objects")
    assert count_chunks(serving, upload) <= 4
    assert await asyncio.to_thread(offset, serving, upload) == len(image)
    assert await joined(serving, serving.server, upload) == image
