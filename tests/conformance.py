"""Compares answers with api/openapi.yaml. The clients of the tests call `check` for every answer of a site.

An answer conforms if the description lists its status for the call, and its headers and its body are as described
there. Here the description is read strictly: a header or a member of JSON that it does not have is wrong.
"""

import gzip
import re
from functools import cache
from typing import NamedTuple
from urllib.parse import urlsplit

import brotli
import jsonschema_rs
import orjson

from api import description

DESCRIPTION = description.load()
METHODS = ("get", "head", "post", "patch", "delete", "options", "put", "trace")
FRAMING = {"content-type", "content-length", "connection", "keep-alive", "transfer-encoding"}
DECODE = {"br": brotli.decompress, "gzip": gzip.decompress}
SITES: set[int] = set()  # the ports of this process' sites. Other servers' answers are not checked


class Wrong(AssertionError):
    """An answer that is not as the description says."""


class Response(NamedTuple):
    """A response of the description, compiled."""

    headers: dict  # name in lower case -> type of its schema, validator
    required: set[str]
    media: dict  # media type -> validator, or None for other than JSON


def resolve(part: dict) -> dict:
    """The part itself, or what its `$ref` names."""
    while "$ref" in part:
        target = DESCRIPTION
        for name in part["$ref"].removeprefix("#/").split("/"):
            target = target[name.replace("~1", "/").replace("~0", "~")]
        part = target
    return part


def closed(part):
    """A copy in which objects have no other members than those described."""
    if isinstance(part, list):
        return [closed(item) for item in part]
    if not isinstance(part, dict):
        return part
    copy = {name: closed(value) for name, value in part.items()}
    if copy.get("type") == "object" and "properties" in copy and "additionalProperties" not in copy:
        copy["unevaluatedProperties"] = False
    return copy


COMPONENTS = {"schemas": closed(DESCRIPTION["components"]["schemas"])}


def validator(schema: dict, close: bool = True):
    components = COMPONENTS if close else {"schemas": DESCRIPTION["components"]["schemas"]}
    document = {**(closed(schema) if close else schema), "components": components}
    return jsonschema_rs.Draft202012Validator(document, validate_formats=True)


def operations() -> dict[tuple[str, str], dict]:
    """All calls: method in upper case and path -> operation."""
    return {
        (method.upper(), path): item[method]
        for path, item in DESCRIPTION["paths"].items()
        for method in METHODS
        if method in item
    }


OPERATIONS = operations()
# A path without parameters comes before those that it matches, too.
PATHS = [
    (re.compile(re.sub(r"\\{\w+\\}", "[^/]+", re.escape(path))), path)
    for path in sorted(DESCRIPTION["paths"], key=lambda path: path.count("{"))
]


@cache
def compiled(name: str, method: str = "", path: str = "") -> Response:
    """The response `name` of an operation, or of the components if there is no operation."""
    found = OPERATIONS[method, path]["responses"] if path else DESCRIPTION["components"]["responses"]
    response = resolve(found[name])
    headers = {header.lower(): resolve(value) for header, value in response.get("headers", {}).items()}
    media = {
        kind: validator(content["schema"]) if kind.endswith("json") else None
        for kind, content in response.get("content", {}).items()
    }
    validators = {}
    for header, value in headers.items():
        schema = value["schema"]
        validators[header] = (resolve(schema).get("type"), validator(schema))
    return Response(validators, {header for header, value in headers.items() if value.get("required")}, media)


@cache
def find_path(path: str) -> str:
    """The path of the description that a request's path matches. Empty if there is none."""
    return next((template for pattern, template in PATHS if pattern.fullmatch(path)), "")


def choose(method: str, path: str, status: int, tus: bool) -> Response:
    """The response that describes an answer. `tus`: it has the header Tus-Resumable. Raises Wrong."""
    template = find_path(path)
    operation = OPERATIONS.get((method, template))
    if operation and str(status) in operation["responses"]:
        return compiled(str(status), method, template)
    prefix = "Tus" if tus else ""
    names = ["Other"] if operation else ["Unrouted", "Other"]
    for name in names:
        if status in DESCRIPTION["components"]["responses"][prefix + name]["x-statuses"]:
            return compiled(prefix + name)
    raise Wrong(f"{method} {path} has no status {status} in api/openapi.yaml")


def check(method: str, target: str, status: int, headers, body: bytes | None, decoded: bool = False) -> None:
    """Raises Wrong if an answer is not as described. `headers` are pairs.

    `body` None: it is not known. `decoded`: it has no Content-Encoding any more.
    """
    headers = {name.lower(): value for name, value in headers}
    path = urlsplit(target).path if "://" in target[:8] else target.partition("?")[0]
    preflight = method == "OPTIONS" and status == 204 and "access-control-max-age" in headers
    response = compiled("Preflight") if preflight else choose(method, path, status, "tus-resumable" in headers)
    shown = f"{method} {target[:200]} answered {status}"
    for name in headers.keys() - FRAMING:
        if name not in response.headers:
            raise Wrong(f"{shown} with the header {name}, which api/openapi.yaml does not have there")
        kind, value = response.headers[name]
        text = headers[name]
        instance = int(text) if kind == "integer" and text.isdecimal() else text
        if not value.is_valid(instance):
            raise Wrong(f"{shown} with {name}: {text}, which is not as api/openapi.yaml says")
    if missing := response.required - headers.keys():
        raise Wrong(f"{shown} without the header {', '.join(missing)}")
    if body is None or method == "HEAD":
        return
    if not response.media or status in (204, 304):
        if body:
            raise Wrong(f"{shown} with a body, which api/openapi.yaml does not have there")
        return
    kind = headers.get("content-type", "").partition(";")[0]
    if kind not in response.media:
        raise Wrong(f"{shown} with the type {kind!r}, not {' or '.join(response.media)}")
    schema = response.media[kind]
    if schema is None:
        return
    coding = headers.get("content-encoding")
    try:
        instance = orjson.loads(DECODE[coding](body) if coding and not decoded else body)
        schema.validate(instance)
    except (orjson.JSONDecodeError, jsonschema_rs.ValidationError) as error:
        raise Wrong(f"{shown} with a body that is not as api/openapi.yaml says: {error}") from None
    if kind == "application/problem+json" and instance["status"] != status:
        raise Wrong(f"{shown} with a problem whose status is {instance['status']}")
