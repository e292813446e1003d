"""`make cluster`: it starts, loses a primary, ends with Ctrl-C, and finds its data again."""

import os
import signal
import subprocess
import time
import uuid

import httpx
import psutil
import pytest
from conftest import ROOT, free_port, until
from making import jpeg

from api.tokens import mint
from deploy.cluster import FIRST_PORT, SHAPES, nodes
from storage import settings
from storage.backup import state
from storage.keys import partition_of_post


class Run:
    def __init__(self, shape: str, data):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        own = {"IMAGEGRAM_DATA": str(data), "IMAGEGRAM_PORT": str(self.port), "PYTHONPATH": str(ROOT)}
        # As make does: a shell leads the session, and waits.
        command = ["sh", "-c", f".venv/bin/python -m deploy.cluster {shape}; exit $?"]
        self.data = data / shape
        self.process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **own}, start_new_session=True)
        until(lambda: httpx.get(f"{self.url}/readyz").status_code == 200, 90, "the API")
        token = mint(settings.load({**own, "IMAGEGRAM_DATA": str(self.data)}), "alice")
        self.client = httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {token}"}, timeout=10)

    def server(self, place: str) -> psutil.Process | None:
        """The server of a node, if it runs."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        servers = [process for process in children if process.name().startswith("valkey")]
        return next((process for process in servers if place in " ".join(process.cmdline())), None)

    def end(self) -> None:
        parts = psutil.Process(self.process.pid).children(recursive=True)
        os.killpg(self.process.pid, signal.SIGINT)
        self.process.wait(30)
        _, left = psutil.wait_procs(parts, 10)
        assert not left

    def comment(self, post: str, text: str) -> bool:
        """Whether a comment was added. Repeats it as a client does, for 20 s."""
        headers, deadline = {"Idempotency-Key": f'"{uuid.uuid4()}"'}, time.monotonic() + 20
        while time.monotonic() < deadline:
            answer = self.client.post(f"/v1/posts/{post}/comments", json={"text": text}, headers=headers)
            if answer.status_code != 503:
                return answer.status_code == 201
            time.sleep(float(answer.headers["Retry-After"]))
        return False


@pytest.mark.timeout(400)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_site_survives_the_loss_of_its_primary_and_is_found_again(shape, tmp_path):
    run = Run(shape, tmp_path)
    try:
        answer = run.client.post("/v1/posts", files={"image": jpeg(600, 400)}, data={"caption": "Hello"})
        assert answer.status_code == 201, answer.text
        post = answer.json()["id"]
        waited = run.client.get(f"/v1/posts/{post}", headers={"Prefer": "wait=25"}, timeout=30)
        assert waited.json()["status"] == "ready"
        assert run.comment(post, "before")
        count = len(nodes(SHAPES[shape]))
        folders = [settings.load({"IMAGEGRAM_DATA": str(run.data / str(number + 1))}) for number in range(count)]
        until(lambda: all(state.read(folder)["generation"] for folder in folders), 60, "all nodes are backed up")
        primary = run.server(f":{FIRST_PORT + partition_of_post(post) % SHAPES[shape].primaries}")
        primary.kill()
        began = time.monotonic()
        assert all(run.comment(post, f"after {number}") for number in range(5))
        print(f"{shape}: comments again after {time.monotonic() - began:.1f} s")
        places = [f"127.0.0.1:{FIRST_PORT + number}" for number in range(count)]
        until(lambda: run.client.get("/v1/posts").status_code == 200 and all(map(run.server, places)), 60, "the node")
        until(lambda: run.client.get("/v1/posts").json()["items"][0]["comment_count"] == 6, what="all comments")
    finally:
        run.end()
    again = Run(shape, tmp_path)
    try:
        (item,) = again.client.get("/v1/posts").json()["items"]
        assert (item["id"], item["comment_count"]) == (post, 6)
    finally:
        again.end()
