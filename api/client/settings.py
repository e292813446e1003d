"""The client's environment variables, and the file in which `imagegram login` stores address and token.

| variable | |
|---|---|
| IMAGEGRAM_URL, IMAGEGRAM_TOKEN | address and token, for scripts; they come before those of `imagegram login` |
| XDG_CONFIG_HOME, XDG_STATE_HOME | where the login and the records of unfinished writes are stored |
"""

import base64
import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit


class Login(NamedTuple):
    """The address of a site without a slash at its end, and a token, which may be empty: reading needs none."""

    url: str
    token: str

    @property
    def user(self) -> str:
        """The claim `sub` of the token. Empty if there is none."""
        with suppress(ValueError, IndexError, KeyError, TypeError):
            payload = self.token.split(".")[1]
            return str(json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))["sub"])
        return ""

    @property
    def owner(self) -> str:
        """Tells the records of two users apart. A token without `sub` stands for itself."""
        return self.user or self.token


class Unusable(Exception):
    """An argument, a variable or a file of this machine cannot be used."""


def variable(name: str) -> str:
    return os.environ.get(f"IMAGEGRAM_{name}", "")


def folder(variable_name: str, default: str) -> Path:
    """The client's folder below one of the XDG base directories. A relative path counts as unset, as XDG demands."""
    base = os.environ.get(variable_name, "")
    return (Path(base) if os.path.isabs(base) else Path.home() / default) / "imagegram"


def login_file() -> Path:
    return folder("XDG_CONFIG_HOME", ".config") / "login.json"


def records() -> Path:
    return folder("XDG_STATE_HOME", ".local/state")


def read_login() -> Login:
    """Address and token. Raises Unusable without an address.

    A token is sent only to its own site: the stored one to the stored address, IMAGEGRAM_TOKEN to IMAGEGRAM_URL, or to
    the stored address if IMAGEGRAM_URL is not set.
    """
    stored = Login("", "")
    try:
        stored = Login(**json.loads(login_file().read_text()))
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError, TypeError) as error:
        raise Unusable(f"{login_file()} cannot be read: {reason(error)}. Log in again: imagegram login") from None
    url = normalise(variable("URL")) if variable("URL") else stored.url
    if not url:
        raise Unusable("no site is known. Log in first: imagegram login, or set IMAGEGRAM_URL and IMAGEGRAM_TOKEN")
    return Login(url, check_token(variable("TOKEN")) or (stored.token if url == stored.url else ""))


def check_token(token: str) -> str:
    """The token, if it can stand in a header. Raises Unusable, without the token in the message."""
    if not re.fullmatch(r"[\x21-\x7e]*", token):
        raise Unusable("a token has only visible ASCII characters")
    return token


def write_login(login: Login) -> None:
    write_private(login_file(), login._asdict())


def write_private(path: Path, content: dict) -> None:
    """Replaces a file by JSON that only this user may read. After a crash it has the old or the new content.

    Raises Unusable if it cannot be written.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        draft.unlink(missing_ok=True)  # of a process that had the same number
        try:
            with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                json.dump(content, file)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # otherwise the name may be missing after a loss of power
        finally:
            os.close(folder)
    except OSError as error:
        raise Unusable(f"{path} cannot be written: {reason(error)}") from None


def reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def normalise(url: str) -> str:
    """The address of a site without a slash at its end. Raises Unusable if it is none.

    >>> normalise("https://example.org/")
    'https://example.org'
    """
    try:
        parts = urlsplit(url.strip())
        port = parts.port
    except ValueError:
        port, parts = None, urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/") or "@" in parts.netloc:
        raise Unusable(f"{url!r} is no address of a site: expected for example https://example.org")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}" + (f":{port}" if port else "")
