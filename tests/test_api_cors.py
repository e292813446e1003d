"""Pages of other origins: which of them may call the API, what a preflight allows, and what each answer lets them read.

The rules are those of https://fetch.spec.whatwg.org/#http-cors-protocol. tests/test_api_browser.py asks a real browser.
"""

import contextlib
import re

import pytest
from conftest import Furnished
from making import jpeg
from state import unchanged
from wire import FORM, dial, exchange, head, hear

from api.cors import EXPOSED, SENT

APP, LOCAL = "https://app.example", "http://localhost:5173"
ALLOWED = {"list": f"{APP}, {LOCAL}", "all": "*", "none": ""}  # the setting of each site


@pytest.fixture(scope="module")
def sites(embedded, tmp_path_factory):
    """A site for each setting in ALLOWED. They share one Redis and one folder, so they have the same posts."""
    embedded.client.flushall()
    folder = tmp_path_factory.mktemp("site")
    sites = {name: Furnished(embedded.url, folder, cors_origins=value) for name, value in ALLOWED.items()}
    with contextlib.ExitStack() as stack:
        for site in sites.values():
            stack.callback(site.close)
            site.api()
        listed = sites["list"]
        listed.furnish(embedded)
        (folder / "store" / "images").mkdir(parents=True)
        (folder / "store" / "images" / f"{listed.post}.jpg").write_bytes(jpeg(600, 600))
        for site in sites.values():
            site.fill_in = listed.fill_in
        yield sites


def access(answer) -> dict[str, str]:
    """The headers by which an answer speaks to a browser about other origins."""
    return {name: value for name, value in answer.headers.items() if name.startswith("access-control-")}


def varies(answer) -> set[str]:
    return set(re.split(", *", answer.headers["vary"])) if "vary" in answer.headers else set()


def send(site, method: str, target: str, *headers: str, body: bytes = b""):
    alice = "Authorization: Bearer " + site.token("alice")
    headers = [alice if header == "alice" else header for header in headers]
    return exchange(site.port, head(method, site.fill_in(target), *headers) + body)


KNOWN = "If-None-Match: *"
JSON = "Content-Type: application/json"
TUS = "Tus-Resumable: 1.0.0"
LONG = "Content-Length: 999999999"
# Every kind of answer: pages from the cache, responses that Sanic renders, errors of handlers, of the router and of the
# parser, and refusals before the body.
ANSWERS = {
    "the feed": ("GET", "/v1/posts", [], b"", 200),
    "the feed, compressed": ("GET", "/v1/posts", ["Accept-Encoding: br"], b"", 200),
    "the feed's head": ("HEAD", "/v1/posts", [], b"", 200),
    "a feed that the page has": ("GET", "/v1/posts", [KNOWN], b"", 304),
    "a post": ("GET", "/v1/posts/{post}", [], b"", 200),
    "the comments": ("GET", "/v1/posts/{post}/comments", [], b"", 200),
    "the changes": ("GET", "/v1/changes", [], b"", 200),
    "the open uploads": ("GET", "/v1/uploads", ["alice"], b"", 200),
    "a picture": ("GET", "/v1/images/{post}.jpg", [], b"", 200),
    "a part of a picture": ("GET", "/v1/images/{post}.jpg", ["Range: bytes=0-9"], b"", 206),
    "a picture that the page has": ("GET", "/v1/images/{post}.jpg", [KNOWN], b"", 304),
    "a range that no picture has": ("GET", "/v1/images/{post}.jpg", ["Range: bytes=9999999-"], b"", 416),
    "no picture": ("GET", "/v1/images/{processing}.jpg", [], b"", 404),
    "no post": ("GET", "/v1/posts/{nobody}", [], b"", 404),
    "no such address": ("GET", "/nowhere", [], b"", 404),
    "no such method": ("PUT", "/v1/posts", [], b"", 405),
    "no token": ("POST", "/v1/posts/{post}/comments", [JSON, "Content-Length: 5"], b"12345", 401),
    "somebody else's post": ("DELETE", "/v1/posts/{post}", ["Authorization: Bearer x"], b"", 401),
    "no limit": ("GET", "/v1/posts?limit=0", [], b"", 422),
    "no JSON": ("POST", "/v1/posts/{post}/comments", ["alice", JSON, "Content-Length: 5"], b"{no}}", 400),
    "JSON that is too long": ("POST", "/v1/posts/{post}/comments", ["alice", JSON, LONG], b"", 413),
    "a form that is too large": ("POST", "/v1/posts", ["alice", FORM, LONG], b"", 413),
    "an encoded body": ("POST", "/v1/posts", ["alice", FORM, "Content-Encoding: gzip", LONG], b"", 415),
    "malformed chunks": ("POST", "/v1/posts", ["alice", JSON, "Transfer-Encoding: chunked"], b"zz\r\n", 400),
    "another version of tus": ("HEAD", "/v1/uploads/x", ["alice"], b"", 412),
    "no such upload": ("HEAD", "/v1/uploads/x", ["alice", TUS], b"", 404),
    "an upload past its length": ("POST", "/v1/uploads", ["alice", TUS, "Upload-Length: 1", LONG], b"", 413),
    "tus' options": ("OPTIONS", "/v1/uploads", [], b"", 204),
    "health": ("GET", "/healthz", [], b"", 200),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_every_answer_to_an_allowed_origin_can_be_read(sites, case):
    method, target, headers, body, status = ANSWERS[case]
    plain = send(sites["none"], method, target, *headers, body=body)
    for origin in (APP, LOCAL):
        answer = send(sites["list"], method, target, f"Origin: {origin}", *headers, body=body)
        assert (answer.status, plain.status) == (status, status)
        assert access(answer) == {
            "access-control-allow-origin": origin,
            "access-control-expose-headers": EXPOSED,
        }
        assert varies(answer) == varies(plain) | {"Origin"}
        added = set(answer.headers) - set(plain.headers)
        assert added - {"vary"} == set(access(answer)), "all else is as without the setting"


@pytest.mark.parametrize("case", ANSWERS)
def test_with_a_star_every_answer_can_be_read_from_anywhere_and_is_alike_for_all(sites, case):
    method, target, headers, body, status = ANSWERS[case]
    plain = send(sites["none"], method, target, *headers, body=body)
    for origin in (["Origin: https://anywhere.example"], ["Origin: null"], []):
        answer = send(sites["all"], method, target, *origin, *headers, body=body)
        assert answer.status == status
        assert access(answer) == {"access-control-allow-origin": "*", "access-control-expose-headers": EXPOSED}
        assert varies(answer) == varies(plain)


STRANGERS = {
    "another host": "https://other.example",
    "another scheme": "http://app.example",
    "another port": "https://app.example:8443",
    "the default port": "https://app.example:443",
    "a subdomain": "https://my.app.example",
    "an end that is alike": "https://evil-app.example",
    "a beginning that is alike": "https://app.example.evil",
    "another case": "https://App.example",
    "a path": "https://app.example/",
    "a sandboxed frame or a file": "null",
    "both origins": f"{APP}, {LOCAL}",
    "both origins with a space": f"{APP} {LOCAL}",
    "a star": "*",
    "nothing": "",
}


@pytest.mark.parametrize("case", STRANGERS)
def test_an_origin_that_is_not_listed_gets_no_permission(sites, case):
    origin = f"Origin: {STRANGERS[case]}"
    for method, target, status in (("GET", "/v1/posts", 200), ("GET", "/nowhere", 404)):
        answer = send(sites["list"], method, target, origin)
        assert (answer.status, access(answer)) == (status, {})
        assert "Origin" in varies(answer), "a cache must not give this answer to a page that is allowed"
    for target, status in (("/v1/posts", 405), ("/nowhere", 404), ("/v1/uploads", 204)):
        answer = send(sites["list"], "OPTIONS", target, origin, "Access-Control-Request-Method: POST")
        assert (answer.status, access(answer)) == (status, {})


@pytest.mark.parametrize("case", ANSWERS)
def test_an_answer_to_no_page_varies_by_origin_too(sites, case):
    """A browser sends no Origin for a plain <img>. A page could not read that answer if a cache gave it to a canvas."""
    method, target, headers, body, status = ANSWERS[case]
    answer = send(sites["list"], method, target, *headers, body=body)
    assert (answer.status, access(answer)) == (status, {})
    assert "Origin" in varies(answer)


@pytest.mark.parametrize("case", ANSWERS)
def test_without_the_setting_no_answer_speaks_of_origins(sites, case):
    method, target, headers, body, status = ANSWERS[case]
    answer = send(sites["none"], method, target, f"Origin: {APP}", *headers, body=body)
    assert (answer.status, access(answer)) == (status, {})
    assert "Origin" not in varies(answer)


PATHS = [
    *("/v1/posts", "/v1/posts/{post}", "/v1/posts/{nobody}", "/v1/posts/{post}/comments/{comment}", "/v1/changes"),
    *("/v1/images/{post}.jpg", "/v1/uploads", "/v1/uploads/x", "/healthz", "/", "/nowhere", "/v1/posts/"),
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["GET", "POST", "PATCH", "DELETE", "BREW"])
def test_a_preflight_is_answered_on_every_path_for_every_method_without_a_token(sites, path, method):
    asked = [f"Access-Control-Request-Method: {method}", "Access-Control-Request-Headers: authorization,upload-offset"]
    with unchanged(sites["list"].server.client, sites["list"].folder):
        listed = send(sites["list"], "OPTIONS", path, f"Origin: {LOCAL}", *asked)
        every = send(sites["all"], "OPTIONS", path, "Origin: null", *asked)
    for answer, origin in ((listed, LOCAL), (every, "*")):
        assert (answer.status, answer.body) == (204, b"")
        assert access(answer) == {
            "access-control-allow-origin": origin,
            "access-control-allow-methods": "GET, HEAD, POST, PATCH, DELETE",
            "access-control-allow-headers": SENT,
            "access-control-max-age": "86400",
            "access-control-expose-headers": EXPOSED,
        }
    assert (varies(listed), varies(every)) == ({"Origin"}, set())


def test_a_preflight_keeps_its_connection_and_a_body_does_not(sites):
    preflight = f"Origin: {APP}", "Access-Control-Request-Method: POST"
    with dial(sites["list"].port) as line:
        for _ in range(2):
            line.sendall(head("OPTIONS", "/v1/posts", *preflight))
            assert hear(line).status == 204
        line.sendall(head("OPTIONS", "/v1/posts", *preflight, "Content-Length: 5") + b"12345")
        answer = hear(line)
        assert (answer.status, answer.headers["connection"]) == (204, "close")


OPTIONS = {  # requests that are no preflight
    "without an origin": [],
    "without an origin, with a method": ["Access-Control-Request-Method: POST"],
    "without a method": [f"Origin: {APP}"],
}


@pytest.mark.parametrize("site", ALLOWED)
@pytest.mark.parametrize("case", OPTIONS)
def test_other_options_are_answered_as_tus_says(sites, site, case):
    answer = send(sites[site], "OPTIONS", "/v1/uploads", *OPTIONS[case])
    assert (answer.status, answer.headers["tus-version"], answer.headers["tus-resumable"]) == (204, "1.0.0", "1.0.0")
    assert "tus-extension" in answer.headers and "access-control-max-age" not in answer.headers
    assert send(sites[site], "OPTIONS", "/v1/posts", *OPTIONS[case]).status == 405


@pytest.mark.parametrize("line, status", [("no header", 400), ("Expect: x\r\nContent-Length: 5", 417)])
def test_a_request_that_the_parser_refuses_counts_as_one_without_an_origin(sites, line, status):
    """No browser sends one."""
    for site, allowed in (("list", None), ("all", "*"), ("none", None)):
        answer = exchange(sites[site].port, head("POST", "/v1/posts", f"Origin: {APP}", line))
        assert (answer.status, answer.headers.get("access-control-allow-origin")) == (status, allowed)


@pytest.mark.parametrize("site", ALLOWED)
def test_a_picture_may_be_embedded_by_any_page(sites, site):
    answer = send(sites[site], "GET", "/v1/images/{post}.jpg")
    assert answer.headers["cross-origin-resource-policy"] == "cross-origin"


# Headers of answers that a page can read anyway (safelisted), and those that only browsers, proxies or people need.
READABLE = "cache-control content-language content-length content-type expires last-modified"
NOT_FOR_PAGES = """
    accept-encoding accept-ranges allow alt-svc connection content-disposition content-encoding content-security-policy
    cross-origin-resource-policy date vary www-authenticate x-content-type-options
"""


def test_every_header_that_a_page_needs_is_exposed(sites):
    seen = set()
    for method, target, headers, body, _ in ANSWERS.values():
        seen |= set(send(sites["none"], method, target, *headers, body=body).headers)
    exposed = EXPOSED.lower().split(", ")
    assert seen <= {*exposed, *READABLE.split(), *NOT_FOR_PAGES.split()}
