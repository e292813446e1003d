"""Two widely used tus clients upload to a running server, also over a line that breaks again and again."""

import hashlib
import random
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import httpx
import pytest
from conftest import ROOT, RedisServer, Site, running_site, until
from proxy import Proxy
from tusclient import client as tuspy
from tusclient.exceptions import TusCommunicationError

MIB = 2**20
CLIENTS = ROOT / "tests" / "clients"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A site with two API processes and a Redis server of its own, for all tests of this file."""
    folder = tmp_path_factory.mktemp("site")
    with closing(RedisServer("valkey")) as server, running_site(server, folder, workers=2) as site:
        yield site


@pytest.fixture
def line(served):
    """A proxy in front of the site."""
    with Proxy(served.port) as proxy:
        yield proxy


def picture(path: Path, size: int) -> str:
    """Writes a file that begins as a PNG does. Returns its sha256."""
    data = b"\x89PNG\r\n\x1a\n" + random.Random(size).randbytes(size - 8)
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def hash_stored(site: Site, url: str) -> str:
    """The sha256 of the chunks of an upload, or of its parts, in order."""
    upload, client = url.rsplit("/", 1)[1], site.server.client
    digest = hashlib.sha256()
    parts = [name for name in client.lrange(f"chunks:{{0}}:{upload}", 0, -1) if name.startswith("u")]
    for one in parts or [upload]:
        for name in client.lrange(f"chunks:{{0}}:{one}", 0, -1):
            digest.update((site.folder / "store" / "chunks" / one / name).read_bytes())
    return digest.hexdigest()


def start_tus_js(path: Path, port: int, token: str, *more: str) -> subprocess.Popen:
    command = ["node", str(CLIENTS / "upload.js"), str(path), f"http://127.0.0.1:{port}/v1/uploads", token, *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_url(process: subprocess.Popen) -> str:
    """Waits until tus-js-client has finished. Returns the address of the upload, which it prints."""
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    return out.strip()


@pytest.mark.parametrize("chunk", [(), ("1000000",)], ids=["whole", "in chunks"])
def test_tus_js_client_uploads(served, tmp_path, chunk):
    digest = picture(tmp_path / "photo", 3 * MIB + 17)
    url = wait_for_url(start_tus_js(tmp_path / "photo", served.port, served.token("alice"), *chunk))
    assert hash_stored(served, url) == digest
    with served.client("alice") as alice:
        created = alice.post("/v1/posts", json={"upload": url.rsplit("/", 1)[1], "caption": "by tus"})
    assert created.status_code == 201 and created.json()["caption"] == "by tus"


def test_tus_js_client_sends_parts_at_the_same_time_over_a_line_that_breaks(served, line, tmp_path):
    size = 12 * MIB
    digest = picture(tmp_path / "photo", size)
    line.rate = 8 * MIB
    with ThreadPoolExecutor() as pool:
        cutting = pool.submit(break_often, line, size, 5, ["rst", "fin"])
        url = wait_for_url(start_tus_js(tmp_path / "photo", line.port, served.token("carol"), "0", "4"))
        cutting.result()
    assert hash_stored(served, url) == digest
    with served.client("carol") as carol:
        listed = carol.get("/v1/uploads").json()["items"]
        assert [(item["concat"], item["offset"]) for item in listed] == [("final", size)], "no part is left over"
        created = carol.post("/v1/posts", json={"upload": url.rsplit("/", 1)[1], "caption": "in parts"})
    assert created.status_code == 201


def test_tus_js_client_sends_no_byte_twice_if_the_answer_to_its_final_request_is_lost(served, line, tmp_path):
    digest = picture(tmp_path / "photo", MIB)
    line.before[b"Upload-Concat: final"] = lambda: line.lose(how="rst")
    url = wait_for_url(start_tus_js(tmp_path / "photo", line.port, served.token("dave"), "0", "4"))
    assert line.lost.is_set() and line.up < 1.05 * MIB
    assert hash_stored(served, url) == digest
    with served.client("dave") as dave:
        assert [item["id"] for item in dave.get("/v1/uploads").json()["items"]] == [url.rsplit("/", 1)[1]]


@pytest.mark.parametrize("chunk", [None, 1_000_000], ids=["whole", "in chunks"])
def test_tuspy_uploads(served, tmp_path, chunk):
    digest = picture(tmp_path / "photo", 3 * MIB + 17)
    client = tuspy.TusClient(f"{served.url}/v1/uploads", {"Authorization": f"Bearer {served.token('alice')}"})
    uploader = client.uploader(str(tmp_path / "photo"), **({"chunk_size": chunk} if chunk else {}))
    uploader.upload()
    assert hash_stored(served, uploader.url) == digest


def test_tuspy_resumes_at_the_offset_where_the_line_broke(served, line, tmp_path):
    size = 12 * MIB
    digest = picture(tmp_path / "photo", size)
    line.rate = 30 * MIB
    client = tuspy.TusClient(
        f"http://127.0.0.1:{line.port}/v1/uploads", {"Authorization": f"Bearer {served.token('alice')}"}
    )
    uploader = client.uploader(str(tmp_path / "photo"), retries=9, retry_delay=0.05)
    with ThreadPoolExecutor() as pool:
        cutting = pool.submit(break_often, line, size, 5, ["rst", "fin"])
        while uploader.offset < size:
            try:
                uploader.upload()
            except TusCommunicationError:  # tuspy gives up if the first HEAD after a break gets no answer
                uploader.offset = until(uploader.get_offset)
        cutting.result()
    assert hash_stored(served, uploader.url) == digest
    assert line.up < 1.05 * size


def break_often(line: Proxy, size: int, times: int, ways: list[str]) -> None:
    """Cuts the connection `times` times, each time after another part of the bytes has passed."""
    for n in range(times):
        until(lambda: line.up >= (n + 1) * size / (times + 1), 100, "the next part")  # noqa: B023
        until(lambda: line.cut(ways[n % len(ways)]), 100, "a connection to cut")  # noqa: B023


def test_100_mib_over_a_line_that_breaks_50_times(served, line, tmp_path, capsys):
    size = 100 * MIB
    digest = picture(tmp_path / "photo", size)
    line.rate = 10 * MIB  # so slow that a server on a busy machine keeps up: what it has not read yet is sent twice
    token = served.token("bob")
    headers = {"Authorization": f"Bearer {token}", "Tus-Resumable": "1.0.0"}
    uploading = start_tus_js(tmp_path / "photo", line.port, token)
    upload = until(lambda: list(served.server.client.scan_iter("uploads:{0}:bob")), what="the upload")
    upload = next(iter(served.server.client.hgetall(upload[0])))
    slowest, ways = 0.0, ["rst", "fin", "silence", "rst", "fin"]
    for n in range(50):
        until(lambda: line.up >= (n + 1) * size / 51, 60, "the next part")  # noqa: B023
        line.cut(ways[n % 5])
        if ways[n % 5] == "silence":  # for the server, the old PATCH goes on without sending bytes
            began = time.monotonic()
            assert httpx.head(f"{served.url}/v1/uploads/{upload}", headers=headers).status_code == 200
            slowest = max(slowest, time.monotonic() - began)
    url = wait_for_url(uploading)
    assert hash_stored(served, url) == digest
    with capsys.disabled():
        print(f"\n100 MiB, 50 breaks: {line.up / size - 1:.2%} sent twice; slowest HEAD {slowest * 1000:.0f} ms")
    assert line.up <= 1.05 * size
    assert slowest < 2
