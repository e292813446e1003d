"""`make run` and the processes of the API: they start, end together, and find their data again at the next start."""

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
    """A Makefile whose target `run` has only the last line of the real one. The lines above it are the set-up."""
    lines = (ROOT / "Makefile").read_text().splitlines()
    first = lines.index(next(line for line in lines if line.startswith("run:")))
    short = folder / "run.mk"
    short.write_text(f"{lines[0]}\nrun:\n{lines[lines.index('', first) - 1]}\n")
    return short


class Run:
    """`make run` without its set-up, in a session of its own, as a terminal starts it."""

    def __init__(self, data, folder=ROOT, port=None, stdout=subprocess.PIPE):
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),  # the code of this checkout, even if several checkouts share one .venv
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
        for part in self.parts:
            with suppress(psutil.NoSuchProcess):  # a child that has ended, such as the one that rewrites the AOF
                if part.cmdline()[1:] == list(command):
                    return part
        raise AssertionError(f"no process runs {command}")

    def end(self) -> tuple[str, float]:
        """Waits until `make` has ended. Returns its output, and how many seconds it took."""
        began = time.monotonic()
        output = self.make.communicate(timeout=30)[0]
        return output, time.monotonic() - began

    def running(self) -> list[psutil.Process]:
        """The processes that still run."""
        running = []
        for part in self.parts:
            with suppress(psutil.NoSuchProcess):
                if part.is_running() and part.status() != psutil.STATUS_ZOMBIE:
                    running.append(part)
        return running


@pytest.fixture
def start(tmp_path):
    runs = []

    def start(**given):
        runs.append(Run(tmp_path / "a #b%20?=é", **given))  # a path with characters that have a meaning in URLs
        return runs[-1]

    yield start
    for run in runs:
        if run.make.poll() is None:
            os.killpg(run.make.pid, signal.SIGKILL)
        for part in run.parts:
            if part.is_running():
                part.kill()


def test_ctrl_c_ends_all_processes_and_the_next_run_finds_the_data(start):
    run = start()
    answer = httpx.post(f"{run.url}/v1/posts", headers=run.user, files={"image": jpeg()})
    post = answer.json()["id"]
    until(lambda: httpx.get(f"{run.url}/v1/posts/{post}").json()["status"] == "ready", what="the image")
    os.killpg(run.make.pid, signal.SIGINT)  # as a terminal does
    _, seconds = run.end()
    assert seconds < 5
    assert not run.running()
    again = start()
    assert httpx.get(f"{again.url}/v1/posts/{post}").json()["status"] == "ready"
    assert httpx.get(f"{again.url}/v1/images/{post}.jpg").status_code == 200
    check_that_a_second_run_names_the_processes_of(again)
    os.killpg(again.make.pid, signal.SIGINT)
    again.end()


def check_that_a_second_run_names_the_processes_of(run):
    """Redis and the API of a second run, on the same data and port, refuse to start."""

    def error_of(*command: str) -> str:
        command = [".venv/bin/python", "-m", *command]
        done = subprocess.run(command, cwd=ROOT, env=run.environment, capture_output=True, text=True, timeout=20)
        assert done.returncode == 1
        return done.stderr

    (redis,) = (part for part in run.running() if "valkey" in part.name())
    assert f"redis is in use by process {redis.pid}: stop it" in error_of("storage", "redis")
    listening = [part for part in run.running() if any(one.status == "LISTEN" for one in part.net_connections("tcp"))]
    serving = " and ".join(str(pid) for pid in sorted(part.pid for part in listening))
    assert f"already in use by process {serving}. End it" in error_of("api")


def kill_honcho(run):
    run.part(".venv/bin/imagegram-worker").suspend()  # now it does not react to SIGTERM
    run.honcho.kill()


KILLS = {
    "honcho": kill_honcho,
    "the keeper": lambda run: run.keeper.kill(),
    "make": lambda run: run.make.kill(),
    "the job of the terminal": lambda run: os.killpg(run.make.pid, signal.SIGKILL),
}


def test_whichever_parent_process_is_killed_all_processes_end_and_the_next_run_goes_on(start):
    """All runs use one folder and one port, so that each run also shows that the one before left nothing behind."""
    port, posts = None, []
    for what, kill in KILLS.items():
        run = start(port=port)
        port = run.port
        for post in posts:
            assert httpx.get(f"{run.url}/v1/posts/{post}").status_code == 200
        answer = httpx.post(f"{run.url}/v1/posts", headers=run.user, files={"image": jpeg()})
        posts.append(answer.json()["id"])
        kill(run)
        until(lambda run=run: not run.running(), 8, f"the end of all processes after the kill of {what}")
    run = start(port=port)
    for post in posts:  # an image whose worker was killed is given to a worker again after a minute
        until(lambda post=post: httpx.get(f"{run.url}/v1/posts/{post}").json()["status"] == "ready", 80, "the image")
    os.killpg(run.make.pid, signal.SIGINT)
    run.end()


@pytest.mark.parametrize("output", [os.openpty, os.pipe], ids=["terminal", "pipe"])
def test_when_its_terminal_or_the_reader_of_its_output_closes_all_processes_end(start, output):
    """honcho alone would not do this. It fails at the first line that it writes, and leaves its processes running."""
    reading, writing = output()
    run = start(stdout=writing)
    os.close(writing)
    os.close(reading)
    until(lambda: not run.running(), 20, "the end of all processes")


def test_a_second_shipper_of_the_same_data_is_refused_and_the_first_goes_on(start):
    run = start()
    second = subprocess.run([".venv/bin/imagegram-storage", "ship"], cwd=ROOT, env=run.environment, capture_output=True)
    shipper = run.part(".venv/bin/imagegram-storage", "ship")
    assert second.returncode == 1 and f"is in use by process {shipper.pid}: stop it".encode() in second.stderr
    assert second.stderr.count(b"\n") == 1 and shipper.is_running()


@pytest.mark.parametrize("name", ["worker", "api"])
def test_when_one_process_dies_all_end_and_the_output_names_it(start, name):
    run = start()
    run.part(f".venv/bin/imagegram-{name}").kill()
    output, _ = run.end()
    assert run.make.returncode != 0
    assert f"{name}.1 stopped (rc=" in output
    assert not run.running()


@pytest.fixture
def site(embedded, tmp_path):
    """A site of two API processes, not started yet."""
    site = Site(embedded.url, tmp_path / "data", workers=2)
    yield site
    site.close()


def wait_for_end(process: subprocess.Popen) -> tuple[int, str]:
    """Waits until a process has ended. Returns its status and what it wrote to stderr."""
    errors = process.communicate(timeout=30)[1]
    return process.returncode, errors


@pytest.mark.parametrize(
    ("number", "message"),
    [(signal.SIGTERM, "ended with status 0"), (signal.SIGKILL, "was ended by signal 9")],
    ids=["with status 0", "by a signal"],
)
def test_when_a_process_of_the_api_ends_by_itself_the_whole_api_ends_with_a_message(site, number, message):
    api = site.api(stderr=subprocess.PIPE, text=True)
    first, second = psutil.Process(api.pid).children()
    first.send_signal(number)
    status, errors = wait_for_end(api)
    assert status == 1
    assert f"ERROR imagegram.api: process {first.pid} {message}" in errors
    assert not second.is_running()


def test_an_api_that_is_stopped_ends_with_status_0_and_no_message(site):
    api = site.api(stderr=subprocess.PIPE, text=True)
    api.terminate()
    status, errors = wait_for_end(api)
    assert status == 0 and re.fullmatch(r"INFO imagegram\.api: http://\S+, \d+ processes\n", errors)


def test_an_api_that_is_stopped_while_it_starts_ends_with_status_0_and_no_message(site):
    api = site.start("api", stderr=subprocess.PIPE, text=True)
    # Both processes are there and do not serve yet.
    assert api.stderr.readline().startswith("INFO imagegram.api: http://")
    api.terminate()
    assert wait_for_end(api) == (0, "")


def test_a_second_api_on_the_same_port_ends_with_one_line_that_names_the_first(site, embedded, tmp_path):
    site.api()
    for host in ("127.0.0.1", "0.0.0.0"):
        other = Site(embedded.url, tmp_path / "other", port=site.port, host=host)
        site.processes.append(other.start("api", stderr=subprocess.PIPE, text=True))
        status, errors = wait_for_end(site.processes[-1])
        assert status == 1
        # A socket that is bound to all addresses conflicts with a socket that is bound to one of them.
        holders = " and ".join(str(child.pid) for child in psutil.Process(site.processes[0].pid).children())
        assert errors == (
            f"api: cannot listen on {host}:{site.port}: Address already in use by process {holders}. "
            "End it or set IMAGEGRAM_PORT.\n"
        )
    assert httpx.get(f"{site.url}/readyz").status_code == 200


def test_of_three_apis_that_start_on_one_port_at_the_same_time_exactly_one_serves(embedded, tmp_path):
    port = free_port()
    sites = [Site(embedded.url, tmp_path / name, port=port, workers=2) for name in ("one", "two", "three")]
    try:
        started = [site.start("api", stderr=subprocess.PIPE, text=True) for site in sites]
        until(lambda: sum(process.poll() is not None for process in started) == 2, what="the end of two of them")
        until(lambda: httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200, what="the API")
        refused = [wait_for_end(process) for process in started if process.poll() is not None]
        assert [status for status, _ in refused] == [1, 1]
        assert all(errors.count("\n") == 1 and str(port) in errors for _, errors in refused)
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


def test_an_address_of_another_machine_ends_the_api_with_one_line(site):
    site.environment["IMAGEGRAM_HOST"] = "192.0.2.1"  # RFC 5737: no machine has it
    status, errors = wait_for_end(site.start("api", stderr=subprocess.PIPE, text=True))
    assert (status, errors.count("\n")) == (1, 1)
    assert errors.startswith(f"api: cannot listen on 192.0.2.1:{site.port}: ")


def test_the_token_command_reports_when_it_makes_a_new_secret(tmp_path):
    """A token from a wrong data folder would be refused, because the site has another secret."""
    environment = {"PATH": os.environ["PATH"], "IMAGEGRAM_DATA": str(tmp_path)}
    command = [".venv/bin/python", "-m", "api", "token", "alice"]
    first, second = (subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True) for _ in "12")
    assert first.stderr == f"made a new signing secret, {tmp_path}/jwt-secret\n" and second.stderr == ""
    assert first.stdout.count(".") == second.stdout.count(".") == 2
