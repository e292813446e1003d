"""The walk: a fresh clone, the README's words, kills under writers, another address, TLS, and the restore drill."""

import contextlib
import http.client
import io
import json
import os
import re
import shutil
import signal
import threading
import time
from collections import Counter
from pathlib import Path

from PIL import Image

from tests.compose.engine import ROOT, run

PORT, TLS_PORT = 8000, 8443
# All that a reader of the README may need: Docker, curl, openssl, and what every Linux has.
TOOLS = ["docker", "curl", "openssl", "sh", "cat", "cp", "chmod", "chown", "mkdir", "head", "base64", "sleep"]
TOOLS += ["grep", "cut", "sed", "date", "dirname"]
PARTS = ["redis", "api", "worker", "ship", "front"]
WATCHDOG = 5  # seconds; 30 by default
RETRY = 0.1  # seconds between two tries of a writer
STEPS: list[tuple[str, float]] = []


@contextlib.contextmanager
def step(name: str):
    began = time.monotonic()
    yield
    STEPS.append((name, time.monotonic() - began))
    print(f"{STEPS[-1][1]:6.1f} s  {name}", flush=True)


def clone(target: Path) -> None:
    run("git", "clone", "-q", ROOT, target)


def until(true, seconds: float, what: str):
    """Returns the first true result. Raises AssertionError after so many seconds."""
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.05)
    return found


class Project:
    """A clone, and the shell of somebody who follows the docs in it."""

    def __init__(self, folder: Path, tools: Path, name: str | None = None):
        self.folder = folder
        names = ("HOME", "DOCKER_HOST", "DOCKER_CONFIG", "DOCKER_BUILDKIT")
        self.env = {key: os.environ[key] for key in names if key in os.environ} | {"PATH": str(tools)}
        if name:
            self.env["COMPOSE_PROJECT_NAME"] = name

    def shell(self, script: str) -> str:
        return run(shutil.which("bash"), "-euo", "pipefail", "-c", script, cwd=self.folder, env=self.env)

    def tries(self, script: str) -> bool:
        with contextlib.suppress(AssertionError):
            return bool(self.shell(script))
        return False

    def compose(self, *words: str) -> str:
        return run("docker", "compose", *words, cwd=self.folder, env=os.environ | self.env)

    def container(self, service: str) -> str:
        return self.compose("ps", "-aq", service).strip()

    def inspect(self, service: str) -> dict:
        return json.loads(run("docker", "inspect", self.container(service)))[0]

    def pid(self, service: str) -> int:
        """The container's first process; 0 while there is none."""
        return self.inspect(service)["State"]["Pid"]


def blocks(page: str, word: str) -> list[str]:
    """The code blocks of a page, indented or fenced: the first with a word in it, and those behind it up to a ##."""
    for part in re.split(r"^## ", (ROOT / page).read_text(), flags=re.MULTILINE):
        found = re.findall(r"^```sh\n([\s\S]*?)^```|((?:^    .*\n)+)", part, re.MULTILINE)
        found = ["\n".join(line.removeprefix("    ") for line in (a or b).splitlines()) for a, b in found]
        for index, block in enumerate(found):
            if word in block:
                return found[index:]
    raise AssertionError(f"{page} has no block of commands with {word!r}")


def call(method: str, path: str, token: str = "", body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    line = http.client.HTTPConnection("127.0.0.1", PORT, timeout=10)
    try:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        line.request(method, path, body, named | ({"Authorization": f"Bearer {token}"} if token else {}))
        answer = line.getresponse()
        return answer.status, answer.read()
    finally:
        line.close()


def get(path: str) -> dict:
    status, body = call("GET", path)
    assert status == 200, (path, status, body)
    return json.loads(body)


def pages(path: str):
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
    """Users who repeat each call under its Idempotency-Key until it succeeds, and what they were told."""

    def __init__(self, tokens: list[str]):
        self.tries: list[tuple[str, float, float, bool]] = []  # kind, began, ended, whether it succeeded
        self.comments: dict[str, str] = {}  # acknowledged: id and text
        self.posts: dict[str, str] = {}  # acknowledged: id and caption
        self.pending: dict[str, float] = {}  # posts without an image yet: id, and when the first try began
        self.faults: list[str] = []
        self.ended = threading.Event()
        self.image = jpeg()
        self.publish(tokens[0], "the first")
        (self.post,) = self.pending
        until(lambda: self.look("", "") or not self.pending, 30, "the first image")
        turns = [(self.comment, tokens[0]), (self.comment, tokens[1]), (self.feed, ""), (self.publish, tokens[2])]
        self.threads = [threading.Thread(target=self.repeat, args=turn) for turn in [*turns, (self.look, "")]]
        for thread in self.threads:
            thread.start()

    def repeat(self, turn, token: str) -> None:
        number = 0
        try:
            while not self.ended.is_set():
                turn(token, f"{turn.__name__} {token[-8:]} {number}")
                number += 1
                time.sleep(0.02)  # a second of all of them stays below the front's 200 requests
        except Exception as error:
            self.faults.append(f"{turn.__name__}: {error!r}")

    def insist(self, kind: str, *request, **headers) -> dict:
        """Sends a request until it succeeds. A 4xx is a fault, except too many requests."""
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
        keyed = {"Idempotency_Key": text.replace(" ", "-"), "Content_Type": "application/json"}
        made = self.insist("comment", "POST", f"/v1/posts/{self.post}/comments", token, body, **keyed)
        self.comments[made["id"]] = text

    def feed(self, token: str, _: str) -> None:
        self.insist("feed", "GET", "/v1/posts")

    def publish(self, token: str, caption: str) -> None:
        parts = f'--frontier\r\nContent-Disposition: form-data; name="caption"\r\n\r\n{caption}\r\n--frontier\r\n'
        parts += 'Content-Disposition: form-data; name="image"; filename="a.jpg"\r\n\r\n'
        body = parts.encode() + self.image + b"\r\n--frontier--\r\n"
        kind = {"Idempotency_Key": caption.replace(" ", "-"), "Content_Type": "multipart/form-data; boundary=frontier"}
        began = time.monotonic()
        made = self.insist("post", "POST", "/v1/posts", token, body, **kind)
        self.posts[made["id"]] = caption
        self.pending[made["id"]] = began
        self.ended.wait(0.5)

    def look(self, token: str, _: str) -> None:
        """Looks which images are ready."""
        for post, began in list(self.pending.items()):
            if self.insist("look", "GET", f"/v1/posts/{post}")["status"] == "ready":
                self.tries.append(("image", began, time.monotonic(), True))
                del self.pending[post]

    def settled(self, since: float) -> bool:
        """Whether each kind of call that began after a moment has succeeded; or a fault ended one."""
        return bool(self.faults) or {"comment", "feed", "post", "image"} <= {
            kind for kind, began, _, good in self.tries[:] if good and began > since
        }

    def failed(self, kind: str, since: float, end: float) -> str:
        """How many seconds a kind of call failed: from the first failing one to the first success behind the last."""
        mine = sorted(tried for tried in self.tries if tried[0] == kind and tried[2] >= since)
        during = [tried for tried in mine if tried[1] <= end]
        failures = [began for _, began, _, good in during if not good]
        if not failures:
            return f"no, slowest {max(ended - began for _, began, ended, _ in during):.2f}"
        return f"{min(ended for _, began, ended, good in mine if good and began > failures[-1]) - failures[0]:.1f}"

    def table(self, events: list[tuple[str, float, float, float]]) -> list[tuple[str, ...]]:
        """A row for each event (name, when it happened, when the part ran again, when all calls had succeeded)."""
        rows, before = [("what", "runs again", "comment fails", "post fails", "feed fails", "slowest image")], 0.0
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
        # An image that was being made when the worker was killed is made again after a minute.
        until(lambda: self.look("", "") or not self.pending, 90, "the last image")

    def compare(self) -> str:
        """Asserts that all that was acknowledged is there once."""
        comments = list(pages(f"/v1/posts/{self.post}/comments"))
        posts = list(pages("/v1/posts"))
        there = {found["id"]: found["text"] for found in comments} | {found["id"]: found["caption"] for found in posts}
        lost = (self.comments | self.posts).items() - there.items()
        texts = Counter(found["text"] for found in comments) + Counter(found["caption"] for found in posts)
        double = [text for text, times in texts.items() if times > 1]
        assert not lost and not double, f"lost: {len(lost)} {sorted(lost)[:3]}, double: {len(double)} {double[:3]}"
        return f"{len(self.comments)} comments, {len(self.posts)} posts acknowledged: 0 lost, 0 double"


def main(folder: Path) -> int:
    tools = folder / "tools"
    tools.mkdir()
    for name in TOOLS:
        (tools / name).symlink_to(shutil.which(name))
    (tools / "sudo").write_text('#!/bin/sh\nexec "$@"\n')  # root has nothing to ask for, and often no sudo
    (tools / "sudo").chmod(0o755)
    project = Project(folder / "imagegram", tools)
    again = Project(folder / "new-machine", tools, "again")
    try:
        walk(project, again)
    except BaseException as error:
        for one in (again, project):
            if one.folder.exists():
                with contextlib.suppress(AssertionError):
                    print(one.compose("ps", "-a"), one.compose("logs", "--tail", "20"))
        print(f"\n{len(STEPS)} passed, 1 failed\n{type(error).__name__}: {error}")
        return 1
    finally:
        for one in (again, project):
            if one.folder.exists():
                with contextlib.suppress(AssertionError):
                    one.compose("down", "-v", "-t", "1")
    print(f"\n{len(STEPS)} passed, 0 failed")
    return 0


def walk(project: Project, again: Project) -> None:
    with step("clone, and the README's commands"):
        first_calls(project)
    tokens = [project.compose("exec", "-T", "api", "imagegram-api", "token", name).strip() for name in "abc"]
    writers = Writers(tokens)
    try:
        events = [kill(project, writers, part) for part in PARTS]
        events += [freeze(project, writers, part) for part in ("worker", "ship")]
        with step("the API at another address"):
            events.append(swap(project, writers))
    finally:
        with step("the last image"):
            writers.close()
    assert not writers.faults, writers.faults
    with step("all that was acknowledged is there"):
        compared = writers.compare()
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
    print()
    for row in writers.table(events):
        print("{:<24}{:<12}{:<20}{:<20}{:<20}{}".format(*row))
    print(f"(seconds)  {compared}")


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
    # With containers the first line of these is left out, and the token is got by a command in the text.
    calls = "\n".join(blocks("README.md", "TOKEN=")).replace(". .venv/bin/activate\n", "")
    token = re.search(r"`(TOKEN=\$\(docker .*?\))`", (ROOT / "README.md").read_text())[1]
    calls, changed = re.subn(r"^TOKEN=.*$", lambda _: token, calls, flags=re.MULTILINE)
    assert changed == 1 and "First!" in project.shell(calls), "the last call shows the comment in the feed"
    look = re.search(r"`(docker compose exec redis .*?)`", (ROOT / "README.md").read_text())[1]
    assert project.shell(look.replace("exec", "exec -T") + " ping") == "PONG\n"
    services = [json.loads(line) for line in project.compose("ps", "--format", "json").splitlines()]
    assert {service["Service"] for service in services} == set(PARTS)
    for service in services:
        assert service["State"] == "running" and service["Health"] in ("healthy", ""), service
    anonymous = [name for name in run("docker", "volume", "ls", "-q").split() if re.fullmatch("[0-9a-f]{64}", name)]
    assert not anonymous, f"anonymous volumes: {anonymous}"


def kill(project: Project, writers: Writers, part: str) -> tuple:
    """Ends a container's first process, as a crash does: `docker kill` would count as a stop by hand."""
    with step(f"{part} killed"):
        pid, killed = project.pid(part), time.monotonic()
        os.kill(pid, signal.SIGKILL)
        return recovered(project, writers, f"{part}, kill -9", part, pid, killed)


def freeze(project: Project, writers: Writers, part: str) -> tuple:
    """Stops a part's main process: its watchdog must end it, and Docker start the container again."""
    with step(f"{part} stopped"):
        init, stopped = project.pid(part), time.monotonic()
        (main, *_) = Path(f"/proc/{init}/task/{init}/children").read_text().split()  # `init: true`: not the first one
        os.kill(int(main), signal.SIGSTOP)
        return recovered(project, writers, f"{part}, SIGSTOP", part, init, stopped)


def recovered(project: Project, writers: Writers, name: str, part: str, old: int, since: float) -> tuple:
    """Waits until a part runs again and all calls succeed. Returns an event of Writers.table."""
    limit = 30
    until(lambda: project.pid(part) not in (0, old), limit, f"{part} runs again")
    back = time.monotonic()
    last = {kind: tried for kind, *tried in writers.tries[:]}
    until(lambda: writers.settled(back), limit, f"all calls succeed after {name}; before: {last}")
    assert not writers.faults, writers.faults
    return name, since, back, time.monotonic()


def address(project: Project, network: str) -> str:
    return project.inspect("api")["NetworkSettings"]["Networks"][network]["IPAddress"]


def swap(project: Project, writers: Writers) -> tuple:
    """Stops the API, gives its address to containers that do not serve, and starts it at another."""
    front = project.inspect("front")["NetworkSettings"]["Networks"]
    network = next(name for name in project.inspect("api")["NetworkSettings"]["Networks"] if name in front)
    image = project.inspect("redis")["Config"]["Image"]
    old, pid, began = address(project, network), project.pid("api"), time.monotonic()
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
            raise AssertionError(f"no placeholder was given the API's address {old}")
        project.compose("start", "api")
        assert address(project, network) != old
        return recovered(project, writers, "api, another address", "api", pid, began)
    finally:
        run("docker", "rm", "-f", "-v", *placeholders)


def tls(project: Project) -> None:
    *made, asked = blocks("docs/production.md", "tls.conf.example")[0].splitlines()
    assert asked.startswith("curl")
    project.shell("\n".join(made))
    until(lambda: project.tries(asked), 10, asked)  # nginx takes a moment to reload; a reader types more slowly
    project.shell(f"{asked} -fsSI --http2 | grep '^HTTP/2 200'")


def interrupt(project: Project) -> None:
    """A restore that is refused changes nothing. After one killed between its renames Redis does not start."""
    assert not project.tries("deploy/restore.sh --at 2001-01-01T00:00:00Z")
    in_ship = ["run", "--rm", "--no-deps", "-T", "ship", "sh", "-c"]
    project.compose(*in_ship, "mv /data/redis /data/redis.lost-here")
    project.compose("up", "-d", "--no-deps", "redis")
    until(lambda: project.inspect("redis")["RestartCount"] > 1, 30, "redis refuses to start")
    project.compose("stop", "redis")
    project.compose(*in_ship, "test ! -e /data/redis && mv /data/redis.lost-here /data/redis")
    project.compose("up", "-d", "--wait")


def move(project: Project, again: Project) -> None:
    """Another machine gets the volumes with the backup and the images, and nothing of Redis."""
    clone(again.folder)
    shutil.copy(project.folder / ".env", again.folder)
    image = project.inspect("api")["Config"]["Image"]
    project.compose("down")
    for volume in ("backup", "store"):
        given = ["-v", f"imagegram_{volume}:/from", "-v", f"again_{volume}:/to", "--user", "0"]
        run("docker", "run", "--rm", *given, image, "cp", "-a", "/from/.", "/to/")
    again.shell("deploy/restore.sh")
    project.compose("down", "-v")


def nothing_left() -> None:
    for kind in ("container", "volume", "network"):
        everything = ["-a"] if kind == "container" else []
        named = run("docker", kind, "ls", *everything, "--format", "{{.Names}}" if kind == "container" else "{{.Name}}")
        left = [name for name in named.split() if name.startswith(("imagegram", "again"))]
        assert not left, f"{kind}s are left: {left}"
