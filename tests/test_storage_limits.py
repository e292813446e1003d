"""Rate limits: the formula, beside a plain model; one batch and many processes; nothing of it is durable."""

import asyncio
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, RedisServer, connect, run_with_db
from making import make_post
from redis.exceptions import ResponseError
from state import contents, unchanged

from storage import check, comments, keys
from storage.db.client import Redis
from storage.errors import NoPost, Unreachable
from storage.limits import Limiter
from storage.settings import IMAGE_BYTES, Limit

NOW = 1_763_971_200_000
ONCE = keys.IdempotencyKey("a-key", "digest")


class Model:
    """The GCRA in its other form: the theoretical arrival time, in exact numbers (ITU-T I.371, annex A)."""

    def __init__(self, quota: int, window_ms: int):
        self.quota, self.window_ms, self.tat = quota, window_ms, 0  # tat: in ms × quota

    def take(self, now: int, cost: int = 1) -> bool:
        tat = max(self.tat, now * self.quota) + cost * self.window_ms
        if tat > (now + self.window_ms) * self.quota:
            return False
        self.tat = tat
        return True

    def left(self, now: int) -> int:
        return ((now + self.window_ms) * self.quota - max(self.tat, now * self.quota)) // self.window_ms


async def test_requests_at_random_times_are_allowed_as_the_formula_says(db):
    chance = random.Random(7)
    for quota, window in ((1, 60), (7, 60), (60, 60), (1000, 3600)):
        limiter, model = Limiter(db, {"comment": Limit(quota, window)}, 4), Model(quota, window * 1000)
        now = NOW
        for _ in range(60):
            now += round(chance.expovariate(quota / window / 2000)) if chance.random() < 0.7 else 0
            db.clock, count = now, chance.choice((1, 1, 2, 5))
            charge = limiter.charge("comment", f"user{quota}")
            charge.blocked_until = 0.0  # it is a time of the event loop, not of the clock of this test
            expected = [model.take(now) for _ in range(count)]
            answers = await asyncio.gather(*(limiter.decide(charge) for _ in range(count)))
            assert [allowed for allowed, _ in answers] == expected
            assert {verdict.left for _, verdict in answers} == {model.left(now)}
            # After `again_ms` the next one is allowed, and not a ms earlier.
            again = answers[0][1].again_ms
            assert again and model.left(now + again) > model.left(now) == model.left(now + again - 1)


async def test_a_batch_decides_as_the_same_requests_one_after_the_other(server, db):
    chance, db.clock = random.Random(11), NOW
    limits = {"upload_bytes": Limit(200 * 2**20, 86400), "post": Limit(5, 3600)}
    together, alone = Limiter(db, limits, 1), {}
    sent = [("post", f"user{chance.randrange(3)}", 1) for _ in range(30)]
    sent += [("upload_bytes", f"user{chance.randrange(3)}", chance.randrange(1, IMAGE_BYTES)) for _ in range(30)]
    chance.shuffle(sent)
    charges = [together.charge(*one) for one in sent]
    answers = await asyncio.gather(*(together.decide(charge) for charge in charges))
    for (name, user, cost), (allowed, _) in zip(sent, answers, strict=True):
        model = alone.setdefault((name, user), Model(limits[name].quota, limits[name].window * 1000))
        assert allowed == model.take(NOW, cost), (name, user)
    assert {allowed for allowed, _ in answers} == {True, False}


async def test_what_is_given_back_can_be_taken_again(server, db):
    db.clock, limiter = NOW, Limiter(db, {"upload_bytes": Limit(1000, 86400)}, 1)
    assert (await limiter.decide(limiter.charge("upload_bytes", "alice", 900)))[0]
    assert not (await limiter.decide(limiter.charge("upload_bytes", "alice", 900)))[0]
    limiter.give_back(limiter.charge("upload_bytes", "alice", 900), 600)
    allowed, verdict = await limiter.decide(limiter.charge("upload_bytes", "alice", 700))
    assert (allowed, verdict.left) == (True, 0)
    limiter.give_back(limiter.charge("upload_bytes", "alice", 1), 5000)
    allowed, verdict = await limiter.decide(limiter.charge("upload_bytes", "alice", 1))
    assert (allowed, verdict.left) == (True, 999), "more than the quota is never left"


async def test_a_clock_that_went_back_or_far_ahead_blocks_nobody_for_long(server, db):
    limiter = Limiter(db, {"post": Limit(2, 60)}, 1)
    charge = limiter.charge("post", "alice")

    async def taken(now: int) -> bool:
        db.clock, charge.blocked_until = now, 0.0
        return (await limiter.decide(charge))[0]

    assert [await taken(NOW + 10**12) for _ in range(3)] == [True, True, False]
    assert not await taken(NOW)
    server.client.set(charge.key, f"1.5 {NOW + 10**12}")
    assert [await taken(NOW), await taken(NOW + 15_000), await taken(NOW + 30_000)] == [False, False, False]
    server.client.set(charge.key, f"1 {NOW + 10**12}")
    assert [await taken(NOW), await taken(NOW + 30_000)] == [True, True], "it drains from the new time on"


async def test_a_refusal_changes_nothing_and_a_blocked_charge_is_refused_without_redis(server, db):
    limiter = Limiter(db, {"post": Limit(2, 3600)}, 1)
    charge = limiter.charge("post", "alice")
    assert [(await limiter.decide(charge))[0] for _ in range(2)] == [True, True]
    with unchanged(server.client):
        assert not (await limiter.decide(charge))[0]
    server.client.delete(charge.key)
    allowed, verdict = await limiter.decide(charge)
    assert not allowed and 1_795_000 < verdict.again_ms <= 1_800_000
    until = charge.blocked_until
    assert not any([(await limiter.decide(charge))[0] for _ in range(100)])
    assert charge.blocked_until == until, "to ask again does not prolong it"
    assert (await limiter.decide(limiter.charge("post", "bob")))[0]


async def test_keys_are_small_known_to_check_and_expire_a_minute_after_nothing_is_in_use(server, db, store):
    limiter = Limiter(db, {"read": Limit(10, 10)}, 4)
    for who in ("alice", "a:b", "read:x", "192.0.2.7", "2001:db8::"):
        charge = limiter.charge("read", who, 1, ":" in who or "." in who)
        await limiter.decide(charge)
        assert 60_000 < server.client.pttl(charge.key) <= 61_000
        assert keys.well_formed(charge.key)
    assert len(server.client.get(charge.key)) <= 44  # Redis stores a string of up to 44 bytes in one piece
    assert (await check.check(db, store)).flaws == 0


async def test_a_user_is_in_the_same_partition_as_the_users_uploads(server, db):
    limiter = Limiter(db, {"post": Limit(10, 10)}, 16)
    users = [f"user{number}" for number in range(40)]
    await asyncio.gather(*(limiter.decide(limiter.charge("post", user)) for user in users))
    assert set(contents(server.client)) == {keys.rate(keys.partition_of_user(user, 16), "post", user) for user in users}


async def test_nothing_is_written_to_the_append_only_file(real_server):
    db, client, servers = connect(real_server), real_server.client, real_server.primaries
    client.flushall()
    limiter = Limiter(db, {"read": Limit(10, 3600), "comment": Limit(10, 3600)}, 1)

    def appended() -> int:
        return sum(server.info("persistence")["aof_current_size"] for server in servers)

    before = appended()
    for number in range(50):
        await limiter.decide(limiter.charge("read", f"user{number}"))
    assert client.dbsize() == 50
    assert appended() - before < 50 * len(servers), "only the time of day, once a second"
    limit = limiter.alone(limiter.charge("comment", "bob"))
    await comments.add(db, "bob", await make_post(db, "alice"), "durable", None, limit)
    assert client.exists(limit.charge.key)
    await db.close()
    folders = [Path(node.socket).parent for node in real_server.nodes]
    written = b"".join(path.read_bytes() for folder in folders for path in folder.rglob("*.aof"))
    assert b"durable" in written and b"rate:" not in written


async def test_a_comment_takes_from_its_limit_in_its_own_call(server, db):
    db.clock, limiter = NOW, Limiter(db, {"comment": Limit(3, 3600)}, 1)
    charge, post = limiter.charge("comment", "bob"), await make_post(db, "alice")
    assert (await limiter.decide(charge))[0]
    first = limiter.alone(charge)
    assert (await comments.add(db, "bob", post, "first", ONCE, first))[0].id
    assert (first.allowed, first.left) == (1, 1)
    repeated = limiter.alone(charge)
    assert (await comments.add(db, "bob", post, "first", ONCE, repeated))[1]
    refused = limiter.alone(charge)
    with pytest.raises(NoPost):
        await comments.add(db, "bob", keys.new_post_id(0), "second", None, refused)
    assert refused.allowed is repeated.allowed is None, "both took nothing"
    last = limiter.alone(charge)
    assert (await comments.add(db, "bob", post, "second", None, last))[0].id
    assert (last.allowed, last.left) == (1, 0) and 1_199_990 < last.again_ms <= 1_200_000
    over = limiter.alone(charge)
    with unchanged(server.client):
        assert not (await comments.add(db, "bob", post, "third", None, over))[0].id
    assert (over.allowed, over.again_ms) == (0, last.again_ms)
    assert limiter.alone(charge).allowed == 0, "now it is known without Redis"


async def test_a_foreign_key_of_another_type_is_an_error_for_writes(server, db):
    limiter = Limiter(db, {"post": Limit(2, 60)}, 1)
    charge = limiter.charge("post", "alice")
    server.client.lpush(charge.key, "x")
    with unchanged(server.client), pytest.raises(ResponseError):
        await limiter.decide(charge)


def test_a_call_with_wrong_arguments_changes_nothing(server):
    right = ["", 5, 1000, 1, 1]

    async def work(db):
        for wrong in (right[:-1], [*right, ""], *([*right[:n], "x", *right[n + 1 :]] for n in range(1, 5)), []):
            with unchanged(server.client), pytest.raises(ResponseError):
                await db.call("take", [keys.rate(0, "post", "alice")], *wrong)
        with unchanged(server.client), pytest.raises(ResponseError):
            await db.call("take", [], "")
        assert await db.call("take", [keys.rate(0, "post", "alice")], *right) == [1, 4, 200]

    run_with_db(server, work)


async def test_without_redis_a_decision_is_unreachable_within_a_second_and_works_again_afterwards():
    server = RedisServer("valkey")
    db = Redis(server.url)
    limiter = Limiter(db, {"post": Limit(9, 60)}, 1)
    charge = limiter.charge("post", "alice")
    assert (await limiter.decide(charge))[0]
    server.kill()
    async with asyncio.timeout(1.5):
        answers = await asyncio.gather(*(limiter.decide(charge) for _ in range(5)), return_exceptions=True)
    assert [type(answer) for answer in answers] == [Unreachable] * 5
    server.start()
    assert (await limiter.decide(charge))[0]
    await db.close()
    server.close()


# All are connected before the first request. On two cores, 50 processes that look for the nodes of a Cluster together
# take longer than a call may.
CROWD = """
import asyncio, contextlib, multiprocessing, sys
from storage.db.cluster import connect
from storage.errors import Unreachable
from storage.limits import Limiter
from storage.settings import Limit

fork = multiprocessing.get_context("fork")
all_connected = fork.Barrier(50)

async def connected(db):
    with contextlib.suppress(Unreachable):
        await db.groups(1)
        return not await db.ping()

async def client(count):
    db = connect(sys.argv[1])
    while not await connected(db):
        pass
    all_connected.wait()
    limiter, allowed = Limiter(db, {"read": Limit(2000, 3600)}, 1), 0
    while count:
        together = min(count, 7)  # requests of one turn of the event loop
        charge = limiter.charge("read", "everybody")
        answers = await asyncio.gather(*(limiter.decide(charge) for _ in range(together)))
        allowed += sum(answer for answer, _ in answers)
        count -= together
    await db.close()
    return allowed

def process(count):
    return asyncio.run(client(count))

with fork.Pool(50) as crowd:
    print(sum(crowd.map(process, [200] * 50, chunksize=1)))
"""


def test_of_10000_requests_of_50_processes_as_many_are_allowed_as_the_formula_says(embedded):
    embedded.client.flushall()
    began = time.time()  # Redis is on this machine, so its clock is the same
    crowd = subprocess.run([sys.executable, "-c", CROWD, embedded.url], cwd=ROOT, capture_output=True, check=True)
    allowed = int(crowd.stdout)
    assert 2000 <= allowed <= 2000 + (time.time() - began) * 2000 / 3600 + 1
