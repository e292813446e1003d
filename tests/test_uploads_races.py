"""Two at one upload, deaths in its midst, and the order of its calls: the offset tells what is durable, always."""

import asyncio
import contextlib
import os
import random
import re
import secrets
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
from conftest import ROOT, Site, until
from uploading import BODY, begin, joined, offset, picture
from wire import dial, exchange, head

from storage.db.client import SCRIPTS

RACES = 500
KILLS = int(os.environ.get("KILLS", 10))  # `make drill` says 50


@pytest.fixture
def sites(embedded, tmp_path):
    """Two API processes of one installation, each at an address of its own, so that a test may choose."""
    embedded.client.flushall()
    both = [Site(embedded.url, tmp_path), Site(embedded.url, tmp_path)]
    for site in both:
        site.server = embedded
        site.api()
    yield both
    for site in both:
        site.close()


def patch(site, upload: str, at: int, length: int) -> bytes:
    token = site.authorization()
    return head(
        "PATCH",
        f"/v1/uploads/{upload}",
        token,
        "Tus-Resumable: 1.0.0",
        BODY,
        f"Upload-Offset: {at}",
        f"Content-Length: {length}",
        "Connection: close",
    )


async def send(site, upload: str, at: int, data: bytes, together: asyncio.Barrier) -> tuple[int, bytes]:
    reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
    writer.write(patch(site, upload, at, len(data)))
    await together.wait()
    with contextlib.suppress(ConnectionError):
        writer.write(data)
    answer = await reader.read()
    writer.close()
    return int(answer[9:12]), answer


async def watch(server, upload: str, seen: list[int]) -> None:
    while True:
        seen.append(await asyncio.to_thread(lambda: int(server.client.hget(f"upload:{{0}}:{upload}", "offset"))))


async def test_of_two_clients_at_one_upload_one_wins_each_race_and_the_bytes_are_its(sites):
    chance = random.Random(500)
    sizes = [chance.choice([1, 9, 100, 3000, 70_000]) for _ in range(RACES)]
    upload = await asyncio.to_thread(begin, sites[0], sum(sizes))
    expected, seen = b"", []
    watching = asyncio.create_task(watch(sites[0].server, upload, seen))
    for race, size in enumerate(sizes):
        pieces = [picture(size) if race == 0 else secrets.token_bytes(size) for _ in sites]
        together, at = asyncio.Barrier(2), len(expected)
        answers = await asyncio.gather(
            *(send(site, upload, at, piece, together) for site, piece in zip(sites, pieces, strict=True))
        )
        assert sorted(status for status, _ in answers) == [204, 409], answers
        won = 0 if answers[0][0] == 204 else 1
        assert b"Upload-Offset: %d\r\n".lower() % (at + size) in answers[won][1].lower()
        assert b'"code":"offset"' in answers[1 - won][1]
        expected += pieces[won]
    watching.cancel()
    assert await joined(sites[0], sites[0].server, upload) == expected
    assert seen == sorted(seen) and len(set(seen)) > 10, "the offset never decreases"
    folder = sites[0].folder / "store" / "chunks" / upload
    kept = sites[0].server.client.lrange(f"chunks:{{0}}:{upload}", 0, -1)
    assert sorted(path.name for path in folder.iterdir()) == sorted(kept), "the losers' chunks are erased"


def kill(site) -> None:
    """All processes of the API at once, as by the power switch."""
    parent = psutil.Process(site.processes[-1].pid)
    for process in [*parent.children(), parent]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)
    site.processes[-1].wait()


@pytest.mark.timeout(300)
async def test_the_offset_after_a_kill_never_exceeds_what_can_be_read_back(embedded, tmp_path):
    embedded.client.flushall()
    site = Site(embedded.url, tmp_path)
    site.server = embedded
    chance, at = random.Random(KILLS), 0
    image = picture(60 * 2**20)
    site.api()
    upload = await asyncio.to_thread(begin, site, len(image))
    for _ in range(KILLS):
        target = at + chance.choice([30_000, 70_000, 400_000, 1_100_000])
        line, begun = dial(site.port), threading.Event()

        def pour(line=line, at=at, begun=begun):
            with contextlib.suppress(OSError):
                line.sendall(patch(site, upload, at, len(image) - at))
                for sent in range(at, len(image), 10_000):
                    line.sendall(image[sent : sent + 10_000])
                    if sent > at + 20_000:
                        begun.set()
                    time.sleep(0.0005)  # 20 MB/s: a line faster than the store hides the moments between

        pouring = threading.Thread(target=pour)
        pouring.start()
        assert await asyncio.to_thread(begun.wait, 10)
        key = f"upload:{{0}}:{upload}"
        if target - at > 70_000:
            await asyncio.to_thread(until, lambda: int(embedded.client.hget(key, "offset")) >= target - 100_000)  # noqa: B023
        kill(site)
        line.close()
        pouring.join()
        site.api()
        told = await asyncio.to_thread(offset, site, upload)
        assert told >= at, "it never decreases"
        assert await joined(site, embedded, upload) == image[:told]
        at = told
    assert at > 0
    site.close()


async def test_bytes_and_their_names_are_on_disk_before_the_offset_moves(embedded, tmp_path):
    """A kill cannot show it: what was written survives a kill. So the calls of the API process are read."""
    embedded.client.flushall()
    site, trace = Site(embedded.url, tmp_path), tmp_path / "trace"
    site.server = embedded
    calls = "trace=openat,write,writev,sendto,sendmsg,fsync,fdatasync,rename,renameat,renameat2,link"
    command = ["strace", "-f", "-y", "-s", "300", "-e", calls, "-o", str(trace), sys.executable, "-m", "api"]
    strace = subprocess.Popen(command, cwd=ROOT, env=site.environment, stdout=subprocess.DEVNULL)
    site.processes.append(strace)
    await asyncio.to_thread(until, lambda: exchange(site.port, head("GET", "/readyz")).status == 200)
    image = picture(1000)
    upload = await asyncio.to_thread(begin, site, len(image))
    assert (await asyncio.to_thread(exchange, site.port, patch(site, upload, 0, 1000) + image)).status == 204
    psutil.Process(strace.pid).children()[0].terminate()  # strace itself does not heed a signal
    strace.wait(30)

    folder, sha, steps = str(tmp_path / "store" / "chunks" / upload), SCRIPTS["append_chunk"].sha, []
    for line in trace.read_text(errors="replace").splitlines():
        call = re.match(r"\d+ +(\w+)\(", line)
        if not call:
            continue
        if sha in line:
            steps.append("the offset moves")
        elif "204 No Content" in line:
            steps.append("the client is told")
        elif folder in line and call[1] in ("fsync", "fdatasync"):
            steps.append("folder synced" if f"<{folder}>" in line else "bytes synced")
        elif folder in line and call[1].startswith(("rename", "link")):
            steps.append("named")
        elif folder in line and call[1].startswith("write"):
            steps.append("bytes written")
    expected = ["bytes written", "bytes synced", "named", "folder synced", "the offset moves", "the client is told"]
    assert steps == expected, steps
