"""Measures the system, prints tables, puts them into docs/performance.md and draws the pictures of that page.

With `--quick`, `--only` or `--server redis` the page stays as it is, and the pictures go to tests/bench/out/.
"""

import argparse
import time
from pathlib import Path

from tests.bench import (
    costs,
    forecast,
    growth,
    plots,
    requests,
    rewrite,
    sealing,
    segments,
    shards,
    shipping,
    table,
    transfers,
    waiting,
)
from tests.conftest import ROOT

PAGE = ROOT / "docs" / "performance.md"
PARTS = ("requests", "growth", "memory", "segments", "sealing", "transfers", "shipping", "waiting", "shards", "costs")
PARTS += ("rewrite", "forecast")
FORECAST = 300  # seconds of each load
QUICK_SIZES = (1000, 10_000)  # posts


def measure(part: str, options: argparse.Namespace, pictures: Path) -> str:
    """Measures one part and draws its picture. Returns its table."""
    rounds, seconds = options.rounds, options.seconds
    match part:
        case "requests":
            rows, latencies = requests.measure(rounds, seconds, options.only)
            plots.latency(latencies, pictures / "latency.png")
        case "growth":
            rows, grown = growth.times(rounds, seconds, QUICK_SIZES if options.quick else growth.SIZES)
            plots.growth(grown, pictures / "growth.png")
        case "memory":
            rows, by_server = [], {}
            for kind in ("valkey", "redis"):
                more, by_server[kind] = growth.memory(kind, options.quick)
                rows += more
            plots.memory(by_server, pictures / "memory.png")
        case "segments":
            rows = segments.measure(seconds)
        case "sealing":
            rows, lines = sealing.measure(10 if options.quick else 60, options.quick)
            plots.sealing(lines, pictures / "sealing.png")
        case "transfers":
            rows = transfers.measure(rounds)
        case "shipping":
            rows = shipping.measure(rounds, seconds)
        case "waiting":
            rows = waiting.measure()
        case "shards":
            rows = shards.measure(rounds, seconds, options.server)
        case "costs":
            rows = costs.measure()
        case "rewrite":
            return rewrite.measure(options.server, rewrite.SIZES[:1] if options.quick else rewrite.SIZES)
        case "forecast":
            rows, results = forecast.measure(10 if options.quick else FORECAST)
            plots.forecast(results, forecast.TARGET, pictures / "forecast.png")
    return table.markdown(rows)


def insert(part: str, text: str) -> None:
    """Replaces the table of a part in the page."""
    before, _, rest = PAGE.read_text().partition(f"<!-- {part} -->\n")
    PAGE.write_text(f"{before}<!-- {part} -->\n{text}{rest[rest.index('<!-- end -->') :]}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one short round of each, to try the bench itself")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4, help="of each measurement of a round")
    parser.add_argument("--part", choices=PARTS, action="append", help="measure only this part; may be repeated")
    parser.add_argument("--only", default="", help="measure only the requests whose name contains this")
    parser.add_argument("--server", choices=("valkey", "redis"), default="valkey", help="of shards and rewrite")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.seconds = 1, 2
    trial = options.quick or options.only or options.server != "valkey"
    pictures = Path(__file__).with_name("out") if trial else PAGE.with_suffix("")
    for part in options.part or PARTS:
        began = time.monotonic()
        text = measure(part, options, pictures)
        print(f"{part}, {time.monotonic() - began:.0f} s\n\n{text}", flush=True)
        if not trial:
            insert(part, text)


if __name__ == "__main__":
    main()
