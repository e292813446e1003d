"""The main story from end to end, with real HTTP, a real Redis, a real worker and a real photograph."""

import io
import time
from datetime import UTC, datetime

import pytest
from conftest import create_post, photograph, running_site, until, wait_until_processed
from making import bmp, png
from PIL import Image
from state import files

from storage import keys


@pytest.fixture(scope="module")
def running(real_server, tmp_path_factory):
    """A site with a worker, for all tests of this file. Each test leaves the feed empty."""
    real_server.client.flushall()
    with running_site(real_server, tmp_path_factory.mktemp("site")) as site:
        site.worker()
        yield site


PICTURES = {
    "a photograph": photograph,
    "a PNG": lambda: png(1000, 700),
    "a BMP": lambda: bmp(300, 900),
}


def read_stored(site, name: str) -> bytes:
    return (site.folder / "store" / name).read_bytes()


@pytest.mark.parametrize("picture", PICTURES)
def test_the_story_of_a_post(running, picture):
    site, data = running, PICTURES[picture]()
    anyone, alice, bob, carol = (site.client(user) for user in (None, "alice", "bob", "carol"))
    began, before = time.time(), set(files(site.folder / "store"))

    # Alice posts it, and it becomes ready.
    created = create_post(alice, data, "Amazing ☃")
    post = created["id"]
    assert created == {
        "id": post,
        "author": "alice",
        "caption": "Amazing ☃",
        "created_at": created["created_at"],
        "status": "processing",
        "image": None,
        "comment_count": 0,
        "latest_comments": [],
    }
    at = datetime.strptime(created["created_at"], "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=UTC).timestamp()
    assert began - 0.002 <= at <= time.time()
    ready = wait_until_processed(anyone, created)
    assert ready == created | {"status": "ready", "image": ready["image"]}
    assert ready["image"] == {
        "url": f"/v1/images/{post}.jpg",
        "width": 600,
        "height": 600,
        "thumbhash": ready["image"]["thumbhash"],
        "bytes": ready["image"]["bytes"],
        "scans": ready["image"]["scans"],
    }
    assert anyone.get("/v1/posts").json() == {"items": [ready], "next": None}

    # The original is stored byte for byte. The image that is served is a JPEG of 600x600.
    assert read_stored(site, keys.original(post)) == data
    served = anyone.get(ready["image"]["url"])
    assert ready["image"]["scans"][-1] == ready["image"]["bytes"] == len(served.content)
    assert (served.status_code, served.headers["Content-Type"]) == (200, "image/jpeg")
    with Image.open(io.BytesIO(served.content)) as image:
        image.load()
        assert (image.format, image.size, image.mode) == ("JPEG", (600, 600), "RGB")
    assert anyone.get(f"/v1/originals/{post}").status_code == 404

    # Bob and Carol comment on it; the feed shows the last two.
    added = []
    for client, text in ((bob, "first"), (carol, "second"), (bob, "third")):
        comment = client.post(f"/v1/posts/{post}/comments", json={"text": text})
        assert comment.status_code == 201
        assert anyone.get(comment.headers["Location"]).json() == comment.json()
        added.append(comment.json())
    written = [("bob", "first"), ("carol", "second"), ("bob", "third")]
    assert [(comment["author"], comment["text"]) for comment in added] == written
    (item,) = anyone.get("/v1/posts").json()["items"]
    assert item == ready | {"comment_count": 3, "latest_comments": [added[2], added[1]]}
    assert anyone.get(f"/v1/posts/{post}/comments").json() == {"items": added[::-1], "next": None}

    # Bob deletes his last comment. The feed shows the two before it again. Nobody else may delete it.
    target = f"/v1/posts/{post}/comments/{added[2]['id']}"
    assert carol.delete(target).status_code == 403
    assert alice.delete(target).status_code == 403
    assert bob.delete(target).status_code == 204
    assert bob.delete(target).status_code == 404
    (item,) = anyone.get("/v1/posts").json()["items"]
    assert item == ready | {"comment_count": 2, "latest_comments": [added[1], added[0]]}

    # Alice deletes the post. Nothing of it is served any more, and only the original stays in the store for a while.
    assert bob.delete(f"/v1/posts/{post}").status_code == 403
    assert alice.delete(f"/v1/posts/{post}").status_code == 204
    for target in ("", "/comments", f"/comments/{added[0]['id']}"):
        assert anyone.get(f"/v1/posts/{post}{target}").status_code == 404
    assert anyone.get(ready["image"]["url"]).status_code == 404
    assert carol.post(f"/v1/posts/{post}/comments", json={"text": "late"}).status_code == 404
    assert alice.delete(f"/v1/posts/{post}").status_code == 404
    assert anyone.get("/v1/posts").json() == {"items": [], "next": None}
    expected = before | {keys.original(post)}
    until(lambda: set(files(site.folder / "store")) == expected, what="the removal of the chunks")


def test_the_feed_is_ordered_by_the_number_of_comments_and_then_by_age(running):
    alice, bob = running.client("alice"), running.client("bob")
    posts = [create_post(alice, png(50 + n, 40), str(n)) for n in range(4)]
    for post in posts:
        wait_until_processed(bob, post)
    for number, count in ((0, 1), (1, 2), (2, 1)):
        for _ in range(count):
            bob.post(f"/v1/posts/{posts[number]['id']}/comments", json={"text": "counts"})
    expected = [posts[number]["id"] for number in (1, 2, 0, 3)]
    walked, following = [], "/v1/posts?limit=1"
    while following:
        page = bob.get(following)
        walked += [item["id"] for item in page.json()["items"]]
        following = page.links.get("next", {}).get("url")
    assert walked == [item["id"] for item in bob.get("/v1/posts").json()["items"]] == expected
    for post in posts:
        assert alice.delete(f"/v1/posts/{post['id']}").status_code == 204


def test_an_image_is_served_with_caching_validators_and_ranges(running):
    with running.client("alice") as client:
        post = wait_until_processed(client, create_post(client, photograph()))
        target = post["image"]["url"]
        whole = client.get(target)
        size = len(whole.content)
        assert whole.headers["Cache-Control"] == "public, max-age=31536000, immutable"
        assert whole.headers["X-Content-Type-Options"] == "nosniff"
        assert whole.headers["Content-Length"] == str(size)
        tag = whole.headers["ETag"]
        assert tag.startswith('"') and tag.endswith('"')

        head = client.head(target)
        assert (head.status_code, head.content) == (200, b"")
        for name in ("Content-Length", "Content-Type", "ETag", "Cache-Control", "X-Content-Type-Options"):
            assert head.headers[name] == whole.headers[name]

        for known in (tag, f'"other", {tag}', "*", f"W/{tag}"):
            for send in (client.get, client.head):
                same = send(target, headers={"If-None-Match": known})
                assert (same.status_code, same.content, same.headers["ETag"]) == (304, b"", tag)
        assert client.get(target, headers={"If-None-Match": '"other"'}).status_code == 200

        ranges = {
            "bytes=0-0": (0, 1),
            "bytes=0-99": (0, 100),
            "bytes=100-": (100, size),
            "bytes=-100": (size - 100, size),
            f"bytes={size - 1}-": (size - 1, size),
            f"bytes=0-{size * 9}": (0, size),
            f"bytes=-{size * 9}": (0, size),
        }
        for asked, (start, stop) in ranges.items():
            part = client.get(target, headers={"Range": asked})
            assert (part.status_code, part.content) == (206, whole.content[start:stop])
            assert part.headers["Content-Range"] == f"bytes {start}-{stop - 1}/{size}"
            assert part.headers["ETag"] == tag
        for asked in (f"bytes={size}-", f"bytes={size}-{size + 5}", "bytes=-0", "bytes=" + "9" * 18 + "-"):
            refused = client.get(target, headers={"Range": asked})
            assert (refused.status_code, refused.headers["Content-Range"]) == (416, f"bytes */{size}")
            assert refused.headers["Content-Type"] == "application/problem+json"
            assert "immutable" not in refused.headers.get("Cache-Control", "")
        for ignored in ("bytes=5-4", "bytes=0-1,3-4", "lines=0-1", "bytes=a-b", "bytes=-", "bytes=" + "9" * 99 + "-"):
            answer = client.get(target, headers={"Range": ignored})
            assert (answer.status_code, answer.content) == (200, whole.content)
        part = {"Range": "bytes=0-9"}
        assert client.get(target, headers={**part, "If-Range": tag}).status_code == 206
        assert client.get(target, headers={**part, "If-Range": '"other"'}).status_code == 200
        assert client.get(target, headers={**part, "If-None-Match": tag}).status_code == 304
        assert client.head(target, headers=part).status_code == 200
        assert client.delete(f"/v1/posts/{post['id']}").status_code == 204


BROKEN = {
    "half a JPEG": lambda: photograph()[: len(photograph()) // 2],
    "half a PNG": lambda: png(900, 900)[:900],
    "a BMP without pixels": lambda: bmp()[:60],
    "a text that begins like a BMP": lambda: b"BM I am no picture at all" * 10,
}


@pytest.mark.parametrize("fault", BROKEN)
def test_an_upload_that_is_no_image_fails_its_post_and_is_stored_but_never_served(running, fault):
    site, data = running, BROKEN[fault]()
    with site.client("alice") as client:
        created = create_post(client, data)
        post = wait_until_processed(client, created)
        assert post == created | {"status": "failed", "error": post["error"]}
        assert set(post["error"]) == {"code", "detail"} and all(post["error"].values())
        assert client.get("/v1/posts").json() == {"items": [], "next": None}
        missing = client.get(f"/v1/images/{post['id']}.jpg")
        assert (missing.status_code, missing.json()["code"]) == (404, "noimage")
        assert "Retry-After" not in missing.headers
        assert client.post(f"/v1/posts/{post['id']}/comments", json={"text": "a"}).status_code == 409
        assert data in files(site.folder / "store").values()
        assert client.delete(f"/v1/posts/{post['id']}").status_code == 204
        assert client.get(f"/v1/posts/{post['id']}").status_code == 404
