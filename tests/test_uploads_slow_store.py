"""A store that takes seconds for a put makes an upload slow, and never makes it fail."""

import asyncio

import httpx
import pytest
from conftest import Site, connect, until
from slowstore import SECONDS
from uploading import joined, picture

from storage import uploads
from storage.objects import Folder
from storage.settings import MIB

KIB = 1024
TUS = {"Tus-Resumable": "1.0.0"}
PART = {**TUS, "Content-Type": "application/offset+octet-stream"}


@pytest.fixture
def slow_site(embedded, tmp_path):
    embedded.client.flushall()
    site = Site(embedded.url, tmp_path)
    site.start("tests.slowstore")
    until(lambda: httpx.get(f"{site.url}/readyz").status_code == 200, what="the API")
    yield site
    site.close()


async def by_form(client: httpx.AsyncClient, site, server, image: bytes) -> tuple[int, str]:
    answer = await client.post("/v1/posts", files={"image": image})
    post = answer.json().get("id")
    return answer.status_code, server.client.hget(f"post:{{0}}:{post}", "upload")


async def by_creation(client: httpx.AsyncClient, site, server, image: bytes) -> tuple[int, str]:
    headers = {**PART, "Upload-Length": str(len(image))}
    answer = await client.post("/v1/uploads", headers=headers, content=image)
    assert answer.headers.get("Upload-Offset") == str(len(image)), answer.text
    return answer.status_code, answer.headers["Location"].rpartition("/")[2]


async def by_patch(client: httpx.AsyncClient, site, server, image: bytes, override: bool = False) -> tuple[int, str]:
    made = await client.post("/v1/uploads", headers={**TUS, "Upload-Length": str(len(image))})
    headers = {**PART, "Upload-Offset": "0", **({"X-HTTP-Method-Override": "PATCH"} if override else {})}
    target = made.headers["Location"]
    answer = await client.request("POST" if override else "PATCH", target, headers=headers, content=image)
    return answer.status_code, target.rpartition("/")[2]


async def by_override(client: httpx.AsyncClient, site, server, image: bytes) -> tuple[int, str]:
    return await by_patch(client, site, server, image, override=True)


ROUTES = {by_form: 201, by_creation: 201, by_patch: 204, by_override: 204}


async def test_every_upload_route_works_over_a_store_whose_puts_take_seconds(slow_site, embedded):
    """All cases at once. A third chunk of 1 MiB fills up while the two before it are still being put."""
    headers = {"Authorization": f"Bearer {slow_site.token('alice')}"}

    async def case(route, speed: int) -> None:
        image = picture(8) + bytes([speed]) * (2 * MIB + 200 * KIB)
        status, upload = await route(client, slow_site, embedded, image)
        assert status == ROUTES[route], (route.__name__, SECONDS[speed])
        assert await joined(slow_site, embedded, upload) == image

    async with httpx.AsyncClient(base_url=slow_site.url, headers=headers, timeout=60) as client:
        cases = [case(route, speed) for route in ROUTES for speed in range(1, len(SECONDS))]
        results = await asyncio.gather(*cases, return_exceptions=True)
    assert [result for result in results if result] == []


class Gated(Folder):
    """Its puts wait until the gate is open."""

    def __init__(self, root):
        super().__init__(root)
        self.gate, self.waiting = asyncio.Event(), 0

    async def put(self, name, data):
        self.waiting += 1
        await self.gate.wait()
        await super().put(name, data)
        self.waiting -= 1


async def test_no_more_than_two_chunks_are_put_at_once_however_slow_the_store(embedded, tmp_path, monkeypatch):
    """Each put holds its chunk in memory. A chunk that is as old as SLOW_SECONDS waits for its turn, too."""
    monkeypatch.setattr(uploads, "SLOW_SECONDS", 0.005)
    embedded.client.flushall()
    db, objects, image = connect(embedded), Gated(tmp_path), picture(3 * MIB)
    upload, _ = await uploads.create(db, "alice", 1, len(image))
    appender = uploads.Appender(db, objects, upload, 0, len(image))

    async def write() -> None:
        for at in range(0, len(image), 32 * KIB):
            await appender.write(image[at : at + 32 * KIB])
            await asyncio.sleep(0.001)
        await appender.commit()

    writing, most = asyncio.create_task(write()), 0
    for _ in range(100):
        await asyncio.sleep(0.002)
        most = max(most, objects.waiting)
    assert most == uploads.PARALLEL_PUTS
    objects.gate.set()
    await writing
    assert appender.offset == (await uploads.inspect(db, upload)).offset == len(image)
    await db.close()
