"""The docs' commands, run as they stand."""

import json
import re
import shutil
import subprocess

import pytest
from conftest import ROOT, photograph, until
from making import jpeg

README = (ROOT / "README.md").read_text()
KEYS = (ROOT / "docs" / "keys.md").read_text()
POST = re.compile(r"\b01[0-9A-HJKMNP-TV-Z]{24}-0")
UPLOAD = re.compile(r"\bu01[0-9A-HJKMNP-TV-Z]{24}-0")


def test_the_readme_makes_the_first_call(working_site, tmp_path):
    """Its shell lines, in a folder with a photo.jpg, against the address of the site."""
    (tmp_path / "photo.jpg").write_bytes(photograph())
    (tmp_path / ".venv").symlink_to(ROOT / ".venv")
    for room in ("api", "storage", "lua"):
        (tmp_path / room).symlink_to(ROOT / room)
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    script = "".join(blocks).replace("http://127.0.0.1:8000", working_site.url)
    assert working_site.url in script
    run = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=tmp_path,
        env=working_site.environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 0, run.stderr
    ready, rest = run.stdout.split("\n", 1)
    assert json.loads(ready)["status"] == "ready"
    comment, feed = map(json.loads, rest.replace("}{", "}\n{").splitlines())
    assert comment["text"] == "First!"
    assert feed["items"] == [{**json.loads(ready), "comment_count": 1, "latest_comments": [comment]}]
    assert (tmp_path / "served.jpg").read_bytes().startswith(b"\xff\xd8\xff")


@pytest.fixture
def session(working_site, real_server):
    """Runs redis-cli on a site with what the page's session tells of."""
    if not shutil.which("redis-cli"):
        pytest.fail("redis-cli is needed: apt-get install redis-tools")
    posts = []
    with working_site.client("alice") as alice, working_site.client("bob") as bob:
        for _ in range(2):
            sent = alice.post("/v1/posts", files={"image": jpeg()}, data={"caption": "Hello"})
            posts.append(sent.json()["id"])
        until(lambda: len(alice.get("/v1/posts").json()["items"]) == 2, what="both posts")
        for person, text in ((alice, "Hm"), (alice, "First!"), (bob, "Where is that?")):
            person.post(f"/v1/posts/{posts[0]}/comments", json={"text": text}).raise_for_status()
        bob.post("/v1/posts/00000000000000000000000000-0/comments", json={"text": "?"})
        headers = {"Tus-Resumable": "1.0.0", "Upload-Length": "2500000"}
        begun = bob.post("/v1/uploads", headers=headers)
        upload = begun.headers["Location"].rpartition("/")[2]
        headers = {"Tus-Resumable": "1.0.0", "Upload-Offset": "0", "Content-Type": "application/offset+octet-stream"}
        bob.patch(f"/v1/uploads/{upload}", headers=headers, content=jpeg(900, 900)[:4096]).raise_for_status()
    until(lambda: real_server.client.zrange("due:{0}", 0, -1) == [upload], what="the posts' work")

    def run(command: str) -> str:
        given = [UPLOAD.sub(upload, POST.sub(posts[0], word)) for word in command.split()]
        done = subprocess.run(
            ["redis-cli", "--no-raw", "-s", real_server.socket, *given], capture_output=True, text=True, check=True
        )
        return done.stdout

    return run


def shape(reply: str) -> str:
    """A reply without what differs from one session to another."""
    reply = UPLOAD.sub("<upload>", POST.sub("<post>", reply.replace("\r", "")))
    reply = re.sub(r"\d{13}", "<ms>", reply)
    reply = re.sub(r"0-[0-9a-f]{16}", "<chunk>", reply)
    reply = re.sub(r'"[A-Za-z0-9+/]{32}"', '"<thumbhash>"', reply)
    return "\n".join(line.strip() for line in reply.strip().splitlines())


def test_the_example_session_of_the_key_page_is_true(session):
    blocks = re.findall(r"```\n(.*?)```", KEYS[KEYS.index("## An example session") :], re.DOTALL)
    commands = [part for block in blocks for part in re.split(r"^> ", block, flags=re.MULTILINE) if part]
    assert len(commands) >= 8
    for part in commands:
        command, _, printed = part.partition("\n")
        if command.startswith("INFO"):  # of a server that other tests have used, too
            counted = {line.partition(":")[0] for line in session(command).split()}
            assert {line.partition(":")[0] for line in printed.split()} <= counted
        else:
            assert shape(session(command)) == shape(printed), command
