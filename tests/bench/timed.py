"""`python -m tests.bench.timed` is `imagegram-worker` that adds a line to the file TIMED for each image it has made:
seconds from the beginning of its attempt to its being shown, and of them those of the conversion."""

import os
import time

from workers import __main__ as workers
from workers import jobs

taken = {}


def timed(name: str, function):
    def called(*given):
        began = time.perf_counter()
        try:
            return function(*given)
        finally:
            taken[name] = time.perf_counter() - began

    return called


async def start(*given, begin=jobs.outbox.start_image):
    taken["began"] = time.perf_counter()
    return await begin(*given)


async def publish(*given, show=jobs.outbox.publish):
    await show(*given)
    with open(os.environ["TIMED"], "a") as file:
        file.write(f"{time.perf_counter() - taken['began']} {taken['conversion']}\n")


jobs.convert = timed("conversion", jobs.convert)
jobs.outbox.start_image, jobs.outbox.publish = start, publish
workers.main()
