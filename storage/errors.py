"""Why storage said no, one class a word.

A script answers `redis.error_reply('NOPOST no such post')`; its first word finds the class here, the class finds
one HTTP status in the API's table, and the word in small letters is the `code` a client programs against.
"""


class Refusal(Exception):
    """Storage refused and nothing changed. `str()` is a sentence for people."""

    word: str
    again: int | None = None  # seconds until the same may be asked again, where storage knows them


class NoPost(Refusal):
    word = "NOPOST"


class NotReady(Refusal):
    word = "NOTREADY"


class Failed(Refusal):
    word = "FAILED"


class NoComment(Refusal):
    word = "NOCOMMENT"


class Forbidden(Refusal):
    word = "FORBIDDEN"


class NoUpload(Refusal):
    word = "NOUPLOAD"


class NoImage(Refusal):
    word = "NOIMAGE"


class Expired(Refusal):
    word = "EXPIRED"


class Offset(Refusal):
    word = "OFFSET"


class Incomplete(Refusal):
    word = "INCOMPLETE"


class Empty(Refusal):
    word = "EMPTY"


class Precondition(Refusal):
    word = "PRECONDITION"


class TooLarge(Refusal):
    word = "TOOLARGE"


class Chunks(Refusal):
    word = "CHUNKS"


class Format(Refusal):
    word = "FORMAT"


class Quota(Refusal):
    word = "QUOTA"


class Busy(Refusal):
    word = "BUSY"
    again = 5  # an image takes seconds at most


class Reused(Refusal):
    word = "REUSED"


class Outdated(Refusal):
    word = "OUTDATED"


class Stale(Refusal):
    word = "STALE"


class Unreachable(Refusal):
    """Redis or the object store cannot be reached, or refuses to write: what was asked has not happened."""

    word = "UNREACHABLE"


class Unknown(Refusal):
    """Redis' answer to a write was lost: it may have happened. Ask again with the same Idempotency-Key."""

    word = "UNKNOWN"


REFUSALS = {refusal.word: refusal for refusal in Refusal.__subclasses__()}


def from_reply(message: str) -> Refusal | None:
    """The refusal that an error reply of a script names, or None where it is no refusal but a fault.

    `QUOTA 60 you have too many open uploads`: a number behind the word is `again`.
    """
    word, _, sentence = message.partition(" ")
    if word not in REFUSALS:
        return None
    first, _, rest = sentence.partition(" ")
    if not first.isdecimal():
        return REFUSALS[word](sentence)
    refusal = REFUSALS[word](rest)
    refusal.again = int(first)
    return refusal
