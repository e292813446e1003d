"""A process that hangs is killed, and only such a one."""

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
from conftest import ROOT, RedisServer, Site, photograph, publish, turned, until
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
    """Starts a program that is watched, and then does what is given."""
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
    """By proc(5), status: a mask of the signals that are ignored."""
    mask = int(re.search(r"SigIgn:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())[1], 16)
    return all(mask >> (signum - 1) & 1 for signum in signums)


def gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


SLEEPS = "async def then(): await asyncio.sleep(60)"
HANGS = {
    # The interpreter's lock is held: no thread and no signal handler of Python runs.
    "in C": ("async def then(): re.match('(a+)+$', 'a' * 60 + 'b')", "gave no sign of life for 0.5 s", "in then"),
    "on the loop": ("async def then(): time.sleep(60)", "gave no sign of life for 0.5 s", "in then"),
    "in one piece of work": (
        "def block(): time.sleep(60)\n"
        "async def then():\n  with watchdog.working('shipping'): await asyncio.to_thread(block)",
        "shipping made no step for 2 s",
        "in block",
    ),
}


def test_a_process_that_hangs_says_where_and_is_killed(program):
    started = {where: program(then) for where, (then, *_) in HANGS.items()}
    for where, (_, message, function) in HANGS.items():
        said = started[where].communicate(timeout=10)[1]
        assert started[where].returncode == -signal.SIGKILL, where
        assert message in said and function in said


def test_work_that_makes_steps_is_no_hang(program):
    """Nor does it count in whose thread a step is made. The pause after it is longer than the work may be silent."""
    process = program(
        "def steps():\n  for _ in range(9): time.sleep(0.25); watchdog.step()\n"
        "async def then():\n"
        "  with watchdog.working('work'): await asyncio.to_thread(steps)\n"
        "  await asyncio.sleep(2.2)"
    )
    assert process.communicate(timeout=10)[1] == "" and process.returncode == 0


def test_what_freezes_everything_kills_nothing(program):
    """A laptop that was suspended, `docker pause`."""
    process = program(SLEEPS)
    both = psutil.Process(process.pid), watchdog_of(process.pid)
    for one in both:
        one.suspend()
    time.sleep(3 * LIMIT)
    for one in reversed(both):
        one.resume()
    time.sleep(2 * LIMIT)
    assert process.poll() is None and not gone(both[1])


def test_a_process_that_hangs_is_killed_also_where_nobody_reads_what_is_said(program):
    process = program(SLEEPS)
    watchdog_of(process.pid)
    process.stderr.close()
    psutil.Process(process.pid).suspend()
    assert process.wait(10) == -signal.SIGKILL


def test_a_process_whose_watchdog_is_killed_ends_too(program):
    process = program(SLEEPS)
    watchdog_of(process.pid).kill()
    assert "the watchdog has ended" in process.communicate(timeout=10)[1]
    assert process.returncode == -signal.SIGTERM


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_watchdog_outlives_its_process(program, signum):
    """Even though a fork lives on; and it has nothing of its process but the pipe and stderr."""
    process = program(
        "async def then():\n"
        "  if not (fork := os.fork()): os.close(1); os.close(2); time.sleep(60)\n"
        "  print(fork, flush=True)\n"
        "  await asyncio.sleep(60)",
        limit=30,
    )
    fork, child = psutil.Process(int(process.stdout.readline())), watchdog_of(process.pid)
    until(lambda: ignores(child.pid, signal.SIGTERM, signal.SIGINT, signal.SIGHUP), what="the watchdog")
    assert sorted(int(file) for file in os.listdir(f"/proc/{child.pid}/fd")) == [0, 1, 2]
    assert child.environ() == {}
    for harmless in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # as a service manager or a terminal sends to all
        child.send_signal(harmless)
    process.send_signal(signum)
    process.wait(10)
    assert not gone(fork)
    until(lambda: gone(child), 5, "the watchdog's end")
    fork.kill()


# The real processes

SECONDS = 2  # of the setting


@pytest.fixture
def watched(tmp_path):
    """A whole site with a short limit: API of two processes, worker, shipper, and a Redis of its own."""
    server = RedisServer("valkey")
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "redis").symlink_to(server.folder.name)
    site = Site(server.url, folder, workers=2, watchdog=SECONDS)
    site.server = server
    yield site
    site.close()
    server.close()


def test_each_part_that_hangs_is_killed_and_a_converter_is_replaced(watched):
    pipes = {"stderr": subprocess.PIPE, "text": True}
    api, worker, other = watched.api(**pipes), watched.start("workers", **pipes), watched.start("workers")
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
    began = time.monotonic()
    told = {process: process.communicate(timeout=20)[1] for process in (api, worker, ship)}
    until(lambda: gone(first), 20, "the converter's end")
    assert time.monotonic() - began < 5 * SECONDS  # alone, it is 3 s
    for process, said in told.items():
        assert f"gave no sign of life for {SECONDS} s: it is killed" in said
        assert process.returncode == (1 if process is api else -signal.SIGKILL)
    assert f"ERROR imagegram.api: process {serving[0].pid} was ended by signal 9" in told[api]
    second = until(lambda: family(psutil.Process(other.pid))[1], what="another converter")[0]
    assert second != first
    until(lambda: all(map(gone, watchdogs)), what="the watchdogs' end")
    watched.api()
    with watched.client("alice") as alice:
        turned(alice, publish(alice, photograph()))


def test_a_redis_and_a_store_that_are_away_for_long_are_no_hang(watched):
    """The store takes connections and says nothing; Redis is gone. Longer than work without a step may take."""
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
        said = (watched.folder / "said").open("w+")
        started = [watched.api(stderr=said)]
        started += [watched.start(*part, stderr=said) for part in (("workers",), ("storage", "ship"))]
        until(lambda: watched.server.client.exists("rq:workers"), what="RQ")
        watched.server.kill()
        time.sleep(watchdog.PATIENCE * SECONDS + 1)
        assert [process.poll() for process in started] == [None] * 3
        assert httpx.get(f"{watched.url}/healthz").status_code == 200
        said.seek(0)
        assert "store: Generic S3 error" in (told := said.read()) and "watchdog" not in told
