"""Malformed change tokens, idempotency keys and requests about uploads: they are refused and change nothing."""

import json
import time

import pytest
from conftest import NOBODY
from state import unchanged
from wire import exchange, head, request

# A token is "<hours since 1970>,<epoch>.<revision>". {h} is the present hour.
SINCE = [
    *("x", ",", "0", "0,0.0", "9" * 5000, "-1,0.0", "%00", "%ff", "%D9%A5,0.1", "%2B{h},0.1"),
    *("{h},", "{h},.1", "{h},x.1", "{h},%D9%A5.1", "{h},%200.1", "{h},0.0,0.0", "{h},0.1.1"),
    *("{h},0.x", "{h},0.-1", "{h},0.+1", "{h},0._1", "{h},0.1_0", "{h},0.1e5", "{h},0.%201", "{h},0.1%0a"),
    *("{h},0.%D9%A5", "{h},0." + "9" * 400),
]


@pytest.mark.parametrize("since", SINCE, ids=lambda since: since[:30])
def test_a_change_token_that_was_never_issued_is_outdated(furnished, since):
    since = since.replace("{h}", str(int(time.time()) // 3600))
    furnished.assert_refused(head("GET", f"/v1/changes?since={since}"), 410, "outdated")


KEYS = ["", " ", "a b", "a\tb", "é".encode().decode("latin-1"), "\xff", "a" * 256, "\x7f"]


@pytest.mark.parametrize("key", KEYS, ids=lambda key: repr(key)[:20])
@pytest.mark.parametrize("target", ["/v1/posts/{post}/comments", "/v1/posts", "/v1/uploads"])
def test_a_malformed_idempotency_key_is_refused(furnished, key, target):
    body = b'{"text": "a", "upload": "a"}'
    sent = head(
        "POST",
        furnished.fill_in(target),
        furnished.authorization("bob"),
        "Tus-Resumable: 1.0.0",
        "Upload-Length: 100",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        f"Idempotency-Key: {key}",
    )
    furnished.assert_refused(sent + body, 422, "invalid")


POSTS = {
    "no JSON": (b"hello", 400, "malformed"),
    "invalid UTF-8": (b'{"upload": "\xff"}', 400, "malformed"),
    "10,000 nested arrays": (b"[" * 10_000 + b"]" * 10_000, 400, "malformed"),
    "no upload": (b"{}", 422, "invalid"),
    "null": (b'{"upload": null}', 422, "invalid"),
    "a number": (b'{"upload": 1}', 422, "invalid"),
    "a post's id": (json.dumps({"upload": NOBODY}).encode(), 404, "noupload"),
    "an unknown upload": (json.dumps({"upload": "u" + NOBODY}).encode(), 404, "noupload"),
    "a path": (b'{"upload": "../x"}', 404, "noupload"),
    "a NUL": (b'{"upload": "\\u0000"}', 404, "noupload"),
    "a partition that does not exist": (b'{"upload": "u01JD4Q7ZK5W8Y3N6R2T9V0XABC-99999"}', 404, "noupload"),
    "a long caption": (json.dumps({"upload": "u" + NOBODY, "caption": "a" * 2201}).encode(), 422, "invalid"),
    "a number as caption": (json.dumps({"upload": "u" + NOBODY, "caption": 1}).encode(), 422, "invalid"),
    "100 KiB": (b" " * 100_000, 413, "toolarge"),
}


@pytest.mark.parametrize("case", POSTS)
def test_a_post_from_an_upload_is_refused_because_of(furnished, case):
    body, status, code = POSTS[case]
    furnished.assert_refused(request("POST", "/v1/posts", furnished.token("bob"), body), status, code)


TUS = {
    "no version": ("POST", "/v1/uploads", {"Tus-Resumable": None}, 412),
    "another version": ("POST", "/v1/uploads", {"Tus-Resumable": "0.2.2"}, 412),
    "a version that is not ASCII": ("POST", "/v1/uploads", {"Tus-Resumable": "\xff"}, 412),
    "no length": ("POST", "/v1/uploads", {"Upload-Length": None}, 400),
    "a negative length": ("POST", "/v1/uploads", {"Upload-Length": "-1"}, 400),
    "a signed length": ("POST", "/v1/uploads", {"Upload-Length": "+1"}, 400),
    "a length in Arabic digits": ("POST", "/v1/uploads", {"Upload-Length": "٥".encode().decode("latin-1")}, 400),
    "a length that is not ASCII": ("POST", "/v1/uploads", {"Upload-Length": "\xff"}, 400),
    "a length above the limit": ("POST", "/v1/uploads", {"Upload-Length": "104857601"}, 413),
    "a length of 40 digits": ("POST", "/v1/uploads", {"Upload-Length": "9" * 40}, 400),
    "metadata that is no Base64": ("POST", "/v1/uploads", {"Upload-Metadata": "filename !"}, 400),
    "metadata that is not ASCII": ("POST", "/v1/uploads", {"Upload-Metadata": "filename \xff"}, 400),
    "metadata of 5,000 bytes": ("POST", "/v1/uploads", {"Upload-Metadata": "a " + "YQ==" * 1250}, 400),
    "no token": ("POST", "/v1/uploads", {"Authorization": None}, 401),
    "an unknown upload": ("PATCH", "/v1/uploads/u" + NOBODY, {"Upload-Offset": "0"}, 404),
    "a post as upload": ("PATCH", "/v1/uploads/" + NOBODY, {"Upload-Offset": "0"}, 404),
    "a path as upload": ("PATCH", "/v1/uploads/..", {"Upload-Offset": "0"}, 404),
    "a NUL as upload": ("DELETE", "/v1/uploads/%00", {}, 404),
    "another method": ("PUT", "/v1/uploads", {}, 405),
    "an override to another method": ("POST", "/v1/uploads/u" + NOBODY, {"X-HTTP-Method-Override": "PUT"}, 405),
    "an override that is not ASCII": ("POST", "/v1/uploads/u" + NOBODY, {"X-HTTP-Method-Override": "\xff"}, 405),
}


@pytest.mark.parametrize("case", TUS)
def test_a_request_of_tus_is_refused_because_of(furnished, case):
    method, target, others, status = TUS[case]
    headers = {
        "Authorization": f"Bearer {furnished.token('bob')}",
        "Tus-Resumable": "1.0.0",
        "Upload-Length": "10",
        "Content-Length": "0",
        "Content-Type": "application/offset+octet-stream",
    } | others
    sent = head(method, target, *(f"{name}: {value}" for name, value in headers.items() if value is not None))
    with unchanged(furnished.server.client, furnished.folder):
        answer = exchange(furnished.port, sent)
    assert (answer.status, answer.headers["content-type"]) == (status, "application/problem+json")
