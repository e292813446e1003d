"""The reasons for which storage refuses: one exception class for each word.

    redis.error_reply('NOPOST no such post')     a script refuses
              └─► errors.NoPost                  the first word finds the class in this file
                    └─► 404                      the class finds its status in api/problems.py
                    └─► "code": "nopost"         the word in lower case is the `code` that clients program against
"""


class Refusal(Exception):
    """Storage refused, and nothing has changed. `str()` is a sentence for people."""

    word: str
    again: int | None = None  # seconds after which the same request may succeed, where storage knows them


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


class Concat(Refusal):
    """A part was used as a whole upload, or a whole upload as a part (tus, "Concatenation")."""

    word = "CONCAT"


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
    """Redis cannot be reached, or it refuses to run commands. Nothing has changed.

    The API uses the same `code` where the object store is unavailable.
    """

    word = "UNREACHABLE"
    moved = False  # a read of several partitions was stopped, because they are not all on one node of a Cluster


class Unknown(Refusal):
    """Redis' reply to a write was lost, so the write may have happened. Repeat it with the same Idempotency-Key."""

    word = "UNKNOWN"


REFUSALS = {refusal.word: refusal for refusal in Refusal.__subclasses__()}


def from_reply(message: str) -> Refusal | None:
    """The refusal that a script's error reply stands for. None where the reply is another error, which is a bug.

    A number after the word is `again`.

    >>> refusal = from_reply("QUOTA 60 you have too many open uploads")
    >>> refusal, refusal.again
    (Quota('you have too many open uploads'), 60)
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
