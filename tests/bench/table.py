"""The measurements as rows of a Markdown table."""

from dataclasses import dataclass

from tests.bench.drive import Run, middle

COLUMNS = ["what", "requests/s", "p50 ms", "p99 ms", "max ms", "value", "target", "met", "note"]
ALIGNMENT = "|---|--:|--:|--:|--:|--:|--:|---|---|"


@dataclass
class Row:
    """One row. `value` must reach `target`; if `most` is true it must not exceed it."""

    what: str
    value: float | None = None
    target: float | None = None
    most: bool = False
    unit: str = "×"
    rate: float | None = None  # requests per second
    p50: float | None = None  # ms
    p99: float | None = None  # ms
    max: float | None = None  # ms
    note: str = ""
    errors: int = 0

    @property
    def met(self) -> str:
        """Whether the target is met. Empty if the row has no target or no value."""
        if self.target is None or self.value is None:
            return ""
        reached = self.value <= self.target if self.most else self.value >= self.target
        return "yes" if reached and not self.errors else "**no**"


def of_runs(what: str, runs: list[Run], value: float | None = None, target: float | None = None, note: str = "") -> Row:
    """A row with the medians of the runs, the maximum of all runs and the sum of their errors."""
    return Row(
        what,
        value,
        target,
        rate=middle(runs, lambda run: run.rate),
        p50=middle(runs, lambda run: run.percentiles[50]),
        p99=middle(runs, lambda run: run.percentiles[99]),
        max=max(run.max for run in runs),
        note=note,
        errors=sum(run.errors for run in runs),
    )


def number(value: float | None) -> str:
    """A number with about three digits. Empty if there is none."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}" if abs(value) < 0.1 else f"{value:.2f}"


def markdown(rows: list[Row]) -> str:
    lines = ["| " + " | ".join(COLUMNS) + " |", ALIGNMENT]
    for row in rows:
        target = "" if row.target is None else f"{'≤' if row.most else '≥'} {number(row.target)}"
        value = "" if row.value is None else f"{number(row.value)} {row.unit}"
        note = row.note + (f" {row.errors} errors" if row.errors else "")
        figures = [number(figure) for figure in (row.rate, row.p50, row.p99, row.max)]
        lines.append("| " + " | ".join([row.what, *figures, value, target, row.met, note.strip()]) + " |")
    return "\n".join(lines) + "\n"
