"""`python -m tests.bench` prints tables, puts them into docs/performance.md and draws its plots.

`--quick` is a smoke test of the bench itself, which keeps its plots in a folder of its own and its tables nowhere.
"""

import argparse
import time
from pathlib import Path

from tests.bench import forecast, growth, plots, requests, shipping, table, transfers
from tests.conftest import ROOT

PAGE = ROOT / "docs" / "performance.md"
PARTS = ("requests", "growth", "memory", "transfers", "shipping", "forecast")
FORECAST = 300  # seconds of each load

parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
parser.add_argument("--quick", action="store_true", help="one short round of each")
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--seconds", type=float, default=4)
parser.add_argument("--part", choices=PARTS, action="append", help="only these; more than one may be given")
parser.add_argument("--only", default="", help="of the requests only those whose name contains this")
asked = parser.parse_args()
if asked.quick:
    asked.rounds, asked.seconds = 1, 2
out = Path(__file__).with_name("out") if asked.quick else PAGE.with_suffix("")
rounds, seconds = asked.rounds, asked.seconds


def measured(part: str) -> list[table.Row]:
    """Measure one part and draw what it saw."""
    match part:
        case "requests":
            rows = requests.measure(rounds, seconds, asked.only)
            plots.latency(rows, out / "latency.png")
        case "growth":
            rows, grown = growth.times(rounds, seconds, (1000, 10_000) if asked.quick else growth.SIZES)
            plots.growth(grown, out / "growth.png")
        case "memory":
            found = {kind: growth.memory(kind, asked.quick) for kind in ("valkey", "redis")}
            rows = [row for kind in found for row in found[kind][0]]
            plots.memory({kind: lengths for kind, (_, lengths) in found.items()}, out / "memory.png")
        case "transfers":
            rows = transfers.measure(rounds)
        case "shipping":
            rows = shipping.measure(rounds, seconds)
        case "forecast":
            rows, seen = forecast.measure(10 if asked.quick else FORECAST)
            plots.forecast(seen, out / "forecast.png")
    return rows


out.mkdir(parents=True, exist_ok=True)
for part in asked.part or PARTS:
    began = time.monotonic()
    text = table.markdown(measured(part))
    print(f"{part}, {time.monotonic() - began:.0f} s\n\n{text}", flush=True)
    if not asked.quick and not asked.only:
        before, _, rest = PAGE.read_text().partition(f"<!-- {part} -->\n")
        PAGE.write_text(f"{before}<!-- {part} -->\n{text}{rest[rest.index('<!-- end -->') :]}")
