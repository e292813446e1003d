"""The description of the API is valid and complete, and the clients of the tests compare every answer with it."""

import gzip
import json
import re

import brotli
import httpx
import pytest
from conformance import DESCRIPTION, OPERATIONS, Wrong, check, resolve, validator
from conftest import ROOT, application
from openapi_spec_validator import OpenAPIV31SpecValidator
from wire import Line, exchange, request

from api.problems import SANIC, STATUS

RESPONSES = [
    (method, path, status, resolve(response))
    for (method, path), operation in OPERATIONS.items()
    for status, response in operation["responses"].items()
]
CODES = DESCRIPTION["components"]["schemas"]["Code"]


def test_the_description_is_openapi_3_1():
    OpenAPIV31SpecValidator(DESCRIPTION).validate()


def test_every_route_is_described_and_every_described_call_is_routed():
    served = set()
    for route in application().router.routes:
        path = "/" + re.sub(r"<(\w+)(:[^>]*)?>", r"{\1}", route.path).replace("{name}", "{post}.jpg")
        served |= {(method, path) for method in route.methods}
    assert set(OPERATIONS) == served


def test_every_call_has_a_name_of_its_own_a_group_and_a_summary():
    groups = {tag["name"] for tag in DESCRIPTION["tags"]}
    names = [operation["operationId"] for operation in OPERATIONS.values()]
    assert len(set(names)) == len(names)
    for operation in OPERATIONS.values():
        assert re.fullmatch(r"[a-z][A-Za-z]+", operation["operationId"])
        assert set(operation["tags"]) <= groups and operation["summary"]


def test_a_head_has_the_parameters_and_the_answers_of_its_get():
    for (method, path), operation in OPERATIONS.items():
        if method == "GET":
            head = OPERATIONS["HEAD", path]
            assert head.get("parameters") == operation.get("parameters")
            assert head.get("security") == operation.get("security")
            assert set(head["responses"]) == set(operation["responses"])
            assert resolve(head["responses"]["200"])["headers"] == resolve(operation["responses"]["200"])["headers"]
            assert "content" not in head["responses"]["200"]


def test_exactly_the_codes_of_problems_are_described_with_their_statuses():
    """The codes come from refusals, from Sanic's errors, from the source of `api/`, and from nginx."""
    known = {(refusal.word.lower(), status) for refusal, status in STATUS.items()}
    known |= {(code, error.status_code) for error, (code, _) in SANIC.items()}
    for path in (ROOT / "api").rglob("*.py"):
        for status, code in re.findall(r"""roblem\(\s*(\d{3}),\s*"(\w+)\"""", path.read_text()):
            known.add((code, int(status)))
    front = (ROOT / "deploy" / "nginx.conf").read_text()  # what nginx answers by itself
    known |= {(code, int(status)) for status, code in re.findall(r'"status":(\d+),.*"code":"(\w+)"', front)}
    described = {(code, status) for code, entry in CODES["x-codes"].items() for status in entry["status"]}
    assert described == known
    assert list(CODES["x-codes"]) == CODES["enum"]
    for entry in CODES["x-codes"].values():
        assert entry["meaning"] and entry["client"]


def codes(response: dict) -> tuple[set[int], set[str]]:
    """The statuses and the codes of a response that is a problem."""
    parts = response["content"]["application/problem+json"]["schema"]["allOf"]
    assert parts[0] == {"$ref": "#/components/schemas/Problem"}
    narrowed = parts[1]["properties"]
    statuses = {narrowed["status"]["const"]} if "status" in narrowed else set(response["x-statuses"])
    return statuses, set(narrowed["code"]["enum"])


def test_every_response_that_is_an_error_lists_codes_of_its_status():
    used = set()
    components = [("", "", name, response) for name, response in DESCRIPTION["components"]["responses"].items()]
    for method, path, name, response in [*RESPONSES, *components]:
        if name in ("200", "201", "204", "206", "304", "307", "NotModified", "Deleted", "Preflight"):
            continue
        statuses, listed = codes(response)
        assert not name.isdecimal() or statuses == {int(name)}
        for code in listed:
            assert statuses & set(CODES["x-codes"][code]["status"]), (method, path, name, code)
        used |= listed
    assert used == set(CODES["enum"]) - {"stale"}  # only workers get it


def examples(part: dict) -> list:
    """The examples of a parameter or of a body."""
    return [part["example"]] if "example" in part else [one["value"] for one in part.get("examples", {}).values()]


def test_every_parameter_and_every_json_body_has_an_example_that_conforms():
    count = 0
    for (method, path), operation in OPERATIONS.items():
        item = DESCRIPTION["paths"][path]
        for parameter in [*item.get("parameters", ()), *operation.get("parameters", ())]:
            parameter = resolve(parameter)
            assert examples(parameter), (method, path, parameter["name"])
            for example in examples(parameter):
                validator(parameter["schema"]).validate(example)
        bodies = [operation["requestBody"]] if "requestBody" in operation else []
        bodies += [resolve(response) for response in operation["responses"].values()]
        for body in bodies:
            for kind, content in body.get("content", {}).items():
                if kind.endswith("json"):
                    assert examples(content), (method, path, kind)
                for example in examples(content):
                    validator(content["schema"]).validate(example)
                    count += 1
    assert count > 100


def test_the_example_of_a_problem_has_a_code_and_a_type_that_belong_together():
    for *_, response in RESPONSES:
        if "application/problem+json" in response.get("content", {}):
            example = response["content"]["application/problem+json"]["example"]
            assert example["type"] == f"/docs#{example['code']}"
            assert example["status"] in CODES["x-codes"][example["code"]]["status"]


def test_every_link_leads_to_a_call_and_gives_it_parameters_that_it_has():
    by_name = {operation["operationId"]: (path, operation) for (_, path), operation in OPERATIONS.items()}
    links = [link for *_, response in RESPONSES for link in response.get("links", {}).values()]
    assert len(links) > 10
    for link in links:
        path, operation = by_name[link["operationId"]]
        parameters = [*DESCRIPTION["paths"][path].get("parameters", ()), *operation.get("parameters", ())]
        assert set(link["parameters"]) <= {resolve(parameter)["name"] for parameter in parameters}


def test_every_component_is_used():
    text = json.dumps(DESCRIPTION)
    for kind, components in DESCRIPTION["components"].items():
        for name in components:
            # The tests use these three for answers to requests that no route takes.
            if kind != "securitySchemes" and name not in ("Unrouted", "TusUnrouted", "Preflight"):
                assert f'"#/components/{kind}/{name}"' in text, (kind, name)


def test_calls_that_take_a_token_say_so():
    for (method, path), operation in OPERATIONS.items():
        assert ("401" in operation["responses"]) == ({"bearer": []} in operation.get("security", ())), (method, path)


def test_the_description_is_served(serving):
    with serving.client() as client:
        answer = client.get("/openapi.json")
        assert answer.json() == DESCRIPTION
        assert answer.headers["Cache-Control"] == "public, max-age=300"
        assert answer.headers["Content-Encoding"] in ("br", "gzip")
        again = client.get("/openapi.json", headers={"If-None-Match": answer.headers["ETag"]})
        assert (again.status_code, again.content) == (304, b"")
        assert client.head("/openapi.json").headers["ETag"] == answer.headers["ETag"]


# The hook

FRAME = {"Date": "Fri, 27 Nov 2026 03:25:05 GMT", "Request-Id": "a"}
COMMENT = {"id": "1-0", "author": "bob", "text": "a", "created_at": "2026-11-27T03:25:04.975Z"}
CREATED = {**FRAME, "Location": "/v1/posts/x/comments/1-0", "Content-Type": "application/json"}
INVALID = {"type": "/docs#invalid", "title": "Unprocessable Entity", "status": 422, "detail": "a", "code": "invalid"}
PROBLEM = {"type": "/docs#nopost", "title": "Not Found", "status": 404, "detail": "no such post", "code": "nopost"}
OTHER = {"type": "/docs#timeout", "title": "Request Timeout", "status": 408, "detail": "a", "code": "timeout"}
REFUSED = {**FRAME, "Cache-Control": "no-store", "Content-Type": "application/problem+json"}


def answered(status: int, headers: dict, body, method: str = "POST", target: str = "/v1/posts/x/comments?a=b") -> None:
    check(method, target, status, headers.items(), json.dumps(body).encode() if body is not None else b"")


def test_the_hook_accepts_what_is_described():
    answered(201, CREATED, COMMENT)
    answered(201, {name.lower(): value for name, value in CREATED.items()}, COMMENT)
    answered(404, REFUSED, PROBLEM)
    answered(404, REFUSED, {**PROBLEM, "type": "/docs#nowhere", "code": "nowhere"}, target="/v2")
    body = json.dumps(COMMENT).encode()
    for coding, compress in (("br", brotli.compress), ("gzip", gzip.compress)):
        headers = {**FRAME, "ETag": '"x"', "Cache-Control": "no-cache", "Vary": "Accept-Encoding"}
        headers |= {"Content-Encoding": coding, "Content-Type": "application/json"}
        check("GET", "/v1/posts/x/comments/1-0", 200, headers.items(), compress(body))


def without(members: dict, name: str) -> dict:
    return {key: value for key, value in members.items() if key != name}


WRONG = {
    "another member": (201, CREATED, {**COMMENT, "x": 1}),
    "a missing member": (201, CREATED, without(COMMENT, "text")),
    "a member of another type": (201, CREATED, {**COMMENT, "text": None}),
    "a time in another format": (201, CREATED, {**COMMENT, "created_at": "2026-11-27 03:25"}),
    "another header": (201, {**CREATED, "X-Powered-By": "x"}, COMMENT),
    "a missing header": (201, without(CREATED, "Location"), COMMENT),
    "no Date": (201, without(CREATED, "Date"), COMMENT),
    "a header in another format": (201, {**CREATED, "Idempotent-Replayed": "yes"}, COMMENT),
    "another type": (201, {**CREATED, "Content-Type": "text/html"}, COMMENT),
    "no type": (201, without(CREATED, "Content-Type"), COMMENT),
    "another status": (202, CREATED, COMMENT),
    "a status of another call": (410, REFUSED, {**PROBLEM, "type": "/docs#expired", "code": "expired", "status": 410}),
    "a code of another status": (404, REFUSED, {**PROBLEM, "code": "invalid"}),
    "an unknown code": (404, REFUSED, {**PROBLEM, "code": "x"}),
    "a status in the body that is not the answer's": (404, REFUSED, {**PROBLEM, "status": 403}),
    "another status in the body, where several are possible": (500, REFUSED, OTHER),
    "an unknown member of a problem": (404, REFUSED, {**PROBLEM, "x": 1}),
    "a 422 that does not say where": (422, REFUSED, INVALID),
    "no JSON": (201, CREATED, None),
}


@pytest.mark.parametrize("case", WRONG)
def test_the_hook_refuses(case):
    with pytest.raises(Wrong):
        answered(*WRONG[case])


def test_the_hook_refuses_a_body_where_none_is_described():
    with pytest.raises(Wrong):
        answered(204, FRAME, {}, "DELETE", "/v1/posts/x")


def test_every_client_of_the_tests_has_the_hook(serving, monkeypatch):
    """The description is changed, so that the true answer of /healthz is wrong."""
    call = "GET", "/healthz"
    monkeypatch.setitem(OPERATIONS, call, {**OPERATIONS[call], "responses": {}})
    with pytest.raises(Wrong):
        httpx.get(f"{serving.url}/healthz")
    with pytest.raises(Wrong), serving.client() as client:
        client.get("/healthz")
    with pytest.raises(Wrong):
        exchange(serving.port, request(*call))


async def test_the_clients_of_asyncio_have_the_hook(serving, monkeypatch):
    call = "GET", "/healthz"
    monkeypatch.setitem(OPERATIONS, call, {**OPERATIONS[call], "responses": {}})
    async with httpx.AsyncClient() as client:
        with pytest.raises(Wrong):
            await client.get(f"{serving.url}/healthz")
    async with Line(serving.port) as line:
        with pytest.raises(Wrong):
            await line.ask(*call)

