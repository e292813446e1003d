"""Posts, comments, deletes and page walks against a plain Python model; the invariants hold after each step."""

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
    rule,
    run_state_machine_as_test,
)
from making import make_post

from storage import changes, comments, errors, keys, posts
from storage.objects import open_store
from storage.settings import LATEST_COMMENTS

USERS = st.sampled_from(["alice", "bob", "{c}:arol"])
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)


class Feed(RuleBasedStateMachine):
    server = None
    partitions = 1
    made = Bundle("made")
    said = Bundle("said")

    @initialize()
    def begin(self):
        self.loop = asyncio.new_event_loop()
        self.folder = tempfile.TemporaryDirectory()
        self.objects = open_store(Path(self.folder.name).as_uri())
        self.server.client.flushall()
        self.db = connect(self.server)
        self.db.clock = 1_763_971_200_000
        self.model: dict[str, list[comments.Comment]] = {}  # post -> its comments, oldest first
        self.authors: dict[str, str] = {}
        self.passing: list[str] = []  # posts that no bundle knows: only walks delete them
        self.held: dict[str, posts.Post] = {}  # what a client holds that refreshes by changes
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

    @rule(target=made, author=USERS, caption=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
    def publish(self, author, caption):
        post = self.run(make_post(self.db, author, self.partitions, caption))
        self.model[post], self.authors[post] = [], author
        assert self.run(posts.read(self.db, post)).caption == caption
        return post

    @rule(post=consumes(made), user=USERS)
    def delete_post(self, post, user):
        if user != self.authors[post]:
            with pytest.raises(errors.Forbidden):
                self.run(posts.delete(self.db, self.objects, user, post))
            user = self.authors[post]
        self.run(posts.delete(self.db, self.objects, user, post))
        del self.model[post]
        with pytest.raises(errors.NoPost):
            self.run(posts.read(self.db, post))

    @rule(target=said, post=made, author=USERS, text=TEXTS)
    def comment(self, post, author, text):
        comment, repeated = self.run(comments.add(self.db, author, post, text))
        assert not repeated
        self.model[post].append(comment)
        assert self.run(comments.read(self.db, post, comment.id)) == comment
        return post, comment

    @rule(said=consumes(said), user=USERS)
    def delete_comment(self, said, user):
        post, comment = said
        if post not in self.model:
            with pytest.raises(errors.NoPost):
                self.run(comments.delete(self.db, user, post, comment.id))
            return
        if user != comment.author:
            with pytest.raises(errors.Forbidden):
                self.run(comments.delete(self.db, user, post, comment.id))
        self.run(comments.delete(self.db, comment.author, post, comment.id))
        self.model[post].remove(comment)
        with pytest.raises(errors.NoComment):
            self.run(comments.read(self.db, post, comment.id))

    @rule(limit=st.integers(1, 4), post=made)
    def walk_comments(self, limit, post):
        found, before = [], ""
        while True:
            page = self.run(comments.page(self.db, post, limit, before))
            found += page.comments
            if not page.more:
                break
            before = page.comments[-1].id
        assert found == self.model[post][::-1]

    def expected(self) -> list[str]:
        return sorted(self.model, key=lambda post: (len(self.model[post]), post), reverse=True)

    @rule(limit=st.integers(1, 5))
    def walk(self, limit):
        assert [row.id for row in self.walked(limit)] == self.expected()

    def walked(self, limit, meanwhile=lambda: None):
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
        """Every post that did not change is returned exactly once, wherever the others went."""
        if not self.model:
            return
        moving = data.draw(st.sampled_from(sorted(self.model)))
        still = [post for post in self.expected() if post != moving]

        def meanwhile():
            comment, _ = self.run(comments.add(self.db, "alice", moving, "moves"))
            self.model[moving].append(comment)

        found = [row.id for row in self.walked(limit, meanwhile)]
        assert [post for post in found if post != moving] == still

    @rule(limit=st.integers(1, 3), data=st.data())
    def a_client_walks_while_posts_change_and_then_refreshes(self, limit, data):
        """Its token is that of its walk's first page. What it holds then is the feed, exactly."""
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
        told = set()
        while True:
            found = self.run(changes.since(self.db, self.partitions, limit, self.token))
            assert len(found.posts) <= limit
            # A token is text on its way to the client and back.
            self.token = changes.parse(str(found.token))
            for row in found.posts:
                post = row if isinstance(row, str) else row.id
                assert post not in told, "each post is told once, however often it changed"
                told.add(post)
                self.held.pop(post, None)
                if not isinstance(row, str):
                    self.held[post] = row
            if not found.more:
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
            here = {post: len(said) for post, said in self.model.items() if keys.partition_of_post(post) == partition}
            assert dict(client.zrange(keys.feed(partition), 0, -1, withscores=True)) == here
        for post, said in self.model.items():
            assert client.xlen(keys.comments(post)) == len(said)
            row = self.run(posts.read(self.db, post))
            shown = [f"{c.id} {c.author} {c.text}" for c in said[: -LATEST_COMMENTS - 1 : -1]]
            assert [" ".join(entry) for entry in row.latest] == shown


@pytest.mark.parametrize("partitions", [1, 3])
@pytest.mark.parametrize("kind", ["fake", "valkey"])
def test_the_feed_is_what_a_plain_model_says(kind, partitions):
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
