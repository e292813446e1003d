"""Rolling restarts of both nodes, API and worker, while 16 people comment and upload through HAProxy.

    python -m pytest -s tests/drills/restarts.py
"""

import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from conftest import create_post, wait_until_processed
from making import jpeg
from nodes import restart, running_nodes
from uploading import BODY

PEOPLE = 16
ROUNDS = 3  # restarts of each node
TUS = {"Tus-Resumable": "1.0.0"}
AGAIN = (502, 503, 504)
STEPS = 4  # PATCH requests for each upload


class Person:
    """A client that follows Retry-After. It repeats a write with its Idempotency-Key, and an upload from its offset."""

    def __init__(self, site, name: str):
        self.client, self.name = site.client(name), name
        self.statuses: Counter[int] = Counter()
        self.slowest = 0.0  # seconds from the first try to the answer
        self.comments: list[str] = []
        self.posts: list[dict] = []

    def send(self, method: str, path: str, **given):
        began = time.monotonic()
        while True:
            answer = self.client.request(method, path, **given)
            self.statuses[answer.status_code] += 1
            if answer.status_code not in AGAIN:
                self.slowest = max(self.slowest, time.monotonic() - began)
                assert answer.is_success, (method, path, answer.status_code, answer.text)
                return answer
            time.sleep(int(answer.headers["Retry-After"]))
            if method == "PATCH":  # it may have been stored
                offset = self.send("HEAD", path, headers=TUS).headers["Upload-Offset"]
                if offset != given["headers"]["Upload-Offset"]:
                    return answer

    def comment(self, post: str) -> None:
        text = f"{self.name}-{len(self.comments)}"
        path, headers = f"/v1/posts/{post}/comments", {"Idempotency-Key": f'"{text}"'}
        self.comments.append(self.send("POST", path, json={"text": text}, headers=headers).json()["id"])
        assert self.send("GET", f"{path}/{self.comments[-1]}").json()["text"] == text

    def upload(self, image: bytes) -> None:
        key = {"Idempotency-Key": f'"{self.name}-{len(self.posts)}"'}
        headers = {**TUS, **key, "Upload-Length": str(len(image))}
        upload = self.send("POST", "/v1/uploads", headers=headers).headers["Location"]
        step = -(-len(image) // STEPS)
        for start in range(0, len(image), step):
            headers = {**TUS, "Upload-Offset": str(start), "Content-Type": BODY.partition(": ")[2]}
            self.send("PATCH", upload, content=image[start : start + step], headers=headers)
        body = {"upload": upload.rpartition("/")[2]}
        self.posts.append(self.send("POST", "/v1/posts", json=body, headers=key).json())


@pytest.mark.timeout(300)
def test_rolling_restarts_fail_no_request_of_a_client_that_follows_retry_after(embedded, tmp_path):
    embedded.client.flushall()
    with running_nodes(embedded, tmp_path, converters=1, processing=1000) as site:
        people = [Person(site, f"person{number}") for number in range(PEOPLE)]
        post = create_post(people[0].client, jpeg())
        wait_until_processed(people[0].client, post)
        done = threading.Event()

        def live(person: Person) -> None:
            while not done.is_set():
                for _ in range(20):
                    person.comment(post["id"])
                    person.send("GET", "/v1/posts")
                person.upload(jpeg(300, 200))

        with ThreadPoolExecutor(PEOPLE) as threads:
            living = [threads.submit(partial(live, person)) for person in people]
            try:
                for number in [0, 1] * ROUNDS:
                    restart(site, number)
                    worker = site.nodes[number].processes[1]
                    worker.terminate()
                    worker.wait(30)
                    site.nodes[number].processes[1] = site.nodes[number].worker()
                    site.nodes[number].processes.pop()
                    time.sleep(1)
            finally:
                done.set()
            for each in living:
                each.result()
        shown, query = [], {"limit": 100}
        while query.get("cursor", "first"):
            page = people[0].client.get(f"/v1/posts/{post['id']}/comments", params=query).json()
            shown += [row["id"] for row in page["items"]]
            query["cursor"] = page["next"]
        written = [comment for person in people for comment in person.comments]
        assert len(shown) == len(set(shown)) and set(shown) == set(written), "none is lost, none is double"
        posts = [post for person in people for post in person.posts]
        for post in posts:
            wait_until_processed(people[0].client, post)
        statuses = sum((person.statuses for person in people), Counter())
        print(f"\n{2 * ROUNDS} restarts, {len(written)} comments, {len(posts)} uploads; answers: {dict(statuses)};")
        print(f"longest time to an answer, with repeats: {max(person.slowest for person in people):.2f} s")
