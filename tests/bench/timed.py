"""`python -m tests.bench.timed` is `imagegram-worker` that times each image.

For each image it appends a line to the file TIMED: the seconds from the start of the attempt until the post is shown,
and how many of them the conversion took.
"""

import os
import time

from workers import __main__ as workers
from workers import jobs

times: dict[str, float] = {}  # of the attempt that runs in this process


def timed_convert(*arguments, convert=jobs.convert):
    began = time.perf_counter()
    try:
        return convert(*arguments)
    finally:
        times["conversion"] = time.perf_counter() - began


async def timed_start(*arguments, start=jobs.outbox.start_image):
    times["began"] = time.perf_counter()
    return await start(*arguments)


async def timed_publish(*arguments, publish=jobs.outbox.publish):
    await publish(*arguments)
    with open(os.environ["TIMED"], "a") as file:
        file.write(f"{time.perf_counter() - times['began']} {times['conversion']}\n")


jobs.convert = timed_convert
jobs.outbox.start_image, jobs.outbox.publish = timed_start, timed_publish
workers.main()
