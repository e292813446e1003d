"""`imagegram-worker`, or `python -m workers`: a dispatcher, and the RQ workers that create pictures ("converters").

`imagegram-worker remake` makes the JPEGs of older versions again, see remaking.py.

    imagegram-worker: dispatcher
        │ starts IMAGEGRAM_CONVERTERS of them
        └──► converter: `imagegram-worker convert PARENT`, an RQ worker. It ends when the process PARENT ends
                 ├──► fork for each job: jobs.make_image
                 └──► fork server of decoders, see sandbox.py
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

from storage import logs, metrics, settings, traces, watchdog
from storage.db import topology
from storage.db.cluster import connect
from storage.objects import require_stores
from storage.processes import die_with_parent, end_after
from workers import dispatcher, encoding, pipeline, remaking, sandbox

STOP_GRACE = 2.0  # seconds that a running conversion has when the worker stops. If it is cut off, it costs an attempt
RETRY_PAUSE = 1.0  # seconds until a converter that ended is replaced, and between pings of a Redis that is unreachable
WAIT = 5  # seconds RQ waits for a job, or for its end, between two signs of life. RQ's defaults are 405 and 30

log = logging.getLogger("imagegram.worker")


class Converter(Worker):
    """RQ's worker. In addition, its forks die with it, and it gives signs of life to the watchdog while it waits."""

    max_connection_wait_time = RETRY_PAUSE  # RQ would double its pauses up to 60 s

    def fork_work_horse(self, job, queue):
        sandbox.fork_server()  # here, so that all jobs inherit one server. Each job would start its own in 0.2 s
        super().fork_work_horse(job, queue)

    def main_work_horse(self, job, queue):
        die_with_parent(signal.SIGKILL, self.pid)
        super().main_work_horse(job, queue)

    def execute_job(self, job, queue):
        began_ns = time.time_ns()
        super().execute_job(job, queue)
        if traces.tracer:
            traces.end_job("make_image", job.meta, began_ns)

    def heartbeat(self, timeout=None, pipeline=None):
        watchdog.alive()
        super().heartbeat(timeout, pipeline)

    def maintain_heartbeats(self, job, execution):
        with suppress(redis.RedisError):  # otherwise a short outage of Redis would end the running job
            super().maintain_heartbeats(job, execution)


def convert(chosen: settings.Settings, parent: int, memory: int, number: int) -> None:
    """Runs one RQ worker that ends with the process `parent`.

    It listens to one queue only. RQ then moves a job atomically, and a crash does not lose it. Raises SystemExit where
    RQ gave up because Redis was unreachable.
    """
    die_with_parent(signal.SIGTERM, parent)
    metrics.attach(memory, number)  # before the fork, so that each job counts in it
    os.nice(10)  # the API's answers go first: a picture may wait, a reader should not
    import workers.jobs  # noqa: F401  before the fork, so that no job spends time on importing

    watchdog.start(chosen.watchdog)
    if chosen.traces:
        traces.start("imagegram-worker")
        traces.expect_jobs()
    queue = dispatcher.queue(chosen.queue_url)
    # RQ asks Redis for the worker's address. redis-py cannot parse it if the path of the socket has a blank or a `=`.
    queue.connection.set_response_callback("CLIENT INFO", lambda reply, **options: {"addr": "unknown"})
    await_redis(queue.connection)
    wait = max(1, min(WAIT, chosen.watchdog // 6)) if chosen.watchdog else WAIT
    try:
        worker = Converter(
            [queue],
            connection=queue.connection,
            serializer=JSONSerializer,
            worker_ttl=wait + 15,  # RQ subtracts 15 of them, and waits 10 s longer for a Redis that does not answer
            job_monitoring_interval=wait,
        )
        worker.work(logging_level="WARNING")
        traces.stop()
    except redis.RedisError as error:
        raise SystemExit(f"converter: {error}") from None


def await_redis(connection: redis.Redis) -> None:
    """Returns once Redis answers.

    Without this, RQ's worker would end at once, and starting it over and over would use up a core.
    """
    while True:
        watchdog.alive()
        try:
            connection.ping()
            return
        except redis.RedisError as error:
            log.warning("waits for Redis: %s", error)
            time.sleep(RETRY_PAUSE)


async def keep_converter(memory: int, number: int) -> None:
    """Keeps one converter running until this is cancelled. It counts in slice `number` of the memory of metrics.

    A converter that ends by itself is replaced. RQ's worker ends where Redis becomes unreachable at certain moments,
    for example right after a job.
    """
    while True:
        command = (sys.executable, *sys.orig_argv[1:], "convert", *map(str, (os.getpid(), memory, number)))
        converter = await asyncio.create_subprocess_exec(*command, start_new_session=True, pass_fds=[memory])
        try:
            await converter.wait()
        finally:
            await _stop(converter)
        log.warning("a converter ended with %s and is replaced", converter.returncode)
        await asyncio.sleep(RETRY_PAUSE)


async def _stop(converter: asyncio.subprocess.Process) -> None:
    for grace in (STOP_GRACE, 1.0):  # at the first signal RQ ends after the job, at the second at once
        with suppress(ProcessLookupError, TimeoutError):
            converter.terminate()
            await asyncio.wait_for(converter.wait(), grace)
    with suppress(ProcessLookupError):
        converter.kill()


async def work(chosen: settings.Settings) -> int:
    """Runs the dispatcher and the converters until SIGTERM, SIGINT or a fault. Returns the exit status.

    0 after a signal, 1 after a fault, which is logged.
    """
    stopped = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stopped.set)
    watchdog.start(chosen.watchdog)
    watchdog.watch_loop(asyncio.get_running_loop())
    memory = metrics.share(1 + chosen.converters)
    metrics.attach(memory, 0)
    metrics.serve("worker", chosen.worker_metrics)
    db, hints = connect(chosen.redis_url, chosen.replicas), dispatcher.queue(chosen.queue_url)
    tasks = [asyncio.create_task(keep_converter(memory, 1 + n)) for n in range(chosen.converters)]
    tasks.append(asyncio.create_task(dispatcher.dispatch(db, chosen, hints)))
    log.info("converters: %d", chosen.converters)
    await asyncio.wait([asyncio.create_task(stopped.wait()), *tasks], return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    for fault in await asyncio.gather(*tasks, return_exceptions=True):
        if not isinstance(fault, asyncio.CancelledError):
            log.error("the worker ends: %r", fault, exc_info=fault)
    return 0 if stopped.is_set() else 1


def main() -> None:
    """The console script `imagegram-worker`."""
    end_after(run)


def run() -> None:
    """Parses the command line and runs the worker, or one of its converters. Raises SystemExit with the exit status."""
    about = """Creates the pictures of posts: a dispatcher, and IMAGEGRAM_CONVERTERS RQ workers.
    With `remake`: makes the JPEGs of older versions again, beside a running site."""
    parser = argparse.ArgumentParser(prog="imagegram-worker", description=about)
    # Only this program itself uses `convert` and what follows it, see `keep_converter`.
    parser.add_argument("command", nargs="?", choices=["convert", "remake"], help=argparse.SUPPRESS)
    for name in ("parent", "memory", "number"):
        parser.add_argument(name, nargs="?", type=int, help=argparse.SUPPRESS)
    parser.usage = "imagegram-worker [-h] [remake]"
    arguments = parser.parse_args()
    if arguments.command == "convert" and not (arguments.parent and arguments.memory and arguments.number):
        parser.error("convert is for the worker's own use")
    chosen = settings.load()
    logs.configure(chosen.log, settings.secret_values())
    pipeline.require_colour_management()
    if arguments.command == "convert":
        convert(chosen, arguments.parent, arguments.memory, arguments.number)
    else:
        require_stores(chosen, "STORE", "BACKUP_STORE")
        sandbox.check(chosen)
        encoding.warn_if_missing()
        if arguments.command == "remake":
            remaking.main(chosen)
            return
        asyncio.run(topology.warn(chosen))
        raise SystemExit(asyncio.run(work(chosen)))


if __name__ == "__main__":
    main()
