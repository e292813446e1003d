"""An export holds all that a user has posted, byte for byte, and goes on after a break. So does an erasure."""

import io
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import zipfile
from contextlib import nullcontext

import pytest
from conftest import ROOT, Site, run_with_db, until
from making import NO_SEGMENTS, make_upload, publish, seal
from state import contents, unchanged
from uploading import picture

from storage import check, comments, erasure, export, keys, moderation, posts, progress, sealing, uploads, users
from storage.errors import NoPost
from storage.objects import NotFound, Unavailable
from storage.progress import Progress
from storage.segments import Segments
from storage.settings import DAY_MS, MIB

NOW = 1_763_971_200_000  # ms since 1970
REACH = 3 * DAY_MS
USER = "{c}:arol"  # a name that looks like a part of a key


@pytest.fixture
def quiet():
    return Progress(io.StringIO())


@pytest.fixture(params=[1, 3])
def partitions(request):
    return request.param


async def furnish(db, store, partitions: int) -> dict[str, object]:
    """Everything that a user can have, beside the same of alice. Returns the ids, and the bytes of the originals."""
    made: dict[str, object] = {}
    for author in (USER, "alice"):
        ready, hidden, other = [await publish(db, store, author, 1, partitions) for _ in range(3)]
        waiting, upload = await make_waiting(db, store, author, partitions)
        await moderation.hide(db, store, NO_SEGMENTS, hidden)
        made[author] = {"ready": ready, "hidden": hidden, "other": other, "waiting": waiting, "upload": upload}
    theirs, hers = made[USER], made["alice"]
    for post in (hers["ready"], theirs["ready"]):
        for number in range(users.COMMENTS + 5):
            await comments.add(db, USER if number % 50 == 0 else "bob", post, f"{number} é\n")
    kept, _ = await comments.add(db, USER, hers["ready"], "kept")
    await moderation.hide(db, store, NO_SEGMENTS, hers["ready"], kept.id)
    await moderation.unhide(db, NO_SEGMENTS, hers["hidden"])
    await comments.add(db, USER, hers["hidden"], "on a hidden post")
    await moderation.hide(db, store, NO_SEGMENTS, hers["hidden"])
    once = keys.IdempotencyKey("POST /v1/uploads a-key", "-")
    for author in (USER, "alice"):
        made[author]["open"], _ = await uploads.create(db, author, partitions, 2000, "filename YQ==", once)
    return made


async def make_waiting(db, store, author: str, partitions: int) -> tuple[str, str]:
    """A post whose image is not made yet. Its original is still in two chunks. Returns the ids of post and upload."""
    upload, _ = await uploads.create(db, author, partitions, 3000)
    image = uploads.Appender(db, store, upload, 0, 3000)
    data = picture(3000)
    for part in (data[:1000], data[1000:]):
        await image.write(part)
        await image.commit()
    return (await posts.create(db, author, upload, "waits"))[0], upload


def read_zip(path) -> tuple[dict, dict[str, list[dict]], dict[str, bytes]]:
    """`user.json`, the rows of the other lists by their names, and the originals by the ids of their posts."""
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        rows = {
            name: [json.loads(line) for line in archive.read(f"{name}.jsonl").splitlines()] for name in export.ROWS
        }
        originals = {row["id"]: archive.read(row["original"]) for row in rows["posts"] if row["original"]}
        names = {"user.json", *(f"{name}.jsonl" for name in rows), *(row["original"] for row in rows["posts"])}
        assert set(archive.namelist()) == names - {None}
        return json.loads(archive.read("user.json")), rows, originals


async def stored(db, store, post: str, upload: str = "") -> bytes:
    try:
        return await store.get(keys.original(post))
    except NotFound:
        names = (await uploads.inspect(db, upload)).chunks
        return b"".join([await store.get(keys.chunk(upload, name)) for name in names])


async def test_an_export_holds_all_of_a_user_and_nothing_of_others(server, db, store, tmp_path, quiet, partitions):
    made = (await furnish(db, store, partitions))[USER]
    target = tmp_path / "carol.zip"
    with unchanged(server.client, tmp_path / "store"):
        await export.export(db, store, NO_SEGMENTS, USER, target, quiet)
    about, rows, originals = read_zip(target)
    assert (about["user"], about["posts"], about["comments"], about["uploads"]) == (USER, 4, 8, 1)
    assert about["posts_without_original"] == []
    ids = {made[name] for name in ("ready", "hidden", "other", "waiting")}
    assert {row["id"] for row in rows["posts"]} == ids == set(originals)
    for post, data in originals.items():
        assert data == await stored(db, store, post, made["upload"])
    states = {row["id"]: (row["status"], bool(row["hidden_at"])) for row in rows["posts"]}
    assert states[made["hidden"]] == ("ready", True) and states[made["waiting"]] == ("processing", False)
    assert sorted(row["text"] for row in rows["comments"] if row["hidden"]) == ["kept"]
    assert {row["text"] for row in rows["comments"]} == {"0 é\n", "50 é\n", "100 é\n", "kept", "on a hidden post"}
    assert [(row["id"], row["length"], row["metadata"]) for row in rows["uploads"]] == [
        (made["open"], 2000, "filename YQ==")
    ]
    assert os.stat(target).st_mode & 0o077 == 0, "nobody else reads it"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["carol.zip", "store"]


async def test_an_export_never_replaces_a_file_and_never_mixes_two_users(db, store, tmp_path, quiet):
    target = tmp_path / "user.zip"
    target.write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        await export.export(db, store, NO_SEGMENTS, "alice", target, quiet)
    assert target.read_bytes() == b"mine"
    target.unlink()
    parts = tmp_path / "user.zip.parts"
    with export._locked(parts, "alice"), pytest.raises(export.Busy, match="another export works"):
        await export.export(db, store, NO_SEGMENTS, "alice", target, quiet)
    with pytest.raises(export.Busy, match="another user"):
        await export.export(db, store, NO_SEGMENTS, "bob", target, quiet)
    assert (await export.export(db, store, NO_SEGMENTS, "alice", target, quiet))["posts"] == 0
    target.unlink()
    (tmp_path / "precious").write_text("mine")
    for access in (0o777, 0o750):  # somebody else made the folder, to read the parts and to have files overwritten
        parts.mkdir()
        parts.chmod(access)
        for name in ("lock", "user"):
            (parts / name).symlink_to(tmp_path / "precious")
        with pytest.raises(export.Busy, match="only you"):
            await export.export(db, store, NO_SEGMENTS, "alice", target, quiet)
        assert (tmp_path / "precious").read_text() == "mine"
        shutil.rmtree(parts)
    (tmp_path / "private").mkdir(mode=0o700)
    parts.symlink_to(tmp_path / "private")
    with pytest.raises(export.Busy, match="only you"):
        await export.export(db, store, NO_SEGMENTS, "alice", target, quiet)


async def test_an_export_that_was_killed_when_the_zip_had_its_name_is_continued(db, store, tmp_path, quiet):
    await publish(db, store, "alice", 1)
    target, parts = tmp_path / "a.zip", tmp_path / "a.zip.parts"
    about = await export.export(db, store, NO_SEGMENTS, "alice", target, quiet)
    parts.mkdir(mode=0o700)
    os.link(target, parts / "archive.zip")
    (parts / "originals").mkdir()  # the removal of the parts was broken off
    assert await export.export(db, store, NO_SEGMENTS, "alice", target, quiet) == about
    assert not parts.exists() and set(read_zip(target)[2])


async def test_an_export_says_which_originals_are_missing(db, store, tmp_path, quiet):
    kept, missing = [await publish(db, store, "alice") for _ in range(2)]
    await store.delete([keys.original(missing)])
    about = await export.export(db, store, NO_SEGMENTS, "alice", tmp_path / "a.zip", quiet)
    assert about["posts_without_original"] == [missing]
    assert set(read_zip(tmp_path / "a.zip")[2]) == {kept}


class Breaking:
    """An object store that becomes unavailable after a number of calls."""

    def __init__(self, store, calls: int):
        self.store, self.calls = store, calls

    def __getattr__(self, name):
        self.calls -= 1
        if self.calls < 0:
            raise Unavailable("it is cut off")
        return getattr(self.store, name)


async def test_an_export_that_breaks_anywhere_is_continued_by_the_same_call(db, store, tmp_path, quiet):
    made = [await publish(db, store, "alice", 1) for _ in range(3)]
    target = tmp_path / "a.zip"
    for calls in (0, 1, 1):
        with pytest.raises(Unavailable):
            await export.export(db, Breaking(store, calls), NO_SEGMENTS, "alice", target, quiet)
        assert not target.exists()
    fetched = [path for path in (tmp_path / "a.zip.parts" / "originals").iterdir() if path.suffix != ".draft"]
    assert len(fetched) == 2, "what was fetched before stays"
    await export.export(db, Breaking(store, 1), NO_SEGMENTS, "alice", target, quiet)
    assert set(read_zip(target)[2]) == set(made)


# Comments in segments


async def furnish_sealed(db, store) -> list[str]:
    """Two posts, the second one hidden, each with two comments of bob and two of carol in segments of two."""
    made = []
    for hidden in (False, True):
        post = await publish(db, store, "alice", 2)
        for text in ("first", "second"):
            await comments.add(db, "carol", post, f"{text} of carol")
        await seal(db, store, post)
        if hidden:
            await moderation.hide(db, store, NO_SEGMENTS, post)
        made.append(post)
    return made


async def segments_of(db, store, post: str) -> list[tuple[str, list[comments.Comment]]]:
    """The names of a post's segments in the store, oldest first, and their comments."""
    entries, _ = await sealing.read_segments(db, post)
    names = [name for entry in entries if (name := sealing.Entry.parse(entry).name) != keys.NO_SEGMENT]
    return [(keys.segment(post, name), list(await Segments(store).read(post, name))) for name in names]


async def test_comments_in_segments_are_exported_and_erased(server, db, store, tmp_path, quiet, monkeypatch):
    monkeypatch.setattr(sealing, "SEGMENT_COMMENTS", 2)
    made = await furnish_sealed(db, store)
    about = await export.export(db, store, Segments(store), "carol", tmp_path / "carol.zip", quiet)
    assert (about["comments"], about["posts_with_unreadable_comments"]) == (4, [])
    rows = read_zip(tmp_path / "carol.zip")[1]["comments"]
    texts = ("first of carol", "second of carol")
    assert {(row["post"], row["text"]) for row in rows} == {(post, text) for post in made for text in texts}
    counts = await erasure.erase(db, store, Segments(store), "carol", REACH, quiet, remove=True)
    assert (counts["comments"], counts.unreadable) == (4, set())
    for post in made:
        assert (await posts.inspect(db, post)).comment_count == 2
        await seal(db, store, post)
        assert [row.author for _, rows in await segments_of(db, store, post) for row in rows] == ["bob", "bob"]
    assert traces(server, "carol") == []
    report = await check.check(db, store, deep=True)
    assert (report.lines, report.erased_comments) == ([], 0)


@pytest.mark.parametrize("damage", ["missing", "damaged"])
async def test_a_post_with_a_damaged_segment_is_named_and_stops_nothing_else(
    server, db, store, tmp_path, quiet, monkeypatch, damage
):
    monkeypatch.setattr(sealing, "SEGMENT_COMMENTS", 2)
    damaged, other = await furnish_sealed(db, store)
    for text in ("third", "fourth"):
        await comments.add(db, "carol", damaged, f"{text} of carol")
    await seal(db, store, damaged)
    await comments.add(db, "carol", damaged, "in Redis")
    lost = (await segments_of(db, store, damaged))[1][0]
    data = await store.get(lost)
    await (store.delete([lost]) if damage == "missing" else store.put(lost, b"rubbish"))

    about = await export.export(db, store, Segments(store), "carol", tmp_path / "carol.zip", quiet)
    assert (about["comments"], about["posts_with_unreadable_comments"]) == (5, [damaged])
    texts = {row["text"] for row in read_zip(tmp_path / "carol.zip")[1]["comments"] if row["post"] == damaged}
    assert texts == {"third of carol", "fourth of carol", "in Redis"}
    with unchanged(server.client), pytest.raises(Unavailable, match="cut off"):
        await erasure.erase(db, store, Segments(Breaking(store, 1)), "carol", REACH, quiet, remove=True)
    counts = await erasure.erase(db, store, Segments(store), "carol", REACH, quiet, remove=True)
    assert counts.unreadable == {damaged} and (await posts.inspect(db, other)).comment_count == 2
    assert 3 <= counts["comments"] <= 5, "the last one may need the segment for the latest comments"

    await store.put(lost, data)
    counts = await erasure.erase(db, store, Segments(store), "carol", REACH, quiet, remove=True)
    assert counts["comments"] >= 2 and counts.unreadable == set()
    assert (await posts.inspect(db, damaged)).comment_count == 2 and traces(server, "carol") == []
    assert (await check.check(db, store, deep=True)).lines == []


def test_the_commands_name_the_post_and_end_with_an_error_status(embedded, bare, tmp_path):
    async def lose_a_segment(db):
        await seal(db, bare.store, bare.posts[0])
        await bare.store.delete([(await segments_of(db, bare.store, bare.posts[0]))[0][0]])

    run_with_db(embedded, lose_a_segment)
    last = f"NOT COMPLETE: some comments of {bare.posts[0]} cannot be read: run imagegram-storage check --deep"
    for words, first in (
        (["export", "alice", str(tmp_path / "a.zip")], f"{tmp_path}/a.zip: 4 posts, 144 comments, 0 uploads"),
        (["erase", "alice"], "found of alice: 4 posts, 144 comments, "),
    ):
        code, printed, errors, _ = run(bare, *words)
        lines = printed.splitlines()
        assert (code, errors, lines[-1]) == (1, "", last) and lines[0].startswith(first)
    assert read_zip(tmp_path / "a.zip")[0]["posts_with_unreadable_comments"] == [bare.posts[0]]


# Erasing


async def test_an_erasure_without_yes_only_counts(server, db, store, tmp_path, quiet, partitions):
    await furnish(db, store, partitions)
    with unchanged(server.client, tmp_path):
        counts = await erasure.erase(db, store, NO_SEGMENTS, USER, REACH, quiet, remove=False)
    assert (counts["posts"], counts["comments"], counts["open uploads"]) == (4, 8, 1)


def traces(server, user: str) -> list[str]:
    """The keys in whose names or values a user's name is."""
    return [key for key, value in contents(server.client).items() if user in key or user in str(value)]


async def test_an_erasure_leaves_nothing_of_the_user_and_all_of_the_others(server, db, store, quiet, partitions):
    made = await furnish(db, store, partitions)
    theirs, hers = made[USER], made["alice"]
    before = await posts.read(db, hers["ready"])
    server.client.set(keys.rate(0, "comment", USER), NOW)
    assert traces(server, USER)
    counts = await erasure.erase(db, store, NO_SEGMENTS, USER, REACH, quiet, remove=True)
    assert (counts["posts"], counts["open uploads"]) == (4, 1)
    assert 5 <= counts["comments"] <= 8, "three may have gone with the user's own post"
    assert traces(server, USER) == []
    for name in ("ready", "hidden", "other", "waiting"):
        with pytest.raises(NoPost):
            await posts.inspect(db, theirs[name])
    assert (await posts.read(db, hers["ready"])).comment_count == before.comment_count - 3
    report = await check.check(db, store)
    assert (report.lines, report.posts, report.uploads) == ([], 4, 1)
    assert (await erasure.erase(db, store, NO_SEGMENTS, USER, REACH, quiet, remove=True)).total() == 0
    assert await stored(db, store, theirs["ready"]), "backups may name it: the outbox erases it later"


async def test_after_a_restore_the_erasure_is_repeated_and_what_is_new_stays(server, db, store, quiet):
    db.clock = NOW
    old = await publish(db, store, "alice")
    comment, _ = await comments.add(db, "alice", old, "old")
    image = server.client.dump(keys.post(old)), server.client.dump(keys.comments(old))
    db.clock = keys.created_ms(old) + 1000
    await erasure.erase(db, store, NO_SEGMENTS, "alice", REACH, quiet, remove=True)
    assert [entry.name async for entry in store.list(keys.ERASURES)][0].count("alice") == 0
    server.client.restore(keys.post(old), 0, image[0])  # as a restore would bring it back
    server.client.zadd(keys.feed(0), {old: 0})
    db.clock += 1000
    new, _ = await comments.add(db, "alice", old, "of a new alice")
    theirs = await publish(db, store, "bob", 0)
    newer, _ = await comments.add(db, "alice", theirs, "of a new alice")
    with unchanged(server.client):
        found = await erasure.erase_again(db, store, NO_SEGMENTS, REACH, quiet, remove=False)
    assert (found[0], found[1]["posts"], found[1]["comments"]) == (1, 1, 0)
    await erasure.erase_again(db, store, NO_SEGMENTS, REACH, quiet, remove=True)
    with pytest.raises(NoPost):
        await posts.inspect(db, old)
    assert await comments.read(db, NO_SEGMENTS, theirs, newer.id) == newer

    async def may_name(moment: int) -> bool:
        return moment < db.clock - 2 * REACH

    assert await erasure.forget_old(db, store, 1, may_name, REACH) == 0
    db.clock += REACH
    assert await erasure.forget_old(db, store, 1, may_name, REACH) == 1
    assert await erasure.records(store) == []


async def test_the_record_of_an_erasure_covers_all_of_it_also_of_one_that_was_broken_off(db, store):
    """A backup from the middle of an erasure has a part of the user, too."""

    class Slow(Progress):
        def show(self, label, done, total, note):
            if note == "0 found":  # the walk begins at a node of a Cluster that has nothing of alice
                return
            db.clock += 60_000
            if broken:
                raise Unavailable("it is cut off")

    db.clock, broken = NOW, False
    old = await publish(db, store, "alice")
    db.clock = keys.created_ms(old) + 1000
    await erasure.erase(db, store, NO_SEGMENTS, "alice", REACH, Slow(io.StringIO()), remove=True)
    (record,) = await erasure.records(store)
    assert record.at == record.last == db.clock
    for broken in (True, False):  # a restore has brought alice back, and later did so again
        db.clock = max(record.last, keys.created_ms(await publish(db, store, "alice"))) + 1
        later = record._replace(at=db.clock)
        await erasure._record(store, later)
        began = db.clock = db.clock + 1000
        with pytest.raises(Unavailable) if broken else nullcontext():
            await erasure.erase_again(db, store, NO_SEGMENTS, REACH, Slow(io.StringIO()), remove=True)
        assert await erasure.records(store) == [later._replace(last=began if broken else db.clock)]


async def test_an_upload_that_becomes_a_post_during_an_erasure_is_erased_with_it(server, db, store, quiet):
    """The walk does not meet the key of a post that was created behind it."""

    def wanted(user: str, _: int) -> bool:
        return user == "alice"

    upload = await make_upload(db, "alice")
    (found,) = [found async for found in users.walk(db, NO_SEGMENTS, wanted, quiet, set())]
    post, _ = await posts.create(db, "alice", upload, "a moment later")
    met, _ = await users._look(db, NO_SEGMENTS, keys.upload(upload), wanted, set())
    assert [row.id for row in met] == [upload, post]
    await erasure._remove(db, store, NO_SEGMENTS, found, REACH)
    with pytest.raises(NoPost):
        await posts.inspect(db, post)
    assert traces(server, "alice") == [keys.turns(0)], "the next lease of image work removes it"


# Commands


LARGE = 100 * MIB  # bytes of the largest original
MEMORY = 40 * MIB  # by which a process may grow during an export of LARGE: far below LARGE, far above its pieces


@pytest.fixture
def bare(embedded, tmp_path):
    """A site without processes, on which alice has posts in three partitions."""
    embedded.client.flushall()
    site = Site(embedded.url, tmp_path, partitions=3)
    site.store = site.open_store()

    async def furnish(db):
        site.posts = [await publish(db, site.store, "alice", 0, partitions) for partitions in (1, 2, 3, 16384)]
        for number in range(400):
            await comments.add(db, "alice", site.posts[0], str(number))

    run_with_db(embedded, furnish)
    return site


def start(site, *words: str, **given) -> subprocess.Popen:
    command = [sys.executable, "-m", "storage", *words]
    return subprocess.Popen(command, cwd=ROOT, env=site.environment, text=True, **given)


def run(site, *words: str, pipes=subprocess.PIPE) -> tuple[int, str, str, int]:
    """Runs a command. Returns its exit code, what it printed, its errors, and the largest memory it had in bytes."""
    process = start(site, *words, stdout=pipes, stderr=pipes)
    printed, errors = process.stdout.read(), process.stderr.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, printed, errors, used.ru_maxrss * 1024


def test_an_export_of_large_originals_needs_little_memory_and_survives_a_kill(embedded, bare, tmp_path):
    target = tmp_path / "alice.zip"
    *_, small = run(bare, "export", "nobody", str(tmp_path / "nobody.zip"))
    large = tmp_path / "store" / keys.original(bare.posts[0])
    with large.open("r+b") as file:
        file.truncate(LARGE)
    process = start(bare, "export", "alice", str(target))
    originals = tmp_path / "alice.zip.parts" / "originals"
    until(lambda: originals.exists() and any(path.stat().st_size for path in originals.iterdir()), what="an original")
    process.kill()
    process.wait()
    assert not target.exists()
    process = start(bare, "export", "alice", str(target), stderr=subprocess.PIPE)
    until((tmp_path / "alice.zip.parts" / "archive.zip").exists, what="the zip")
    process.terminate()
    said = process.communicate()[1]
    assert said.endswith("stopped before the command was complete; the same command again continues\n")
    assert not target.exists()
    code, printed, errors, memory = run(bare, "export", "alice", str(target))
    assert (code, printed, errors) == (0, f"{target}: 4 posts, 400 comments, 0 uploads\n", "")
    assert memory < small + MEMORY
    with zipfile.ZipFile(target) as archive:
        for post in bare.posts:
            name = f"originals/{post}.png"
            with archive.open(name) as file, (tmp_path / "store" / keys.original(post)).open("rb") as stored:
                while piece := stored.read(MIB):
                    assert file.read(len(piece)) == piece
                assert not file.read(1)
    assert not (tmp_path / "alice.zip.parts").exists()


def test_an_erasure_survives_a_kill_and_says_what_remains(embedded, bare):
    client, stream = embedded.client, keys.comments(bare.posts[0])
    code, printed, *_ = run(bare, "erase", "alice")
    assert (code, printed.splitlines()[-1]) == (0, "nothing was removed: add --yes to remove it")
    assert client.xlen(stream) == 400

    async def move_comments(db):
        """The comments are now on a post of bob, which is not deleted."""
        bare.bobs = await publish(db, bare.store, "bob")
        client.rename(stream, keys.comments(bare.bobs))
        await check.check(db, bare.store, repair=True)

    run_with_db(embedded, move_comments)
    process = start(bare, "erase", "alice", "--yes")
    until(lambda: client.xlen(keys.comments(bare.bobs)) < 390, what="the first erased comments")
    process.kill()
    process.wait()
    left = client.xlen(keys.comments(bare.bobs))
    assert 0 < left < 400
    flaws = run_with_db(embedded, lambda db: check.check(db, bare.store))
    assert flaws.lines == []
    code, printed, errors, _ = run(bare, "erase", "alice", "--yes")
    assert (code, errors) == (0, "")
    assert re.fullmatch(
        rf"removed of alice: \d posts, {left} comments, 0 open uploads, \d other keys with the name\n"
        r"the last backup that names it is gone at [\d-]{10}T[\d:]{8}Z, if trial restores succeed until then; "
        r"originals too\n"
        r"a restore to before now brings it back: run `imagegram-storage erase --again --yes` after one\n"
        r"a token that is still valid can post again: .*\n",
        printed,
    )
    assert traces(embedded, "alice") == []
    assert run(bare, "erase", "--again", "--yes")[1].startswith("removed of 1 users that were erased before: 0 posts")


def test_a_command_that_lost_redis_says_how_to_continue(bare, tmp_path):
    bare.environment["IMAGEGRAM_REDIS_URL"] = f"unix://{tmp_path}/none"
    for words in (["export", "alice", str(tmp_path / "a.zip")], ["erase", "alice", "--yes"]):
        code, printed, errors, _ = run(bare, *words)
        assert (code, printed) == (1, "")
        assert errors.startswith("unreachable: ") and errors.endswith("; the same command again continues\n")


def test_a_user_is_required_and_is_utf_8(bare):
    for words in (["erase"], ["erase", "alice", "--again"]):
        code, _, errors, _ = run(bare, *words)
        assert code == 2 and "either USER or --again is required" in errors
    for words in (["erase", "\udcff"], ["export", "\udcff", "a.zip"]):
        code, _, errors, _ = run(bare, *words)
        assert code == 2 and errors.endswith("argument USER: it is not UTF-8\n")


# Progress


def test_a_terminal_gets_a_bar_that_ends_full(bare, tmp_path):
    terminal, other = pty.openpty()
    process = start(bare, "export", "alice", str(tmp_path / "a.zip"), stdout=subprocess.PIPE, stderr=other)
    assert process.wait() == 0
    process.stdout.close()
    os.close(other)
    drawn = os.read(terminal, 100_000).decode()
    os.close(terminal)
    assert re.search(r"\rkeys \[#+-*\] \d+ %, \d+ of \d+", drawn)
    assert re.search(r"originals \[#{24}\] 100 %, 4 of 4, \d+ MiB\x1b\[K\r\n", drawn)
    assert re.search(r"packed \[#{24}\] 100 %, 4 of 4\x1b\[K\r\n$", drawn)


def test_a_log_gets_a_line_every_few_seconds_with_the_time_that_is_left(monkeypatch):
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    log = io.StringIO()
    with Progress(log) as shown:
        for done in range(11):
            shown.show("keys", done, 10)
            now += 1.5
    assert log.getvalue().splitlines() == [
        "keys [#########---------------] 40 %, 4 of 10, 9 s left",
        "keys [###################-----] 80 %, 8 of 10, 3 s left",
    ]
