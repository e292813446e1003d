"""What is at the near end of all lines: a site with ten photographs behind the front, and a plain peer."""

import contextlib
import io
import json
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import front
from conftest import RedisServer, Site, free_port, until
from PIL import Image
from wire import exchange, head

from tests.bench import jpegs
from tests.line.network import SITE
from workers import encoding, scans

PICTURES = 10
UPLOAD = 3_000_000  # bytes of the photograph that is uploaded
SMALL = (1600, 1200)  # pixels of the photograph that is published to see how soon it is ready
COMMENTS = ("Lovely!", "Where is that? I would like to go there one day.", "The light is great")
PLAIN = """
pid {folder}/nginx.pid;
error_log stderr warn;
events {{}}
http {{
  access_log off;
  types {{ image/jpeg jpg; application/json json; }}
  gzip on;
  gzip_types application/json;
  server {{
    listen {address}:{port} ssl;
    listen {address}:{port} quic reuseport;
    listen 127.0.0.1:{probe};
    http2 on;
    ssl_certificate {certificate};
    ssl_certificate_key {key};
    root {folder}/files;
  }}
}}
"""


class Place(NamedTuple):
    """Where clients find things."""

    url: str  # the front
    peer: str  # of a server of static files: `baseline/feed.json` and `before/feed.json`, and their pictures
    photograph: Path  # for uploads
    small: Path
    site: Site


def photographs() -> list[Path]:
    """Ten of the photographs of `make bench-jpegs`: each fourth, in the order of their JPEGs' size, then shuffled."""
    by_size = sorted(jpegs.photographs(), key=lambda path: len(encoding.encode_jpeg(jpegs.pixels(path))))
    chosen = by_size[:: len(by_size) // (PICTURES - 1)][:PICTURES]
    random.Random(18).shuffle(chosen)
    return chosen


def make_uploads(folder: Path) -> tuple[Path, Path]:
    """Writes a photograph of UPLOAD bytes and one of SMALL pixels."""
    image = Image.open(max(jpegs.photographs(), key=lambda path: path.stat().st_size)).convert("RGB")
    large, small = folder / "photograph.jpg", folder / "small.jpg"
    for quality in range(100, 50, -1):
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        if len(file.getvalue()) <= UPLOAD:
            break
    large.write_bytes(file.getvalue().ljust(UPLOAD, b"\0"))  # bytes behind the end of a JPEG are ignored
    image.resize(SMALL).save(small, quality=85)
    return large, small


def write_plain(folder: Path, name: str, feed: dict, pictures: list[bytes]) -> None:
    """Writes the files of a server of static files: the feed with other pictures."""
    (folder / name).mkdir(parents=True)
    items = []
    for number, (item, jpeg) in enumerate(zip(feed["items"], pictures, strict=True)):
        (folder / name / f"{number}.jpg").write_bytes(jpeg)
        image = {"url": f"/{name}/{number}.jpg", "width": 600, "height": 600}
        items.append({**item, "image": {**image, "bytes": len(jpeg), "scans": scans.looks(jpeg)}})
    (folder / name / "feed.json").write_text(json.dumps({**feed, "items": items}, separators=(",", ":")))


def publish(site: Site, paths: list[Path]) -> dict:
    """Publishes the photographs, with comments, in this order. Returns the feed."""
    with site.client("alice") as alice:
        for path in reversed(paths):
            caption = f"{path.stem.replace('_', ' ')}, on a walk last summer"
            sent = alice.post("/v1/posts", files={"image": path.read_bytes()}, data={"caption": caption})
            post = f"/v1/posts/{sent.raise_for_status().json()['id']}"
            answer = alice.get(post, headers={"Prefer": "wait=25"})
            assert answer.json()["status"] == "ready", answer.json()
            for text in COMMENTS:
                alice.post(f"{post}/comments", json={"text": text}).raise_for_status()
        return alice.get("/v1/posts?limit=10").json()


@contextlib.contextmanager
def running(folder: Path) -> Iterator[Place]:
    """Starts everything in this network namespace."""
    folder.chmod(0o755)
    with contextlib.ExitStack() as stack:
        server = RedisServer("valkey")
        stack.callback(server.close)
        site = Site(server.url, folder / "data")
        stack.callback(site.close)
        site.api()
        site.worker()
        paths = photographs()
        feed = publish(site, paths)
        (folder / "front").mkdir()
        before = front.Front(site, folder / "front", address="0.0.0.0")
        stack.callback(before.close)

        files, port, probe = folder / "plain" / "files", free_port(), free_port()
        images = [jpegs.pixels(path) for path in paths]
        write_plain(files, "baseline", feed, [baseline(image) for image in images])
        write_plain(files, "before", feed, [encoding.with_pillow(image) for image in images])
        names = {"certificate": before.certificate, "key": before.certificate.with_name("key.pem")}
        conf = PLAIN.format(folder=folder / "plain", address=SITE, port=port, probe=probe, **names)
        (folder / "plain" / "nginx.conf").write_text(conf)
        plain = subprocess.Popen(front.command(folder / "plain"))
        stack.callback(plain.wait, 10)
        stack.callback(plain.terminate)
        until(lambda: exchange(probe, head("GET", "/baseline/feed.json")).status == 200, what="the plain peer")
        uploads = make_uploads(folder)
        yield Place(f"https://{SITE}:{before.tls_port}", f"https://{SITE}:{port}", *uploads, site)


def baseline(image: Image.Image) -> bytes:
    """The JPEG that a program with Pillow serves which does not say how."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return file.getvalue()
