"""Every bad request gets its status and its code as a problem, and changes nothing in Redis or in the store."""

import base64
import json
import sys
import unicodedata

import pytest
from conftest import NOBODY, connect
from making import NO_SEGMENTS, jpeg, make_post, make_processing
from state import unchanged
from uploading import begin
from wire import FORM, Line, exchange, form, head, request

from api import reading
from storage import comments, outbox


def cursor(text: str) -> str:
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


# Texts

COMMENTS = {
    "no JSON at all": (b"hello", 400, "malformed"),
    "no body": (b"", 400, "malformed"),
    "cut off JSON": (b'{"text": "a', 400, "malformed"),
    "invalid UTF-8": (b'{"text": "a\xff"}', 400, "malformed"),
    "an overlong encoding of a slash": (b'{"text": "\xc0\xaf"}', 400, "malformed"),
    "half of a surrogate pair": (b'{"text": "\\ud83d"}', 400, "malformed"),
    "10,000 nested arrays": (b"[" * 10_000 + b"]" * 10_000, 400, "malformed"),
    "10,000 nested objects": (b'{"text":' * 7_000 + b"1" + b"}" * 7_000, 400, "malformed"),
    "nested arrays beside the text": (b'{"text": "a", "x": %b}' % (b"[" * 10_000 + b"]" * 10_000), 400, "malformed"),
    "an array": (b'["text"]', 422, "invalid"),
    "null": (b"null", 422, "invalid"),
    "no text": (b"{}", 422, "invalid"),
    "a number as text": (b'{"text": 7}', 422, "invalid"),
    "null as text": (b'{"text": null}', 422, "invalid"),
    "an empty text": (b'{"text": ""}', 422, "invalid"),
    "a blank text": ('{"text": " \\t\\n\u00a0\u2003"}'.encode(), 422, "invalid"),
    "2,201 characters": (json.dumps({"text": "a" * 2201}).encode(), 422, "invalid"),
    "2,201 characters of four bytes": (json.dumps({"text": "😀" * 2201}, ensure_ascii=False).encode(), 422, "invalid"),
    "more than 64 KiB": (json.dumps({"text": "a" * 65536}).encode(), 413, "toolarge"),
    "10 MiB": (json.dumps({"text": "a" * 10 * 2**20}).encode(), 413, "toolarge"),
}


@pytest.mark.parametrize("case", COMMENTS)
def test_a_comment_is_refused_because_of(furnished, case):
    body, status, code = COMMENTS[case]
    target = furnished.fill_in("/v1/posts/{post}/comments")
    furnished.assert_refused(request("POST", target, furnished.token("bob"), body), status, code)


def test_a_json_body_that_is_too_long_is_refused_without_a_content_length_too(furnished):
    target = furnished.fill_in("/v1/posts/{post}/comments")
    start = head("POST", target, furnished.authorization("bob"), "Transfer-Encoding: chunked")
    furnished.assert_refused(start + b"%x\r\n" % 70_000 + b" " * 70_000 + b"\r\n0\r\n\r\n", 413, "toolarge")


ENCODINGS = ["gzip", "br", "GZIP", "x-own", "identity, gzip", "gzip\r\nContent-Encoding: identity"]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_body_with_a_content_encoding_is_refused(furnished, encoding):
    token = furnished.authorization()
    for target in ("/v1/posts", "/v1/posts/{post}/comments", "/v1/uploads"):
        start = head("POST", furnished.fill_in(target), token, f"Content-Encoding: {encoding}", "Content-Length: 9")
        answer = furnished.assert_refused(start + b"123456789", 415, "encoding")
        assert answer.headers["accept-encoding"] == "identity"


def test_a_body_with_the_content_encoding_identity_is_accepted(furnished):
    with furnished.client("bob") as client:
        target, headers = furnished.fill_in("/v1/posts/{post}/comments"), {"Content-Encoding": "identity"}
        made = client.post(target, json={"text": "plain"}, headers=headers)
        assert made.status_code == 201
        assert client.delete(made.headers["Location"]).status_code == 204


def test_the_longest_comment_is_accepted_however_many_bytes_it_has(furnished):
    with furnished.client("bob") as client:
        for text in ("😀" * 2200, "\t" * 2199 + "x", "\u202e" * 2199 + "x"):
            made = client.post(furnished.fill_in("/v1/posts/{post}/comments"), json={"text": text})
            assert made.status_code == 201
            assert client.get(made.headers["Location"]).json()["text"] == text
            assert client.delete(made.headers["Location"]).status_code == 204


# Every control character except tab and newline. A carriage return is allowed only before a newline.
CONTROLS = [chr(code) for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n"]


@pytest.mark.parametrize("character", CONTROLS, ids=lambda character: f"U+{ord(character):04X}")
def test_a_text_with_a_control_character_is_refused(furnished, character):
    body = json.dumps({"text": f"one{character}two"}).encode()
    target = furnished.fill_in("/v1/posts/{post}/comments")
    answer = furnished.assert_refused(request("POST", target, furnished.token("bob"), body), 422, "control")
    assert answer.json()["errors"][0]["pointer"] == "#/text"
    assert f"U+{ord(character):04X} at position 3" in answer.json()["detail"]


def test_a_caption_with_a_control_character_is_refused_in_a_form_and_in_json(furnished):
    with furnished.client("bob") as client:
        upload = begin(furnished, 10, "bob")
        caption = b'{"upload": "%b", "caption": "a\\u0085"}' % upload.encode()
        answer = furnished.assert_refused(request("POST", "/v1/posts", furnished.token("bob"), caption), 422, "control")
        assert answer.json()["errors"][0]["pointer"] == "#/caption"
        assert client.delete(f"/v1/uploads/{upload}", headers={"Tus-Resumable": "1.0.0"}).status_code == 204
        kind = {"Content-Type": "multipart/form-data; boundary=frontier"}
        body = form(("image", "a.jpg", jpeg()), ("caption", None, b"a\rb"))
        with unchanged(furnished.server.client, furnished.folder):
            refused = client.post("/v1/posts", content=body, headers=kind)
        assert (refused.status_code, refused.json()["code"]) == (422, "control")
        assert refused.json()["errors"][0]["parameter"] == "caption"


BLANK = {
    "a zero-width space": "\u200b",
    "a joiner": "\u200d",
    "a byte order mark": "\ufeff",
    "a blank Braille pattern": "\u2800",
    "a soft hyphen": "\u00ad",
    "Hangul fillers": "\u115f\u1160\u3164\uffa0",
    "variation selectors": "\ufe0f\U000e0100\u180b",
    "tags": "\U000e0041\U000e007f",
    "a combining grapheme joiner": "\u034f",
    "a word joiner and an invisible sign": "\u2060\u2062",
    "bidirectional controls": "\u202e\u2066\u2069\u061c\u200e",
    "interlinear annotations": "\ufff9\ufffa\ufffb",
    "a musical beam and a note without a head": "\U0001d173\U0001d159",
    "separators": "\u2028\u2029\u3000\u1680\u205f",
    "several kinds, with white space": " \t\r\n\u200b\u2003\u2800\ufeff ",
}


@pytest.mark.parametrize("blank", BLANK)
def test_a_comment_of_invisible_characters_is_blank(furnished, blank):
    body = json.dumps({"text": BLANK[blank]}).encode()
    target = furnished.fill_in("/v1/posts/{post}/comments")
    answer = furnished.assert_refused(request("POST", target, furnished.token("bob"), body), 422, "invalid")
    assert "blank" in answer.json()["detail"]


def test_of_the_format_and_space_characters_of_unicode_only_the_visible_ones_count_as_visible():
    """Python's Unicode data has the categories. It does not have the property Default_Ignorable_Code_Point."""
    visible = [
        code
        for code in range(sys.maxunicode + 1)
        if unicodedata.category(chr(code)) in ("Cf", "Zs", "Zl", "Zp") and reading.VISIBLE.search(chr(code))
    ]
    # The signs with Prepended_Concatenation_Mark: Arabic, Syriac and Kaithi signs that enclose or precede digits.
    assert visible == [*range(0x600, 0x606), 0x6DD, 0x70F, 0x890, 0x891, 0x8E2, 0x110BD, 0x110CD]


UNCHANGED = {
    "emoji of joiners and selectors": "👩\u200d👩\u200d👧\ufe0f ❤\ufe0f 1\ufe0f\u20e3",
    "a flag of tags": "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
    "a non-joiner": "می\u200cخواهم",
    "white space around the text, and all kinds of newlines": "  a\tb\nc\r\nd\u2028e\u2029f\u00a0 ",
    "composed, decomposed and compatibility characters": "e\u0301 \u00e9 \ufb01 \u2126",
    "a combining mark alone": "\u0301",
    "noncharacters and private use": "\ufdd0\uffff\U0010ffff\ue000",
    "markup": "<b>&amp; \\u0041 {0} %s",
}


@pytest.mark.parametrize("case", UNCHANGED)
def test_a_text_comes_back_as_it_was_sent(furnished, case):
    text = UNCHANGED[case]
    with furnished.client("bob") as client:
        made = client.post(furnished.fill_in("/v1/posts/{post}/comments"), json={"text": text})
        assert made.status_code == 201, made.text
        assert made.json()["text"] == client.get(made.headers["Location"]).json()["text"] == text
        assert client.delete(made.headers["Location"]).status_code == 204
        sent = client.post("/v1/posts", files={"image": jpeg()}, data={"caption": text})
        assert sent.json()["caption"] == client.get(sent.headers["Location"]).json()["caption"] == text
        assert client.delete(sent.headers["Location"]).status_code == 204


def test_a_caption_may_be_blank(furnished):
    with furnished.client("bob") as client:
        for caption in ("", " ", "\u200b"):
            sent = client.post("/v1/posts", files={"image": jpeg()}, data={"caption": caption})
            assert (sent.status_code, sent.json()["caption"]) == (201, caption)
            assert client.delete(sent.headers["Location"]).status_code == 204


CAPTION = {"parameter": "caption"}
JSON = "Content-Type: application/json"
WRONG = {
    "a body that is no object": ("POST", "/v1/posts/{post}/comments", JSON, b"[]", {"pointer": "#"}),
    "no text": ("POST", "/v1/posts/{post}/comments", JSON, b"{}", {"pointer": "#/text"}),
    "a blank text": ("POST", "/v1/posts/{post}/comments", JSON, b'{"text": " "}', {"pointer": "#/text"}),
    "no upload": ("POST", "/v1/posts", JSON, b"{}", {"pointer": "#/upload"}),
    "a number as caption": ("POST", "/v1/posts", JSON, b'{"upload": "u", "caption": 1}', {"pointer": "#/caption"}),
    "an empty upload": ("POST", "/v1/posts", JSON, b'{"upload": "{empty}"}', {"pointer": "#/upload"}),
    "a limit": ("GET", "/v1/posts?limit=0", None, None, {"parameter": "limit"}),
    "a cursor": ("GET", "/v1/posts/{post}/comments?cursor=x", None, None, {"parameter": "cursor"}),
    "a form's unknown field": ("POST", "/v1/posts", FORM, form(("x" * 99, None, b"")), {"parameter": "x" * 64}),
    "a form's second caption": ("POST", "/v1/posts", FORM, form(*[("caption", None, b"a")] * 2), CAPTION),
    "a form's long caption": ("POST", "/v1/posts", FORM, form(("caption", None, b"a" * 9999)), CAPTION),
    "a form without an image": ("POST", "/v1/posts", FORM, form(("caption", None, b"a")), {"parameter": "image"}),
    "a form's empty image": ("POST", "/v1/posts", FORM, form(("image", "a.jpg", b"")), {"parameter": "image"}),
    "a form that is cut off": ("POST", "/v1/posts", FORM, form(end=False) + b"--frontier", {}),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_422_names_the_part_of_the_request_that_is_wrong(furnished, case):
    method, target, kind, body, where = WRONG[case]
    headers = [furnished.authorization()]
    if body is not None:
        if b"{empty}" in body:
            body = body.replace(b"{empty}", begin(furnished, 0, "alice").encode())
        headers += [kind, f"Content-Length: {len(body)}"]
    with unchanged(furnished.server.client, furnished.folder):
        answer = exchange(furnished.port, head(method, furnished.fill_in(target), *headers) + (body or b""))
    assert answer.status == 422
    assert answer.json()["errors"] == [{**where, "detail": answer.json()["detail"]}]


def test_what_a_client_must_not_set_is_ignored(furnished):
    """Author, id and time of a comment are those of the server. The post's author and status stay, too."""
    forged = {"text": "mine", "author": "bob", "id": "1-0", "created_at": "2000-01-01T00:00:00.000Z", "post": NOBODY}
    with furnished.client("alice") as alice:
        before = alice.get(f"/v1/posts/{furnished.post}").json()
        comment = alice.post(f"/v1/posts/{furnished.post}/comments", json={**forged, "status": "failed"}).json()
        assert comment.keys() == {"id", "author", "text", "created_at"}
        assert (comment["author"], comment["text"]) == ("alice", "mine")
        assert comment["id"] != forged["id"] and comment["created_at"] > "2020"
        after = alice.get(f"/v1/posts/{furnished.post}").json()
        assert (after["author"], after["status"]) == (before["author"], before["status"])
        alice.delete(f"/v1/posts/{furnished.post}/comments/{comment['id']}").raise_for_status()


def test_a_422_names_the_idempotency_key(furnished):
    target = furnished.fill_in("/v1/posts/{post}/comments")
    with furnished.client("bob") as client:
        added = client.post(target, json={"text": "a"}, headers={"Idempotency-Key": "used"})
        assert added.status_code == 201
        for key in ("", "used"):
            with unchanged(furnished.server.client, furnished.folder):
                answer = client.post(target, json={"text": "b"}, headers={"Idempotency-Key": key})
            assert answer.status_code == 422
            assert answer.json()["errors"] == [{"header": "Idempotency-Key", "detail": answer.json()["detail"]}]
        assert client.delete(added.headers["Location"]).status_code == 204


# If-Match


def etags(site, target: str) -> list[str]:
    """The ETag of each encoding."""
    requests = [head("GET", target, f"Accept-Encoding: {encoding}") for encoding in ("identity", "br", "gzip")]
    return [exchange(site.port, request).headers["etag"] for request in requests]


@pytest.mark.parametrize("encoding", range(3))
def test_a_delete_with_if_match_deletes_a_post_only_in_the_version_that_the_client_saw(furnished, encoding):
    with furnished.client("alice") as alice:
        post = alice.post("/v1/posts", files={"image": jpeg()}, data={"caption": "x" * 300}).headers["Location"]
        tag = etags(furnished, post)[encoding]
        weak, part, unquoted = f"W/{tag}", f'"x{tag[1:]}', tag.strip('"')
        for listed in ('"other"', weak, part, unquoted, f'"other", {weak}', f"{tag} nonsense"):
            delete = head("DELETE", post, furnished.authorization(), f"If-Match: {listed}")
            furnished.assert_refused(delete, 412, "precondition")
        delete = head("DELETE", post, furnished.authorization("bob"), 'If-Match: "other"')
        furnished.assert_refused(delete, 403, "forbidden")
        delete = head("DELETE", post, furnished.authorization(), 'If-Match: "a"', f"If-Match: {tag}")
        assert exchange(furnished.port, delete).status == 204
        furnished.assert_refused(delete, 404, "nopost")


def test_a_comment_is_deleted_with_if_match(furnished):
    comments = furnished.fill_in("/v1/posts/{post}/comments")
    with furnished.client("bob") as bob:
        for listed in ("*", None):
            comment = bob.post(comments, json={"text": "a"}).headers["Location"]
            tag = etags(furnished, comment)[0]
            bearer = furnished.authorization("bob")
            furnished.assert_refused(head("DELETE", comment, bearer, 'If-Match: "other"'), 412, "precondition")
            delete = head("DELETE", comment, furnished.authorization(), f"If-Match: {tag}")
            furnished.assert_refused(delete, 403, "forbidden")
            assert bob.delete(comment, headers={"If-Match": listed or tag}).status_code == 204
            furnished.assert_refused(head("DELETE", comment, bearer, f"If-Match: {listed or tag}"), 404, "nocomment")


def test_a_post_that_got_a_comment_meanwhile_is_not_deleted_with_if_match(furnished):
    """Once the comment is deleted the post is as before, and so is its ETag."""
    target = furnished.fill_in("/v1/posts/{post}")
    bearer = furnished.authorization()
    before = etags(furnished, target)[0]
    with furnished.client("bob") as bob:
        comment = bob.post(f"{target}/comments", json={"text": "a"}).headers["Location"]
        furnished.assert_refused(head("DELETE", target, bearer, f"If-Match: {before}"), 412, "precondition")
        assert bob.delete(comment).status_code == 204
    assert etags(furnished, target)[0] == before


# Addresses and methods

ADDRESSES = [
    ("DELETE", "/v1/posts/{post}", 403, "forbidden"),
    ("DELETE", "/v1/posts/{post}/comments/{comment}", 403, "forbidden"),
    ("DELETE", "/v1/posts/{nobody}", 404, "nopost"),
    ("DELETE", "/v1/posts/{nobody}/comments/{comment}", 404, "nopost"),
    ("DELETE", "/v1/posts/{post}/comments/1-0", 404, "nocomment"),
    ("DELETE", "/v1/posts/{processing}/comments/{comment}", 404, "nocomment"),
    ("GET", "/v1/posts/{nobody}", 404, "nopost"),
    ("GET", "/v1/posts/{nobody}/comments", 404, "nopost"),
    ("GET", "/v1/posts/{nobody}/comments/{comment}", 404, "nopost"),
    ("GET", "/v1/posts/{post}/comments/1-0", 404, "nocomment"),
    ("GET", "/v1/images/{nobody}.jpg", 404, "nopost"),
    ("GET", "/v1/images/{post}", 404, "nowhere"),
    ("GET", "/v1/images/originals/{post}.jpg", 404, "nowhere"),
    ("GET", "/v1/images/../originals/{post}.jpg", 404, "nowhere"),
    ("GET", "/v1/images/..%2foriginals%2f{post}.jpg", 404, "nopost"),
    ("GET", "/", 404, "nowhere"),
    ("GET", "/v1", 404, "nowhere"),
    ("GET", "/v2/posts", 404, "nowhere"),
    ("GET", "/v1/posts/{post}/likes", 404, "nowhere"),
    ("GET", "/v1/posts/{post}/comments/{comment}/likes", 404, "nowhere"),
    ("POST", "/v1/nothing", 404, "nowhere"),
    ("GET", "/v1/posts/", 404, "nowhere"),
    ("GET", "/v1/posts/?limit=1", 404, "nowhere"),
    ("GET", "/v1/posts//", 404, "nowhere"),
    ("GET", "//v1/posts", 404, "nowhere"),
    ("GET", "/v1//posts", 404, "nowhere"),
    ("GET", "/v1/posts/{post}/", 404, "nowhere"),
    ("DELETE", "/v1/posts/{post}/", 404, "nowhere"),
    ("POST", "/v1/posts/", 404, "nowhere"),
    ("POST", "/v1/posts/{post}/comments/", 404, "nowhere"),
    ("GET", "/v1/posts/{post}/comments/{comment}/", 404, "nowhere"),
    ("GET", "/v1/changes/", 404, "nowhere"),
    ("GET", "/v1/images/{post}.jpg/", 404, "nowhere"),
    ("POST", "/v1/uploads/", 404, "nowhere"),
    ("DELETE", "/v1/uploads/x/", 404, "nowhere"),
    ("OPTIONS", "/v1/uploads/", 404, "nowhere"),
    ("GET", "/healthz/", 404, "nowhere"),
]


@pytest.mark.parametrize("method, target, status, code", ADDRESSES)
def test_an_address_of_nothing_or_of_somebody_else_is_refused(furnished, method, target, status, code):
    furnished.assert_refused(request(method, furnished.fill_in(target), furnished.token("bob")), status, code)


METHODS = [
    ("PUT", "/v1/posts", {"GET", "HEAD", "POST"}),
    ("DELETE", "/v1/posts", {"GET", "HEAD", "POST"}),
    ("PATCH", "/v1/posts/{post}", {"GET", "HEAD", "DELETE"}),
    ("POST", "/v1/posts/{post}", {"GET", "HEAD", "DELETE"}),
    ("PUT", "/v1/posts/{post}/comments", {"GET", "HEAD", "POST"}),
    ("POST", "/v1/posts/{post}/comments/{comment}", {"GET", "HEAD", "DELETE"}),
    ("DELETE", "/v1/images/{post}.jpg", {"GET", "HEAD"}),
    ("BREW", "/v1/posts", {"GET", "HEAD", "POST"}),
    ("POST", "/healthz", {"GET", "HEAD"}),
]


@pytest.mark.parametrize("method, target, allowed", METHODS)
def test_a_method_that_an_address_does_not_have_is_refused_with_the_allowed_ones(furnished, method, target, allowed):
    sent = request(method, furnished.fill_in(target), furnished.token("alice"))
    answer = furnished.assert_refused(sent, 405, "method")
    assert set(answer.headers["allow"].split(", ")) == allowed


POST_IDS = [
    *("..", "%2e%2e", "..%2f..%2fetc%2fpasswd", "%00", "%ff", "%F0%9F%98%80", "%D9%A0", "{{0}}", "{{", "*", "-0"),
    *("{post}%00", "{post}%0a", "%0a{post}", "{post}%20", "{post}-0", "u{post}", "A" * 7000),
    *("01JD4Q7ZK5W8Y3N6R2T9V0XABC", "01JD4Q7ZK5W8Y3N6R2T9V0XABC-00", "01JD4Q7ZK5W8Y3N6R2T9V0XABC-99999"),
    *("01JD4Q7ZK5W8Y3N6R2T9V0XABC--1", "01jd4q7zk5w8y3n6r2t9v0xabc-0"),
]


@pytest.mark.parametrize("post", POST_IDS, ids=lambda post: post[:40])
def test_a_malformed_post_id_names_no_post(furnished, post):
    post, token = furnished.fill_in(post), furnished.token("alice")
    furnished.assert_refused(request("GET", f"/v1/posts/{post}"), 404, "nopost")
    furnished.assert_refused(request("DELETE", f"/v1/posts/{post}", token), 404, "nopost")
    furnished.assert_refused(request("GET", f"/v1/posts/{post}/comments"), 404, "nopost")
    furnished.assert_refused(request("POST", f"/v1/posts/{post}/comments", token, b'{"text": "a"}'), 404, "nopost")
    furnished.assert_refused(request("GET", f"/v1/images/{post}.jpg"), 404, "nopost")


COMMENT_IDS = [
    *("..", "%00", "{comment}%00", "{comment}%0a", "{comment}-0", "{{0}}", "*", "+", "-", "$", "0", "0-0", "(1-0"),
    *("1-00", "%D9%A1-0", "9" * 30 + "-0", "1-" + "9" * 30, "18446744073709551615-18446744073709551615"),
]


@pytest.mark.parametrize("comment", COMMENT_IDS)
def test_a_malformed_comment_id_names_no_comment(furnished, comment):
    target = furnished.fill_in("/v1/posts/{post}/comments/" + comment)
    furnished.assert_refused(request("GET", target), 404, "nocomment")
    furnished.assert_refused(request("DELETE", target, furnished.token("alice")), 404, "nocomment")


def test_a_post_that_is_in_processing_refuses_comments(furnished):
    target = furnished.fill_in("/v1/posts/{processing}/comments")
    furnished.assert_refused(request("POST", target, furnished.token("bob"), b'{"text": "a"}'), 409, "notready")


async def test_a_post_whose_image_failed_refuses_comments(furnished):
    db = connect(furnished.server)
    failed = await make_processing(db, "alice")
    await outbox.fail(db, failed, 0, "undecodable", "it is damaged")
    await db.close()
    target = f"/v1/posts/{failed}/comments"
    furnished.assert_refused(request("POST", target, furnished.token("bob"), b'{"text": "a"}'), 409, "failed")


def test_an_address_that_is_not_ascii_is_a_bad_request(furnished):
    for target in ("/v1/posts/\xff", "/v1/posts?cursor=\xff\xfe", "/v1/posts/\xc3\xa9"):
        furnished.assert_refused(head("GET", target), 400, "bad_request")


def test_a_request_head_of_16_kib_is_too_large(furnished):
    furnished.assert_refused(head("GET", "/v1/posts/" + "A" * 16_384), 413, "toolarge")
    furnished.assert_refused(head("GET", "/v1/posts", "X: " + "A" * 16_384), 413, "toolarge")


# Pages

LIMITS = [
    *("0", "101", "x", "+5", "-1", "1.0", "1e1", "05", "%205", "5%20", "0x5", "9" * 5000),
    *("%D9%A5", "%EF%BC%95", "%ff"),  # an Arabic 5, a full-width 5, no UTF-8
]


@pytest.mark.parametrize("limit", LIMITS, ids=lambda limit: limit[:10])
def test_a_limit_is_a_whole_number_from_1_to_100(furnished, limit):
    furnished.assert_refused(request("GET", f"/v1/posts?limit={limit}"), 422, "invalid")
    target = furnished.fill_in("/v1/posts/{post}/comments")
    furnished.assert_refused(request("GET", f"{target}?limit={limit}"), 422, "invalid")


COUNTS = ("-1", "+1", "1.5", "01", "inf", "nan", "(1", " 1", "1e3", "٥", "9" * 17)
POSTS = ("..", "{0}", "u" + NOBODY, NOBODY + "\n", NOBODY[:-2], "*", "[a")
RANKS = ("", "g", "A", "-1", "1.", ".1", "1..2", "1 ", "1\n", "1:1", "123456789", ".".join("1" * 17))
CURSORS = [
    *("x", "!", "%00", "%ff", "====", "%D9%A5", "A" * 8000),
    *(cursor(text) for text in ("0", "0:", f":{NOBODY}")),
    *(cursor(f"{count}:{NOBODY}") for count in COUNTS),
    *(cursor(f"0:{post}") for post in POSTS),
    *(cursor(f"0:{NOBODY}:{ranks}") for ranks in RANKS),
    *(cursor(text) for text in ("1-1\n", "1", "1-", "+", "(1-1", "1-1-1")),
]


@pytest.mark.parametrize("forged", CURSORS, ids=lambda forged: forged[:40])
def test_a_forged_cursor_is_refused(furnished, forged):
    furnished.assert_refused(request("GET", f"/v1/posts?cursor={forged}"), 422, "invalid")
    target = furnished.fill_in("/v1/posts/{post}/comments")
    furnished.assert_refused(request("GET", f"{target}?cursor={forged}"), 422, "invalid")


def test_a_cursor_of_one_list_is_refused_by_another(furnished):
    furnished.assert_refused(request("GET", f"/v1/posts?cursor={cursor('1763971200000-0')}"), 422, "invalid")
    target = furnished.fill_in("/v1/posts/{post}/comments")
    furnished.assert_refused(request("GET", f"{target}?cursor={cursor(f'0:{NOBODY}')}"), 422, "invalid")


async def test_a_cursor_stays_valid_when_its_post_moves_or_is_deleted(furnished):
    """Numbers of comments: a 2, b 1, c 1, d 0. The cursor points behind b."""
    db = connect(furnished.server)
    d, c, b, a = [await make_post(db, "alice") for _ in range(4)]
    assert d < c < b < a
    for post, count in ((a, 2), (b, 1), (c, 1)):
        for _ in range(count):
            await comments.add(db, "alice", post, "counts")
    token = furnished.token("alice")
    async with Line(furnished.port, token) as line:
        first = (await line.ask("GET", "/v1/posts?limit=3")).json()
        shown = [item["id"] for item in first["items"]]
        assert shown[:2] == [a, b] and furnished.server.client.zscore("feed:{0}", b) == 1
        behind_b = (await line.ask("GET", "/v1/posts?limit=2")).json()["next"]

        async def following() -> list[str]:
            answer = await line.ask("GET", f"/v1/posts?limit=100&cursor={behind_b}")
            assert answer.status == 200
            return [item["id"] for item in answer.json()["items"]]

        rest = [c, furnished.post, d]
        assert await following() == rest
        for _ in range(3):
            await comments.add(db, "alice", b, "moves up")
        assert await following() == rest
        for comment in (await comments.page(db, NO_SEGMENTS, b, 100)).comments:
            await comments.delete(db, NO_SEGMENTS, "alice", b, comment.id)
        assert await following() == [c, furnished.post, b, d]
        for post in (b, a, c, d):
            assert (await line.ask("DELETE", f"/v1/posts/{post}")).status == 204
            assert b not in await following()
        assert await following() == [furnished.post]
    await db.close()
