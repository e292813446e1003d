"""The command `imagegram`, as a process of its own, on a site with a worker and over lines that break."""

import errno
import http.server
import json
import os
import pty
import random
import re
import resource
import signal
import stat
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest
from conftest import ROOT, RedisServer, Site, free_port, photograph, running_site, until
from making import bmp, jpeg
from PIL import Image
from proxy import Proxy

from api.client import calls, printing, settings

MIB = 2**20
REFUSED, UNUSABLE, UNREACHABLE, INTERRUPTED = 1, 2, 3, 130


class Person:
    """Somebody with a home folder of their own, who is logged in."""

    def __init__(self, site: Site, home: Path, name: str, port: int):
        self.site, self.home, self.name = site, home, name
        self.url = f"http://127.0.0.1:{port}"
        self.environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": str(home), "TERM": "xterm"}
        self.login = home / ".config" / "imagegram" / "login.json"
        self.login.parent.mkdir(parents=True)
        self.login.write_text(json.dumps({"url": self.url, "token": site.token(name)}))

    def start(self, *arguments: str, **given) -> subprocess.Popen:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        command = [sys.executable, "-m", "api.client", *arguments]
        return subprocess.Popen(command, cwd=self.home, env=self.environment, text=True, **{**pipes, **given})

    def run(self, *arguments: str, status: int = 0, stdin: str = "") -> tuple[str, str]:
        """What a command writes to stdout and to stderr. It must end with `status`."""
        process = self.start(*arguments)
        out, err = process.communicate(stdin, timeout=60)
        assert process.returncode == status, err
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", out + err), "control characters without a terminal"
        return out, err

    def json(self, *arguments: str) -> dict:
        return json.loads(self.run(*arguments, "--json")[0])

    def posts(self) -> list[dict]:
        """This person's posts that are ready."""
        with self.site.client() as client:
            return [post for post in client.get("/v1/posts?limit=100").json()["items"] if post["author"] == self.name]

    def open_uploads(self) -> list[dict]:
        with self.site.client(self.name) as client:
            return client.get("/v1/uploads").json()["items"]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A site with a worker and a Redis server of its own, for all tests of this file."""
    with closing(RedisServer("valkey")) as server, running_site(server, tmp_path_factory.mktemp("site")) as site:
        site.worker()
        yield site


@pytest.fixture
def line(served):
    """A proxy in front of the site."""
    with Proxy(served.port) as proxy:
        yield proxy


def new_person(site, tmp_path, port) -> Person:
    return Person(site, tmp_path, f"p{random.randrange(10**9)}", port)


@pytest.fixture
def person(served, tmp_path):
    """Somebody on a good line."""
    return new_person(served, tmp_path, served.port)


@pytest.fixture
def traveller(served, line, tmp_path):
    """Somebody whose line is the proxy."""
    return new_person(served, tmp_path, line.port)


@pytest.fixture
def stand_in():
    """An HTTP server that gives the answers of a list: status, headers and body. It notes the headers that it gets."""
    answers, heard = [], []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            heard.append((time.monotonic(), dict(self.headers)))
            status, headers, body = answers.pop(0) if len(answers) > 1 else answers[0]
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.answers, server.heard = answers, heard
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


EMPTY_FEED = 200, {"Content-Type": "application/json", "Request-Id": "1"}, b'{"items": [], "next": null}'


# The login


def test_login_stores_a_token_that_the_site_accepts_for_this_user_alone(person):
    person.login.unlink()
    person.login.parent.rmdir()
    token = person.site.token("alice")
    out, _ = person.run("login", person.url + "/", stdin=token + "\n")
    assert out == f"logged in at {person.url} as alice\n"
    assert json.loads(person.login.read_text()) == {"url": person.url, "token": token}
    assert stat.S_IMODE(person.login.stat().st_mode) == 0o600
    assert stat.S_IMODE(person.login.parent.stat().st_mode) == 0o700
    assert list(person.login.parent.iterdir()) == [person.login]
    person.run("logout")
    assert not person.login.exists()
    assert "Log in first: imagegram login" in person.run("feed", status=UNUSABLE)[1]


def test_login_asks_at_a_terminal_and_does_not_show_the_token(person):
    token = person.site.token("alice")
    ours, theirs = pty.openpty()
    process = person.start("login", stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    printed = b""
    for question, answer in ((b"Address of the site: ", person.url), (b"Token: ", token)):
        while not printed.endswith(question):
            printed += os.read(ours, 1000)
        os.write(ours, answer.encode() + b"\n")
    printed += read_terminal(ours)
    assert process.wait(20) == 0
    assert b" as alice" in printed and token.encode() not in printed
    assert json.loads(person.login.read_text())["token"] == token


def read_terminal(file: int) -> bytes:
    """All that a process writes to a terminal until it ends."""
    printed = b""
    while True:
        try:
            piece = os.read(file, 65536)
        except OSError as error:  # nobody has the other end any more
            assert error.errno == errno.EIO
            piece = b""
        if not piece:
            os.close(file)
            return printed
        printed += piece


@pytest.mark.parametrize(
    ("url", "token", "status", "message"),
    [
        (None, "a.wrong.token", REFUSED, "the token is not accepted"),
        (None, "", UNUSABLE, "no token was given"),
        ("https://example.org/feed", "x", UNUSABLE, "is no address of a site"),
        ("http://127.0.0.1:1", "x", UNREACHABLE, "Connection refused"),
        ("stand-in", "x", UNREACHABLE, "answers 200, but not as Imagegram does"),
        ("http://..", "x", UNUSABLE, "http://.. is no address of a site"),
    ],
)
def test_a_login_that_does_not_work_is_not_stored(person, stand_in, url, token, status, message):
    stand_in.answers.append((200, {"Content-Type": "text/html"}, b"<h1>Wi-Fi of the train</h1>"))
    before = person.login.read_bytes()
    url = stand_in.url if url == "stand-in" else url or person.url
    _, err = person.run("login", url, "--patience", "0", status=status, stdin=token)
    assert message in err and err.startswith("imagegram: ") and err.count("\n") == 1
    assert person.login.read_bytes() == before


def test_a_login_names_the_user_but_never_shows_a_token_that_names_nobody(person, stand_in):
    stand_in.answers.append(EMPTY_FEED)
    assert person.run("login", stand_in.url, stdin="a.b.c")[0] == f"logged in at {stand_in.url}\n"
    assert json.loads(person.run("login", stand_in.url, "--json", stdin="a.b.c")[0]) == {
        "url": stand_in.url,
        "user": None,
    }


def test_a_proxy_that_the_client_cannot_use_ends_the_command_with_one_line(person):
    person.environment["ALL_PROXY"] = "socks5://127.0.0.1:1"
    _, err = person.run("feed", status=UNUSABLE)
    assert "or a proxy" in err and "cannot be used" in err and err.count("\n") == 1


def test_a_full_disk_ends_the_command_with_one_line_before_anything_is_sent(person, stand_in):
    """The limit of the size of files stands for the disk."""
    stand_in.answers.append(EMPTY_FEED)
    person.environment |= {"IMAGEGRAM_URL": stand_in.url}
    process = person.start("comment", "x", "y", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)))
    _, err = process.communicate(timeout=20)
    assert process.returncode == UNUSABLE
    assert re.fullmatch(r"imagegram: .*\.json cannot be written: File too large\n", err) and not stand_in.heard
    assert [path.name for path in (person.home / ".local/state/imagegram").iterdir()] == ["locks"]


def test_a_record_survives_a_loss_of_power(tmp_path, monkeypatch):
    """The file is synced under its first name, and its folder after it has its last one."""
    synced = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.readlink(f"/proc/self/fd/{file}")))
    settings.write_private(tmp_path / "a.json", {})
    assert [Path(path).parent for path in synced] == [tmp_path, tmp_path.parent] and synced[1] == str(tmp_path)


def test_a_folder_that_cannot_be_written_ends_the_command_with_one_line(person):
    (person.home / "file").touch()
    (person.home / "photo.jpg").write_bytes(jpeg())
    person.environment["XDG_STATE_HOME"] = person.environment["XDG_CONFIG_HOME"] = str(person.home / "file")
    token = person.site.token(person.name)
    _, err = person.run("login", person.url, status=UNUSABLE, stdin=token)
    assert err == f"imagegram: {person.home}/file/imagegram/login.json cannot be written: Not a directory\n"
    person.environment |= {"IMAGEGRAM_URL": person.url, "IMAGEGRAM_TOKEN": token}
    _, err = person.run("upload", "photo.jpg", status=UNUSABLE)
    assert err == f"imagegram: {person.home}/file/imagegram cannot be written: Not a directory\n"
    assert not person.posts() and not person.open_uploads()


def test_the_stored_token_is_sent_to_no_other_site(person, stand_in):
    stand_in.answers.append(EMPTY_FEED)
    person.environment["IMAGEGRAM_URL"] = stand_in.url
    person.run("feed")
    assert "Authorization" not in stand_in.heard[0][1]
    person.environment["IMAGEGRAM_TOKEN"] = "of-the-script"
    person.run("feed")
    assert stand_in.heard[1][1]["Authorization"] == "Bearer of-the-script"


# Posts and comments


def test_the_story_of_a_post(person):
    (person.home / "photo.jpg").write_bytes(jpeg())
    caption = "From a [bold]train\nwith a second line"
    post = person.json("upload", "photo.jpg", "--caption", caption)
    assert (post["status"], post["caption"]) == ("ready", caption)
    comment = person.json("comment", post["id"], "First!")
    shown = person.json("show", post["id"])
    assert shown["post"]["comment_count"] == 1
    assert shown["comments"] == {"items": [comment], "next": None}
    out, _ = person.run("show", post["id"])
    created, said = (item["created_at"][:16].replace("T", " ") for item in (post, comment))
    assert out == (
        f"{post['id']}  {person.name}  {created}  1 comment\n"
        "  From a [bold]train\n  with a second line\n"
        f"  {person.url}{post['image']['url']}\n"
        f"  {comment['id']}  {person.name}  {said}\n    First!\n"
    )
    _, err = person.run("delete", post["id"], "", status=REFUSED)
    assert err == "imagegram: this address does not take this method\n"
    assert person.run("delete", post["id"], comment["id"])[0] == "deleted\n"
    assert person.json("delete", post["id"]) == {"id": post["id"], "deleted": True}
    assert person.run("delete", post["id"], status=REFUSED) == ("", "imagegram: no such post\n")
    assert not person.posts()


def test_the_feed_is_read_page_by_page_or_as_a_whole(person):
    with person.site.client(person.name) as client:
        sent = [client.post("/v1/posts", files={"image": jpeg()}).json()["id"] for _ in range(3)]
    until(lambda: len(person.posts()) == 3, what="the images")
    first = person.json("feed", "--limit", "2")
    second = person.json("feed", "--limit", "2", "--cursor", first["next"])
    pages = [post["id"] for page in (first, second) for post in page["items"]]
    out, _ = person.run("feed", "--limit", "2", "--all", "--json")
    everything = [json.loads(row)["id"] for row in out.splitlines()]
    assert everything[:4] == pages and set(sent) <= set(everything)
    out, err = person.run("feed", "--limit", "2")
    assert first["items"][0]["id"] in out and f"imagegram feed --limit 2 --cursor {first['next']}" in err
    head = f"{sys.executable} -m api.client feed --all | head -n 1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", head], env=person.environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    with open("/dev/full", "w") as full:
        process = person.start("feed", stdout=full)
        assert process.communicate(timeout=20)[1] == "imagegram: No space left on device\n"
    assert process.returncode == UNUSABLE


# Pictures


def test_a_picture_comes_as_a_first_look_and_later_only_the_rest(traveller, line):
    (traveller.home / "photo.jpg").write_bytes(photograph())
    post = traveller.json("upload", "photo.jpg")
    looks, served = post["image"]["scans"], traveller.home / "served.jpg"
    with traveller.site.client() as client:
        whole = client.get(post["image"]["url"]).content
    assert traveller.json("picture", post["id"], "served.jpg", "--look", "1")["bytes"] == looks[0]
    assert served.read_bytes() == whole[: looks[0]] + b"\xff\xd9"
    with Image.open(served) as image:
        assert image.size == (600, 600) and image.load()
    before = line.down
    assert traveller.run("picture", post["id"], "served.jpg")[0] == f"served.jpg  {len(whole)} of {len(whole)} bytes\n"
    assert served.read_bytes() == whole and len(whole) - looks[0] < line.down - before < len(whole), "only the rest"
    line.before[b"GET /v1/images/"] = lambda: line.lose(after=len(whole) // 2)
    with traveller.start("picture", post["id"], "served.jpg") as process:
        assert line.lost.wait(60)
        assert served.read_bytes() == whole, "no first look replaces it"
        assert process.wait(60) == 0
    assert sorted(path.name for path in traveller.home.iterdir() if not path.name.startswith(".")) == [
        "photo.jpg",
        "served.jpg",
    ]


@pytest.mark.parametrize("other", [photograph(), jpeg()], ids=["longer", "shorter"])
def test_a_picture_that_was_made_again_is_not_joined_with_the_first_look_of_the_old_one(traveller, other):
    (traveller.home / "photo.jpg").write_bytes(photograph())
    post = traveller.json("upload", "photo.jpg")
    traveller.run("picture", post["id"], "--look", "2")
    (traveller.site.folder / "store" / "images" / f"{post['id']}.jpg").write_bytes(other)  # as after a restore
    traveller.run("picture", post["id"])
    assert (traveller.home / f"{post['id']}.jpg").read_bytes() == other


# Uploads


def large_picture(path: Path) -> int:
    """Writes a picture of 1.5 MiB, which takes a moment on a slow line. Returns its size."""
    path.write_bytes(bmp(1024, 512, random.choice(["teal", "gold", "tomato", "navy", "olive", "plum"])))
    return path.stat().st_size


def wait_for_bytes(line: Proxy, count: int) -> None:
    until(lambda: line.up > count, what=f"{count} bytes")


def test_a_killed_upload_goes_on_where_it_was_also_if_the_api_was_killed_meanwhile(traveller, line):
    size = large_picture(traveller.home / "photo.bmp")
    line.rate = 1.5 * MIB
    command = "upload", "photo.bmp", "--caption", "At last"
    first = traveller.start(*command)
    wait_for_bytes(line, 0.4 * MIB)
    first.kill()
    first.wait()
    second = traveller.start(*command)
    wait_for_bytes(line, 0.9 * MIB)
    api = traveller.site.processes[0]
    os.kill(api.pid, signal.SIGKILL)
    api.wait()
    until(lambda: second.stderr.readline().endswith(" s\n"), what="the note of a break")
    line.rate = None
    traveller.site.processes[0] = traveller.site.api()
    traveller.site.processes.pop()
    out, err = second.communicate(timeout=60)
    assert second.returncode == 0, err
    assert "At last" in out
    (post,) = traveller.posts()
    assert post["caption"] == "At last" and not traveller.open_uploads()
    # The only bytes that are sent twice are those that were under way at the two kills.
    assert line.up < 1.4 * size


def test_ctrl_c_says_how_to_go_on_and_the_same_command_goes_on_but_not_two_at_once(traveller, line):
    size = large_picture(traveller.home / "a photo.bmp")
    line.rate = 1.5 * MIB
    uploading = traveller.start("upload", "a photo.bmp")
    wait_for_bytes(line, 0.4 * MIB)
    line.rate = 0.1 * MIB
    _, err = traveller.run("upload", "a photo.bmp", status=UNUSABLE)
    assert err == "imagegram: another process does the same at this moment\n"
    uploading.send_signal(signal.SIGINT)
    out, err = uploading.communicate(timeout=20)
    assert (uploading.returncode, out) == (INTERRUPTED, "")
    assert re.fullmatch(rf"stopped at \d+ of {size} bytes\. .* there: imagegram upload 'a photo\.bmp'\n", err)
    line.cut("rst")  # what the first process had sent and the line still has
    line.rate, sent = None, line.up
    traveller.run("upload", "a photo.bmp")
    assert line.up - sent < size and len(traveller.posts()) == 1


def test_whichever_answers_are_lost_an_upload_becomes_exactly_one_post(traveller, line):
    (traveller.home / "photo.jpg").write_bytes(jpeg())
    lost = []

    def lose(call: str, how: str) -> None:
        lost.append(call)
        line.lose(how=how)

    line.before |= {
        b"POST /v1/uploads": lambda: lose("create", "fin"),
        b"PATCH /v1/uploads": lambda: lose("send", "rst"),
        b"POST /v1/posts": lambda: lose("publish", "fin"),
    }
    _, err = traveller.run("upload", "photo.jpg")
    assert lost == ["create", "send", "publish"] and err.count("Trying again in ") == 3
    assert len(traveller.posts()) == 1 and not traveller.open_uploads()


def test_a_client_killed_before_it_knows_its_post_finds_it_again(traveller, line):
    """Killed after the post was made, and before its answer came. The upload's own address is 404 then."""
    (traveller.home / "photo.jpg").write_bytes(jpeg())
    uploading = traveller.start("upload", "photo.jpg", "--caption", "Once")
    line.before[b"POST /v1/posts"] = lambda: line.lose(how="silence")
    assert line.lost.wait(20)
    uploading.kill()
    uploading.wait()
    post = traveller.json("upload", "photo.jpg", "--caption", "Once")
    assert traveller.posts() == [post]


def test_the_same_command_again_makes_no_second_post_unless_it_is_asked_to(person):
    (person.home / "photo.jpg").write_bytes(jpeg())
    command = "upload", "photo.jpg", "--caption", "Once"
    post = person.json(*command)
    out, err = person.run(*command, "--json")
    assert json.loads(out) == post
    assert err == f"this file is the post {post['id']} already; --again publishes it once more\n"
    assert len(person.posts()) == 1
    second = person.json(*command, "--again")
    assert second["id"] != post["id"]
    with person.site.client(person.name) as client:
        client.delete(f"/v1/posts/{second['id']}").raise_for_status()
    assert person.json(*command)["id"] not in (post["id"], second["id"]), "the deleted one is not shown again"
    assert person.json("upload", "photo.jpg", "--caption", "Another text")["caption"] == "Another text"
    reader, unread = os.pipe()
    os.close(reader)
    process = person.start(*command, stderr=unread)  # nobody reads that the file is a post already
    os.close(unread)
    assert "  Once\n" in process.communicate(timeout=20)[0] and process.returncode == 0
    assert len(person.posts()) == 3


def test_an_upload_that_the_site_has_no_more_begins_again(traveller, line):
    size = large_picture(traveller.home / "photo.bmp")
    line.rate = 1.5 * MIB
    uploading = traveller.start("upload", "photo.bmp")
    wait_for_bytes(line, 0.4 * MIB)
    with traveller.site.client(traveller.name) as client:
        upload = traveller.open_uploads()[0]["id"]
        client.delete(f"/v1/uploads/{upload}", headers={"Tus-Resumable": "1.0.0"}).raise_for_status()
    line.rate = None
    out, err = uploading.communicate(timeout=60)
    assert uploading.returncode == 0, err
    assert "the upload begins again" in err
    assert len(traveller.posts()) == 1 and not traveller.open_uploads()
    assert line.up > size


def test_a_file_that_changes_is_another_upload(traveller, line):
    """Between two runs: nothing of the old bytes is used. During a run: the command says so."""
    path = traveller.home / "photo.bmp"
    large_picture(path)
    line.rate = 1.5 * MIB
    uploading = traveller.start("upload", "photo.bmp")
    wait_for_bytes(line, 0.4 * MIB)
    path.write_bytes(jpeg())
    line.cut()
    out, err = uploading.communicate(timeout=20)
    assert uploading.returncode == UNUSABLE and "the file has changed while it was sent" in err
    line.rate = None
    traveller.run("upload", "photo.bmp")
    (post,) = traveller.posts()
    (left,) = traveller.open_uploads()  # that of the old file, until it expires
    assert left["length"] > MIB


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"not an image at all" * 1000, "only PNG, JPEG and BMP"), (b"", "the image is empty")],
    ids=["text", "empty"],
)
def test_a_file_that_is_no_image_is_refused_and_leaves_no_upload_behind(person, data, message):
    (person.home / "notes.txt").write_bytes(data)
    _, err = person.run("upload", "notes.txt", status=REFUSED)
    assert message in err and err.count("\n") == 1
    assert not person.open_uploads() and not person.posts()


def test_a_damaged_image_ends_with_the_reason(person):
    (person.home / "photo.jpg").write_bytes(jpeg()[:600])
    out, _ = person.run("upload", "photo.jpg", status=REFUSED)
    assert "  failed, " in out


def test_a_note_never_goes_to_stdout(monkeypatch, capsys):
    """Not even if the caller has closed stderr, as `2>&-` does."""
    monkeypatch.setattr(sys, "stderr", None)
    printing.note("Trying again")
    assert capsys.readouterr().out == ""


def test_what_is_no_file_and_no_text_ends_the_command_with_one_line(person):
    os.mkfifo(person.home / "pipe")
    assert person.run("upload", "pipe", status=UNUSABLE)[1] == "imagegram: pipe is not a regular file\n"
    missing = "imagegram: photo.jpg cannot be read: No such file or directory\n"
    assert person.run("upload", "photo.jpg", status=UNUSABLE)[1] == missing
    assert person.run("comment", "x", "caf\udce9", status=UNUSABLE)[1].endswith("error: an argument is not UTF-8\n")


def test_a_terminal_shows_a_progress_bar_with_rate_and_time_left(traveller, line):
    large_picture(traveller.home / "photo [1].bmp")
    line.rate = 3 * MIB
    ours, theirs = pty.openpty()
    uploading = traveller.start("upload", "photo [1].bmp", stderr=theirs)
    os.close(theirs)
    printed = read_terminal(ours).decode()
    assert uploading.wait(20) == 0
    assert re.search(r"photo \[1\]\.bmp.*\d\.\d/1\.5.*MiB.*MB/s.*0:00:0\d", printed)


# The line


def test_a_comment_whose_answer_is_lost_is_added_once(traveller, line):
    (traveller.home / "photo.jpg").write_bytes(jpeg())
    post = traveller.json("upload", "photo.jpg")["id"]
    line.before[b"/comments HTTP"] = line.lose
    _, err = traveller.run("comment", post, "Once")
    assert line.lost.is_set() and "Trying again in " in err
    # Also a command that gave up without an answer is repeated safely, by the same command.
    line.before[b"/comments HTTP"] = line.lose
    _, err = traveller.run("comment", post, "Twice", "--patience", "0", status=UNREACHABLE)
    assert "Gave up" in err
    traveller.run("comment", post, "Twice")
    with traveller.site.client() as client:
        comments = client.get(f"/v1/posts/{post}/comments").json()["items"]
    assert [comment["text"] for comment in comments] == ["Twice", "Once"]
    line.before[b"DELETE "] = line.lose
    traveller.run("delete", post)
    assert line.lost.is_set() and not traveller.posts()


def test_watch_prints_every_change_once_over_a_line_that_breaks(traveller, line):
    with traveller.site.client(traveller.name) as client:
        posts = [client.post("/v1/posts", files={"image": jpeg()}).json()["id"] for _ in range(6)]
        until(lambda: len(traveller.posts()) == 6, what="the images")
        watching = traveller.start("watch", "--json")
        assert watching.stderr.readline() == f"watching {traveller.url}\n"
        for n, post in enumerate(posts):
            if n % 2:
                line.lose(how="rst")  # the answer that tells of the change before
            client.post(f"/v1/posts/{post}/comments", json={"text": str(n)}).raise_for_status()
            line.cut()
        client.delete(f"/v1/posts/{posts[0]}").raise_for_status()
        heard = []
        while len(heard) < 6 or heard[-1] != {"id": posts[0], "deleted": True}:
            heard.append(json.loads(watching.stdout.readline()))
    watching.send_signal(signal.SIGINT)
    assert watching.wait(20) == INTERRUPTED
    assert watching.stdout.read() == ""
    changed = [item["latest_comments"][0]["text"] for item in heard if not item.get("deleted")]
    # The first post changed twice. If both came in one answer, only its deletion is told.
    assert sorted(changed) in (list("012345"), list("12345"))


def test_a_temporary_answer_is_repeated_not_before_retry_after(person, stand_in):
    problem = json.dumps({"code": "unreachable", "detail": "the database cannot be reached"}).encode()
    headers = {"Content-Type": "application/problem+json", "Request-Id": "1", "Retry-After": "1"}
    stand_in.answers += [(503, headers, problem), (302, {"Location": "http://login.example/"}, b""), EMPTY_FEED]
    person.environment["IMAGEGRAM_URL"] = stand_in.url
    out, err = person.run("feed")
    first, second = err.splitlines()
    assert first.startswith("the database cannot be reached. Trying again in 1.")
    assert "answers 302, but not as Imagegram does, it leads to http://login.example/" in second
    assert stand_in.heard[1][0] - stand_in.heard[0][0] >= 1


@pytest.mark.parametrize("answer", [(204, {}, b""), (200, {"Content-Type": "application/json"}, b"{}")])
def test_an_answer_without_a_request_id_is_not_the_sites(stand_in, answer):
    stand_in.answers.append(answer)
    with pytest.raises(calls.Trouble, match=f"answers {answer[0]}, but not as Imagegram does"):
        calls.Site(stand_in.url, "", 0, print).once("GET", "/v1/posts")


def test_watch_stays_patient_for_days(monkeypatch):
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    patience = calls.Patience(float("inf"), lambda text: None)
    for _ in range(10_000):
        patience.wait(calls.Trouble("away"))
    assert max(slept) <= calls.LONGEST_PAUSE and sum(slept) > 24 * 60 * 60


def test_a_wait_that_is_longer_than_the_users_patience_is_not_begun(person):
    """Here it is the hour until the oldest of too many uploads expires."""
    headers = {"Tus-Resumable": "1.0.0", "Upload-Length": "100"}
    with person.site.client(person.name) as client:
        for _ in range(20):
            client.post("/v1/uploads", headers=headers).raise_for_status()
    (person.home / "photo.jpg").write_bytes(jpeg())
    began = time.monotonic()
    _, err = person.run("upload", "photo.jpg", status=UNREACHABLE)
    assert time.monotonic() - began < 10
    assert "too many open uploads" in err and re.search(r"It asks to wait 3\d\d\d s\. Gave up", err)


def test_a_site_that_stays_away_ends_the_command_after_the_stated_time(person):
    person.environment["IMAGEGRAM_URL"] = f"http://127.0.0.1:{free_port()}"
    began = time.monotonic()
    _, err = person.run("feed", "--patience", "1.5", status=UNREACHABLE)
    assert 1.5 <= time.monotonic() - began < 8
    assert err.splitlines()[-1].endswith("Gave up; the limit is 1.5 s, see --patience")


def test_an_expired_token_says_to_log_in_again(person):
    (person.home / "photo.jpg").write_bytes(jpeg())
    person.environment["IMAGEGRAM_TOKEN"] = person.site.token(person.name, exp=1)
    _, err = person.run("upload", "photo.jpg", status=REFUSED)
    assert err == "imagegram: the token is not accepted: it has expired. Log in: imagegram login\n"
