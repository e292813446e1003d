"""The watchdog kills a process that hangs, and no other."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest
from conftest import ROOT, RedisServer, Site, create_post, photograph, until, wait_until_processed
from drills.images import family

from storage import watchdog

PROGRAM = """
import asyncio, os, re, time
from storage import watchdog

def beat(loop): watchdog.start({limit}); watchdog.watch_loop(loop)
async def main(): beat(asyncio.get_running_loop()); print(os.getpid(), flush=True); await then()
{then}
asyncio.run(main())
"""
LIMIT = 0.5  # seconds


@pytest.fixture
def program():
    """Starts a program under a watchdog. It then runs the coroutine function `then` of the text it is given."""
    started = []

    def start(then: str, limit: float = LIMIT) -> subprocess.Popen:
        text = PROGRAM.format(then=then, limit=limit)
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", text], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
        assert started[-1].stdout.readline() == f"{started[-1].pid}\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def watchdog_of(pid: int) -> psutil.Process | None:
    return next((child for child in psutil.Process(pid).children() if watchdog.__file__ in child.cmdline()), None)


def ignores(pid: int, *signums: int) -> bool:
    """Whether a process ignores these signals: `SigIgn` in /proc/<pid>/status is a mask of them, see proc(5)."""
    mask = int(re.search(r"SigIgn:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())[1], 16)
    return all(mask >> (signum - 1) & 1 for signum in signums)


def ended(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def waits(process: psutil.Process) -> int:
    """How often a process has waited for something, since its start."""
    return process.num_ctx_switches().voluntary


SLEEPS = "async def then(): await asyncio.sleep(60)"
HANGS = {
    # `re` holds the interpreter's lock: no other thread and no signal handler of Python runs.
    "in C": ("async def then(): re.match('(a+)+$', 'a' * 60 + 'b')", "gave no sign of life for 0.5 s", "in then"),
    "on the loop": ("async def then(): time.sleep(60)", "gave no sign of life for 0.5 s", "in then"),
    "in a thread that works": (
        "def block(): time.sleep(60)\n"
        "async def then():\n  with watchdog.working('shipping'): await asyncio.to_thread(block)",
        "shipping made no step for 2 s",
        "in block",
    ),
}


def test_a_process_that_hangs_says_where_and_is_killed(program):
    started = {where: program(then) for where, (then, *_) in HANGS.items()}
    for where, (_, message, function) in HANGS.items():
        log = started[where].communicate(timeout=30)[1]
        assert started[where].returncode == -signal.SIGKILL, where
        assert message in log and function in log


def test_work_that_makes_steps_is_not_killed(program):
    """The work takes 2.25 s and may be silent for 2 s. A thread makes its steps. The pause after it is no work."""
    process = program(
        "def steps():\n  for _ in range(9): time.sleep(0.25); watchdog.step()\n"
        "async def then():\n"
        "  with watchdog.working('work'): await asyncio.to_thread(steps)\n"
        "  await asyncio.sleep(2.2)"
    )
    assert process.communicate(timeout=30)[1] == "" and process.returncode == 0


def test_a_process_that_was_frozen_with_its_watchdog_is_not_killed(program):
    """As on a laptop that was suspended, or by `docker pause`."""
    process = program(SLEEPS)
    frozen = psutil.Process(process.pid), watchdog_of(process.pid)
    until(lambda: waits(frozen[1]) > watchdog.WAITS, what="the watchdog waits for signs of life")
    for one in frozen:
        one.suspend()
    time.sleep(3 * LIMIT)  # the time itself is what is tested: it is longer than the limit
    before = waits(frozen[1])
    for one in reversed(frozen):
        one.resume()
    # Twice the number of waits that would be enough to kill.
    until(lambda: ended(frozen[1]) or waits(frozen[1]) > before + 2 * watchdog.WAITS, what="more waits")
    assert process.poll() is None and not ended(frozen[1])


def test_a_process_that_hangs_is_killed_also_where_nobody_reads_its_stderr(program):
    process = program(SLEEPS)
    process.stderr.close()
    psutil.Process(process.pid).suspend()
    assert process.wait(30) == -signal.SIGKILL


def test_a_process_whose_watchdog_is_killed_ends_too(program):
    process = program(SLEEPS)
    watchdog_of(process.pid).kill()
    assert "the watchdog has ended" in process.communicate(timeout=30)[1]
    assert process.returncode == -signal.SIGTERM


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_watchdog_outlives_its_process(program, signum):
    """Even where a fork of the process lives on. The watchdog has only the pipe and stderr of its process."""
    process = program(
        "async def then():\n"
        "  if not (fork := os.fork()): os.close(1); os.close(2); time.sleep(60)\n"
        "  print(fork, flush=True)\n"
        "  await asyncio.sleep(60)",
        limit=30,
    )
    fork = psutil.Process(int(process.stdout.readline()))
    child = until(lambda: watchdog_of(process.pid), what="the watchdog, which may still be starting")
    until(lambda: ignores(child.pid, signal.SIGTERM, signal.SIGINT, signal.SIGHUP), what="the watchdog")
    assert sorted(int(file) for file in os.listdir(f"/proc/{child.pid}/fd")) == [0, 1, 2]
    assert child.environ() == {}
    for ignored in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # a service manager or a terminal signals all
        child.send_signal(ignored)
    process.send_signal(signum)
    process.wait(30)
    assert not ended(fork)
    until(lambda: ended(child), what="the watchdog has ended")
    fork.kill()


# The real processes

SECONDS = 2  # the setting IMAGEGRAM_WATCHDOG


@pytest.fixture
def watched(tmp_path):
    """A site with a limit of SECONDS, an API of two processes, and a Redis of its own. The tests start the parts."""
    server = RedisServer("valkey")
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "redis").symlink_to(server.folder.name)
    site = Site(server.url, folder, workers=2, watchdog=SECONDS)
    site.server = server
    yield site
    site.close()
    server.close()


def test_each_part_that_hangs_is_killed_and_its_worker_replaces_a_converter(watched):
    pipes = {"stderr": subprocess.PIPE, "text": True}
    api = watched.api(**pipes)
    worker, other = watched.start("workers", **pipes), watched.start("workers")
    ship = watched.start("storage", "ship", **pipes)
    first = until(lambda: family(psutil.Process(other.pid))[1], what="the converter")[0]
    for process in (worker.pid, ship.pid, first.pid):
        until(lambda process=process: watchdog_of(process), what="its watchdog")
    until(lambda: (watched.folder / "shipping.json").exists(), what="the shipper")
    watchdogs = [watchdog_of(process) for process in (worker.pid, ship.pid, first.pid)]
    serving = [child for child in psutil.Process(api.pid).children() if "api" in child.cmdline()]
    watchdogs += [watchdog_of(process.pid) for process in serving]
    for process in (serving[0], psutil.Process(worker.pid), psutil.Process(ship.pid), first):
        process.suspend()
    logs = {process: process.communicate(timeout=30)[1] for process in (api, worker, ship)}
    until(lambda: ended(first), what="the converter has ended")
    for process, log in logs.items():
        assert f"gave no sign of life for {SECONDS} s: it is killed" in log
        assert process.returncode == (1 if process is api else -signal.SIGKILL)
    assert f"ERROR imagegram.api: process {serving[0].pid} was ended by signal 9" in logs[api]
    second = until(lambda: family(psutil.Process(other.pid))[1], what="another converter")[0]
    assert second != first
    until(lambda: all(map(ended, watchdogs)), what="the watchdogs have ended")
    watched.api()
    with watched.client("alice") as alice:
        wait_until_processed(alice, create_post(alice, photograph()))


def test_no_part_is_killed_while_redis_and_the_store_are_away_for_long(watched):
    """The backup store accepts connections and answers nothing; Redis is killed. Work without a step may take 8 s."""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as silent:
        watched.environment.update(
            {
                "AWS_ENDPOINT_URL": f"http://127.0.0.1:{silent.getsockname()[1]}",
                "AWS_ALLOW_HTTP": "true",
                "AWS_REGION": "us-east-1",
                "AWS_ACCESS_KEY_ID": "test",
                "AWS_SECRET_ACCESS_KEY": "test",
                "IMAGEGRAM_BACKUP_STORE": "s3://bucket",
            }
        )
        log = watched.folder / "log"
        with log.open("w") as stderr:
            started = [watched.api(stderr=stderr)]
            started += [watched.start(*part, stderr=stderr) for part in (("workers",), ("storage", "ship"))]
        until(lambda: watched.server.client.exists("rq:workers"), what="RQ")
        watched.server.kill()
        time.sleep(watchdog.PATIENCE * SECONDS + 1)  # the time itself is what is tested: it is longer than the limit
        until(lambda: "store: Generic S3 error" in log.read_text(), 60.0, "the shipper's error")
        assert [process.poll() for process in started] == [None] * 3
        assert httpx.get(f"{watched.url}/healthz").status_code == 200
        assert "watchdog" not in log.read_text()
