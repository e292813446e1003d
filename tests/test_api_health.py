"""/readyz: Redis decides whether the API is ready. The store and the backup are only reported."""

import asyncio
import re
import time
from urllib.parse import urlsplit

import httpx
import pytest
from conftest import SERVERS, run_with_db, running_site, until
from parts import make_settings, redis_on, s3_server, s3_url, shipped, shipping
from parts import until as until_async
from proxy import Proxy

from api import health
from storage.backup.verify import verify
from storage.objects import open_store


def ready(site) -> dict:
    """The report of a site that is ready."""
    answer = httpx.get(f"{site.url}/readyz")
    assert answer.status_code == 200
    return answer.json()


def test_a_site_without_a_shipper_is_ready_and_reports_that_none_has_run(serving):
    assert ready(serving) == {
        "status": "ok",
        "redis": "ok",
        "store": "ok",
        "backup": {"lag": None, "trouble": "no shipper has run here", "verified": None},
    }


def test_a_primary_whose_last_fork_was_slow_is_reported(embedded):
    """A fork takes more than 40 ms only with gigabytes of data. So here every fork counts as slow, or none."""
    for client in embedded.primaries:
        client.bgrewriteaof()
        until(lambda client=client: client.info("stats")["latest_fork_usec"] > 0, what="a fork")

    async def reports(db):
        return await health.redis(db, slow=60), await health.redis(db, slow=0)

    well, slow = run_with_db(embedded, reports)
    assert well == "ok"
    took = r"the last fork( of 127\.0\.0\.1:\d+)? took \d+ ms: see SlowFork in docs/production\.md"
    assert len(re.findall(f"(?:^|; ){took}(?=;|$)", slow)) == len(embedded.primaries), slow


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", ["valkey", "redis"])
async def test_the_report_has_the_lag_of_the_backup_its_trouble_and_the_last_verification(kind, tmp_path):
    settings = make_settings(tmp_path / "data", SERVERS[kind], (tmp_path / "backup").as_uri())
    backups = open_store(settings.backup_store_url)
    async with redis_on(settings) as redis:
        with running_site(redis, settings.data, settings.redis_url) as site:
            async with shipping(settings, backups) as shipper:
                await shipped(shipper)
                backup = ready(site)["backup"]
                assert 0 <= backup["lag"] < 5 and (backup["trouble"], backup["verified"]) == ("", None)

                (tmp_path / "backup").rename(tmp_path / "unplugged")
                (tmp_path / "backup").touch()
                await shipper.redis.set("a", "write")
                unplugged = time.time()
                trouble = await until_async(lambda: ready(site)["backup"]["trouble"], "the report of the trouble")
                assert trouble.startswith("store: ") and "Not a directory" in trouble
                await until_async(lambda: ready(site)["backup"]["lag"] > time.time() - unplugged, "a lag that grows")
                (tmp_path / "backup").unlink()
                (tmp_path / "unplugged").rename(tmp_path / "backup")
                await until_async(lambda: not ready(site)["backup"]["trouble"], "the end of the trouble")
            assert await verify(settings, backups)
            async with shipping(settings, backups) as shipper:
                await shipped(shipper)
                verified = await until_async(lambda: ready(site)["backup"]["verified"], "the verification's report")
            assert verified["ok"] and (verified["flaws"], verified["detail"]) == (0, "")
            assert verified["at"].startswith(time.strftime("%Y-%m-%d", time.gmtime()))
            before = ready(site)["backup"]["lag"]
            until(lambda: ready(site)["backup"]["lag"] > before + 0.2, what="a lag that grows after the shipper ended")


def test_a_store_that_is_missing_or_silent_is_reported_within_a_second(embedded, tmp_path, monkeypatch):
    url = s3_url(monkeypatch)
    with Proxy(urlsplit(s3_server()).port) as line:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{line.port}")
        with running_site(embedded, tmp_path, store=url) as site:
            assert ready(site)["store"] == "ok"
            line.delay = 10.0

            def seconds() -> float:
                began = time.monotonic()
                assert ready(site)["store"] == "no answer in 1 s"
                return time.monotonic() - began

            until(lambda: seconds() < 1.3, what="an answer in time, also on a machine with other work")
        with running_site(embedded, tmp_path, store="s3://a-bucket-that-does-not-exist") as site:
            line.delay = 0.0
            until(lambda: "NoSuchBucket" in ready(site)["store"], what="the store's reason")


def test_a_store_whose_folder_is_missing_is_reported_and_its_next_put_creates_it(embedded, tmp_path):
    with running_site(embedded, tmp_path) as site:
        assert ready(site)["store"] == "ok"
        (tmp_path / "store").rmdir()
        assert "No such file or directory" in ready(site)["store"]
        asyncio.run(site.open_store().put("a", b"back"))
        assert ready(site)["store"] == "ok"
