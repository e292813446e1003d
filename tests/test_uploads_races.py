"""The offset never exceeds the durable bytes: in races of two clients, after kills, and by the order of calls."""

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
from conftest import ROOT, Site, running_site, until
from uploading import begin, joined, offset, patch_head, picture
from wire import dial, exchange, head

from storage.db.client import SCRIPTS
from storage.settings import IMAGE_BYTES, MIB

RACES = 500
KILLS = int(os.environ.get("KILLS", 10))  # `make drill-lines` sets 50


@pytest.fixture
def sites(embedded, tmp_path):
    """Two API processes of one installation, each on a port of its own, so that a test can choose between them."""
    embedded.client.flushall()
    with running_site(embedded, tmp_path) as one, running_site(embedded, tmp_path) as other:
        yield one, other


def patch(site, upload: str, at: int, length: int) -> bytes:
    return patch_head(site, upload, at, f"Content-Length: {length}", "Connection: close")


async def send(site, upload: str, at: int, data: bytes, together: asyncio.Barrier) -> tuple[int, bytes]:
    """Sends a PATCH, its body once all are `together`. Returns the status and the whole answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", site.port)
    writer.write(patch(site, upload, at, len(data)))
    await together.wait()
    with contextlib.suppress(ConnectionError):
        writer.write(data)
    answer = await reader.read()
    writer.close()
    return int(answer[9:12]), answer


async def watch(server, upload: str, seen: list[int]) -> None:
    """Appends the offset that Redis has to `seen`, again and again, until it is cancelled."""
    while True:
        seen.append(await asyncio.to_thread(lambda: int(server.client.hget(f"upload:{{0}}:{upload}", "offset"))))


async def test_of_two_clients_that_append_at_one_offset_exactly_one_succeeds_and_its_bytes_are_stored(sites):
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
    assert seen == sorted(seen), "the offset never decreases"
    assert len(set(seen)) > 1, "the offset was watched while it moved"
    folder = sites[0].folder / "store" / "chunks" / upload
    named = sites[0].server.client.lrange(f"chunks:{{0}}:{upload}", 0, -1)
    assert sorted(path.name for path in folder.iterdir()) == sorted(named), "the chunks of the losers are removed"


def kill(site) -> None:
    """Kills all processes of the API at once, as a power failure would."""
    parent = psutil.Process(site.processes[-1].pid)
    for process in [*parent.children(), parent]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)
    site.processes[-1].wait()


@pytest.mark.timeout(300)
async def test_after_a_kill_all_bytes_up_to_the_offset_can_be_read(embedded, tmp_path):
    """Every second API makes chunks of 8 MiB."""
    embedded.client.flushall()
    site = Site(embedded.url, tmp_path)
    site.server = embedded
    chance, at = random.Random(KILLS), 0
    image, largest = picture(IMAGE_BYTES), 0
    site.api()
    upload = await asyncio.to_thread(begin, site, len(image))
    for turn in range(KILLS):
        if at > 80 * MIB:
            upload, at = await asyncio.to_thread(begin, site, len(image)), 0
        large = turn % 2
        target = at + chance.choice([1 * MIB, 9 * MIB] if large else [30_000, 70_000, 400_000, 1_100_000])
        line, begun = dial(site.port), threading.Event()

        def pour(line=line, at=at, begun=begun, pause=0.0 if large else 0.0005, upload=upload):
            with contextlib.suppress(OSError):
                line.sendall(patch(site, upload, at, len(image) - at))
                for sent in range(at, len(image), 10_000):
                    line.sendall(image[sent : sent + 10_000])
                    if sent > at + 20_000:
                        begun.set()
                    time.sleep(pause)  # 20 MB/s: on a faster line hardly a kill would hit between small chunks

        pouring = threading.Thread(target=pour)
        pouring.start()
        assert await asyncio.to_thread(begun.wait, 10)
        key = f"upload:{{0}}:{upload}"
        if target - at > 70_000:
            await asyncio.to_thread(until, lambda: int(embedded.client.hget(key, "offset")) >= target - 100_000)  # noqa: B023
        kill(site)
        line.close()
        pouring.join()
        if large:
            site.api()
        else:
            site.start("tests.largechunks")
            await asyncio.to_thread(until, lambda: exchange(site.port, head("GET", "/readyz")).status == 200)
        reported = await asyncio.to_thread(offset, site, upload)
        assert reported >= at, "the offset never decreases"
        assert await joined(site, embedded, upload) == image[:reported]
        at = reported
        largest = max([largest, *(path.stat().st_size for path in tmp_path.glob("store/chunks/*/[0-9]*"))])
    assert largest >= 8 * MIB, "some kill came after a large chunk"
    site.close()


async def test_bytes_and_file_names_are_on_disk_before_the_offset_moves(embedded, tmp_path):
    """Reads the system calls of the API. A kill proves nothing here: written bytes survive it even if not synced."""
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
    psutil.Process(strace.pid).children()[0].terminate()  # strace itself ignores signals
    strace.wait(30)

    folder, sha, steps = str(tmp_path / "store" / "chunks" / upload), SCRIPTS["append_chunk"].sha, []
    for line in trace.read_text(errors="replace").splitlines():
        call = re.match(r"\d+ +(\w+)\(", line)
        if not call:
            continue
        if sha in line:
            steps.append("the offset moves")
        elif "204 No Content" in line:
            steps.append("the client gets its answer")
        elif folder in line and call[1] in ("fsync", "fdatasync"):
            steps.append("folder synced" if f"<{folder}>" in line else "bytes synced")
        elif folder in line and call[1].startswith(("rename", "link")):
            steps.append("named")
        elif folder in line and call[1].startswith("write"):
            steps.append("bytes written")
    expected = ["bytes written", "bytes synced", "named", "folder synced", "the offset moves"]
    assert steps == [*expected, "the client gets its answer"]
