"""`check` of comments in segments: what it reports, with and without reading the segments, and what it repairs."""

import asyncio
import json

import pytest
from conftest import connect
from making import publish, seal
from state import contents, unchanged

from storage import check, comments, keys, sealing, segments
from storage.segments import Comment, Segments

NOW = 1_763_971_200_000  # ms since 1970


@pytest.fixture
def db(db, monkeypatch):
    """storage's client, at a time that only the test changes. Segments have three comments."""
    monkeypatch.setattr(sealing, "SEGMENT_COMMENTS", 3)
    db.clock = NOW
    return db


class Sealed:
    """A post with four segments of 3, 3, 3 and 1 comments, one of them erased, and one comment in Redis."""

    def __init__(self, db, store, client):
        self.db, self.store, self.client = db, store, client

    async def make(self) -> "Sealed":
        self.post = await publish(self.db, self.store, "alice", 10)
        self.rows = (await comments.page(self.db, Segments(None), self.post, 20)).comments[::-1]
        await seal(self.db, self.store, self.post)
        await comments.delete(self.db, Segments(self.store), "bob", self.post, self.rows[4].id)
        self.db.clock += 1000
        self.rows.append((await comments.add(self.db, "bob", self.post, "hot"))[0])
        self.segments, self.erased = keys.segments(self.post), keys.erased(self.post)
        self.latest, self.sealing, self.retired = keys.latest(self.post), keys.sealing(0), keys.retired(0)
        self.entries = self.client.lrange(self.segments, 0, -1)
        self.names = [sealing.Entry.parse(entry).name for entry in self.entries]
        return self

    def named(self, flaw: str) -> str:
        return flaw.format(*self.names, hot=self.rows[-1].id)

    async def put(self, number: int, data: bytes) -> None:
        await self.store.put(keys.segment(self.post, self.names[number]), data)

    async def put_rows(self, number: int, rows: list[Comment]) -> None:
        await self.put(number, segments.encode(self.post, rows))


@pytest.fixture
async def on_one_server(embedded, store, monkeypatch):
    """For flaws that no script finds."""
    monkeypatch.setattr(sealing, "SEGMENT_COMMENTS", 3)
    embedded.client.flushall()
    db = connect(embedded)
    db.clock = NOW
    yield await Sealed(db, store, embedded.client).make()
    await db.close()


@pytest.fixture
async def sealed(db, store, server):
    return await Sealed(db, store, server.client).make()


async def test_sound_segments_have_no_flaw_and_comments_are_counted_by_their_place(
    db, store, sealed, server, tmp_path
):
    for deep in (False, True):
        with unchanged(server.client, tmp_path):
            report = await check.check(db, store, repair=True, deep=deep)
        assert report.lines == []
        counts = "1 posts, 10 comments (1 in Redis, 9 in the store, 1 erased), 0 open uploads"
        assert str(report) == f"{counts}: 0 flaws remain, 0 were repaired"
    await seal(db, store, sealed.post)
    assert (await check.check(db, store, deep=True)).lines == []
    for row in await remaining(db, store, sealed.post):
        await comments.delete(db, Segments(store), "bob", sealed.post, row.id)
    await seal(db, store, sealed.post)
    assert all(entry.endswith(" 0 -") for entry in server.client.lrange(sealed.segments, 0, -1))
    assert (await check.check(db, store, deep=True)).lines == []


async def remaining(db, store, post: str) -> list[Comment]:
    return (await comments.page(db, Segments(store), post, 20)).comments


# What is done to the post, and what is then reported: by every check, or by a deep one only.
SPOILED = {
    "missing": (
        lambda at: at.store.delete([keys.segment(at.post, at.names[1])]),
        "3 its segment {1} is missing",
        None,
    ),
    "empty": (lambda at: at.put(1, b""), "3 its segment {1} is empty", "3 its segment {1} is damaged: no segment"),
    "damaged": (lambda at: at.put(0, b"rubbish"), None, "3 its segment {0} is damaged: no segment"),
    "of another post": (
        lambda at: at.put(0, segments.encode(keys.new_post_id(0), at.rows[:3])),
        None,
        "3 its segment {0} is damaged: no whole segment of",
    ),
    "too short": (lambda at: at.put_rows(2, at.rows[6:8]), None, "3 its segment {2} has 2 comments, not 3"),
    "of other comments": (
        lambda at: at.put_rows(2, at.rows[:3]),
        None,
        "3 its segment {2} has comments of another segment",
    ),
    "out of order": (
        lambda at: at.client.lset(at.segments, 0, at.entries[0].replace(at.rows[2].id, at.rows[6].id)),
        "3 its segment {1} is not in order with the older ones",
        None,
    ),
    "counted wrong": (
        lambda at: at.client.lset(at.segments, 0, f"{at.rows[2].id} 2 {at.names[0]}"),
        None,
        "3 its segment {0} has 3 comments, not 2",
    ),
    "counted backwards": (
        lambda at: at.client.lset(at.segments, 0, f"{at.rows[2].id} 7 {at.names[0]}"),
        "3 its segment {1} is not in order with the older ones",
        None,
    ),
    "an erased comment that never was": (
        lambda at: at.client.sadd(at.erased, "1-5"),
        None,
        "3 its erased comment 1-5 is in no segment",
    ),
    "an erased comment in Redis": (
        lambda at: at.client.sadd(at.erased, at.rows[-1].id),
        "3 its erased comment {hot} is in no segment",
        None,
    ),
}


@pytest.mark.parametrize("flaw", SPOILED)
async def test_what_is_wrong_with_a_segment_is_reported_and_stays(on_one_server, flaw):
    sealed, (spoil, shallow, deep) = on_one_server, SPOILED[flaw]
    db, store, client = sealed.db, sealed.store, sealed.client
    done = spoil(sealed)
    if asyncio.iscoroutine(done):
        await done
    before = contents(client)
    lines = (await check.check(db, store)).lines
    assert any(": 3 " in line for line in lines) == bool(shallow)
    assert not shallow or any(line.startswith(f"{sealed.post}: {sealed.named(shallow)}") for line in lines), lines
    lines = (await check.check(db, store, repair=True, deep=True)).lines
    assert any(line.startswith(f"{sealed.post}: {sealed.named(deep or shallow)}") for line in lines), lines
    after = contents(client)
    assert [after[key] for key in (sealed.segments, sealed.erased)] == [
        before[key] for key in (sealed.segments, sealed.erased)
    ]


async def test_the_posts_behind_one_with_damaged_segments_are_checked_and_repaired(db, store, sealed, server):
    others = [await publish(db, store, "alice", 1) for _ in range(3)]
    for other in others:
        server.client.zadd(keys.feed(0), {other: 7})
        await seal(db, store, other)
    await sealed.put(0, b"rubbish")
    await store.delete([keys.segment(sealed.post, sealed.names[1])])
    server.client.lset(sealed.segments, 2, "rubbish")
    report = await check.check(db, store, repair=True, deep=True)
    assert sorted(report.lines) == sorted(
        [
            f"{sealed.post}: 3 an entry of its segments is malformed: rubbish",
            *(f"{other}: 1 its score is 7, it has 1 comments (repaired)" for other in others),
        ]
    )
    server.client.lset(sealed.segments, 2, sealed.entries[2])
    found = [line for line in (await check.check(db, store, deep=True)).lines if "3 its segment" in line]
    assert len(found) == 2


def row(comment: Comment, text: str = "") -> str:
    return json.dumps([comment.id, comment.author, text or comment.text])


# What is done to derived data, the flaw, and whether every check finds it, or only a deep one.
DERIVED = {
    "no hot one": (lambda at: at.client.lpop(at.latest), "2 its latest", True),
    "another hot one": (lambda at: at.client.lset(at.latest, 0, row(at.rows[-1], "x")), "2 its latest", True),
    "no sealed one": (lambda at: at.client.rpop(at.latest), "2 its latest", True),
    "another text": (lambda at: at.client.lset(at.latest, 1, row(at.rows[9], "x")), "2 its latest", False),
    "an older one": (lambda at: at.client.lset(at.latest, 1, row(at.rows[8])), "2 its latest", False),
    "an erased one": (lambda at: at.client.lset(at.latest, 1, row(at.rows[4])), "2 its latest", True),
    "one from the future": (
        lambda at: at.client.lset(at.latest, 1, row(Comment("9999999999999-0", "bob", "x"))),
        "2 its latest",
        True,
    ),
    "rubbish": (lambda at: at.client.lset(at.latest, 1, "rubbish"), "2 its latest", True),
    "none": (lambda at: at.client.delete(at.latest), "2 its latest", True),
    "score": (lambda at: at.client.zadd(keys.feed(0), {at.post: 11}), "1 its score is 11, it has 10", True),
    "not compacted": (
        lambda at: at.client.delete(at.sealing),
        "0 it has erased comments and is not in sealing",
        True,
    ),
}


async def test_what_is_derived_from_segments_is_repaired_to_what_it_was(db, store, sealed, server):
    before = contents(server.client)
    for name, (spoil, text, always) in DERIVED.items():
        spoil(sealed)
        with unchanged(server.client):
            lines = (await check.check(db, store)).lines
        assert [line.startswith(f"{sealed.post}: {text}") for line in lines] == [True] * always, name
        report = await check.check(db, store, repair=True, deep=not always)
        assert (report.flaws, report.repaired) == (0, 1) and report.lines[0].startswith(f"{sealed.post}: {text}"), name
        if name == "not compacted":
            assert server.client.zscore(sealed.sealing, sealed.post) == db.clock
            before[sealed.sealing] = contents(server.client)[sealed.sealing]
        assert contents(server.client) == before, name


async def test_latest_comments_in_a_lost_segment_are_reported_and_stay(db, store, sealed, server):
    server.client.rpop(sealed.latest)
    await store.delete([keys.segment(sealed.post, sealed.names[3])])
    with unchanged(server.client):
        report = await check.check(db, store, repair=True)
    assert sorted(report.lines) == [
        f"{sealed.post}: 2 its latest comments are not its newest ones",
        f"{sealed.post}: 3 its segment {sealed.names[3]} is missing",
    ]


async def test_a_comment_in_redis_that_is_older_than_the_segments_is_reported(db, store, sealed, server):
    server.client.delete(keys.comments(sealed.post))
    server.client.xadd(keys.comments(sealed.post), {"author": "bob", "text": "x"}, f"{NOW}-5")
    lines = (await check.check(db, store)).lines
    assert f"{sealed.post}: 3 its comment {NOW}-5 is in Redis and not newer than its segments" in lines


async def test_segments_and_erased_comments_of_a_post_that_does_not_exist_are_reported(db, store, sealed, server):
    missing, also_missing = keys.new_post_id(0), keys.new_post_id(0)
    server.client.rpush(keys.segments(missing), "5-0 0 -")
    server.client.sadd(keys.erased(also_missing), "5-0")
    with unchanged(server.client):
        report = await check.check(db, store, repair=True)
    assert sorted(report.lines) == sorted(
        f"{post}: 0 it has comments and is not ready" for post in (missing, also_missing)
    )


async def test_members_that_stand_for_nothing_are_removed_by_a_repair_and_others_stay(db, store, sealed, server):
    gone = keys.new_post_id(0)
    await comments.delete(db, Segments(store), "bob", sealed.post, sealed.rows[0].id)
    await seal(db, store, sealed.post)
    assert (await check.check(db, store)).lines == []
    server.client.zadd(sealed.retired, {f"{gone}/": 1, f"{gone}/{sealed.names[0]}": 1})
    before = contents(server.client)
    named = sealing.Entry.parse(server.client.lindex(sealed.segments, 0)).name
    wrong = {
        sealed.sealing: ["rubbish", keys.new_post_id(1), keys.new_upload_id(0)],
        sealed.retired: ["rubbish", gone, f"{keys.new_post_id(1)}/", f"{gone}/rubbish", f"{gone}/{named}/"],
    }
    for key, members in wrong.items():
        server.client.zadd(key, dict.fromkeys(members, 5))
    server.client.zadd(sealed.retired, {f"{sealed.post}/": 5, f"{sealed.post}/{named}": 5})
    server.client.set(keys.quiet(0), "rubbish")
    with unchanged(server.client):
        lines = (await check.check(db, store)).lines
    assert sorted(lines) == sorted(
        [
            *(f"{member}: 0 it is not a valid member of sealing" for member in wrong[sealed.sealing]),
            *(f"{member}: 0 it is not a valid member of retired" for member in wrong[sealed.retired]),
            f"{sealed.post}/: 7 it is to be removed, and its post names it",
            f"{sealed.post}/{named}: 7 it is to be removed, and its post names it",
            f"{keys.quiet(0)}: 0 it is no revision",
        ]
    )
    report = await check.check(db, store, repair=True)
    assert (report.flaws, report.repaired) == (0, len(lines))
    assert contents(server.client) == before


async def test_segments_that_are_sealed_and_compacted_meanwhile_are_no_flaw(db, store, sealed, server):
    """The store seals and compacts when the check first asks it for a segment."""

    class Busy:
        asked = False

        def __getattr__(self, name):
            return getattr(store, name)

        async def size(self, name: str) -> int:
            if name.startswith(keys.SEGMENTS) and not self.asked:
                self.asked = True
                await comments.add(db, "bob", sealed.post, "meanwhile")
                await comments.delete(db, Segments(store), "bob", sealed.post, sealed.rows[0].id)
                await seal(db, store, sealed.post)
                assert server.client.zcard(sealed.retired) == 2
                for member in server.client.zrange(sealed.retired, 0, -1):
                    await store.delete([keys.SEGMENTS + member])
            return await store.size(name)

    busy = Busy()
    assert (await check.check(db, busy)).lines == [] and busy.asked
    assert (await check.check(db, store, deep=True)).lines == []
