"""Restores on trial: begun by the shipper on schedule, their result told, nothing left of one that is stopped."""

import asyncio
import re
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest
from conftest import ROOT
from parts import redis_on, shipped, shipping, until

from storage.backup import chain, ship, snapshots
from storage.backup import state as shipper_state
from storage.backup.verify import last_result, verify


@pytest.fixture
def daily(settings, monkeypatch):
    """The settings of a shipper whose trials begin a second after the last one, for itself and for the trial."""
    for name, value in {
        "DATA": settings.data,
        "REDIS_SERVER": settings.redis_server,
        "BACKUP_STORE": settings.backup_store_url,
    }.items():
        monkeypatch.setenv(f"IMAGEGRAM_{name}", str(value))
    return replace(settings, verify_every=1)


async def test_a_trial_is_begun_on_schedule_and_its_result_is_told(daily, backup):
    def told(ok: bool):
        proof = shipper_state.read(daily)["verified"]
        return proof if proof and proof["ok"] is ok else None

    async with redis_on(daily) as redis, shipping(daily, backup) as shipper:
        await shipped(shipper)
        first = await until(lambda: told(True), "a trial that went well")
        assert first["good"] == 1 and first["counts"]["flaws"] == 0
        table = snapshots.table(await snapshots.snapshots(backup), shipper_state.read(daily), first)
        assert "0 h ago: generation 1 restored" in table
        again = await until(lambda: (proof := told(True))["time"] > first["time"] and proof, "another")
        assert again["time"] >= first["time"] + daily.verify_every
        name = chain.segment_name(1, redis.base(), 0)
        good = await backup.get(name)
        await backup.put(name, good[:-1] + bytes([good[-1] ^ 1]))
        failed = await until(lambda: told(False), "a trial that found the flipped bit")
        assert "digest does not hold" in failed["detail"] and failed["good"] == 1
        assert "FAILED: " in snapshots.table([], shipper_state.read(daily), failed)
        await backup.put(name, good)
        await until(lambda: told(True), "all is well again")
    assert [path.name for path in daily.data.glob("verify-*")] == []


async def test_verify_says_its_result_and_snapshots_show_it_at_once(daily, backup):
    def run(command):
        process = [sys.executable, "-m", "storage", command]
        return subprocess.run(process, cwd=ROOT, capture_output=True, text=True)

    settings = replace(daily, verify_every=0)
    async with redis_on(settings) as redis, shipping(settings, backup) as shipper:
        await shipped(shipper)
        assert "verified: never" in (await asyncio.to_thread(run, "snapshots")).stdout
        done = await asyncio.to_thread(run, "verify")
        result = r"generation 1 restored up to 20\S+Z \(0 posts, 0 comments, 0 open uploads, 0 flaws\)"
        assert done.returncode == 0 and re.fullmatch(rf"{result}; it took \d+\.\d s", done.stdout.splitlines()[-1])
        shown = (await asyncio.to_thread(run, "snapshots")).stdout
        assert shipper_state.read(settings)["verified"] is None  # the shipper has not looked since
        assert re.fullmatch(rf"verified 20\S+Z, 0 h ago: {result}", shown.splitlines()[-1])
        name = chain.segment_name(1, redis.base(), 0)
        good = await backup.get(name)
        await backup.put(name, b"damaged")
        failed = await asyncio.to_thread(run, "verify")
        assert failed.returncode == 1, failed
        assert failed.stderr.splitlines()[-1] == "the newest generation cannot be restored", failed.stderr
        assert re.match(r"FAILED: .*digest does not hold; it took", failed.stdout.splitlines()[-1])
        await backup.put(name, good)
        assert "0 h ago: FAILED: " in (await asyncio.to_thread(run, "snapshots")).stdout


async def test_a_trial_that_another_process_has_done_is_told_too(settings, backup, monkeypatch):
    monkeypatch.setattr(ship, "LOOK_AGAIN", 0.1)
    async with redis_on(settings), shipping(settings, backup) as shipper:
        await shipped(shipper)
        assert shipper_state.read(settings)["verified"] is None
        assert await verify(settings, backup)
        told = await until(lambda: shipper_state.read(settings)["verified"], "its result")
        assert told == await last_result(backup)


async def test_a_trial_that_died_is_not_begun_again_at_once(daily, backup, monkeypatch, tmp_path):
    begun = tmp_path / "begun"
    program = tmp_path / "trial"
    program.write_text(f"#!/bin/sh\necho >>{begun}\nexit 137\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    async with redis_on(daily), shipping(daily, backup) as shipper:
        await shipped(shipper)
        await until(lambda: begun.exists() and begun.stat().st_size >= 3, "three trials")
        assert time.time() >= shipper.chain.second + 3 * daily.verify_every
        assert shipper_state.read(daily)["verified"] is None


async def test_a_trial_ends_with_its_shipper_and_leaves_neither_server_nor_folder(daily, backup):
    async with redis_on(daily) as redis:
        fill = "for i = 1, 300000 do redis.call('SET', i, string.rep('x', 100)) end"  # takes its time to load
        await redis.client.eval(fill, 0)
        shipper = ship.Shipper(daily, backup)
        task = asyncio.ensure_future(shipper.run())
        trial = await until(lambda: shipper.verifying and psutil.Process(shipper.verifying.pid), "a trial")
        (server,) = await until(trial.children, "its server")
        shipper.stop.set()
        await asyncio.wait_for(task, 20)
        await until(lambda: not server.is_running(), "its server's end")
    assert list(daily.data.glob("verify-*")) == []
