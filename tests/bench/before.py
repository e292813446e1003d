"""Compares the rates of this checkout with those of an earlier revision, in turns.

    python -m tests.bench.before REVISION

Each has an API process, and a Redis of its own with the same posts. Both APIs share one core. Neither has work while
the other is measured. `make bench-before REVISION=…` runs it.

With few connections a server is idle at times, because all of them wait for Redis. So there are two ratios: of the
rates, and of the API's CPU time for a request. More `--connections` bring them together.
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

from tests.bench import drive, fill
from tests.bench.drive import Load, Run, in_turns, middle
from tests.bench.parts import Api, Redis
from tests.bench.transfers import PNG, by_form, by_tus
from tests.conftest import ROOT

POSTS, COMMENTS = 10_000, 100_000
SIZE = 32 << 20  # bytes of an upload
FEED = "/v1/posts?limit=10"
BODY = orjson.dumps({"text": fill.TEXT})


def site(stack: contextlib.ExitStack, root: Path, **settings) -> tuple[Api, dict]:
    """Starts the API of the checkout at `root`. Returns it, and for each call a function that measures it for seconds.

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

    cursors = [f"{FEED}&cursor={cursor}" for cursor in fill.cursors(redis, api.url, 100)]
    return api, {
        "feed, first page of 10": Load(api.url, [FEED]).run,
        "feed, 100 cursors at random": Load(api.url, cursors).run,
        "one post, 10,000 at random": Load(api.url, [f"/v1/posts/{post}" for post in ids]).run,
        "20 comments of a post": Load(api.url, [f"/v1/posts/{post}/comments?limit=20" for post in ids]).run,
        "comment": Load(api.url, [f"/v1/posts/{post}/comments" for post in ids], "POST", commenter, BODY).run,
        "image of 60 kB": Load(api.url, [f"/v1/images/{post}.jpg" for post in ids]).run,
        "form of 32 MiB": upload(by_form),
        "tus, 32 MiB": upload(by_tus),
    }


def processor_time(api: Api) -> float:
    """Seconds that the API's process has been on a core."""
    return sum(int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) for pid in api.pids()) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.before", description=__doc__)
    parser.add_argument("revision")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--limits", default="", help="IMAGEGRAM_LIMITS of this checkout")
    parser.add_argument("--connections", type=int, default=drive.CONNECTIONS)
    parser.add_argument("--only", default="", help="measure only the calls whose name contains this")
    options = parser.parse_args()
    drive.CONNECTIONS = options.connections
    with contextlib.ExitStack() as stack:
        earlier = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ig-")), "earlier")
        subprocess.run(["git", "worktree", "add", "-q", "--detach", earlier, options.revision], cwd=ROOT, check=True)
        stack.callback(subprocess.run, ["git", "worktree", "remove", "--force", earlier], cwd=ROOT, check=True)
        before_api, before = site(stack, earlier)
        after_api, after = site(stack, ROOT, limits=options.limits)

        def measure(api: Api, run) -> tuple[Run, float]:
            """The result, and seconds of CPU time for a request."""
            began = processor_time(api)
            result = run(options.seconds)
            return result, (processor_time(api) - began) / (result.rate * options.seconds)

        print("| call | before | after | after ÷ before | lowest and highest | CPU time, after ÷ before |")
        print("|---|---|---|---|---|---|")
        for name in (name for name in after if options.only in name):
            for run in (before[name], after[name]):
                run(1)  # warms the caches
            subjects = {
                "before": partial(measure, before_api, before[name]),
                "after": partial(measure, after_api, after[name]),
            }
            runs = in_turns(subjects, options.rounds)
            assert not sum(run.errors for some in runs.values() for run, _ in some), name
            rounds = list(zip(runs["after"], runs["before"], strict=True))
            ratios = sorted(a.rate / b.rate for (a, _), (b, _) in rounds)
            unit = "MiB/s" if "MiB" in name else "/s"
            rates = [f"{middle(runs[who], lambda run: run[0].rate):,.0f} {unit}" for who in ("before", "after")]
            cost = "" if "MiB" in name else f"{median(a / b for (_, a), (_, b) in rounds):.2f}"
            figures = [name, *rates, f"{median(ratios):.2f}", f"{ratios[0]:.2f} to {ratios[-1]:.2f}", cost]
            print(f"| {' | '.join(figures)} |", flush=True)


if __name__ == "__main__":
    main()
