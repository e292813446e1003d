"""One contract test over both object stores: a folder, and S3, which moto serves on loopback.

Then what only a folder or only S3 has to prove.
"""

import asyncio
import errno
import inspect
import os
import re
import secrets
import socket
import subprocess
import sys
import time

import obstore
import pytest
from parts import s3_url

from storage.objects import S3, Exists, Folder, Full, NotFound, ObjectStore, Unavailable, open_store
from storage.objects.folder import TMP

MIB = 1024 * 1024


@pytest.fixture(params=["folder", "s3"])
def store(request, tmp_path, monkeypatch):
    if request.param == "folder":
        return open_store((tmp_path / "new" / "store").as_uri())
    return open_store(s3_url(monkeypatch))


@pytest.fixture(params=["folder", "s3"])
def away(request, tmp_path, monkeypatch):
    """A store that is not there: a folder that was removed, or a bucket that does not exist."""
    if request.param == "folder":
        store = open_store((tmp_path / "removed").as_uri())
        (tmp_path / "removed").rmdir()
        return store
    s3_url(monkeypatch)
    return open_store("s3://no-such-bucket/x")


async def names(store, prefix: str = "") -> list[str]:
    return [entry.name async for entry in store.list(prefix)]


async def stream(*pieces: bytes):
    for piece in pieces:
        yield piece


@pytest.mark.parametrize("implementation", [Folder, S3])
def test_a_store_has_every_method_of_the_protocol_with_its_parameters(implementation):
    methods = [name for name, member in vars(ObjectStore).items() if callable(member) and not name.startswith("_")]
    assert len(methods) > 5
    for name in methods:
        expected = inspect.signature(getattr(ObjectStore, name))
        assert inspect.signature(getattr(implementation, name)).parameters == expected.parameters, name


async def test_ping_succeeds_where_the_store_is_there(store):
    await store.ping()
    assert await names(store) == []


async def test_ping_raises_unavailable_where_the_store_is_away(away):
    with pytest.raises(Unavailable):
        await away.ping()


async def test_an_object_is_read_whole_by_every_method_and_can_be_replaced(store):
    for data in (b"", b"one", secrets.token_bytes(3 * MIB + 7)):
        await store.put("a/b.jpg", data)
        assert await store.get("a/b.jpg") == data
        assert b"".join([piece async for piece in store.read("a/b.jpg")]) == data
        assert await store.size("a/b.jpg") == len(data)
    assert await names(store) == ["a/b.jpg"]


async def test_twenty_concurrent_creates_have_one_winner_whose_object_is_never_replaced(store):
    async def create(number):
        try:
            await store.create("race/it", b"%d" % number)
        except Exists:
            return None
        return number

    winners = [number for number in await asyncio.gather(*map(create, range(20))) if number is not None]
    assert len(winners) == 1
    assert await store.get("race/it") == b"%d" % winners[0]
    with pytest.raises(Exists):
        await store.create("race/it", b"late")
    assert await store.get("race/it") == b"%d" % winners[0]
    assert await names(store) == ["race/it"]


async def test_thirty_megabytes_are_put_as_a_stream_and_read_in_pieces_of_1_mib_at_most(store):
    data = secrets.token_bytes(30_000_000)
    await store.put("big", stream(*(data[start : start + 70_001] for start in range(0, len(data), 70_001))))
    pieces = [piece async for piece in store.read("big")]
    assert max(map(len, pieces)) <= MIB
    assert b"".join(pieces) == data


async def test_a_list_of_pieces_is_put_as_one_object(store):
    await store.put("a", [b"one", b"", b"two" * MIB, b"3"])
    assert await store.get("a") == b"one" + b"two" * MIB + b"3"
    await store.put("a", [])
    assert await store.get("a") == b""


async def test_an_empty_stream_is_an_empty_object(store):
    await store.put("empty", stream())
    assert await store.get("empty") == b""
    assert [piece async for piece in store.read("empty")] == []


async def test_a_put_whose_stream_raises_changes_nothing(store):
    async def broken():
        yield secrets.token_bytes(6 * MIB)
        raise RuntimeError("the client went away")

    await store.put("old", b"before")
    for name in ("old", "new/one"):
        with pytest.raises(RuntimeError, match="went away"):
            await store.put(name, broken())
    assert await names(store) == ["old"]
    assert await store.get("old") == b"before"


async def test_a_put_that_is_cancelled_in_mid_stream_leaves_no_object(store):
    reached = asyncio.Event()

    async def endless():
        yield bytes(6 * MIB)
        reached.set()
        await asyncio.Event().wait()

    task = asyncio.ensure_future(store.put("new/one", endless()))
    await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await names(store) == []


async def test_reading_a_missing_object_raises_not_found(store):
    await store.put("a/b", b"x")
    for name in ("a", "a/c", "a/b/c", "z"):
        with pytest.raises(NotFound):
            await store.get(name)
        with pytest.raises(NotFound):
            await store.size(name)
        with pytest.raises(NotFound):
            await anext(store.read(name))


async def test_delete_removes_the_named_objects_and_nothing_else(store):
    for name in ("a/1", "a/2", "b/c/1", "d"):
        await store.put(name, b"x")
    await store.delete(iter(["a/1", "b/c/1", "missing", "a/missing", "nowhere/at/all"]))
    assert await names(store) == ["a/2", "d"]
    await store.delete([])
    await store.delete(["a/2", "d"])
    assert await names(store) == []


async def test_a_list_is_in_the_order_of_names_and_stays_in_its_folder(store):
    expected = sorted(["a/2", "a/10", "a/1", "a-b/1", "a.b", "ab/1", "a0", "A/1", "a/sub/1", "a/sub-1", "b"])
    for name in reversed(expected):
        await store.put(name, name.encode())
    assert await names(store) == expected
    assert await names(store, "a/") == [name for name in expected if name.startswith("a/")]
    assert await names(store, "a/sub/") == ["a/sub/1"]
    assert await names(store, "b/") == await names(store, "c/d/") == []
    entry = [entry async for entry in store.list("a-b/")][0]
    assert (entry.name, entry.size) == ("a-b/1", 5) and abs(entry.modified - time.time()) < 60


async def test_list_and_delete_take_more_than_a_thousand_objects(store):
    """S3 answers with a thousand at a time."""
    expected = [f"many/{number:04}" for number in range(1100)]
    for start in range(0, len(expected), 50):
        await asyncio.gather(*(store.put(name, b"") for name in expected[start : start + 50]))
    assert await names(store, "many/") == expected
    await store.delete(expected)
    assert await names(store) == []


@pytest.mark.parametrize(
    "name", ["", "/a", "a/", "a//b", "..", "a/../b", "a/./b", ".tmp-1", "a\0b", "a\nb", "ü"]
)
async def test_a_malformed_name_is_refused_by_every_method_and_writes_nothing(store, name):
    for call in (
        store.put(name, b""),
        store.create(name, b""),
        store.get(name),
        store.size(name),
        store.delete([name]),
        anext(store.read(name)),
        anext(store.list(f"{name}/x")),
    ):
        with pytest.raises(ValueError):
            await call
    assert await names(store) == []


@pytest.mark.parametrize("url", ["", "store", "file:relative", "file://host/x", "http://x/y", "s3:///x"])
def test_a_malformed_store_url_is_refused(url):
    with pytest.raises(ValueError, match="expected file:///"):
        open_store(url)


async def test_check_free_space_passes_where_nothing_is_to_be_spared(store):
    store.check_free_space()


# What only a folder has to prove


async def test_a_folder_whose_disk_has_less_free_than_is_to_be_spared_is_full(tmp_path):
    with pytest.raises(Full):
        Folder(tmp_path, min_free=2**60).check_free_space()


async def test_a_folder_syncs_the_bytes_then_the_name_then_the_folders_above(tmp_path):
    """strace shows the system calls of a put, a create and a delete in a new store."""
    program = (
        "import asyncio, pathlib, sys\n"
        "from storage.objects import Folder\n"
        "async def main():\n"
        "    store = Folder(pathlib.Path(sys.argv[1]))\n"
        "    await store.put('a/put', b'x')\n"
        "    await store.create('a/create', b'x')\n"
        "    await store.delete(['a/put'])\n"
        "asyncio.run(main())\n"
    )
    trace, root = tmp_path / "trace", tmp_path / "new" / "store"
    calls = "trace=mkdir,write,fsync,rename,link,unlink,rmdir"
    subprocess.run(
        ["strace", "-f", "-y", "-e", calls, "-o", trace, sys.executable, "-c", program, root], check=True
    )
    seen = []  # each call with its paths below tmp_path
    for line in trace.read_text().splitlines():
        call = re.match(r"\d+ +(\w+)\((.*)\) += [01]$", line)
        if call and str(tmp_path) in call[2]:
            paths = re.findall(rf'{re.escape(str(tmp_path))}/?([^">]*)', call[2])
            seen.append(re.sub(rf"{re.escape(TMP)}\w+", "TMP", " ".join([call[1], *paths])))
    tmp, synced = "new/store/a/TMP", ["fsync new/store/a", "fsync new/store"]
    assert seen == [
        *("mkdir new", "fsync ", "mkdir new/store", "fsync new"),
        *("mkdir new/store/a", "fsync new/store"),
        *(f"write {tmp}", f"fsync {tmp}", f"rename {tmp} new/store/a/put", *synced),
        *(f"write {tmp}", f"fsync {tmp}", f"link {tmp} new/store/a/create", *synced, f"unlink {tmp}"),
        *("unlink new/store/a/put", "fsync new/store/a"),
    ]


async def test_a_put_whose_stream_raises_leaves_no_temporary_file(tmp_path):
    async def broken():
        yield bytes(2 * MIB)
        raise RuntimeError("the client went away")

    with pytest.raises(RuntimeError):
        await Folder(tmp_path).put("a/b", broken())
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


async def test_puts_succeed_while_deletes_prune_their_folder(tmp_path):
    """A delete removes folders that became empty. A put that runs at the same time needs them."""
    store = Folder(tmp_path)

    async def put_and_delete(worker: int) -> None:
        for number in range(150):
            name = f"same/folder/{worker}-{number}"
            await store.put(name, b"x")
            assert await store.get(name) == b"x"
            await store.delete([name])

    await asyncio.gather(*map(put_and_delete, range(8)))
    assert list(tmp_path.iterdir()) == []


async def test_a_temporary_file_is_never_listed_and_only_old_ones_are_removed(tmp_path):
    store = Folder(tmp_path)
    await store.put("a/1", b"x")
    old, new = tmp_path / "a" / f"{TMP}old", tmp_path / "a" / f"{TMP}new"
    old.touch()
    new.touch()
    os.utime(old, (0, 0))
    assert await names(store) == ["a/1"]
    assert await store.remove_leftovers() == 1
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [new.name, "1"]


async def test_a_put_on_a_full_disk_raises_full_and_leaves_no_file(tmp_path):
    """The disk is not really full: the process has a limit for the size of files. Both end a write half way."""
    program = (
        "import asyncio, pathlib, resource, signal, sys\n"
        "from storage.objects import Folder, Full\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, 1_500_000))\n"
        "async def stream():\n"
        "    for _ in range(4): yield bytes(1_000_000)\n"
        "async def main():\n"
        "    store = Folder(pathlib.Path(sys.argv[1]))\n"
        "    for data in (bytes(2_000_000), stream()):\n"
        "        try: await store.put('a/b', data)\n"
        "        except Full as error: print(error)\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True
    )
    assert done.stdout.count(os.strerror(errno.EFBIG)) == 2
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


async def test_a_put_to_the_name_of_a_folder_or_below_an_object_raises_unavailable(tmp_path):
    """S3 has no folders: there both names may be used."""
    store = Folder(tmp_path)
    await store.put("a/b", b"x")
    for name in ("a", "a/b/c"):
        with pytest.raises(Unavailable):
            await store.put(name, b"y")
    assert await names(store) == ["a/b"] and await store.get("a/b") == b"x"


# What only S3 has to prove


async def raises_unavailable_soon(call) -> None:
    """S3's client gives up after 5 s. obstore's own limits are 30 s for one try, and three minutes for all."""
    with pytest.raises(Unavailable):
        await asyncio.wait_for(call, 20)


@pytest.mark.parametrize("fault", ["silent", "closed"])
async def test_every_method_raises_unavailable_soon_where_s3_does_not_answer(monkeypatch, fault):
    """The server accepts connections and says nothing, or its port is closed."""
    url = s3_url(monkeypatch)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        store = open_store(url)
        if fault == "closed":
            server.close()
        calls = [
            store.put("a", b"x"),
            store.put("a", stream(b"x")),
            store.create("a", b"x"),
            store.get("a"),
            anext(store.read("a")),
            store.size("a"),
            store.delete(["a"]),
            names(store),
            store.ping(),
        ]
        await asyncio.gather(*map(raises_unavailable_soon, calls))


async def test_a_stream_is_one_request_to_s3_up_to_5_mib_and_parts_beyond(monkeypatch):
    store = open_store(s3_url(monkeypatch))
    for size, parts in ((5 * MIB - 1, ""), (5 * MIB, "-1"), (11 * MIB, "-3")):
        data = secrets.token_bytes(size)
        await store.put("a", stream(*(data[start : start + 70_001] for start in range(0, size, 70_001))))
        assert await store.get("a") == data
        tag = (await obstore.head_async(store._store, "a"))["e_tag"]  # of parts it ends with their number
        assert re.fullmatch('"[0-9a-f]{32}(.*)"', tag)[1] == parts


async def test_a_bucket_that_does_not_exist_is_unavailable(monkeypatch):
    s3_url(monkeypatch)
    store = open_store("s3://no-such-bucket/x")
    await raises_unavailable_soon(store.put("a", b"x"))
    await raises_unavailable_soon(names(store))
