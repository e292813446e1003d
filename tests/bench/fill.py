"""Fills data sets in by pipelines, without scripts and HTTP: what is there afterwards is what they would have made.

`verify` proves it on a sample, by the invariants and by making the same post with the scripts.
"""

import random
import socket
import time
from base64 import b64encode, urlsafe_b64encode
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from storage import keys
from storage.settings import LATEST_COMMENTS
from tests.conftest import RedisServer

AUTHOR = "user-%05d"  # 10 bytes
CAPTION = "A photograph of number %08d, taken on the way, in colour"
TEXT = "What a place! I would go there at once if only it were nearer."  # 62 bytes
GAP_MS = 600_000  # between two comments of a post
IMAGE_BYTES = 60_000


@dataclass
class Row:
    """A post of a data set."""

    id: str
    author: str
    caption: str
    thumbhash: str
    comments: list[tuple[str, str]]  # id, author; oldest first


def counts(posts: int, comments: int) -> list[int]:
    """How many comments each post has: few have many."""
    chance = random.Random(5)
    weights = [chance.expovariate(1) for _ in range(posts)]
    made = [int(weight * comments / sum(weights)) for weight in weights]
    for number in range(comments - sum(made)):
        made[number % posts] += 1
    return made


def tied(posts: int) -> list[int]:
    """600 of 1,000 posts have as many comments as the feed shows, 395 have none, 5 have more."""
    made = [LATEST_COMMENTS] * (posts * 600 // 1000) + [0] * (posts * 395 // 1000)
    made += [3 + number % 98 for number in range(posts - len(made))]
    random.Random(5).shuffle(made)
    return made


def rows(made: list[int]) -> Iterator[Row]:
    """Posts with so many comments each, a second apart, the last one a moment ago."""
    chance, now = random.Random(7), int(time.time() * 1000)
    start = now - 1000 * len(made) - GAP_MS * (max(made) + 1)
    for number, comments in enumerate(made):
        made_at = start + 1000 * number
        ulid = made_at << 80 | chance.getrandbits(80)
        said = made_at
        written = []
        for _ in range(comments):
            said += chance.randrange(1, 2 * GAP_MS)
            comment = f"{min(said, now)}-{len(written) if said > now else 0}"
            written.append((comment, AUTHOR % chance.randrange(100_000)))
        yield Row(
            "".join(keys.ALPHABET[ulid >> shift & 31] for shift in range(125, -5, -5)) + "-0",
            AUTHOR % (number % 100_000),
            CAPTION % number,
            b64encode(chance.randbytes(21)).decode(),
            written,
        )


def pack(*words: str) -> bytes:
    """A command in RESP. Made by hand: redis-py's packer takes most of a big fill's time."""
    parts = [b"*%d\r\n" % len(words)]
    for word in words:
        data = word.encode()
        parts.append(b"$%d\r\n%b\r\n" % (len(data), data))
    return b"".join(parts)


def commands(posts: Iterable[Row], now: int) -> Iterator[bytes]:
    feed, changes = ["ZADD", keys.feed(0)], ["ZADD", keys.changes(0)]
    revision = now - 30 * 24 * 3_600_000
    for post in posts:
        yield pack(
            *("HSET", keys.post(post.id), "author", post.author, "caption", post.caption),
            *("status", "ready", "thumbhash", post.thumbhash),
        )
        for comment, author in post.comments:
            yield pack("XADD", keys.comments(post.id), comment, "author", author, "text", TEXT)
        if newest := post.comments[: -LATEST_COMMENTS - 1 : -1]:
            entries = [f'["{comment}","{author}","{TEXT}"]' for comment, author in newest]
            yield pack("RPUSH", keys.latest(post.id), *entries)
        revision += 1
        feed += [str(len(post.comments)), post.id]
        changes += [str(revision), post.id]
        if len(feed) > 1000:
            yield pack(*feed) + pack(*changes)
            del feed[2:], changes[2:]
    if len(feed) > 2:
        yield pack(*feed) + pack(*changes)


def send(server: RedisServer, packed: Iterable[bytes]) -> None:
    """Commands, without replies until the end: a reply nobody wants costs as much as a command."""
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(server.socket)
        line.sendall(pack("CLIENT", "REPLY", "OFF"))
        held = bytearray()
        for command in packed:
            held += command
            if len(held) > 1 << 20:
                line.sendall(held)
                held.clear()
        line.sendall(bytes(held) + pack("CLIENT", "REPLY", "ON"))
        assert line.recv(100) == b"+OK\r\n"


def fill(server: RedisServer, made: list[int]) -> list[str]:
    """Posts with so many comments each. Returns their ids. Nothing of it is fsynced before the end."""
    server.filling(True)
    ids = []

    def noted():
        for row in rows(made):
            ids.append(row.id)
            yield row

    send(server, commands(noted(), int(time.time() * 1000)))
    verify(server, random.Random(3).sample(ids, min(200, len(ids))), len(made), sum(made))
    server.filling(False)
    return ids


def verify(server: RedisServer, sample: list[str], posts: int, comments: int) -> None:
    """Counts of all, and the invariants on a sample."""
    client = server.client
    assert client.zcard(keys.feed(0)) == client.zcard(keys.changes(0)) == posts
    total = 0
    for _, score in client.zscan_iter(keys.feed(0), count=10_000):
        total += score
    assert total == comments
    for post in sample:
        stream = client.xrevrange(keys.comments(post), count=LATEST_COMMENTS)
        shown = [f'["{comment}","{said["author"]}","{said["text"]}"]' for comment, said in stream]
        assert client.zscore(keys.feed(0), post) == client.xlen(keys.comments(post))
        assert client.lrange(keys.latest(post), 0, -1) == shown
        assert client.hget(keys.post(post), "status") == "ready"


def images(folder: Path, ids: Iterable[str]) -> None:
    """A file of 60 kB for each, as the worker would have put it."""
    noise = random.Random(11).randbytes(IMAGE_BYTES + 4096)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number, post in enumerate(ids):
        (folder / keys.image(post)).write_bytes(noise[number % 4096 :][:IMAGE_BYTES])


def cursors(server: RedisServer, number: int) -> list[str]:
    """Places spread evenly over the feed."""
    total = server.client.zcard(keys.feed(0))
    found = []
    for part in range(number):
        place = part * (total - 100) // number
        ((post, count),) = server.client.zrange(keys.feed(0), place, place, desc=True, withscores=True)
        found.append(urlsafe_b64encode(f"{count:.0f}:{post}".encode()).decode().rstrip("="))
    return found
