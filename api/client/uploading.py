"""A file becomes a post, over a line that breaks and over restarts of the client and of the server.

    record of this file ─► POST /v1/uploads ─► HEAD and PATCH, until all bytes are there ─► POST /v1/posts ─► ready

| answer about the upload | what the client does |
|---|---|
| no answer, or a temporary error | HEAD, then PATCH from the offset that the site has |
| 409 `offset`, 409 `incomplete` | the same |
| 404, 410: expired, deleted or already a post | POST /v1/posts: it answers the post, or else the client begins again |
| 429 `chunks` | deletes the upload and begins again |
| 413, 415, 422 `empty`: the file is no image that the site takes | deletes the upload and stops |
| any other error | stops; the same command continues |

tuspy 1.1.0 keeps the offset and builds the requests. Its own sending is replaced: it has no time limits, waits a fixed
time between attempts, shows no progress within a request, and knows no Idempotency-Key. All missing bytes go into one
PATCH, because each PATCH costs a round trip.
"""

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Protocol
from urllib.parse import urljoin

from tusclient.client import TusClient
from tusclient.request import TusRequest
from tusclient.uploader import Uploader

from api.client.calls import Patience, Refused, Site, Trouble, Unreachable, rest
from api.client.records import POST, Record, record
from api.client.settings import Unusable, reason

TUS = {"Tus-Resumable": "1.0.0"}
PIECE = 64 * 1024  # bytes between two movements of the progress bar
BEGINNINGS = 3  # uploads that are begun for one command. An upload that is gone again and again has another reason
USELESS = {"format", "empty", "toolarge"}  # codes of refusals of the file itself
GONE = {404, 410}


class Progress(Protocol):
    """What shows how far an upload is."""

    def start(self, name: str, offset: int, size: int) -> None: ...

    def move(self, offset: int) -> None: ...


class Piece(TusRequest):
    """A PATCH of all bytes from the offset on."""

    def __init__(self, uploader: "Sender"):
        super().__init__(uploader)
        self.uploader = uploader

    def perform(self) -> None:
        """Raises Refused or Trouble."""
        headers = {**self._request_headers, "Content-Length": str(self._content_length)}
        answer = self.uploader.site.once("PATCH", self._url, content=self.read(), headers=headers)
        self.response_headers = {name.lower(): value for name, value in answer.headers.items()}

    def read(self) -> Iterator[bytes]:
        """The bytes. The progress moves when they were handed to the system, which may buffer some of them."""
        offset = self.uploader.offset
        while piece := self.file.read(PIECE):
            yield piece
            offset += len(piece)
            self.uploader.progress.move(offset)


class Sender(Uploader):
    """tuspy's uploader, with the calls of `site`."""

    def __init__(self, site: Site, file: BinaryIO, progress: Progress):
        super().__init__(file_stream=file, client=TusClient(f"{site.url}/v1/uploads"))
        self.site, self.progress = site, progress

    def get_offset(self) -> int:
        """How many bytes the site has. Raises Refused or Unreachable."""
        return int(self.site.call("HEAD", self.url, headers=TUS).headers["Upload-Offset"])

    def _do_request(self) -> None:
        self.request = Piece(self)
        self.request.perform()


def upload(site: Site, user: str, path: Path, caption: str, again: bool, progress: Progress) -> dict:
    """Makes a post of a file, at most one however often this is called. Returns the post, which may be processing.

    The same file with the same caption gives the same post for a day, unless `again` is true. Raises Refused,
    Unreachable or Unusable.
    """
    with _open(path) as file:
        before = _version(file)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        with record("upload", site.url, user, digest) as known:
            made = f"{POST}{_digest(caption)}"
            if again and known.fields.pop(made, None):
                known.save()
            if made in known.fields:
                post = _read_post(site, known.fields[made])
                if post:
                    site.note(f"this file is the post {post['id']} already; --again publishes it once more")
                    return post
            for beginning in range(BEGINNINGS):
                try:
                    post = _publish(site, file, before, caption, known, progress)
                except Refused as refusal:
                    _discard(site, refusal, known)
                    if refusal.status not in GONE and refusal.code != "chunks" or beginning == BEGINNINGS - 1:
                        raise
                    site.note(f"{refusal}: the upload begins again")
                    known.begin()
                else:
                    known.fields[made] = post["id"]
                    known.begin()
                    return post
    raise AssertionError("the last beginning returns or raises")


def _open(path: Path) -> BinaryIO:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe can be read only once, and a device never ends
            raise Unusable(f"{path} is not a regular file")
        return open(path, "rb")
    except OSError as error:
        raise Unusable(f"{path} cannot be read: {reason(error)}") from None


def _publish(site: Site, file: BinaryIO, before: tuple, caption: str, known: Record, progress: Progress) -> dict:
    """One upload and its post. Raises Refused with a status in GONE if the upload does not exist any more."""
    sender = Sender(site, file, progress)
    if "upload" not in known.fields:
        headers = {**TUS, "Upload-Length": str(sender.get_file_size())}
        created = site.call("POST", "/v1/uploads", known.fields["key"], headers=headers)
        known.save(upload=created.headers["Location"])
    sender.url = urljoin(site.url, known.fields["upload"])
    key = f"{known.fields['key']}-{_digest(caption)}"
    body = {"upload": known.fields["upload"].rpartition("/")[2], "caption": caption}
    patience = Patience(site.patience, site.note)
    while True:
        try:
            _send(sender, before, patience)
        except Refused as refusal:
            if refusal.status not in GONE:
                raise
        try:
            post = site.call("POST", "/v1/posts", key, json=body).json()
        except Refused as refusal:
            if refusal.code != "incomplete":
                raise
            patience.wait(Trouble(str(refusal)))
        else:
            if post["caption"] != caption:
                site.note("an earlier attempt has published this file, with the caption that it had then")
            return post


def _send(sender: Sender, before: tuple, patience: Patience) -> None:
    """Sends the bytes that the site lacks. Raises Refused, Unreachable, or Unusable if the file has changed."""
    started = False
    while True:
        sender.offset, last = sender.get_offset(), sender.offset
        if sender.offset > last:
            patience.renew()
        if not started:
            sender.progress.start(Path(sender.file_stream.name).name, sender.offset, sender.stop_at)
            started = True
        sender.progress.move(sender.offset)
        if _version(sender.file_stream) != before:
            raise Unusable("the file has changed while it was sent. The same command sends it as it is then")
        if sender.offset >= sender.stop_at:
            return
        try:
            sender.upload_chunk()
        except Trouble as trouble:
            patience.wait(trouble)
        except Refused as refusal:
            if refusal.code != "offset":
                raise
            patience.wait(Trouble(str(refusal)))


def wait_until_ready(site: Site, post: dict) -> dict:
    """The post when it is no longer processing. Raises Unreachable if that takes longer than the user is patient."""
    patience = Patience(site.patience, site.note)
    while post["status"] == "processing":
        answer = site.wait(f"/v1/posts/{post['id']}")
        post = answer.json()
        if post["status"] == "processing":
            if patience.is_over():
                raise Unreachable(f"the picture of {post['id']} is not made yet. See: imagegram show {post['id']}")
            rest(answer)
    return post


def _digest(caption: str) -> str:
    return hashlib.sha256(caption.encode()).hexdigest()[:16]


def _read_post(site: Site, post: str) -> dict | None:
    try:
        return site.call("GET", f"/v1/posts/{post}").json()
    except Refused as refusal:
        if refusal.status in GONE:
            return None
        raise


def _discard(site: Site, refusal: Refused, known: Record) -> None:
    """Deletes an upload that can never become a post, so that it does not count against the user's quota."""
    if refusal.code in USELESS or refusal.code == "chunks":
        if "upload" in known.fields:
            with suppress(Refused):
                site.call("DELETE", known.fields["upload"], headers=TUS)
        known.forget()


def _version(file: BinaryIO) -> tuple[int, int]:
    """Size and time of the last change: another version of a file has others."""
    state = os.fstat(file.fileno())
    return state.st_size, state.st_mtime_ns
