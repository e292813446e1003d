"""Measures all lines, replaces the tables and the picture of docs/performance.md, and prints the tables.

    unshare --net python -m tests.line [--lines N] [--only TEXT]

With `--only` it measures only what has this text in its name, prints what each client reported, and the page stays.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.line import check, network, plan, report, site

URGENT = -10  # niceness of all that this starts: what another program delays would look like a delay of the line
ATTEMPTS = 3
# Clients that begin take much of both cores. They have less priority than those that measure, until they begin to.
CLIENT = ["nice", "-n", "19", sys.executable, "-m", "tests.line.client"]
LATE = 0.005  # seconds: 99 of 100 packets must be delivered as soon as this, or the line was not what it says


def measure(task: plan.Task, user: int, place: site.Place) -> dict:
    """Runs a client on a line of its own. Returns what it reported.

    Measures again if the line was not true, or if the client failed, for example by a 503 while the disk was busy.
    Raises AssertionError after ATTEMPTS times. `user` is another number for each task, so that none meets the quota of
    another.
    """
    name = f"{', '.join(task.name)}, seed {task.seed}"
    for _ in range(ATTEMPTS):
        job = {**task.job, "token": place.site.token(f"user{user}", exp=int(time.time()) + 3600)}
        try:
            with network.Line(task.profile, task.congestion, task.seed) as line:
                reported = line.run(*CLIENT, json.dumps(job), timeout=900).stdout
        except subprocess.CalledProcessError:
            continue  # it has printed why
        late = max(direction["late"] for direction in line.report)
        print(f"{name}: 1 % of its packets were {late * 1000:.1f} ms late or more\n", end="", file=sys.stderr)
        if late < LATE:
            return json.loads(reported)
    raise AssertionError(f"{name}: the client failed or packets were late {ATTEMPTS} times, see above")


def run(tasks: list[plan.Task], lines: int, place: site.Place, found: report.Found) -> None:
    """Runs the tasks, as many at a time as there are lines. Adds to `found` by their names."""
    tasks = sorted(tasks, key=lambda task: -task.expected)
    with ThreadPoolExecutor(lines) as threads:
        results = [threads.submit(measure, task, user, place) for user, task in enumerate(tasks)]
        try:
            for task, result in zip(tasks, results, strict=True):
                found.setdefault(task.name, []).append(result.result())
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.line", description=__doc__)
    parser.add_argument("--lines", type=int, default=16, help="lines at the same time")
    parser.add_argument("--only", default="", help="measure only what has this in its name, for example 'read, EDGE'")
    options = parser.parse_args()
    network.prepare()
    os.setpriority(os.PRIO_PROCESS, 0, URGENT)
    check.run()
    found: report.Found = {}
    with tempfile.TemporaryDirectory(prefix="ig-") as folder, site.running(Path(folder)) as place:
        # First how soon a picture is ready, with little other work: the worker's time is part of it.
        for tasks, lines in ((plan.waiting(place), 6), (plan.reading(place) + plan.sending(place), options.lines)):
            run([task for task in tasks if options.only in ", ".join(task.name)], lines, place, found)
    if options.only:
        for name, results in found.items():
            print(", ".join(name), *map(json.dumps, results), sep="\n")
        return
    from tests.bench import plots
    from tests.bench.__main__ import PAGE, insert

    text = report.page(found)
    insert("line", text)
    plots.line(report.curves(found), PAGE.with_suffix("") / "line.png")
    print(text)


if __name__ == "__main__":
    main()
