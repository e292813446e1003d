"""An object store that takes seconds for each put makes uploads slow. It does not make them fail."""

import asyncio

import httpx
import pytest
from conftest import Site, connect, until
from parts import until as until_async
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


async def test_every_way_to_upload_works_with_a_store_whose_puts_take_seconds(slow_site, embedded):
    """All cases run at the same time. A third chunk of 1 MiB is full before the two chunks before it are put."""
    headers = {"Authorization": f"Bearer {slow_site.token('alice')}"}

    async def check(route, speed: int) -> None:
        image = picture(8) + bytes([speed]) * (2 * MIB + 200 * KIB)
        status, upload = await route(client, slow_site, embedded, image)
        assert status == ROUTES[route], (route.__name__, SECONDS[speed])
        assert await joined(slow_site, embedded, upload) == image

    async with httpx.AsyncClient(base_url=slow_site.url, headers=headers, timeout=60) as client:
        checks = [check(route, speed) for route in ROUTES for speed in range(1, len(SECONDS))]
        results = await asyncio.gather(*checks, return_exceptions=True)
    assert results == [None] * len(checks), "these are the failures of single cases"


class GatedFolder(Folder):
    """An object store whose puts wait until `gate` is set. `waiting` is the number of puts that wait."""

    def __init__(self, root):
        super().__init__(root)
        self.gate, self.waiting = asyncio.Event(), 0

    async def put(self, name, data):
        self.waiting += 1
        await self.gate.wait()
        await super().put(name, data)
        self.waiting -= 1


async def test_at_most_two_chunks_of_an_upload_are_put_at_the_same_time(embedded, tmp_path, monkeypatch):
    """Each put keeps its chunk in memory. A chunk that is older than SLOW_SECONDS has to wait for its turn as well."""
    monkeypatch.setattr(uploads, "SLOW_SECONDS", 0.005)
    monkeypatch.setattr(uploads, "growth", uploads.Growth())
    embedded.client.flushall()
    db, objects, image = connect(embedded), GatedFolder(tmp_path), picture(3 * MIB)
    upload, _ = await uploads.create(db, "alice", 1, len(image))
    appender = uploads.Appender(db, objects, upload, 0, len(image))

    async def write() -> None:
        for at in range(0, len(image), 32 * KIB):
            await appender.write(image[at : at + 32 * KIB])
            await asyncio.sleep(0.001)
        await appender.commit()

    writing = asyncio.create_task(write())
    await until_async(lambda: objects.waiting == uploads.PARALLEL_PUTS, "all puts that are allowed")
    for _ in range(100):  # no third put begins, whatever the writer does meanwhile
        await asyncio.sleep(0.002)
        assert objects.waiting == uploads.PARALLEL_PUTS
    objects.gate.set()
    await writing
    assert appender.offset == (await uploads.inspect(db, upload)).offset == len(image)
    await db.close()
