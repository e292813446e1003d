"""What is deployed is what is tested: the same commands and only settings that exist."""

import json
import re
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from storage import settings
from storage.backup import state as shipper_state
from storage.db import server

ROOT = Path(__file__).parent.parent
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
PROCFILE = dict(line.split(": ", 1) for line in (ROOT / "Procfile").read_text().splitlines())
DOCKERFILE = (ROOT / "Dockerfile").read_text()
CODE = "\n".join(path.read_text() for path in (ROOT / "storage").glob("*.py"))


def test_compose_runs_what_make_run_runs():
    for part in ("api", "worker", "ship"):
        assert "exec .venv/bin/" + " ".join(COMPOSE[part]["command"]) == PROCFILE[part]


def test_redis_has_the_same_configuration_everywhere():
    assert "./storage/db/redis.conf:/etc/redis.conf:ro" in COMPOSE["redis"]["volumes"]
    assert "exec valkey-server /etc/redis.conf --dir /data/redis " in COMPOSE["redis"]["command"][2]


@pytest.mark.parametrize(
    ("found", "starts"), [((), True), (("redis",), True), (("redis.lost-20261124T120000Z", "redis.new"), False)]
)
def test_composes_redis_makes_its_folder_on_an_empty_volume_only(tmp_path, found, starts):
    """Where a restore was interrupted the folder is missing, and an empty Redis would hide it."""
    for name in found:
        (tmp_path / name).mkdir()
    command = COMPOSE["redis"]["command"][2].replace("$$", "$").replace("/data", str(tmp_path))
    command = command.replace("exec valkey-server /etc/redis.conf --dir", "cd")  # it fails as the server would
    command = command[: command.index(" --bind")]
    assert (subprocess.run(["sh", "-c", command], capture_output=True).returncode == 0) == starts
    assert (tmp_path / "redis").exists() == starts


def test_only_settings_that_exist_are_set():
    known = set(re.findall(r'(?:get|integer|one_of|store|redis)\("([A-Z_]+)"', CODE))
    assert len(known) >= len(fields(settings.Settings)) - 1
    for text in ((ROOT / "docker-compose.yml").read_text(), DOCKERFILE):
        assert set(re.findall(r"IMAGEGRAM_([A-Z_]+)", text)) <= known


def test_every_service_that_runs_on_is_looked_after():
    for name, service in COMPOSE.items():
        assert service["restart"] == "unless-stopped"
        assert name == "api" or "healthcheck" in service  # the API's is the image's
    assert "/healthz" in DOCKERFILE


def test_each_part_has_the_volumes_it_needs():
    """The layout is that of a data folder. The API reads how the backup stands, a restore what the store holds."""
    known = settings.load({"IMAGEGRAM_DATA": "/data"})
    assert known.data / "redis" == Path("/data/redis") and shipper_state.path(known).parent == Path("/data")
    assert COMPOSE["ship"]["volumes"] == ["data:/data", "backup:/backup", "store:/store:ro"]
    assert COMPOSE["api"]["volumes"] == ["data:/data:ro", "store:/store"]
    assert COMPOSE["worker"]["volumes"] == ["store:/store", "backup:/backup:ro"]
    assert "data:/data" in COMPOSE["redis"]["volumes"]
    assert "IMAGEGRAM_JWT_SECRET" in COMPOSE["api"]["environment"], "without one it would be written to /data"


def test_the_shipper_is_the_user_whose_files_it_reads():
    """Those of the valkey image are for their owner alone, whose number is 999."""
    assert re.search(r"^USER 999$", DOCKERFILE, re.MULTILINE) and "user" not in COMPOSE["ship"]


def test_all_parts_know_one_store_and_one_backup_store():
    """The worker too: it keeps the originals of deleted posts as long as a backup names them."""
    for part in ("api", "worker", "ship"):
        assert COMPOSE[part]["image"] == "imagegram" and COMPOSE[part]["env_file"] == ".env"
        assert not {"IMAGEGRAM_STORE", "IMAGEGRAM_BACKUP_STORE"} & set(COMPOSE[part]["environment"])
    assert "IMAGEGRAM_STORE=file:///store IMAGEGRAM_BACKUP_STORE=file:///backup" in DOCKERFILE


def test_what_composes_redis_writes_the_server_of_restore_and_verify_reads():
    version = ".".join(map(str, server.identify(server.server_program(settings.load({}))).version))
    assert COMPOSE["redis"]["image"] == f"valkey/valkey:{version}-trixie"


def test_the_shippers_health_is_its_lag(tmp_path):
    """The check as it stands, in a data folder with and without a shipper that has just caught up."""
    kind, _, option, program = COMPOSE["ship"]["healthcheck"]["test"]
    assert kind == "CMD"
    known = settings.load({"IMAGEGRAM_DATA": str(tmp_path)})
    program = program.replace("/data", str(tmp_path))
    for caught, status in ((None, 1), (time.time(), 0), (time.time() - 200, 1)):
        if caught:
            shipper_state.path(known).write_text(json.dumps({"caught": caught}))
        assert subprocess.run([sys.executable, option, program]).returncode == status
