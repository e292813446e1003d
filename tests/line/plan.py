"""What is measured, and how often."""

from statistics import median
from typing import NamedTuple

from tests.line.site import PICTURES, Place

MEASURED = ("EDGE", "3G", "wifi")
CONTROLS = ("cubic", "bbr")
ROUNDS = 5
FEED = "/v1/posts?limit=10"
MIB = 1 << 20

OURS = {"whose": "ours", "protocol": "h2", "feed": FEED, "looks": True, "flight": 2}
AT_ONCE = {"looks": False, "flight": PICTURES}
PEER = {"whose": "peer", "protocol": "h1", "feed": "/baseline/feed.json", **AT_ONCE}
# Ways of reading, by name: whose server, and what the client does there.
BEST = "first looks, then two at a time"
WAYS = {
    BEST: OURS,
    f"{BEST}, HTTP/1.1": {**OURS, "protocol": "h1"},
    f"{BEST}, HTTP/1.1, a new connection each": {**OURS, "protocol": "h1", "keep": False},
    f"{BEST}, HTTP/3": {**OURS, "protocol": "h3"},
    f"{BEST}, HTTP/3, comes back": {**OURS, "protocol": "h3", "comes_back": True},
    "first looks, then all ten at once": {**OURS, "flight": PICTURES},
    "two at a time": {**OURS, "looks": False},
    "all ten at once": {**OURS, **AT_ONCE},
    "all ten at once, Pillow's JPEGs": {**PEER, "protocol": "h2", "feed": "/before/feed.json"},
    "the plain peer": PEER,
}
# Ways of sending the photograph, by name: the protocol, what the client does, and whether also over bbr.
SENDING = {
    "form": ("h1", {"way": "form"}, True),
    "tus, one PATCH": ("h1", {"way": "tus"}, True),
    "form, broken half way": ("h1", {"way": "form", "breaks": True}, True),
    "tus, broken half way": ("h1", {"way": "tus", "breaks": True}, True),
    "tus, PATCHes of 1 MiB": ("h1", {"way": "tus", "chunk": MIB}, True),
    "tus, PATCHes of 64 KiB": ("h1", {"way": "tus", "chunk": MIB // 16}, True),
    "tus, four parts, four connections": ("h1", {"way": "tus", "parts": 4}, True),
    "tus, one PATCH, HTTP/2": ("h2", {"way": "tus"}, False),
    "tus, four parts, one connection, HTTP/2": ("h2", {"way": "tus", "parts": 4}, False),
    "tus, one PATCH, HTTP/3": ("h3", {"way": "tus"}, False),
}
SENDING_ROUNDS = {"EDGE": 1, "3G": 3, "wifi": 5}  # a photograph takes two minutes on EDGE, which loses few packets
READY = {"wait": True, "poll": False}
READY_TIMES = 5


class Task(NamedTuple):
    """One measurement of one seed. `name` says what is measured, and is equal for all seeds."""

    name: tuple
    profile: str
    congestion: str
    job: dict  # for client.py
    seed: int  # of the line
    expected: float  # seconds; the longest begin first


def reading(place: Place) -> list[Task]:
    tasks = []
    for profile in MEASURED:
        for way, options in WAYS.items():
            job = {"do": "screen", "url": place.url if options["whose"] == "ours" else place.peer, **options}
            del job["whose"]
            # nginx has a congestion control of its own for QUIC, which does not ask the route.
            for congestion in CONTROLS if options["protocol"] != "h3" else CONTROLS[:1]:
                name = "read", profile, congestion, way
                expected = {"EDGE": 25, "3G": 8, "wifi": 8}[profile]
                tasks += [Task(name, profile, congestion, job, seed, expected) for seed in range(ROUNDS)]
    return tasks


def sending(place: Place) -> list[Task]:
    tasks = []
    for profile in MEASURED:
        for way, (protocol, options, also_bbr) in SENDING.items():
            job = {"do": "upload", "protocol": protocol, "url": place.url, "file": str(place.photograph), **options}
            expected = {"EDGE": 140, "3G": 50, "wifi": 60}[profile] * (1.4 if "breaks" in options else 1)
            for congestion in CONTROLS[: 1 + also_bbr]:
                name = "send", profile, congestion, way
                seeds = range(SENDING_ROUNDS[profile])
                tasks += [Task(name, profile, congestion, job, seed, expected) for seed in seeds]
    return tasks


def waiting(place: Place) -> list[Task]:
    """From the 201 of a post until the client hears that it is ready."""
    tasks = []
    for profile in MEASURED:
        for way, wait in READY.items():
            job = {"do": "ready", "protocol": "h2", "url": place.url, "file": str(place.small), "wait": wait}
            tasks.append(Task(("ready", profile, way), profile, "cubic", {**job, "times": READY_TIMES}, 0, 30))
    return tasks


def middle(runs: list[dict], kind: str, number: int = -1) -> tuple[float, float]:
    """The median of seconds and of bytes over the runs until an event of client.py's `screen`.

    `number` says which one of those of which there are ten.
    """
    events = [run[kind][number] if kind in ("seen", "whole") else run[kind] for run in runs]
    return median(seconds for seconds, _ in events), median(size for _, size in events)
