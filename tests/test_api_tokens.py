"""Whoever writes says who they are, with a token of ours; and is that user to the letter."""

import base64
import json
import time

import jwt
import pytest
from conftest import SECRET
from wire import head, request


def test_a_sub_with_braces_and_colons_is_a_user_like_any_other(standing):
    users = ["{0}:x", "{1}", "x}:{0", ":", "a:b", "a", '"a"', "\\", "{0}:x:y", "%00", "*", "a" * 255]
    posted = {}
    for user in users:
        with standing.client(user) as client:
            made = client.post("/v1/posts", files={"image": ("a.bmp", b"BM" + bytes(100))})
            assert (made.status_code, made.json()["author"]) == (201, user)
            posted[user] = made.json()["id"]
    for user in users:
        with standing.client(user) as client:
            for owner, post in posted.items():
                if owner != user:
                    assert client.delete(f"/v1/posts/{post}").status_code == 403
    for user, post in posted.items():
        with standing.client(user) as client:
            assert client.delete(f"/v1/posts/{post}").status_code == 204


def test_a_sub_is_a_user_to_the_letter(standing):
    for user in ("Alice", "alic", "alicee", "alice:", "{alice}"):
        target = standing.filled("/v1/posts/{post}")
        standing.refused(request("DELETE", target, standing.token(user)), 403, "forbidden")
        target = standing.filled("/v1/posts/{post}/comments/{comment}")
        standing.refused(request("DELETE", target, standing.token(user)), 403, "forbidden")


def signed(claims: dict, secret: str | None = SECRET, algorithm: str = "HS256") -> str:
    return jwt.encode(claims, secret, algorithm)


def claims(**others) -> dict:
    return {"sub": "alice", "exp": int(time.time()) + 600} | others


def unsigned(claims: dict, algorithm: str) -> str:
    parts = json.dumps({"alg": algorithm, "typ": "JWT"}).encode(), json.dumps(claims).encode(), b""
    return ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in parts)


TOKENS = {
    "expired": lambda: signed(claims(exp=int(time.time()) - 1)),
    "without exp": lambda: signed({"sub": "alice"}),
    "without sub": lambda: signed({"exp": int(time.time()) + 600}),
    "with a number as sub": lambda: signed(claims(sub=7)),
    "with a list as sub": lambda: signed(claims(sub=["alice"])),
    "with null as sub": lambda: signed(claims(sub=None)),
    "with an empty sub": lambda: signed(claims(sub="")),
    "with a newline in its sub": lambda: signed(claims(sub="alice\n")),
    "with a newline amid its sub": lambda: signed(claims(sub="a\nlice")),
    "with a NUL in its sub": lambda: signed(claims(sub="alice\0")),
    "with a space in its sub": lambda: signed(claims(sub="al ice")),
    "with a letter beyond ASCII in its sub": lambda: signed(claims(sub="alicé")),
    "with half of a surrogate pair in its sub": lambda: signed(claims(sub="\ud83d")),
    "with a sub of 256 characters": lambda: signed(claims(sub="a" * 256)),
    "with a word as exp": lambda: signed(claims(exp="tomorrow")),
    "with an endless exp": lambda: signed(claims(exp=float("inf"))),
    "with no number as exp": lambda: signed(claims(exp=float("nan"))),
    "with a list as exp": lambda: signed(claims(exp=[1])),
    "that is not valid yet": lambda: signed(claims(nbf=int(time.time()) + 600)),
    "signed with another secret": lambda: signed(claims(), "another secret, which is long enough too"),
    "signed with an empty secret": lambda: unsigned(claims(), "HS256"),
    "signed with HS512": lambda: signed(claims(), algorithm="HS512"),
    "signed with none": lambda: signed(claims(), None, "none"),
    "signed with None": lambda: unsigned(claims(), "None"),
    "cut off": lambda: signed(claims())[:-1],
    "with a fourth part": lambda: signed(claims()) + ".e30",
    "that is one word": lambda: "alice",
    "that is beyond ASCII": lambda: "\xff\xfe",
    "that is beyond ASCII, in UTF-8": lambda: "é".encode().decode("latin-1"),
    "of three dots": lambda: "...",
}


@pytest.mark.parametrize("case", TOKENS)
def test_nobody_writes_with_a_token(standing, case):
    token = TOKENS[case]()
    for method, target in [("DELETE", "/v1/posts/{post}"), ("POST", "/v1/posts")]:
        answer = standing.refused(request(method, standing.filled(target), token, b"{}"), 401, "unauthorized")
        assert answer.headers["www-authenticate"] == 'Bearer realm="imagegram", error="invalid_token"'


@pytest.mark.parametrize(
    "header", ["", "Authorization:", "Authorization: Bearer", "Authorization: Basic YTpi"]
)
def test_nobody_writes_without_a_token(standing, header):
    for method, target in [
        ("POST", "/v1/posts"),
        ("DELETE", "/v1/posts/{post}"),
        ("POST", "/v1/posts/{post}/comments"),
        ("DELETE", "/v1/posts/{post}/comments/{comment}"),
    ]:
        headers = [header] if header else []
        answer = standing.refused(head(method, standing.filled(target), *headers), 401, "unauthorized")
        assert answer.headers["www-authenticate"] == 'Bearer realm="imagegram"'
