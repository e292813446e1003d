"""Requests: ours, bare Sanic's and the peer's, in turns, 32 connections."""

import contextlib
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import httpx
import orjson

from tests.bench import fill
from tests.bench.drive import Load, in_turns, middle, ratio
from tests.bench.parts import DRIVER, Api, Bare, Redis, given, pin
from tests.bench.peer.server import Peer
from tests.bench.table import Row, of_runs
from tests.conftest import ROOT

POSTS, COMMENTS = 10_000, 100_000
WRITTEN = 1400  # comments a second beside the feed: 50 times the forecast
FEED = "/v1/posts?limit=10"
BODY = orjson.dumps({"text": fill.TEXT})


def p99(run):
    return run.percentiles[99]


@contextlib.contextmanager
def beside(api: Api, ids: list[str], rate: int):
    """Comments written at a steady rate meanwhile. Yields a list that then has how many a second were answered."""
    answered: list[float] = []
    paths = [f"/v1/posts/{post}/comments" for post in ids]
    stream = {"name": "comment", "rate": rate, "method": "POST", "paths": paths, "headers": api.bearer("writer")}
    plan = {"port": api.port, "streams": [{**stream, "body": BODY.decode(), "status": 201}]}
    with tempfile.NamedTemporaryFile("wb") as kept:
        kept.write(orjson.dumps(plan))
        kept.flush()
        command = [sys.executable, "-m", "tests.bench.pace", kept.name]
        writer = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        pin(writer.pid, DRIVER)
        assert writer.stdout.readline() == "begins\n"
        try:
            yield answered
        finally:
            said, _ = writer.communicate("end\n")
        seen = orjson.loads(said)["streams"]["comment"]
        assert not seen["errors"], seen["errors"]
        answered.append(seen["rate"])


def measure(rounds: int, seconds: float, only: str = "") -> list[Row]:
    """The rows whose names contain `only`."""
    rows: list[Row] = []
    counts = fill.counts(POSTS, COMMENTS)
    with contextlib.ExitStack() as stack:

        def started(part):
            stack.callback(part.close)
            return part

        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ig-")))
        redis = started(Redis())
        ids = fill.fill(redis, counts)
        if only in "image":
            fill.images(folder / "store", ids)
        api = started(Api(redis, folder))
        peer = started(Peer(counts, api.environment["IMAGEGRAM_JWT_SECRET"]))
        fresh = {"If-None-Match": httpx.get(api.url + FEED, headers={"Accept-Encoding": "identity"}).headers["etag"]}
        bearer = api.bearer("commenter1")
        loads = {
            "feed": Load(api.url, [FEED]),
            "cursors": Load(api.url, [f"{FEED}&cursor={cursor}" for cursor in fill.cursors(redis, 100)]),
            "304": Load(api.url, [FEED], headers=fresh),
            "post": Load(api.url, [f"/v1/posts/{post}" for post in ids]),
            "image": Load(api.url, [f"/v1/images/{post}.jpg" for post in ids]),
            "comment": Load(api.url, [f"/v1/posts/{post}/comments" for post in ids], "POST", bearer, BODY),
        }
        plain = {"Accept-Encoding": "identity"}
        answers = {
            name: given(
                httpx.request(
                    load.method,
                    load.url + load.paths[0],
                    headers={**plain, **(load.headers or {})},
                    content=load.body,
                )
            )
            for name, load in loads.items()
            if name != "image" or only in "image"
        }
        bare = started(Bare(folder, answers))
        peers = {
            "feed": Load(peer.url, [FEED]),
            "cursors": Load(peer.url, [f"{FEED}&cursor={cursor}" for cursor in peer.cursors(100)]),
            "post": Load(peer.url, [f"/v1/posts/{post}" for post in peer.ids]),
            "comment": Load(peer.url, [f"/v1/posts/{post}/comments" for post in peer.ids], "POST", bearer, BODY),
        }

        def turns(name: str) -> dict:
            ours = loads[name]
            subjects = {"ours": ours, "bare": Load(bare.url, [f"/{name}"], ours.method, None, ours.body)}
            if name in peers:
                subjects["peer"] = peers[name]
            for load in subjects.values():
                load.run(1)  # warms what remembers
            return in_turns({who: lambda load=load: load.run(seconds) for who, load in subjects.items()}, rounds)

        def add(name: str, what: str, target: float, times: float | None = None, worst: float | None = None) -> None:
            """`times` is what ours must be of the peer's rate, `worst` what p99 may be of bare's."""
            if only not in name:
                return
            runs = turns(name)
            rows.append(of_runs(f"{what}: bare Sanic, the same bytes", runs["bare"]))
            rows.append(of_runs(what, runs["ours"], ratio(runs["ours"], runs["bare"]), target))
            if worst:
                rows.append(Row(f"{what}: p99 ÷ bare", ratio(runs["ours"], runs["bare"], p99), worst, most=True))
            if "peer" in runs:
                rows.append(of_runs(f"{what}: the peer", runs["peer"], ratio(runs["ours"], runs["peer"]), times))
                rows[-1].note = "value: our rate ÷ its"
            if name == "comment":
                value = middle(runs["ours"], p99)
                rows.append(Row(f"{what}: p99", value, 20, most=True, unit="ms"))

        add("feed", "feed, first page of 10", 0.90, times=6, worst=1.5)
        add("cursors", "feed, 100 cursors at random", 0.45)
        add("304", "304 for a fresh page", 0.95)
        add("post", "one post, 10,000 at random", 0.50)
        add("image", "image of 60 kB, 10,000 at random", 0.50)
        if only in "written":

            written = []

            def feed_beside():
                with beside(api, ids, WRITTEN) as answered:
                    run = loads["feed"].run(seconds)
                written.extend(answered)
                return run

            runs = in_turns({"alone": lambda: loads["feed"].run(seconds), "beside": feed_beside}, rounds)
            value = ratio(runs["beside"], runs["alone"])
            rows.append(of_runs(f"feed, while {WRITTEN:,} comments/s are written", runs["beside"], value, 0.70))
            rows[-1].note = f"value: ÷ feed alone; {median(written):,.0f} comments/s were answered"
        add("comment", "comment, fsynced, 10,000 posts at random", 0.45, times=2.5)
        fill.verify(redis, ids[:200], POSTS, sum(redis.client.xlen(f"comments:{{0}}:{post}") for post in ids))
    return rows
