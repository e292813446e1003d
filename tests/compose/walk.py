"""The walk: a fresh clone, the README's commands, kills under writers, a new address, TLS, and the restore drill."""

import asyncio
import contextlib
import http.client
import io
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
import traceback
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import httpx
from PIL import Image

from tests.compose.engine import ROOT, run
from tests.http3 import Http3

PORT = 8000
# The commands of the README and the docs may use only these: Docker, curl, openssl, and what every Linux has.
TOOLS = [
    *("docker", "curl", "openssl"),
    *("sh", "cat", "cp", "chmod", "chown", "mkdir", "head", "base64", "sleep", "grep", "cut", "sed", "date", "dirname"),
]
PARTS = ["redis", "api", "worker", "ship", "front"]
# `up --wait` waits until these are healthy. The worker has no health check.
HEALTH = {**dict.fromkeys(PARTS, "healthy"), "worker": ""}
WATCHDOG = 5  # seconds; 30 by default
RETRY = 0.1  # seconds between two tries of a writer
STEPS: list[tuple[str, float]] = []  # those that passed: name, seconds


@contextlib.contextmanager
def step(name: str):
    """Prints the name and the time of a step when it has passed."""
    began = time.monotonic()
    yield
    STEPS.append((name, time.monotonic() - began))
    print(f"{STEPS[-1][1]:6.1f} s  {name}", flush=True)


def clone(target: Path) -> None:
    run("git", "clone", "-q", ROOT, target)


def until(condition, seconds: float, what: str):
    """Calls `condition` until its result is true, and returns that. Raises AssertionError after `seconds` s."""
    end = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < end, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.05)
    return result


class Project:
    """A clone of the repository, and a shell in it that has only TOOLS, for the commands of the docs."""

    def __init__(self, folder: Path, tools: Path, name: str | None = None):
        self.folder = folder
        names = ("HOME", "DOCKER_HOST", "DOCKER_CONFIG", "DOCKER_BUILDKIT")
        self.env = {key: os.environ[key] for key in names if key in os.environ} | {"PATH": str(tools)}
        if name:
            self.env["COMPOSE_PROJECT_NAME"] = name

    def shell(self, script: str) -> str:
        """Returns the output of a script. Raises AssertionError with the output if the script fails."""
        return run(shutil.which("bash"), "-euo", "pipefail", "-c", script, cwd=self.folder, env=self.env)

    def succeeds(self, script: str) -> bool:
        """Whether a script ends with status 0 and prints something."""
        with contextlib.suppress(AssertionError):
            return bool(self.shell(script))
        return False

    def fails(self, script: str) -> str:
        """Asserts that a script fails. Returns the end of its output."""
        try:
            self.shell(script)
        except AssertionError as error:
            return str(error)
        raise AssertionError(f"{script} did not fail")

    def compose(self, *words: str) -> str:
        return run("docker", "compose", *words, cwd=self.folder, env=os.environ | self.env)

    def container(self, service: str) -> str:
        return self.compose("ps", "-aq", service).strip()

    def inspect(self, service: str) -> dict:
        return json.loads(run("docker", "inspect", self.container(service)))[0]

    def pid(self, service: str) -> int:
        """The container's first process; 0 if it does not run."""
        return self.inspect(service)["State"]["Pid"]


def blocks(page: str, word: str) -> list[str]:
    """The code blocks of a page from the first block that contains a word to the end of its section.

    A block is indented or fenced. A section ends at `## `.
    """
    for section in re.split(r"^## ", (ROOT / page).read_text(), flags=re.MULTILINE):
        matches = re.findall(r"^```sh\n([\s\S]*?)^```|((?:^    .*\n)+)", section, re.MULTILINE)
        texts = ["\n".join(line.removeprefix("    ") for line in (a or b).splitlines()) for a, b in matches]
        for index, text in enumerate(texts):
            if word in text:
                return texts[index:]
    raise AssertionError(f"{page} has no block of commands with {word!r}")


def call(method: str, path: str, token: str = "", body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    """Sends a request to the front. In the names of headers _ stands for -. Returns status and body."""
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=10)
    try:
        fields = {name.replace("_", "-"): value for name, value in headers.items()}
        if token:
            fields["Authorization"] = f"Bearer {token}"
        connection.request(method, path, body, fields)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def get(path: str) -> dict:
    status, body = call("GET", path)
    assert status == 200, (path, status, body)
    return json.loads(body)


def items(path: str):
    """All items of a list, page by page."""
    cursor = ""
    while cursor is not None:
        page = get(f"{path}?limit=100{cursor and '&cursor=' + cursor}")
        yield from page["items"]
        cursor = page["next"]


def jpeg() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (640, 480), "teal").save(file, "JPEG")
    return file.getvalue()


class Writers:
    """Users who repeat each call with its Idempotency-Key until it succeeds. Records all tries and answers."""

    def __init__(self, tokens: list[str]):
        self.tries: list[tuple[str, float, float, bool]] = []  # kind, began, ended, whether it succeeded
        self.comments: dict[str, str] = {}  # those acknowledged: id and text
        self.posts: dict[str, str] = {}  # those acknowledged: id and caption
        self.pending: dict[str, float] = {}  # posts without a picture yet: id, and when the first try began
        self.faults: list[str] = []  # what ended a writer
        self.ended = threading.Event()
        self.image = jpeg()
        self.publish(tokens[0], "the first")
        (self.post,) = self.pending
        self.wait_for_images(30, "the first image")
        turns = [
            (self.comment, tokens[0]),
            (self.comment, tokens[1]),
            (self.feed, ""),
            (self.publish, tokens[2]),
            (self.read_pending, ""),
        ]
        self.threads = [threading.Thread(target=self.repeat, args=turn) for turn in turns]
        for thread in self.threads:
            thread.start()

    def repeat(self, turn, token: str) -> None:
        """Takes turns until `close`. Each has a text of its own."""
        number = 0
        try:
            while not self.ended.is_set():
                turn(token, f"{turn.__name__} {token[-8:]} {number}")
                number += 1
                time.sleep(0.02)  # so that all writers together stay below the front's 200 requests a second
        except Exception as error:
            self.faults.append(f"{turn.__name__}: {error!r}")

    def send_until_success(self, kind: str, *request, **headers) -> dict:
        """Repeats a request until it succeeds. Raises AssertionError if the answer is a 4xx other than 429."""
        for _ in range(600):
            began = time.monotonic()
            try:
                status, body = call(*request, **headers)
            except (OSError, http.client.HTTPException):
                status, body = 0, b""
            self.tries.append((kind, began, time.monotonic(), 200 <= status < 300))
            if 200 <= status < 300:
                return json.loads(body)
            assert status in (0, 429, 502, 503, 504), (request[:2], status, body)
            time.sleep(RETRY)
        raise AssertionError(f"{request[:2]}: no success in 600 tries")

    def comment(self, token: str, text: str) -> None:
        body = json.dumps({"text": text}).encode()
        headers = {"Idempotency_Key": text.replace(" ", "-"), "Content_Type": "application/json"}
        path = f"/v1/posts/{self.post}/comments"
        created = self.send_until_success("comment", "POST", path, token, body, **headers)
        self.comments[created["id"]] = text

    def feed(self, token: str, _: str) -> None:
        self.send_until_success("feed", "GET", "/v1/posts")

    def publish(self, token: str, caption: str) -> None:
        before_image = (
            f'--frontier\r\nContent-Disposition: form-data; name="caption"\r\n\r\n{caption}\r\n--frontier\r\n'
            'Content-Disposition: form-data; name="image"; filename="a.jpg"\r\n\r\n'
        )
        body = before_image.encode() + self.image + b"\r\n--frontier--\r\n"
        headers = {
            "Idempotency_Key": caption.replace(" ", "-"),
            "Content_Type": "multipart/form-data; boundary=frontier",
        }
        began = time.monotonic()
        created = self.send_until_success("post", "POST", "/v1/posts", token, body, **headers)
        self.posts[created["id"]] = caption
        self.pending[created["id"]] = began
        self.ended.wait(0.5)

    def read_pending(self, token: str, _: str) -> None:
        """Reads the posts without a picture, and records which are ready now."""
        for post, began in list(self.pending.items()):
            if self.send_until_success("read", "GET", f"/v1/posts/{post}")["status"] == "ready":
                self.tries.append(("image", began, time.monotonic(), True))
                del self.pending[post]

    def wait_for_images(self, seconds: float, what: str) -> None:
        """Waits until no post is without a picture."""

        def none_pending() -> bool:
            self.read_pending("", "")
            return not self.pending

        until(none_pending, seconds, what)

    def all_succeed(self, since: float) -> bool:
        """Whether a call of each kind that began after `since` has succeeded. Also true if a fault ended a writer."""
        return bool(self.faults) or {"comment", "feed", "post", "image"} <= {
            kind for kind, began, _, good in self.tries[:] if good and began > since
        }

    def failed(self, kind: str, since: float, end: float) -> str:
        """How long a kind of call failed, in seconds: from the first failure to the next success after the last one."""
        tries = sorted(tried[1:] for tried in self.tries if tried[0] == kind and tried[2] >= since)
        during = [tried for tried in tries if tried[0] <= end]
        failures = [began for began, _, success in during if not success]
        if not failures:
            return f"no, slowest {max(ended - began for began, ended, _ in during):.2f}"
        return f"{min(ended for began, ended, success in tries if success and began > failures[-1]) - failures[0]:.1f}"

    def table(self, events: list[tuple[str, float, float, float]]) -> list[tuple[str, ...]]:
        """A heading, and a row for each event.

        An event has a name and three times: when it happened, when the part ran again, when all calls had succeeded.
        """
        rows = [("what", "runs again", "comment fails", "post fails", "feed fails", "slowest image")]
        before = 0.0
        for name, since, back, end in events:
            failed = [self.failed(kind, since, end) for kind in ("comment", "post", "feed")]
            images = [tried for tried in self.tries if tried[0] == "image" and before < tried[1] <= end]
            rows.append((name, f"{back - since:.1f}", *failed, f"{max(tried[2] - tried[1] for tried in images):.1f}"))
            before = end
        return rows

    def close(self) -> None:
        self.ended.set()
        for thread in self.threads:
            thread.join()
        # The image that was converted when the worker was killed is converted again after a minute.
        self.wait_for_images(90, "the last image")

    def compare(self) -> str:
        """Asserts that every acknowledged comment and post is there exactly once. Returns the figures."""
        comments = list(items(f"/v1/posts/{self.post}/comments"))
        posts = list(items("/v1/posts"))
        stored = {item["id"]: item["text"] for item in comments} | {item["id"]: item["caption"] for item in posts}
        lost = (self.comments | self.posts).items() - stored.items()
        texts = Counter(item["text"] for item in comments) + Counter(item["caption"] for item in posts)
        double = [text for text, times in texts.items() if times > 1]
        assert not lost and not double, f"lost: {len(lost)} {sorted(lost)[:3]}, double: {len(double)} {double[:3]}"
        return f"{len(self.comments)} comments, {len(self.posts)} posts acknowledged: 0 lost, 0 double"


def main(folder: Path, take: Callable[[Project, Project], None]) -> int:
    """Takes a walk with two projects, of which the second is on a new machine. Returns the exit status."""
    tools = folder / "tools"
    tools.mkdir()
    for name in TOOLS:
        (tools / name).symlink_to(shutil.which(name))
    (tools / "sudo").write_text('#!/bin/sh\nexec "$@"\n')  # the test is root already, and sudo is often missing
    (tools / "sudo").chmod(0o755)
    project = Project(folder / "imagegram", tools)
    again = Project(folder / "new-machine", tools, "again")
    try:
        take(project, again)
    except BaseException as error:
        for each in (again, project):
            if each.folder.exists():
                with contextlib.suppress(AssertionError):
                    print(each.compose("ps", "-a"), each.compose("logs", "--tail", "20"))
        traceback.print_exception(error, file=sys.stdout)
        print(f"\n{len(STEPS)} passed, 1 failed")
        return 1
    finally:
        for each in (again, project):
            if each.folder.exists():
                with contextlib.suppress(AssertionError):
                    each.compose("down", "-v", "-t", "1")
    print(f"\n{len(STEPS)} passed, 0 failed")
    return 0


def walk(project: Project, again: Project) -> None:
    with step("clone, and the README's commands"):
        first_calls(project)
    with step("Prometheus reaches all parts"):
        observe(project)
    writers = Writers(tokens(project))
    try:
        events = [kill(project, writers, part) for part in PARTS]
        events += [freeze(project, writers, part) for part in ("worker", "ship")]
        with step("the API at another address"):
            events.append(swap(project, writers))
    finally:
        with step("the last image"):
            writers.close()
    assert not writers.faults, writers.faults
    with step("everything acknowledged is there"):
        figures = writers.compare()
    with step("TLS"):
        tls(project)
    with step("restores refused and interrupted"):
        interrupt(project)
        writers.compare()
    with step("restored twice in place"):
        for _ in range(2):
            project.shell("deploy/restore.sh")
            writers.compare()
    with step("restored on a new machine, down, up"):
        move(project, again)
        writers.compare()
        again.compose("down")
        again.compose("up", "-d", "--wait")
        writers.compare()
    with step("nothing is left"):
        again.compose("down", "-v")
        nothing_left()
    print_figures(writers, events, figures)


def print_figures(writers: Writers, events: list[tuple], figures: str) -> None:
    print()
    for row in writers.table(events):
        print("{:<24}{:<12}{:<20}{:<20}{:<20}{}".format(*row))
    print(f"(seconds)  {figures}")


def tokens(project: Project) -> list[str]:
    return [project.compose("exec", "-T", "api", "imagegram-api", "token", name).strip() for name in "abc"]


def first_calls(project: Project) -> None:
    clone(project.folder)
    (project.folder / "photo.jpg").write_bytes(jpeg())
    secret, up = blocks("README.md", "docker compose up")[0].splitlines()
    project.shell(secret)
    with (project.folder / ".env").open("a") as settings:
        settings.write(f"IMAGEGRAM_WATCHDOG={WATCHDOG}\n")
    project.shell(up)
    status, _ = call("GET", "/healthz")
    assert status == 200, "the front answers as soon as the command has returned"
    # With containers a reader omits the first line of these calls and gets the token by a command in the text.
    calls = "\n".join(blocks("README.md", "TOKEN=")).replace(". .venv/bin/activate\n", "")
    token = re.search(r"`(TOKEN=\$\(docker .*?\))`", (ROOT / "README.md").read_text())[1]
    calls, changed = re.subn(r"^TOKEN=.*$", lambda _: token, calls, flags=re.MULTILINE)
    assert changed == 1 and "First!" in project.shell(calls), "the last call shows the comment in the feed"
    redis_cli = re.search(r"`(docker compose exec redis .*?)`", (ROOT / "README.md").read_text())[1]
    assert project.shell(redis_cli.replace("exec", "exec -T") + " ping") == "PONG\n"
    services = [json.loads(line) for line in project.compose("ps", "--format", "json").splitlines()]
    assert {service["Service"]: service["Health"] for service in services} == HEALTH
    assert {service["State"] for service in services} == {"running"}
    anonymous = [name for name in run("docker", "volume", "ls", "-q").split() if re.fullmatch("[0-9a-f]{64}", name)]
    assert not anonymous, f"anonymous volumes: {anonymous}"


def observe(project: Project, shippers: int = 1) -> None:
    """Starts Prometheus of the profile `observe`, alone: Grafana has no stand-in. It must reach all parts."""

    def made(kind: str) -> set[str]:
        return set(run("docker", kind, "ls", "--format", "{{.Name}}").split())

    before = {kind: made(kind) for kind in ("network", "volume")}
    project.compose("up", "-d", "--wait", "prometheus")

    def get(path: str) -> dict:
        with urllib.request.urlopen(f"http://127.0.0.1:9090/api/v1/{path}", timeout=10) as answer:
            return json.load(answer)["data"]

    def up() -> Counter[str]:
        return Counter(each["labels"]["job"] for each in get("targets")["activeTargets"] if each["health"] == "up")

    until(lambda: up() == {"api": 1, "worker": 1, "ship": shippers}, 40, "a scrape of all parts")
    rules = [rule for group in get("rules")["groups"] for rule in group["rules"]]
    assert len(rules) > 10 and {rule["health"] for rule in rules} <= {"ok", "unknown"}, rules
    # `down` without the profile would leave these.
    project.compose("rm", "-fsv", "prometheus")
    for kind, names in before.items():
        run("docker", kind, "rm", *(made(kind) - names))


def kill(project: Project, writers: Writers, part: str) -> tuple:
    """Kills a container's first process, as in a crash. After `docker kill` Docker would not restart the container."""
    with step(f"{part} killed"):
        pid, killed = project.pid(part), time.monotonic()
        os.kill(pid, signal.SIGKILL)
        return recovered(project, writers, f"{part}, kill -9", part, pid, killed)


def freeze(project: Project, writers: Writers, part: str) -> tuple:
    """Stops a part's main process. Its watchdog must end it, and Docker must restart the container."""
    with step(f"{part} stopped"):
        init, stopped = project.pid(part), time.monotonic()
        # With `init: true` the container's first process is Docker's init and the part is its child.
        (main, *_) = Path(f"/proc/{init}/task/{init}/children").read_text().split()
        os.kill(int(main), signal.SIGSTOP)
        return recovered(project, writers, f"{part}, SIGSTOP", part, init, stopped)


def recovered(project: Project, writers: Writers, name: str, part: str, old: int, since: float) -> tuple:
    """Waits until a part runs again and all calls succeed. Returns an event of Writers.table."""
    limit = 90  # on a busy machine. An image under way may begin again after a minute
    until(lambda: project.pid(part) not in (0, old), limit, f"{part} runs again")
    back = time.monotonic()
    last = {kind: tried for kind, *tried in writers.tries[:]}
    until(lambda: writers.all_succeed(back), limit, f"all calls succeed after {name}; last tries before: {last}")
    assert not writers.faults, writers.faults
    return name, since, back, time.monotonic()


def address(project: Project, network: str) -> str:
    return project.inspect("api")["NetworkSettings"]["Networks"][network]["IPAddress"]


def swap(project: Project, writers: Writers) -> tuple:
    """Stops the API, gives its address to a container that does not serve, and starts it at another address."""
    front = project.inspect("front")["NetworkSettings"]["Networks"]
    network = next(name for name in project.inspect("api")["NetworkSettings"]["Networks"] if name in front)
    image = project.inspect("redis")["Config"]["Image"]
    old = address(project, network)
    pid, began = project.pid("api"), time.monotonic()
    project.compose("stop", "api")
    placeholders = []
    try:
        for _ in range(8):
            idle = ["--rm", "--network", network, "--entrypoint", "sleep", image, "600"]
            placeholders.append(run("docker", "run", "-d", *idle).strip())
            taken = json.loads(run("docker", "inspect", placeholders[-1]))[0]["NetworkSettings"]["Networks"]
            if taken[network]["IPAddress"] == old:
                break
        else:
            raise AssertionError(f"no placeholder got the API's address {old}")
        project.compose("start", "api")
        assert address(project, network) != old
        return recovered(project, writers, "api, another address", "api", pid, began)
    finally:
        run("docker", "rm", "-f", "-v", *placeholders)


def tls(project: Project) -> None:
    """Follows the TLS commands of the docs. The last of them must answer, also with HTTP/2 and HTTP/3."""
    *set_up, curl = blocks("docs/production.md", "tls.conf.example")[0].splitlines()
    assert curl.startswith("curl")
    project.shell("\n".join(set_up))
    until(lambda: project.succeeds(curl), 10, curl)  # nginx takes a moment to reload
    project.shell(f"{curl} -fsSI --http2 | grep '^HTTP/2 200'")

    async def feed() -> int:
        async with httpx.AsyncClient(transport=Http3()) as client:
            return (await client.get(curl.split()[-1])).status_code

    assert asyncio.run(feed()) == 200
    assert project.compose("exec", "-T", "front", "cat", "/proc/sys/net/ipv4/tcp_congestion_control") == "bbr\n"


def interrupt(project: Project) -> None:
    """A refused restore. Then a restore killed between its two renames: Redis must not start without its folder."""
    assert "refused: " in project.fails("deploy/restore.sh --at 2001-01-01T00:00:00Z")
    in_ship = ["run", "--rm", "--no-deps", "-T", "ship", "sh", "-c"]
    project.compose(*in_ship, "mv /data/redis /data/redis.lost-here")
    project.compose("up", "-d", "--no-deps", "redis")
    until(lambda: project.inspect("redis")["RestartCount"] > 1, 30, "redis refuses to start")
    logged = project.compose("logs", "--tail", "10", "redis")
    assert "'dir \"/data/redis\"'" in logged and "No such file or directory" in logged, logged
    project.compose("stop", "redis")
    project.compose(*in_ship, "test ! -e /data/redis && mv /data/redis.lost-here /data/redis")
    project.compose("up", "-d", "--wait")


def move(project: Project, again: Project) -> None:
    """Moves to another machine, which gets the volumes with the backup and the images, and nothing of Redis."""
    clone(again.folder)
    shutil.copy(project.folder / ".env", again.folder)
    image = project.inspect("api")["Config"]["Image"]
    project.compose("down")
    for volume in ("backup", "store"):
        options = ["-v", f"imagegram_{volume}:/from", "-v", f"again_{volume}:/to", "--user", "0"]
        run("docker", "run", "--rm", *options, image, "cp", "-a", "/from/.", "/to/")
    again.shell("deploy/restore.sh")
    project.compose("down", "-v")


def nothing_left() -> None:
    for kind in ("container", "volume", "network"):
        options = ["-a", "--format", "{{.Names}}"] if kind == "container" else ["--format", "{{.Name}}"]
        names = run("docker", kind, "ls", *options).split()
        left = [name for name in names if name.startswith(("imagegram", "again"))]
        assert not left, f"{kind}s are left: {left}"
