"""Requests that are sent again: one effect, and the same answer as often as it is asked for."""

import asyncio
import json
import threading

import httpx
import pytest
from conftest import connect
from making import jpeg, make_post
from proxy import Proxy
from uploading import BODY, begin, count_chunks, picture
from wire import FORM, dial, exchange, form, head, hear
from wiretrace import play

from storage import outbox

KEY = "Idempotency-Key: "


@pytest.fixture(autouse=True)
def empty(serving):
    serving.server.client.flushall()


def stored_with(serving, work):
    """What a coroutine of storage returns, run on the site's Redis."""

    async def run():
        db = connect(serving.server)
        try:
            return await work(db)
        finally:
            await db.close()

    return asyncio.run(run())


@pytest.fixture
def post(serving, empty):
    return stored_with(serving, lambda db: make_post(db, "alice"))


def ask(site, method: str, target: str, *headers: str, body: bytes = b"", user: str = "alice"):
    token = site.authorization(user)
    return exchange(site.port, head(method, target, token, *headers, f"Content-Length: {len(body)}") + body)


def comment(site, post: str, key: str, text: str = "Hm", user: str = "alice"):
    body = json.dumps({"text": text}).encode()
    return ask(site, "POST", f"/v1/posts/{post}/comments", KEY + key, body=body, user=user)


def at_once(count: int, request) -> list:
    """Answers to so many requests, of which all are connected before the first is sent."""
    barrier, answers = threading.Barrier(count), []

    def one():
        barrier.wait()
        answers.append(request())

    threads = [threading.Thread(target=one) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == count
    return answers


def shown(answer) -> tuple:
    """What must be equal: everything but that it is said again, and what is said of the connection alone.

    A form that is answered before its body was read ends its connection (RFC 9110, section 7.6.1).
    """
    aside = "idempotent-replayed", "date", "request-id", "connection"
    headers = {name: value for name, value in answer.headers.items() if name not in aside}
    return answer.status, headers, answer.body


def replays(answers) -> int:
    return sum(answer.headers.get("idempotent-replayed") == "true" for answer in answers)


def test_a_hundred_comments_with_one_key_are_one_comment_and_a_hundred_equal_answers(serving, post):
    answers = at_once(100, lambda: comment(serving, post, "one"))
    assert {answer.status for answer in answers} == {201}
    assert len({str(shown(answer)) for answer in answers}) == 1
    assert replays(answers) == 99
    assert serving.server.client.xlen(f"comments:{{0}}:{post}") == 1


def test_a_hundred_uploads_with_one_key_are_one_upload(serving):
    headers = ("Tus-Resumable: 1.0.0", "Upload-Length: 100", KEY + "one")
    answers = at_once(100, lambda: ask(serving, "POST", "/v1/uploads", *headers))
    assert len({str(shown(answer)) for answer in answers}) == 1 and answers[0].status == 201
    assert replays(answers) == 99
    assert serving.server.client.hlen("uploads:{0}:alice") == 1


def test_a_hundred_posts_of_one_upload_with_one_key_are_one_post(serving):
    body = json.dumps({"upload": finished(serving), "caption": "Hello"}).encode()
    kind = "Content-Type: application/json"
    answers = at_once(100, lambda: ask(serving, "POST", "/v1/posts", kind, KEY + "one", body=body))
    assert len({str(shown(answer)) for answer in answers}) == 1 and answers[0].status == 201
    assert replays(answers) == 99
    assert len(serving.server.client.keys("post:*")) == 1


def finished(site, user: str = "alice") -> str:
    trace = """
        > POST /v1/uploads
        > Upload-Length: 100
        > Content-Type: application/offset+octet-stream
        > [picture]
        < 201
        < Location: /v1/uploads/<upload>
    """
    return play(site, trace, user, picture=picture(100))["upload"]


def chunks(site) -> list[str]:
    """The uploads that have chunks in the store."""
    return [path.parent.name for path in (site.folder / "store" / "chunks").glob("*/*")]


def test_twenty_forms_with_one_key_are_one_post_and_the_others_leave_nothing(serving):
    """As many as a user may have open uploads."""
    before = set(chunks(serving))
    body = form(("caption", None, b"Hello"), ("image", "a.jpg", jpeg()))
    answers = at_once(20, lambda: ask(serving, "POST", "/v1/posts", FORM, KEY + "one", body=body))
    assert len({str(shown(answer)) for answer in answers}) == 1 and answers[0].status == 201
    assert replays(answers) == 19
    client = serving.server.client
    assert len(client.keys("post:*")) == len(client.keys("upload:*")) == len(client.keys("chunks:*")) == 1
    assert client.hlen("uploads:{0}:alice") == 0
    kept = client.hget(client.keys("post:*")[0], "upload")
    assert set(chunks(serving)) - before == {kept}


def test_of_two_forms_at_once_the_second_to_finish_gets_the_post_of_the_first(serving):
    """Both are half way when neither has made a post; their captions differ, and the first one's stays."""
    asked = (serving.authorization(), FORM, KEY + "one")
    bodies = [form(("caption", None, text), ("image", "a.jpg", jpeg())) for text in (b"first", b"other")]
    lines = [dial(serving.port) for _ in bodies]
    for line, body in zip(lines, bodies, strict=True):
        line.sendall(head("POST", "/v1/posts", *asked, f"Content-Length: {len(body)}") + body[:200])
    answers = []
    for line, body in zip(lines, bodies, strict=True):
        line.sendall(body[200:])
        answers.append(hear(line))
        line.close()
    assert shown(answers[0]) == shown(answers[1]) and answers[0].json()["caption"] == "first"
    assert replays(answers) == 1
    assert len(serving.server.client.keys("upload:*")) == 1


def test_a_form_that_was_taken_is_answered_again_before_its_body_is_read(serving):
    body = form(("image", "a.jpg", jpeg()))
    first = ask(serving, "POST", "/v1/posts", FORM, KEY + "one", body=body)
    with dial(serving.port) as line:
        asked = (serving.authorization(), FORM, KEY + "one", "Expect: 100-continue")
        line.sendall(head("POST", "/v1/posts", *asked, "Content-Length: 100000000"))
        data = b""
        while piece := line.recv(65536):
            data += piece
    assert data.startswith(b"HTTP/1.1 201 ") and data.endswith(first.body)
    assert b"idempotent-replayed: true\r\n" in data.lower()


@pytest.mark.parametrize("kind", ["comment", "upload", "post"])
def test_another_body_under_the_same_key_is_refused(serving, post, kind):
    upload = finished(serving)
    bodies = {
        "comment": (f"/v1/posts/{post}/comments", [{"text": "one"}, {"text": "two"}], ()),
        "post": ("/v1/posts", [{"upload": upload}, {"upload": upload, "caption": "another"}], ()),
    }
    if kind == "upload":
        target, tus = "/v1/uploads", "Tus-Resumable: 1.0.0"
        requests = [((tus, "Upload-Length: 1"), b""), ((tus, "Upload-Length: 2"), b"")]
    else:
        target, documents, headers = bodies[kind]
        json_type = "Content-Type: application/json"
        requests = [((json_type, *headers), json.dumps(document).encode()) for document in documents]
    (headers, body), (others, other) = requests
    first = ask(serving, "POST", target, KEY + "one", *headers, body=body)
    before = serving.server.client.dbsize()
    refused = ask(serving, "POST", target, KEY + "one", *others, body=other)
    again = ask(serving, "POST", target, KEY + "one", *headers, body=body)
    assert (first.status, refused.status, refused.json()["code"]) == (201, 422, "reused")
    assert shown(again) == shown(first) and replays([again]) == 1
    assert serving.server.client.dbsize() == before


def test_a_key_belongs_to_a_user_a_method_and_a_path(serving, post):
    other = stored_with(serving, lambda db: make_post(db, "bob"))
    made = [
        comment(serving, post, "one"),
        comment(serving, post, "one", user="bob"),
        comment(serving, other, "one"),
        comment(serving, post, "ONE"),
    ]
    assert len({answer.json()["id"] + answer.headers["location"] for answer in made}) == 4
    assert replays(made) == 0


def test_refusals_are_not_kept(serving, empty):
    waiting = finished(serving)
    made = ask(
        serving, "POST", "/v1/posts", "Content-Type: application/json", body=json.dumps({"upload": waiting}).encode()
    ).json()["id"]
    assert comment(serving, made, "one").json()["code"] == "notready"
    stored_with(serving, lambda db: outbox.publish(db, made, "thumbhash"))
    taken = comment(serving, made, "one")
    assert (taken.status, replays([taken])) == (201, 0)
    assert comment(serving, made, "two", text=" ").status == 422
    assert comment(serving, made, "two", text="Not blank").status == 201
    broken = form(("image", "a.jpg", b"GIF89a"))
    assert ask(serving, "POST", "/v1/posts", FORM, KEY + "one", body=broken).status == 415
    assert ask(serving, "POST", "/v1/posts", FORM, KEY + "one", body=form(("image", "a.jpg", jpeg()))).status == 201


@pytest.mark.parametrize("key", ["", "ä", "a b", "x" * 256])
def test_a_key_that_is_none_is_refused(serving, post, key):
    refused = comment(serving, post, key.encode().decode("latin-1"))
    assert (refused.status, refused.json()["code"]) == (422, "invalid")
    assert serving.server.client.xlen(f"comments:{{0}}:{post}") == 0


@pytest.mark.parametrize("how", ["fin", "rst"])
@pytest.mark.parametrize("kind", ["form", "upload", "comment"])
def test_a_post_whose_answer_the_network_lost_is_made_once(serving, post, kind, how):
    headers = {"Authorization": f"Bearer {serving.token('alice')}", "Idempotency-Key": "one"}
    upload = finished(serving)
    requests = {
        "form": ("/v1/posts", {"files": {"image": jpeg()}}, "post:*"),
        "upload": ("/v1/posts", {"json": {"upload": upload}}, "post:*"),
        "comment": (f"/v1/posts/{post}/comments", {"json": {"text": "Hm"}}, f"comments:{{0}}:{post}"),
    }
    target, body, made = requests[kind]
    before = set(serving.server.client.keys(made))
    with Proxy(serving.port) as proxy, httpx.Client(headers=headers) as line:
        line.base_url = f"http://127.0.0.1:{proxy.port}"
        proxy.lose(how=how)
        with pytest.raises(httpx.TransportError):
            line.post(target, **body)
        assert proxy.lost.is_set()
        again = line.post(target, **body)
    assert again.status_code == 201
    assert again.headers["idempotent-replayed"] == "true"
    assert len(set(serving.server.client.keys(made)) - before) == 1
    if kind == "comment":
        assert serving.server.client.xlen(made) == 1


def test_an_upload_made_again_goes_on_where_it_is(serving):
    """The answer to a creation with its first bytes was lost: sent again, it names the same upload and its offset."""
    image = picture(1000)
    tus = (BODY, "Tus-Resumable: 1.0.0", "Upload-Length: 1000", KEY + "one")
    first = ask(serving, "POST", "/v1/uploads", *tus, body=image[:600])
    again = ask(serving, "POST", "/v1/uploads", *tus, body=image[:600])
    assert first.headers["upload-offset"] == again.headers["upload-offset"] == "600"
    assert first.headers["location"] == again.headers["location"]
    assert count_chunks(serving, first.headers["location"].rsplit("/", 1)[1]) == 1


def test_a_deleted_upload_is_not_made_again_by_its_key(serving):
    upload = begin(serving, 100, "alice", KEY + "one")
    play(serving, "> DELETE /v1/uploads/<upload>\n< 204", known={"upload": upload})
    again = "> POST /v1/uploads\n> Upload-Length: 100\n> Idempotency-Key: one\n< 201\n< Location: /v1/uploads/<upload>"
    play(serving, again + "\n< Idempotent-Replayed: true\n< -Upload-Offset", known={"upload": upload})
    assert not serving.server.client.exists(f"upload:{{0}}:{upload}")


def test_a_kept_key_is_small_and_goes_after_a_day(serving, post):
    comment(serving, post, "x" * 255)
    key = serving.server.client.keys("once:*")[0]
    assert serving.server.client.memory_usage(key) <= 250
    assert 0 < serving.server.client.pttl(key) <= 24 * 60 * 60 * 1000
