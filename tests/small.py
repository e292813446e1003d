"""`python -m tests.small api` or `… workers`: a server that seals all the time, with segments of 8 and short leases."""

import runpy
import sys

from storage import settings

settings.SEGMENT_COMMENTS, settings.COMPACT_MS, settings.LEASE_MS = 8, 300, 1000

if __name__ == "__main__":
    from workers import dispatcher

    dispatcher.PAUSE_SEALING, dispatcher.PAUSE_SEGMENT = 0.05, 0.001
    module = sys.argv.pop(1)
    runpy.run_module(module, run_name="__main__", alter_sys=True)
