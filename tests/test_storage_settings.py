"""A setting that cannot be used ends every command with one line that names the variable. Odd folder names work."""

import asyncio
import os
import subprocess
import sys

import pytest
from conftest import ROOT
from parts import make_settings, redis_on, restored, shipped, shipping, writing
from state import files

from storage import settings
from storage.db.client import Redis
from storage.objects import S3, Folder, open_store
from workers import dispatcher

COMMANDS = {
    "api": ["api"],
    "token": ["api", "token", "alice"],
    "welcome": ["api", "welcome"],
    "workers": ["workers"],
    "restore": ["storage", "restore", "--to", "restored"],
    **{name: ["storage", name] for name in ("redis", "ship", "snapshots", "verify", "check", "sweep", "retry")},
}
WRONG_STORES = [
    "",
    "foo",
    "s3://",
    "s3://b ucket/x",
    "s3://id:secret@bucket/x",
    "file:relative",
    "file://relative",
    "file://host/x",
    "file://[",
    "file:///a#b",
    "file:///a?b",
    "file:///a%00b",
    "file:///a%FFb",
    "file:///a\nb",
]
WRONG_REDIS_URLS = [
    "",
    "foo",
    "http://host",
    "redis://host:port",
    "redis://host:99999",
    "redis://host/name",
    "redis://[",
    "redis://ho\nst",
    "redis://host?no_such_option=1",
    "redis://:pass#word@host",
    "rediss://host?ssl_cert_reqs=foo",
    "unix://",
    "unix://relative/redis.sock",
    "unix:///a#b",
    "unix:///a?db=x",
    "redis+cluster://",
    "redis+cluster://h1,,h2",
    "redis+cluster://h1/0",
    "redis+cluster://h1:x,h2",
    "unix+cluster:///a",
]
WRONG_ORIGINS = [
    " ",
    ",",
    "app.example",
    "https://",
    "https://app.example/",
    "https://app.example/path",
    "https://app.example?",
    "https://me@app.example",
    "https://App.example",
    "HTTPS://app.example",
    "https://*.example",
    "https://app.example:443",
    "http://app.example:80",
    "http://app.example:",
    "http://app.example:0",
    "http://app.example:080",
    "http://app.example:65536",
    "http://app.example:http",
    "https://b\u00fccher.example",
    "https://app.example\r\nX-More: 1",
    "https://app.example\n",
    "https://app.example,",
    "https://app.example, ,http://localhost:5173",
    "https://app.example http://localhost:5173",
    "https://app.example;http://localhost:5173",
    "*,https://app.example",
    "**",
    "null",
    "https://app.example,null",
]
WRONG = {
    "CORS_ORIGINS": WRONG_ORIGINS,
    "STORE": WRONG_STORES,
    "BACKUP_STORE": WRONG_STORES,
    "REDIS_URL": WRONG_REDIS_URLS,
    "QUEUE_URL": [*WRONG_REDIS_URLS, "redis+cluster://h1,h2"],
    "REPLICAS": ["x", "-1", "17", ""],
    "HOT_COMMENTS": ["x", "1", "10001", ""],
    "QUIET_DAYS": ["x", "-1", "36501", ""],
    "SEGMENT_CACHE": ["x", "-1", "", "1.5"],
    "PORT": ["x", "-1", "65536", "٣", "9" * 5000, ""],
    "LOG": ["yaml", "JSON", ""],
    "WORKER_METRICS": ["x", "host:x", "127.0.0.1:65536", "a\nb:1", ":", "9101 "],
    "SHIP_METRICS": ["x"],
    "REDIS_NODE": ["x", "127.0.0.1:65536"],
    "SANDBOX": ["maybe", "required\n"],
    "DATA": ["", "/etc/passwd", "/tmp/\udcff"],
    "LIMITS": [
        "comment",
        "comment=60",
        "comment=0/m",
        "comment=60/w",
        "comment=60/m;post=1/m",
        "comment=60/m,comment=1/s",
        "comment=60/m,",
        "likes=1/s",
        "comment=1K/s",
        "comment=٣/m",
        "comment=99999999/s",
        "upload_bytes=100M/d",
        "upload_bytes=9999999G/d",
        " ",
    ],
    "PROXIES": ["", "10", "-1", "proxy", "10.0.0.1/8", "10.0.0.0/33", "10.0.0.1,", "fe80::1%eth0,x"],
    "JWKS_URL": [
        "foo",
        "http://login.example/keys",
        "http://192.0.2.1/keys",
        "http://127.0.0.1.example/keys",
        "ftp://localhost/keys",
        "file:///etc/passwd",
        "https://",
        "https://user:word@host/keys",
        "https://host:x/keys",
        "https://host:0/keys",
        "https://host/a b",
        "https://host/#a",
        "https://host\\@other/",
        "https://[::1/keys",
    ],
    "JWT_USER_CLAIM": ["", "a b", "é", "x" * 256],
    "JWT_ISSUER": ["\udcff"],
    "JWT_SECRET": ["word@host" * 4 + "\udcff"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_malformed_value_is_refused_in_one_line_that_shows_no_secret(name, value):
    with pytest.raises(SystemExit, match=f"^IMAGEGRAM_{name}[=:]") as ended:
        settings.load({f"IMAGEGRAM_{name}": value})
    assert str(ended.value).isprintable() and "word@host" not in str(ended.value)


ORIGINS = {
    "": (),
    "*": ("*",),
    "https://app.example": ("https://app.example",),
    "https://app.example,http://localhost:5173": ("https://app.example", "http://localhost:5173"),
    "http://[::1]:8080, capacitor://localhost ,https://xn--bcher-kva.example:444": (
        "http://[::1]:8080",
        "capacitor://localhost",
        "https://xn--bcher-kva.example:444",
    ),
}


@pytest.mark.parametrize("value", ORIGINS)
def test_origins_are_a_list_with_commas(value):
    assert settings.load({"IMAGEGRAM_CORS_ORIGINS": value}).cors_origins == ORIGINS[value]


def test_a_secret_and_an_identity_provider_exclude_each_other():
    with pytest.raises(SystemExit, match="^IMAGEGRAM_JWKS_URL: not together with IMAGEGRAM_JWT_SECRET$"):
        settings.load({"IMAGEGRAM_JWKS_URL": "https://login.example/keys", "IMAGEGRAM_JWT_SECRET": "x" * 32})
    for url in ("https://login.example/keys", "http://[::1]:8080/keys", "http://localhost/keys", "http://127.9.9.9/"):
        assert settings.load({"IMAGEGRAM_JWKS_URL": url}).jwks_url == url


def run_all(folder, commands, **variables) -> dict[str, tuple[int, str]]:
    """Runs commands at the same time. Returns the exit status and the stderr of each."""
    defaults = {"IMAGEGRAM_DATA": f"{folder}/data", "IMAGEGRAM_PORT": "0", "PYTHONPATH": str(ROOT)}
    environment = {"PATH": os.environ["PATH"], **defaults, **variables}
    running = {}
    for name in commands:
        command = [sys.executable, "-m", *COMMANDS[name]]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        running[name] = subprocess.Popen(command, cwd=folder, env=environment, **pipes)
    try:
        errors = {name: process.communicate(timeout=60)[1] for name, process in running.items()}
        return {name: (process.returncode, errors[name]) for name, process in running.items()}
    finally:
        for process in running.values():
            process.kill()
            process.wait()


def assert_refused_in_one_line(results: dict[str, tuple[int, str]], variable: str) -> None:
    for name, (status, error) in results.items():
        assert status == 1 and error.startswith(f"IMAGEGRAM_{variable}"), (name, status, error)
        assert error.count("\n") == 1, (name, error)


def test_every_command_refuses_a_malformed_value_in_one_line_and_writes_nothing(tmp_path):
    assert_refused_in_one_line(run_all(tmp_path, COMMANDS, IMAGEGRAM_REDIS_URL="foo"), "REDIS_URL")
    assert not list(tmp_path.iterdir())


def test_a_cluster_needs_another_redis_for_the_queue():
    environment = {"IMAGEGRAM_REDIS_URL": "rediss+cluster://user:word@h1:7000,h2"}
    with pytest.raises(SystemExit, match="IMAGEGRAM_QUEUE_URL"):
        settings.load(environment)
    assert settings.load({**environment, "IMAGEGRAM_QUEUE_URL": "redis://h3"}).replicas == 0


def test_a_store_that_is_a_file_is_refused_by_every_command_that_opens_it(tmp_path):
    (tmp_path / "file").write_text("kept")
    url, below = (tmp_path / "file").as_uri(), (tmp_path / "file" / "below").as_uri()
    commands = ("api", "workers", "restore", "verify", "check", "sweep")
    assert_refused_in_one_line(run_all(tmp_path, commands, IMAGEGRAM_STORE=url), "STORE")
    commands = ("workers", "restore", "ship", "snapshots", "verify", "sweep")
    assert_refused_in_one_line(run_all(tmp_path, commands, IMAGEGRAM_BACKUP_STORE=below), "BACKUP_STORE")
    assert (tmp_path / "file").read_text() == "kept"


def test_a_data_folder_that_cannot_be_created_is_refused(tmp_path):
    commands = [name for name in COMMANDS if name != "retry"]  # retry only connects to Redis
    assert_refused_in_one_line(run_all(tmp_path, commands, IMAGEGRAM_DATA="/proc/imagegram"), "DATA")
    assert not list(tmp_path.iterdir())


def test_files_of_the_data_folder_that_cannot_be_used_are_refused_and_stay(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "redis").write_text("a file")
    assert_refused_in_one_line(run_all(tmp_path, ["redis"]), "DATA")
    (tmp_path / "data" / "jwt-secret").write_bytes(b"\xff" * 40)
    assert_refused_in_one_line(run_all(tmp_path, ["api", "token", "welcome"]), "DATA")
    assert files(tmp_path) == {"data/redis": b"a file", "data/jwt-secret": b"\xff" * 40}


@pytest.mark.parametrize("program", ["/etc/passwd", "/tmp", "/bin/ls"])
def test_a_program_that_is_no_redis_server_is_refused_in_one_line(tmp_path, program):
    assert_refused_in_one_line(run_all(tmp_path, ["redis"], IMAGEGRAM_REDIS_SERVER=program), "REDIS_SERVER")
    assert files(tmp_path).keys() <= {"data/redis/lock"}


@pytest.mark.parametrize("host", ["no.such.host.invalid", "x" * 300, "256.1.1.1", "a b"])
def test_a_host_that_does_not_exist_is_refused_in_one_line(tmp_path, host):
    assert_refused_in_one_line(run_all(tmp_path, ["api"], IMAGEGRAM_HOST=host), "HOST")


def test_a_host_of_another_machine_is_refused_in_one_line(tmp_path):
    [(status, error)] = run_all(tmp_path, ["api"], IMAGEGRAM_HOST="192.0.2.1").values()  # RFC 5737: documentation
    assert status == 1 and error.endswith("Set IMAGEGRAM_HOST.\n") and error.count("\n") == 1


def test_unusable_aws_variables_are_refused_in_one_line(tmp_path):
    no_secret = {"AWS_ACCESS_KEY_ID": "without its secret"}
    results = run_all(tmp_path, ["api", "check"], IMAGEGRAM_STORE="s3://bucket/x", **no_secret)
    assert_refused_in_one_line(results, "STORE")
    no_boolean = {"AWS_ALLOW_HTTP": "perhaps"}
    results = run_all(tmp_path, ["ship"], IMAGEGRAM_BACKUP_STORE="s3://bucket", **no_boolean)
    assert_refused_in_one_line(results, "BACKUP_STORE")


def test_well_formed_store_urls_are_opened(tmp_path):
    assert isinstance(open_store((tmp_path / "a #b%20?é").as_uri()), Folder)
    assert (tmp_path / "a #b%20?é").is_dir()
    assert isinstance(open_store("s3://my_Bucket.1/some/prefix"), S3)


@pytest.mark.parametrize("name", ["a#b", "a%20b", "a?b", "a b", "aé", "a\"'\\b", "a\nb", "a@b:c"])
async def test_a_data_folder_with_odd_characters_in_its_name_works(tmp_path, name):
    chosen = make_settings(tmp_path / name, "", (tmp_path / name / "backup").as_uri())
    async with redis_on(chosen), shipping(chosen) as shipper:
        async with writing(chosen) as writers:
            await shipped(shipper)
        db = Redis(chosen.redis_url)
        await db.ping()
        await db.close()
        assert await asyncio.to_thread(dispatcher.queue(chosen.queue_url).connection.ping)
        await shipped(shipper)
    _, [numbers] = await restored(chosen, open_store(chosen.backup_store_url), writers, tmp_path)
    assert set(writers[0].answered) <= set(numbers)
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith("restored")] == [name]


@pytest.mark.parametrize("user", ["", "al ice", "alicé", "a" * 256, "a\n", "\udcff"])
def test_no_token_is_issued_for_a_user_name_that_the_api_would_refuse(tmp_path, user):
    command = [sys.executable, "-m", "api", "token", user]
    environment = {**os.environ, "IMAGEGRAM_DATA": str(tmp_path / "data")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "1 to 255 visible ASCII" in done.stderr and not (tmp_path / "data").exists()
