"""The numbers that Prometheus reads are exact, bounded, and there when Redis is away."""

import asyncio
import os
import time
from random import Random

import httpx
from conftest import (
    NOBODY,
    RedisServer,
    create_post,
    free_port,
    gather_limited,
    photograph,
    run_with_db,
    running_site,
    until,
    wait_until_processed,
)
from making import make_processing
from scraping import Scrape
from uploading import BODY, begin, offset, patch_head, picture
from wire import Line, dial, exchange, head, hear, request

from storage import keys, metrics, uploads
from storage.settings import DAY_MS

REQUESTS, SECONDS = "imagegram_requests_total", "imagegram_request_duration_seconds"


async def test_requests_to_three_processes_are_counted_exactly_until_the_api_starts_again(embedded, tmp_path):
    """Each connection goes to one process, so 30 of them reach all three."""
    embedded.client.flushall()
    with running_site(embedded, tmp_path, workers=3, limits="comment=30/h") as site:
        await count_on_three_processes(site)
        comment = request("POST", f"/v1/posts/{NOBODY}/comments", site.token("alice"), b'{"text": "One too many"}')
        assert [exchange(site.port, comment).status for _ in range(2)] == [429, 429]
        assert Scrape(site.url)("imagegram_limited_requests_total", **{"class": "comment"}) == 2
        api = site.processes.pop()
        api.terminate()
        await asyncio.to_thread(api.wait, 15)
        site.api()
        scrape = Scrape(site.url)
        assert {sample.labels["route"] for sample in scrape.samples if sample.name == REQUESTS} == {"/readyz"}


async def count_on_three_processes(several) -> None:

    async def client(number: int) -> None:
        async with Line(several.port, several.token("alice")) as line:
            for _ in range(10):
                assert (await line.ask("GET", f"/v1/posts?limit={number % 5 + 1}")).status == 200
                assert (await line.ask("GET", f"/v1/posts/{NOBODY}")).status == 404
            assert (await line.ask("POST", f"/v1/posts/{NOBODY}/comments", {"text": "Hello"})).status == 404

    await gather_limited(10, [client(number) for number in range(30)])
    scrapes = [await asyncio.to_thread(Scrape, several.url) for _ in range(5)]
    for scrape in scrapes:  # whichever process answers
        assert scrape(REQUESTS, route="/v1/posts", method="GET", status="200") == 300
        assert scrape(REQUESTS, route="/v1/posts/{post}", method="GET", status="404") == 300
        assert scrape(REQUESTS, route="/v1/posts/{post}/comments", method="POST", status="404") == 30
        assert scrape(f"{SECONDS}_count", route="/v1/posts", method="GET") == 300
        assert scrape(f"{SECONDS}_bucket", route="/v1/posts", method="GET", le="+Inf") == 300
        assert 0 < scrape(f"{SECONDS}_sum", route="/v1/posts", method="GET") < 60
        assert scrape("imagegram_problems_total", code="nopost") == 330
        assert scrape("imagegram_flight_requests_total") == 600
        assert 300 <= scrape("imagegram_flights_total") <= 600
        assert scrape("imagegram_redis_pipeline_commands_sum", channel="writes") >= 30
        assert scrape("imagegram_redis_round_trip_seconds_sum", channel="writes") > 0
    assert scrapes[-1](REQUESTS, route="/metrics") == 4, "the answer that is being made is not counted yet"


async def test_no_path_and_no_method_makes_a_new_series(serving):
    random = Random(4)
    word = "".join(random.choices("abcdefghijklmnopqrstuvwxyz", k=12))
    before = len(Scrape(serving.url).samples)

    def send(number: int):
        method = f"{word.upper()}{number}" if number % 2 else "GET"
        return exchange(serving.port, head(method, f"/v1/{word}{number}?{word}={number}"))

    answers = [await asyncio.to_thread(send, number) for number in range(60)]
    assert {answer.status for answer in answers} == {404}
    for number in range(60):
        assert exchange(serving.port, head("GET", f"/v1/posts/{word}{number}")).status == 404
        assert exchange(serving.port, head(f"{word}{number}", "/v1/posts")).status == 405
        assert exchange(serving.port, b"no sense\r\n\r\n").status == 400
    scrape = Scrape(serving.url)
    assert scrape(REQUESTS, route="/v1/posts/{post}", status="404") == 60
    assert scrape(REQUESTS, route="-", method="GET", status="404") == 30
    assert scrape(REQUESTS, route="-", method="-", status="404") == 30
    assert scrape(REQUESTS, route="-", method="-", status="405") == 60
    assert scrape(REQUESTS, route="-", method="-", status="400") == 60
    assert len(scrape.samples) < before + 60, "ten answers, two codes and two histograms"
    assert word not in str(scrape.samples).lower()


async def test_a_request_whose_client_has_gone_is_counted_as_499(serving, empty):
    upload = await asyncio.to_thread(begin, serving, 1000)
    with dial(serving.port) as line:
        line.sendall(patch_head(serving, upload, 0, "Content-Length: 1000") + picture(500))
    gone = {"route": "/v1/uploads/{upload}", "method": "PATCH", "status": "499"}
    await asyncio.to_thread(until, lambda: any(s.labels == gone for s in Scrape(serving.url).samples), what="the count")
    assert offset(serving, upload) == 500


async def test_a_request_that_waits_is_counted_while_it_does_and_its_wait_is_no_delay(serving, empty):
    post = await asyncio.to_thread(run_with_db, serving.server, lambda db: make_processing(db, "alice"))
    assert exchange(serving.port, head("GET", f"/v1/posts/{post}")).status == 200
    before = Scrape(serving.url)
    with dial(serving.port) as line:
        line.sendall(head("GET", f"/v1/posts/{post}", "Prefer: wait=2"))
        await asyncio.to_thread(until, lambda: Scrape(serving.url)("imagegram_requests_waiting") == 1, what="the wait")
        assert (await asyncio.to_thread(hear, line)).status == 200
    gone = {"route": "/v1/posts/{post}", "method": "GET", "status": "499"}
    with dial(serving.port) as line:
        line.sendall(head("GET", f"/v1/posts/{post}", "Prefer: wait=20"))
        await asyncio.to_thread(until, lambda: Scrape(serving.url)("imagegram_requests_waiting") == 1, what="the wait")
        await asyncio.sleep(1)  # of the wait, before its client goes away
    await asyncio.to_thread(until, lambda: any(s.labels == gone for s in Scrape(serving.url).samples), what="the count")
    after = Scrape(serving.url)
    assert after("imagegram_requests_waiting") == 0
    route = {"route": "/v1/posts/{post}", "method": "GET"}
    assert after(f"{SECONDS}_sum", **route) - before(f"{SECONDS}_sum", **route) < 1


async def test_a_json_body_that_comes_late_is_no_delay(serving, empty):
    """Otherwise the alert `Slow` would wake somebody because clients have slow lines."""
    comment = request("POST", f"/v1/posts/{NOBODY}/comments", serving.token("alice"), b'{"text": "Late"}')
    assert exchange(serving.port, comment).status == 404
    before = Scrape(serving.url)
    with dial(serving.port) as line:
        line.sendall(comment[:-8])
        time.sleep(0.2)  # the line's time, which is what is measured
        line.sendall(comment[-8:])
        assert (await asyncio.to_thread(hear, line)).status == 404
    after, route = Scrape(serving.url), {"route": "/v1/posts/{post}/comments", "method": "POST"}
    assert after(f"{SECONDS}_count", **route) - before(f"{SECONDS}_count", **route) == 1
    assert after(f"{SECONDS}_sum", **route) - before(f"{SECONDS}_sum", **route) < 0.2


async def test_uploads_are_counted_as_they_are_opened_resumed_finished_and_dropped(serving, empty):
    event, stored = "imagegram_uploads_total", "imagegram_upload_bytes_total"
    before = Scrape(serving.url)
    image = picture(1000)
    first = await asyncio.to_thread(begin, serving, 1000)
    for start, end in ((0, 400), (400, 1000)):
        sent = patch_head(serving, first, start, f"Content-Length: {end - start}") + image[start:end]
        assert exchange(serving.port, sent).status == 204
    with serving.client("alice") as alice:
        assert alice.post("/v1/posts", json={"upload": first}).status_code == 201
        second = await asyncio.to_thread(begin, serving, 50, "alice", BODY, "[image]", image=picture(50))
        assert alice.delete(f"/v1/uploads/{second}", headers={"Tus-Resumable": "1.0.0"}).status_code == 204
        after = Scrape(serving.url)
        changes = {
            name: after(event, event=name) - before(event, event=name)
            for name in ("opened", "resumed", "finished", "dropped", "expired")
        }
    assert changes == {"opened": 2, "resumed": 1, "finished": 1, "dropped": 1, "expired": 0}
    assert after(stored) - before(stored) == 1050


async def test_open_uploads_and_work_that_waits_are_read_from_redis(serving, empty):
    """There is no worker, so the work of an hour ago still waits."""

    async def leave_work(db):
        await uploads.create(db, "alice", 1, 500)
        db.clock = int(time.time() * 1000) - 3_600_000
        await make_processing(db, "bob")
        await make_processing(db, "carol")
        dropped, _ = await uploads.create(db, "carol", 1, 500)
        await uploads.drop(db, "carol", dropped)
        serving.server.client.zadd(keys.sealing(0), {NOBODY: db.clock})

    await asyncio.to_thread(run_with_db, serving.server, leave_work)
    scrape = Scrape(serving.url)
    assert scrape("imagegram_redis_up") == 1
    assert scrape("imagegram_uploads_open") == 1
    assert scrape("imagegram_work_waiting", queue="images") == 2
    assert 3600 <= scrape("imagegram_work_oldest_seconds", queue="images") < 3660
    assert scrape("imagegram_work_waiting", queue="cleanup") == 1
    assert 3540 <= scrape("imagegram_work_oldest_seconds", queue="cleanup") < 3600
    assert scrape("imagegram_work_waiting", queue="comments") == 1
    assert 3600 <= scrape("imagegram_work_oldest_seconds", queue="comments") < 3660
    infos = [client.info("memory") for client in serving.server.primaries]
    assert 0.5 < scrape("imagegram_redis_memory_bytes") / sum(info["used_memory"] for info in infos) < 2
    limits = [info["maxmemory"] or info["total_system_memory"] for info in infos]
    assert scrape("imagegram_redis_memory_limit_bytes") == sum(limits)
    assert scrape("imagegram_redis_aof_ok") == len(infos)
    forks = sum(client.info("stats")["latest_fork_usec"] for client in serving.server.primaries)
    assert abs(scrape("imagegram_redis_fork_seconds") * 1e6 - forks) < 1
    assert 0 < scrape("imagegram_store_free_bytes") < scrape("imagegram_store_size_bytes")


def test_without_redis_a_scrape_answers_what_it_knows(tmp_path):
    server = RedisServer("valkey")
    try:
        with running_site(server, tmp_path) as site:
            assert "imagegram_redis_memory_bytes" in Scrape(site.url)
            server.client.execute_command("ACL", "SETUSER", "default", "-info")
            scrape = Scrape(site.url)
            assert scrape("imagegram_redis_up") == 1 and scrape("imagegram_work_waiting") == 0
            assert "imagegram_redis_memory_bytes" not in scrape, "this user may not ask"
            assert httpx.get(f"{site.url}/readyz").json()["redis"] == "ok", "it does not know of slow forks"
            server.kill()
            assert httpx.get(f"{site.url}/v1/posts").status_code == 503
            scrape = Scrape(site.url)
            assert scrape("imagegram_redis_up") == 0
            assert scrape(REQUESTS, route="/v1/posts", status="503") == 1
            for name in ("redis_memory_bytes", "redis_aof_ok", "uploads_open", "work_waiting", "work_oldest_seconds"):
                assert f"imagegram_{name}" not in scrape
            server.start()
            assert until(lambda: Scrape(site.url)("imagegram_redis_up") == 1, what="Redis in a scrape")
    finally:
        server.close()


def test_a_disk_that_hangs_delays_a_scrape_and_no_other_request(serving):
    """A pipe in the place of the shipper's file: reading it takes until the test has written."""
    file = serving.folder / "shipping.json"
    os.mkfifo(file)
    try:
        with dial(serving.port) as line, dial(serving.port) as other:
            line.sendall(head("GET", "/metrics"))
            # Fails until the API has opened the pipe
            pipe = until(lambda: os.open(file, os.O_WRONLY | os.O_NONBLOCK), what="the scrape")
            try:
                other.settimeout(5)
                other.sendall(head("GET", "/healthz"))
                assert hear(other).status == 200
                os.write(pipe, b'{"caught": 1, "generation": 1, "trouble": "", "verified": null}')
            finally:
                os.close(pipe)
            assert b"imagegram_backup_lag_seconds" in hear(line).body
    finally:
        file.unlink()


def test_a_worker_counts_images_and_the_uploads_that_it_ends_and_a_second_one_with_its_port_works(embedded, tmp_path):
    images = "imagegram_images_total"
    embedded.client.flushall()
    worker = f"http://127.0.0.1:{(port := free_port())}"

    async def leave_an_old_upload(db):
        db.clock = int(time.time() * 1000) - 2 * DAY_MS
        await uploads.create(db, "alice", 1, 500)

    with running_site(embedded, tmp_path, worker_metrics=port) as site, site.client("alice") as alice:
        run_with_db(embedded, leave_an_old_upload)
        first = site.worker()
        for _ in range(2):
            assert wait_until_processed(alice, create_post(alice, photograph()))["status"] == "ready"
        assert wait_until_processed(alice, create_post(alice, picture(1000)))["status"] == "failed"
        until(lambda: Scrape(worker)("imagegram_uploads_total", event="expired") == 1, what="the end of the upload")
        until(lambda: Scrape(worker)(images, outcome="failed") == 1, what="the count of the failure")
        scrape = Scrape(worker)
        outcomes = {sample.labels["outcome"]: sample.value for sample in scrape.samples if sample.name == images}
        assert outcomes == {"ready": 2, "failed": 1, "returned": 0, "skipped": 0, "died": 0, "exhausted": 0}
        assert scrape("imagegram_image_ready_seconds_count") == 2
        assert 0 < scrape("imagegram_image_ready_seconds_sum") < 60
        assert REQUESTS not in scrape, "that is the API's"

        second = site.start("workers", stderr=-1, text=True)
        assert any(f"no metrics at 127.0.0.1:{port}: " in line for line in second.stderr)
        first.terminate()
        assert wait_until_processed(alice, create_post(alice, photograph()))["status"] == "ready"


def test_the_shipper_reports_its_lag_and_counts_what_it_ships(embedded, tmp_path):
    embedded.client.flushall()
    url = f"http://127.0.0.1:{(port := free_port())}"
    with running_site(embedded, tmp_path, ship_metrics=f"127.0.0.1:{port}") as site:
        assert "imagegram_backup_lag_seconds" not in Scrape(site.url)
        site.shipper(embedded)
        scrape = until(lambda: "imagegram_backup_lag_seconds" in (now := Scrape(url)) and now, what="the shipper")
        assert 0 <= scrape("imagegram_backup_lag_seconds") < 10
        files = [path for path in (tmp_path / "backup").rglob("*") if path.is_file()]
        assert 2 <= scrape("imagegram_backup_objects_total") <= len(files)
        assert scrape("imagegram_backup_bytes_total") <= sum(path.stat().st_size for path in files)
        assert 0 <= Scrape(site.url)("imagegram_backup_lag_seconds") < 10, "the API reads it, too"


def test_a_slice_that_is_full_stays_whole():
    """The numbers of further series are lost. Label values are bounded, so this takes a mistake in the code."""
    piece = metrics.Slice(memoryview(bytearray(512)))
    for number in range(100):
        cells, at = piece.find(f"series {number}".encode(), 3)
        cells[at] += number
    counted = dict(piece.numbers())
    assert 5 < len(counted) < 20
    assert counted == {f"series {number}".encode(): [float(number), 0.0, 0.0] for number in range(len(counted))}


def test_a_process_goes_on_where_one_before_it_in_the_same_slice_has_ended():
    """As the jobs of a converter do, each a fork of its own."""
    memory = memoryview(bytearray(4096))
    first, second = metrics.Slice(memory), metrics.Slice(memory)
    for piece, key in ((first, b"a"), (second, b"b"), (first, b"b"), (first, b"a"), (second, b"a")):
        cells, at = piece.find(key, 1)
        cells[at] += 1
    assert dict(second.numbers()) == {b"a": [3.0], b"b": [2.0]}
