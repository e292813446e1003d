"""The long forms of the durability tests, with figures: `PYTHONPATH=tests python -m tests.drills.drill [NAME…]`.

`crashes` and `faults` tell what each does. Bounded: `make drill` ends after ten minutes, each drill after its rounds
or its share of them. DRILL_SERVER=valkey or redis runs on that one alone.
"""

import asyncio
import logging
import os
import sys
import time

from tests.drills import crashes, faults

BOTH = ("valkey", "redis")
DRILLS = {
    "kill": (crashes.kill, BOTH),
    "power": (crashes.power, BOTH),
    "everysec": (lambda server: crashes.power(server, 5, "everysec"), BOTH),
    "machine": (crashes.machine, BOTH),
    "seconds": (crashes.seconds, BOTH),
    "cut": (faults.cut, BOTH),
    "store": (faults.store, ("valkey",)),
    "full": (faults.full, BOTH),
    "scale": (faults.scale, ("valkey",)),
}


async def main(names: list[str]) -> None:
    for name in names or DRILLS:
        drill, servers = DRILLS[name]
        for server in [os.environ["DRILL_SERVER"]] if "DRILL_SERVER" in os.environ else servers:
            begun = time.monotonic()
            print(f"{server}: {await drill(server)}  ({time.monotonic() - begun:.0f} s)", flush=True)


logging.getLogger("imagegram.ship").setLevel(logging.CRITICAL)  # its troubles are wanted here
asyncio.run(main(sys.argv[1:]))
