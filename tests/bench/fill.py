"""Writes data sets directly into Redis, in pipelines, without the project's scripts and HTTP.

The result is what the scripts would have written. `verify` checks this by the counts and, on a sample, by the
invariants.
"""

import random
import socket
import time
from base64 import b64encode, urlsafe_b64encode
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

from storage import keys
from storage.db.client import script
from storage.posts import Image
from storage.settings import DAY_MS, LATEST_COMMENTS, LEAF_ENTRIES
from tests.conftest import ROOT, RedisServer

AUTHOR = "user-%05d"  # 10 bytes
CAPTION = "A photograph of number %08d, taken on the way, in colour"
TEXT = "What a place! I would go there at once if only it were nearer."  # 62 bytes
GAP_MS = 600_000  # mean time between two comments of a post
IMAGE_BYTES = 60_000
SCANS = (8_400, 22_000, 41_000, IMAGE_BYTES)
# Writes an entry of the lists of users' posts, by the scripts' own function: how leaves are split is not written twice.
ADD_ENTRY = script(
    f"#!lua\n{(ROOT / 'lua' / 'shared.lua').read_text()}\nadd_entry(KEYS[1], ARGV[1], ARGV[2], tonumber(ARGV[3]))"
)


@dataclass
class Row:
    """A post of a data set."""

    id: str
    author: str
    caption: str
    thumbhash: str
    comments: list[tuple[str, str]]  # id, author; oldest first


def counts(posts: int, comments: int) -> list[int]:
    """The number of comments of each post. Exponentially distributed: few posts have many."""
    chance = random.Random(5)
    weights = [chance.expovariate(1) for _ in range(posts)]
    comment_counts = [int(weight * comments / sum(weights)) for weight in weights]
    for number in range(comments - sum(comment_counts)):
        comment_counts[number % posts] += 1
    return comment_counts


def tied(posts: int) -> list[int]:
    """The number of comments of each post, with many ties.

    Of 1,000 posts 600 have as many comments as the feed shows, 395 have none and 5 have more.
    """
    comment_counts = [LATEST_COMMENTS] * (posts * 600 // 1000) + [0] * (posts * 395 // 1000)
    comment_counts += [3 + number % 98 for number in range(posts - len(comment_counts))]
    random.Random(5).shuffle(comment_counts)
    return comment_counts


def post_id(ms: int, chance: random.Random | None = None, partition: int = 0) -> str:
    """The id of a post that was created at a time in unix milliseconds."""
    ulid = ms << 80 | (chance or random).getrandbits(80)
    return "".join(keys.ALPHABET[ulid >> shift & 31] for shift in range(125, -5, -5)) + f"-{partition}"


def rows(comment_counts: list[int], partition: int = 0) -> Iterator[Row]:
    """One post for each number in `comment_counts`, with this number of comments. The posts are one second apart. The
    last one is a moment old.
    """
    chance, now = random.Random(7 + partition), int(time.time() * 1000)
    start = now - 1000 * len(comment_counts) - GAP_MS * (max(comment_counts) + 1)
    for number, count in enumerate(comment_counts):
        post_ms = start + 1000 * number
        comment_ms = post_ms
        comments = []
        for _ in range(count):
            comment_ms += chance.randrange(1, 2 * GAP_MS)
            # A time in the future becomes now; the second part of the id keeps the ids increasing.
            comment = f"{min(comment_ms, now)}-{len(comments) if comment_ms > now else 0}"
            comments.append((comment, AUTHOR % chance.randrange(100_000)))
        yield Row(
            post_id(post_ms, chance, partition),
            AUTHOR % (number % 100_000),
            CAPTION % number,
            b64encode(chance.randbytes(21)).decode(),
            comments,
        )


def pack(*words: str) -> bytes:
    """A command in RESP. redis-py's packer would take most of the time of a large fill."""
    parts = [b"*%d\r\n" % len(words)]
    for word in words:
        data = word.encode()
        parts.append(b"$%d\r\n%b\r\n" % (len(data), data))
    return b"".join(parts)


def listed(author: str, post: str) -> bytes:
    """A packed command that writes a post into the list of its author's posts. `send` has loaded its script."""
    entry, partition = keys.entry(author, post), keys.partition_of_post(post)
    leaves, prefix = keys.leaves(partition), keys.leaf_prefix(partition)
    return pack("EVALSHA", ADD_ENTRY.sha, "1", leaves, prefix, entry, str(LEAF_ENTRIES))


def commands(posts: Iterable[Row], now: int, partition: int = 0) -> Iterator[bytes]:
    """Packed commands that write the posts of a partition. `now` is in unix milliseconds."""
    feed, changes = ["ZADD", keys.feed(partition)], ["ZADD", keys.changes(partition)]
    revision = now - DAY_MS  # no post is quiet
    for post in posts:
        yield pack(
            *("HSET", keys.post(post.id), "author", post.author, "caption", post.caption),
            *("status", "ready", "thumbhash", Image(post.thumbhash, SCANS).field()),
        )
        for comment, author in post.comments:
            yield pack("XADD", keys.comments(post.id), comment, "author", author, "text", TEXT)
        if newest := post.comments[: -LATEST_COMMENTS - 1 : -1]:
            entries = [f'["{comment}","{author}","{TEXT}"]' for comment, author in newest]
            yield pack("RPUSH", keys.latest(post.id), *entries)
        yield listed(post.author, post.id)
        revision += 1
        feed += [str(len(post.comments)), post.id]
        changes += [str(revision), post.id]
        if len(feed) > 1000:
            yield pack(*feed) + pack(*changes)
            del feed[2:], changes[2:]
    if len(feed) > 2:
        yield pack(*feed) + pack(*changes)


def send(server: RedisServer, packed: Iterable[bytes]) -> None:
    """Sends packed commands. Switches replies off until the end, because a reply costs as much as a command."""
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(server.socket)
        line.sendall(pack("CLIENT", "REPLY", "OFF") + pack("SCRIPT", "LOAD", ADD_ENTRY.text))
        buffer = bytearray()
        for command in packed:
            buffer += command
            if len(buffer) > 1 << 20:
                line.sendall(buffer)
                buffer.clear()
        line.sendall(bytes(buffer) + pack("CLIENT", "REPLY", "ON"))
        assert line.recv(100) == b"+OK\r\n"


def spread(servers: list[RedisServer], comment_counts: list[int]) -> list[str]:
    """Writes posts like `fill`, as many into each partition. There are as many partitions as `servers`.

    `servers`: the server of each partition. Returns the ids of the posts.
    """
    ids, partitions = [], len(servers)
    for partition, server in enumerate(servers):
        posts = list(rows(comment_counts[partition::partitions], partition))
        send(server, commands(posts, int(time.time() * 1000), partition))
        ids += [post.id for post in posts]
    return ids


def fill(server: RedisServer, comment_counts: list[int]) -> list[str]:
    """Writes one post for each number in `comment_counts`, with this number of comments, and verifies them.

    Returns their ids. Fsyncs only at the end.
    """
    with server.filling():
        ids = spread([server], comment_counts)
        sample = random.Random(3).sample(ids, min(200, len(ids)))
        verify(server, sample, len(comment_counts), sum(comment_counts))
    return ids


def verify(server: RedisServer, sample: list[str], posts: int, comments: int) -> None:
    """Asserts the number of posts and of comments, and the invariants on a sample of posts."""
    client = server.client
    assert client.zcard(keys.feed(0)) == client.zcard(keys.changes(0)) == posts
    leaves = client.zrange(keys.leaves(0), 0, -1)
    assert sum(client.zcard(keys.leaf(0, first)) for first in leaves) == posts
    total = 0
    for _, score in client.zscan_iter(keys.feed(0), count=10_000):
        total += score
    assert total == comments
    for post in sample:
        stream = client.xrevrange(keys.comments(post), count=LATEST_COMMENTS)
        latest = [f'["{comment}","{fields["author"]}","{fields["text"]}"]' for comment, fields in stream]
        assert client.zscore(keys.feed(0), post) == client.xlen(keys.comments(post))
        assert client.lrange(keys.latest(post), 0, -1) == latest
        assert client.hget(keys.post(post), "status") == "ready"


def images(folder: Path, ids: Iterable[str]) -> None:
    """Writes a file of 60 kB for each post, where the worker would have put its picture."""
    noise = random.Random(11).randbytes(IMAGE_BYTES + 4096)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number, post in enumerate(ids):
        (folder / keys.image(post)).write_bytes(noise[number % 4096 :][:IMAGE_BYTES])


def cursor(comments: float, post: str) -> str:
    """The feed's cursor behind `post`, which has `comments` comments."""
    return urlsafe_b64encode(f"{comments:.0f}:{post}".encode()).decode().rstrip("=")


def cursors(server: RedisServer, url: str, number: int) -> list[str]:
    """Cursors spread evenly over the feed, as the API at `url` issues them."""
    total = server.client.zcard(keys.feed(0))
    result = []
    for part in range(number):
        rank = part * (total - 100) // number
        ((post, comments),) = server.client.zrange(keys.feed(0), rank, rank, desc=True, withscores=True)
        before = cursor(comments, post)
        result.append(httpx.get(f"{url}/v1/posts?limit=1&cursor={before}").json()["next"])
    return result
