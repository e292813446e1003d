"""Wire traces: a text with requests and the answers they must get, which is played against a running server.

| line                          | meaning
|-------------------------------|----------------------------------------
| `> HEAD /v1/uploads/<upload>` | a request begins, on a connection of its own
| `> Upload-Offset: 0`          | a header of the request
| `> Host:`                     | a header without a value is not sent
| `> [first]`                   | the body: the bytes that `play` was given as `first`
| `< 200`                       | the status of the answer
| `< Upload-Offset: 0`          | a header of the answer
| `< Upload-Expires: *`         | a header that must be there; `*` stands for any text
| `< -Upload-Metadata`          | a header that must not be there
| `< code: noupload`            | the `code` of the problem in the body
| `<upload>`                    | in an answer: remembers the text under that name; afterwards: stands for that text

A request has a Host, the user's token and `Tus-Resumable: 1.0.0`, unless the trace gives these headers. A body has
its Content-Length, unless the trace gives one or the request has a Transfer-Encoding.
"""

import re

from wire import Answer, exchange

NAME = re.compile(r"<(\w+)>")


def play(site, trace: str, user: str | None = "alice", known: dict[str, str] | None = None, **bodies: bytes):
    """Plays a trace, and fails at the first answer that differs. Returns the remembered texts by their names."""
    known = dict(known or {})
    for asked, expected in steps(trace):
        answer = exchange(site.port, request(site, asked, user, known, bodies))
        shown = f"{chr(10).join(asked)}\n{answer}"
        for line in expected:
            check(answer, line, known, shown)
    return known


def steps(trace: str):
    """Yields (lines of the request, lines of the answer) for each request."""
    asked, expected = [], []
    for line in map(str.strip, trace.strip().splitlines()):
        if line.startswith(">"):
            if expected:
                yield asked, expected
                asked, expected = [], []
            asked.append(line[1:].strip())
        elif line.startswith("<"):
            expected.append(line[1:].strip())
        else:
            assert not line, line
    yield asked, expected


def fill(text: str, known: dict[str, str]) -> str:
    return NAME.sub(lambda name: known.get(name[1], name[0]), text)


def request(site, asked: list[str], user: str | None, known: dict[str, str], bodies: dict[str, bytes]) -> bytes:
    first, *rest = (fill(line, known) for line in asked)
    headers = {"host": "localhost", "tus-resumable": "1.0.0"}
    if user:
        headers["authorization"] = f"Bearer {site.token(user)}"
    body = b""
    for line in rest:
        if line.startswith("["):
            body += bodies[line[1:-1]]
        else:
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
    if body and "transfer-encoding" not in headers:
        headers.setdefault("content-length", str(len(body)))
    lines = [f"{first} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items() if value)]
    return "\r\n".join([*lines, "", ""]).encode() + body


def check(answer: Answer, line: str, known: dict[str, str], shown: str) -> None:
    name, _, value = line.partition(":")
    value = fill(value.strip(), known)
    if line.isdecimal():
        assert answer.status == int(line), shown
    elif line.startswith("-"):
        assert line[1:].lower() not in answer.headers, shown
    elif name == "code":
        assert answer.json()["code"] == value, shown
    else:
        got = answer.headers.get(name.lower())
        assert got is not None, f"no {name}: {shown}"
        pattern = NAME.sub(r"(?P<\1>[^/?&]+)", re.escape(value).replace(r"\*", ".*").replace("\\<", "<"))
        found = re.fullmatch(pattern.replace("\\>", ">"), got)
        assert found, f"{name} is not {value}: {shown}"
        known.update(found.groupdict())


def chunked(*pieces: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    """A body in chunked encoding (RFC 9112, section 7.1)."""
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + end
