"""The long forms of the durability tests, with figures.

    PYTHONPATH=tests python -m tests.drills.drill [NAME [SERVER]]

`crashes` and `faults` tell what each does. Bounded: `make drill` ends after ten minutes, each drill after its rounds
or its share of them. One that is for Valkey and for Redis runs on both at the same time.
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
    for noisy in ("imagegram.ship", "werkzeug"):  # troubles that are wanted here, and S3's log of requests
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    begun = time.monotonic()
    with redirect_stdout(None):  # what restores tell
        told = asyncio.run(DRILLS[name][0](server))
    print(f"{server}: {told}  ({time.monotonic() - begun:.0f} s)", flush=True)


def main(names: list[str]) -> None:
    """A process for each drill and server: a shipper in one must not wait for the writers of the other."""
    for name in names or DRILLS:
        command = [sys.executable, "-m", "tests.drills.drill", name]
        parts = [subprocess.Popen([*command, server]) for server in DRILLS[name][1]]
        if any([part.wait() for part in parts]):
            sys.exit(f"{name} failed")


if len(sys.argv) == 3:
    run(*sys.argv[1:])
else:
    main(sys.argv[1:])
