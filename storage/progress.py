"""How far is a long command? A bar on a terminal, or a line every few seconds in a log."""

import sys
import time
from typing import TextIO

WIDTH = 24  # characters of the bar
REDRAW = 0.1  # seconds between two drawings of the bar
LINE = 5.0  # seconds between two lines, where the output is no terminal


class Progress:
    """Shows the progress of one command.

        with Progress() as progress:
            progress.show("keys", 300, 1200)
            progress.show("keys", 1200, 1200, "3 posts found")

    shows `keys [#######-----------------] 25 %, 300 of 1200, 4 s left`, and later the next state in the same place.
    """

    def __init__(self, stream: TextIO | None = None):
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._shown_at = 0.0
        self._label = ""
        self._began_at = 0.0
        self._began_with = 0
        self._last = ""

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self._finish_line()

    def show(self, label: str, done: int, total: int, note: str = "") -> None:
        """Show that `done` of `total` are done. A new `label` begins a new bar."""
        now = time.monotonic()
        if label != self._label:
            self._finish_line()
            self._label, self._began_at, self._began_with = label, now, done
            self._shown_at = 0.0 if self._terminal else now  # a short command prints no line into a log
        total = max(total, done, 1)
        left = (now - self._began_at) * (total - done) / max(done - self._began_with, 1)
        filled = WIDTH * done // total
        self._last = f"{label} [{'#' * filled}{'-' * (WIDTH - filled)}] {100 * done // total} %, {done} of {total}"
        if done > self._began_with and done < total:
            self._last += f", {left:.0f} s left"
        self._last += f", {note}" if note else ""
        if now >= self._shown_at + (REDRAW if self._terminal else LINE):
            self._shown_at = now
            self._draw()

    def _draw(self) -> None:
        # \r goes to the beginning of the line, and ESC [K clears the rest of it (ECMA-48, "EL").
        self._stream.write(f"\r{self._last}\x1b[K" if self._terminal else f"{self._last}\n")
        self._stream.flush()

    def _finish_line(self) -> None:
        if self._label and self._terminal:
            self._draw()
            self._stream.write("\n")
            self._stream.flush()
        self._label = ""
