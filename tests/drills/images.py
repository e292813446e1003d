"""Long forms of the workers' drills, with figures: `python -m tests.drills.images [NAME…]`, `make drill-images`.

backlog   no worker runs while posts arrive; then two begin. Decoding is replaced by half a second of waiting.
turns     one user has queued many posts when another's comes; decoding is replaced by a second of waiting.
kills     kill -9 of workers, RQ workers, their forks, fork servers and decoders; RQ's keys are deleted once.
away      Redis is killed, or stopped, for a minute, in the midst of work.
mutated   damaged images through the API.

tests/test_workers_drills.py has the short forms. Each makes a Redis, an API and workers of its own.
"""

import asyncio
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil
from conftest import RedisServer, Site, connect, gather_limited, photograph, until
from golden import goldens
from hostile import mutated as mutate
from making import jpeg

from storage import keys, posts, uploads, watchdog
from storage.objects import open_store
from workers import sandbox


class Works(Site):
    """A site with a Redis of its own, whose posts are made by storage's calls."""

    def __init__(self, folder: Path, **settings):
        self.server = RedisServer("valkey")
        super().__init__(self.server.url, folder, **settings)

    async def _publish(self, images: list[bytes]) -> list[str]:
        db, store = connect(self.server), open_store((self.folder / "store").as_uri())

        async def one(number: int, data: bytes) -> str:
            author, most = f"user{number % 40}", 10_000  # each may have 20 uploads open
            async with uploads.form_upload(db, store, author, 1, processing=most) as image:
                await image.write(data)
                await image.finish()
            return (await posts.create(db, author, image.upload, "", processing=most))[0]

        made = await gather_limited(8, [one(number, data) for number, data in enumerate(images)])
        await db.close()
        return made

    def publish(self, images: list[bytes]) -> list[str]:
        return asyncio.run(self._publish(images))

    def statuses(self, made: list[str]) -> Counter:
        pipeline = self.server.client.pipeline(transaction=False)
        for post in made:
            pipeline.hget(keys.post(post), "status")
        return Counter(pipeline.execute())

    def shown(self) -> int:
        """Posts with a picture of their own. A put that was killed leaves a temporary file, which is no object."""
        names = {path.name.removesuffix(".jpg") for path in (self.folder / "store" / "images").glob("[!.]*")}
        feed = set(self.server.client.zrange(keys.feed(0), 0, -1))
        assert names == feed
        return len(feed)

    def stand_in(self, seconds: float) -> Path:
        """What `tests.drills.standin` takes for a conversion; the file in which it counts them."""
        counted = self.folder / "counted"
        counted.touch()
        self.environment.update(STANDIN_COUNTED=str(counted), STANDIN_SECONDS=str(seconds), PYTHONPATH="tests")
        return counted

    def idle(self) -> bool:
        """Nothing is being made, and no hint waits."""
        workers = [psutil.Process(process.pid) for process in self.processes if process.poll() is None]
        return not self.server.client.llen("rq:queue:images") and not any(family(worker)[2] for worker in workers)

    def let_leases_pass(self) -> None:
        """What is leased is due now, as it would be by itself after some minutes. Only where nobody works under it."""
        client = self.server.client
        for name in [*client.keys(keys.making(0, "*")), keys.turns(0), keys.due(0)]:
            members = client.zrange(name, 0, -1)
            if members:
                client.zadd(name, dict.fromkeys(members, 0), xx=True)

    def done(self) -> bool:
        """Every post has ended, and every chunk is erased."""
        client = self.server.client
        return not client.exists(keys.due(0)) and not client.keys(keys.making(0, "*"))


def family(worker: psutil.Process) -> list[list[psutil.Process]]:
    """A worker, its RQ workers, their forks for jobs, the fork servers of decoders, and the decoders."""
    found = [[worker], [], [], [], []]
    with suppress(psutil.NoSuchProcess):
        # A worker that starts has a fork server of its own for a moment, which tries the sandbox.
        found[1] = [child for child in worker.children() if "convert" in child.cmdline()]
        for child in [child for parent in found[1] for child in parent.children()]:
            if watchdog.__file__ in child.cmdline():
                continue
            found[3 if sandbox.PROGRAM in child.cmdline() else 2].append(child)
        found[4] = [child for server in found[3] for child in server.children()]
    return found


@contextmanager
def working(**settings):
    with tempfile.TemporaryDirectory(prefix="ig-") as folder:
        site = Works(Path(folder), **settings)
        try:
            yield site
        finally:
            site.close()
            site.server.close()


def backlog(count: int = 4000, converters: int = 16, seconds: float = 0.5) -> str:
    with working(converters=converters) as site:
        counted = site.stand_in(seconds)
        made = site.publish([jpeg(64, 48)] * count)
        assert site.statuses(made) == {"processing": count} and not counted.read_text()
        began = time.monotonic()
        for _ in range(2):
            site.start("tests.drills.standin")
        until(lambda: "processing" not in site.statuses(made), 30 + 3 * count * seconds / converters, "all images")
        took, ended = time.monotonic() - began, site.statuses(made)
        conversions = len(counted.read_text().splitlines())
        assert ended == {"ready": count} and site.shown() == count
        assert conversions == count
    return f"{count} posts waited for 2 workers of {converters}: {dict(ended)}, {conversions} conversions, {took:.0f} s"


def turns(count: int = 30, seconds: float = 1, partitions: int = 1) -> str:
    """One converter; one post is under way and one at hand when another user's comes, in each partition in turn."""
    with working(partitions=partitions) as site:
        counted, client = site.stand_in(seconds), site.server.client
        site.api()
        users = {keys.partition_of_user(name, partitions): name for name in (f"user{n}" for n in range(99))}
        site.start("tests.drills.standin")
        for user in [users[partition] for partition in range(partitions)]:  # they have posted a moment ago
            with site.client(user) as other:
                post = other.post("/v1/posts", files={"image": jpeg(64, 48)}).json()["id"]
            until(lambda post=post: site.statuses([post])["ready"], what="an image")
        with site.client("alice") as alice:
            queued = [alice.post("/v1/posts", files={"image": jpeg(64, 48)}).json()["id"] for _ in range(count)]
        waited = []
        for partition in range(partitions):
            begun = len(counted.read_text().splitlines())
            until(lambda begun=begun: len(counted.read_text().splitlines()) > begun, what="a conversion")
            until(lambda: client.llen("rq:queue:images"), what="the one at hand")
            before = site.statuses(queued)["ready"]
            with site.client(users[partition]) as other:
                post = other.post("/v1/posts", files={"image": jpeg(64, 48)}).json()["id"]
            until(lambda post=post: site.statuses([post])["ready"], what="the other user's image")
            waited.append(site.statuses(queued)["ready"] - before)
        assert max(waited) <= 2, waited
        assert site.statuses(queued)["processing"] > 0
    return f"{count} posts of one user stood before another's, which waited for {waited} conversions"


def real_images(count: int) -> list[bytes]:
    """The photograph and the golden set, in turn."""
    kinds = [photograph(), *(golden.data for golden in goldens().values())]
    return [kinds[number % len(kinds)] for number in range(count)]


KINDS = ("workers", "RQ workers", "forks", "fork servers", "decoders")


def kills(count: int = 200, strikes: int = 60, seed: int = 1) -> str:
    chance, struck, deleted, passed = random.Random(seed), Counter(), 0, 0
    with working(converters=2) as site:
        images = real_images(count)
        made = site.publish(images[: count // 2])
        workers = [site.worker(), site.worker()]
        began = time.monotonic()

        def strike() -> None:
            """One of a kind chosen at random, which is waited for a moment: decoders live for some milliseconds."""
            kind, worker = chance.randrange(len(KINDS)), psutil.Process(chance.choice(workers).pid)
            for _ in range(100):
                if members := family(worker)[kind]:
                    chance.choice(members).kill()
                    struck[KINDS[kind]] += 1
                    break
                time.sleep(0.005)

        while len(made) < count or "processing" in site.statuses(made):
            assert time.monotonic() - began < 300, site.statuses(made)
            for number, worker in enumerate(workers):
                if worker.poll() is not None:  # as a container's restart policy does
                    assert worker.returncode == -signal.SIGKILL
                    workers[number] = site.worker()
            if struck.total() < strikes:
                time.sleep(chance.uniform(0, 0.2))
                with suppress(psutil.NoSuchProcess):
                    strike()
            if len(made) < count and (struck.total() >= strikes // 2 or "processing" not in site.statuses(made)):
                deleted = site.server.client.delete(*until(lambda: site.server.client.keys("rq:*"), what="RQ's keys"))
                made += site.publish(images[count // 2 :])
            if all(time.sleep(0.05) or site.idle() for _ in range(4)):
                site.let_leases_pass()
                passed += 1
        took, ended = time.monotonic() - began, site.statuses(made)
        assert ended == {"ready": count} and site.shown() == count and deleted and struck
        until(site.done, what="the rest of the work")
        assert not list((site.folder / "store").glob("chunks/*/*"))
    return (
        f"{count} images under {struck.total()} kills {dict(struck)}, {deleted} keys of RQ deleted: {dict(ended)},"
        f" {count} pictures, {took:.0f} s, leases let pass {passed} times"
    )


def away(seconds: float = 60, killed: bool = True, count: int = 40) -> str:
    """In the midst of work, which goes on when Redis is back, with the same worker."""
    with working(converters=2) as site:
        made = site.publish(real_images(count))
        worker = site.worker()
        until(lambda: site.statuses(made)["ready"] > 3, what="the first images")
        if killed:
            site.server.kill()
        else:
            site.server.process.send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        assert worker.poll() is None
        if killed:
            site.server.start()
        else:
            site.server.process.send_signal(signal.SIGCONT)
        back = time.monotonic()
        new = site.publish([photograph()])
        until(lambda: site.statuses(new)["ready"], 60, "an image made after Redis came back")
        again = time.monotonic() - back
        until(site.idle, 60, "the end of what was begun")
        site.let_leases_pass()
        until(lambda: "processing" not in site.statuses(made), 60, "all images")
        ended = site.statuses(made + new)
        assert ended == {"ready": count + 1} and site.shown() == count + 1 and worker.poll() is None
    how = "killed" if killed else "stopped"
    return f"Redis {how} for {seconds} s: {dict(ended)}, a new post ready {again:.1f} s after it was back, same worker"


def mutated(count: int = 1000, seed: int = 7) -> str:
    chance, answers = random.Random(seed), Counter()
    kinds = [golden.data for golden in goldens().values() if len(golden.data) < 400_000]
    with working(converters=2, processing=count) as site:
        api, worker = site.api(), site.worker()
        until(lambda: len(family(psutil.Process(worker.pid))[1]) == 2, what="the RQ workers")
        parents = family(psutil.Process(worker.pid))[:2]
        began, made = time.monotonic(), []
        with site.client("alice") as alice:
            for _ in range(count):
                data = mutate(chance.choice(kinds), chance)
                answer = alice.post("/v1/posts", files={"image": ("photo", data)}, data={"caption": ""})
                answers[answer.status_code] += 1
                if answer.status_code == 201:
                    made.append(answer.json()["id"])
            assert set(answers) <= {201, 415, 422}
            until(lambda: "processing" not in site.statuses(made), 120 + count / 4, "the end of every image")
            took, ended = time.monotonic() - began, site.statuses(made)
            codes = Counter(site.server.client.hget(keys.post(post), "code") for post in made)
            assert site.shown() == ended["ready"] and "exhausted" not in codes
            assert httpx.get(f"{site.url}/readyz").status_code == 200 and api.poll() is None
        assert family(psutil.Process(worker.pid))[:2] == parents and ended.keys() == {"ready", "failed"}
    del codes[None]
    told = f"{count} mutated images: answers {dict(answers)}, ends {dict(ended)}, {dict(codes)}"
    return f"{told}, no part died, {took:.0f} s"


DRILLS = {
    "backlog": backlog,
    "turns": turns,
    "kills": kills,
    "away": away,
    "stopped": lambda: away(killed=False),
    "mutated": mutated,
}

if __name__ == "__main__":
    for name in sys.argv[1:] or DRILLS:
        print(f"{name}: {DRILLS[name]()}", flush=True)
