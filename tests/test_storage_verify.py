"""`verify`: the shipper starts it on schedule and reports its result, and it leaves nothing behind."""

import asyncio
import re
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace

import psutil
import pytest
from conftest import ROOT
from parts import redis_on, shipped, shipping, until

from storage.backup import chain, ship, snapshots
from storage.backup import state as shipper_state
from storage.backup.verify import last_result, verify
from storage.db import server


@pytest.fixture
def daily(settings, monkeypatch):
    """Settings of a shipper that starts `verify` a second after the last one. `verify` reads them as variables."""
    for name, value in {
        "DATA": settings.data,
        "REDIS_SERVER": settings.redis_server,
        "BACKUP_STORE": settings.backup_store_url,
    }.items():
        monkeypatch.setenv(f"IMAGEGRAM_{name}", str(value))
    return replace(settings, verify_every=1)


async def test_verify_is_started_on_schedule_and_its_result_is_reported(daily, backup):
    def reported(ok: bool) -> dict | None:
        proof = shipper_state.read(daily)["verified"]
        return proof if proof and proof["ok"] is ok else None

    async with redis_on(daily) as redis, shipping(daily, backup) as shipper:
        await shipped(shipper)
        first = await until(lambda: reported(True), "a success")
        assert first["good"] == 1 and first["counts"]["flaws"] == 0
        table = snapshots.table(await snapshots.snapshots(backup), shipper_state.read(daily), first)
        assert "0 h ago: generation 1 restored" in table
        again = await until(lambda: (proof := reported(True))["time"] > first["time"] and proof, "another success")
        assert again["time"] >= first["time"] + daily.verify_every
        name = chain.segment_name(1, redis.base(), 0)
        good = await backup.get(name)
        await backup.put(name, good[:-1] + bytes([good[-1] ^ 1]))
        failed = await until(lambda: reported(False), "the flipped bit is detected")
        assert "digest does not hold" in failed["detail"] and failed["good"] == 1
        assert "FAILED: " in snapshots.table([], shipper_state.read(daily), failed)
        await backup.put(name, good)
        await until(lambda: reported(True), "a success with the right byte")
    assert [path.name for path in daily.data.glob("verify-*")] == []


async def test_verify_prints_its_result_and_snapshots_shows_it_at_once(daily, backup):
    def run(name: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "storage", name]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    settings = replace(daily, verify_every=0)
    async with redis_on(settings) as redis, shipping(settings, backup) as shipper:
        await shipped(shipper)
        assert "verified: never" in (await asyncio.to_thread(run, "snapshots")).stdout
        done = await asyncio.to_thread(run, "verify")
        result = r"generation 1 restored up to 20\S+Z \(0 posts, 0 comments, 0 open uploads, 0 flaws\)"
        assert done.returncode == 0 and re.fullmatch(rf"{result}; it took \d+\.\d s", done.stdout.splitlines()[-1])
        table = (await asyncio.to_thread(run, "snapshots")).stdout
        assert shipper_state.read(settings)["verified"] is None  # the shipper has not read the result since
        assert re.fullmatch(rf"verified 20\S+Z, 0 h ago: {result}", table.splitlines()[-1])
        name = chain.segment_name(1, redis.base(), 0)
        good = await backup.get(name)
        await backup.put(name, b"damaged")
        failed = await asyncio.to_thread(run, "verify")
        assert failed.returncode == 1, failed
        assert failed.stderr.splitlines()[-1] == "the newest generation cannot be restored", failed.stderr
        assert re.match(r"FAILED: .*digest does not hold; it took", failed.stdout.splitlines()[-1])
        await backup.put(name, good)
        assert "0 h ago: FAILED: " in (await asyncio.to_thread(run, "snapshots")).stdout


async def test_the_shipper_also_reports_the_result_of_a_verify_that_another_process_ran(settings, backup, monkeypatch):
    monkeypatch.setattr(ship, "RESULT_REFRESH", 0.1)
    async with redis_on(settings), shipping(settings, backup) as shipper:
        await shipped(shipper)
        assert shipper_state.read(settings)["verified"] is None
        assert await verify(settings, backup)
        reported = await until(lambda: shipper_state.read(settings)["verified"], "the result is reported")
        assert reported == await last_result(backup)


async def test_a_verify_that_was_killed_is_not_started_again_at_once(daily, backup, monkeypatch, tmp_path):
    starts = tmp_path / "starts"
    program = tmp_path / "verify"
    program.write_text(f"#!/bin/sh\necho >>{starts}\nexit 137\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    async with redis_on(daily), shipping(daily, backup) as shipper:
        await shipped(shipper)
        await until(lambda: starts.exists() and starts.stat().st_size >= 3, "three starts")
        assert time.time() >= shipper.chain.second + 3 * daily.verify_every
        assert shipper_state.read(daily)["verified"] is None


async def test_verify_ends_with_its_shipper_and_leaves_neither_server_nor_folder(daily, backup, monkeypatch, tmp_path):
    """verify's server takes a minute to load. So verify cannot have ended by itself."""
    program = tmp_path / "slow-server"
    # Microseconds a key. A server notices SIGTERM after each interval of bytes that it loads.
    slow = "--key-load-delay 6000 --loading-process-events-interval-bytes 1024"
    command = f'exec {server.server_program(daily)} "$@"'
    program.write_text(f'#!/bin/sh\n[ "$1" = --version ] || set -- "$@" {slow}\n{command}\n')
    program.chmod(0o755)
    monkeypatch.setenv("IMAGEGRAM_REDIS_SERVER", str(program))
    async with redis_on(daily) as redis:
        await redis.client.eval("for i = 1, 10000 do redis.call('SET', i, i) end", 0)
        shipper = ship.Shipper(daily, backup)
        task = asyncio.ensure_future(shipper.run())
        verify_process = await until(lambda: shipper.trial_process, "verify runs")
        process = psutil.Process(verify_process.pid)

        def servers() -> list[psutil.Process]:
            # redis-server replaces its command line by a title: `… unixsocket:PATH`.
            found = []
            for child in process.children():
                with suppress(psutil.NoSuchProcess):  # it has just ended
                    found += [child] if "unixsocket" in " ".join(child.cmdline()) else []
            return found

        (loading,) = await until(servers, "verify's server runs")
        shipper.stop.set()
        await asyncio.wait_for(task, 20)
        await until(lambda: not loading.is_running(), "verify's server has ended")
        assert not process.is_running()
    assert list(daily.data.glob("verify-*")) == []
    assert await last_result(backup) is None
