"""`imagegram-worker`, or `python -m workers`: a dispatcher and the RQ workers that make images.

`imagegram-worker convert PARENT` is one such RQ worker, which ends with the process of that id.
"""

import argparse
import asyncio
import logging
import os
import signal
import sys
import time
from contextlib import suppress

import redis
from rq import Worker
from rq.serializers import JSONSerializer

from storage import logs, settings, watchdog
from storage.db.client import Redis
from storage.objects import require_stores
from storage.processes import die_with_parent, end_after
from workers import dispatcher, pipeline, sandbox

WARM = 2.0  # seconds a conversion under way has at the end; cut off, it only costs an attempt
AGAIN = 1.0  # seconds after which an RQ worker that ended is replaced, and asks again for a Redis that is away
WAIT = 5  # seconds RQ waits for a job, or for its end, before it gives a sign of life. RQ's defaults are 405 and 30

log = logging.getLogger("imagegram.worker")


class Converter(Worker):
    """RQ's worker, whose forks die with it, and which gives signs of life while it waits for a job or for its end."""

    max_connection_wait_time = AGAIN  # it would double to 60

    def fork_work_horse(self, job, queue):
        sandbox.fork_server()  # here, so that all jobs inherit the same one; a job would start its own, 0.2 s later
        super().fork_work_horse(job, queue)

    def main_work_horse(self, job, queue):
        die_with_parent(signal.SIGKILL, self.pid)
        super().main_work_horse(job, queue)

    def heartbeat(self, timeout=None, pipeline=None):
        watchdog.alive()
        super().heartbeat(timeout, pipeline)

    def maintain_heartbeats(self, job, execution):
        with suppress(redis.RedisError):  # away for a moment, it would end the job that is under way
            super().maintain_heartbeats(job, execution)


def convert(chosen: settings.Settings, parent: int) -> None:
    """Run one RQ worker. One queue: RQ then moves a job atomically, and a crash does not lose it."""
    die_with_parent(signal.SIGTERM, parent)
    os.nice(10)  # answers come first: a picture may wait, a reader not
    import workers.jobs  # noqa: F401  before the fork, so that no job pays for it

    watchdog.start(chosen.watchdog)
    queue = dispatcher.queue(chosen.queue_url)
    # RQ asks for its own address, which redis-py cannot parse if the path of the socket has a blank or `=` in it.
    queue.connection.set_response_callback("CLIENT INFO", lambda reply, **options: {"addr": "unknown"})
    await_redis(queue.connection)
    wait = max(1, min(WAIT, chosen.watchdog // 6)) if chosen.watchdog else WAIT
    try:
        worker = Converter(
            [queue],
            connection=queue.connection,
            serializer=JSONSerializer,
            worker_ttl=wait + 15,  # RQ takes 15 of them off, and waits 10 more for a Redis that says nothing
            job_monitoring_interval=wait,
        )
        worker.work(logging_level="WARNING")
    except redis.RedisError as error:
        raise SystemExit(f"converter: {error}") from None


def await_redis(connection: redis.Redis) -> None:
    """RQ's worker would end at once, and starting it again and again would take a core."""
    while True:
        watchdog.alive()
        try:
            connection.ping()
            return
        except redis.RedisError as error:
            log.warning("waits: %s", error)
            time.sleep(AGAIN)


async def converting() -> None:
    """Keep one RQ worker at work, until cancelled.

    It is replaced where it ends by itself: RQ's does when Redis goes away at certain moments, as after a job.
    """
    while True:
        command = (sys.executable, *sys.orig_argv[1:], "convert", str(os.getpid()))
        converter = await asyncio.create_subprocess_exec(*command, start_new_session=True)
        try:
            await converter.wait()
        finally:
            await _end(converter)
        log.warning("a converter ended with %s, another takes its place", converter.returncode)
        await asyncio.sleep(AGAIN)


async def _end(converter: asyncio.subprocess.Process) -> None:
    for wait in (WARM, 1.0):  # RQ ends after the job at the first signal, at once at the second
        with suppress(ProcessLookupError, TimeoutError):
            converter.terminate()
            await asyncio.wait_for(converter.wait(), wait)
    with suppress(ProcessLookupError):
        converter.kill()


async def work(chosen: settings.Settings) -> int:
    """Run everything; the exit status once it ended."""
    stopped = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stopped.set)
    watchdog.start(chosen.watchdog)
    watchdog.watch_loop(asyncio.get_running_loop())
    db, hints = Redis(chosen.redis_url), dispatcher.queue(chosen.queue_url)
    parts = [asyncio.create_task(converting()) for _ in range(chosen.converters)]
    parts.append(asyncio.create_task(dispatcher.dispatch(db, chosen, hints)))
    log.info("converters: %d", chosen.converters)
    await asyncio.wait([asyncio.create_task(stopped.wait()), *parts], return_when=asyncio.FIRST_COMPLETED)
    for part in parts:
        part.cancel()
    for fault in await asyncio.gather(*parts, return_exceptions=True):
        if not isinstance(fault, asyncio.CancelledError):
            log.error("ends: %r", fault, exc_info=fault)
    return 0 if stopped.is_set() else 1


def main() -> None:
    end_after(run)


def run() -> None:
    about = "Makes images: a dispatcher and RQ workers, as many as IMAGEGRAM_CONVERTERS."
    parser = argparse.ArgumentParser(prog="imagegram-worker", description=about)
    # For itself only, see `converting`.
    parser.add_argument("command", nargs="?", choices=["convert"], help=argparse.SUPPRESS)
    parser.add_argument("parent", nargs="?", type=int, help=argparse.SUPPRESS)
    parser.usage = "imagegram-worker [-h]"
    asked = parser.parse_args()
    if asked.command and not asked.parent:
        parser.error("convert is for the worker's own use")
    logs.configure()
    pipeline.require_colour_management()
    chosen = settings.load()
    if asked.command:
        convert(chosen, asked.parent)
    else:
        require_stores(chosen, "STORE", "BACKUP_STORE")
        sandbox.check(chosen)
        raise SystemExit(asyncio.run(work(chosen)))


if __name__ == "__main__":
    main()
