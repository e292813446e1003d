"""Faults that the model test must find: each is put into the text of a script or of a function, in memory."""

import inspect
import textwrap
from contextlib import contextmanager
from typing import NamedTuple

from storage import comments, keys, sealing
from storage.db.client import SCRIPTS, script


class Mutant(NamedTuple):
    where: object  # a function, or the name of a script
    right: str  # text that is there exactly once
    wrong: str


MUTANTS = {
    "the score comes from the stream alone": Mutant(
        "add_comment", "redis.call('ZADD', feed, count, id)", "redis.call('ZADD', feed, hot, id)"
    ),
    "latest is not refilled from the store": Mutant(
        "delete_comment", "return missing <= 0 and rows or nil", "return rows"
    ),
    "a seal does not count the comments": Mutant(
        "seal_comments",
        "if #head ~= count or head[1][1] ~= first or head[count][1] ~= last then",
        "if not head[1] or head[1][1] ~= first or head[#head][1] ~= last then",
    ),
    "the names of segments are not random": Mutant(keys.segment_name, "{secrets.token_hex(8)}", "{'0' * 16}"),
    "the last comment is the seam, not the last id of the stream": Mutant(
        "seal_comments", "      last = stream[i + 1]\n", ""
    ),
    "a seal does not compare timelines": Mutant(
        "seal_comments", " or timeline ~= (redis.call('GET', epoch) or '0') .. replication(cluster)", ""
    ),
    "an erased comment is deleted again": Mutant(
        "delete_comment", "if not own or redis.call('SISMEMBER', erased, comment) == 1 then", "if not own then"
    ),
    "a compaction does not lower the counts": Mutant("compact_segment", "last, through - count,", "last, through,"),
    "a replaced segment does not wait for the backups": Mutant(
        sealing.remove_retired, "if not recheck_ms:", "if True:"
    ),
    "a page ends where its first segment ends": Mutant(
        comments._sealed, "(entries[:1], entries[1:])", "(entries[:1],)"
    ),
    "the seam of an empty stream is forgotten": Mutant(
        "add_comment", "if ms and tonumber(ms) >= now then", "if false then"
    ),
    "a comment of a segment is looked for one segment too late": Mutant(
        "delete_comment", "tonumber(last_sequence) < sequence)", "tonumber(last_sequence) <= sequence)"
    ),
}


@contextmanager
def applied(mutant: Mutant):
    """Makes the fault for the duration of a block. Connect within it."""
    if isinstance(mutant.where, str):
        known = SCRIPTS[mutant.where]
        assert known.text.count(mutant.right) == 1, mutant
        SCRIPTS[mutant.where] = script(known.text.replace(mutant.right, mutant.wrong))
        try:
            yield
        finally:
            SCRIPTS[mutant.where] = known
        return
    function = mutant.where
    text = textwrap.dedent(inspect.getsource(function))
    assert text.count(mutant.right) == 1, mutant
    right, made = function.__code__, {}
    exec(compile(text.replace(mutant.right, mutant.wrong), "mutant", "exec"), function.__globals__, made)
    function.__code__ = made[function.__name__].__code__
    try:
        yield
    finally:
        function.__code__ = right
