"""The embedded server: the folder names who wrote it, and the configuration is in force."""

import os
import signal
import subprocess
import sys

import pytest
import redis
from conftest import ROOT, SERVERS, until

from storage import settings
from storage.db import server


def chosen(tmp_path, kind):
    return settings.load({"IMAGEGRAM_DATA": str(tmp_path), "IMAGEGRAM_REDIS_SERVER": SERVERS[kind]})


@pytest.fixture(params=["valkey", "redis"])
def kind(request):
    return request.param


@pytest.fixture
def started(tmp_path):
    """Starts `imagegram-storage redis` as often as asked."""
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
    wanted = {
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
    assert {name: client.config_get(name)[name] for name in wanted} == wanted


def test_what_was_written_is_there_after_a_kill(started, kind):
    process, client = started(kind)
    until(client.ping)
    client.set("kept", "yes")
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, client = started(kind)
    assert until(lambda: client.get("kept")) == "yes"


def test_another_family_is_refused_in_one_line(tmp_path, started, kind):
    other = {"valkey": "redis", "redis": "valkey"}[kind]
    server.command(chosen(tmp_path, kind))
    before = (tmp_path / "redis" / "server").read_text()
    process, _ = started(other)
    said = process.communicate(timeout=20)[1].strip()
    assert process.returncode == 1
    assert "\n" not in said and f"was written by {kind}" in said and f"start that or a newer {kind}" in said
    assert (tmp_path / "redis" / "server").read_text() == before


def test_an_older_version_is_refused_and_a_newer_one_signs(tmp_path, kind):
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
    client.bgrewriteaof()  # its child must not take the lock along
    second, _ = started(kind)
    said = second.communicate(timeout=20)[1].strip()
    assert second.returncode == 1
    assert "\n" not in said and "is in use" in said
    assert client.info("server")["process_id"] == first.pid  # the socket is still the first one's
    first.kill()
    first.wait()
    started(kind)
    until(client.ping)


def test_check_leaves_a_folder_alone_whose_server_runs_and_one_that_holds_no_data(started, kind, tmp_path):
    environment = {**os.environ, "IMAGEGRAM_DATA": str(tmp_path), "IMAGEGRAM_REDIS_SERVER": SERVERS[kind]}

    def check(folder):
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
    for nothing in (tmp_path / "empty", tmp_path / "not there"):
        refused = check(nothing)
        assert refused.returncode == 1 and "is not a data folder" in refused.stderr
    assert not list((tmp_path / "empty").iterdir()) and not (tmp_path / "not there").exists()


@pytest.mark.parametrize("text", [None, "", "valkey"])
def test_data_without_the_name_of_its_writer_is_nobodys_guess(tmp_path, kind, text):
    folder = tmp_path / "redis"
    (folder / "appendonlydir").mkdir(parents=True)
    if text is not None:
        (folder / "server").write_text(text)
    with pytest.raises(SystemExit, match="does not name its writer"):
        server.command(chosen(tmp_path, kind))
    assert (folder / "server").exists() == (text is not None)
    assert text is None or (folder / "server").read_text() == text


def test_what_is_no_server_is_refused(tmp_path):
    for path in ("/bin/true", str(tmp_path / "nothing")):
        with pytest.raises(SystemExit, match="IMAGEGRAM_REDIS_SERVER"):
            server.identify(path)


def test_a_folder_too_deep_for_a_socket_is_refused(tmp_path):
    deep = settings.load({"IMAGEGRAM_DATA": str(tmp_path / ("x" * 100))})
    with pytest.raises(SystemExit, match="IMAGEGRAM_DATA"):
        server.command(deep)
