"""Segments are whole or refused, are read once for many readers, and caches stay within their limits."""

import asyncio
import hashlib
import os
import resource
import secrets
import signal
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import brotli
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from parts import s3_url

from storage import keys, segments
from storage.objects import Folder, Unavailable, open_store
from storage.segments import CacheFolder, Comment, Damaged, Segments, Unreadable, decode, encode, open_segments
from storage.settings import MIB, load

POST = "01JD4Q7ZK5W8Y3N6R2T9V0XABC-0"
OTHER = "01JD4Q7ZK5W8Y3N6R2T9V0XABD-0"
FIRST_MS = 1_732_104_158_821


def comments(count: int, text: str = "what a lovely cat, number", first: int = FIRST_MS) -> list[Comment]:
    return [Comment(f"{first + 1000 * n}-{n % 3}", f"user{n * n % 97}", f"{text} {n}") for n in range(count)]


class Counted(Folder):
    """A store that counts its reads. Each waits until `open` is set."""

    def __init__(self, root: Path):
        super().__init__(root)
        self.reads, self.open = 0, asyncio.Event()
        self.open.set()

    async def get(self, name: str) -> bytes:
        self.reads += 1
        await self.open.wait()
        return await super().get(name)


@pytest.fixture
def store(tmp_path):
    return Counted(tmp_path / "store")


async def put(store, rows: list[Comment], post: str = POST) -> str:
    name = keys.segment_name(rows[0].id)
    await Segments(store).put(post, name, rows)
    return name


# the format

numbers = st.lists(st.tuples(st.integers(1, 10**15 - 1), st.integers(0, 10**10 - 1)), min_size=1, unique=True)
texts = st.text() | st.sampled_from(["", "\0", "\n", '"', "\\", "\u2028", "\ufeff", "\uffff", "\U0010ffff", "e\u0301"])


@given(numbers, st.lists(st.tuples(texts, texts), min_size=1))
def test_what_is_encoded_is_decoded(ids, bodies):
    rows = [Comment(f"{ms}-{n}", *bodies[at % len(bodies)]) for at, (ms, n) in enumerate(sorted(ids))]
    decoded = decode(POST, encode(POST, rows))
    assert decoded == rows and type(decoded[0]) is Comment


def test_a_segment_is_lines_of_json_under_a_header():
    rows = comments(256)
    header, *lines = brotli.decompress(encode(POST, rows)).splitlines(keepends=True)
    digest = hashlib.sha256(b"".join(lines)).hexdigest()
    expected = {"post": POST, "count": 256, "first": rows[0].id, "last": rows[-1].id, "sha256": digest}
    assert orjson.loads(header) == expected
    assert [orjson.loads(line) for line in lines] == [list(row) for row in rows]


@pytest.mark.parametrize("rows", [[], comments(2)[::-1], comments(1) * 2], ids=["none", "descending", "twice"])
def test_rows_whose_ids_do_not_ascend_are_not_encoded(rows):
    with pytest.raises(ValueError, match="ascend"):
        encode(POST, rows)


def test_ids_ascend_as_numbers_not_as_text():
    rows = [Comment(name, "a", "b") for name in ("9-9", "9-10", "10-0", "11-0")]
    assert decode(POST, encode(POST, rows)) == rows
    with pytest.raises(ValueError, match="ascend"):
        encode(POST, [rows[1], rows[0]])


def changed(**fields) -> bytes:
    """A segment of three comments with other fields in its header."""
    header, _, lines = brotli.decompress(encode(POST, comments(3))).partition(b"\n")
    return brotli.compress(orjson.dumps(orjson.loads(header) | fields) + b"\n" + lines)


def with_lines(lines: bytes, first: str, last: str, count: int) -> bytes:
    """A segment with these lines, whose digest fits."""
    header = {"post": POST, "count": count, "first": first, "last": last, "sha256": hashlib.sha256(lines).hexdigest()}
    return brotli.compress(orjson.dumps(header) + b"\n" + lines)


DAMAGED = {
    "empty": b"",
    "no brotli": b"x" * 100,
    "nothing in it": brotli.compress(b""),
    "no header": brotli.compress(b'["1-0","a","b"]\n'),
    "header without a field": brotli.compress(b'{"post":"%b","count":1}\n["1-0","a","b"]\n' % POST.encode()),
    "cut": encode(POST, comments(3))[:-1],
    "cut lines": brotli.compress(brotli.decompress(encode(POST, comments(3)))[:-40]),
    "no lines": with_lines(b"", "1-0", "1-0", 0),
    "another post": encode(OTHER, comments(3)),
    "count": changed(count=4),
    "first": changed(first="1-0"),
    "last": changed(last="1-0"),
    "digest": changed(sha256=hashlib.sha256(b"").hexdigest()),
    "order": with_lines(b'["2-0","a","b"]\n["1-0","a","b"]\n', "2-0", "1-0", 2),
    "no id": with_lines(b'["x","a","b"]\n', "x", "x", 1),
    "four fields": with_lines(b'["1-0","a","b","c"]\n', "1-0", "1-0", 1),
    "no rows": with_lines(b'{"id":"1-0"}\n', "1-0", "1-0", 1),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_what_is_no_whole_segment_of_the_post_is_refused(kind):
    with pytest.raises(Damaged):
        decode(POST, DAMAGED[kind])


def test_no_damaged_byte_gives_other_comments():
    rows = comments(40)
    whole = encode(POST, rows)
    for at in range(len(whole)):
        damaged = whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :]
        try:
            assert decode(POST, damaged) == rows  # some bits of brotli's stream have no meaning
        except Damaged:
            continue


# reading


async def test_rows_are_a_sequence(store):
    rows = comments(256)
    read = await Segments(store).read(POST, await put(store, rows))
    assert len(read) == 256 and list(read) == rows and list(reversed(read)) == rows[::-1]
    assert (read[0], read[-1], read[3:9], read[:0], read[250:999]) == (rows[0], rows[-1], rows[3:9], [], rows[250:])
    with pytest.raises(IndexError):
        read[256]


async def test_a_segment_is_read_from_the_store_once(store):
    rows = comments(256)
    name = await put(store, rows)
    cache = Segments(store)
    assert list(await cache.read(POST, name)) == rows
    assert list(await cache.read(POST, name)) == rows
    assert store.reads == 1


async def test_without_memory_nothing_is_cached(store):
    rows = comments(3)
    name = await put(store, rows)
    cache = Segments(store, memory=0)
    assert [list(await cache.read(POST, name)) for _ in range(2)] == [rows, rows]
    assert store.reads == 2 and cache.held == 0


async def test_a_large_segment_is_decoded_too(store):
    rows = [Comment(row.id, row.author, secrets.token_urlsafe(750)) for row in comments(256)]
    name = await put(store, rows)
    assert await store.size(keys.segment(POST, name)) > segments.INLINE_BYTES
    assert list(await Segments(store).read(POST, name)) == rows


async def test_concurrent_readers_share_one_read_of_the_store(store):
    rows = comments(20)
    name = await put(store, rows)
    cache = Segments(store)
    read = await asyncio.gather(*(cache.read(POST, name) for _ in range(50)))
    assert store.reads == 1 and list(map(list, read)) == [rows] * 50


async def test_a_reader_that_is_cancelled_does_not_disturb_the_others(store):
    rows = comments(20)
    name = await put(store, rows)
    cache = Segments(store)
    store.open.clear()
    first, second, third = [asyncio.create_task(cache.read(POST, name)) for _ in range(3)]
    while not store.reads:
        await asyncio.sleep(0)
    first.cancel()
    third.cancel()
    await asyncio.wait([first, third])
    store.open.set()
    assert list(await second) == rows and first.cancelled() and third.cancelled()
    assert list(await cache.read(POST, name)) == rows
    assert store.reads == 1


async def test_an_error_reaches_each_reader_and_is_not_kept(store, caplog):
    rows = comments(5)
    name = keys.segment_name(rows[0].id)
    cache = Segments(store)
    failed = await asyncio.gather(*(cache.read(POST, name) for _ in range(3)), return_exceptions=True)
    assert [type(error) for error in failed] == [Unreadable] * 3 and store.reads == 1
    await cache.put(POST, name, rows)
    assert list(await cache.read(POST, name)) == rows
    assert not caplog.records


@pytest.mark.parametrize("data", [None, b"x", encode(OTHER, comments(3))], ids=["missing", "damaged", "another post's"])
async def test_a_segment_that_is_missing_or_damaged_is_unavailable_and_the_message_says_what_to_do(store, data):
    name = keys.segment_name("1795459382641-0")
    if data:
        await store.put(keys.segment(POST, name), data)
    with pytest.raises(Unreadable, match=f"comments/{POST}/{name} is (missing|damaged): run imagegram-storage check"):
        await Segments(store).read(POST, name)


async def test_the_memory_stays_within_its_limit_and_the_least_recently_read_leaves(store):
    names = [await put(store, comments(256, first=FIRST_MS + n)) for n in range(40)]
    cache = Segments(store, memory=MIB // 2)
    for name in names:
        await cache.read(POST, name)
        await cache.read(POST, names[0])
        assert cache.held <= MIB // 2
    assert cache.held > MIB // 2 - 30_000 and store.reads == 40
    await cache.read(POST, names[0])
    assert store.reads == 40
    await cache.read(POST, names[1])
    assert store.reads == 41


async def test_the_memory_that_is_counted_is_the_memory_that_is_taken(store):
    names = [await put(store, comments(20, first=FIRST_MS + n)) for n in range(200)]
    cache = Segments(store)
    await cache.read(POST, names[0])
    tracemalloc.start()
    before, counted = tracemalloc.get_traced_memory()[0], cache.held
    for name in names[1:]:
        await cache.read(POST, name)
    taken = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert 0.7 < taken / (cache.held - counted) < 1.1


# the folder, for S3


async def test_with_s3_the_second_process_reads_without_a_request(tmp_path, monkeypatch):
    url = s3_url(monkeypatch)
    settings = load({"IMAGEGRAM_DATA": str(tmp_path), "IMAGEGRAM_STORE": url})
    rows = comments(256)
    store = open_store(url)
    name = await put(store, rows)
    assert list(await open_segments(settings, store).read(POST, name)) == rows
    await store.delete([keys.segment(POST, name)])
    assert list(await open_segments(settings, store).read(POST, name)) == rows  # a new process: its memory is empty
    assert [file.name for file in (settings.data / "segments").iterdir()] == [f"{POST}.{name}"]


async def test_a_damaged_file_of_the_cache_is_removed_and_read_from_the_store_again(store, tmp_path, caplog):
    rows = comments(256)
    name = await put(store, rows)
    await Segments(store, folder=tmp_path / "cache").read(POST, name)
    file = tmp_path / "cache" / f"{POST}.{name}"
    whole = file.read_bytes()
    for damaged in (b"", whole[:1000], bytes(len(whole)), encode(OTHER, rows)):
        file.write_bytes(damaged)
        assert list(await Segments(store, folder=tmp_path / "cache").read(POST, name)) == rows
        assert file.read_bytes() == whole
    assert store.reads == 5 and "is damaged and is read again" in caplog.text


async def test_a_segment_that_is_damaged_in_the_store_is_not_cached(store, tmp_path):
    name = keys.segment_name("1795459382641-0")
    await store.put(keys.segment(POST, name), encode(POST, comments(9))[:-1])
    cache = Segments(store, folder=tmp_path / "cache")
    for _ in range(2):
        with pytest.raises(Unavailable):
            await cache.read(POST, name)
    assert store.reads == 2 and cache.held == 0 and not (tmp_path / "cache").exists()


def disk_bytes(folder: Path) -> int:
    return sum(file.stat().st_blocks * 512 for file in folder.iterdir())


def test_the_folder_stays_within_its_limit_and_what_was_not_read_leaves(tmp_path):
    caches = [CacheFolder(tmp_path, MIB) for _ in range(4)]  # as of four processes
    caches[0].add("comments/p/read", b"r" * 10_000)
    for number in range(400):
        caches[number % 4].add(f"comments/p/{number}", bytes(10_000))
        assert caches[0].read("comments/p/read") == b"r" * 10_000
        assert disk_bytes(tmp_path) <= MIB
    assert disk_bytes(tmp_path) > MIB * 3 / 4
    assert caches[0].read("comments/p/399") and not caches[0].read("comments/p/0")


def test_processes_that_evict_at_the_same_time_do_not_disturb_each_other(tmp_path):
    def work(cache: CacheFolder, first: int) -> int:
        found = 0
        for number in range(300):
            name = f"comments/p/{number % 10 if number % 2 else first + number}"  # five are read again and again
            data = cache.read(name)
            assert data in (None, b"x" * 9_000)
            found += bool(data)
            cache.add(name, b"x" * 9_000)
        return found

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(work, [CacheFolder(tmp_path, MIB) for _ in range(4)], (0, 300, 600, 900))) > 0
    assert disk_bytes(tmp_path) <= MIB and not list(tmp_path.glob(".tmp-*"))


def test_drafts_of_processes_that_died_are_removed(tmp_path):
    for name, age in (("old", 7200), ("new", 0)):
        draft = tmp_path / f".tmp-{name}"
        draft.write_bytes(b"x")
        os.utime(draft, (time.time() - age,) * 2)
    CacheFolder(tmp_path, MIB).add("comments/p/1", b"x")
    assert sorted(file.name for file in tmp_path.iterdir()) == [".tmp-new", "p.1"]


def test_what_was_not_read_for_a_week_is_removed(tmp_path):
    cache = CacheFolder(tmp_path, MIB)
    for name in ("unread", "read"):
        cache.add(f"comments/p/{name}", b"x")
        os.utime(tmp_path / f"p.{name}", (time.time() - segments.UNREAD_SECONDS - 9,) * 2)
    assert cache.read("comments/p/read")
    CacheFolder(tmp_path, MIB).add("comments/p/new", b"x")  # a process looks when it adds its first object
    assert sorted(file.name for file in tmp_path.iterdir()) == ["p.new", "p.read"]


def test_the_free_space_of_the_disk_is_left(tmp_path):
    CacheFolder(tmp_path, MIB, min_free=2**60).add("comments/p/1", b"x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["/proc/segments", "/dev/full/segments"])
async def test_a_folder_that_cannot_be_written_is_no_error_and_is_logged_once(store, caplog, place):
    names = [await put(store, comments(3, first=FIRST_MS + n)) for n in range(3)]
    cache = Segments(store, folder=Path(place))
    for name in names:
        assert len(await cache.read(POST, name)) == 3
    assert len(caplog.records) == 1 and f"not cached in {place}" in caplog.text


def test_on_a_full_disk_nothing_is_added_and_no_draft_is_left(tmp_path, caplog):
    """RLIMIT_FSIZE makes the kernel refuse a write, as a full disk does."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    cache = CacheFolder(tmp_path, MIB)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        cache.add("comments/p/1", bytes(2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir()) and "not cached" in caplog.text
    cache.add("comments/p/1", bytes(2000))
    assert cache.read("comments/p/1") == bytes(2000)


def test_only_objects_of_s3_are_cached_in_a_folder(tmp_path, monkeypatch):
    url, store = s3_url(monkeypatch), Folder(tmp_path)
    s3 = {"IMAGEGRAM_DATA": str(tmp_path), "IMAGEGRAM_STORE": url}
    assert open_segments(load(s3), store)._folder._limit == 1024 * MIB
    assert open_segments(load({"IMAGEGRAM_DATA": str(tmp_path)}), store)._folder is None
    assert open_segments(load({**s3, "IMAGEGRAM_SEGMENT_CACHE": "0"}), store)._folder is None
