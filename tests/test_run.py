"""`make run` and the processes of the API: they start, end together, and find their data again."""

import os
import signal
import subprocess
import time

import httpx
import psutil
import pytest
from conftest import ROOT, Site, free_port, until
from making import jpeg

from api.tokens import mint
from storage import settings


class Run:
    """`make run` without its set-up, which has been done: the same Procfile under honcho, as a terminal has it."""

    def __init__(self, data):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        environment = {
            "PATH": os.environ["PATH"],
            "IMAGEGRAM_DATA": str(data),
            "IMAGEGRAM_PORT": str(self.port),
            "PYTHONUNBUFFERED": "1",
        }
        self.honcho = subprocess.Popen(
            [".venv/bin/honcho", "start"],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        until(lambda: httpx.get(f"{self.url}/readyz").status_code == 200, what="the API")
        secret = settings.signing_secret(settings.load(environment))
        self.user = {"Authorization": f"Bearer {mint(secret, 'alice')}"}
        self.parts = psutil.Process(self.honcho.pid).children(recursive=True)

    def part(self, *command: str) -> psutil.Process:
        return next(part for part in self.parts if part.cmdline()[1:] == list(command))

    def end(self) -> tuple[str, float]:
        """What it said, and how many seconds after `end` was called it had ended."""
        began = time.monotonic()
        said = self.honcho.communicate(timeout=30)[0]
        return said, time.monotonic() - began


@pytest.fixture
def start(tmp_path):
    runs = []

    def start():
        runs.append(Run(tmp_path / "data"))
        return runs[-1]

    yield start
    for run in runs:
        if run.honcho.poll() is None:
            os.killpg(run.honcho.pid, signal.SIGKILL)
        for part in run.parts:
            if part.is_running():
                part.kill()


def test_ctrl_c_ends_all_of_it_and_the_next_run_finds_the_data(start):
    run = start()
    sent = httpx.post(f"{run.url}/v1/posts", headers=run.user, files={"image": jpeg()})
    post = sent.json()["id"]
    until(lambda: httpx.get(f"{run.url}/v1/posts/{post}").json()["status"] == "ready", what="the image")
    os.killpg(run.honcho.pid, signal.SIGINT)  # as a terminal does
    _, seconds = run.end()
    assert seconds < 5
    assert not [part for part in run.parts if part.is_running() and part.status() != psutil.STATUS_ZOMBIE]
    again = start()
    assert httpx.get(f"{again.url}/v1/posts/{post}").json()["status"] == "ready"
    assert httpx.get(f"{again.url}/v1/images/{post}.jpg").status_code == 200
    os.killpg(again.honcho.pid, signal.SIGINT)
    again.end()


@pytest.mark.parametrize(("command", "name"), [("workers", "worker"), ("api", "api")])
def test_a_part_that_dies_ends_all_of_it_with_its_name(start, command, name):
    run = start()
    run.part("-m", command).kill()
    said, _ = run.end()
    assert run.honcho.returncode != 0
    assert f"{name}.1 stopped (rc=" in said
    assert not [part for part in run.parts if part.is_running() and part.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture
def site(embedded, tmp_path):
    """A site of two API processes, not started yet."""
    site = Site(embedded.url, tmp_path / "data", workers=2)
    yield site
    site.close()


def ended(process: subprocess.Popen) -> tuple[int, str]:
    """A process's status and what it wrote to stderr."""
    said = process.communicate(timeout=30)[1]
    return process.returncode, said


@pytest.mark.parametrize(
    ("number", "message"),
    [(signal.SIGTERM, "ended with status 0"), (signal.SIGKILL, "was ended by signal 9")],
    ids=["in order", "by a signal"],
)
def test_an_api_process_that_ends_by_itself_ends_the_api_with_a_message(site, number, message):
    api = site.api(stderr=subprocess.PIPE, text=True)
    first, second = psutil.Process(api.pid).children()
    first.send_signal(number)
    status, said = ended(api)
    assert status == 1
    assert f"api: process {first.pid} {message}" in said
    assert not second.is_running()


def test_an_api_that_is_stopped_ends_with_status_0_and_no_message(site):
    api = site.api(stderr=subprocess.PIPE, text=True)
    api.terminate()
    assert ended(api) == (0, "")
