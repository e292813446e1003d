"""The outbox is the truth: whatever becomes of the queue and of the workers, every post ends."""

from conftest import photograph, publish, turned, until
from making import png

from workers import dispatcher


def test_an_image_that_is_being_made_is_not_there_yet(site):
    with site.client("alice") as client:
        post = publish(client, photograph())
        for ask in (client.get, client.head):
            missing = ask(f"/v1/images/{post['id']}.jpg")
            assert (missing.status_code, missing.headers["Retry-After"]) == (404, "1")
            assert missing.headers["Content-Type"] == "application/problem+json"
            assert "immutable" not in missing.headers.get("Cache-Control", "")
        assert client.get("/v1/posts").json()["items"] == []
        site.worker()
        turned(client, post)
        assert client.get(f"/v1/images/{post['id']}.jpg").status_code == 200


def test_a_queue_that_is_lost_again_and_again_changes_nothing(site, real_server):
    """Every key of RQ is deleted while images are made. Leases end early here, so that nobody waits a minute."""
    client = real_server.client
    with site.client("alice") as alice:
        posts = [publish(alice, png(40 + n, 40)) for n in range(6)]
        worker = site.worker()
        deleted = 0
        until(lambda: client.exists("rq:workers"), what="the worker")
        for _ in range(8):
            deleted += client.delete("rq:workers", "rq:workers:images", *client.keys("rq:*"))
            client.zadd("making:{0}:alice", dict.fromkeys((post["id"] for post in posts), 0), xx=True)
            client.zadd("turns:{0}", {"alice": 0}, xx=True)
            until(
                lambda: client.keys("rq:*") or not client.exists("making:{0}:alice"),
                what="the next hint",
            )
        for post in posts:
            turned(alice, post)
        assert deleted > 0 and worker.poll() is None
        assert {item["id"] for item in alice.get("/v1/posts").json()["items"]} == {
            post["id"] for post in posts
        }


def test_workers_that_died_leave_no_room_in_the_queue(real_server):
    """Their names stay in RQ's register until one that lives cleans it up."""
    client = real_server.client
    client.flushall()
    hints = dispatcher.queue(real_server.url)
    assert dispatcher.room(hints, 1) == dispatcher.ROOM
    names = [f"rq:worker:{number}" for number in range(5)]
    client.sadd("rq:workers:images", *names)
    assert dispatcher.room(hints, 1) == dispatcher.ROOM
    for name in names[:3]:
        client.hset(name, "state", "idle")
    assert dispatcher.room(hints, 1) == 3 * dispatcher.ROOM
    dispatcher.hint(hints, "a post", 1)
    assert dispatcher.room(hints, 1) == 3 * dispatcher.ROOM - 1
    hints.connection.close()
