"""`python -m tests.drills.standin` is `imagegram-worker` with a stand-in for the decoder, which only waits.

Each conversion that begins appends a line with its process id to the file STANDIN_COUNTED. It takes STANDIN_SECONDS.
"""

import os
import time

from making import jpeg

from workers import __main__ as workers
from workers import jobs
from workers.pipeline import Picture


def wait(path, chosen) -> Picture:
    with open(os.environ["STANDIN_COUNTED"], "a") as counted:
        counted.write(f"{os.getpid()}\n")
    time.sleep(float(os.environ["STANDIN_SECONDS"]))
    served = jpeg()
    return Picture(served, (len(served),), bytes(24), 640, 480, "JPEG")


jobs.convert = wait
workers.main()
