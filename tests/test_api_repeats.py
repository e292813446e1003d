"""Requests that are sent again with their Idempotency-Key: they have one effect, and get the same answer each time."""

import json
import threading

import httpx
import pytest
from conftest import run_with_db
from making import jpeg, make_post
from proxy import Proxy
from state import unchanged
from uploading import BODY, TUS, begin, begin_finished, count_chunks, picture
from wire import FORM, dial, exchange, form, head, hear
from wiretrace import play

from storage import outbox

KEY = "Idempotency-Key: "
pytestmark = pytest.mark.usefixtures("empty")


@pytest.fixture
def post(serving, empty):
    return run_with_db(serving.server, lambda db: make_post(db, "alice"))


def send(site, method: str, target: str, *headers: str, body: bytes = b"", user: str = "alice"):
    token = site.authorization(user)
    return exchange(site.port, head(method, target, token, *headers, f"Content-Length: {len(body)}") + body)


def comment(site, post: str, key: str, text: str = "Hm", user: str = "alice"):
    body = json.dumps({"text": text}).encode()
    return send(site, "POST", f"/v1/posts/{post}/comments", KEY + key, body=body, user=user)


def at_once(count: int, request) -> list:
    """Calls `request` in `count` threads, which all start it at the same moment. Returns the answers."""
    barrier, answers = threading.Barrier(count), []

    def run():
        barrier.wait()
        answers.append(request())

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == count
    return answers


def compared(answer) -> tuple:
    """What must be equal in a repeated answer: all but the headers that are about this request or this connection.

    `Connection` differs for a form whose answer comes before its body was read: the API then closes the connection
    (RFC 9110, section 7.6.1).
    """
    ignored = "idempotent-replayed", "date", "request-id", "connection"
    headers = {name: value for name, value in answer.headers.items() if name not in ignored}
    return answer.status, headers, answer.body


def count_replays(answers) -> int:
    return sum(answer.headers.get("idempotent-replayed") == "true" for answer in answers)


def test_a_hundred_comments_with_one_key_are_one_comment_and_a_hundred_equal_answers(serving, post):
    answers = at_once(100, lambda: comment(serving, post, "one"))
    assert {answer.status for answer in answers} == {201}
    assert len({str(compared(answer)) for answer in answers}) == 1
    assert count_replays(answers) == 99
    assert serving.server.client.xlen(f"comments:{{0}}:{post}") == 1


def test_a_hundred_uploads_with_one_key_are_one_upload(serving):
    headers = ("Tus-Resumable: 1.0.0", "Upload-Length: 100", KEY + "one")
    answers = at_once(100, lambda: send(serving, "POST", "/v1/uploads", *headers))
    assert len({str(compared(answer)) for answer in answers}) == 1 and answers[0].status == 201
    assert count_replays(answers) == 99
    assert serving.server.client.hlen("uploads:{0}:alice") == 1


def test_a_hundred_posts_of_one_upload_with_one_key_are_one_post(serving):
    body = json.dumps({"upload": begin_finished(serving), "caption": "Hello"}).encode()
    kind = "Content-Type: application/json"
    answers = at_once(100, lambda: send(serving, "POST", "/v1/posts", kind, KEY + "one", body=body))
    assert len({str(compared(answer)) for answer in answers}) == 1 and answers[0].status == 201
    assert count_replays(answers) == 99
    assert len(serving.server.client.keys("post:*")) == 1


def uploads_with_chunks(site) -> set[str]:
    """The uploads that have chunks in the store."""
    return {path.parent.name for path in (site.folder / "store" / "chunks").glob("*/*")}


def test_twenty_forms_with_one_key_are_one_post_and_the_others_leave_nothing(serving):
    """Twenty is the number of open uploads that a user may have."""
    before = uploads_with_chunks(serving)
    body = form(("caption", None, b"Hello"), ("image", "a.jpg", jpeg()))
    answers = at_once(20, lambda: send(serving, "POST", "/v1/posts", FORM, KEY + "one", body=body))
    assert len({str(compared(answer)) for answer in answers}) == 1 and answers[0].status == 201
    assert count_replays(answers) == 19
    client = serving.server.client
    assert len(client.keys("post:*")) == len(client.keys("upload:*")) == len(client.keys("chunks:*")) == 1
    assert client.hlen("uploads:{0}:alice") == 0
    upload = client.hget(client.keys("post:*")[0], "upload")
    assert uploads_with_chunks(serving) - before == {upload}


def test_of_two_forms_at_the_same_time_the_second_to_finish_gets_the_post_of_the_first(serving):
    """Both forms have begun before one of them makes a post. Their captions differ, and that of the first stays."""
    headers = (serving.authorization(), FORM, KEY + "one")
    bodies = [form(("caption", None, text), ("image", "a.jpg", jpeg())) for text in (b"first", b"other")]
    lines = [dial(serving.port) for _ in bodies]
    for line, body in zip(lines, bodies, strict=True):
        line.sendall(head("POST", "/v1/posts", *headers, f"Content-Length: {len(body)}") + body[:200])
    answers = []
    for line, body in zip(lines, bodies, strict=True):
        line.sendall(body[200:])
        answers.append(hear(line))
        line.close()
    assert compared(answers[0]) == compared(answers[1]) and answers[0].json()["caption"] == "first"
    assert count_replays(answers) == 1
    assert len(serving.server.client.keys("upload:*")) == 1


def test_a_form_that_was_accepted_is_answered_again_before_its_body_is_read(serving):
    body = form(("image", "a.jpg", jpeg()))
    first = send(serving, "POST", "/v1/posts", FORM, KEY + "one", body=body)
    with dial(serving.port) as line:
        headers = (serving.authorization(), FORM, KEY + "one", "Expect: 100-continue", "Content-Length: 100000000")
        line.sendall(head("POST", "/v1/posts", *headers))
        data = b""
        while piece := line.recv(65536):
            data += piece
    assert data.startswith(b"HTTP/1.1 201 ") and data.endswith(first.body)
    assert b"idempotent-replayed: true\r\n" in data.lower()


@pytest.mark.parametrize("kind", ["comment", "upload", "post"])
def test_another_request_with_the_same_key_is_refused_and_changes_nothing(serving, post, kind):
    upload = begin_finished(serving)
    json_type = "Content-Type: application/json"
    # The address, and for each of two requests its headers and its body.
    target, first, other = {
        "comment": (
            f"/v1/posts/{post}/comments",
            ([json_type], b'{"text": "one"}'),
            ([json_type], b'{"text": "two"}'),
        ),
        "post": (
            "/v1/posts",
            ([json_type], json.dumps({"upload": upload}).encode()),
            ([json_type], json.dumps({"upload": upload, "caption": "another"}).encode()),
        ),
        "upload": (
            "/v1/uploads",
            ([TUS, "Upload-Length: 1"], b""),
            ([TUS, "Upload-Length: 2"], b""),
        ),
    }[kind]

    def send_with_key(headers: list[str], body: bytes):
        return send(serving, "POST", target, KEY + "one", *headers, body=body)

    answer = send_with_key(*first)
    with unchanged(serving.server.client, serving.folder):
        refused = send_with_key(*other)
        again = send_with_key(*first)
    assert (answer.status, refused.status, refused.json()["code"]) == (201, 422, "reused")
    assert compared(again) == compared(answer) and count_replays([again]) == 1


def test_a_key_belongs_to_a_user_a_method_and_a_path(serving, post):
    other = run_with_db(serving.server, lambda db: make_post(db, "bob"))
    answers = [
        comment(serving, post, "one"),
        comment(serving, post, "one", user="bob"),
        comment(serving, other, "one"),
        comment(serving, post, "ONE"),
    ]
    assert len({answer.json()["id"] + answer.headers["location"] for answer in answers}) == 4
    assert count_replays(answers) == 0


def test_after_a_refusal_the_same_key_may_be_used_for_another_try(serving):
    body = json.dumps({"upload": begin_finished(serving)}).encode()
    post = send(serving, "POST", "/v1/posts", "Content-Type: application/json", body=body).json()["id"]
    with unchanged(serving.server.client, serving.folder):
        assert comment(serving, post, "one").json()["code"] == "notready"
    run_with_db(serving.server, lambda db: outbox.publish(db, post, "thumbhash"))
    accepted = comment(serving, post, "one")
    assert (accepted.status, count_replays([accepted])) == (201, 0)
    with unchanged(serving.server.client, serving.folder):
        assert comment(serving, post, "two", text=" ").status == 422
    assert comment(serving, post, "two", text="Not blank").status == 201
    with unchanged(serving.server.client, serving.folder):
        gif = form(("image", "a.jpg", b"GIF89a"))
        assert send(serving, "POST", "/v1/posts", FORM, KEY + "one", body=gif).status == 415
    assert send(serving, "POST", "/v1/posts", FORM, KEY + "one", body=form(("image", "a.jpg", jpeg()))).status == 201


@pytest.mark.parametrize("how", ["fin", "rst"])
@pytest.mark.parametrize("kind", ["form", "upload", "comment"])
def test_a_request_whose_answer_was_lost_has_one_effect_when_it_is_sent_again(serving, post, kind, how):
    headers = {"Authorization": f"Bearer {serving.token('alice')}", "Idempotency-Key": "one"}
    upload = begin_finished(serving)
    requests = {
        "form": ("/v1/posts", {"files": {"image": jpeg()}}, "post:*"),
        "upload": ("/v1/posts", {"json": {"upload": upload}}, "post:*"),
        "comment": (f"/v1/posts/{post}/comments", {"json": {"text": "Hm"}}, f"comments:{{0}}:{post}"),
    }
    target, body, pattern = requests[kind]
    before = set(serving.server.client.keys(pattern))
    with Proxy(serving.port) as proxy, httpx.Client(headers=headers) as line:
        line.base_url = f"http://127.0.0.1:{proxy.port}"
        proxy.lose(how=how)
        with pytest.raises(httpx.TransportError):
            line.post(target, **body)
        assert proxy.lost.is_set()
        again = line.post(target, **body)
    assert again.status_code == 201
    assert again.headers["idempotent-replayed"] == "true"
    assert len(set(serving.server.client.keys(pattern)) - before) == 1
    if kind == "comment":
        assert serving.server.client.xlen(pattern) == 1


def test_a_creation_with_first_bytes_that_is_sent_again_returns_the_same_upload_and_offset(serving):
    image = picture(1000)
    tus = (BODY, TUS, "Upload-Length: 1000", KEY + "one")
    first = send(serving, "POST", "/v1/uploads", *tus, body=image[:600])
    again = send(serving, "POST", "/v1/uploads", *tus, body=image[:600])
    assert first.headers["upload-offset"] == again.headers["upload-offset"] == "600"
    assert first.headers["location"] == again.headers["location"]
    assert count_chunks(serving, first.headers["location"].rsplit("/", 1)[1]) == 1


def test_a_deleted_upload_is_not_created_again_by_its_key(serving):
    upload = begin(serving, 100, "alice", KEY + "one")
    play(serving, "> DELETE /v1/uploads/<upload>\n< 204", known={"upload": upload})
    again = "> POST /v1/uploads\n> Upload-Length: 100\n> Idempotency-Key: one\n< 201\n< Location: /v1/uploads/<upload>"
    play(serving, again + "\n< Idempotent-Replayed: true\n< -Upload-Offset", known={"upload": upload})
    assert not serving.server.client.exists(f"upload:{{0}}:{upload}")


def test_a_stored_key_takes_250_bytes_at_most_and_expires_within_a_day(serving, post):
    comment(serving, post, "x" * 255)
    key = serving.server.client.keys("once:*")[0]
    assert serving.server.client.memory_usage(key) <= 250
    assert 0 < serving.server.client.pttl(key) <= 24 * 60 * 60 * 1000
