"""One contract for both stores: a folder, and S3 as moto speaks it on loopback."""

import asyncio
import errno
import os
import re
import secrets
import socket
import subprocess
import sys
import time

import pytest
from parts import s3_url

from storage.objects import Exists, Folder, Full, NotFound, Unavailable, open_store
from storage.objects.folder import TMP

pytestmark = pytest.mark.asyncio
MIB = 1024 * 1024


@pytest.fixture(params=["folder", "s3"])
def store(request, tmp_path, monkeypatch):
    if request.param == "folder":
        return open_store((tmp_path / "new" / "store").as_uri())
    return open_store(s3_url(monkeypatch))


async def names(store, prefix=""):
    return [entry.name async for entry in store.list(prefix)]


async def pieces(*parts):
    for part in parts:
        yield part


async def test_what_is_put_is_there_whole_and_can_be_replaced(store):
    for data in (b"", b"one", secrets.token_bytes(3 * MIB + 7)):
        await store.put("a/b.jpg", data)
        assert await store.get("a/b.jpg") == data
        assert b"".join([piece async for piece in store.read("a/b.jpg")]) == data
        assert await store.size("a/b.jpg") == len(data)
    assert await names(store) == ["a/b.jpg"]


async def test_of_twenty_creates_at_once_one_wins_and_is_never_replaced(store):
    async def create(number):
        try:
            await store.create("race/it", b"%d" % number)
        except Exists:
            return None
        return number

    won = [number for number in await asyncio.gather(*map(create, range(20))) if number is not None]
    assert len(won) == 1
    assert await store.get("race/it") == b"%d" % won[0]
    with pytest.raises(Exists):
        await store.create("race/it", b"late")
    assert await store.get("race/it") == b"%d" % won[0]
    assert await names(store) == ["race/it"]


async def test_thirty_megabytes_are_put_and_read_as_streams(store):
    whole = secrets.token_bytes(30_000_000)
    parts = [whole[start : start + 70_001] for start in range(0, len(whole), 70_001)]
    await store.put("big", pieces(*parts))
    read = [piece async for piece in store.read("big")]
    assert max(map(len, read)) <= MIB
    assert b"".join(read) == whole


async def test_an_empty_stream_is_an_empty_object(store):
    await store.put("empty", pieces())
    assert await store.get("empty") == b""
    assert [piece async for piece in store.read("empty")] == []


async def test_a_stream_that_breaks_off_changes_nothing(store):
    async def broken():
        yield secrets.token_bytes(6 * MIB)
        raise RuntimeError("the client went away")

    await store.put("kept", b"before")
    for name in ("kept", "new/one"):
        with pytest.raises(RuntimeError, match="went away"):
            await store.put(name, broken())
    assert await names(store) == ["kept"]
    assert await store.get("kept") == b"before"


async def test_a_put_cancelled_in_mid_stream_leaves_nothing_visible(store):
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


async def test_what_is_not_there_is_not_found_by_any_verb(store):
    await store.put("a/b", b"x")
    for name in ("a", "a/c", "a/b/c", "z"):
        with pytest.raises(NotFound):
            await store.get(name)
        with pytest.raises(NotFound):
            await store.size(name)
        with pytest.raises(NotFound):
            await anext(store.read(name))


async def test_deleting_removes_what_is_named_and_nothing_else(store):
    for name in ("a/1", "a/2", "b/c/1", "d"):
        await store.put(name, b"x")
    await store.delete(iter(["a/1", "b/c/1", "missing", "a/missing", "nowhere/at/all"]))
    assert await names(store) == ["a/2", "d"]
    await store.delete([])
    await store.delete(["a/2", "d"])
    assert await names(store) == []


async def test_a_list_is_in_the_order_of_names_and_keeps_to_its_folder(store):
    wanted = sorted(["a/2", "a/10", "a/1", "a-b/1", "a.b", "ab/1", "a0", "A/1", "a/sub/1", "a/sub-1", "b"])
    for name in reversed(wanted):
        await store.put(name, name.encode())
    assert await names(store) == wanted
    assert await names(store, "a/") == [name for name in wanted if name.startswith("a/")]
    assert await names(store, "a/sub/") == ["a/sub/1"]
    assert await names(store, "b/") == await names(store, "c/d/") == []
    entry = [entry async for entry in store.list("a-b/")][0]
    assert (entry.name, entry.size) == ("a-b/1", 5) and abs(entry.modified - time.time()) < 60


async def test_a_list_goes_past_a_thousand_objects(store):
    wanted = [f"many/{number:04}" for number in range(1100)]
    for start in range(0, len(wanted), 50):
        await asyncio.gather(*(store.put(name, b"") for name in wanted[start : start + 50]))
    assert await names(store, "many/") == wanted
    await store.delete(wanted)
    assert await names(store) == []


@pytest.mark.parametrize(
    "name", ["", "/a", "a/", "a//b", "..", "a/../b", "a/./b", ".tmp-1", "a\0b", "a\nb", "ü"]
)
async def test_a_name_that_could_mean_something_else_is_refused(store, name):
    for refused in (
        store.put(name, b""),
        store.create(name, b""),
        store.get(name),
        store.size(name),
        store.delete([name]),
        anext(store.read(name)),
        anext(store.list(f"{name}/x")),
    ):
        with pytest.raises(ValueError):
            await refused
    assert await names(store) == []


@pytest.mark.parametrize("url", ["", "store", "file:relative", "file://host/x", "http://x/y", "s3:///x"])
async def test_a_url_of_no_store_is_refused(url):
    with pytest.raises(ValueError, match="wanted"):
        open_store(url)


async def test_only_a_folder_can_have_less_room_than_is_to_be_spared(store, tmp_path):
    store.check_free_space()
    if isinstance(store, Folder):
        with pytest.raises(Full):
            Folder(tmp_path, min_free=2**60).check_free_space()


# What only the folder has to prove


async def test_a_folder_syncs_bytes_then_name_then_the_folders_above(tmp_path):
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
    seen = []
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


async def test_a_put_and_the_pruning_of_its_folder_do_not_harm_each_other(tmp_path):
    store = Folder(tmp_path)

    async def again_and_again(worker):
        for number in range(150):
            name = f"same/folder/{worker}-{number}"
            await store.put(name, b"x")
            assert await store.get(name) == b"x"
            await store.delete([name])

    await asyncio.gather(*map(again_and_again, range(8)))
    assert list(tmp_path.iterdir()) == []  # empty folders are pruned


async def test_a_tmp_file_is_never_listed_and_swept_when_it_is_old(tmp_path):
    store = Folder(tmp_path)
    await store.put("a/1", b"x")
    old, new = tmp_path / "a" / f"{TMP}old", tmp_path / "a" / f"{TMP}new"
    old.touch()
    new.touch()
    os.utime(old, (0, 0))
    assert await names(store) == ["a/1"]
    assert await store.remove_leftovers() == 1
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [new.name, "1"]


async def test_a_full_disk_is_told_and_leaves_nothing(tmp_path):
    """A file size limit stands in for the full disk: both fail the write half way with an OSError."""
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


async def test_a_folder_in_the_way_is_unavailable_for_a_put(tmp_path):
    store = Folder(tmp_path)
    await store.put("a/b", b"x")
    for name in ("a", "a/b/c"):
        with pytest.raises(Unavailable):
            await store.put(name, b"y")
    assert await names(store) == ["a/b"]


# What only S3 has to prove


async def test_s3_that_is_gone_silent_or_unknown_is_unavailable_within_seconds(monkeypatch):
    url = s3_url(monkeypatch)
    unknown = open_store("s3://no-such-bucket/x")
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.create_server(("127.0.0.1", 0)) as gone:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        quiet = open_store(url)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{gone.getsockname()[1]}")
        away = open_store(url)
        gone.close()

        async def fails(call):
            start = time.monotonic()
            with pytest.raises(Unavailable):
                await call
            assert time.monotonic() - start < 8

        for store in (quiet, away):
            await asyncio.gather(
                fails(store.put("a", b"x")),
                fails(store.put("a", pieces(b"x"))),
                fails(store.create("a", b"x")),
                fails(store.get("a")),
                fails(store.size("a")),
                fails(store.delete(["a"])),
                fails(names(store)),
            )
        await fails(unknown.put("a", b"x"))
        await fails(names(unknown))
