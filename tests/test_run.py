"""`make run` and the processes of the API: they start, end together, and find their data again."""

import os
import re
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest
from conftest import ROOT, Site, free_port, until
from making import jpeg

from api.tokens import mint
from storage import settings


def makefile(folder: Path) -> Path:
    """A Makefile whose `run` is the last line of ours: the lines above it set up what the tests have already."""
    lines = (ROOT / "Makefile").read_text().splitlines()
    first = lines.index(next(line for line in lines if line.startswith("run:")))
    made = folder / "run.mk"
    made.write_text(f"{lines[0]}\nrun:\n{lines[lines.index('', first) - 1]}\n")
    return made


class Run:
    """`make run` without its set-up, as a terminal has it."""

    def __init__(self, data, folder=ROOT, port=None, stdout=subprocess.PIPE):
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),  # the code beside this test, also where several checkouts share one .venv
            "IMAGEGRAM_DATA": str(data),
            "IMAGEGRAM_PORT": str(self.port),
            "PYTHONUNBUFFERED": "1",
        }
        self.make = subprocess.Popen(
            ["make", "-f", str(makefile(data.parent)), "run"],
            cwd=folder,
            env=self.environment,
            stdout=stdout,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        until(lambda: httpx.get(f"{self.url}/readyz").status_code == 200, what="the API")
        self.user = {"Authorization": f"Bearer {mint(settings.load(self.environment), 'alice')}"}
        (self.keeper,) = psutil.Process(self.make.pid).children()
        (self.honcho,) = self.keeper.children()
        self.parts = psutil.Process(self.make.pid).children(recursive=True)

    def part(self, *command: str) -> psutil.Process:
        return next(part for part in self.parts if part.cmdline()[1:] == list(command))

    def end(self) -> tuple[str, float]:
        """What it said, and how many seconds after `end` was called it had ended."""
        began = time.monotonic()
        said = self.make.communicate(timeout=30)[0]
        return said, time.monotonic() - began

    def left(self) -> list[psutil.Process]:
        found = []
        for part in self.parts:
            with suppress(psutil.NoSuchProcess):
                if part.is_running() and part.status() != psutil.STATUS_ZOMBIE:
                    found.append(part)
        return found


@pytest.fixture
def start(tmp_path):
    runs = []

    def start(**given):
        runs.append(Run(tmp_path / "a #b%20?=é", **given))  # characters with a meaning in URLs
        return runs[-1]

    yield start
    for run in runs:
        if run.make.poll() is None:
            os.killpg(run.make.pid, signal.SIGKILL)
        for part in run.parts:
            if part.is_running():
                part.kill()


def test_ctrl_c_ends_all_of_it_and_the_next_run_finds_the_data(start):
    run = start()
    sent = httpx.post(f"{run.url}/v1/posts", headers=run.user, files={"image": jpeg()})
    post = sent.json()["id"]
    until(lambda: httpx.get(f"{run.url}/v1/posts/{post}").json()["status"] == "ready", what="the image")
    os.killpg(run.make.pid, signal.SIGINT)  # as a terminal does
    _, seconds = run.end()
    assert seconds < 5
    assert not run.left()
    again = start()
    assert httpx.get(f"{again.url}/v1/posts/{post}").json()["status"] == "ready"
    assert httpx.get(f"{again.url}/v1/images/{post}.jpg").status_code == 200
    names_the_processes_in_its_way(again)
    os.killpg(again.make.pid, signal.SIGINT)
    again.end()


def names_the_processes_in_its_way(run):
    """What a second run of the same data and port says of the first."""

    def said(*command: str) -> str:
        command = [".venv/bin/python", "-m", *command]
        done = subprocess.run(command, cwd=ROOT, env=run.environment, capture_output=True, text=True, timeout=20)
        assert done.returncode == 1
        return done.stderr

    (redis,) = (part for part in run.left() if "valkey" in part.name())
    assert f"redis is in use by process {redis.pid}: stop it" in said("storage", "redis")
    serving = [part.pid for part in run.left() if any(line.status == "LISTEN" for line in part.net_connections("tcp"))]
    assert f"already in use by process {' and '.join(map(str, sorted(serving)))}. End it" in said("api")


def kill_honcho(run):
    run.part(".venv/bin/imagegram-worker").suspend()  # and this part does not heed SIGTERM
    run.honcho.kill()


KILLS = {
    "honcho": kill_honcho,
    "the keeper": lambda run: run.keeper.kill(),
    "make": lambda run: run.make.kill(),
    "the job of the terminal": lambda run: os.killpg(run.make.pid, signal.SIGKILL),
}


def test_whatever_of_it_is_killed_all_of_it_ends_and_the_next_run_goes_on_with_the_same_port_and_data(start):
    """One run after the other on one folder, so that each also shows that the one before left nothing."""
    port, made = None, []
    for what, kill in KILLS.items():
        run = start(port=port)
        port = run.port
        for post in made:
            assert httpx.get(f"{run.url}/v1/posts/{post}").status_code == 200
        sent = httpx.post(f"{run.url}/v1/posts", headers=run.user, files={"image": jpeg()})
        made.append(sent.json()["id"])
        kill(run)
        until(lambda run=run: not run.left(), 8, f"the end of all parts when {what} was killed")
    run = start(port=port)
    for post in made:  # one that was being made when its worker was killed is handed out again after a minute
        until(lambda post=post: httpx.get(f"{run.url}/v1/posts/{post}").json()["status"] == "ready", 80, "the image")
    os.killpg(run.make.pid, signal.SIGINT)
    run.end()


@pytest.mark.parametrize("output", [os.openpty, os.pipe], ids=["terminal", "pipe"])
def test_when_its_terminal_or_the_reader_of_its_output_is_gone_all_of_it_ends(start, output):
    """honcho fails then at the first line that it writes, and ends nothing."""
    ours, its = output()
    run = start(stdout=its)
    os.close(its)
    os.close(ours)
    until(lambda: not run.left(), 20, "the end of all parts")


def test_a_second_shipper_of_the_same_data_is_refused_and_the_first_goes_on(start):
    run = start()
    told = subprocess.run([".venv/bin/imagegram-storage", "ship"], cwd=ROOT, env=run.environment, capture_output=True)
    shipper = run.part(".venv/bin/imagegram-storage", "ship")
    assert told.returncode == 1 and f"is in use by process {shipper.pid}: stop it".encode() in told.stderr
    assert told.stderr.count(b"\n") == 1 and shipper.is_running()


@pytest.mark.parametrize("name", ["worker", "api"])
def test_a_part_that_dies_ends_all_of_it_with_its_name(start, name):
    run = start()
    run.part(f".venv/bin/imagegram-{name}").kill()
    said, _ = run.end()
    assert run.make.returncode != 0
    assert f"{name}.1 stopped (rc=" in said
    assert not run.left()


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
    assert f"ERROR imagegram.api: process {first.pid} {message}" in said
    assert not second.is_running()


def test_an_api_that_is_stopped_ends_with_status_0_and_no_message(site):
    api = site.api(stderr=subprocess.PIPE, text=True)
    api.terminate()
    status, said = ended(api)
    assert status == 0 and re.fullmatch(r"INFO imagegram\.api: http://\S+, \d+ processes\n", said)


def test_an_api_that_is_stopped_while_it_starts_ends_with_status_0_and_no_message(site):
    api = site.start("api", stderr=subprocess.PIPE, text=True)
    # Both processes are there and do not serve yet.
    assert api.stderr.readline().startswith("INFO imagegram.api: http://")
    api.terminate()
    assert ended(api) == (0, "")


def test_a_second_site_on_the_same_port_is_refused_in_one_line(site, embedded, tmp_path):
    site.api()
    for host in ("127.0.0.1", "0.0.0.0"):
        other = Site(embedded.url, tmp_path / "other", port=site.port, host=host)
        site.processes.append(other.start("api", stderr=subprocess.PIPE, text=True))
        status, said = ended(site.processes[-1])
        assert status == 1
        # A socket bound to all addresses and one bound to one are in each other's way.
        holders = " and ".join(str(child.pid) for child in psutil.Process(site.processes[0].pid).children())
        assert said == (
            f"api: cannot listen on {host}:{site.port}: Address already in use by process {holders}. "
            "End it or set IMAGEGRAM_PORT.\n"
        )
    assert httpx.get(f"{site.url}/readyz").status_code == 200


def test_of_sites_that_start_on_one_port_at_the_same_moment_one_is_served(embedded, tmp_path):
    port = free_port()
    sites = [Site(embedded.url, tmp_path / name, port=port, workers=2) for name in ("one", "two", "three")]
    try:
        started = [site.start("api", stderr=subprocess.PIPE, text=True) for site in sites]
        until(lambda: sum(process.poll() is not None for process in started) == 2, what="two to be refused")
        until(lambda: httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200, what="the API")
        refused = [ended(process) for process in started if process.poll() is not None]
        assert [status for status, _ in refused] == [1, 1]
        assert all(said.count("\n") == 1 and str(port) in said for _, said in refused)
    finally:
        for site in sites:
            site.close()


def test_a_port_of_0_is_one_port_for_all_processes(site):
    site.environment["IMAGEGRAM_PORT"] = "0"
    api = site.start("api", stderr=subprocess.PIPE, text=True)
    port = int(api.stderr.readline().split()[2].rsplit(":", 1)[1].rstrip(","))
    until(lambda: httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200, what="the API")
    for child in psutil.Process(api.pid).children():
        assert [line.laddr.port for line in child.net_connections("tcp") if line.status == "LISTEN"] == [port]


def test_an_address_of_another_machine_is_refused_in_one_line(site):
    site.environment["IMAGEGRAM_HOST"] = "192.0.2.1"  # RFC 5737: no machine has it
    status, said = ended(site.start("api", stderr=subprocess.PIPE, text=True))
    assert (status, said.count("\n")) == (1, 1)
    assert said.startswith(f"api: cannot listen on 192.0.2.1:{site.port}: ")


def test_a_token_that_needs_a_new_secret_says_so(tmp_path):
    """In a wrong folder it would be of no use: the site has a secret of its own."""
    environment = {"PATH": os.environ["PATH"], "IMAGEGRAM_DATA": str(tmp_path)}
    command = [".venv/bin/python", "-m", "api", "token", "alice"]
    first, second = (subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True) for _ in "12")
    assert first.stderr == f"made a new signing secret, {tmp_path}/jwt-secret\n" and second.stderr == ""
    assert first.stdout.count(".") == second.stdout.count(".") == 2
