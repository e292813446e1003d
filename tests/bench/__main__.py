"""`python -m tests.bench` prints one table and draws plots; `--quick` is a smoke test of the bench itself."""

import argparse
import time
from pathlib import Path

from tests.bench import requests, table

OUT = Path(__file__).with_name("out")

parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
parser.add_argument("--quick", action="store_true", help="one short round of each")
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--seconds", type=float, default=4)
parser.add_argument("--only", default="", help="only requests whose name contains this")
asked = parser.parse_args()
if asked.quick:
    asked.rounds, asked.seconds = 1, 2

began = time.monotonic()
rows = requests.measure(asked.rounds, asked.seconds, asked.only)
print(table.markdown(rows))
table.keep(rows, OUT / "figures.json")
print(f"{time.monotonic() - began:.0f} s")
