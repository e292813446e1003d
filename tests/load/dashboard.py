"""Draws the dashboard of deploy/observe/ while people use a site: docs/images/dashboard.png.

    python -m tests.load.dashboard

Grafana is not needed: a real Prometheus answers the dashboard's own queries, and matplotlib draws the answers. The site
is a new one, in a temporary folder. In the middle of the time twice as many people use it. `make dashboard` runs it.
"""

import argparse
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from conftest import ROOT
from matplotlib.dates import AutoDateLocator, DateFormatter
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, PercentFormatter
from observing import PANELS, People, Prometheus, observed, wait_for_a_trial

PICTURE = ROOT / "docs" / "images" / "dashboard.png"
COLUMNS = 3
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000", "#999999"]  # Okabe and Ito
UNITS = {"s": EngFormatter("s"), "percentunit": PercentFormatter(1, decimals=2), "Bps": EngFormatter("B/s")}
RATES = {"reqps", "ops"}


def draw(prometheus: Prometheus, start: float, end: float, path: Path) -> None:
    rows = -(-len(PANELS) // COLUMNS)
    figure = Figure(figsize=(15, 2.7 * rows), layout="constrained")
    for panel, axes in zip(PANELS, figure.subplots(rows, COLUMNS).flat, strict=True):
        draw_panel(prometheus, panel, axes, start, end)
    figure.savefig(path, dpi=80)


def draw_panel(prometheus: Prometheus, panel: dict, axes, start: float, end: float) -> None:
    lines = 0
    for target in panel["targets"]:
        expression = target["expr"].replace("$__rate_interval", "10s")
        for series in prometheus.get("query_range", query=expression, start=start, end=end, step=1)["result"]:
            legend = target["legendFormat"]
            for name, value in series["metric"].items():
                legend = legend.replace(f"{{{{{name}}}}}", value)
            times = [datetime.fromtimestamp(second, UTC) for second, _ in series["values"]]
            values = [float(value) for _, value in series["values"]]
            axes.plot(times, values, label=legend, color=COLOURS[lines % len(COLOURS)], linewidth=1.2)
            lines += 1
    assert lines, f"{panel['title']} is empty"
    limits = [step["value"] for step in panel["fieldConfig"]["defaults"]["thresholds"]["steps"][1:]]
    if limits and limits[0] < 20 * axes.dataLim.y1:
        axes.axhline(limits[0], color="red", linewidth=0.8, linestyle="--")
    unit = panel["fieldConfig"]["defaults"]["unit"]
    axes.set_title(panel["title"] + (" a second" if unit in RATES else ""), fontsize=10)
    axes.yaxis.set_major_formatter(UNITS.get(unit, EngFormatter()))
    axes.xaxis.set_major_formatter(DateFormatter("%H:%M:%S"))
    axes.xaxis.set_major_locator(AutoDateLocator(maxticks=6))
    axes.tick_params(labelsize=7)
    axes.set_ylim(0, 1.1 * axes.dataLim.y1 or 1)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=6, loc="upper left")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.load.dashboard", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="ig-") as folder,
        observed(Path(folder), "1s", verify_every=5, workers=2) as (site, prometheus),
    ):
        start, crowd = time.time(), People(site, 4, 0.3)
        try:
            wait_for_a_trial(prometheus)
            time.sleep(options.seconds / 3)
            more = People(site, 4, 0.3)
            time.sleep(options.seconds / 3)
            more.close()
            time.sleep(options.seconds / 3)
        finally:
            crowd.close()
        draw(prometheus, start + 5, time.time(), PICTURE)
    print(PICTURE)


if __name__ == "__main__":
    main()
