"""What is deployed is what is tested: the same commands and only settings that exist."""

import re
from dataclasses import fields
from pathlib import Path

import yaml

from storage import server, settings

ROOT = Path(__file__).parent.parent
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
PROCFILE = dict(line.split(": ", 1) for line in (ROOT / "Procfile").read_text().splitlines())
DOCKERFILE = (ROOT / "Dockerfile").read_text()
CODE = "\n".join(path.read_text() for path in (ROOT / "storage").glob("*.py"))


def test_compose_runs_what_make_run_runs():
    for part in ("api", "worker", "ship"):
        assert "exec " + " ".join(COMPOSE[part]["command"]) == PROCFILE[part]


def test_redis_has_the_same_configuration_everywhere():
    assert "./storage/redis.conf:/etc/redis.conf:ro" in COMPOSE["redis"]["volumes"]
    assert COMPOSE["redis"]["command"][1] == "/etc/redis.conf"


def test_the_shipper_finds_redis_files_and_may_only_read_them():
    data = re.search(r"IMAGEGRAM_DATA=(\S+)", DOCKERFILE)[1]
    redis = COMPOSE["redis"]
    assert redis["command"][redis["command"].index("--dir") + 1] == "/data" and "redis:/data" in redis["volumes"]
    assert f"redis:{data}/redis:ro" in COMPOSE["ship"]["volumes"]
    assert re.search(r"^USER 999$", DOCKERFILE, re.MULTILINE) and "user" not in COMPOSE["ship"]


def test_the_api_reads_what_the_shipper_says_of_itself():
    data = re.search(r"IMAGEGRAM_DATA=(\S+)", DOCKERFILE)[1]
    assert f"ship:{data}" in COMPOSE["ship"]["volumes"] and f"ship:{data}:ro" in COMPOSE["api"]["volumes"]


def test_all_parts_know_one_backup_store_whose_bucket_is_made():
    """The worker too: it keeps the originals of deleted posts as long as a backup names them."""
    known = {COMPOSE[part]["environment"]["IMAGEGRAM_BACKUP_STORE"] for part in ("api", "worker", "ship")}
    (url,) = known
    bucket = re.search(r"s3://([a-z-]+)", url)[1]
    assert f"s3/{bucket}" in COMPOSE["bucket"]["command"][0].split()


def test_what_composes_redis_writes_the_servers_of_restore_and_verify_read():
    version = ".".join(map(str, server.identify(server.program(settings.load({}))).version))
    assert COMPOSE["redis"]["image"] == f"valkey/valkey:{version}-bookworm"


def test_only_settings_that_exist_are_set():
    known = set(re.findall(r'(?:get|integer)\("([A-Z_]+)"', CODE))
    assert len(known) >= len(fields(settings.Settings)) - 1
    for text in ((ROOT / "docker-compose.yml").read_text(), DOCKERFILE):
        assert set(re.findall(r"IMAGEGRAM_([A-Z_]+)", text)) <= known


def test_every_service_that_runs_on_is_looked_after():
    for name, service in COMPOSE.items():
        if name != "bucket":
            assert service["restart"] == "unless-stopped"
            assert name == "api" or "healthcheck" in service  # the API's is the image's
    assert "/healthz" in DOCKERFILE
