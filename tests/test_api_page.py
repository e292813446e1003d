"""The page /docs in a real browser: it shows every call, makes calls, and explains every code.

`make picture` draws the picture of the page in docs/images/ again.
"""

import os
import re
from io import BytesIO
from urllib.parse import urlsplit

import pytest
from conformance import DESCRIPTION, OPERATIONS
from conftest import run_with_db, until
from making import make_post
from PIL import Image
from playwright.sync_api import Page, sync_playwright

# Without a sandbox, because tests may run as root. Chromium itself asks nothing of other hosts.
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
QUIET += ["--disable-component-update", "--disable-sync"]
CODES = DESCRIPTION["components"]["schemas"]["Code"]["x-codes"]
REPORT = "document.addEventListener('securitypolicyviolation', e => console.error(e.violatedDirective, e.blockedURI))"


@pytest.fixture(scope="module")
def post(serving):
    return run_with_db(serving.server, lambda db: make_post(db, "alice", caption="Hello"))


@pytest.fixture(scope="module")
def browser(post):  # the post comes first: from here on Playwright runs an event loop in this thread
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=QUIET)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def opened(browser, serving):
    """The page, opened. At the end nothing was reported: no error, no violated policy, no request to another host."""
    page = browser.new_page(viewport={"width": 1100, "height": 1000})
    wrong = []
    page.on("console", lambda message: "401 (Unauthorized)" in message.text or wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    hosts = set()
    page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
    page.add_init_script(REPORT)
    page.goto(f"{serving.url}/docs")
    page.wait_for_selector(".opblock")
    yield page
    assert wrong == []
    assert hosts == {f"127.0.0.1:{serving.port}"}


def execute(page: Page, name: str, **values: str) -> int:
    """Tries a call out with these parameters. Returns the status of the answer, which the page shows."""
    call = page.locator(f"[id$='-{name}']")
    call.locator(".opblock-summary-control").click()
    if not call.locator("button.execute").count():
        call.locator(".try-out__btn").click()
    for parameter, value in values.items():
        call.locator(f"tr[data-param-name={parameter}] input").fill(value)
    with page.expect_response(lambda answer: "/v1/" in answer.url) as answer:
        call.locator("button.execute").click()
    status = answer.value.status
    call.locator(".live-responses-table .response-col_status", has_text=str(status)).first.wait_for()
    call.locator(".opblock-summary-control").click()
    return status


def test_the_page_lists_every_call(opened):
    shown = zip(
        opened.locator(".opblock-summary-method").all_inner_texts(),
        opened.locator(".opblock-summary-path").all_inner_texts(),
        strict=True,
    )
    assert {(method, path.replace("\u200b", "")) for method, path in shown} == set(OPERATIONS)


def test_trying_the_feed_out_gets_it(opened):
    assert execute(opened, "listPosts") == 200


def test_a_call_that_needs_a_token_works_after_authorizing(opened, serving, post):
    assert execute(opened, "listUploads") == 401
    opened.locator("button.authorize").click()
    opened.locator(".auth-container input").fill(serving.token("alice"))
    opened.locator(".auth-btn-wrapper button.authorize").click()
    opened.locator(".auth-btn-wrapper button.btn-done").click()
    assert execute(opened, "listUploads") == 200
    assert execute(opened, "deletePost", post=post) == 204
    assert serving.client().get(f"/v1/posts/{post}").status_code == 404


def test_the_type_of_a_problem_leads_to_the_entry_of_its_code(browser, serving):
    refused = serving.client().get("/v1/posts/x")
    page = browser.new_page()
    page.goto(serving.url + refused.json()["type"])
    page.wait_for_selector(".opblock")
    entry = page.locator("tr:target")
    until(lambda: 0 <= entry.bounding_box()["y"] < 100, what="the entry")
    assert entry.locator("td").all_inner_texts()[:3] == ["nopost", "404", CODES["nopost"]["meaning"]]
    page.evaluate("location.hash = '#precondition'")
    until(lambda: entry.get_attribute("id") == "precondition", what="another entry")
    page.close()


def test_every_code_has_an_entry_on_the_page(serving):
    html = serving.client().get("/docs").text
    failures = DESCRIPTION["components"]["schemas"]["Failure"]["properties"]["code"]["enum"]
    assert re.findall(r'<tr id="(\w+)">', html) == [*CODES, *failures]


def test_a_file_of_the_page_never_changes_and_is_compressed(serving):
    with serving.client() as client:
        html = client.get("/docs")
        assert "script-src 'self';" in html.headers["Content-Security-Policy"]
        assert "unsafe" not in html.headers["Content-Security-Policy"]
        assert not re.search(r"<script>|<style>| style=| on\w+=", html.text)
        named = re.findall(r'(?:href|src)="(/docs/[^"]+)"', html.text)
        assert len(named) == 5
        for path in named:
            answer = client.get(path)
            assert answer.headers["Cache-Control"] == "public, max-age=31536000, immutable"
            assert answer.headers["Content-Encoding"] in ("br", "gzip")
            assert client.get(path, headers={"If-None-Match": answer.headers["ETag"]}).status_code == 304
        assert client.get("/docs/openapi.yaml").status_code == 404
        assert client.get("/docs/").status_code == 404


def test_the_picture_of_the_page(browser, serving):
    page = browser.new_page(viewport={"width": 1100, "height": 1000})
    page.goto(f"{serving.url}/docs")
    page.wait_for_selector(".opblock")
    picture = Image.open(BytesIO(page.screenshot()))
    page.close()
    assert picture.size == (1100, 1000)
    if "PICTURE" in os.environ:
        picture.convert("P", palette=Image.Palette.ADAPTIVE).save(os.environ["PICTURE"], optimize=True)
