"""Measures how long a user's photograph waits if another user has queued many large images: `make bench-turns`.

There is one converter. The photograph has 2 megapixels. It is sent to an idle site first. Then it is sent just after
another user has sent 40 PNGs of 100 megapixels, the largest size that is decoded. Each image is sent as a form to the
API; the post is read until it is ready.
"""

import io
import statistics
import sys
import tempfile
import time
from pathlib import Path

import httpx
from conftest import RedisServer, Site, until
from PIL import Image

from tests.bench.images import photograph

COUNT = int(sys.argv[1]) if sys.argv[1:] else 40
IDLE = 7  # photographs on the idle site; their median counts
PAUSE = 0.01  # seconds between two reads of a post


def encode(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def post(client: httpx.Client, data: bytes) -> str:
    return client.post("/v1/posts", files={"image": data}).raise_for_status().json()["id"]


def status(client: httpx.Client, post_id: str) -> str:
    return client.get(f"/v1/posts/{post_id}").json()["status"]


def count_ended(client: httpx.Client, posts: list[str]) -> int:
    """The number of posts that are ready or failed."""
    return sum(status(client, post_id) != "processing" for post_id in posts)


def time_to_ready(client: httpx.Client, data: bytes, on_answer=lambda: None) -> float:
    """Seconds from sending the form until the post is ready. Calls `on_answer` when the form was answered."""
    began = time.perf_counter()
    post_id = post(client, data)
    on_answer()
    while status(client, post_id) != "ready":
        time.sleep(PAUSE)
    return time.perf_counter() - began


def main() -> None:
    large = encode(Image.new("RGB", (10_000, 10_000), "teal"), "PNG")
    small = encode(photograph(1600, 1200), "JPEG", quality=90)
    server = RedisServer("valkey")
    with tempfile.TemporaryDirectory() as folder:
        site = Site(server.url, Path(folder), processing=COUNT)
        try:
            site.api()
            site.worker()
            with site.client("alice") as alice, site.client("bob") as bob:
                time_to_ready(bob, small)  # the worker has started
                idle = statistics.median(time_to_ready(bob, small) for _ in range(IDLE))
                queued = [post(alice, large) for _ in range(COUNT)]
                began = time.perf_counter()
                counts: list[int] = []  # large images that had ended when the photograph was sent and when it was ready
                behind = time_to_ready(bob, small, lambda: counts.append(count_ended(alice, queued)))
                counts.append(count_ended(alice, queued))
                until(lambda: count_ended(alice, queued) == COUNT, 600, "the last of the large images")
                took = (time.perf_counter() - began) / (COUNT - counts[0])
        finally:
            site.close()
            server.close()
    print(f"{COUNT} PNGs of 10,000 x 10,000 ({len(large)} bytes, {took:.2f} s each) from one user, then a photograph")
    print(f"of 2 MP from another: ready in {behind:.2f} s, idle in {idle:.2f} s: {behind / idle:.1f} times")
    print(f"{counts[1] - counts[0]} of the large ones were converted while it waited, {COUNT - counts[1]} after it")


if __name__ == "__main__":
    main()
