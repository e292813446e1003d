"""GET of /v1/uploads: the open uploads of the user, with which a client can continue one whose address it lost."""

import re
from email.utils import parsedate_to_datetime

import pytest
from conftest import until
from uploading import BODY, begin, picture
from wire import FORM, dial, exchange, head
from wiretrace import play

from storage.settings import OPEN_UPLOADS

TIME = re.compile(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


pytestmark = pytest.mark.usefixtures("empty")


def list_uploads(site, user: str = "alice") -> list[dict]:
    """Requests the list, without a header of tus. Returns its items."""
    answer = exchange(site.port, head("GET", "/v1/uploads", site.authorization(user)))
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    assert answer.headers["cache-control"] == "no-store"
    assert set(answer.json()) == {"items"}
    return answer.json()["items"]


def test_open_uploads_are_listed_with_their_offsets_newest_first(serving):
    metadata = "filename d29ybGQucG5n,is_confidential"
    older = begin(serving, 100, "alice", f"Upload-Metadata: {metadata}", BODY, "[part]", part=picture(40))
    newer = begin(serving, 7)
    begin(serving, 9, "bob")
    second, first = list_uploads(serving)
    assert set(first) == {"id", "offset", "length", "metadata", "created_at", "expires_at", "concat"}
    assert (first["id"], first["offset"], first["length"], first["metadata"]) == (older, 40, 100, metadata)
    assert (second["id"], second["offset"], second["length"], second["metadata"]) == (newer, 0, 7, "")
    for item in (first, second):
        assert TIME.fullmatch(item["created_at"]) and TIME.fullmatch(item["expires_at"])
        known = play(serving, f"> HEAD /v1/uploads/{item['id']}\n< 200\n< Upload-Expires: <time>")
        assert parsedate_to_datetime(known["time"]).strftime("%Y-%m-%dT%H:%M:%S") == item["expires_at"][:19]
    assert first["created_at"][:10] < first["expires_at"][:10]
    assert [item["length"] for item in list_uploads(serving, "bob")] == [9]


def test_deleted_and_expired_uploads_posts_and_forms_are_not_listed(serving):
    deleted, expired, post = begin(serving, 100), begin(serving, 100), begin(serving, 100)
    trace = f"""
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
    play(serving, trace, whole=picture(100), post=b'{"upload": "%b"}' % post.encode())
    serving.server.client.hset(f"upload:{{0}}:{expired}", "expires", 1)
    with dial(serving.port) as line:
        form = head("POST", "/v1/posts", serving.authorization(), FORM, "Content-Length: 900")
        line.sendall(form)
        until(lambda: "form 4194304" in serving.server.client.hvals("uploads:{0}:alice"), what="the upload of the form")
        assert list_uploads(serving) == []


def test_a_list_takes_one_call_of_redis_however_long_it_is(serving):
    client = serving.server.client
    assert list_uploads(serving) == []
    for _ in range(OPEN_UPLOADS):
        begin(serving, 100)
    client.config_resetstat()
    assert len(list_uploads(serving)) == OPEN_UPLOADS
    assert client.info("commandstats")["cmdstat_evalsha"]["calls"] == 1


def test_a_list_needs_a_token(serving):
    play(serving, "> GET /v1/uploads\n< 401\n< code: unauthorized\n< WWW-Authenticate: Bearer *", user=None)
