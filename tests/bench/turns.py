"""How long a user's photograph waits when another user has queued many costly images: `make bench-turns`.

One converter. First a photograph of 2 megapixels on an idle site; then the same, when another user has just sent 40
PNGs of 100 megapixels, the largest that are decoded. A form is sent to the API, and the post is read until it is ready.
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
IDLE = 7  # photographs on the idle site, of which the median counts
LOOK = 0.01  # seconds between two looks at a post


def encoded(image: Image.Image, kind: str, **how) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def post(client: httpx.Client, data: bytes) -> str:
    return client.post("/v1/posts", files={"image": data}).raise_for_status().json()["id"]


def status(client: httpx.Client, made: str) -> str:
    return client.get(f"/v1/posts/{made}").json()["status"]


def ended(client: httpx.Client, posts: list[str]) -> int:
    return sum(status(client, made) != "processing" for made in posts)


def time_to_ready(client: httpx.Client, data: bytes, taken=lambda: None) -> float:
    """Seconds. `taken` is called when the form was answered."""
    began = time.perf_counter()
    made = post(client, data)
    taken()
    while status(client, made) != "ready":
        time.sleep(LOOK)
    return time.perf_counter() - began


def main() -> None:
    large = encoded(Image.new("RGB", (10_000, 10_000), "teal"), "PNG")
    small = encoded(photograph(1600, 1200), "JPEG", quality=90)
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
                began, counts = time.perf_counter(), []
                behind = time_to_ready(bob, small, lambda: counts.append(ended(alice, queued)))
                counts.append(ended(alice, queued))
                until(lambda: ended(alice, queued) == COUNT, 600, "the last of the large images")
                took = (time.perf_counter() - began) / (COUNT - counts[0])
        finally:
            site.close()
            server.close()
    print(f"{COUNT} PNGs of 10,000 x 10,000 ({len(large)} bytes, {took:.2f} s each) from one user, then a photograph")
    print(f"of 2 MP from another: ready in {behind:.2f} s, idle in {idle:.2f} s: {behind / idle:.1f} times")
    print(f"{counts[1] - counts[0]} of the large ones were made while it waited, {COUNT - counts[1]} after it")


if __name__ == "__main__":
    main()
