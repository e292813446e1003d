"""What was measured, as rows of one table."""

from dataclasses import dataclass, field

from tests.bench.drive import Run, middle


@dataclass
class Row:
    """One line. `value` is compared with `target`, which it must reach, or stay below if `most`."""

    what: str
    value: float | None = None
    target: float | None = None
    most: bool = False
    unit: str = "×"
    rate: float | None = None  # requests per second
    p50: float | None = None  # ms
    p99: float | None = None
    max: float | None = None
    note: str = ""
    errors: int = 0
    percentiles: list[tuple[float, float]] = field(default_factory=list)

    @property
    def met(self) -> str:
        if self.target is None or self.value is None:
            return ""
        reached = self.value <= self.target if self.most else self.value >= self.target
        return "yes" if reached and not self.errors else "**no**"


def of_runs(what: str, runs: list[Run], value: float | None = None, target: float | None = None, note: str = "") -> Row:
    percentiles = [
        (share, middle(runs, lambda run, share=share: run.percentiles[share])) for share in sorted(runs[0].percentiles)
    ]
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
        percentiles=percentiles,
    )


def number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}" if abs(value) < 0.1 else f"{value:.2f}"


def markdown(rows: list[Row]) -> str:
    lines = [
        "| what | requests/s | p50 ms | p99 ms | max ms | value | target | met | |",
        "|---|--:|--:|--:|--:|--:|--:|---|---|",
    ]
    for row in rows:
        target = "" if row.target is None else f"{'≤' if row.most else '≥'} {number(row.target)}"
        value = "" if row.value is None else f"{number(row.value)} {row.unit}"
        note = row.note + (f" {row.errors} errors" if row.errors else "")
        shown = [row.what, *map(number, (row.rate, row.p50, row.p99, row.max)), value, target, row.met, note.strip()]
        lines.append("| " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"
