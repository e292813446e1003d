"""`python -m workers` works: a dispatcher and the RQ workers that make images, until one of them ends.

`python -m workers convert` is one such RQ worker.
"""

import argparse
import asyncio
import ctypes
import logging
import os
import signal
import sys

from rq import Worker
from rq.serializers import JSONSerializer

from storage import settings
from storage.objects import open_store
from storage.scripts import Redis
from workers import dispatcher, pipeline

WARM = 2.0  # seconds a conversion under way has at the end; cut off, it only costs an attempt
PR_SET_PDEATHSIG = 1  # prctl(2)
LIBC = ctypes.CDLL(None)


def die_with_parent(signum: int) -> None:
    """Be sent a signal when the parent has ended, however it did."""
    LIBC.prctl(PR_SET_PDEATHSIG, signum)


class Converter(Worker):
    """RQ's worker, whose forks die with it."""

    def main_work_horse(self, job, queue):
        die_with_parent(signal.SIGKILL)
        super().main_work_horse(job, queue)


def convert(chosen: settings.Settings) -> None:
    """Run one RQ worker. One queue: RQ then moves a job atomically, and a crash does not lose it."""
    os.nice(10)  # answers come first: a picture may wait, a reader not
    import workers.jobs  # noqa: F401  before the fork, so that no job pays for it

    queue = dispatcher.queue(chosen.queue_url)
    Converter([queue], connection=queue.connection, serializer=JSONSerializer).work(logging_level="WARNING")


async def work(chosen: settings.Settings) -> int:
    """Run everything; the exit status once it ended."""
    stopped = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stopped.set)
    converters = [
        await asyncio.create_subprocess_exec(
            # Before exec: while the interpreter starts, this process may die, too.
            *(sys.executable, "-m", "workers", "convert"),
            preexec_fn=lambda: die_with_parent(signal.SIGTERM),
            start_new_session=True,
        )
        for _ in range(chosen.converters)
    ]
    hints = dispatcher.queue(chosen.queue_url)
    parts = [asyncio.create_task(converter.wait()) for converter in converters]
    parts.append(
        asyncio.create_task(
            dispatcher.dispatch(
                Redis(chosen.redis_url),
                open_store(chosen.store_url),
                hints,
                chosen.partitions,
                chosen.converters,
            )
        )
    )
    stop = asyncio.create_task(stopped.wait())
    print(f"worker: {len(converters)} images at once", flush=True)
    await asyncio.wait([stop, *parts], return_when=asyncio.FIRST_COMPLETED)
    parts[-1].cancel()
    for wait in (WARM, 1.0):  # RQ ends after the job at the first signal, at once at the second
        for converter in converters:
            if converter.returncode is None:
                converter.send_signal(signal.SIGTERM)
        await asyncio.wait(parts[:-1], timeout=wait)
    for converter in converters:
        if converter.returncode is None:
            converter.kill()
    if not stopped.is_set():
        print("worker: a part has ended by itself", flush=True)
    return 0 if stopped.is_set() else 1


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m workers", description=__doc__)
    parser.add_argument("command", nargs="?", choices=["convert"])
    command = parser.parse_args().command
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    pipeline.require_colour_management()
    chosen = settings.load()
    if command:
        convert(chosen)
    else:
        raise SystemExit(asyncio.run(work(chosen)))


if __name__ == "__main__":
    main()
