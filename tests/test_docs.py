"""Runs the commands of the README, of CONTRIBUTING and of docs/ as they are written, and compares their output."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import brotli
import httpx
import pytest
from conftest import ROOT, free_port, photograph, until
from making import jpeg
from test_run import Run

from storage import segments
from storage.backup.restore import format_utc

README = (ROOT / "README.md").read_text()
API = (ROOT / "docs" / "api.md").read_text()
KEYS = (ROOT / "docs" / "keys.md").read_text()
MODERATION = (ROOT / "docs" / "moderation.md").read_text()
DURABILITY = (ROOT / "docs" / "durability.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
PAGES = {path.name: path.read_text() for path in [*ROOT.glob("*.md"), *sorted((ROOT / "docs").glob("*.md"))]}
POST = re.compile(r"\b01[0-9A-HJKMNP-TV-Z]{24}-0")
UPLOAD = re.compile(r"\bu01[0-9A-HJKMNP-TV-Z]{24}-0")
SECOND = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$|((?:^    [^\n]*\n)+)", re.MULTILINE | re.DOTALL)
PROGRAMS = (
    r"make|imagegram(?:-\w+)?|python3?|pip3?|docker|kubectl|redis-cli|curl|wget|git|npm|sudo|apt|apt-get|systemctl|openssl|ssh"
)
COMMAND = re.compile(rf"(\w+=\$\()?({PROGRAMS}|echo|cp|mv|rm|\S+/\S+\.sh|\. \S+)( |$)")
# The blocks that are not commands: what commands print, lines of .env, and drawings of what there is.
MODERATED = r"post  |the post |the comment |alice\.zip: |found of |removed of |1 users "
PRINTED = f"> |generation |node |{MODERATED}|WARNING imagegram|found: |1 posts, "
OTHER = re.compile(rf"{PRINTED}|([A-Z_]+=\S+\n)+$|api ──► |generations/|ACL SETUSER |resources: ")
DRAWINGS = re.compile(r"(sequenceDiagram|flowchart \w\w)\n")


def section(page: str, heading: str) -> str:
    """The part of a page from a heading to the next one of the second level."""
    return page[page.index(heading) :].split("\n## ")[0]


def shell(page: str) -> list[str]:
    """The blocks of shell commands. Any other block must be an answer (`http`), a drawing (`mermaid`) or in OTHER."""
    found = []
    for language, fenced, indented in BLOCK.findall(page):
        block = fenced or "".join(line[4:] for line in indented.splitlines(keepends=True))
        if language == "sh" or COMMAND.match(block):
            found.append(block)
        elif language == "mermaid":
            assert DRAWINGS.match(block), f"an unknown kind of drawing: {block}"
        elif language != "http":
            assert not language and OTHER.match(block), f"mark it as sh, or add its beginning to OTHER: {block}"
    return found


def examples(page: str) -> list[tuple[str, str]]:
    """Each block of commands with the answer below it, which is empty if the next block is not marked `http`."""
    blocks = [(language, fenced) for language, fenced, _ in BLOCK.findall(page) if language in ("sh", "http")]
    found = []
    for (language, block), (following, answer) in zip(blocks, [*blocks[1:], ("", "")], strict=True):
        if language == "sh":
            found.append((block, answer if following == "http" else ""))
    return found


def commands(page: str) -> set[str]:
    """The lines of the blocks that no other test runs as a whole, and the commands in sentences."""
    whole = {block for part, heading in SCRIPTS for block in shell(section(PAGES[part], heading))}
    lines = "".join(block for block in shell(page) if block not in whole).replace("\\\n", "")
    sentences = re.findall(r"`([^`\n]+)`", BLOCK.sub("", page))
    return set(lines.splitlines()) | {text for text in sentences if COMMAND.match(text)}


# Other tests run all blocks below these headings, in their order.
SCRIPTS = [
    ("README.md", "## Make the first call"),
    ("client.md", "## Try it"),
    *(("api.md", heading) for heading in re.findall(r"^## .*$", API, re.MULTILINE)),
    ("durability.md", "## The restore drill"),
    *(("moderation.md", heading) for heading in re.findall(r"^## .*$", MODERATION, re.MULTILINE)),
    ("production.md", "## With docker compose"),  # tests/compose/ does, because it has a container engine
    ("production.md", "## With Kubernetes"),  # tests/test_deploy_k8s.py does
    ("CONTRIBUTING.md", "## Profile"),
]


class Home:
    """The folder of a reader who cloned the project and ran `make run`. `data` belongs to this folder alone."""

    def __init__(self, folder: Path):
        self.folder = folder
        for path in ROOT.iterdir():
            if path.name not in (".git", ".env", "data"):
                (folder / path.name).symlink_to(path)
        (folder / "photo.jpg").write_bytes(photograph())
        (folder / ".env").write_text("IMAGEGRAM_JWT_SECRET=only containers read this file, make run must not\n")
        self.start()

    def start(self) -> None:
        self.site = Run(self.folder / "data", self.folder)
        self.environment = {**self.site.environment, "HOME": str(self.folder)}
        del self.environment["IMAGEGRAM_DATA"]  # commands in this folder must find the data by the default

    def stop(self) -> str:
        """Sends Ctrl-C. Returns what the site printed."""
        if self.site.make.poll() is None:
            os.killpg(self.site.make.pid, signal.SIGINT)
        return self.site.end()[0]

    def run(self, script: str, stdin: str = "") -> str:
        """Runs a script in a new terminal, after the README's first line. Returns its output. It must succeed."""
        done = self.attempt(". .venv/bin/activate\n" + script.replace("http://127.0.0.1:8000", self.site.url), stdin)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def attempt(self, script: str, stdin: str = "") -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=self.folder,
            env=self.environment,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
        )


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = Home(tmp_path_factory.mktemp("home"))
    yield home
    home.stop()


def test_the_readme_makes_the_first_call(home):
    script = "".join(shell(section(README, "## Make the first call")))
    assert script.startswith(". .venv/bin/activate\n")
    printed = home.run(script)
    by_client, ready, rest = re.fullmatch(
        r'(logged in .*?)^({"id".*?})$(.*)', printed, re.DOTALL | re.MULTILINE
    ).groups()
    assert by_client.startswith(f"logged in at {home.site.url} as alice\n") and by_client.count("    First!\n") == 2
    assert json.loads(ready)["status"] == "ready"
    comment, feed = map(json.loads, rest.strip().replace("}{", "}\n{").splitlines())
    assert comment["text"] == "First!"
    # The post of the client is in the feed as well.
    assert feed["items"][0] == {**json.loads(ready), "comment_count": 1, "latest_comments": [comment]}
    assert [post["latest_comments"][0]["text"] for post in feed["items"][:2]] == ["First!", "First!"]
    assert (home.folder / "served.jpg").read_bytes().startswith(b"\xff\xd8\xff")


def test_the_first_call_that_make_run_prints_works_as_written(home):
    welcome = home.run("imagegram-api welcome")
    assert f"http://127.0.0.1:{home.site.port}" in welcome and "apt-get install redis-tools" in welcome
    lines = [line.strip() for line in welcome.splitlines() if line.startswith("  ")]
    assert [line.split(maxsplit=1)[0] for line in lines][1:] == ["curl", "curl", "redis-cli"]
    printed = home.run("\n".join(lines), stdin="PING")
    assert printed.endswith("PONG\n") and '"caption":"Hello"' in printed


def answer_pattern(line: str) -> re.Pattern:
    """What a line of an answer may look like: `…` stands for any text, and ids, times and tags differ each time."""
    line = re.escape(re.sub(r"\s", "", line)).replace("…", ".*?")
    for differs in (
        r"u?01[0-9A-HJKMNP-TV-Z]{24}\\-0",  # post, upload
        r"\d{13}\\-0",  # comment
        r"\d{4}\\-\d\d\\-\d\dT[\d:]{8}\\\.\d{3}Z",  # RFC 3339
        r"\d{4}\\-\d\d\\-\d\d\d\d:\d\d(?!:)",  # a minute, as the client prints it
        r"(?<=http://127\\.0\\.0\\.1:)\d+",  # a port
        r"\w{3},\d\d\w{3}\d{4}\d\d:\d\d:\d\dGMT",  # HTTP's date
        r'(?<=ETag:")[^"]+|(?<=ETag:W/")[^"]+',
        r"(?<=/)\d+$",  # the length of a JPEG
        r"(?<=\.jpg)\d+of\d+(?=bytes)",
        r'(?<="bytes":)\d+',
        r'(?<="scans":\\\[)[\d,]+',
        r"(?<=Content\\-Range:bytes0\\-)\d+",  # the length of a look, or 99
        r"(?<=^Upload\\-Offset:)(?!0$|61306$)\d+",  # where a line broke
    ):
        line = re.sub(differs, lambda found: r"[\w.:,-]+", line)
    return re.compile(line)


@pytest.mark.parametrize(("page", "least"), [("api.md", 21), ("client.md", 4)])
def test_the_examples_of_a_page_answer_as_written(home, page, least):
    """Runs all examples in one shell. Each line of an answer is printed, in order. The page leaves out some headers."""
    is_http = page == "api.md"  # long lines are wrapped there; on the other page an indentation is part of the output
    pairs = examples(PAGES[page] if is_http else section(PAGES[page], "## Try it"))
    assert len(pairs) >= least
    end = "= the end of an example ="
    printed = home.run("".join(f"{block}\necho\necho '{end}'\n" for block, _ in pairs)).replace("\r", "")
    for (block, answer), output in zip(pairs, printed.split(end), strict=False):
        lines = iter(re.sub(r"[ \t]", "", output).splitlines())
        for expected in (re.sub(r"\n +", "", answer) if is_http else answer).splitlines():
            matches = answer_pattern(expected)
            assert any(matches.fullmatch(line) for line in lines), f"{block}\n{output}\nlacks {expected}"


def test_the_api_page_has_an_example_of_every_route_and_of_every_delete_and_patch():
    lines = "".join(block for block, _ in examples(API)).replace("\\\n", "").splitlines()
    routes = re.findall(r"^\| `.*?\|", section(README, "## Routes"), re.MULTILINE)
    for route in routes:
        for path in re.findall(r"(/[^`]*)`", route):
            called = re.compile(r"\$URL" + re.sub(r"\\{\w+\\}", lambda found: r"\$\w+", re.escape(path)) + r"(?![\w/])")
            found = [line for line in lines if called.search(line)]
            assert found, path
            if "{" in path:
                for method in {"DELETE", "PATCH"} & set(re.findall("[A-Z]+", route)):
                    assert any(f"-X {method} " in line for line in found), (method, path)


def test_the_profiles_of_the_contributors_page_are_written(home):
    for script in shell(section(CONTRIBUTING, "## Profile")):
        home.run(script.replace("8001", str(free_port())))
        assert "function calls" in (home.folder / "profile.txt").read_text()


def test_the_map_of_the_contributors_page_names_every_module_and_no_other():
    named = set(re.findall(r"`((?:api|storage|workers)/[\w/]+\.py)`", section(CONTRIBUTING, "## The map")))
    packages = ROOT / "api", ROOT / "storage", ROOT / "workers"
    modules = {path.relative_to(ROOT) for package in packages for path in package.rglob("*.py")}
    assert named == {str(path) for path in modules if path.name != "__init__.py"}


def anchors(page: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_a_link_to_a_section_leads_to_one(name):
    for page, anchor in re.findall(r"\]\((?!http)([^)#]*)#([^)]+)\)", PAGES[name]):
        assert anchor in anchors(PAGES[Path(page).name if page else name]), f"{page}#{anchor}"


def numbered(printed: str) -> list[str]:
    """The words that a command printed, with # for each number."""
    return re.sub(r"\d+", "#", printed).split()


def test_the_restore_drill_of_the_durability_page(home):
    """Restores to a second of this test. The output is that of the page, except for the numbers."""
    drill = section(DURABILITY, "## The restore drill")
    snapshots, restore = shell(drill)[:2]
    listed, restored = [numbered(block) for _, block, _ in BLOCK.findall(drill) if block.startswith("generation ")]
    with httpx.Client(base_url=home.site.url, headers=home.site.user) as alice:
        sent = alice.post("/v1/posts", files={"image": jpeg()}, data={"caption": "Lost"})
        post = f"/v1/posts/{sent.json()['id']}"
        until(lambda: alice.get(post).json()["status"] == "ready", what="the image")
        for n in range(40):
            alice.post(f"{post}/comments", json={"text": str(n)}).raise_for_status()
        before = alice.get(post).json()
        good = int(time.time())
        until(lambda: int(time.time()) > good, what="the next second")
        alice.delete(post).raise_for_status()
    until(lambda: SECOND.findall(home.run(snapshots))[-1] > format_utc(good), what="the shipper")
    assert numbered(home.run(snapshots)) == listed
    home.stop()
    printed = home.run(SECOND.sub(format_utc(good), restore))
    assert numbered(printed) == restored and printed.endswith(", 0 flaws)\n")
    home.start()
    with httpx.Client(base_url=home.site.url) as client:
        assert client.get(post).json() == before | {"status": client.get(post).json()["status"]}
        until(lambda: client.get(f"/v1/images/{before['id']}.jpg").status_code == 200, what="the picture")
    until(lambda: "\n         2  " in home.run(snapshots), what="generation 2")
    log = " ".join(numbered(home.stop()))
    (expected,) = [block for _, block, _ in BLOCK.findall(drill) if block.startswith("WARNING ")]
    for line in expected.splitlines():
        assert " ".join(numbered(line)) in log
    home.start()


# How a command is checked that is in a sentence, or in a block that no test runs as a whole


def dry(home, command):
    """Only that the target exists and its files do. To run it would take minutes, or would run this test again."""
    done = home.attempt(command.replace("make ", "make -n "))
    assert done.returncode == 0 and "Nothing to be done" not in done.stdout, done.stderr
    for module in re.findall(r"python -m (tests[\w.]+)", done.stdout):
        assert importlib.util.find_spec(module)
    for path in re.findall(r"\btests/[\w/]+\.\w+", done.stdout):
        assert (ROOT / path).exists() or path == "tests/load/report.html"


def parse(home, command):
    """argparse accepts the arguments before --help."""
    home.run(command + " --help")


def succeed(home, command):
    home.run(command)


def ask(home, command):
    """redis-cli waits for commands."""
    assert home.run(command, stdin="PING") == "PONG\n"


def evaluate(home, command):
    """A script by redis-cli, on a post that exists."""
    with httpx.Client(base_url=home.site.url, headers=home.site.user) as alice:
        sent = alice.post("/v1/posts", files={"image": jpeg()}, data={"caption": "Read by a script"})
    assert "Read by a script\n" in home.run(POST.sub(sent.json()["id"], command))


def exist(home, command):
    """Only a name: there is such a command."""
    home.run(f"command -v {command}")


def install(home, command):
    """tests/test_wheel.py runs it in a venv of its own."""


def refer(home, command):
    """Only that the files exist. Other tests run them, or they take minutes."""
    named = re.findall(r"\btests/\w+\.py", command)
    assert named and all((ROOT / path).exists() for path in named)


def start(home, command):
    """The command is one of the parts that `make run` has started."""
    assert f"exec .venv/bin/{command}\n" in (ROOT / "Procfile").read_text()


def simulate(home, command):
    home.run(command.replace("apt-get ", "apt-get --simulate "))


def write(home, command):
    """Writes a line for containers, here into another file than .env."""
    home.run(command.replace(".env", "written.env"))
    name, _, value = (home.folder / "written.env").read_text().strip().partition("=")
    assert re.fullmatch(r"[A-Z_]+", name) and value


def administer(home, command):
    """The page leaves out where the server is."""
    assert "ERR" not in home.run(command.replace("redis-cli", "redis-cli -s data/redis/redis.sock"))


def grow(home, command):
    """The drill that grows a site runs this command, with other addresses and ids."""
    drill = (ROOT / "tests" / "drills" / "growing.py").read_text().lower()
    assert all(f'"{word}"' in drill for word in re.findall(r"[a-z]{4,}", command.partition(" ")[2]))


def contain(home, command):
    """tests/compose/ runs it, because it has a container engine."""


def orchestrate(home, command):
    """tests/test_deploy_k8s.py renders it. There is no Kubernetes."""


RUN = {
    r"make [\w-]+( test-pillow| SHAPE=small| REVISION=[\w~]+( LIMITS=\S+)?)?": dry,
    r"python -m tests\.\S+( .*)?": parse,
    r"python -m pytest .*|python tests/golden\.py \S+": refer,
    r"imagegram-storage (snapshots|verify|retry|check( --deep| --repair)?|sweep( --dry-run)?|--help)": succeed,
    r"imagegram-worker remake|imagegram-storage script \w+|imagegram-storage erase --again --yes": succeed,
    r"redis-cli -s data/redis/redis\.sock --eval <\(imagegram-storage script \w+\) .*": evaluate,
    r"imagegram-api token alice": succeed,
    r"imagegram-storage (ship|redis)": start,
    r"imagegram-storage (cluster|restore) .*": parse,
    r"imagegram (login|logout|upload|feed|show|picture|comment|delete|watch)( [][\w.-]+)*": parse,
    r"imagegram(-\w+)?|redis-cli|redis-cli cluster nodes": exist,
    r"\. \.venv/bin/activate": succeed,
    r"redis-cli -s data/redis/redis\.sock": ask,
    r"redis-cli (info replication|config set maxmemory 3gb)": administer,
    r"redis-cli (-h \S+ |--cluster call \S+ )?cluster (failover|forget ID)": grow,
    r"pip wheel --no-deps \.|pip install --no-deps imagegram-0\.1\.0-py3-none-any\.whl": install,
    r"pip install 'imagegram-0\.1\.0-py3-none-any\.whl\[client\]'|pip install httpx rich tuspy": install,
    r"pip install --require-hashes -r run\.txt": install,
    r"sed '/\^# test/,\$d' requirements\.lock >run\.txt": succeed,
    r"apt-get install [\w-]+": simulate,
    r'echo "[^"]*" >\.env': write,
    r"(TOKEN=\$\()?docker compose\b.*|deploy/\w+\.sh.*": contain,
    r"kubectl apply -k deploy/k8s/overlays/small|kubectl (kustomize|rollout restart|wait)": orchestrate,
}


@pytest.mark.parametrize("command", sorted(set().union(*map(commands, PAGES.values()))))
def test_a_command_of_the_docs_runs_as_written(home, command):
    ways = [way for pattern, way in RUN.items() if re.fullmatch(pattern, command)]
    assert ways, "add a pattern for this command to RUN"
    ways[0](home, command)


def test_the_commands_of_the_moderation_page_print_what_it_says(home):
    """Runs them in the order of the page. Numbers may differ: other tests have made posts of alice, too."""
    with httpx.Client(base_url=home.site.url, headers=home.site.user) as alice:
        bob = {"Authorization": "Bearer " + home.run("imagegram-api token bob").strip()}

        def publish(**given) -> str:
            post = alice.post("/v1/posts", files={"image": jpeg()}, **given).json()["id"]
            until(lambda: alice.get(f"/v1/posts/{post}").json()["status"] == "ready", what="the picture")
            return post

        post = publish(data={"caption": "Hello"})
        path = f"/v1/posts/{post}/comments"
        alice.post(path, json={"text": "First!"}).raise_for_status()
        comment = alice.post(path, json={"text": "Where is that?"}, headers=bob).json()["id"]
        alice.post(f"/v1/posts/{publish(headers=bob)}/comments", json={"text": "Nice"}).raise_for_status()
    blocks = [(language, block) for language, block, _ in BLOCK.findall(MODERATION)]
    assert len(blocks) == 18
    for (_, script), (language, expected) in zip(blocks[::2], blocks[1::2], strict=True):
        assert not language
        printed = home.run(f"POST={post} COMMENT={comment}\n{script}")
        assert printed_shape(printed) == printed_shape(expected)


def printed_shape(printed: str) -> list[str]:
    """The words that a command of an operator printed, without what differs each time."""
    printed = re.sub(r"(thumbhash +)\S+( \d+)*", r"\1#", POST.sub("<post>", printed))
    return numbered(re.sub(r"removed of alice: .*", "removed", printed))


@pytest.fixture
def session(working_site, real_server):
    """Runs redis-cli on a site that has the posts, comments and the upload of the page's session."""
    if not shutil.which("redis-cli"):
        pytest.fail("redis-cli is needed: apt-get install redis-tools")
    posts = []
    with working_site.client("alice") as alice, working_site.client("bob") as bob:
        for _ in range(2):
            sent = alice.post("/v1/posts", files={"image": jpeg()}, data={"caption": "Hello"})
            posts.append(sent.json()["id"])
        until(lambda: len(alice.get("/v1/posts").json()["items"]) == 2, what="both posts")
        for person, text in ((alice, "Hm"), (alice, "First!"), (bob, "Where is that?")):
            person.post(f"/v1/posts/{posts[0]}/comments", json={"text": text}).raise_for_status()
        bob.post("/v1/posts/00000000000000000000000000-0/comments", json={"text": "?"})
        headers = {"Tus-Resumable": "1.0.0", "Upload-Length": "2500000"}
        begun = bob.post("/v1/uploads", headers=headers)
        upload = begun.headers["Location"].rpartition("/")[2]
        headers = {"Tus-Resumable": "1.0.0", "Upload-Offset": "0", "Content-Type": "application/offset+octet-stream"}
        bob.patch(f"/v1/uploads/{upload}", headers=headers, content=jpeg(900, 900)[:4096]).raise_for_status()
    until(lambda: real_server.client.zrange("due:{0}", 0, -1) == [upload], what="the posts' work")

    def run(line: str) -> str:
        given = [UPLOAD.sub(upload, POST.sub(posts[0], word)) for word in line.split()]
        command = ["redis-cli", "--no-raw", "-s", real_server.nodes[0].socket, *given]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    return run


def shape(reply: str) -> str:
    """A reply, with a placeholder for each part that differs between two sessions."""
    reply = UPLOAD.sub("<upload>", POST.sub("<post>", reply.replace("\r", "")))
    reply = re.sub(r"0-[0-9a-f]{16}", "<chunk>", reply)  # before times: a chunk's name may have 13 digits in a row
    reply = re.sub(r"\d{13}", "<ms>", reply)
    reply = re.sub(r'"[A-Za-z0-9+/]{32}( \d+)+"', '"<thumbhash>"', reply)
    return "\n".join(line.strip() for line in reply.strip().splitlines())


def test_the_example_session_of_the_key_page_is_true(session):
    blocks = re.findall(r"```\n(.*?)```", section(KEYS, "## An example session"), re.DOTALL)
    commands = [part for block in blocks for part in re.split(r"^> ", block, flags=re.MULTILINE) if part]
    assert len(commands) >= 8
    for part in commands:
        command, _, printed = part.partition("\n")
        if command.startswith("INFO"):  # other tests have used this server too, so only the names are compared
            counted = {line.partition(":")[0] for line in session(command).split()}
            assert {line.partition(":")[0] for line in printed.split()} <= counted
        else:
            assert shape(session(command)) == shape(printed), command


def test_the_segment_of_the_key_page_is_a_whole_one():
    (printed,) = re.findall(r"```\n> brotli -dc \S+\n(.*?)```", section(KEYS, "## A segment"), re.DOTALL)
    (post,) = set(POST.findall(printed))
    rows = segments.decode(post, brotli.compress(printed.encode()))
    assert brotli.decompress(segments.encode(post, rows)).decode() == printed


def test_the_tables_of_capacity_are_what_its_script_computes():
    from tests.bench import capacity  # not above: it imports matplotlib, which takes a second

    text = capacity.PAGE.read_text()
    assert capacity.page(text) == text
