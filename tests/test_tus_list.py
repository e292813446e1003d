"""GET of /v1/uploads: the caller's open uploads, so that one whose address was lost can be found again."""

import re
from email.utils import parsedate_to_datetime

import pytest
from conftest import until
from uploading import BODY, begin, picture
from wire import FORM, dial, exchange, head
from wiretrace import play

from storage.settings import OPEN_UPLOADS

TIME = re.compile(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


@pytest.fixture(autouse=True)
def empty(serving):
    serving.server.client.flushall()


def listed(site, user: str = "alice") -> list[dict]:
    """No header of tus is needed."""
    answer = exchange(site.port, head("GET", "/v1/uploads", site.authorization(user)))
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    assert answer.headers["cache-control"] == "no-store"
    assert set(answer.json()) == {"items"}
    return answer.json()["items"]


def test_open_uploads_are_listed_with_where_they_are_the_newest_first(serving):
    metadata = "filename d29ybGQucG5n,is_confidential"
    older = begin(serving, 100, "alice", f"Upload-Metadata: {metadata}", BODY, "[part]", part=picture(40))
    newer = begin(serving, 7)
    begin(serving, 9, "bob")
    second, first = listed(serving)
    assert set(first) == {"id", "offset", "length", "metadata", "created_at", "expires_at"}
    assert (first["id"], first["offset"], first["length"], first["metadata"]) == (older, 40, 100, metadata)
    assert (second["id"], second["offset"], second["length"], second["metadata"]) == (newer, 0, 7, "")
    for item in (first, second):
        assert TIME.fullmatch(item["created_at"]) and TIME.fullmatch(item["expires_at"])
        told = play(serving, f"> HEAD /v1/uploads/{item['id']}\n< 200\n< Upload-Expires: <until>")
        assert parsedate_to_datetime(told["until"]).strftime("%Y-%m-%dT%H:%M:%S") == item["expires_at"][:19]
    assert first["created_at"][:10] < first["expires_at"][:10]
    assert [item["length"] for item in listed(serving, "bob")] == [9]


def test_what_nobody_can_go_on_with_is_not_listed(serving):
    deleted, expired, post = begin(serving, 100), begin(serving, 100), begin(serving, 100)
    done = f"""
        > DELETE /v1/uploads/{deleted}
        < 204
        > PATCH /v1/uploads/{post}
        > {BODY}
        > Upload-Offset: 0
        > [whole]
        < 204
        > POST /v1/posts
        > Content-Type: application/json
        > [post]
        < 201
    """
    play(serving, done, whole=picture(100), post=b'{"upload": "%b"}' % post.encode())
    serving.server.client.hset(f"upload:{{0}}:{expired}", "expires", 1)
    with dial(serving.port) as line:
        form = head("POST", "/v1/posts", serving.authorization(), FORM, "Content-Length: 900")
        line.sendall(form)
        until(lambda: "form 4194304" in serving.server.client.hvals("uploads:{0}:alice"), what="the form")
        assert listed(serving) == []


def test_a_list_takes_one_script_however_long_it_is(serving):
    client = serving.server.client
    assert listed(serving) == []
    for _ in range(OPEN_UPLOADS):
        begin(serving, 100)
    client.config_resetstat()
    assert len(listed(serving)) == OPEN_UPLOADS
    assert client.info("commandstats")["cmdstat_evalsha"]["calls"] == 1


def test_a_list_needs_a_token(serving):
    play(serving, "> GET /v1/uploads\n< 401\n< code: unauthorized\n< WWW-Authenticate: Bearer *", user=None)
