"""Sends what the description of the API allows, and more, and compares the answers with it. A part of `make fuzz`.

Schemathesis makes the requests from the description: for each call some that it allows and some that it does not, and
scenarios that follow its links, for example from a new post to its comments. Most of them name something that exists
and have a token, so that they reach the handlers. The seed determines all but the ids, which the server chooses.

Asserts that no status is 5xx and that each answer is as the description says, by Schemathesis' checks and by those of
tests/conformance.py.
"""

import itertools
import random
import sys
import tempfile
import time
from collections import Counter
from copy import deepcopy
from pathlib import Path

import hypothesis
import requests
import schemathesis
from conformance import DESCRIPTION, check
from conftest import RedisServer, Site
from hypothesis import strategies
from making import jpeg
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
TUS = {"Tus-Resumable": "1.0.0"}
IMAGE = jpeg(64, 48)
ROUNDS = 6  # of scenarios at most. One is enough for a long run. A short one may need more: chance chooses the ids
KEPT = 30  # ids of each kind that requests name
# Answers that show that the requests reach the handlers.
REACHED = {
    ("createPost", 201), ("readPost", 200), ("deletePost", 204), ("addComment", 201), ("listComments", 200),
    ("readComment", 200), ("deleteComment", 204), ("createUpload", 201), ("appendToUpload", 204), ("listUploads", 200),
    ("deleteUpload", 204), ("readImage", 200), ("listPosts", 422), ("addComment", 401), ("readUpload", 412),
}  # fmt: skip
READY = 10  # seconds within which the image of a post is made


schemathesis.serializer.alias("application/offset+octet-stream", "application/octet-stream")


class Explorer:
    """Sends requests to a site that has a worker, and checks the answers. `seen` counts them: (call, status)."""

    def __init__(self, site, users: list[str]):
        self.url = site.url
        self.tokens = [f"Bearer {site.token(user, exp=2**33)}" for user in users]
        self.ids: dict[str, list[str]] = {"post": ["x"], "comment": ["1-0"], "upload": ["ux"], "file": ["x"]}
        self.owners: dict[str, str] = {}  # id -> the token of who created it
        self.seen: Counter[tuple[str, int]] = Counter()
        self.session = requests.Session()
        self.schema = schemathesis.openapi.from_dict(deepcopy(DESCRIPTION))  # it changes what it gets
        self.schema.config.update(base_url=site.url)

    def furnish(self, case, chance: random.Random, share: float, token: str = "") -> None:
        """Makes this share of the cases reach their handlers and succeed. Without `token` any user sends it."""
        name = case.operation.definition.raw["operationId"]
        token = token or chance.choice(self.tokens)
        case.headers.pop("Prefer", None)  # each wait would take a second at least
        for parameter in case.path_parameters:
            known = self.ids.get(parameter, ())
            if known and case.path_parameters[parameter] not in known and chance.random() < share:
                case.path_parameters[parameter] = chance.choice(known)
            token = self.owners.get(case.path_parameters[parameter], token)
        headers = {"Authorization": token} if chance.random() < share else {}
        if chance.random() < share:
            for header in ("Idempotency-Key", "If-Match", "Upload-Metadata"):
                case.headers.pop(header, None)
            if "/v1/uploads" in case.operation.path:
                headers |= TUS
            if name == "createPost":
                case.media_type, case.body = "multipart/form-data", {"image": IMAGE, "caption": "Hello"}
                if len(self.ids["upload"]) > 1 and chance.random() < 0.3:
                    case.media_type, case.body = "application/json", {"upload": chance.choice(self.ids["upload"])}
            elif name == "addComment":
                case.body = {"text": "First!"}
            elif name == "createUpload":
                case.media_type, case.body = "application/offset+octet-stream", IMAGE
                headers |= {"Upload-Length": str(len(IMAGE) + chance.choice([0, 5, 5, 5]))}
            elif name == "appendToUpload":
                case.body = b"12345"
                headers |= {"Upload-Offset": str(len(IMAGE))}
        case.headers.update(headers)

    def call(self, case):
        return case.call(session=self.session, timeout=30)

    def inspect(self, case, response) -> None:
        name = case.operation.definition.raw["operationId"]
        self.seen[name, response.status_code] += 1
        headers = [(header, ", ".join(values)) for header, values in response.headers.items()]
        sent = response.request
        check(sent.method, sent.path_url, response.status_code, headers, response.content, decoded=True)
        case.validate_response(response, checks=CHECKS)
        if response.status_code == 201:
            created = response.headers["location"][0].rpartition("/")[2]
            self.remember({"createPost": "post", "addComment": "comment", "createUpload": "upload"}[name], created)
            self.owners[created] = response.request.headers["Authorization"]
            if name == "createPost":
                self.wait_for_image(created)

    def publish(self, token: str) -> str:
        """Creates a post, and returns its id when it is ready."""
        form = {"image": ("a.jpg", IMAGE)}
        sent = self.session.post(f"{self.url}/v1/posts", files=form, headers={"Authorization": token}, timeout=30)
        assert sent.status_code == 201, sent.text
        self.wait_for_image(sent.json()["id"])
        return sent.json()["id"]

    def wait_for_image(self, post: str) -> None:
        self.session.get(f"{self.url}/v1/posts/{post}", headers={"Prefer": f"wait={READY}"}, timeout=30)

    def remember(self, kind: str, name: str) -> None:
        self.ids[kind] = [*self.ids[kind], name][-KEPT:]

    def each_call(self, examples: int, seed: int) -> None:
        """Sends `examples` requests of each call that the description allows, and as many that it does not."""
        for result in self.schema.get_all_operations():
            operation = result.ok()
            self.one_call(operation.as_strategy(), examples, seed)
            if operation.tags != ["operation"] and operation.method != "options":  # these allow every request
                self.one_call(operation.as_strategy(generation_mode=GenerationMode.NEGATIVE), examples, seed)

    def one_call(self, cases, examples: int, seed: int) -> None:
        @hypothesis.seed(seed)
        @settings(examples)
        @hypothesis.given(cases, strategies.integers(0, 2**32))
        def send(case, number):
            self.furnish(case, random.Random(number), 0.8)
            self.inspect(case, self.call(case))

        send()

    def linked_calls(self, scenarios: int, steps: int, seed: int) -> None:
        """Plays scenarios of at most `steps` requests, which follow the links from posts to comments and images.

        A scenario knows only what itself created: Hypothesis expects the same answers to the same beginning.
        """
        explorer, tokens = self, itertools.cycle(self.tokens)
        linked = self.schema.include(tag=["posts", "comments", "images"]).exclude(method="HEAD")
        linked = linked.exclude(operation_id=["listPosts", "listChanges"])  # they depend on other scenarios

        class Machine(linked.as_state_machine()):
            def setup(self):
                self.chance, self.token = random.Random(seed), next(tokens)
                explorer.ids |= {"post": [explorer.publish(self.token)], "comment": ["1-0"], "upload": ["ux"]}

            def before_call(self, case):
                explorer.furnish(case, self.chance, 0.95, self.token)

            def call(self, case, **given):
                return explorer.call(case)

            def validate_response(self, response, case, additional_checks=None, **given):
                explorer.inspect(case, response)

        hypothesis.seed(seed)(Machine.TestCase)
        Machine.run(settings=settings(scenarios, stateful_step_count=steps))


def settings(examples: int, **more) -> hypothesis.settings:
    return hypothesis.settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
        **more,
    )


def explore(server, folder: Path, examples: int, scenarios: int, seed: int = 1) -> Counter:
    """Sends the requests to a new site that uses `server`. Returns how often which call got which status.

    A call gets up to `examples` requests that the description allows and as many that it does not; a scenario has 8.
    """
    site, log = Site(server.url, folder, processing=1000), folder / "log"
    try:
        with log.open("wb") as out:
            site.api(stderr=out, stdout=out)
            site.start("workers", stderr=out, stdout=out)
        explorer = Explorer(site, [f"user{number}" for number in range(40)])
        explorer.each_call(examples, seed)
        for number in range(ROUNDS):
            explorer.linked_calls(scenarios, 8, seed + number)
            if explorer.seen.keys() >= REACHED:
                break
        logged = log.read_text(errors="replace")
        assert "Traceback" not in logged and "ERROR" not in logged, logged[-3000:]
        assert explorer.seen.keys() >= REACHED, REACHED - explorer.seen.keys()
        return explorer.seen
    finally:
        site.close()


def described(examples: int = 140, scenarios: int = 250) -> str:
    """Sends about 10,000 requests. Returns the figures as a sentence."""
    with tempfile.TemporaryDirectory(prefix="ig-") as folder:
        server, began = RedisServer("valkey"), time.monotonic()
        try:
            seen = explore(server, Path(folder), examples, scenarios)
        finally:
            server.close()
    statuses: Counter[int] = Counter()
    for (_, status), count in seen.items():
        statuses[status] += count
    counted = ", ".join(f"{status}: {count}" for status, count in sorted(statuses.items()))
    took = time.monotonic() - began
    return f"{statuses.total()} requests made from the description in {took:.0f} s: {counted}"


if __name__ == "__main__":
    print(described(*map(int, sys.argv[1:])))
