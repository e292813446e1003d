"""Runs the long forms of the durability tests and prints their figures.

    PYTHONPATH=tests python -m tests.drills.drill [NAME [SERVER]]

The docstrings of `crashes` and `faults` describe each drill. A drill ends after its rounds or after its share of the
ten minutes that `make drill` takes at most. A drill for Valkey and for Redis runs on both at the same time.
"""

import asyncio
import logging
import subprocess
import sys
import time
from contextlib import redirect_stdout

from tests.drills import crashes, faults

BOTH = ("valkey", "redis")
DRILLS = {
    "kill": (crashes.kill, BOTH),
    "power": (crashes.power, BOTH),
    "everysec": (lambda server: crashes.power(server, 5, "everysec"), BOTH),
    "machine": (crashes.machine, BOTH),
    "seconds": (crashes.seconds, BOTH),
    "cut": (faults.cut, BOTH),
    "store": (faults.store, BOTH),
    "full": (faults.full, BOTH),
    "scale": (faults.scale, ("valkey",)),
}


def run(name: str, server: str) -> None:
    """Runs one drill on one server in this process."""
    for noisy in ("imagegram.ship", "werkzeug"):  # the failures that a drill causes, and S3's log of requests
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    begun = time.monotonic()
    with redirect_stdout(None):  # the progress that restores print
        figures = asyncio.run(DRILLS[name][0](server))
    print(f"{server}: {figures}  ({time.monotonic() - begun:.0f} s)", flush=True)


def main(names: list[str]) -> None:
    """Runs drills one after the other. Each server has a process of its own: a process has one event loop, and a
    shipper must not wait for the writers of the other server."""
    for name in names or DRILLS:
        command = [sys.executable, "-m", "tests.drills.drill", name]
        processes = [subprocess.Popen([*command, server]) for server in DRILLS[name][1]]
        if any([process.wait() for process in processes]):  # a list: waits for all of them
            sys.exit(f"{name} failed")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        run(*sys.argv[1:])
    else:
        main(sys.argv[1:])
