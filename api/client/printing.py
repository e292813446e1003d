"""What people and scripts read: results on stdout; progress and notes on stderr.

With `--json` a result is one line of JSON, in ASCII. Without it, texts of other people are printed without their
control characters, which could command the reader's terminal.
"""

import json
import os
import re
import sys
from contextlib import contextmanager

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline


def clean(text: str) -> str:
    r"""
    >>> clean("red \x1b[31m\n")
    'red \ufffd[31m\n'
    """
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n"))


def show(text: str) -> None:
    """Print a result at once, also into a pipe."""
    print(clean(text), flush=True)


def show_json(value: object) -> None:
    print(json.dumps(value), flush=True)


def note(text: str) -> None:
    """Tell the user what happens meanwhile, in one line. The command goes on if nobody reads stderr any more."""
    if sys.stderr is None:  # the caller has closed it. `print` would take stdout, where only results belong
        return
    try:
        print(clean(text).replace("\n", " "), file=sys.stderr, flush=True)
    except OSError:
        close(2)


def close(descriptor: int) -> None:
    """Drop what is written to stdout (1) or stderr (2) from now on, and what Python flushes at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def indent(text: str, by: str = "  ") -> str:
    """A text of another person, below the line that names its author. No line of it can be taken for ours."""
    return by + text.replace("\n", f"\n{by}")


def post_text(post: dict, url: str) -> str:
    """A post as people read it. `url` is the site's.

    01M8DGJ09TAYQZNDXJ4SB7SXV4-0  alice  2026-11-27 03:25  2 comments
      From a train
      https://example.org/v1/images/01M8DGJ09TAYQZNDXJ4SB7SXV4-0.jpg
    """
    state = f"{post['comment_count']} comment" + ("" if post["comment_count"] == 1 else "s")
    if post["status"] != "ready":
        state = post["status"] + (f", {post['error']['detail']}" if post.get("error") else "")
    lines = [f"{post['id']}  {post['author']}  {minute(post['created_at'])}  {state}"]
    if post["caption"]:
        lines.append(indent(post["caption"]))
    if post["image"]:
        lines.append(indent(url + post["image"]["url"]))
    return "\n".join(lines)


def comment_text(comment: dict) -> str:
    head = f"  {comment['id']}  {comment['author']}  {minute(comment['created_at'])}"
    return f"{head}\n{indent(comment['text'], '    ')}"


def minute(time: str) -> str:
    """
    >>> minute("2026-11-27T03:25:04.698Z")
    '2026-11-27 03:25'
    """
    return time[:16].replace("T", " ")


class Bar:
    """A progress bar with rate and time left, on stderr if that is a terminal. Elsewhere it shows nothing."""

    def __init__(self):
        from rich.console import Console  # not at the top: only one command needs it, and it takes 0.2 s
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        console = Console(stderr=True)
        name = TextColumn("{task.description}", markup=False)
        columns = name, BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn()
        self.bars = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task = None
        self.offset = self.size = 0

    def start(self, name: str, offset: int, size: int) -> None:
        if self.task is not None:
            self.bars.remove_task(self.task)
        # The bytes of an earlier run belong to `completed` from the start. Otherwise they would count for the rate.
        self.task = self.bars.add_task(clean(name), total=size, completed=offset)
        self.offset, self.size = offset, size

    def move(self, offset: int) -> None:
        self.bars.update(self.task, completed=offset)
        self.offset = offset

    def note(self, text: str) -> None:
        if self.bars.disable:
            note(text)
        else:
            self.bars.console.print(clean(text), markup=False, highlight=False, emoji=False, soft_wrap=True)

    @contextmanager
    def shown(self):
        with self.bars:
            yield self
