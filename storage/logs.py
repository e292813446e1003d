"""The configuration of logging, for every command of this project that runs for long. All lines go to stderr.

| IMAGEGRAM_LOG | a line |
|---|---|
| `text` | `WARNING imagegram.ship: …`. It has no time, because Docker, Kubernetes and journald add one |
| `json` | a JSON object. The API also logs each request, and the worker each job |

No line can pass for another one, or command a terminal: control characters are escaped, and each further line of a text
begins with two spaces. Values of secrets are replaced, because the errors of libraries may quote them: S3 repeats the
access key in an answer of 403.
"""

import json
import logging
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime

import orjson

# Characters of a message and of a traceback; the rest of a message and the beginning of a traceback are left out. A
# line of this length is one write to a pipe, between which no other process can write as long as the pipe has space.
MESSAGE = 2000
TRACEBACK = 8000
HIDDEN = "[secret]"
# C0 and C1 controls but the line feed, Unicode's line ends, its marks that reverse the order of characters, surrogates
UNSAFE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def configure(form: str, secrets: list[str]) -> None:
    """Log INFO and above to stderr, in the form `json` or `text`, without the values of `secrets`.

    Of Sanic only warnings are logged: it also logs each start and stop of a server, which is of no use here.
    """
    handler = logging.StreamHandler()
    handler.setFormatter((Json if form == "json" else Text)(secrets))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.captureWarnings(True)
    for name in ("sanic.server", "sanic.root"):
        logging.getLogger(name).setLevel(logging.WARNING)


def write(fields: Mapping[str, object]) -> None:
    """Write one JSON line with the time and these fields, in one call of the operating system.

    It takes a third of the time of `logging`. The strings must be short, and must come from this project or be checked.
    """
    line = {"time": datetime.now(UTC), **fields}
    with suppress(OSError):  # nobody reads stderr any more
        os.write(2, orjson.dumps(line, option=orjson.OPT_UTC_Z | orjson.OPT_APPEND_NEWLINE))


class Text(logging.Formatter):
    """`WARNING imagegram.ship: message`, and a traceback below it."""

    def __init__(self, secrets: list[str]):
        super().__init__()
        self._secrets = re.compile("|".join(map(re.escape, secrets)) or r"(?!)")

    def message(self, record: logging.LogRecord) -> str:
        return self._secrets.sub(HIDDEN, record.getMessage())[:MESSAGE]

    def traceback(self, record: logging.LogRecord) -> str:
        lines = [self.formatException(record.exc_info)] if record.exc_info and record.exc_info[0] else []
        lines += [record.stack_info] if record.stack_info else []
        return self._secrets.sub(HIDDEN, "\n".join(lines))[-TRACEBACK:]

    def format(self, record: logging.LogRecord) -> str:
        text = f"{record.levelname} {record.name}: {self.message(record)}\n{self.traceback(record)}"
        return UNSAFE.sub(lambda found: repr(found[0])[1:-1], text.rstrip("\n")).replace("\n", "\n  ")


class Json(Text):
    """`{"time": "…", "level": "WARNING", "logger": "imagegram.ship", "message": "…", "exception": "…"}`"""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat().replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": self.message(record),
        }
        if traceback := self.traceback(record):
            line["exception"] = traceback
        return json.dumps(line)  # ASCII only. orjson refuses strings that are not UTF-8, which a file name may be
