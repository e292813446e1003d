"""The forecast's mix of requests: 1,000 images and 100,000 comments an hour, with feed reads 100 requests a second.

`make load` runs it against a system that is already running. It reads that system's signing secret from the settings.
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
        self.posts: list[str] = []  # ids, of the last page that was read
        self.comments: list[str] = []  # paths of this user's own comments
        self.upload()

    @task(WEIGHTS["feed"])
    def feed(self):
        page = self.client.get("/v1/posts?limit=10", headers={"Accept-Encoding": "br"}).json()
        self.posts = [post["id"] for post in page["items"]]
        if page["next"] and random.random() < 0.3:
            self.client.get(f"/v1/posts?limit=10&cursor={page['next']}", name="/v1/posts?cursor=…")

    @task(WEIGHTS["comment"])
    def comment(self):
        if self.posts:
            post = random.choice(self.posts)
            answer = self.client.post(
                f"/v1/posts/{post}/comments",
                json={"text": "What a place! I would go there at once if only it were nearer."},
                headers={"Idempotency-Key": secrets.token_hex(8)},
                name="/v1/posts/…/comments",
            )
            if answer.ok:
                self.comments.append(answer.headers["Location"])

    @task(WEIGHTS["uncomment"])
    def uncomment(self):
        if self.comments:
            self.client.delete(self.comments.pop(), name="/v1/posts/…/comments/…")

    @task(WEIGHTS["upload"])
    def upload(self):
        self.client.post(
            "/v1/posts",
            files={"image": ("photo.jpg", random.choice(PHOTOS), "image/jpeg")},
            data={"caption": "Somewhere in the Alps"},
            headers={"Idempotency-Key": secrets.token_hex(8)},
        )
