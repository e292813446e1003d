"""Each part works with its rights from docs/production.md, and is refused commands that it does not need."""

import re

import pytest
import redis
from clusters import ClusterServer
from conftest import CLUSTER, ROOT, RedisServer, Site, create_post, photograph, until, wait_until_processed
from scraping import Scrape
from state import unchanged

from storage import settings
from storage.backup import state as shipper_state

PAGE = (ROOT / "docs" / "production.md").read_text()
RULES = re.findall(r"^ACL SETUSER .*$", PAGE, re.MULTILINE)


def give_rights(client: redis.Redis) -> None:
    """Creates the users of docs/production.md. The default user stays."""
    for rule in RULES:
        if "default" not in rule:
            client.execute_command(*rule.split())


def password(user: str) -> str:
    return re.search(rf"SETUSER {user} on >(\S+)", PAGE)[1]


@pytest.fixture(params=["valkey", "redis"])
def guarded(request):
    """A Redis with the users of docs/production.md."""
    server = RedisServer(request.param)
    give_rights(server.client)
    yield server
    server.close()


@pytest.fixture(params=["valkey", "redis"])
def guarded_cluster(request):
    """A primary and its replica, each with these users only."""
    (rule,) = [rule.split() for rule in RULES if " replica " in rule]
    login = "--masteruser", "replica", "--masterauth", password("replica"), "--user", *rule[2:]
    server = ClusterServer(request.param, 1, 1, *login)
    for node in server.nodes:
        give_rights(node.client)
        node.client.acl_setuser("default", enabled=False)  # what is connected stays so
    server.nodes[0].client.client_kill_filter(_type="replica")
    until(lambda: server.nodes[0].client.info("replication")["connected_slaves"] == 1, what="the replica's return")
    yield server
    server.close()


def url(server, user: str) -> str:
    return f"unix://{user}:{password(user)}@{server.socket}"


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


def test_each_part_works_with_its_own_rights_on_a_cluster(guarded_cluster, embedded, tmp_path):
    """With a replica that must have each write: WAIT is a right, too."""
    api, worker = [
        Site(
            guarded_cluster.url.replace("//", f"//{user}:{password(user)}@"),
            tmp_path,
            queue_url=embedded.queue.url if CLUSTER else embedded.url,
            replicas=1,
        )
        for user in ("api", "worker")
    ]
    try:
        api.api()
        worker.worker()
        with api.client("alice") as client:
            post = wait_until_processed(client, create_post(client, photograph()))
            added = client.post(f"/v1/posts/{post['id']}/comments", json={"text": "Hello"})
            assert added.status_code == 201
            assert client.get("/v1/posts").json()["items"][0]["comment_count"] == 1
            assert client.get("/v1/changes").status_code == 200
            assert client.delete(f"/v1/posts/{post['id']}").status_code == 204
        scrape = Scrape(api.url)
        assert scrape("imagegram_redis_node_up", node=f"127.0.0.1:{guarded_cluster.nodes[0].port}") == 1
        ship = redis.Redis(port=guarded_cluster.nodes[0].port, username="ship", password=password("ship"))
        assert ship.cluster("NODES")
        asked = redis.Redis(port=guarded_cluster.nodes[0].port, username="api", password=password("api"))
        assert asked.execute_command("ASKING")
        for command in (("CLUSTER", "RESET"), ("CLUSTER", "FAILOVER"), ("CLUSTER", "FORGET", "a" * 40)):
            for client in (asked, ship):
                with pytest.raises(redis.exceptions.NoPermissionError):
                    client.execute_command(*command)
    finally:
        for site in (api, worker):
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
