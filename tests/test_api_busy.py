"""A user may have only so many posts in processing. A repeated request is answered even when there are that many."""

import asyncio

import pytest
from conftest import connect, run_with_db, running_site
from making import jpeg
from state import unchanged
from wire import FORM, dial, form, head, hear

from storage import check, outbox, posts

MOST = 3


@pytest.fixture
def site(real_server, tmp_path):
    """A site without a worker, so that posts stay in processing."""
    real_server.client.flushall()
    with running_site(real_server, tmp_path, processing=MOST) as site:
        yield site


def create_upload(client) -> str:
    """Creates an upload with all of its bytes. Returns its id."""
    data = jpeg(64, 48)
    headers = {"Tus-Resumable": "1.0.0", "Upload-Length": str(len(data))}
    headers["Content-Type"] = "application/offset+octet-stream"
    return client.post("/v1/uploads", headers=headers, content=data).headers["Location"].rpartition("/")[2]


def post_upload(client, upload: str, key: str = ""):
    """Creates a post from an upload."""
    return client.post("/v1/posts", json={"upload": upload}, headers={"Idempotency-Key": key} if key else {})


def post_form(client, key: str = ""):
    """Creates a post by a form."""
    headers = {"Idempotency-Key": key} if key else {}
    return client.post("/v1/posts", files={"image": jpeg(64, 48)}, headers=headers)


def assert_busy(answer) -> None:
    assert (answer.status_code, answer.json()["code"], answer.headers["Retry-After"]) == (429, "busy", "5")


def process(site, count: int) -> None:
    """Makes `count` posts ready, as a worker would."""

    async def work(db):
        for image in await outbox.lease_images(db, 0, count):
            await outbox.publish(db, image.id, "thumbhash")

    run_with_db(site.server, work)


def test_a_user_with_too_many_posts_in_processing_is_refused_and_can_post_later(site):
    with site.client("alice") as alice, site.client("bob") as bob:
        first = [create_upload(alice) for _ in range(MOST)]
        answers = [post_upload(alice, one, f"key-{one}") for one in first]
        another = create_upload(alice)
        with unchanged(site.server.client, site.folder):
            assert_busy(post_upload(alice, another))
            assert_busy(post_upload(alice, another, "a-key"))
            assert_busy(post_form(alice, "another"))
        for answer, one in zip(answers, first, strict=True):
            for again in (post_upload(alice, one), post_upload(alice, one, f"key-{one}")):
                assert (again.status_code, again.json()) == (201, answer.json())
        assert post_form(bob).status_code == 201
        process(site, 2)
        assert post_upload(alice, another, "a-key").status_code == 201


def test_a_form_that_was_accepted_is_answered_again_when_its_user_has_too_many_posts_in_processing(site):
    with site.client("alice") as alice:
        answers = [post_form(alice, str(number)) for number in range(MOST)]
        assert_busy(post_form(alice, "one-more"))
        for number, answer in enumerate(answers):
            again = post_form(alice, str(number))
            assert (again.status_code, again.json()) == (201, answer.json())
            assert again.headers["Idempotent-Replayed"] == "true"


def test_a_form_is_refused_before_its_body_is_read(site):
    with site.client("alice") as alice:
        for _ in range(MOST):
            post_form(alice).raise_for_status()
    with unchanged(site.server.client, site.folder), dial(site.port) as line:
        line.sendall(head("POST", "/v1/posts", site.authorization(), FORM, "Content-Length: 1000000"))
        assert hear(line).status == 429


def test_of_forms_that_arrive_together_no_more_are_accepted_than_may_be_in_processing(site):
    """When each of them began, its user had no post in processing."""
    body = form(("image", "a.jpg", jpeg(64, 48)))
    lines = [dial(site.port) for _ in range(MOST + 3)]
    for line in lines:
        line.sendall(head("POST", "/v1/posts", site.authorization(), FORM, f"Content-Length: {len(body)}") + body[:-1])
    with site.client("alice") as alice:
        answers = []
        for line in lines:
            line.sendall(body[-1:])
            answers.append(hear(line).status)
            line.close()
        assert sorted(answers) == [201] * MOST + [429] * 3
        assert len(site.server.client.keys("post:*")) == MOST
        assert not site.server.client.exists("uploads:{0}:alice"), "the refused forms left nothing"
        assert_busy(post_form(alice))


async def test_a_ready_post_whose_image_is_made_again_does_not_count_as_in_processing(site):
    db = connect(site.server)

    def post() -> str:
        with site.client("alice") as alice:
            return post_upload(alice, create_upload(alice)).json()["id"]

    posted = []
    for _ in range(4):
        posted += [await asyncio.to_thread(post) for _ in range(MOST)]
        for image in await outbox.lease_images(db, 0, 99):
            await outbox.publish(db, image.id, "thumbhash")
    for ready in posted:
        assert await check.make_again(db, ready)
    for _ in range(MOST):
        await asyncio.to_thread(post)
    with site.client("alice") as alice:
        assert_busy(await asyncio.to_thread(post_form, alice))
    assert len((await posts.feed(db, 1, 100)).posts) == len(posted)
    await db.close()
