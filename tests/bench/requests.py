"""Measures requests to our API, to bare Sanic and to the peer, in turns, with 32 connections each."""

import contextlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import httpx
import orjson

from tests.bench import fill
from tests.bench.drive import Load, Run, in_turns, middle, percentiles, ratio, steady
from tests.bench.parts import DRIVER, Api, Bare, Redis, fixed_answer
from tests.bench.peer.server import Peer
from tests.bench.table import Row, of_runs

POSTS, COMMENTS = 10_000, 100_000
WRITTEN = 1400  # comments a second during the feed: 50 times the forecast
FEED = "/v1/posts?limit=10"
BODY = orjson.dumps({"text": fill.TEXT})
PLAIN = {"Accept-Encoding": "identity"}


@dataclass
class Call:
    """A call that is measured, and its targets."""

    title: str  # in the plot
    what: str  # in the table
    bare: float  # our rate ÷ bare Sanic's must reach this
    peer: float | None = None  # our rate ÷ the peer's must reach this
    p99_bare: float | None = None  # our p99 ÷ bare Sanic's must not exceed this
    p99_ms: float | None = None  # our p99 must not exceed this


CALLS = {
    "feed": Call("Feed: first page of 10", "feed, first page of 10", 1.20, peer=6, p99_bare=1.5),
    "cursors": Call("Feed: 100 cursors at random", "feed, 100 cursors at random", 0.60),
    "304": Call("Feed: not modified (304)", "304 for a fresh page", 0.95),
    "post": Call("One post of 10,000", "one post, 10,000 at random", 0.60),
    "image": Call("Image of 60 kB", "image of 60 kB, 10,000 at random", 0.60),
    "written": Call("", f"feed, while {WRITTEN:,} comments/s are written", 0.75),
    "comment": Call("Add a comment, fsynced", "comment, fsynced, 10,000 posts at random", 0.45, peer=2.5, p99_ms=20),
}


def p99(run: Run) -> float:
    return run.percentiles[99]


def comments_plan(api: Api, ids: list[str]) -> dict:
    """A plan for `steady`: comments at a steady rate, for posts at random."""
    paths = [f"/v1/posts/{post}/comments" for post in ids]
    stream = {"name": "comment", "rate": WRITTEN, "method": "POST", "paths": paths, "headers": api.bearer("writer")}
    return {"port": api.port, "streams": [{**stream, "body": BODY.decode(), "status": 201}]}


def our_loads(api: Api, redis: Redis, ids: list[str]) -> dict[str, Load]:
    etag = httpx.get(api.url + FEED, headers=PLAIN).headers["etag"]
    bearer = api.bearer("commenter1")
    return {
        "feed": Load(api.url, [FEED]),
        "cursors": Load(api.url, [f"{FEED}&cursor={cursor}" for cursor in fill.cursors(redis, api.url, 100)]),
        "304": Load(api.url, [FEED], headers={"If-None-Match": etag}),
        "post": Load(api.url, [f"/v1/posts/{post}" for post in ids]),
        "image": Load(api.url, [f"/v1/images/{post}.jpg" for post in ids]),
        "comment": Load(api.url, [f"/v1/posts/{post}/comments" for post in ids], "POST", bearer, BODY),
    }


def peer_loads(peer: Peer, bearer: dict[str, str]) -> dict[str, Load]:
    return {
        "feed": Load(peer.url, [FEED]),
        "cursors": Load(peer.url, [f"{FEED}&cursor={cursor}" for cursor in peer.cursors(100)]),
        "post": Load(peer.url, [f"/v1/posts/{post}" for post in peer.ids]),
        "comment": Load(peer.url, [f"/v1/posts/{post}/comments" for post in peer.ids], "POST", bearer, BODY),
    }


def first_answer(load: Load) -> httpx.Response:
    headers = {**PLAIN, **(load.headers or {})}
    return httpx.request(load.method, load.url + load.paths[0], headers=headers, content=load.body)


def measure(rounds: int, seconds: float, only: str = "") -> tuple[list[Row], dict]:
    """Measures the calls of CALLS whose names contain `only`.

    Returns the rows of the table and what `plots.latency` draws: percentiles by title and server.
    """
    names = [name for name in CALLS if only in name]
    rows: list[Row] = []
    latencies: dict[str, dict[str, dict[float, float]]] = {}
    counts = fill.counts(POSTS, COMMENTS)
    with contextlib.ExitStack() as stack:

        def closing(server):
            stack.callback(server.close)
            return server

        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ig-")))
        redis = closing(Redis())
        ids = fill.fill(redis, counts)
        if "image" in names:
            fill.images(folder / "store", ids)
        api = closing(Api(redis, folder))
        peer = closing(Peer(counts, api.environment["IMAGEGRAM_JWT_SECRET"]))
        ours = our_loads(api, redis, ids)
        theirs = peer_loads(peer, ours["comment"].headers)
        answers = {name: fixed_answer(first_answer(ours[name])) for name in names if name in ours}
        bare = closing(Bare(folder, answers))

        def runs_of(name: str) -> dict[str, list[Run]]:
            load = ours[name]
            subjects = {"ours": load, "bare": Load(bare.url, [f"/{name}"], load.method, None, load.body)}
            if name in theirs:
                subjects["peer"] = theirs[name]
            for subject in subjects.values():
                subject.run(1)  # warms the caches
            return in_turns({who: lambda load=load: load.run(seconds) for who, load in subjects.items()}, rounds)

        def measure_feed_during_writes(call: Call) -> None:
            written: list[float] = []  # comments a second that were answered

            def feed_during_writes() -> Run:
                with steady(comments_plan(api, ids), DRIVER) as results:
                    run = ours["feed"].run(seconds)
                stream = results["streams"]["comment"]
                assert not stream["errors"], stream["errors"]
                written.append(stream["rate"])
                return run

            runs = in_turns({"alone": lambda: ours["feed"].run(seconds), "busy": feed_during_writes}, rounds)
            note = f"value: ÷ feed alone; {median(written):,.0f} comments/s were answered"
            rows.append(of_runs(call.what, runs["busy"], ratio(runs["busy"], runs["alone"]), call.bare, note))
            latencies.setdefault(CALLS["feed"].title, {})["busy"] = percentiles(runs["busy"])

        for name in names:
            call = CALLS[name]
            if name == "written":
                measure_feed_during_writes(call)
                continue
            runs = runs_of(name)
            latencies[call.title] = {who: percentiles(measured) for who, measured in runs.items()}
            rows += call_rows(call, runs)
        fill.verify(redis, ids[:200], POSTS, sum(redis.client.xlen(f"comments:{{0}}:{post}") for post in ids))
    return rows, latencies


def call_rows(call: Call, runs: dict[str, list[Run]]) -> list[Row]:
    """The rows of a call, from the runs of `ours`, `bare` and perhaps `peer`."""
    rows = [
        of_runs(f"{call.what}: bare Sanic, the same bytes", runs["bare"]),
        of_runs(call.what, runs["ours"], ratio(runs["ours"], runs["bare"]), call.bare),
    ]
    if call.p99_bare:
        rows.append(Row(f"{call.what}: p99 ÷ bare", ratio(runs["ours"], runs["bare"], p99), call.p99_bare, most=True))
    if "peer" in runs:
        value = ratio(runs["ours"], runs["peer"])
        rows.append(of_runs(f"{call.what}: the peer", runs["peer"], value, call.peer, "value: our rate ÷ its"))
    if call.p99_ms:
        rows.append(Row(f"{call.what}: p99", middle(runs["ours"], p99), call.p99_ms, most=True, unit="ms"))
    return rows
