"""Compares the rates of this checkout with those of an earlier revision, in turns.

    python -m tests.bench.before REVISION

Each has an API process, and a Redis of its own with the same posts. Both APIs share one core. Neither has work while
the other is measured. `make bench-before REVISION=…` runs it.
"""

import argparse
import contextlib
import secrets
import subprocess
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

import orjson

from tests.bench import fill
from tests.bench.drive import Load, Run, in_turns, middle
from tests.bench.parts import Api, Redis
from tests.bench.transfers import PNG, by_form, by_tus
from tests.conftest import ROOT

POSTS, COMMENTS = 10_000, 100_000
SIZE = 32 << 20  # bytes of an upload
FEED = "/v1/posts?limit=10"
BODY = orjson.dumps({"text": fill.TEXT})


def site(stack: contextlib.ExitStack, root: Path, **settings) -> dict:
    """Starts the API of the checkout at `root`. Returns for each call a function that measures it for some seconds.

    The rate of an upload is in MiB/s.
    """
    redis = Redis()
    stack.callback(redis.close)
    ids = fill.fill(redis, fill.counts(POSTS, COMMENTS))
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ig-")))
    fill.images(folder / "store", ids)
    api = Api(redis, folder, root=root, **settings)
    stack.callback(api.close)
    commenter = api.bearer("commenter1")
    data = memoryview(PNG + secrets.token_bytes(SIZE))

    def upload(send):
        def run(_: float) -> Run:
            began = time.monotonic()
            send(api, api.bearer(f"uploader{secrets.token_hex(4)}"), data)
            return Run(SIZE / (time.monotonic() - began) / 2**20, {50: 0.0}, 0.0, 0)

        return run

    cursors = [f"{FEED}&cursor={cursor}" for cursor in fill.cursors(redis, 100)]
    return {
        "feed, first page of 10": Load(api.url, [FEED]).run,
        "feed, 100 cursors at random": Load(api.url, cursors).run,
        "one post, 10,000 at random": Load(api.url, [f"/v1/posts/{post}" for post in ids]).run,
        "comment": Load(api.url, [f"/v1/posts/{post}/comments" for post in ids], "POST", commenter, BODY).run,
        "image of 60 kB": Load(api.url, [f"/v1/images/{post}.jpg" for post in ids]).run,
        "form of 32 MiB": upload(by_form),
        "tus, 32 MiB": upload(by_tus),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.before", description=__doc__)
    parser.add_argument("revision")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--limits", default="", help="IMAGEGRAM_LIMITS of this checkout")
    parser.add_argument("--only", default="", help="measure only the calls whose name contains this")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        earlier = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ig-")), "earlier")
        subprocess.run(["git", "worktree", "add", "-q", "--detach", earlier, options.revision], cwd=ROOT, check=True)
        stack.callback(subprocess.run, ["git", "worktree", "remove", "--force", earlier], cwd=ROOT, check=True)
        before = site(stack, earlier)
        after = site(stack, ROOT, limits=options.limits)
        print("| call | before | after | after ÷ before | lowest and highest |\n|---|---|---|---|---|")
        for name in (name for name in after if options.only in name):
            for measure in (before[name], after[name]):
                measure(1)  # warms the caches
            subjects = {
                "before": partial(before[name], options.seconds),
                "after": partial(after[name], options.seconds),
            }
            runs = in_turns(subjects, options.rounds)
            assert not sum(run.errors for some in runs.values() for run in some), name
            ratios = sorted(a.rate / b.rate for a, b in zip(runs["after"], runs["before"], strict=True))
            unit = "MiB/s" if "MiB" in name else "/s"
            rates = [f"{middle(runs[who], lambda run: run.rate):,.0f} {unit}" for who in ("before", "after")]
            extremes = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
            print(f"| {name} | {rates[0]} | {rates[1]} | {median(ratios):.2f} | {extremes} |", flush=True)


if __name__ == "__main__":
    main()
