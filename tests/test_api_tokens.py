"""Every write needs a signed token, and its `sub` is the user, compared character by character."""

import base64
import json
import os
import subprocess
import time

import jwt
import pytest
from conftest import NOBODY, SECRET, Site, running_site
from wire import Line, exchange, head, request

from api.tokens import LEEWAY, mint
from storage import settings


def test_a_sub_may_have_braces_colons_and_other_signs_with_a_meaning_elsewhere(furnished):
    users = ["{0}:x", "{1}", "x}:{0", ":", "a:b", "a", '"a"', "\\", "{0}:x:y", "%00", "*", "a" * 255]
    posted = {}
    for user in users:
        with furnished.client(user) as client:
            created = client.post("/v1/posts", files={"image": ("a.bmp", b"BM" + bytes(100))})
            assert (created.status_code, created.json()["author"]) == (201, user)
            posted[user] = created.json()["id"]
    for user in users:
        with furnished.client(user) as client:
            for owner, post in posted.items():
                if owner != user:
                    assert client.delete(f"/v1/posts/{post}").status_code == 403
    for user, post in posted.items():
        with furnished.client(user) as client:
            assert client.delete(f"/v1/posts/{post}").status_code == 204


def test_a_sub_that_differs_in_one_character_is_another_user(furnished):
    for user in ("Alice", "alic", "alicee", "alice:", "{alice}"):
        target = furnished.fill_in("/v1/posts/{post}")
        furnished.assert_refused(request("DELETE", target, furnished.token(user)), 403, "forbidden")
        target = furnished.fill_in("/v1/posts/{post}/comments/{comment}")
        furnished.assert_refused(request("DELETE", target, furnished.token(user)), 403, "forbidden")


def signed(claims: dict, secret: str | None = SECRET, algorithm: str = "HS256") -> str:
    return jwt.encode(claims, secret, algorithm)


def claims(**others) -> dict:
    return {"sub": "alice", "exp": int(time.time()) + 600} | others


def unsigned(claims: dict, algorithm: str) -> str:
    parts = json.dumps({"alg": algorithm, "typ": "JWT"}).encode(), json.dumps(claims).encode(), b""
    return ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in parts)


TOKENS = {
    "expired": lambda: signed(claims(exp=int(time.time()) - LEEWAY)),
    "without exp": lambda: signed({"sub": "alice"}),
    "without sub": lambda: signed({"exp": int(time.time()) + 600}),
    "with a number as sub": lambda: signed(claims(sub=7)),
    "with a list as sub": lambda: signed(claims(sub=["alice"])),
    "with null as sub": lambda: signed(claims(sub=None)),
    "with an empty sub": lambda: signed(claims(sub="")),
    "with a newline in its sub": lambda: signed(claims(sub="alice\n")),
    "with a newline inside its sub": lambda: signed(claims(sub="a\nlice")),
    "with a NUL in its sub": lambda: signed(claims(sub="alice\0")),
    "with a space in its sub": lambda: signed(claims(sub="al ice")),
    "with a letter in its sub that is not ASCII": lambda: signed(claims(sub="alicé")),
    "with half of a surrogate pair in its sub": lambda: signed(claims(sub="\ud83d")),
    "with a sub of 256 characters": lambda: signed(claims(sub="a" * 256)),
    "with a word as exp": lambda: signed(claims(exp="tomorrow")),
    "with an infinite exp": lambda: signed(claims(exp=float("inf"))),
    "with NaN as exp": lambda: signed(claims(exp=float("nan"))),
    "with a list as exp": lambda: signed(claims(exp=[1])),
    "that is not valid yet": lambda: signed(claims(nbf=int(time.time()) + 600)),
    "issued in the future": lambda: signed(claims(iat=int(time.time()) + LEEWAY + 10)),
    "signed with another secret": lambda: signed(claims(), "another secret, which is long enough too"),
    "signed with an empty secret": lambda: unsigned(claims(), "HS256"),
    "signed with HS512": lambda: signed(claims(), algorithm="HS512"),
    "signed with none": lambda: signed(claims(), None, "none"),
    "signed with None": lambda: unsigned(claims(), "None"),
    "signed with a list": lambda: unsigned(claims(), ["HS256"]),
    "cut off": lambda: signed(claims())[:-1],
    "with a fourth part": lambda: signed(claims()) + ".e30",
    "that is one word": lambda: "alice",
    "that is not ASCII": lambda: "\xff\xfe",
    "that is not ASCII, in UTF-8": lambda: "é".encode().decode("latin-1"),
    "of three dots": lambda: "...",
}


@pytest.mark.parametrize("case", TOKENS)
def test_a_write_is_refused_with_a_token(furnished, case):
    token = TOKENS[case]()
    for method, target in [("DELETE", "/v1/posts/{post}"), ("POST", "/v1/posts")]:
        answer = furnished.assert_refused(request(method, furnished.fill_in(target), token, b"{}"), 401, "unauthorized")
        assert answer.headers["www-authenticate"] == 'Bearer realm="imagegram", error="invalid_token"'


@pytest.mark.parametrize("header", ["", "Authorization:", "Authorization: Bearer", "Authorization: Basic YTpi"])
def test_a_write_is_refused_without_a_token(furnished, header):
    for method, target in [
        ("POST", "/v1/posts"),
        ("DELETE", "/v1/posts/{post}"),
        ("POST", "/v1/posts/{post}/comments"),
        ("DELETE", "/v1/posts/{post}/comments/{comment}"),
    ]:
        headers = [header] if header else []
        answer = furnished.assert_refused(head(method, furnished.fill_in(target), *headers), 401, "unauthorized")
        assert answer.headers["www-authenticate"] == 'Bearer realm="imagegram"'


def status_with(site, token: str) -> int:
    """The status of a DELETE of an unknown post: 404 if the token is valid, else 401."""
    return exchange(site.port, request("DELETE", f"/v1/posts/{NOBODY}", token)).status


def test_clocks_may_differ_by_30_seconds(furnished):
    now = int(time.time())
    for claim in ("nbf", "iat"):
        assert status_with(furnished, signed(claims(**{claim: now + LEEWAY}))) == 404
    assert status_with(furnished, signed(claims(exp=now - LEEWAY + 5))) == 404


async def test_a_token_in_the_cache_of_tokens_expires_at_the_end_of_its_leeway_and_not_before(furnished):
    ends = int(time.time()) + 2
    async with Line(furnished.port, signed(claims(exp=ends - LEEWAY))) as line:
        seen, status = set(), 404
        while status == 404:
            began = time.time()
            status = (await line.ask("DELETE", f"/v1/posts/{NOBODY}")).status
            seen.add(status)
            assert began < ends if status == 404 else time.time() >= ends
            assert began < ends + 10
    assert seen == {404, 401}


def test_an_audience_is_ignored_if_none_is_configured(furnished):
    for audience in ("others", ["a", "b"], 7, None):
        assert status_with(furnished, signed(claims(aud=audience, iss="anybody"))) == 404


def test_issuer_and_audience_are_checked_if_they_are_configured(embedded, tmp_path):
    right = {"iss": "https://login", "aud": "imagegram"}
    with running_site(embedded, tmp_path, jwt_issuer="https://login", jwt_audience="imagegram") as site:
        assert status_with(site, signed(claims(**right))) == 404
        assert status_with(site, signed(claims(**right | {"aud": ["other", "imagegram"]}))) == 404
        assert status_with(site, mint(settings.load(site.environment), "alice")) == 404
        for wrong in ({"iss": "https://log"}, {"iss": ""}, {"aud": "other"}, {"aud": []}, {"aud": {"imagegram": 1}}):
            assert status_with(site, signed(claims(**right | wrong))) == 401, wrong
        for name in right:
            assert status_with(site, signed(claims(**{name: right[name]}))) == 401


def test_the_refusal_of_a_token_gives_the_reason(furnished):
    for token, reason in {
        TOKENS["expired"](): "it has expired",
        TOKENS["signed with another secret"](): "its signature is wrong",
        TOKENS["without sub"](): "a claim is missing",
        TOKENS["with a number as sub"](): "`sub` must be a string",
        "/w.e30.e30": "it is malformed",
    }.items():
        answer = exchange(furnished.port, request("DELETE", f"/v1/posts/{NOBODY}", token))
        assert answer.json()["detail"] == f"the token is not accepted: {reason}"


def test_a_short_secret_is_refused_in_one_line(embedded, tmp_path):
    site = Site(embedded.url, tmp_path, jwt_secret="x" * 31)
    api = site.start("api", stderr=subprocess.PIPE, text=True)
    output = api.communicate(timeout=30)[1]
    assert (api.returncode, output.count("\n")) == (1, 1)
    assert output.startswith("IMAGEGRAM_JWT_SECRET has 31 bytes: ") and "xxx" not in output


@pytest.mark.parametrize("secret", ["", "x" * 31])
def test_a_stored_secret_that_is_too_short_is_refused_and_not_replaced(tmp_path, secret):
    (tmp_path / "jwt-secret").write_text(secret)
    with pytest.raises(SystemExit, match=f"jwt-secret has {len(secret)} bytes: "):
        settings.signing_secret(settings.load({"IMAGEGRAM_DATA": str(tmp_path)}))
    assert (tmp_path / "jwt-secret").read_text() == secret


def test_a_secret_needs_32_bytes_not_32_characters():
    for secret in ("x" * 32, "é" * 16):
        assert settings.signing_secret(settings.load({"IMAGEGRAM_JWT_SECRET": secret})) == secret


def test_a_secret_is_durable_before_it_is_used(tmp_path, monkeypatch):
    """Records the order of the system calls. They are executed as well."""
    calls, fsync, link = [], os.fsync, os.link

    def record_fsync(descriptor: int) -> None:
        calls.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}"), os.fstat(descriptor).st_size > 0))
        fsync(descriptor)

    def record_link(source, target) -> None:
        calls.append(("link", str(source), str(target)))
        link(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "link", record_link)
    folder = tmp_path / "data"
    secret = settings.signing_secret(settings.load({"IMAGEGRAM_DATA": str(folder)}))
    draft = calls[0][1]
    assert calls == [("fsync", draft, True), ("link", draft, f"{folder}/jwt-secret"), ("fsync", str(folder), True)]
    (file,) = folder.iterdir()
    assert (file.name, file.read_text(), file.stat().st_mode & 0o777) == ("jwt-secret", secret, 0o600)
