"""What an operator hides is gone for everybody, comes back whole, and is consistent meanwhile."""

import json
import subprocess
import sys

import pytest
from conftest import NOBODY, running_site, until
from making import NO_SEGMENTS, jpeg, make_post, make_processing, publish, seal
from state import contents, unchanged

from storage import __main__ as main
from storage import changes, check, comments, errors, keys, moderation, outbox, posts, sealing
from storage.segments import Segments
from storage.settings import DAY_MS, LEASE_MS

NOW = 1_763_971_200_000  # ms since 1970
REACH = 3 * DAY_MS


async def never(moment: int) -> bool:
    """No backup names anything."""
    return False


@pytest.fixture(params=[1, 3])
def partitions(request):
    return request.param


async def erase_due(db, store, post: str) -> None:
    """Does what is due with a post, as the dispatcher does."""
    for entry in await outbox.lease(db, keys.partition_of_post(post)):
        if entry.kind == "erase":
            await outbox.erase(db, store, never, entry, REACH)


async def images_to_make(db, post: str) -> list[str]:
    return [image.id for image in await outbox.lease_images(db, keys.partition_of_post(post), 10)]


# Posts


async def test_a_hidden_post_is_gone_for_everybody_and_nothing_of_it_is_lost(server, db, store, partitions):
    db.clock = NOW
    other, post = [await publish(db, store, "alice", count, partitions) for count in (1, 3)]
    feed = await posts.feed(db, partitions, 10)
    token = changes.issue(db, feed.seen)
    read, page = await posts.read(db, post), await comments.page(db, NO_SEGMENTS, post, 10)
    assert await moderation.hide(db, store, NO_SEGMENTS, post) == "the post is hidden"
    with unchanged(server.client):
        assert await moderation.hide(db, store, NO_SEGMENTS, post) == "the post was hidden before"
    for work in (
        posts.read(db, post),
        comments.page(db, NO_SEGMENTS, post, 10),
        comments.read(db, NO_SEGMENTS, post, page.comments[0].id),
        comments.add(db, "bob", post, "more"),
        comments.delete(db, NO_SEGMENTS, "bob", post, page.comments[0].id),
        posts.delete(db, store, "alice", post),
    ):
        with unchanged(server.client), pytest.raises(errors.NoPost):
            await work
    assert not await posts.has_image(store, post)
    assert [row.id for row in (await posts.feed(db, partitions, 10)).posts] == [other]
    assert (await changes.since(db, partitions, 10, token)).posts == [post]
    assert (await check.check(db, store)).lines == []
    assert await moderation.unhide(db, NO_SEGMENTS, post) == "the post is shown again; a worker makes its picture"
    with unchanged(server.client):
        assert await moderation.unhide(db, NO_SEGMENTS, post) == "the post was not hidden"
    assert (await posts.feed(db, partitions, 10)).posts == feed.posts
    assert (await posts.read(db, post), await comments.page(db, NO_SEGMENTS, post, 10)) == (read, page)
    assert (await changes.since(db, partitions, 10, token)).posts == [read]
    await erase_due(db, store, post)
    assert await images_to_make(db, post) == [post]


@pytest.mark.parametrize("code", [None, "damaged"])
async def test_a_post_without_a_picture_is_hidden_and_comes_back_in_its_status(server, db, store, code):
    db.clock = NOW
    post = await make_processing(db, "alice")
    if code:
        await outbox.fail(db, post, 0, code, "it is damaged")
    token = changes.issue(db, (await posts.feed(db, 1, 1)).seen)
    read = await posts.read(db, post)
    await moderation.hide(db, store, NO_SEGMENTS, post)
    with pytest.raises(errors.NoPost):
        await posts.read(db, post)
    with pytest.raises(errors.NoPost):
        await outbox.publish(db, post, "thumbhash")
    assert await images_to_make(db, post) == []
    assert (await check.check(db, store)).lines == []
    await moderation.unhide(db, NO_SEGMENTS, post)
    assert (await posts.read(db, post)) == read
    await erase_due(db, store, post)
    assert await images_to_make(db, post) == ([] if code else [post])
    assert (await changes.since(db, 1, 10, token)).posts == []


async def test_the_picture_of_a_hidden_post_is_erased_until_no_job_can_store_it_and_the_original_stays(db, store):
    db.clock = NOW
    post = await publish(db, store, "alice")
    await posts.hide(db, post)
    await erase_due(db, store, post)
    for _ in range(8):
        await posts.put_image(store, post, jpeg())  # by a job that was late
        assert "3 it is hidden and its JPEG is stored" in str((await check.check(db, store)).lines)
        db.clock += outbox.ERASE_EVERY_MS
        await erase_due(db, store, post)
        if (await posts.inspect(db, post)).due is None:
            break
        assert not await posts.has_image(store, post)
    assert outbox.JOB_MS <= db.clock - NOW <= outbox.JOB_MS + outbox.ERASE_EVERY_MS
    assert (await check.check(db, store)).lines == []
    db.clock += 100 * DAY_MS
    deleted = await make_post(db, "bob")
    await posts.delete(db, store, "bob", deleted)  # `gone` forgets old deletions now
    await posts.hide(db, post)
    await erase_due(db, store, post)
    assert (await check.check(db, store)).lines == [], "its original is stored"
    partition = keys.partition_of_post(post)
    lists = [keys.gone(partition), keys.due(partition), keys.segments(post), keys.retired(partition)]
    owned = await db.call("is_owned", [keys.post(post), keys.hidden(post), *lists], post)
    assert owned == [1, None], "a sweep does not take its original"


async def test_a_post_that_is_unhidden_while_its_picture_is_being_erased_gets_it_again(server, db, store):
    db.clock = NOW
    post = await publish(db, store, "alice")
    await posts.hide(db, post)
    leased = [entry for entry in await outbox.lease(db, 0) if entry.id == post]
    await posts.unhide(db, post)
    await outbox.erase(db, store, never, leased[0], REACH)
    assert await posts.has_image(store, post), "the lease is an old one"
    await posts.hide(db, post)

    class Slow:
        """A store in which a deletion lasts until the post is shown again and its picture is made."""

        async def delete(self, names):
            await posts.unhide(db, post)
            await outbox.lease(db, 0)
            assert await images_to_make(db, post) == [post]
            await outbox.publish(db, post, "thumbhash")
            await store.delete(names)

    db.clock += LEASE_MS
    leased = [entry for entry in await outbox.lease(db, 0) if entry.id == post]
    await outbox.erase(db, Slow(), never, leased[0], REACH)
    assert await images_to_make(db, post) == [post]
    await outbox.publish(db, post, "thumbhash")
    assert await moderation.hide(db, Slow(), NO_SEGMENTS, post) == "the post is hidden"
    assert await images_to_make(db, post) == [post]


async def test_an_operator_deletes_a_post_in_any_status(server, db, store, partitions):
    """As its author would: the JPEG is erased at once, the original later, and those who follow the changes hear it."""
    shown, hidden = [await publish(db, store, "alice", 2, partitions) for _ in range(2)]
    processing, failed = [await make_processing(db, "bob", partitions) for _ in range(2)]
    await outbox.fail(db, failed, 0, "damaged", "it is damaged")
    comment = (await comments.page(db, NO_SEGMENTS, hidden, 1)).comments[0]
    await moderation.hide(db, store, NO_SEGMENTS, hidden, comment.id)
    await moderation.hide(db, store, NO_SEGMENTS, hidden)
    for post in (shown, hidden, processing, failed):
        await moderation.delete(db, store, NO_SEGMENTS, post, "", REACH)
        for key in (keys.post, keys.hidden, keys.comments, keys.latest, keys.kept):
            assert not server.client.exists(key(post))
        partition = keys.partition_of_post(post)
        assert server.client.zscore(keys.gone(partition), post)
        assert server.client.zscore(keys.due(partition), post)
        with unchanged(server.client), pytest.raises(errors.NoPost):
            await moderation.delete(db, store, NO_SEGMENTS, post, "", REACH)
    assert (await check.check(db, store)).posts == 0


async def test_check_repairs_what_shows_a_hidden_post_and_it_stays_hidden(server, db, store):
    post = await publish(db, store, "alice", 3)
    await moderation.hide(db, store, NO_SEGMENTS, post)
    before = contents(server.client)
    for key in (keys.feed(0), keys.changes(0), keys.making(0, "alice")):
        server.client.zadd(key, {post: 1})
    server.client.lpop(keys.latest(post))
    await posts.put_image(store, post, jpeg())
    report = await check.check(db, store, repair=True)
    assert sorted(line.partition(": ")[2] for line in report.lines) == [
        "0 it is among the changes and hidden (repaired)",
        "0 its image is to be made and it is hidden (repaired)",
        "1 it is in the feed and hidden (repaired)",
        "2 its latest comments are not its newest ones (repaired)",
        "3 it is hidden and its JPEG is stored (repaired)",
    ]
    assert contents(server.client) == before
    await store.delete([keys.original(post)])
    assert (await check.check(db, store)).lines == [f"{post}: 3 its original is missing"]


async def test_a_restored_hidden_post_loses_the_picture_that_it_got_in_the_timeline_that_is_left(server, db, store):
    db.clock = NOW
    post = await publish(db, store, "alice")
    await posts.hide(db, post)
    server.client.zrem(keys.due(0), post)
    await check.fit_restored(db, store, range(1))
    assert await posts.has_image(store, post), "a restore writes nothing into the store"
    await erase_due(db, store, post)
    assert not await posts.has_image(store, post)


# Comments


async def test_a_hidden_comment_is_gone_and_comes_back_as_the_newest(server, db, store, partitions):
    post = await publish(db, store, "alice", 4, partitions)
    oldest, *_, newest = (await comments.page(db, NO_SEGMENTS, post, 10)).comments[::-1]
    token = changes.issue(db, (await posts.feed(db, partitions, 1)).seen)
    for comment in (newest, oldest):
        assert await moderation.hide(db, store, NO_SEGMENTS, post, comment.id) == "the comment is hidden"
        with unchanged(server.client):
            assert await moderation.hide(db, store, NO_SEGMENTS, post, comment.id) == "the comment was hidden before"
        with unchanged(server.client), pytest.raises(errors.NoComment):
            await comments.read(db, NO_SEGMENTS, post, comment.id)
        with unchanged(server.client), pytest.raises(errors.NoComment):
            await comments.delete(db, NO_SEGMENTS, comment.author, post, comment.id)
    row = await posts.read(db, post)
    page = (await comments.page(db, NO_SEGMENTS, post, 10)).comments
    assert row.comment_count == len(page) == 2 and row.latest == tuple(page)
    assert (await changes.since(db, partitions, 10, token)).posts == [row]
    assert (await check.check(db, store)).lines == []
    for comment in (oldest, newest):
        shown = await moderation.unhide(db, NO_SEGMENTS, post, comment.id)
        with unchanged(server.client):
            assert await moderation.unhide(db, NO_SEGMENTS, post, comment.id) == shown
        new = shown.rpartition("/")[2]
        assert (await posts.read(db, post)).latest[0] == (new, comment.author, comment.text)
        assert (await comments.read(db, NO_SEGMENTS, post, new)).text == comment.text
        with unchanged(server.client), pytest.raises(errors.NoComment, match=f"shown again as {new}"):
            await moderation.hide(db, store, NO_SEGMENTS, post, comment.id)
    assert (await posts.read(db, post)).comment_count == 4
    assert (await check.check(db, store)).lines == []


async def test_comments_of_a_hidden_post_are_hidden_shown_and_deleted_without_showing_the_post(server, db, store):
    post = await publish(db, store, "alice", 3)
    first, second, third = (await comments.page(db, NO_SEGMENTS, post, 10)).comments[::-1]
    await moderation.hide(db, store, NO_SEGMENTS, post)
    await moderation.hide(db, store, NO_SEGMENTS, post, first.id)
    await moderation.hide(db, store, NO_SEGMENTS, post, third.id)
    await moderation.unhide(db, NO_SEGMENTS, post, first.id)
    await moderation.delete(db, store, NO_SEGMENTS, post, second.id, REACH)
    await moderation.delete(db, store, NO_SEGMENTS, post, third.id, REACH)
    assert not server.client.exists(keys.feed(0), keys.changes(0))
    assert (await check.check(db, store)).lines == []
    await moderation.unhide(db, NO_SEGMENTS, post)
    row = await posts.read(db, post)
    assert (row.comment_count, [text for _, _, text in row.latest]) == (1, [first.text])
    for comment in (second, third):
        with unchanged(server.client), pytest.raises(errors.NoComment):
            await moderation.delete(db, store, NO_SEGMENTS, post, comment.id, REACH)


async def test_an_operator_sees_where_the_comments_of_a_post_are(server, db, store, monkeypatch):
    monkeypatch.setattr(sealing, "SEGMENT_COMMENTS", 2)
    segments, post = Segments(store), await publish(db, store, "alice", 45)
    oldest, older = (await comments.page(db, segments, post, 50)).comments[:-3:-1]
    await seal(db, store, post, hot=1)
    hot = (await comments.page(db, segments, post, 1)).comments[0]
    await comments.delete(db, segments, "bob", post, oldest.id)
    known = await moderation.show(db, store, segments, post)
    counts = {"comment_count": 44, "comments_in_redis": 1, "comments_in_store": 43, "erased_comments": 1}
    assert known.items() >= {**counts, "segments": 22}.items()
    newest = [entry.split(" ")[2] for entry in server.client.lrange(keys.segments(post), -20, -1)[::-1]]
    assert known["newest_segments"] == [{"comments": 2, "object": keys.segment(post, name)} for name in newest]
    assert {keys.segments(post), keys.erased(post)} < set(known["keys"])
    assert f"\nnewest_segments         2 {keys.segment(post, newest[-1])}\n" in moderation.render(known)
    first = sealing.Entry.parse(server.client.lindex(keys.segments(post), 0)).name
    shown = await moderation.show(db, store, segments, post, older.id)
    assert shown["object"] == keys.segment(post, first) and shown["keys"] == [keys.segments(post)]
    assert (await moderation.show(db, store, segments, post, hot.id))["object"] is None
    await moderation.hide(db, store, segments, post, older.id)
    assert (await moderation.show(db, store, segments, post, older.id))["object"] is None
    await seal(db, store, post)
    assert (await moderation.show(db, store, segments, post))["newest_segments"][-1]["comments"] == 2


async def test_a_clock_that_went_back_does_not_keep_a_comment_hidden(db, store):
    db.clock = NOW
    post = await publish(db, store, "alice", 2)
    newest, oldest = (await comments.page(db, NO_SEGMENTS, post, 10)).comments
    await moderation.hide(db, store, NO_SEGMENTS, post, oldest.id)
    db.clock = NOW - 5000
    shown = (await moderation.unhide(db, NO_SEGMENTS, post, oldest.id)).rpartition("/")[2]
    assert [row.id for row in (await comments.page(db, NO_SEGMENTS, post, 10)).comments] == [shown, newest.id]


# Commands


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs a command of `imagegram-storage` in this process: starting one takes longer than the command."""

    def run(site, *words: str, **variables: str) -> subprocess.CompletedProcess:
        for name, value in {**site.environment, **variables}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["imagegram-storage", *words])
        ended = ""
        try:
            main.run()
        except SystemExit as error:
            ended = str(error)
        return subprocess.CompletedProcess(words, int(bool(ended)), capsys.readouterr().out, ended)

    return run


def test_the_api_shows_nothing_of_a_hidden_post_and_all_of_it_afterwards(embedded, tmp_path, command):
    """The commands as they are typed, on a site that runs."""
    embedded.client.flushall()
    with running_site(embedded, tmp_path) as site:
        site.worker()
        follow_a_hidden_post(site, command)


def follow_a_hidden_post(site, command):
    with site.client("alice") as alice:
        post = alice.post("/v1/posts", files={"image": jpeg()}, data={"caption": "Hi\u202e!"}).json()["id"]
        until(lambda: alice.get(f"/v1/posts/{post}").json()["status"] == "ready", what="the picture")
        comment = alice.post(f"/v1/posts/{post}/comments", json={"text": "First!"}).json()["id"]
        followed = alice.get("/v1/changes").json()["next"]
        paths = [f"/v1/posts/{post}", f"/v1/posts/{post}/comments", f"/v1/posts/{post}/comments/{comment}"]
        paths.append(f"/v1/images/{post}.jpg")
        before = [alice.get(path).json() for path in paths[:3]]
        done = command(site, "hide", post)
        assert (done.returncode, done.stdout, done.stderr) == (0, "the post is hidden\n", "")
        answers = [alice.get(path) for path in paths] + [alice.delete(path) for path in (paths[0], paths[2])]
        answers.append(alice.post(paths[1], json={"text": "more"}))
        assert {(answer.status_code, answer.json()["code"]) for answer in answers} == {(404, "nopost")}
        assert alice.get("/v1/posts").json()["items"] == []
        assert alice.get(f"/v1/changes?since={followed}").json()["items"] == [{"id": post, "deleted": True}]
        known = json.loads(command(site, "show", post, "--json").stdout)
        assert (known["status"], known["author"], known["comment_count"]) == ("ready", "alice", 1)
        assert known["hidden_at"] and known["image"]["bytes"] is None
        assert known["original"] == {"object": f"originals/{post}", "bytes": len(jpeg())}
        lines = command(site, "show", f"{post}").stdout
        assert "Hi\\u202e!" in lines and f"hidden:{{0}}:{post}" in lines
        assert "First!" in command(site, "show", f"{post}/{comment}").stdout
        assert command(site, "unhide", post).stdout == "the post is shown again; a worker makes its picture\n"
        assert [alice.get(path).json() for path in paths[:3]] == before
        until(lambda: alice.get(paths[3]).status_code == 200, what="the picture")
        assert command(site, "hide", f"{post}/{comment}").stdout == "the comment is hidden\n"
        assert alice.get(paths[0]).json()["comment_count"] == 0
        assert command(site, "delete", post).returncode == 0
        assert alice.get(paths[0]).status_code == 404


@pytest.mark.parametrize(
    "words", [["show", NOBODY], ["hide", NOBODY], ["unhide", f"{NOBODY}/1-0"], ["delete", "x"], ["hide", f"{NOBODY}/"]]
)
def test_a_command_for_what_does_not_exist_ends_with_one_line(embedded, serving, command, words):
    with unchanged(embedded.client):
        done = command(serving, *words)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr in ("nopost: no such post", "nocomment: no such comment")


def test_a_command_says_that_redis_is_away(serving, command, tmp_path):
    done = command(serving, "hide", NOBODY, IMAGEGRAM_REDIS_URL=f"unix://{tmp_path}/none")
    assert done.returncode == 1 and done.stderr.startswith("unreachable: Redis cannot be reached")
