"""What a segment of old comments takes: bytes a comment in the store, CPU time to make one and to read it, memory.

The texts are what people wrote to each other. The English ones are lines of a chat. Authors, times and the order of
the texts are made up, as the comments of 10,000 posts with Zipf's distribution would have them.
"""

import asyncio
import contextlib
import importlib.util
import itertools
import json
import os
import random
import tempfile
import time
from base64 import urlsafe_b64encode
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean, median

import yaml

from storage import keys, sealing
from storage.db.cluster import connect
from storage.objects import Folder
from storage.segments import INLINE_BYTES, Comment, Segments, decode, encode
from storage.settings import HOT_COMMENTS, SEGMENT_COMMENTS
from tests.bench import fill
from tests.bench.drive import Load
from tests.bench.parts import Api, Redis
from tests.bench.table import Row

SEGMENTS = 100  # that are made of each kind of text
COMMENTS_PER_SECOND = 28  # the forecast, of all posts together
POSTS, USERS = 10_000, 100_000
FIRST_MS = 1_795_459_382_641
# Without the shortest lines the mean is that of the forecast, 62 bytes. Bytes in UTF-8.
SHORTEST = 18
TARGET = 40  # bytes a comment, of English
ROUNDS = 3  # of pages, in turns


def folder(package: str) -> Path:
    """The folder of an installed package, which is not imported: its modules are of no use here."""
    spec = importlib.util.find_spec(package)
    if not spec:
        raise SystemExit(f"{package} is missing: run .ci/setup bench")
    return Path(spec.origin).parent


def chat() -> list[str]:
    """Lines of 7,168 conversations of students in English (chitchat-dataset, MIT)."""
    conversations = json.loads((folder("chitchat_dataset") / "dataset.json").read_text())
    turns = itertools.chain.from_iterable(one["messages"] for one in conversations.values())
    lines = dict.fromkeys(message["text"].strip() for turn in turns for message in turn)
    return [line for line in lines if len(line.encode()) >= SHORTEST]


def dialogues(language: str) -> list[str]:
    """Questions and answers of dialogues for a chatbot (chatterbot-corpus, BSD)."""
    files = sorted((folder("chatterbot_corpus") / "data" / language).glob("*.yml"))
    found = [yaml.safe_load(file.read_text())["conversations"] for file in files]
    return list(dict.fromkeys(str(line) for dialogue in itertools.chain(*found) for line in dialogue))


def named(user: int, words: list[str]) -> str:
    """A user's name as people choose them: `sunny.walker84`."""
    chance = random.Random(user)
    return chance.choice("._-").join(chance.sample(words, 2))[:20] + chance.choice(["", str(chance.randrange(100))])


def numbered(user: int, _: list[str]) -> str:
    """A user's name as an identity provider makes it: a UUID (RFC 9562)."""
    digits = f"{random.Random(user).getrandbits(128):032x}"
    return "-".join([digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]])


def zipf(count: int) -> list[float]:
    """Cumulative weights, for `random.choices`."""
    return list(itertools.accumulate(1 / rank for rank in range(1, count + 1)))


def made(texts: list[str], words: list[str], author: Callable = named) -> Iterator[list[Comment]]:
    """Segments of posts. A post with twice as many comments has twice as many of them."""
    chance = random.Random(7)
    posts, users = zipf(POSTS), zipf(USERS)
    for rank in chance.choices(range(1, POSTS + 1), cum_weights=posts, k=SEGMENTS):
        rate = COMMENTS_PER_SECOND / 1000 / rank / posts[-1]  # comments of this post in a ms
        ms, rows = FIRST_MS + chance.random() * 1e9, []
        who = chance.choices(range(USERS), cum_weights=users, k=SEGMENT_COMMENTS)
        for user, text in zip(who, chance.sample(texts, SEGMENT_COMMENTS), strict=True):
            ms += max(1, chance.expovariate(rate))
            rows.append(Comment(f"{int(ms)}-0", author(user, words), text))
        yield rows


def cpu_ms(run: Callable, times: int) -> float:
    """ms of CPU that a call takes: the median of five rounds."""

    def measured() -> float:
        began = time.process_time()
        for _ in range(times):
            run()
        return (time.process_time() - began) / times * 1000

    return median(measured() for _ in range(5))


def sizes(what: str, segments: list[list[Comment]], target: float | None = None) -> Row:
    """The row of one kind of text."""
    post = keys.new_post_id(0)
    size = mean(len(encode(post, rows)) for rows in segments) / SEGMENT_COMMENTS
    texts = mean(len(row.text.encode()) for rows in segments for row in rows)
    authors = mean(len(row.author.encode()) for rows in segments for row in rows)
    note = f"texts of {texts:.0f} bytes, authors of {authors:.0f}"
    return Row(f"object, a comment: {what}", size, target, most=True, unit="B", note=note)


def times(rows: list[Comment]) -> list[Row]:
    """The CPU time of a segment, and the memory that it takes in the cache."""
    post, name = keys.new_post_id(0), keys.segment_name(rows[0].id)
    data = encode(post, rows)
    assert len(data) <= INLINE_BYTES

    async def read(memory: int) -> tuple[float, int]:
        """ms to read 20 comments, and the bytes that are cached."""
        with tempfile.TemporaryDirectory(prefix="ig-") as place:
            segments = Segments(Folder(Path(place)), memory)
            await segments.put(post, name, rows)
            rounds = []
            for _ in range(6):
                began = time.process_time()
                for _ in range(200):
                    (await segments.read(post, name))[100:120]
                rounds.append((time.process_time() - began) * 5)
            return median(rounds), segments.held

    cached, held = asyncio.run(read(2**20))
    return [
        Row("encode 256 comments, CPU", cpu_ms(lambda: encode(post, rows), 4), unit="ms"),
        Row("decode 256 comments, CPU", cpu_ms(lambda: decode(post, data), 100), 1.0, most=True, unit="ms"),
        Row("read 20 of them from a folder store, CPU", asyncio.run(read(0))[0], unit="ms"),
        Row("read 20 of them from memory, CPU", cached, unit="ms"),
        Row("memory of a cached segment", held / 1024, unit="KiB"),
    ]


def used(api: Api, redis: Redis) -> float:
    """Seconds of CPU that the API and Redis have used."""
    fields = Path(f"/proc/{api.pids()[0]}/stat").read_text().rpartition(")")[2].split()
    cpu = redis.client.info("cpu")
    ticks = int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK") + cpu["used_cpu_user"] + cpu["used_cpu_sys"]


async def seal(redis: Redis, store: Path, ids: list[str], rows: list[list[Comment]]) -> None:
    """Gives each post the comments of a segment and 20 more, and seals all but these."""
    db, segments = connect(redis.url), Segments(Folder(store))
    for post, comments in zip(ids, rows, strict=True):
        pipe = redis.client.pipeline(transaction=False)
        more = [Comment(f"{FIRST_MS * 2 + number}-0", "alice", fill.TEXT) for number in range(HOT_COMMENTS)]
        for row in comments + more:
            pipe.xadd(keys.comments(post), {"author": row.author, "text": row.text}, row.id)
        pipe.execute()
        assert await sealing.step(db, segments, post, HOT_COMMENTS, 2**53, 0)
    await db.close()


def pages(rows: list[list[Comment]], seconds: float) -> list[Row]:
    """The CPU time of a page of 20 old comments, of the API and Redis together, divided by that of a first page."""
    found = []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ig-")))
        redis = stack.enter_context(contextlib.closing(Redis()))
        ids = fill.fill(redis, [0] * len(rows))
        asyncio.run(seal(redis, folder / "store", ids, rows))
        paths = [f"/v1/posts/{post}/comments?limit=20" for post in ids]
        cursors = [urlsafe_b64encode(comments[150].id.encode()).decode().rstrip("=") for comments in rows]
        old = [f"{path}&cursor={cursor}" for path, cursor in zip(paths, cursors, strict=True)]
        for what, memory in (("from memory", 16), ("from the folder store", 0)):
            api = stack.enter_context(contextlib.closing(Api(redis, folder, segment_cache=memory)))
            loads = {"first": Load(api.url, paths), "old": Load(api.url, old)}
            took: dict[str, list[float]] = {name: [] for name in loads}
            for name, load in [*loads.items()] * ROUNDS:
                load.run(1)
                before = used(api, redis)
                run = load.run(seconds)
                assert not run.errors
                took[name].append((used(api, redis) - before) / run.rate / int(seconds) * 1e6)
            first, cold = median(took["first"]), median(took["old"])
            note = f"{cold:.0f} and {first:.0f} µs of the API and Redis"
            found.append(Row(f"page of old comments {what} ÷ first page, CPU", cold / first, 2.5, most=True, note=note))
    return found


def measure(seconds: float) -> list[Row]:
    english = chat()
    words = sorted({word for line in english for word in line.lower().split() if word.isalpha() and word.isascii()})
    segments = list(made(english, words))
    rows = [
        sizes("English", segments, TARGET),
        sizes("English, names that are UUIDs", list(made(english, words, numbered))),
        sizes("Japanese", list(made(dialogues("japanese"), words))),
        sizes("Persian, in Arabic script", list(made(dialogues("persian"), words))),
    ]
    return rows + times(segments[0]) + pages(segments, seconds)
