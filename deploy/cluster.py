"""`make cluster`: a whole site on a Redis Cluster on this machine, to try it. Ctrl-C ends it; the data stays.

| SHAPE | nodes |
|---|---|
| `cluster` | 3 primaries with two replicas each |
| `small` | 1 primary with two replicas, and two arbiters, which only vote |

Each node has a shipper. There are also a Redis for RQ's queue, the API and a worker. In production the nodes would be
on several machines. But several small primaries on one machine are of use, too: the rewrite of an append-only file
stops its node for 16 to 28 ms a GiB.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from deploy import run

FIRST_PORT = 7001  # of node 1, and so on. The cluster bus has the port 10,000 higher
PAUSE = 6  # seconds after which a node that was killed starts again. A replica has its place after three or four


class Shape(NamedTuple):
    """How many nodes there are of each role, and the number of partitions."""

    primaries: int
    arbiters: int
    replicas: int
    partitions: int


SHAPES = {"cluster": Shape(3, 0, 6, 6), "small": Shape(1, 2, 2, 1)}


def nodes(shape: Shape) -> list[str]:
    """The addresses of the nodes: data primaries, replicas, arbiters."""
    return [f"127.0.0.1:{FIRST_PORT + number}" for number in range(shape.primaries + shape.replicas + shape.arbiters)]


def environment(shape: Shape, folder: Path) -> dict[str, str]:
    """The settings of the API and the worker. What is set already stays."""
    return {
        "IMAGEGRAM_REDIS_URL": f"redis+cluster://{','.join(nodes(shape))}",
        "IMAGEGRAM_REPLICAS": "1",
        "IMAGEGRAM_PARTITIONS": str(shape.partitions),
        "IMAGEGRAM_QUEUE_URL": f"unix://{quote(str(folder))}/queue/redis/redis.sock",
        "IMAGEGRAM_STORE": (folder / "store").as_uri(),
        "IMAGEGRAM_BACKUP_STORE": (folder / "backup").as_uri(),
        **os.environ,
        "IMAGEGRAM_DATA": str(folder),
    }


def procfile(shape: Shape, folder: Path) -> str:
    """The processes, for honcho."""
    program = shlex.quote(str(Path(sys.executable).parent))
    data = shlex.quote(str(folder))
    lines = [f"queue: IMAGEGRAM_DATA={data}/queue exec {program}/imagegram-storage redis"]
    for number, place in enumerate(nodes(shape), 1):
        own = f"IMAGEGRAM_DATA={data}/{number} IMAGEGRAM_REDIS_NODE={place}"
        again = f"while true; do {program}/imagegram-storage redis; sleep {PAUSE}; done"
        lines.append(f"node{number}: export {own}; {again}")
        lines.append(f"ship{number}: {own} exec {program}/imagegram-storage ship")
    # Whoever comes first forms the Cluster; the other finds it complete. Problems are shown, but the site starts.
    numbers = f"--primaries {shape.primaries} --arbiters {shape.arbiters}"
    form = f"flock {data}/form {program}/imagegram-storage cluster form {numbers}"
    lines.append(f"api: {form}; exec {program}/imagegram-api")
    lines.append(f"worker: {form} >/dev/null; exec {program}/imagegram-worker")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the Procfile and run honcho on it. Raises SystemExit, as `run.main` does, and for an unknown shape."""
    name = sys.argv[1]
    if name not in SHAPES:
        raise SystemExit(f"SHAPE={name}: expected {' or '.join(SHAPES)}")
    folder = Path(os.environ.get("IMAGEGRAM_DATA", "data")).absolute() / name
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.update(environment(SHAPES[name], folder))
    path = folder / "Procfile"
    path.write_text(procfile(SHAPES[name], folder))
    subprocess.run([Path(sys.executable).with_name("imagegram-api"), "welcome"], check=True)
    run.main(path)


if __name__ == "__main__":
    main()
