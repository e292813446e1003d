"""Random sequences of storage calls, compared with a plain Python model after each step.

Hypothesis chooses posts, comments, deletions, what an operator hides, walks over pages, and clocks that go back. The
invariants of the feed are checked after each step.
"""

import asyncio
import tempfile
from pathlib import Path

import pytest
from conftest import connect, start_server
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)
from making import NO_SEGMENTS, make_post, make_processing

from storage import changes, check, comments, errors, keys, outbox, posts
from storage.objects import open_store
from storage.settings import LATEST_COMMENTS

USERS = st.sampled_from(["alice", "bob", "{c}:arol"])
SMALL_LEAF = 3  # entries
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)


class Feed(RuleBasedStateMachine):
    """The rules are the calls that a step may make. `model` holds what the feed must be."""

    server = None
    partitions = 1
    created_posts = Bundle("created_posts")
    added_comments = Bundle("added_comments")
    hidden_comments = Bundle("hidden_comments")

    @initialize()
    def begin(self):
        self.loop = asyncio.new_event_loop()
        self.folder = tempfile.TemporaryDirectory()
        self.objects = open_store(Path(self.folder.name).as_uri())
        self.server.client.flushall()
        self.db = connect(self.server)
        self.db.clock = 1_763_971_200_000
        self.model: dict[str, list[comments.Comment]] = {}  # post -> its comments, oldest first
        self.hidden: dict[str, list[comments.Comment]] = {}  # the same of hidden posts, which no list may show
        self.authors: dict[str, str] = {}
        self.passing: list[str] = []  # posts that are in no bundle: only the rules of walks delete them
        self.unready: dict[str, str] = {}  # posts that are processing or failed, with their status
        self.held: dict[str, posts.Post] = {}  # the posts that a client holds, which refreshes by changes
        self.token = None

    def teardown(self):
        if hasattr(self, "loop"):
            self.run(self.db.close())
            self.loop.close()
            self.folder.cleanup()

    def run(self, coroutine):
        return self.loop.run_until_complete(coroutine)

    @rule(ms=st.sampled_from([0, 1, 5, -3]))
    def time_passes(self, ms):
        self.db.clock += ms

    @rule(target=created_posts, author=USERS, caption=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
    def publish(self, author, caption):
        post = self.run(make_post(self.db, author, self.partitions, caption))
        self.model[post], self.authors[post] = [], author
        assert self.run(posts.read(self.db, post)).caption == caption
        return post

    def comments_of(self, post):
        """The comments of a post, hidden or not. None where it was deleted."""
        return self.hidden.get(post, self.model.get(post))

    @rule(post=created_posts)
    def hide_post(self, post):
        if post in self.model:
            assert self.run(posts.hide(self.db, post))
            self.hidden[post] = self.model.pop(post)
        assert not self.run(posts.hide(self.db, post)), "repeating is harmless"

    @rule(post=created_posts)
    def unhide_post(self, post):
        if post in self.hidden:
            assert self.run(posts.unhide(self.db, post))
            self.model[post] = self.hidden.pop(post)
        assert not self.run(posts.unhide(self.db, post))

    @rule(target=hidden_comments, added=consumes(added_comments))
    def hide_comment(self, added):
        post, comment = added
        if self.comments_of(post) is None:
            return multiple()
        row = self.run(posts.inspect(self.db, post))
        assert [self.run(comments.hide(self.db, NO_SEGMENTS, row, comment.id)) for _ in range(2)] == [True, False]
        self.comments_of(post).remove(comment)
        return added

    @rule(target=added_comments, added=consumes(hidden_comments))
    def unhide_comment(self, added):
        """It comes back as the newest comment, once."""
        post, comment = added
        if self.comments_of(post) is None:
            return multiple()
        row = self.run(posts.inspect(self.db, post))
        shown = [self.run(comments.unhide(self.db, NO_SEGMENTS, row, comment.id)) for _ in range(2)]
        assert shown[0] == shown[1]
        comment = comment._replace(id=shown[0])
        self.comments_of(post).append(comment)
        return post, comment

    @rule(author=USERS, ends=st.sampled_from(["processing", "failed"]))
    def create_a_post_that_is_not_ready(self, author, ends):
        post = self.run(make_processing(self.db, author, self.partitions))
        self.unready[post], self.authors[post] = ends, author
        if ends == "failed":
            self.run(outbox.fail(self.db, post, 0, "damaged", "it is damaged"))

    @rule(data=st.data())
    def delete_a_post_that_is_not_ready(self, data):
        if self.unready:
            post = data.draw(st.sampled_from(sorted(self.unready)))
            self.run(posts.delete(self.db, self.objects, self.authors[post], post))
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
                post = self.passing.pop()
                self.run(posts.delete(self.db, self.objects, "bob", post))
                del self.model[post]
                before = [other for other in before if other != post]
                walked = [other for other in walked if other != post]
        assert walked == before

    @rule(post=consumes(created_posts), user=USERS)
    def delete_post(self, post, user):
        if post in self.hidden:
            with pytest.raises(errors.NoPost):
                self.run(posts.delete(self.db, self.objects, self.authors[post], post))
            self.run(posts.delete(self.db, self.objects, self.authors[post], post, hidden=True))
            del self.hidden[post]
            return
        if user != self.authors[post]:
            with pytest.raises(errors.Forbidden):
                self.run(posts.delete(self.db, self.objects, user, post))
            user = self.authors[post]
        self.run(posts.delete(self.db, self.objects, user, post))
        del self.model[post]
        with pytest.raises(errors.NoPost):
            self.run(posts.read(self.db, post))

    @rule(target=added_comments, post=created_posts, author=USERS, text=TEXTS)
    def comment(self, post, author, text):
        if post in self.hidden:
            with pytest.raises(errors.NoPost):
                self.run(comments.add(self.db, author, post, text))
            return multiple()
        comment, repeated = self.run(comments.add(self.db, author, post, text))
        assert not repeated
        self.model[post].append(comment)
        assert self.run(comments.read(self.db, NO_SEGMENTS, post, comment.id)) == comment
        return post, comment

    @rule(added=consumes(added_comments), user=USERS)
    def delete_comment(self, added, user):
        post, comment = added
        if post not in self.model:
            with pytest.raises(errors.NoPost):
                self.run(comments.delete(self.db, NO_SEGMENTS, user, post, comment.id))
            return
        if user != comment.author:
            with pytest.raises(errors.Forbidden):
                self.run(comments.delete(self.db, NO_SEGMENTS, user, post, comment.id))
        self.run(comments.delete(self.db, NO_SEGMENTS, comment.author, post, comment.id))
        self.model[post].remove(comment)
        with pytest.raises(errors.NoComment):
            self.run(comments.read(self.db, NO_SEGMENTS, post, comment.id))

    @rule(limit=st.integers(1, 4), post=created_posts)
    def walk_comments(self, limit, post):
        walked, before = [], ""
        hidden = post in self.hidden
        while True:
            page = self.run(comments.page(self.db, NO_SEGMENTS, post, limit, before, hidden))
            walked += page.comments
            if not page.more:
                break
            before = page.comments[-1].id
        assert walked == self.comments_of(post)[::-1]

    def expected(self) -> list[str]:
        """The posts in the order of the feed, by the model."""
        return sorted(self.model, key=lambda post: (len(self.model[post]), post), reverse=True)

    @rule(limit=st.integers(1, 5))
    def walk(self, limit):
        assert [row.id for row in self.walked(limit)] == self.expected()

    def walked(self, limit, meanwhile=lambda: None):
        """The rows of all pages of the feed. `meanwhile` runs between two pages."""
        rows, after = [], None
        while True:
            page = self.run(posts.feed(self.db, self.partitions, limit, after))
            rows += page.posts
            if not page.more:
                return rows
            after = posts.FeedCursor(page.posts[-1].comment_count, page.posts[-1].id)
            meanwhile()

    @rule(limit=st.integers(1, 3), data=st.data())
    def walk_while_posts_change(self, limit, data):
        """A walk returns each post that does not change exactly once, even if another post moves past it."""
        if not self.model:
            return
        moving = data.draw(st.sampled_from(sorted(self.model)))
        unchanged = [post for post in self.expected() if post != moving]

        def meanwhile():
            comment, _ = self.run(comments.add(self.db, "alice", moving, "moves"))
            self.model[moving].append(comment)

        returned = [row.id for row in self.walked(limit, meanwhile)]
        assert [post for post in returned if post != moving] == unchanged

    @rule(limit=st.integers(1, 3), data=st.data())
    def a_client_walks_while_posts_change_and_then_refreshes(self, limit, data):
        """The client takes the token from the first page of its walk. After the refresh it holds exactly the feed."""
        first = self.run(posts.feed(self.db, self.partitions, limit))
        self.token = changes.issue(self.db, first.seen)

        def meanwhile():
            match data.draw(st.sampled_from(["comment", "delete", "publish", "nothing"])):
                case "comment" if self.model:
                    post = data.draw(st.sampled_from(sorted(self.model)))
                    self.model[post].append(self.run(comments.add(self.db, "bob", post, "meanwhile"))[0])
                case "delete" if self.passing:
                    post = data.draw(st.sampled_from(self.passing))
                    self.run(posts.delete(self.db, self.objects, "bob", post))
                    self.passing.remove(post)
                    del self.model[post]
                case "publish":
                    post = self.run(make_post(self.db, "bob", self.partitions))
                    self.model[post], self.authors[post] = [], "bob"
                    self.passing.append(post)

        meanwhile()
        self.held = {row.id: row for row in self.walked(limit, meanwhile)}
        self.refresh(limit)

    @rule(limit=st.integers(1, 4))
    def the_client_refreshes(self, limit):
        if self.token:
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

    @invariant()
    def the_feed_is_the_model(self):
        if not hasattr(self, "db"):
            return
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
            assert client.xlen(keys.comments(post)) == len(expected)
            row = self.run(posts.read(self.db, post))
            shown = [f"{c.id} {c.author} {c.text}" for c in expected[: -LATEST_COMMENTS - 1 : -1]]
            assert [" ".join(entry) for entry in row.latest] == shown
        for post in self.hidden:
            with pytest.raises(errors.NoPost):
                self.run(posts.read(self.db, post))
            judged = self.run(check._call_check_post(self.db, post, repair=False))
            assert judged == ("hidden ready", self.authors[post], len(self.hidden[post]), False, [])


@pytest.mark.parametrize("partitions", [1, 3])
@pytest.mark.parametrize("kind", ["fake", "valkey"])
def test_the_feed_and_the_lists_of_users_always_equal_a_plain_model(kind, partitions, monkeypatch):
    """The lists are cut into small leaves, and a call looks at few posts, so that a few posts reach every case."""
    monkeypatch.setattr(posts, "LEAF_ENTRIES", SMALL_LEAF)
    monkeypatch.setattr(posts, "LOOKED_POSTS", 3)
    server = start_server(kind)
    try:
        Machine = type("Machine", (Feed,), {"server": server, "partitions": partitions})
        run_state_machine_as_test(
            Machine,
            settings=settings(
                max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
            ),
        )
    finally:
        server.close()
