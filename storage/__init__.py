"""The data that must survive, and everything that reads or writes it.

This package knows nothing of HTTP. It is the only package that names a Redis key, an object in the store or an
environment variable.

    posts, comments, uploads, changes      what users create, read and delete
    segments                               objects that hold old comments
    outbox, originals                      background work: images to make, bytes to erase
    keys, errors, settings, formats        what the other files share
    check, sweep, retry                    maintenance commands of `imagegram-storage`
    moderation, users, export, erasure     its commands about what users have posted
    progress, times                        what long commands print
    traces                                 what a request's calls take, as OpenTelemetry
    processes, watchdog, logs, files       the operating system: processes, their logs, durable files
    db/, objects/, backup/                 Redis, the object store, the backup of Redis

A function that calls Redis raises Unreachable where Redis does not answer or refuses to run anything, and one that
writes raises Unknown where the reply was lost (storage.errors). Docstrings name these two only where it matters.
"""

import sys

# redis-py imports OpenTelemetry where it is installed: 3 MB and 50 ms in each process, for metrics that nobody reads.
# Now it does not find it. `storage.traces.start` removes this.
sys.modules.setdefault("opentelemetry", None)
