"""docker-compose.yml and the Dockerfile use the commands, settings, volumes and versions that the tests use."""

import asyncio
import json
import re
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from clusters import ClusterNode
from conftest import until

from storage import settings
from storage.backup import state as shipper_state
from storage.db import forming, server
from storage.db.cluster import Cluster

ROOT = Path(__file__).parent.parent
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
PROCFILE = dict(line.split(": ", 1) for line in (ROOT / "Procfile").read_text().splitlines())
DOCKERFILE = (ROOT / "Dockerfile").read_text()
SETTINGS = (ROOT / "storage" / "settings.py").read_text()


def test_compose_and_make_run_start_the_same_commands():
    for part in ("api", "worker", "ship"):
        assert "exec .venv/bin/" + " ".join(COMPOSE[part]["command"]) == PROCFILE[part]


def test_composes_redis_has_the_configuration_of_the_embedded_server():
    assert "./storage/db/redis.conf:/etc/redis.conf:ro" in COMPOSE["redis"]["volumes"]
    assert "exec valkey-server /etc/redis.conf --dir /data/redis " in COMPOSE["redis"]["command"][2]


@pytest.mark.parametrize(
    ("before", "starts", "after"),
    [
        ([], True, ["redis"]),
        (["redis"], True, ["redis"]),
        (["redis.lost-20261124T120000Z", "redis.new"], False, ["redis.lost-20261124T120000Z", "redis.new"]),
    ],
    ids=["an empty volume", "a volume with data", "a restore that was interrupted"],
)
def test_composes_redis_makes_its_folder_on_an_empty_volume_only(tmp_path, before, starts, after):
    """An interrupted restore leaves a volume without the folder. An empty Redis would hide that."""
    for name in before:
        (tmp_path / name).mkdir()
    command = COMPOSE["redis"]["command"][2].replace("$$", "$").replace("/data", str(tmp_path))
    command = command.replace("exec valkey-server /etc/redis.conf --dir", "cd")  # it fails as the server would
    command = command[: command.index(" --bind")]
    assert (subprocess.run(["sh", "-c", command], capture_output=True).returncode == 0) == starts
    assert sorted(path.name for path in tmp_path.iterdir()) == after


NODES = [f"node{number}" for number in range(1, 7)]


def test_the_profile_cluster_adds_nodes_that_start_as_redis_does_and_a_shipper_of_each():
    added = {name for name, service in COMPOSE.items() if service.get("profiles") == ["cluster"]}
    assert added == {*NODES, *(f"ship{number}" for number in range(1, 7)), "form"}
    rule = COMPOSE["redis"]["command"][2].split(" exec ")[0]
    for number, name in enumerate(NODES, 1):
        node, ship = COMPOSE[name], COMPOSE[f"ship{number}"]
        assert {key: node[key] for key in node.keys() - {"profiles", "command", "volumes"}} == {
            key: COMPOSE["redis"][key] for key in COMPOSE["redis"].keys() - {"command", "volumes"}
        }
        server_command = "exec valkey-server /etc/redis.conf --include /etc/redis-cluster.conf --dir /data/redis "
        assert node["command"][2].startswith(f"{rule} {server_command}")
        confs = [f"./storage/db/{conf}.conf:/etc/{conf}.conf:ro" for conf in ("redis", "redis-cluster")]
        assert node["volumes"] == [f"{name}:/data", *confs]
        assert ship["command"] == COMPOSE["ship"]["command"] and ship["healthcheck"] == COMPOSE["ship"]["healthcheck"]
        assert ship["volumes"] == [f"{name}:/data", *COMPOSE["ship"]["volumes"][1:]]
        environment = {**COMPOSE["ship"]["environment"], "IMAGEGRAM_REDIS_NODE": f"{name}:6379"}
        assert ship["environment"] == environment and ship["scale"] == 1
    assert set(COMPOSE["form"]["depends_on"]) == set(NODES)


def test_the_profile_cluster_runs_with_the_variables_of_the_docs():
    """Without a profile and variables, one Redis serves, and `ship` ships it."""
    page = (ROOT / "docs" / "production.md").read_text()
    block = re.search(r"COMPOSE_PROFILES=cluster\n(    .*\n)+", page)[0]
    variables = dict(line.strip().split("=", 1) for line in block.splitlines())
    known = settings.load({**variables, "IMAGEGRAM_REDIS_NODE": "node1:6379"})
    assert known.redis_url == f"redis+cluster://{','.join(NODES)}" and known.queue_url == "redis://redis:6379"
    assert known.redis_node == ("node1", 6379)
    assert COMPOSE["api"]["environment"]["IMAGEGRAM_REDIS_URL"] == "${IMAGEGRAM_REDIS_URL:-redis://redis:6379}"
    assert (COMPOSE["ship"]["scale"], variables["SHIP"]) == ("${SHIP:-1}", "0")


@pytest.fixture
def composed_nodes(tmp_path):
    """Six nodes with the options that docker-compose.yml gives them, at ports of this machine."""
    options = re.search("--protected-mode .*", COMPOSE["node1"]["command"][2])[0]
    options = options.replace('"$$(hostname -i)"', "127.0.0.1").split()
    started = []
    try:
        for number in range(6):
            started.append(ClusterNode("valkey", tmp_path / str(number), *options))
        yield started
    finally:
        for node in started:
            node.kill()


def test_a_composed_primary_hands_over_when_it_is_stopped_and_waits_for_its_restart_when_it_dies(composed_nodes):
    first, replica = composed_nodes[0], composed_nodes[3]
    db = Cluster("redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in composed_nodes))
    asyncio.run(forming.form(db, 3, 0, lambda line: None))
    assert replica.client.role()[0] == "slave"
    first.process.terminate()
    first.process.wait()
    until(lambda: replica.client.role()[0] == "master", 10, "it takes over")
    first.start()
    until(lambda: first.client.info("replication")["master_link_status"] == "up", 20, "the first one replicates")
    replica.kill()
    assert first.client.config_get("cluster-replica-no-failover") == {"cluster-replica-no-failover": "yes"}
    first.client.cluster("FAILOVER", "FORCE")
    until(lambda: first.client.role()[0] == "master", 20, "people can make it the primary")


def known_settings() -> set[str]:
    """All variables that storage/settings.py reads."""
    known = set(re.findall(r'(?:get|integer|one_of|store|redis|address)\("([A-Z_]+)"', SETTINGS))
    assert len(known) >= len(fields(settings.Settings)) - 1, "the search for settings still works"
    return {f"IMAGEGRAM_{name}" for name in known}


def test_compose_and_the_dockerfile_set_only_settings_that_exist():
    for text in ((ROOT / "docker-compose.yml").read_text(), DOCKERFILE):
        assert set(re.findall(r"IMAGEGRAM_[A-Z_]+", text)) <= known_settings()


def test_every_service_is_restarted_and_all_but_the_worker_have_a_health_check():
    """The worker serves no HTTP: its watchdog ends it when it hangs. The image has the health check of the API."""
    for name, service in COMPOSE.items():
        assert service["restart"] == "unless-stopped"
        if name == "worker":
            assert service["healthcheck"] == {"disable": True}
        elif name != "api":
            assert service["healthcheck"]["test"][0] == "CMD", name
    assert "healthcheck" not in COMPOSE["api"]
    assert re.search(r"^HEALTHCHECK .*(\n.*)?/healthz", DOCKERFILE, re.MULTILINE)


def test_each_part_has_the_volumes_it_needs():
    """The volumes have the layout of a data folder. The API reads the backup's state, a restore reads the store."""
    known = settings.load({"IMAGEGRAM_DATA": "/data"})
    assert known.data / "redis" == Path("/data/redis") and shipper_state.path(known).parent == Path("/data")
    assert COMPOSE["ship"]["volumes"] == ["data:/data", "backup:/backup", "store:/store:ro"]
    assert COMPOSE["api"]["volumes"] == ["data:/data:ro", "store:/store"]
    assert COMPOSE["worker"]["volumes"] == ["store:/store", "backup:/backup:ro"]
    assert "data:/data" in COMPOSE["redis"]["volumes"]
    assert "IMAGEGRAM_JWT_SECRET" in COMPOSE["api"]["environment"], "without one the API would write to /data"


def test_the_shipper_runs_as_the_user_who_owns_redis_files():
    """Only their owner may read the files of the valkey image. The owner's number is 999."""
    assert re.search(r"^USER 999$", DOCKERFILE, re.MULTILINE) and "user" not in COMPOSE["ship"]


def test_all_parts_use_the_same_store_and_the_same_backup_store():
    """Also the worker needs the backup store: it keeps the original of a deleted post while a backup names it."""
    for part in ("api", "worker", "ship"):
        assert COMPOSE[part]["image"] == "imagegram" and COMPOSE[part]["env_file"] == ".env"
        assert not {"IMAGEGRAM_STORE", "IMAGEGRAM_BACKUP_STORE"} & set(COMPOSE[part]["environment"])
    assert "IMAGEGRAM_STORE=file:///store IMAGEGRAM_BACKUP_STORE=file:///backup" in DOCKERFILE


def test_composes_redis_has_the_version_of_the_server_that_restore_and_verify_start():
    """No server reads the files of a newer version."""
    version = ".".join(map(str, server.identify(server.server_program(settings.load({}))).version))
    assert COMPOSE["redis"]["image"] == f"valkey/valkey:{version}-trixie"


def test_the_shippers_health_check_fails_without_a_shipper_and_when_it_lags(tmp_path):
    """Runs the check of docker-compose.yml in a data folder: without a shipper, with its lag at 0 s, and at 200 s."""
    kind, _, option, program = COMPOSE["ship"]["healthcheck"]["test"]
    assert kind == "CMD"
    known = settings.load({"IMAGEGRAM_DATA": str(tmp_path)})
    program = program.replace("/data", str(tmp_path))
    for caught, status in ((None, 1), (time.time(), 0), (time.time() - 200, 1)):
        if caught:
            shipper_state.path(known).write_text(json.dumps({"caught": caught}))
        assert subprocess.run([sys.executable, option, program]).returncode == status
