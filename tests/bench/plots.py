"""What was measured, as pictures."""

from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402

from tests.bench.table import Row  # noqa: E402


def _save(figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def latency(rows: list[Row], path: Path) -> None:
    """Latency against the share of requests that were slower, of every row that has percentiles."""
    figure, axes = plt.subplots(figsize=(13, 6))
    for row in rows:
        if row.percentiles:
            points = [(100 / (100 - share), ms) for share, ms in row.percentiles if share < 100]
            style = ":" if "bare" in row.what else "--" if "peer" in row.what else "-"
            axes.plot(*zip(*points, strict=True), style, label=row.what)
    axes.set(xscale="log", yscale="log", xlabel="one request in … is slower", ylabel="ms")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.grid(alpha=0.3)
    _save(figure, path)


def growth(grown: list[dict], path: Path) -> None:
    """Redis' time, requests a second and memory against posts."""
    figure, (times, rates, memory) = plt.subplots(1, 3, figsize=(13, 4))
    posts = [said["posts"] for said in grown]
    for name in grown[0]:
        values = [said[name] for said in grown]
        if name in ("first", "cursors"):
            rates.plot(posts, values, "o-", label={"first": "first page", "cursors": "100 cursors"}[name])
        elif name not in ("posts", "comments", "memory"):
            times.plot(posts, values, "o-", label=name)
    memory.plot(posts, [said["memory"] / 2**20 for said in grown], "o-")
    for axes, label in ((times, "Redis' own µs a call"), (rates, "requests/s"), (memory, "MiB of Redis")):
        axes.set(xscale="log", xlabel="posts", ylabel=label, ylim=(0, None))
        axes.grid(alpha=0.3)
    memory.set(yscale="log", ylim=(None, None))
    times.legend(fontsize=7)
    rates.legend(fontsize=7)
    _save(figure, path)


def memory(lengths: dict[str, list[dict]], path: Path) -> None:
    """Bytes a comment against how many its post has, for each server."""
    figure, axes = plt.subplots(figsize=(7, 4))
    for server, points in lengths.items():
        axes.plot([point["comments"] for point in points], [point["bytes"] for point in points], "o-", label=server)
    axes.set(xscale="log", xlabel="comments of a post", ylabel="bytes a comment, all keys counted", ylim=(0, None))
    axes.legend()
    axes.grid(alpha=0.3)
    _save(figure, path)


def forecast(seen: dict[str, dict], path: Path) -> None:
    """Histograms of latency under each load."""
    figure, parts = plt.subplots(1, len(seen), figsize=(6 * len(seen), 4), squeeze=False)
    for axes, (load, said) in zip(parts[0], seen.items(), strict=True):
        for name, stream in said["streams"].items():
            axes.step(*zip(*stream["histogram"], strict=True), where="mid", label=f"{name}, {stream['count']:,} calls")
        axes.axvline(50, color="grey", linestyle=":")
        axes.set(xscale="log", yscale="log", xlabel="ms", ylabel="calls", title=load)
        axes.legend(fontsize=8)
    _save(figure, path)
