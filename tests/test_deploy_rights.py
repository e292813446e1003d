"""Each part works with its rights from docs/production.md, and is refused commands that it does not need."""

import re

import pytest
import redis
from conftest import ROOT, RedisServer, Site, create_post, photograph, until, wait_until_processed
from state import unchanged

from storage import settings
from storage.backup import state as shipper_state

PAGE = (ROOT / "docs" / "production.md").read_text()
RULES = re.findall(r"^ACL SETUSER .*$", PAGE, re.MULTILINE)


@pytest.fixture(params=["valkey", "redis"])
def guarded(request):
    """A Redis with the users of docs/production.md."""
    server = RedisServer(request.param)
    for rule in RULES:
        if "default" not in rule:
            server.client.execute_command(*rule.split())
    yield server
    server.close()


def url(server, user: str) -> str:
    password = re.search(rf"SETUSER {user} on >(\S+)", PAGE)[1]
    return f"unix://{user}:{password}@{server.socket}"


def test_each_part_works_with_its_own_rights(guarded, tmp_path):
    """The default user is disabled, so that no part can work without its own user."""
    (tmp_path / "redis").symlink_to(guarded.folder.name)  # the shipper reads Redis' files here
    api, worker, ship = [Site(url(guarded, user), tmp_path) for user in ("api", "worker", "ship")]
    try:
        api.api()
        guarded.client.acl_setuser("default", enabled=False)
        worker.worker()
        ship.start("storage", "ship")
        with api.client("alice") as client:
            post = wait_until_processed(client, create_post(client, photograph()))
            added = client.post(f"/v1/posts/{post['id']}/comments", json={"text": "Hello"})
            assert added.status_code == 201
            comment = f"/v1/posts/{post['id']}/comments/{added.json()['id']}"
            assert client.get("/v1/posts").json()["items"][0]["comment_count"] == 1
            assert client.get("/v1/changes").status_code == 200
            assert client.get(comment).status_code == 200
            assert client.delete(comment).status_code == 204
            assert client.delete(f"/v1/posts/{post['id']}").status_code == 204
            until(lambda: not (tmp_path / "store" / "images" / f"{post['id']}.jpg").exists(), what="the JPEG's removal")
        known = settings.load({"IMAGEGRAM_DATA": str(tmp_path)})
        until(lambda: shipper_state.read(known)["generation"] == 1, what="the backup's first generation")
    finally:
        for site in (api, worker, ship):
            site.close()


def test_no_part_may_run_commands_that_it_does_not_need(guarded):
    clients = {user: redis.Redis.from_url(url(guarded, user)) for user in ("api", "worker", "ship")}
    assert clients["ship"].info("persistence") and clients["ship"].bgrewriteaof()
    refused = {
        "ship": [("GET", "x"), ("SET", "x", "1"), ("CONFIG", "GET", "dir"), ("EVAL", "return 1", "0")],
        "api": [("FLUSHALL",), ("CONFIG", "GET", "dir"), ("KEYS", "*"), ("SET", "rq:x", "1"), ("ACL", "LIST")],
        "worker": [("FLUSHALL",), ("CONFIG", "SET", "dir", "/"), ("ACL", "LIST"), ("SHUTDOWN",)],
    }
    guarded.client.set("kept", "by every refusal")
    for user, commands in refused.items():
        for command in commands:
            with unchanged(guarded.client), pytest.raises(redis.exceptions.NoPermissionError):
                clients[user].execute_command(*command)
