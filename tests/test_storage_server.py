"""The embedded server: its configuration is in force, and a data folder has one server, which it names."""

import os
import signal
import subprocess
import sys

import pytest
import redis
from conftest import ROOT, SERVERS, until
from state import files

from storage import settings
from storage.db import server


def settings_of(tmp_path, kind: str) -> settings.Settings:
    return settings.load({"IMAGEGRAM_DATA": str(tmp_path), "IMAGEGRAM_REDIS_SERVER": SERVERS[kind]})


@pytest.fixture(params=["valkey", "redis"])
def kind(request):
    return request.param


@pytest.fixture
def started(tmp_path):
    """Starts `imagegram-storage redis`. Returns the process and a client of its socket. May be called several times."""
    processes = []

    def start(kind: str):
        environment = {**os.environ, "IMAGEGRAM_DATA": str(tmp_path), "IMAGEGRAM_REDIS_SERVER": SERVERS[kind]}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "storage", "redis"], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
            )
        )
        return processes[-1], redis.Redis(unix_socket_path=f"{tmp_path}/redis/redis.sock", decode_responses=True)

    yield start
    for process in processes:
        process.kill()
        process.wait()


def test_the_configuration_is_in_force(started, kind):
    _, client = started(kind)
    until(client.ping)
    expected = {
        "appendonly": "yes",
        "appendfsync": "always",
        "no-appendfsync-on-rewrite": "no",
        "aof-timestamp-enabled": "yes",
        "save": "",
        "maxmemory-policy": "noeviction",
        "stream-node-max-bytes": "512",
        "hash-max-listpack-value": "8800",
        "port": "0",
    }
    assert {name: client.config_get(name)[name] for name in expected} == expected


def test_a_write_that_was_answered_survives_a_kill(started, kind):
    process, client = started(kind)
    until(client.ping)
    client.set("written", "yes")
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, client = started(kind)
    assert until(lambda: client.get("written")) == "yes"


def test_a_server_of_another_family_is_refused_in_one_line(tmp_path, started, kind):
    other = {"valkey": "redis", "redis": "valkey"}[kind]
    server.command(settings_of(tmp_path, kind))
    before = (tmp_path / "redis" / "server").read_text()
    process, _ = started(other)
    message = process.communicate(timeout=20)[1].strip()
    assert process.returncode == 1
    assert "\n" not in message and f"was written by {kind}" in message and f"start that or a newer {kind}" in message
    assert (tmp_path / "redis" / "server").read_text() == before


def test_an_older_version_is_refused_and_a_newer_one_is_written_down(tmp_path, kind):
    folder = tmp_path / "redis"
    mine = server.identify(SERVERS[kind])
    newer = mine._replace(version=(mine.version[0] + 1, 0, 0))
    server.claim_folder(folder, newer)
    with pytest.raises(SystemExit, match=f"was written by {newer}"):
        server.claim_folder(folder, mine)
    assert (folder / "server").read_text() == f"{newer}\n"
    server.claim_folder(folder, newer._replace(version=(99, 0, 0)))
    assert "99.0.0" in (folder / "server").read_text()


def test_a_folder_has_one_server_at_a_time(started, kind):
    first, client = started(kind)
    until(client.ping)
    client.bgrewriteaof()  # its child must not inherit the lock
    second, _ = started(kind)
    message = second.communicate(timeout=20)[1].strip()
    assert second.returncode == 1
    assert "\n" not in message and "is in use" in message
    assert client.info("server")["process_id"] == first.pid, "the socket still leads to the first server"
    first.kill()
    first.wait()
    started(kind)
    until(client.ping)


def test_check_refuses_a_folder_whose_server_runs_and_one_without_data(started, kind, tmp_path):
    environment = {**os.environ, "IMAGEGRAM_DATA": str(tmp_path), "IMAGEGRAM_REDIS_SERVER": SERVERS[kind]}

    def check(folder) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "storage", "check", "--folder", str(folder)]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

    process, client = started(kind)
    until(client.ping)
    refused = check(tmp_path / "redis")
    assert refused.returncode == 1 and "is in use" in refused.stderr
    assert client.ping()
    process.kill()
    process.wait()
    checked = check(tmp_path / "redis")
    assert checked.returncode == 0, checked.stderr
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "not there"):
        refused = check(folder)
        assert refused.returncode == 1 and "is not a data folder" in refused.stderr
    assert not list((tmp_path / "empty").iterdir()) and not (tmp_path / "not there").exists()


@pytest.mark.parametrize("text", [None, "", "valkey"])
def test_data_that_do_not_name_the_server_that_wrote_them_are_refused(tmp_path, kind, text):
    folder = tmp_path / "redis"
    (folder / "appendonlydir").mkdir(parents=True)
    if text is not None:
        (folder / "server").write_text(text)
    with pytest.raises(SystemExit, match="does not name its writer"):
        server.command(settings_of(tmp_path, kind))
    assert files(folder) == ({} if text is None else {"server": text.encode()})


def test_a_program_that_is_no_redis_server_is_refused(tmp_path):
    for path in ("/bin/true", str(tmp_path / "nothing")):
        with pytest.raises(SystemExit, match="IMAGEGRAM_REDIS_SERVER"):
            server.identify(path)


def test_a_data_folder_whose_path_is_too_long_for_a_socket_is_refused(tmp_path):
    deep = settings.load({"IMAGEGRAM_DATA": str(tmp_path / ("x" * 100))})
    with pytest.raises(SystemExit, match="IMAGEGRAM_DATA"):
        server.command(deep)
