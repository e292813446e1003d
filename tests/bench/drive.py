"""Drives servers with wrk, in turns, so that what the machine does meanwhile happens to all of them."""

import json
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from tests.bench.parts import DRIVER

CONNECTIONS = 32
SCRIPT = Path(__file__).with_name("drive.lua")


@dataclass
class Run:
    rate: float  # requests per second
    percentiles: dict[float, float]  # ms
    max: float  # ms
    errors: int


@dataclass
class Load:
    """Requests to one server: paths drawn at random."""

    url: str
    paths: list[str]
    method: str = "GET"
    headers: dict[str, str] | None = None
    body: bytes | None = None

    def run(self, seconds: float) -> Run:
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
            said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=seconds + 30).stdout
        told = json.loads(said.splitlines()[-1])
        return Run(
            told["requests"] / told["microseconds"] * 1e6,
            {share: value / 1000 for share, value in told["percentiles"]},
            told["max"] / 1000,
            told["errors"],
        )


def in_turns(subjects: dict[str, Callable[[], Run]], rounds: int) -> dict[str, list[Run]]:
    """Every subject once a round, every second round backwards."""
    runs = {name: [] for name in subjects}
    for number in range(rounds):
        for name in list(subjects)[:: -1 if number % 2 else 1]:
            runs[name].append(subjects[name]())
    return runs


def middle(runs: list[Run], value: Callable[[Run], float]) -> float:
    return median(value(run) for run in runs)


def ratio(one: list[Run], other: list[Run], value: Callable[[Run], float] = lambda run: run.rate) -> float:
    """The median of the rounds' ratios."""
    return median(value(a) / value(b) for a, b in zip(one, other, strict=True))
