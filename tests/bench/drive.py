"""Drives servers with wrk or at a steady rate.

Servers that are compared are measured in turns, so that other load on the machine affects all of them alike.
"""

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import orjson

from tests.bench.parts import DRIVER, pin
from tests.conftest import ROOT

CONNECTIONS = 32  # of wrk
SCRIPT = Path(__file__).with_name("drive.lua")


@dataclass
class Run:
    """The result of one measurement."""

    rate: float  # requests per second
    percentiles: dict[float, float]  # share of the requests in percent: ms within which they were answered
    max: float  # ms
    errors: int


@dataclass
class Load:
    """Requests to one server. Each takes one of `paths` at random."""

    url: str
    paths: list[str]
    method: str = "GET"
    headers: dict[str, str] | None = None
    body: bytes | None = None

    def run(self, seconds: float) -> Run:
        """Measures for `seconds` s with wrk."""
        with tempfile.TemporaryDirectory() as folder:
            paths, body = Path(folder, "paths"), Path(folder, "body")
            paths.write_text("\n".join(self.paths) + "\n")
            command = ["taskset", "-c", str(DRIVER), "wrk", "-t1", f"-c{CONNECTIONS}", f"-d{seconds:.0f}s"]
            command += ["-s", str(SCRIPT)]
            for name, value in (self.headers or {}).items():
                command += ["-H", f"{name}: {value}"]
            command += [self.url, "--", self.method, str(paths)]
            if self.body is not None:
                body.write_bytes(self.body)
                command.append(str(body))
            output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=seconds + 30).stdout
        result = json.loads(output.splitlines()[-1])
        return Run(
            result["requests"] / result["microseconds"] * 1e6,
            {share: value / 1000 for share, value in result["percentiles"]},
            result["max"] / 1000,
            result["errors"],
        )


@contextlib.contextmanager
def steady(plan: dict, *cores: int) -> Iterator[dict]:
    """Sends requests at steady rates while the body of the `with` runs. `tests.bench.pace` describes the plan.

    Yields a dict. After the body it holds what `tests.bench.pace` printed. `cores` pins the driver.
    """
    results: dict = {}
    with tempfile.NamedTemporaryFile("wb", suffix=".json") as file:
        file.write(orjson.dumps(plan))
        file.flush()
        command = [sys.executable, "-m", "tests.bench.pace", file.name]
        driver = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if cores:
            pin(driver.pid, *cores)
        assert driver.stdout.readline() == "begins\n"
        try:
            yield results
        finally:
            output, _ = driver.communicate("end\n", timeout=120)
        results |= orjson.loads(output)


def in_turns(subjects: dict[str, Callable[[], Run]], rounds: int) -> dict[str, list[Run]]:
    """Measures every subject once in each round. Every second round goes backwards."""
    runs = {name: [] for name in subjects}
    for number in range(rounds):
        for name in list(subjects)[:: -1 if number % 2 else 1]:
            runs[name].append(subjects[name]())
    return runs


def middle(runs: list[Run], value: Callable[[Run], float]) -> float:
    """The median of a value over the runs."""
    return median(value(run) for run in runs)


def percentiles(runs: list[Run]) -> dict[float, float]:
    """For each share in percent the median of the runs, in ms."""
    return {share: median(run.percentiles[share] for run in runs) for share in sorted(runs[0].percentiles)}


def ratio(one: list[Run], other: list[Run], value: Callable[[Run], float] = lambda run: run.rate) -> float:
    """The median of the rounds' ratios."""
    return median(value(a) / value(b) for a, b in zip(one, other, strict=True))
