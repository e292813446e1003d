"""What is deployed is what is tested: the same commands and only settings that exist."""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import yaml

from storage import server, settings, ship

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


def test_the_shipper_only_reads_redis_files_and_the_api_reads_how_it_stands():
    assert "redis:/data/redis:ro" in COMPOSE["ship"]["volumes"] and "redis:/data" in COMPOSE["redis"]["volumes"]
    known = settings.load({"IMAGEGRAM_DATA": "/data"})
    assert str(ship.state_path(known).parent) == "/data"
    assert "shipping:/data" in COMPOSE["ship"]["volumes"] and "shipping:/data:ro" in COMPOSE["api"]["volumes"]
    assert "IMAGEGRAM_JWT_SECRET" in COMPOSE["api"]["environment"], "without one it would be written to /data"


def test_the_shipper_is_the_user_whose_files_it_reads():
    """Those of the valkey image are for their owner alone, whose number is 999."""
    assert re.search(r"^USER 999$", DOCKERFILE, re.MULTILINE) and "user" not in COMPOSE["ship"]


def test_all_parts_know_one_backup_store_whose_bucket_is_made():
    """The worker too: it keeps the originals of deleted posts as long as a backup names them."""
    (url,) = {COMPOSE[part]["environment"]["IMAGEGRAM_BACKUP_STORE"] for part in ("api", "worker", "ship")}
    bucket = re.search(r"s3://([a-z-]+)", url)[1]
    assert f"s3/{bucket}" in COMPOSE["bucket"]["command"][0].split()


def test_what_composes_redis_writes_the_server_of_restore_and_verify_reads():
    version = ".".join(map(str, server.identify(server.program(settings.load({}))).version))
    assert COMPOSE["redis"]["image"] == f"valkey/valkey:{version}-bookworm"


def test_the_shippers_health_is_its_lag(tmp_path):
    """The check as it stands, in a data folder with and without a shipper that has just caught up."""
    kind, _, *command = COMPOSE["ship"]["healthcheck"]["test"]
    assert kind == "CMD"
    known = settings.load({"IMAGEGRAM_DATA": str(tmp_path)})
    environ = {**os.environ, "IMAGEGRAM_DATA": str(tmp_path)}
    for caught, status in ((None, 1), (time.time(), 0), (time.time() - 200, 1)):
        if caught:
            ship.state_path(known).write_text(json.dumps({"caught": caught}))
        assert subprocess.run([sys.executable, *command], cwd=ROOT, env=environ).returncode == status
