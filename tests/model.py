"""Random sequences of storage calls, compared with a plain Python model after each step.

Hypothesis chooses posts, comments, deletions, what an operator hides, walks over pages, and what the clock does. Small
segments are sealed and compacted meanwhile, by processes that wait between two of their calls, die there, or lose a
reply. On a real server, Redis is also backed up and restored, and a restore is undone by a backup of the timeline that
it left. After each step, Redis and the segments together must hold exactly the comments of the model, and all segments
that a kept backup names must be as they were.
"""

import asyncio
import os
import tempfile
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

import pytest
import redis as redis_client
from conftest import connect, start_server
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from making import make_post, make_processing

from storage import changes, check, comments, errors, keys, outbox, posts, sealing, sweep
from storage.objects import Unavailable, open_store
from storage.segments import Segments, decode
from storage.settings import COMPACT_MS, DAY_MS, LATEST_COMMENTS, LEASE_MS

SMALL_LEAF = 3  # entries
SMALL_SEGMENT = 4  # comments
HOT = 2  # comments that stay in Redis
QUIET_MS = 3 * DAY_MS
REACH_MS = 31 * DAY_MS  # for which a backup is kept
MONTHS_MS = 62 * DAY_MS
POSTS = 5  # no more exist at the same time
MANY = 100  # steps; no post has work for so many
WAITING = 3  # processes at most that wait at the same time

USERS = st.sampled_from(["alice", "bob", "{c}:arol"])
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
# The scripts before which a process has read what it needs.
DECIDING = ("seal_comments", "compact_segment", "delete_comment", "hide_comment")
KINDS = st.sampled_from(["seal", "seal", "seal", "delete", "hide", "page"])
REPLIES = st.sampled_from(["once", "twice", "lost"])
EVENTS = ["delete", "delete", "hide", "add", "seal", "restore"]

PICK = st.integers(0, 255)
LIES = st.sampled_from([0, 0, 1, -1, 3, -3, 5000, 2**32])  # ranks
# A rule without work would be a lost step.
with_shown_posts = precondition(lambda self: self.model)
with_comments = precondition(lambda self: any(self.model.values()) or any(self.hidden.values()))
with_processes = precondition(lambda self: self.processes)


def pick(things, number: int):
    """One of `things`, None if there are none."""
    things = list(things)
    return things[number % len(things)] if things else None


class World(NamedTuple):
    """What Redis must hold."""

    model: dict[str, list[comments.Comment]]  # post -> its comments, oldest first
    hidden: dict[str, list[comments.Comment]]  # the same of hidden posts, which no list may show
    kept: dict[str, dict[str, comments.Comment | str]]  # post -> its hidden comments, as comments.kept returns them
    greatest: dict[str, tuple[int, int]]  # post -> the greatest id that a comment of it ever had
    authors: dict[str, str]
    passing: list[str]  # posts that only the rules of walks delete
    unready: dict[str, str]  # posts that are processing or failed, with their status


class Backup(NamedTuple):
    taken: int  # ms since 1970
    data: dict[bytes, bytes]  # what DUMP returns for each key
    world: World
    segments: dict[str, bytes]  # all objects that it names


class Dated:
    """A store whose objects are as old as the clock of the model says."""

    def __init__(self, machine, folder: Path):
        self.machine, self.folder, self.store = machine, folder, open_store(folder.as_uri())

    def __getattr__(self, name):
        return getattr(self.store, name)

    async def put(self, name, data):
        await self.store.put(name, data)
        os.utime(self.folder / name, (self.machine.db.clock / 1000,) * 2)


class Process:
    """A process that waits before each of its calls of Redis and of the store, until it may go on.

    `reply` says what happens to the first reply of seal_comments or compact_segment: `once` nothing, `twice` the script
    is sent again at once, `lost` it is lost.
    """

    def __init__(self, machine, kind: str, reply: str, **about):
        self.machine, self.kind, self.reply, self.about = machine, kind, reply, about
        self.at, self.calls = "", 0
        self.outdated = False  # time has passed for which no process waits, or there was a restore
        self.seen = None  # the page that the model has when comments_page is called
        self.closed: list[asyncio.Future] = []  # gates
        self.stopped = asyncio.Event()
        self.segments = Segments(self, memory=0)

    def __getattr__(self, name):
        return getattr(self.machine.db, name)

    async def gate(self, at=""):
        self.at, self.calls = at, self.calls + 1
        self.closed.append(asyncio.get_running_loop().create_future())
        self.stopped.set()
        await self.closed[-1]

    async def pause(self):
        """Returns when the process waits or has ended."""
        stopped = asyncio.create_task(self.stopped.wait())
        await asyncio.wait([self.task, stopped], return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()

    async def go_on(self):
        self.stopped.clear()
        gates, self.closed = self.closed, []
        for one in gates:
            one.set_result(None)
        await self.pause()

    async def call(self, name, named, *args):
        await self.gate(name if self.calls else "")
        if name == "comments_page":
            self.seen = self.machine.page_of(**self.about)
        reply = await self.machine.db.call(name, named, *args)
        if name in ("seal_comments", "compact_segment"):
            self.machine.sent = [*self.machine.sent[-4:], (name, named, args)]
            how, self.reply = self.reply, "once"
            if how == "twice":
                await self.machine.repeat(name, named, args)
            if how == "lost":
                raise errors.Unknown("the reply was lost")
        return reply

    async def put(self, *args):
        await self.gate()
        await self.machine.objects.put(*args)

    async def get(self, *args):
        await self.gate()
        return await self.machine.objects.get(*args)

    async def delete(self, *args):
        await self.gate()
        await self.machine.objects.delete(*args)

    async def list(self, *args):
        await self.gate()
        async for entry in self.machine.objects.list(*args):
            yield entry


class Feed(RuleBasedStateMachine):
    """The rules are the calls that a step may make. `world` holds what Redis must hold."""

    server = None
    partitions = 1
    restores = True
    steps = 0  # of all runs of the class

    @initialize(jumps=st.booleans(), counts=st.lists(st.integers(0, 3 * SMALL_SEGMENT), min_size=1, max_size=3))
    def begin(self, jumps, counts):
        """With `jumps` the clock goes months forth and back. Then nobody knows which backup is older than what."""
        self.loop = asyncio.new_event_loop()
        self.folder = tempfile.TemporaryDirectory(dir="/dev/shm")
        self.objects = Dated(self, Path(self.folder.name))
        self.segments = Segments(self.objects, memory=0)
        self.server.client.flushall()
        self.db = connect(self.server)
        self.db.clock = 1_763_971_200_000
        self.jumps = jumps
        self.world = World({}, {}, {}, {}, {}, [], {})
        self.held: dict[str, posts.Post] = {}  # the posts that a client holds, which refreshes by changes
        self.token = None
        self.backups: list[Backup] = []
        self.processes: list[Process] = []
        self.sent: list[tuple] = []  # scripts that name segments, and whose replies may have been lost
        self.decoded: dict[tuple, list[comments.Comment]] = {}
        for count in counts:
            post = self.make_post("alice")
            for number in range(count):
                self.add("bob", post, str(number))

    def teardown(self):
        if hasattr(self, "loop"):
            self.end_processes()
            self.run(self.db.close())
            self.loop.close()
            self.folder.cleanup()

    def run(self, coroutine):
        return self.loop.run_until_complete(coroutine)

    @property
    def model(self):
        return self.world.model

    @property
    def hidden(self):
        return self.world.hidden

    @property
    def authors(self):
        return self.world.authors

    @property
    def unready(self):
        return self.world.unready

    @property
    def passing(self):
        return self.world.passing

    def all_posts(self) -> list[str]:
        """All posts that may have comments, in the order of their creation."""
        return sorted([*self.model, *self.hidden])

    def comments_of(self, post):
        """The comments of a post, hidden or not. None where it was deleted."""
        return self.hidden.get(post, self.model.get(post))

    def page_of(self, post, limit, before, hidden):
        """A page by the model, or None where there is no such post."""
        rows = (self.hidden if hidden else self.model).get(post)
        if rows is None:
            return None
        older = [row for row in rows[::-1] if not before or keys.order(row.id) < keys.order(before)]
        return comments.Page(older[:limit], len(older) > limit)

    # The clock

    @rule(ms=st.sampled_from([0, 1, 5, 5, COMPACT_MS, DAY_MS, QUIET_MS, REACH_MS - DAY_MS, MONTHS_MS]))
    def time_passes(self, ms):
        if ms >= DAY_MS and self.restores:
            self.back_up()
        self.advance(ms)

    @precondition(lambda self: self.jumps)
    @rule(ms=st.sampled_from([-3, -DAY_MS, -MONTHS_MS, 3 * MONTHS_MS, -3 * MONTHS_MS]))
    def the_clock_jumps(self, ms):
        if self.db.clock + ms > 1_700_000_000_000:
            self.advance(ms)

    def advance(self, ms):
        self.db.clock += ms
        for process in self.processes:
            process.outdated = process.outdated or abs(ms) >= DAY_MS
        if abs(ms) >= DAY_MS:
            self.token = None  # it is too old after CHANGES_MS
        if not self.jumps:
            self.backups = [one for one in self.backups if one.taken > self.db.clock - REACH_MS + 10]

    # Posts

    @precondition(lambda self: len(self.all_posts()) < POSTS)
    @rule(author=USERS, caption=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
    def publish(self, author, caption):
        assert self.run(posts.read(self.db, self.make_post(author, caption))).caption == caption

    def make_post(self, author, caption=""):
        post = self.run(make_post(self.db, author, self.partitions, caption))
        for name in (keys.original(post), keys.image(post)):
            self.run(self.objects.put(name, b"an image"))
        self.model[post], self.authors[post], self.world.kept[post] = [], author, {}
        self.world.greatest[post] = (0, 0)
        return post

    @with_shown_posts
    @rule(number=PICK)
    def hide_post(self, number):
        post = pick(self.model, number)
        assert not self.run(posts.unhide(self.db, post)), "repeating is harmless"
        assert self.run(posts.hide(self.db, post))
        self.hidden[post] = self.model.pop(post)
        assert not self.run(posts.hide(self.db, post))
        with pytest.raises(errors.NoPost):
            self.run(posts.read(self.db, post))
        with pytest.raises(errors.NoPost):
            self.run(comments.add(self.db, "bob", post, "a text"))
        for comment in self.hidden[post]:
            with pytest.raises(errors.NoPost):
                self.run(comments.delete(self.db, self.segments, comment.author, post, comment.id))

    @precondition(lambda self: self.hidden)
    @rule(number=PICK)
    def unhide_post(self, number):
        post = pick(self.hidden, number)
        assert self.run(posts.unhide(self.db, post))
        self.model[post] = self.hidden.pop(post)

    @precondition(lambda self: len(self.unready) < 3)
    @rule(author=USERS, ends=st.sampled_from(["processing", "failed"]))
    def create_a_post_that_is_not_ready(self, author, ends):
        post = self.run(make_processing(self.db, author, self.partitions))
        self.unready[post], self.authors[post] = ends, author
        if ends == "failed":
            self.run(outbox.fail(self.db, post, 0, "damaged", "it is damaged"))

    @precondition(lambda self: self.unready)
    @rule(number=PICK)
    def delete_a_post_that_is_not_ready(self, number):
        post = pick(sorted(self.unready), number)
        self.run(posts.delete(self.db, self.objects, self.authors[post], post, REACH_MS))
        del self.unready[post]

    def posts_of(self, user: str, statuses) -> list[str]:
        """The posts of a user with one of the statuses, newest first, by the model."""
        known = {**dict.fromkeys(self.model, "ready"), **self.unready}
        found = [post for post, status in known.items() if self.authors[post] == user and status in statuses]
        return sorted(found, reverse=True)

    @rule(user=USERS, limit=st.integers(1, 4), statuses=st.sampled_from([posts.STATUSES, *zip(posts.STATUSES)]))
    def walk_the_posts_of_a_user(self, user, limit, statuses):
        """A post that exists during the whole walk is returned exactly once, while others come and go."""
        before, walked, after = self.posts_of(user, statuses), [], ""
        while True:
            page = self.run(posts.of_user(self.db, self.partitions, user, statuses, limit, after))
            assert len(page.posts) <= limit
            walked += [row.id for row in page.posts]
            after = page.next
            if not after:
                break
            if self.passing and len(walked) % 2:
                post = self.passing[0]
                self.remove_post(post)
                before = [other for other in before if other != post]
                walked = [other for other in walked if other != post]
        assert walked == before

    def remove_post(self, post):
        hidden = post in self.hidden
        self.run(posts.delete(self.db, self.objects, self.authors[post], post, REACH_MS, hidden=hidden))
        del (self.hidden if hidden else self.model)[post]
        if post in self.passing:
            self.passing.remove(post)

    @precondition(lambda self: len(self.all_posts()) > 2)
    @rule(number=PICK, user=USERS)
    def delete_post(self, number, user):
        post = pick((post for post in self.all_posts() if post not in self.passing), number)
        if not post:
            return
        if post in self.hidden:
            with pytest.raises(errors.NoPost):
                self.run(posts.delete(self.db, self.objects, self.authors[post], post))
        elif user != self.authors[post]:
            with pytest.raises(errors.Forbidden):
                self.run(posts.delete(self.db, self.objects, user, post))
        self.remove_post(post)
        with pytest.raises(errors.NoPost):
            self.run(posts.read(self.db, post))

    # Comments

    @with_shown_posts
    @rule(number=PICK, author=USERS, text=TEXTS, count=st.integers(1, 2 * SMALL_SEGMENT))
    def comment(self, number, author, text, count):
        post = pick(sorted(self.model), number)
        for _ in range(count):
            comment = self.add(author, post, text)
        assert self.run(comments.read(self.db, self.segments, post, comment.id)) == comment

    def add(self, author, post, text):
        comment, repeated = self.run(comments.add(self.db, author, post, text, seal_at=HOT + SMALL_SEGMENT))
        assert not repeated
        self.appended(post, comment)
        return comment

    def appended(self, post, comment):
        assert keys.order(comment.id) > self.world.greatest[post], "an id is never used again"
        self.world.greatest[post] = keys.order(comment.id)
        self.comments_of(post).append(comment)

    def choose(self, number, where, also_hidden=True):
        """A comment, and its post: often one whose process waits. The comment is often sealed next, or in the feed."""
        known = self.all_posts() if also_hidden else sorted(self.model)
        known = [post for post in known if self.comments_of(post)]
        waiting = [process.about["post"] for process in self.processes if process.about["post"] in known]
        post = pick(waiting if waiting and number % 3 else known, number // 3)
        rows = self.comments_of(post)
        return post, pick((rows[-LATEST_COMMENTS:], rows[:SMALL_SEGMENT], rows, rows)[where % 4], where // 4)

    @precondition(lambda self: any(self.model.values()))
    @rule(number=PICK, where=PICK, user=USERS, count=st.sampled_from([1, 1, 1, 2, 6]))
    def delete_comment(self, number, where, user, count):
        for _ in range(count):
            if not any(self.model.values()):
                return
            post, comment = self.choose(number, where, also_hidden=False)
            if user != comment.author:
                with pytest.raises(errors.Forbidden):
                    self.run(comments.delete(self.db, self.segments, user, post, comment.id))
            self.delete(post, comment)
            for gone in (
                comments.read(self.db, self.segments, post, comment.id),
                comments.delete(self.db, self.segments, comment.author, post, comment.id),
            ):
                with pytest.raises(errors.NoComment):
                    self.run(gone)

    def delete(self, post, comment):
        self.run(comments.delete(self.db, self.segments, comment.author, post, comment.id))
        self.model[post].remove(comment)

    @with_comments
    @rule(number=PICK, where=PICK, hide=st.booleans())
    def an_operator_hides_or_deletes_a_comment(self, number, where, hide):
        post, comment = self.choose(number, where)
        if hide:
            self.hide(post, comment)
        else:
            self.run(comments.remove(self.db, self.segments, self.run(posts.inspect(self.db, post)), comment))
            self.comments_of(post).remove(comment)

    def hide(self, post, comment):
        row = self.run(posts.inspect(self.db, post))
        hides = [self.run(comments.hide(self.db, self.segments, row, comment.id)) for _ in range(2)]
        assert hides == [True, False]
        self.world.kept[post][comment.id] = comment
        self.comments_of(post).remove(comment)

    @precondition(lambda self: any(self.world.kept.get(post) for post in self.all_posts()))
    @rule(number=PICK, where=PICK)
    def unhide_comment(self, number, where):
        """It comes back as the newest comment, once."""
        kept = self.world.kept
        post = pick((post for post in self.all_posts() if kept[post]), number)
        row, old = self.run(posts.inspect(self.db, post)), pick(kept[post], where)
        shown = {self.run(comments.unhide(self.db, self.segments, row, old)) for _ in range(2)}
        if isinstance(kept[post][old], comments.Comment):
            (new,) = shown
            self.appended(post, kept[post][old]._replace(id=new))
            kept[post][old] = new
        assert shown == {kept[post][old]}
        assert self.run(comments.kept(self.db, post)) == kept[post]

    @with_comments
    @rule(limit=st.integers(1, 4), number=PICK)
    def walk_comments(self, limit, number):
        self.walk_all(pick(self.all_posts(), number), limit)

    def walk_all(self, post, limit):
        walked, before = [], ""
        while True:
            page = self.run(comments.page(self.db, self.segments, post, limit, before, post in self.hidden))
            walked += page.comments
            if not page.more:
                break
            before = page.comments[-1].id
        assert walked == self.comments_of(post)[::-1]
        for row in walked[:: SMALL_SEGMENT - 1]:
            assert self.run(comments.read(self.db, self.segments, post, row.id, post in self.hidden)) == row

    # The feed

    def expected(self) -> list[str]:
        """The posts in the order of the feed, by the model."""
        return sorted(self.model, key=lambda post: (len(self.model[post]), post), reverse=True)

    def walked(self, limit, meanwhile=lambda: None, lie=0):
        """The rows of all pages of the feed. `meanwhile` runs between two pages.

        `lie` is by how much the hints of the cursors are wrong.
        """
        rows, after = [], None
        while True:
            page = self.run(posts.feed(self.db, self.partitions, limit, after))
            rows += page.posts
            if not page.more:
                return rows
            ranks = [max(0, rank + lie) for rank in posts.ranks_behind(page.ranks, page.posts)]
            after = posts.FeedCursor(page.posts[-1].comment_count, page.posts[-1].id, tuple(ranks))
            meanwhile()

    @with_shown_posts
    @rule(limit=st.integers(1, 3), number=PICK, lie=LIES)
    def walk_while_posts_change(self, limit, number, lie):
        """A walk returns each post that does not change exactly once, even if another post moves past it."""
        assert [row.id for row in self.walked(limit, lie=lie)] == self.expected()
        moving = pick(sorted(self.model), number)
        unchanged = [post for post in self.expected() if post != moving]
        returned = [row.id for row in self.walked(limit, lambda: self.add("alice", moving, "moves"), lie)]
        assert [post for post in returned if post != moving] == unchanged

    @rule(limit=st.integers(1, 3), data=st.data())
    def a_client_walks_while_posts_change_and_then_refreshes(self, limit, data):
        """The client takes the token from the first page of its walk. After the refresh it holds exactly the feed."""
        first = self.run(posts.feed(self.db, self.partitions, limit))
        self.token = changes.issue(self.db, first.seen)

        def meanwhile():
            match data.draw(st.sampled_from(["comment", "delete", "publish", "nothing"])):
                case "comment" if self.model:
                    self.add("bob", data.draw(st.sampled_from(sorted(self.model))), "meanwhile")
                case "delete" if self.passing:
                    self.remove_post(data.draw(st.sampled_from(self.passing)))
                case "publish" if len(self.passing) < 2:
                    self.passing.append(self.make_post("bob"))

        meanwhile()
        self.held = {row.id: row for row in self.walked(limit, meanwhile)}
        self.refresh(limit)

    @precondition(lambda self: self.token)
    @rule(limit=st.integers(1, 4))
    def the_client_refreshes(self, limit):
        self.refresh(limit)

    def refresh(self, limit):
        returned = set()
        while True:
            page = self.run(changes.since(self.db, self.partitions, limit, self.token))
            assert len(page.posts) <= limit
            self.token = changes.parse(str(page.token))  # the client gets the token as text and sends it back as text
            for row in page.posts:
                post = row if isinstance(row, str) else row.id
                assert post not in returned, "a refresh returns each post once, however often it changed"
                returned.add(post)
                self.held.pop(post, None)
                if not isinstance(row, str):
                    self.held[post] = row
            if not page.more:
                break
        held = sorted(self.held.values(), key=lambda row: (row.comment_count, row.id), reverse=True)
        assert held == self.walked(5)
        again = self.run(changes.since(self.db, self.partitions, limit, self.token))
        assert (again.posts, again.more) == ([], False)

    # Old comments

    def shown(self):
        """All that readers see of posts and comments."""
        revisions = [self.server.client.zrange(keys.changes(n), 0, -1, withscores=True) for n in range(self.partitions)]
        pages = [self.run(comments.page(self.db, self.segments, post, 3)) for post in sorted(self.model)]
        return revisions, pages, self.walked(5)

    @with_comments
    @rule(number=PICK)
    def seal(self, number):
        """Works on one post until nothing is left to do. Readers see no change."""
        post, _ = self.choose(number, 0)
        before = self.shown()
        for _ in range(MANY):
            more = self.run(sealing.step(self.db, self.segments, post, HOT, QUIET_MS, REACH_MS))
            assert self.shown() == before
            if not more:
                break
        else:
            raise AssertionError("sealing has no end")
        self.walk_all(post, 3)

    @rule()
    def the_worker_works(self):
        self.work()

    def work(self):
        """What the dispatcher does."""
        for partition in range(self.partitions):
            self.run(sealing.find_quiet(self.db, partition, QUIET_MS))
            for due in self.run(sealing.lease(self.db, partition)):
                for _ in range(MANY):
                    if not self.run(sealing.step(self.db, self.segments, due.id, HOT, QUIET_MS, REACH_MS)):
                        break
                self.run(sealing.end(self.db, due))
            self.run(sealing.remove_retired(self.db, self.objects, self.may_name, partition, REACH_MS))

    @rule(number=PICK, deletes=st.booleans(), ms=st.sampled_from([0, 5, 10 * QUIET_MS]))
    def all_posts_become_quiet(self, number, deletes, ms):
        """Then no comment stays in Redis, and no text of a deleted comment in a segment that is named.

        The newest comment of a post may be deleted before. Afterwards the clock may jump, and it gets another one.
        """
        self.end_processes()
        post = pick(sorted(self.model), number)
        if deletes and post:
            for text in ("stays", "is deleted"):
                comment = self.add("alice", post, text)
            self.delete(post, comment)
        revisions = [row[1] for n in range(self.partitions) for row in self.zset(keys.changes(n))]
        self.advance(LEASE_MS + max(QUIET_MS, *[int(one) + QUIET_MS - self.db.clock for one in revisions], 0))
        self.work()
        self.advance(COMPACT_MS + LEASE_MS)
        self.work()
        client = self.server.client
        for one in self.all_posts():
            assert not client.exists(keys.erased(one))
            if one in self.model:
                assert not client.exists(keys.comments(one)) or not client.xlen(keys.comments(one))
        for partition in range(self.partitions):
            assert not client.exists(keys.sealing(partition))
        if post:
            self.advance(-ms if self.jumps else ms)
            self.add("bob", post, "again")

    def zset(self, key):
        return self.server.client.zrange(key, 0, -1, withscores=True)

    @precondition(lambda self: len(self.processes) < WAITING)
    @with_comments
    @rule(number=PICK, kind=KINDS, reply=REPLIES, where=PICK, far=st.booleans())
    def a_process_begins(self, number, kind, reply, where, far):
        self.begin_process(number, kind, reply, where, far)

    @with_comments
    @rule(
        number=PICK,
        kind=KINDS,
        reply=REPLIES,
        where=PICK,
        fresh=st.booleans(),
        events=st.lists(st.tuples(st.sampled_from(EVENTS), PICK, PICK), min_size=1, max_size=3),
    )
    def a_process_is_overtaken(self, number, kind, reply, where, fresh, events):
        """Something happens between its last two calls. With `fresh` the newest comments are in no backup."""
        self.end_processes()
        if not any(map(self.comments_of, self.all_posts())):
            return
        post, _ = self.choose(number, 0)
        if fresh and post in self.model:
            if self.restores:
                self.back_up()
            for _ in range(SMALL_SEGMENT + HOT):
                self.add("bob", post, "fresh")
        self.begin_process(number, kind, reply, where, far=True)
        for event, other, place in events:
            if any(self.model.values()):
                match event:
                    case "delete":
                        self.delete(*self.choose(other, place, also_hidden=False))
                    case "hide":
                        self.hide(*self.choose(other, place))
                    case "add":
                        self.add("alice", pick(sorted(self.model), other), "meanwhile")
                    case "seal":
                        self.seal(other)
                    case "restore" if self.backups:
                        self.restore(-1 if place % 2 else other, place % 4 > 1, True, False)
        self.end_processes()

    def begin_process(self, number, kind, reply, where, far):
        """Begins a process that waits before its first call, or with `far` before the call that decides."""
        post, comment = self.choose(number, where)
        process = Process(self, kind, reply, post=post)
        match kind:
            case "seal":
                work = sealing.step(process, process.segments, post, HOT, QUIET_MS, REACH_MS)
            case "delete":
                user = pick([comment.author, comment.author, "eve"], where // 3)
                process.about |= {"comment": comment, "user": user}
                work = comments.delete(process, process.segments, user, post, comment.id)
            case "hide":
                process.about |= {"comment": comment}
                row = self.run(posts.inspect(self.db, post))
                work = comments.hide(process, process.segments, row, comment.id)
            case "page":
                before = pick(["", comment.id], where)
                process.about |= {"limit": number % 9 + 1, "before": before, "hidden": post in self.hidden}
                work = comments.page(process, process.segments, **process.about)
        process.task = self.loop.create_task(work)
        self.run(process.pause())
        while far and not process.task.done() and process.at not in DECIDING:
            self.run(process.go_on())
        self.processes.append(process)
        self.collect()

    @with_processes
    @rule(number=PICK, times=st.integers(1, 3))
    def a_process_goes_on(self, number, times):
        process = pick(self.processes, number)
        for _ in range(times):
            if not process.task.done():
                self.run(process.go_on())
        self.collect()

    def collect(self):
        """Compares the results of the processes that have ended."""
        for process in [one for one in self.processes if one.task.done()]:
            self.processes.remove(process)
            self.ended(process)

    @with_processes
    @rule(number=PICK)
    def a_process_dies(self, number):
        process = pick(self.processes, number)
        self.processes.remove(process)
        process.task.cancel()
        for gate in process.closed:
            gate.cancel()
        self.run(asyncio.wait([process.task]))

    def end_processes(self):
        for process in [*self.processes]:
            while not process.task.done():
                self.run(process.go_on())
            self.collect()

    def ended(self, process):
        """Compares the result of a process with the model at the time of its last call of Redis."""
        error, about = process.task.exception(), process.about
        post = about.get("post")
        if isinstance(error, Unavailable):
            assert process.outdated, error
        elif isinstance(error, errors.NoPost):
            assert post not in self.model or process.outdated or process.kind != "delete"
        elif isinstance(error, errors.NoComment):
            assert about["comment"] not in self.comments_of(post) or process.outdated
        elif isinstance(error, errors.Forbidden):
            assert about["user"] != about["comment"].author or process.outdated  # a restore may give its id to another
        elif error:
            assert isinstance(error, errors.Unknown) and process.kind == "seal", repr(error)
        elif process.kind == "page":
            assert process.task.result() == process.seen
        elif process.kind == "delete" or (process.kind == "hide" and process.task.result()):
            row = next(row for row in self.comments_of(post) if row.id == about["comment"].id)
            assert row == about["comment"] or process.outdated  # after a restore another one may have the id
            assert about.get("user", row.author) == row.author
            self.comments_of(post).remove(row)
            if process.kind == "hide":
                self.world.kept[post][row.id] = row

    @precondition(lambda self: self.sent)
    @rule(number=PICK)
    def a_script_is_sent_again(self, number):
        self.run(self.repeat(*pick(self.sent, number)))

    async def repeat(self, name, named, args):
        """Nothing happens that did not happen before. After a restore it may happen that did not happen before."""
        try:
            assert await self.db.call(name, named, *args) == 0 or name == "compact_segment"
        except errors.Stale:
            pass

    async def may_name(self, ms):
        return any(self.jumps or one.taken <= ms for one in self.backups)

    @precondition(lambda self: not (self.jumps and self.backups))
    @rule()
    def an_operator_sweeps(self):
        """No process waits for as long as the age below which objects are ignored."""
        self.end_processes()
        self.sent = []
        self.run(sweep.sweep(self.db, self.objects, self.may_name, REACH_MS, remove=True))

    # Restores

    @contextmanager
    def raw(self):
        """A client that does not decode what DUMP returns."""
        client = self.server.client
        if isinstance(client, redis_client.RedisCluster):
            host, port = client.get_primaries()[0].host, client.get_primaries()[0].port
            raw = redis_client.RedisCluster(host, port)
        else:
            raw = redis_client.Redis(unix_socket_path=self.server.socket)
        yield raw
        raw.close()

    @precondition(lambda self: self.restores)
    @rule()
    def a_backup_begins(self):
        self.back_up()

    def back_up(self):
        with self.raw() as client:
            data = {key.encode(): client.dump(key) for key in self.server.client.keys("*")}
        self.backups = [*self.backups[-4:], Backup(self.db.clock, data, deepcopy(self.world), self.named())]

    @precondition(lambda self: self.backups)
    @rule(number=PICK, back=st.booleans(), again=st.booleans(), undone=st.booleans())
    def restore(self, number, back, again, undone):
        """Redis becomes as it was at a backup, and processes go on. With `back` the clock becomes so, too.

        With `again` there are soon as many comments as before, with other texts. They may have the same ids.
        With `undone` Redis becomes later as it was before the restore.
        """
        backup = pick(self.backups, number)
        if undone:
            self.back_up()
            newest = self.backups[-1]
        self.server.client.flushall()
        with self.raw() as client:
            for key, data in backup.data.items():
                client.restore(key, 0, data)
        if back and self.jumps:
            self.db.clock = backup.taken
        self.run(check.fit_restored(self.db, self.objects, range(self.partitions)))
        left, self.world = self.world, deepcopy(backup.world)
        self.held, self.token = {}, None
        for process in self.processes:
            process.outdated = True
        for post in self.model if again else ():
            for _ in range(len(self.model[post]), len(left.model.get(post, ()))):
                self.add("alice", post, "again")
        if undone:
            self.advance(QUIET_MS)
            self.work()
            self.back_up()
            if newest in self.backups:
                self.restore(self.backups.index(newest), False, False, False)

    def named(self) -> dict[str, bytes]:
        """All objects that Redis names, with their bytes."""
        found = {}
        for post in self.all_posts():
            for entry in self.server.client.lrange(keys.segments(post), 0, -1):
                name = keys.segment(post, sealing.Entry.parse(entry).name)
                if not name.endswith(keys.NO_SEGMENT):
                    found[name] = self.run(self.objects.get(name))
        return found

    # What is always true

    @invariant()
    def the_feed_is_the_model(self):
        if not hasattr(self, "db"):
            return
        type(self).steps += 1
        client = self.server.client
        for partition in range(self.partitions):
            assert set(client.zrange(keys.changes(partition), 0, -1)) == set(client.zrange(keys.feed(partition), 0, -1))
            here = [post for post in self.model if keys.partition_of_post(post) == partition]
            counts = {post: len(self.model[post]) for post in here}
            assert dict(client.zrange(keys.feed(partition), 0, -1, withscores=True)) == counts
            here += [post for post in (*self.unready, *self.hidden) if keys.partition_of_post(post) == partition]
            entries = [keys.entry(self.authors[post], post) for post in here]
            leaves = client.zrange(keys.leaves(partition), 0, -1)
            found = [client.zrange(keys.leaf(partition, first), 0, -1) for first in leaves]
            assert sum(found, []) == sorted(entries)
            for first, following, leaf in zip(leaves, (*leaves[1:], "~"), found, strict=False):
                assert len(leaf) <= SMALL_LEAF and all(first <= entry < following for entry in leaf)
        for post, expected in self.model.items():
            row = self.run(posts.read(self.db, post))
            assert row.comment_count == len(expected)
            shown = [f"{c.id} {c.author} {c.text}" for c in expected[: -LATEST_COMMENTS - 1 : -1]]
            assert [" ".join(entry) for entry in row.latest] == shown

    @invariant()
    def redis_and_the_segments_hold_the_comments(self):
        if not hasattr(self, "db"):
            return
        client = self.server.client
        for post in self.all_posts():
            erased, found, count, highest = client.smembers(keys.erased(post)), [], 0, (0, 0)
            for entry in map(sealing.Entry.parse, client.lrange(keys.segments(post), 0, -1)):
                rows = self.rows(post, entry.name) if entry.name != keys.NO_SEGMENT else []
                assert all(highest < keys.order(row.id) <= keys.order(entry.last) for row in rows)
                count, highest = count + len(rows), keys.order(entry.last)
                assert entry.through == count
                found += rows
            assert erased <= {row.id for row in found}
            found = [row for row in found if row.id not in erased]
            for comment, row in client.xrange(keys.comments(post)):
                assert keys.order(comment) > highest
                found.append(comments.Comment(comment, row["author"], row["text"]))
            assert found == self.comments_of(post)
        folder = Path(self.folder.name)
        for backup in self.backups:
            for name, data in backup.segments.items():
                assert (folder / name).read_bytes() == data, "a kept backup names it"

    def rows(self, post, name):
        path = Path(self.folder.name, keys.segment(post, name))
        known = (str(path), path.stat().st_mtime_ns, path.stat().st_ino)
        if known not in self.decoded:
            self.decoded[known] = decode(post, path.read_bytes())
        return self.decoded[known]


def make_small(monkeypatch):
    """Small leaves, pages and segments, so that a few posts and comments reach every case."""
    monkeypatch.setattr(posts, "LEAF_ENTRIES", SMALL_LEAF)
    monkeypatch.setattr(posts, "LOOKED_POSTS", 3)
    monkeypatch.setattr(sealing, "SEGMENT_COMMENTS", SMALL_SEGMENT)
    monkeypatch.setattr(sweep, "DAY", -(10**10))  # seconds: the clock of the model is not that of the machine


def run_model(kind: str, partitions: int, examples: int, steps: int, seed: int, server=None) -> int:
    """Runs the model on a server of its own, or on `server`. Returns the number of steps.

    With the same `seed` it is the same run. It ends at the first failure.
    """
    own = server or start_server(kind)
    Machine = type("Machine", (Feed,), {"server": own, "partitions": partitions, "restores": own.kind != "fake"})
    Machine._hypothesis_internal_use_seed = seed
    try:
        run_state_machine_as_test(
            Machine,
            settings=settings(
                max_examples=examples,
                stateful_step_count=steps,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
                phases=[Phase.generate],  # shrinking takes minutes
            ),
        )
    except BaseException as error:
        error.steps = Machine.steps
        raise
    finally:
        if own is not server:
            own.close()
    return Machine.steps
