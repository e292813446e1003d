"""Whether it can serve: Redis decides, the store and the backup are reported beside it."""

import asyncio
import time
from contextlib import contextmanager
from urllib.parse import urlsplit

import httpx
import pytest
from conftest import SERVERS, Site, until
from parts import make_settings, redis_on, s3_server, s3_url, shipped, shipping
from parts import until as until_soon
from proxy import Proxy

from storage.backup.verify import verify
from storage.objects import open_store


@contextmanager
def sited(redis_url: str, folder, **settings):
    site = Site(redis_url, folder, **settings)
    try:
        site.api()
        yield site
    finally:
        site.close()


def ready(site) -> dict:
    answer = httpx.get(f"{site.url}/readyz")
    assert answer.status_code == 200
    return answer.json()


def test_a_site_that_nobody_backs_up_says_so_and_serves(serving):
    assert ready(serving) == {
        "status": "ok",
        "redis": "ok",
        "store": "ok",
        "backup": {"lag": None, "trouble": "no shipper has run here", "verified": None},
    }


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", ["valkey", "redis"])
async def test_it_tells_how_far_the_backup_is_what_troubles_it_and_what_was_proved(kind, tmp_path):
    settings = make_settings(tmp_path / "data", SERVERS[kind], (tmp_path / "backup").as_uri())
    backups = open_store(settings.backup_store_url)
    async with redis_on(settings):
        with sited(settings.redis_url, settings.data) as site:
            async with shipping(settings, backups) as shipper:
                await shipped(shipper)
                told = ready(site)["backup"]
                assert 0 <= told["lag"] < 5 and (told["trouble"], told["verified"]) == ("", None)

                (tmp_path / "backup").rename(tmp_path / "unplugged")
                (tmp_path / "backup").touch()
                await shipper.redis.set("a", "write")
                away = time.time()
                told = await until_soon(lambda: (b := ready(site)["backup"])["trouble"] and b, "the trouble")
                assert told["trouble"].startswith("store: ") and "Not a directory" in told["trouble"]
                await until_soon(lambda: ready(site)["backup"]["lag"] > time.time() - away, "a lag that grows")
                (tmp_path / "backup").unlink()
                (tmp_path / "unplugged").rename(tmp_path / "backup")
                await until_soon(lambda: not ready(site)["backup"]["trouble"], "all is well again")
            assert await verify(settings, backups)
            async with shipping(settings, backups) as shipper:
                await shipped(shipper)
                told = await until_soon(lambda: ready(site)["backup"]["verified"], "the proof")
            assert told["ok"] and (told["flaws"], told["detail"]) == (0, "")
            assert told["at"].startswith(time.strftime("%Y-%m-%d", time.gmtime()))
            before = ready(site)["backup"]["lag"]
            until(lambda: ready(site)["backup"]["lag"] > before + 0.2, what="the lag of a shipper that has ended")


def test_a_store_that_is_gone_or_silent_is_told_within_a_second_and_does_not_decide(embedded, tmp_path, monkeypatch):
    url = s3_url(monkeypatch)
    with Proxy(urlsplit(s3_server()).port) as line:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{line.port}")
        with sited(embedded.url, tmp_path, store=url) as site:
            assert ready(site)["store"] == "ok"
            line.delay = 10.0
            began = time.monotonic()
            assert ready(site)["store"] == "no answer in 1 s"
            assert time.monotonic() - began < 1.3
        with sited(embedded.url, tmp_path, store="s3://nobody-made-this-bucket") as site:
            line.delay = 0.0
            assert "NoSuchBucket" in ready(site)["store"]


def test_a_folder_that_is_gone_is_told(embedded, tmp_path):
    with sited(embedded.url, tmp_path) as site:
        assert ready(site)["store"] == "ok"
        (tmp_path / "store").rmdir()
        assert "No such file or directory" in ready(site)["store"]
        asyncio.run(open_store((tmp_path / "store").as_uri()).put("a", b"back"))
        assert ready(site)["store"] == "ok"
