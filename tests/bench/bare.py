"""Bare Sanic with the API's server settings: `python -m tests.bench.bare PORT ANSWERS FOLDER`.

ANSWERS is a file with JSON: for each name an answer (see `fixed_answer` in parts.py), which `/NAME` gives. An answer
with status 201 is for POST; the server parses the JSON body first. `PUT /file` writes its body to a file in FOLDER.
"""

import json
import os
import socket
import sys
from pathlib import Path

import orjson
from sanic import Sanic
from sanic.response import HTTPResponse, empty, text

from api.app import create
from storage import settings

port, answers, folder = int(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3])
unused = "a signing secret that nothing is signed with"
config = create(settings.load({"IMAGEGRAM_DATA": str(folder), "IMAGEGRAM_JWT_SECRET": unused})).config
app = Sanic("bare", config=config, configure_logging=False, dumps=orjson.dumps, loads=orjson.loads)


def handler(status: int, content_type: str | None, headers: dict[str, str], body: str):
    """A handler that gives a fixed answer."""
    data = body.encode("latin-1")

    async def answer(request):
        return HTTPResponse(data, status, headers, content_type) if content_type else empty(status, headers)

    async def parse_and_answer(request):
        if not isinstance(orjson.loads(request.body)["text"], str):
            raise ValueError
        return HTTPResponse(data, status, headers, content_type)

    return parse_and_answer if status == 201 else answer


for name, answer in answers.items():
    app.add_route(handler(**answer), f"/{name}", methods=["POST" if answer["status"] == 201 else "GET"], name=name)


@app.get("/healthz")
async def healthz(request):
    return text("ok")


@app.put("/file", stream=True)
async def file(request):
    with open(folder / "bare.upload", "wb") as upload:
        async for data in request.stream:
            upload.write(data)
        upload.flush()
        os.fsync(upload.fileno())
    return empty()


if __name__ == "__main__":
    listening = socket.create_server(("127.0.0.1", port), backlog=1024)
    app.prepare(sock=listening, single_process=True, access_log=False, motd=False)
    Sanic.serve_single(primary=app)
