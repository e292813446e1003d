"""The forecast's mix: an hour has 1,000 images and 100,000 comments, and feed reads fill up to 100 requests a second.

Run by `make load` against a started system, whose signing secret it takes from the same settings.
"""

import io
import random
import secrets

from locust import HttpUser, between, task
from PIL import Image

from api.tokens import mint
from storage import settings

SETTINGS = settings.load()
WEIGHTS = {"feed": 7100, "comment": 2700, "uncomment": 80, "upload": 28}  # of 10,000 requests


def photo() -> bytes:
    file = io.BytesIO()
    noise = Image.frombytes("RGB", (64, 48), secrets.token_bytes(64 * 48 * 3))
    noise.resize((1600, 1200)).save(file, "JPEG", quality=85)
    return file.getvalue()


PHOTOS = [photo() for _ in range(4)]


class Person(HttpUser):
    wait_time = between(0.2, 0.8)

    def on_start(self):
        self.client.headers["Authorization"] = f"Bearer {mint(SETTINGS, f'load-{secrets.token_hex(4)}')}"
        self.posts: list[str] = []
        self.said: list[str] = []  # addresses of own comments
        self.upload()

    @task(WEIGHTS["feed"])
    def feed(self):
        found = self.client.get("/v1/posts?limit=10", headers={"Accept-Encoding": "br"}).json()
        self.posts = [post["id"] for post in found["items"]]
        if found["next"] and random.random() < 0.3:
            self.client.get(f"/v1/posts?limit=10&cursor={found['next']}", name="/v1/posts?cursor=…")

    @task(WEIGHTS["comment"])
    def comment(self):
        if self.posts:
            post = random.choice(self.posts)
            made = self.client.post(
                f"/v1/posts/{post}/comments",
                json={"text": "What a place! I would go there at once if only it were nearer."},
                headers={"Idempotency-Key": secrets.token_hex(8)},
                name="/v1/posts/…/comments",
            )
            if made.ok:
                self.said.append(made.headers["Location"])

    @task(WEIGHTS["uncomment"])
    def uncomment(self):
        if self.said:
            self.client.delete(self.said.pop(), name="/v1/posts/…/comments/…")

    @task(WEIGHTS["upload"])
    def upload(self):
        self.client.post(
            "/v1/posts",
            files={"image": ("photo.jpg", random.choice(PHOTOS), "image/jpeg")},
            data={"caption": "Somewhere in the Alps"},
            headers={"Idempotency-Key": secrets.token_hex(8)},
        )
