"""The measurements as pictures, for docs/performance.md. A picture is as wide as a page on GitHub.

The colours are those of Okabe and Ito, which colour-blind people can tell apart. Lines also differ in style and marker.
"""

from itertools import cycle
from math import log10
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

WIDTH = 10  # inches; 1,000 pixels
# Servers look alike in every picture.
BARE = {"label": "bare Sanic, the same bytes", "color": "#777777", "linestyle": "--", "marker": "s"}
OURS = {"label": "Imagegram", "color": "#0072B2", "linestyle": "-", "marker": "o"}
BUSY = {**OURS, "label": "Imagegram while comments are written", "linestyle": ":", "marker": "D"}
PEER = {"label": "the peer: FastAPI and PostgreSQL", "color": "#D55E00", "linestyle": "-.", "marker": "^"}
SERVERS = {"bare": BARE, "ours": OURS, "busy": BUSY, "peer": PEER}
# Lines of anything else take these in turn.
LINES = [
    {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    {"color": "#E69F00", "linestyle": "--", "marker": "s"},
    {"color": "#009E73", "linestyle": "-.", "marker": "^"},
    {"color": "#CC79A7", "linestyle": ":", "marker": "D"},
    {"color": "#000000", "linestyle": (0, (5, 1, 1, 1, 1, 1)), "marker": "v"},
]
SHARES = [50, 90, 99, 99.9, 99.99]  # percent: the ticks of a percentile axis


def _plain(value: float, _=None) -> str:
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"


def _figure(title: str, rows: int, columns: int, height: float, **options) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    figure.suptitle(title, fontsize=14, fontweight="bold")
    panels = figure.subplots(rows, columns, squeeze=False, **options)
    for axes in panels.flat:
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=10)
    return figure, list(panels.flat)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def _log_ticks(axis, values: list[float]) -> None:
    """Labels a logarithmic axis with plain numbers."""
    axis.set_major_locator(FixedLocator(values))
    axis.set_major_formatter(FuncFormatter(_plain))
    axis.set_minor_formatter(NullFormatter())


def _percentile_axes(axes: Axes, name: str) -> None:
    """Latency on a logarithmic axis against the percentile."""
    axes.set_title(name, fontsize=11)
    axes.set_yscale("log")
    axes.set_xlim(_place(50) - 0.1, _place(99.99) + 0.1)
    axes.set_xticks([_place(share) for share in SHARES], [f"{share:g}" for share in SHARES])
    _log_ticks(axes.yaxis, [a * 10**b for b in range(-1, 5) for a in (1, 2, 5)])


def _place(share: float) -> float:
    """Where a percentile is on its axis: 90, 99 and 99.9 % are at equal distances."""
    return -log10(1 - share / 100)


def _percentile_line(axes: Axes, percentiles: dict[float, float], style: dict) -> None:
    shares = [share for share in sorted(percentiles) if 50 <= share < 100]
    places = [_place(share) for share in shares]
    axes.plot(places, [percentiles[share] for share in shares], **style, markersize=4, linewidth=1.6)


def _label(panels: list[Axes], columns: int) -> None:
    """Names the axes: y in the first panel of each row, x in the last row."""
    for axes in panels[::columns]:
        axes.set_ylabel("latency in ms", fontsize=10)
    for axes in panels[-columns:]:
        axes.set_xlabel("percentile (99: 1 in 100 is slower)", fontsize=10)


def _legend(figure: Figure, panels: list[Axes], columns: int) -> None:
    """One legend below all panels: every label once."""
    lines = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(
        lines.values(), lines.keys(), loc="outside lower center", ncols=columns, fontsize=10, handlelength=3.5
    )


def latency(latencies: dict[str, dict[str, dict[float, float]]], path: Path) -> None:
    """A panel for each call, with a line for each server.

    `latencies` has by call and server (a key of SERVERS) the percentiles: share in percent and ms.
    """
    columns = min(3, len(latencies))
    rows = -(-len(latencies) // columns)
    title = "Latency by percentile, 32 connections"
    figure, panels = _figure(title, rows, columns, 1.2 + 2.8 * rows, sharey=True)
    for axes in panels[len(latencies) :]:
        axes.remove()
    panels = panels[: len(latencies)]
    for axes, (call, by_server) in zip(panels, latencies.items(), strict=True):
        _percentile_axes(axes, call)
        for server, style in SERVERS.items():
            if server in by_server:
                _percentile_line(axes, by_server[server], style)
    _label(panels, columns)
    _legend(figure, panels, 2)
    _save(figure, path)


def growth(grown: dict, path: Path) -> None:
    """Redis' time, requests per second and memory against the number of posts. `grown` is as `growth.times` returns."""
    figure, (times, rates, memory) = _figure("What grows with the number of posts", 1, 3, 5.2)
    posts = grown["posts"]
    for axes, lines in ((times, grown["redis"]), (rates, grown["rates"])):
        for style, (name, values) in zip(cycle(LINES), lines.items(), strict=False):
            axes.plot(posts, values, label=name, **style)
    memory.plot(posts, [size / 2**20 for size in grown["memory"]], **LINES[0])
    times.set(title="Time in Redis", ylabel="µs a call", ylim=(0, None))
    rates.set(title="Throughput of the API", ylabel="requests/s", ylim=(0, None))
    rates.yaxis.set_major_formatter(FuncFormatter(_plain))
    memory.set(title="Memory of Redis", ylabel="MiB", yscale="log")
    _log_ticks(memory.yaxis, [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000])
    for axes in (times, rates, memory):
        axes.set(xscale="log", xlabel="posts")
        _log_ticks(axes.xaxis, posts)
        axes.margins(x=0.12)
    for axes in (times, rates):
        axes.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.17), handlelength=3.5, frameon=False)
    _save(figure, path)


def memory(by_server: dict[str, dict[int, float]], path: Path) -> None:
    """Bytes a comment against the number of comments of its post. `by_server` has them by server."""
    figure, (axes,) = _figure("Memory of a comment in Redis, all keys counted", 1, 1, 4.5)
    for style, (server, points) in zip(cycle(LINES), by_server.items(), strict=False):
        axes.plot(points.keys(), points.values(), label={"valkey": "Valkey 9", "redis": "Redis 7"}[server], **style)
    axes.set(xscale="log", xlabel="comments of the post", ylabel="bytes a comment", ylim=(0, None))
    _log_ticks(axes.xaxis, [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000])
    axes.legend(fontsize=10, handlelength=3.5)
    _save(figure, path)


def sealing(lines: dict[str, list[float]], path: Path) -> None:
    """Memory against the number of comments. `lines` has `comments`, and bytes of memory by state."""
    figure, (axes,) = _figure("Memory of Redis, posts included, 100 comments a post", 1, 1, 4.5)
    comments = lines["comments"]
    for style, (name, values) in zip(cycle(LINES), list(lines.items())[1:], strict=False):
        axes.plot(comments, [value / 2**20 for value in values], label=name, **style)
    axes.set(xscale="log", yscale="log", xlabel="comments stored", ylabel="MiB")
    _log_ticks(axes.xaxis, comments)
    _log_ticks(axes.yaxis, [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000])
    axes.legend(fontsize=10, handlelength=3.5)
    _save(figure, path)


def forecast(seen: dict[str, dict], most: float, path: Path) -> None:
    """A panel for each load, with a line for each call. `seen` has by load what `tests.bench.pace` printed.

    `most` is the target in ms.
    """
    figure, panels = _figure("Latency by percentile, the whole system at a steady rate", 1, len(seen), 4.6, sharey=True)
    for axes, (load, results) in zip(panels, seen.items(), strict=True):
        _percentile_axes(axes, load)
        for style, (name, stream) in zip(cycle(LINES), results["streams"].items(), strict=False):
            # Leaves out the percentiles that are beyond the slowest call.
            known = {share: ms for share, ms in stream["percentiles"] if share <= 100 - 100 / stream["count"]}
            _percentile_line(axes, known, {**style, "label": name})
        axes.axhline(most, color="black", linewidth=1, label=f"target: {most:g} ms")
    _label(panels, len(panels))
    _legend(figure, panels, 4)
    _save(figure, path)


def capacity(sites: list, fork: float, path: Path) -> None:
    """What a site needs at the forecast's rate, against its age: memory, nodes, a rewrite's fork, and the stores.

    `fork` is in ms a GiB.
    """
    days = [site.days for site in sites]
    figure, panels = _figure("The forecast, against the age of the site", 1, 3, 4)
    lines = {
        "data and room, all nodes": [site.memory * 4.5 / 1e9 for site in sites],
        "data of one copy": [site.memory / 1e9 for site in sites],
    }
    for (label, values), style in zip(lines.items(), cycle(LINES), strict=False):
        panels[0].plot(days, values, **style, label=label, markersize=3)
    panels[0].set_title("memory, GB", fontsize=11)
    panels[1].plot(days, [site.primaries for site in sites], **LINES[0], label="primaries of 0.9 GiB", markersize=3)
    forks = [site.memory / 2**30 * fork for site in sites]
    panels[1].plot(days, forks, **LINES[1], label="fork of one primary with all data, ms", markersize=3)
    panels[1].axhline(50, color="#D55E00", linewidth=1, label="50 ms")
    panels[1].set_title("primaries, and why one is not enough", fontsize=11)
    panels[2].plot(days, [site.stored / 1e9 for site in sites], **LINES[0], label="images", markersize=3)
    panels[2].plot(days, [site.backup / 1e9 for site in sites], **LINES[1], label="backup", markersize=3)
    panels[2].set_title("stores, GB", fontsize=11)
    for axes in panels:
        axes.set_xscale("log")
        axes.set_yscale("log")
        _log_ticks(axes.xaxis, [1, 7, 30, 91, 365])
        axes.yaxis.set_major_formatter(FuncFormatter(_plain))
        axes.set_xlabel("days")
        axes.legend(fontsize=9)
    _save(figure, path)


def line(seen: dict[str, dict[str, list[float]]], path: Path) -> None:
    """A panel for each line: how many of the pictures a person sees after how many seconds.

    `seen` has by line and label the seconds after which the first picture was there, the second, and so on.
    """
    figure, panels = _figure("Ten pictures on a slow line: what a person sees", 1, len(seen), 4.6, sharey=True)
    for axes, (name, curves) in zip(panels, seen.items(), strict=True):
        for style, (label, times) in zip(cycle(LINES), curves.items(), strict=False):
            pictures = range(len(times) + 1)
            axes.step([0, *times], pictures, where="post", label=label, **{**style, "markersize": 4})
        axes.set_title(name, fontsize=11)
        axes.set(xlabel="seconds since the client began to connect", xlim=(0, None), yticks=range(0, 11, 2))
    panels[0].set_ylabel("pictures", fontsize=10)
    _legend(figure, panels, 2)
    _save(figure, path)
