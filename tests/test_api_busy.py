"""One user has a bounded number of posts in processing; a request that is sent again is answered all the same."""

import asyncio

import pytest
from conftest import Site, connect
from making import jpeg
from state import unchanged
from wire import FORM, dial, form, head, hear

from storage import check, outbox, posts

MOST = 3


@pytest.fixture
def site(real_server, tmp_path):
    """Nothing makes images here, so what is taken stays in processing."""
    real_server.client.flushall()
    site = Site(real_server.url, tmp_path, processing=MOST)
    site.server = real_server
    site.api()
    yield site
    site.close()


def uploaded(client) -> str:
    data = jpeg(64, 48)
    headers = {"Tus-Resumable": "1.0.0", "Upload-Length": str(len(data))}
    headers["Content-Type"] = "application/offset+octet-stream"
    return client.post("/v1/uploads", headers=headers, content=data).headers["Location"].rpartition("/")[2]


def named(client, upload: str, key: str = ""):
    return client.post("/v1/posts", json={"upload": upload}, headers={"Idempotency-Key": key} if key else {})


def sent(client, key: str = ""):
    headers = {"Idempotency-Key": key} if key else {}
    return client.post("/v1/posts", files={"image": jpeg(64, 48)}, headers=headers)


def busy(answer) -> bool:
    assert (answer.status_code, answer.json()["code"], answer.headers["Retry-After"]) == (429, "busy", "5")
    return True


def work_off(site, count: int) -> None:
    async def work():
        db = connect(site.server)
        for image in await outbox.lease_images(db, 0, count):
            await outbox.publish(db, image.id, "thumbhash")
        await db.close()

    asyncio.run(work())


def test_a_user_who_has_enough_in_processing_is_refused_and_can_post_later(site):
    with site.client("alice") as alice, site.client("bob") as bob:
        first = [uploaded(alice) for _ in range(MOST)]
        made = [named(alice, upload, f"key-{upload}") for upload in first]
        upload = uploaded(alice)
        with unchanged(site.server.client, site.folder):
            assert busy(named(alice, upload)) and busy(named(alice, upload, "a-key")) and busy(sent(alice, "another"))
        assert alice.head(f"/v1/uploads/{upload}", headers={"Tus-Resumable": "1.0.0"}).status_code == 200
        for answer, earlier in zip(made, first, strict=True):
            for again in (named(alice, earlier), named(alice, earlier, f"key-{earlier}")):
                assert (again.status_code, again.json()) == (201, answer.json())
        assert sent(bob).status_code == 201
        work_off(site, 2)
        assert named(alice, upload, "a-key").status_code == 201


def test_a_form_that_was_taken_is_answered_again_when_its_user_has_enough(site):
    with site.client("alice") as alice:
        made = [sent(alice, str(number)) for number in range(MOST)]
        assert busy(sent(alice, "one-more"))
        for number, answer in enumerate(made):
            again = sent(alice, str(number))
            assert (again.status_code, again.json()) == (201, answer.json())
            assert again.headers["Idempotent-Replayed"] == "true"


def test_a_form_is_refused_before_its_body(site):
    with site.client("alice") as alice:
        for _ in range(MOST):
            sent(alice).raise_for_status()
    line = dial(site.port)
    bearer = site.authorization()
    with unchanged(site.server.client, site.folder):
        line.sendall(head("POST", "/v1/posts", bearer, FORM, "Content-Length: 1000000"))
        assert hear(line).status == 429
    line.close()


def test_of_forms_that_arrive_together_no_more_are_taken_than_may_be_processing(site):
    """Each of them began when there was room."""
    body = form(("image", "a.jpg", jpeg(64, 48)))
    bearer = site.authorization()
    lines = [dial(site.port) for _ in range(MOST + 3)]
    for line in lines:
        line.sendall(head("POST", "/v1/posts", bearer, FORM, f"Content-Length: {len(body)}") + body[:-1])
    with site.client("alice") as alice:
        answers = []
        for line in lines:
            line.sendall(body[-1:])
            answers.append(hear(line).status)
            line.close()
        assert sorted(answers) == [201] * MOST + [429] * 3
        assert len(site.server.client.keys("post:*")) == MOST
        assert not site.server.client.exists("uploads:{0}:alice")  # the refused ones left nothing
        assert busy(sent(alice))


async def test_ready_posts_whose_images_are_made_again_do_not_count(site):
    db = connect(site.server)

    def post() -> str:
        with site.client("alice") as alice:
            return named(alice, uploaded(alice)).json()["id"]

    made = []
    for _ in range(4):
        made += [await asyncio.to_thread(post) for _ in range(MOST)]
        for image in await outbox.lease_images(db, 0, 99):
            await outbox.publish(db, image.id, "thumbhash")
    for ready in made:
        assert await check.make_again(db, ready)
    for _ in range(MOST):
        await asyncio.to_thread(post)
    with site.client("alice") as alice:
        assert busy(await asyncio.to_thread(sent, alice))
    assert len((await posts.feed(db, 1, 100)).posts) == len(made)
    await db.close()
