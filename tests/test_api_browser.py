"""A page of another origin uses the API in a real browser, headless Chromium."""

import io
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT, photograph, running_site, until
from PIL import Image
from playwright.sync_api import Error, sync_playwright
from proxy import Proxy

CLIENTS = ROOT / "tests" / "clients"
FILES = {
    "/page.html": CLIENTS / "page.html",
    "/isolated.html": CLIENTS / "page.html",
    "/page.js": CLIENTS / "page.js",
    "/tus.min.js": CLIENTS / "node_modules" / "tus-js-client" / "dist" / "tus.min.js",
}
MIB = 2**20
HEADERS = 16 * 1024  # bytes of all requests of a page without their bodies, at most


class Pages(SimpleHTTPRequestHandler):
    """Serves the page. `isolated.html` is the page with the headers by which it isolates itself."""

    def translate_path(self, path):
        return str(FILES.get(path.partition("?")[0], "/nowhere"))

    def end_headers(self):
        if self.path.startswith("/isolated.html"):
            self.send_header("Cross-Origin-Opener-Policy", "same-origin")
            self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def pages():
    """The port of a server of the page. It has two origins: http://127.0.0.1 and http://localhost."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def allowing(embedded, pages, tmp_path_factory):
    """A site with a worker, whose setting allows the page at 127.0.0.1."""
    embedded.client.flushall()
    folder = tmp_path_factory.mktemp("site")
    with running_site(embedded, folder, cors_origins=f"http://127.0.0.1:{pages}") as site:
        site.worker()
        yield site


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(allowing, browser, pages):
    """Opens the page, in one browser profile for the whole test. Its script calls the site at `port`, as alice."""
    profile = browser.new_context()

    def visit(name: str = "page.html", host: str = "127.0.0.1", port: int = allowing.port):
        page = profile.new_page()
        page.goto(f"http://{host}:{pages}/{name}?api=http://127.0.0.1:{port}&token={allowing.token('alice')}")
        return page

    yield visit
    profile.close()


@pytest.fixture
def photo(tmp_path):
    """The path of a photograph of over 1 MiB."""
    large = Image.open(io.BytesIO(photograph())).resize((2048, 2400))
    large.save(tmp_path / "photo.jpg", quality=97)
    return tmp_path / "photo.jpg"


def call(page, method: str, path: str, body=None, **headers: str) -> dict:
    return page.evaluate("given => call(...given)", [method, path, body, headers])


def wait_until_ready(page, post: str) -> dict:
    def read():
        answer = call(page, "GET", f"/v1/posts/{post}")["body"]
        return answer if answer["status"] == "ready" else None

    return until(read, what="the picture")


def stored(site) -> int:
    """The offset of the only open upload."""
    with site.client("alice") as alice:
        return alice.get("/v1/uploads").json()["items"][0]["offset"]


def test_a_photograph_is_resumed_after_the_page_was_closed_then_posted_commented_and_listed(allowing, visit, photo):
    size = photo.stat().st_size
    assert size > MIB
    with Proxy(allowing.port) as line:
        line.rate = 2 * MIB
        page = visit(port=line.port)
        assert call(page, "GET", "/v1/posts")["body"] == {"items": [], "next": None}
        page.set_input_files("input", photo)
        page.evaluate("() => { upload() }")
        until(lambda: line.up > size / 2, what="half of the photograph")
        # What the page has sent and the server has not received is lost, as on a real line. The connection is not cut,
        # because Chromium would send the request again while it closes the page.
        line.rate = 1
        page.close()
        until(lambda: stored(allowing) > line.up - HEADERS, what="all bytes that the server received")

        line.rate = None  # for pieces that come from now on
        page = visit(port=line.port)
        page.set_input_files("input", photo)
        done = page.evaluate("upload()")
        assert size / 2 - HEADERS < done["offset"] < size
        assert line.up < size + 2 * HEADERS, "nothing was sent twice"

    page = visit()
    key = {"Idempotency-Key": "one"}
    made = call(page, "POST", "/v1/posts", {"upload": done["id"], "caption": "From a page"}, **key)
    post = made["body"]["id"]
    assert (made["status"], made["headers"]["location"]) == (201, f"/v1/posts/{post}")
    repeated = call(page, "POST", "/v1/posts", {"upload": done["id"], "caption": "From a page"}, **key)
    assert (repeated["body"]["id"], repeated["headers"]["idempotent-replayed"]) == (post, "true")
    wait_until_ready(page, post)

    commented = call(page, "POST", f"/v1/posts/{post}/comments", {"text": "Nice!"})
    assert commented["status"] == 201
    feed = call(page, "GET", "/v1/posts")
    assert [item["latest_comments"][0]["text"] for item in feed["body"]["items"]] == ["Nice!"]
    known = call(page, "GET", "/v1/posts", None, **{"If-None-Match": feed["headers"]["etag"]})
    assert (known["status"], known["body"]) == (304, None)
    assert call(page, "DELETE", commented["headers"]["location"])["status"] == 204
    gone = call(page, "GET", commented["headers"]["location"])
    assert (gone["status"], gone["body"]["code"]) == (404, "nocomment")
    assert "request-id" in gone["headers"]


@pytest.fixture(scope="module")
def picture(allowing):
    """The address of a served picture."""
    with allowing.client("alice") as alice:
        post = alice.post("/v1/posts", files={"image": photograph()}).json()["id"]
        until(lambda: alice.get(f"/v1/posts/{post}").json()["status"] == "ready", what="the picture")
    return f"/v1/images/{post}.jpg"


def test_a_page_reads_a_picture_by_a_canvas_also_if_it_has_shown_it_before(visit, picture):
    page = visit()
    with pytest.raises(Error, match="tainted"):  # an <img> without crossorigin; the picture is in the cache now
        page.evaluate("path => show(path, false)", picture)
    colour = page.evaluate("path => show(path, true)", picture)
    assert len(colour) == 4 and colour[3] == 255


def test_a_page_that_isolates_itself_shows_a_picture(visit, picture):
    page = visit("isolated.html")
    assert page.evaluate("crossOriginIsolated")
    with pytest.raises(Error, match="tainted"):  # it was shown, or the error would be another one
        page.evaluate("path => show(path, false)", picture)
    assert len(page.evaluate("path => show(path, true)", picture)) == 4


def test_a_page_of_an_origin_that_is_not_listed_reads_nothing_and_changes_nothing(allowing, visit, picture, photo):
    page = visit(host="localhost")
    post = picture.removeprefix("/v1/images/").removesuffix(".jpg")
    with allowing.client("alice") as alice:
        before = [alice.get(path).json() for path in (f"/v1/posts/{post}", "/v1/posts", "/v1/uploads")]
        for method, path, body in (
            ("GET", "/v1/posts", None),
            ("POST", f"/v1/posts/{post}/comments", {"text": "From elsewhere"}),
            ("DELETE", f"/v1/posts/{post}", None),
        ):
            with pytest.raises(Error, match="Failed to fetch"):
                call(page, method, path, body)
        with pytest.raises(Error, match="Failed to fetch"):
            page.evaluate("fetch(api + '/v1/posts')")  # a request without a preflight
        page.set_input_files("input", photo)
        with pytest.raises(Error, match="failed to create upload"):
            page.evaluate("upload()")
        with pytest.raises(Error, match="EncodingError"):
            page.evaluate("path => show(path, true)", picture)
        assert [alice.get(path).json() for path in (f"/v1/posts/{post}", "/v1/posts", "/v1/uploads")] == before
