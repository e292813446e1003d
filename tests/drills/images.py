"""Long forms of the workers' drills, with figures: `PYTHONPATH=tests python -m tests.drills.images [NAME…]`.

`make drill-images` runs all of them.

backlog   Posts arrive while no worker runs. Then two workers start. A wait of half a second replaces the decoder.
turns     One user has queued many posts when another user posts. A wait of one second replaces the decoder.
kills     `kill -9` of workers, RQ workers, their forks, fork servers and decoders. RQ's keys are deleted once.
away      Redis is killed for a minute during work.
stopped   Redis is stopped (SIGSTOP) for a minute during work.
mutated   Damaged images are sent to the API.

tests/test_workers_drills.py has the short forms. Each drill starts a Redis and workers of its own, some also an API.
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
    """A site with a Redis of its own. Creates posts by calling `storage`, so that it needs no API."""

    def __init__(self, folder: Path, **settings):
        self.server = RedisServer("valkey")
        super().__init__(self.server.url, folder, **settings)

    async def _publish(self, images: list[bytes]) -> list[str]:
        db, store = connect(self.server), open_store((self.folder / "store").as_uri())

        async def create(number: int, data: bytes) -> str:
            author = f"user{number % 40}"  # a user may have 20 open uploads
            limit = 10_000  # posts in processing, more than any drill creates
            async with uploads.form_upload(db, store, author, 1, processing=limit) as image:
                await image.write(data)
                await image.finish()
            return (await posts.create(db, author, image.upload, "", processing=limit))[0]

        created = await gather_limited(8, [create(number, data) for number, data in enumerate(images)])
        await db.close()
        return created

    def publish(self, images: list[bytes]) -> list[str]:
        """Creates a post for each image. Returns their ids."""
        return asyncio.run(self._publish(images))

    def statuses(self, ids: list[str]) -> Counter:
        """How many of the posts have each status."""
        pipeline = self.server.client.pipeline(transaction=False)
        for post in ids:
            pipeline.hget(keys.post(post), "status")
        return Counter(pipeline.execute())

    def shown(self) -> int:
        """The number of posts in the feed. Asserts that these posts, and no others, have a picture.

        A killed put leaves a temporary file, whose name begins with a dot. It is no object.
        """
        names = {path.name.removesuffix(".jpg") for path in (self.folder / "store" / "images").glob("[!.]*")}
        feed = set(self.server.client.zrange(keys.feed(0), 0, -1))
        assert names == feed
        return len(feed)

    def stand_in(self, seconds: float) -> Path:
        """Sets how long `tests.drills.standin` waits instead of converting. Returns the file that has a line for each
        conversion."""
        counted = self.folder / "counted"
        counted.touch()
        self.environment.update(STANDIN_COUNTED=str(counted), STANDIN_SECONDS=str(seconds), PYTHONPATH="tests")
        return counted

    def idle(self) -> bool:
        """Whether no fork runs a job and RQ's queue is empty."""
        workers = [psutil.Process(process.pid) for process in self.processes if process.poll() is None]
        return not self.server.client.llen("rq:queue:images") and not any(family(worker)[2] for worker in workers)

    def stays_idle(self) -> bool:
        """Whether the site is idle four times, 50 ms apart: between two jobs it is idle for a moment, too."""
        for _ in range(4):
            time.sleep(0.05)
            if not self.idle():
                return False
        return True

    def let_leases_pass(self) -> None:
        """Makes all leased work due now. By itself it becomes due after some minutes.

        Call it only while the site is idle: a running job would lose its lease.
        """
        client = self.server.client
        for name in [*client.keys(keys.making(0, "*")), keys.turns(0), keys.due(0)]:
            members = client.zrange(name, 0, -1)
            if members:
                client.zadd(name, dict.fromkeys(members, 0), xx=True)

    def done(self) -> bool:
        """Whether every post is ready or failed and no chunk waits to be erased."""
        client = self.server.client
        return not client.exists(keys.due(0)) and not client.keys(keys.making(0, "*"))


def family(worker: psutil.Process) -> list[list[psutil.Process]]:
    """The processes of a worker: five lists, in the order of KINDS."""
    converters: list[psutil.Process] = []
    forks: list[psutil.Process] = []
    servers: list[psutil.Process] = []
    decoders: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        # Excludes the fork server with which a starting worker tries the sandbox for a moment.
        converters += [child for child in worker.children() if "convert" in child.cmdline()]
        for child in [child for converter in converters for child in converter.children()]:
            command = child.cmdline()
            if watchdog.__file__ not in command:
                (servers if sandbox.PROGRAM in command else forks).append(child)
        decoders += [child for server in servers for child in server.children()]
    return [[worker], converters, forks, servers, decoders]


KINDS = ("workers", "RQ workers", "forks", "fork servers", "decoders")


@contextmanager
def working(**settings):
    """Starts a Redis. Yields a Works on it, and ends all its processes."""
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
        ids = site.publish([jpeg(64, 48)] * count)
        assert site.statuses(ids) == {"processing": count} and not counted.read_text()
        began = time.monotonic()
        for _ in range(2):
            site.start("tests.drills.standin")
        until(lambda: "processing" not in site.statuses(ids), 30 + 3 * count * seconds / converters, "all images")
        took = time.monotonic() - began
        ended = site.statuses(ids)
        conversions = len(counted.read_text().splitlines())
        assert ended == {"ready": count} and site.shown() == count
        assert conversions == count
    return f"{count} posts waited for 2 workers of {converters}: {dict(ended)}, {conversions} conversions, {took:.0f} s"


def turns(count: int = 30, seconds: float = 1, partitions: int = 1) -> str:
    """One converter. When another user posts, one conversion runs and RQ's queue holds the next one.

    Repeats this with a user of each partition.
    """
    with working(partitions=partitions) as site:
        counted, client = site.stand_in(seconds), site.server.client
        site.api()
        users = {keys.partition_of_user(name, partitions): name for name in (f"user{n}" for n in range(99))}
        site.start("tests.drills.standin")

        def post_as(user: str) -> str:
            with site.client(user) as other:
                return other.post("/v1/posts", files={"image": jpeg(64, 48)}).json()["id"]

        def conversions() -> int:
            return len(counted.read_text().splitlines())

        for partition in range(partitions):  # so that each of these users has posted a moment ago
            post = post_as(users[partition])
            until(lambda post=post: site.statuses([post])["ready"], what="an image")
        queued = [post_as("alice") for _ in range(count)]
        waited: list[int] = []  # images of alice that became ready while the other user waited
        for partition in range(partitions):
            begun = conversions()
            until(lambda begun=begun: conversions() > begun, what="a conversion")
            until(lambda: client.llen("rq:queue:images"), what="the next job in RQ's queue")
            before = site.statuses(queued)["ready"]
            post = post_as(users[partition])
            until(lambda post=post: site.statuses([post])["ready"], what="the other user's image")
            waited.append(site.statuses(queued)["ready"] - before)
        assert max(waited) <= 2, waited
        assert site.statuses(queued)["processing"] > 0
    return f"{count} posts of one user were queued before another user's, which waited for {waited} conversions"


def real_images(count: int) -> list[bytes]:
    """The photograph and the golden images, in turn."""
    kinds = [photograph(), *(golden.data for golden in goldens().values())]
    return [kinds[number % len(kinds)] for number in range(count)]


def kills(count: int = 200, strikes: int = 60, seed: int = 1) -> str:
    """Publishes half of the images before and half after RQ's keys are deleted. Goes on until `strikes` were struck:
    where all images are ready before, it publishes more."""
    chance = random.Random(seed)
    struck: Counter[str] = Counter()
    deleted = passed = 0
    with working(converters=2) as site:
        images = real_images(count)
        ids = site.publish(images[: count // 2])
        workers = [site.worker(), site.worker()]
        began = time.monotonic()

        def strike() -> None:
            """Kills a process of a random kind. Waits half a second for one: a decoder lives for milliseconds."""
            kind, worker = chance.randrange(len(KINDS)), psutil.Process(chance.choice(workers).pid)
            deadline = time.monotonic() + 0.5
            while time.monotonic() < deadline:
                if members := family(worker)[kind]:
                    chance.choice(members).kill()
                    struck[KINDS[kind]] += 1
                    return
                time.sleep(0.001)

        while not deleted or struck.total() < strikes or "processing" in site.statuses(ids):
            assert time.monotonic() - began < 300, (site.statuses(ids), struck)
            for number, worker in enumerate(workers):
                if worker.poll() is not None:  # starts it again, as a container's restart policy does
                    assert worker.returncode == -signal.SIGKILL
                    workers[number] = site.worker()
            if struck.total() < strikes:
                time.sleep(chance.uniform(0, 0.2))
                with suppress(psutil.NoSuchProcess):
                    strike()
            if not deleted and (struck.total() >= strikes // 2 or "processing" not in site.statuses(ids)):
                deleted = site.server.client.delete(*until(lambda: site.server.client.keys("rq:*"), what="RQ's keys"))
                ids += site.publish(images[count // 2 :])
            elif struck.total() < strikes and "processing" not in site.statuses(ids):
                ids += site.publish(real_images(10))
            if site.stays_idle():
                site.let_leases_pass()
                passed += 1
        took = time.monotonic() - began
        ended = site.statuses(ids)
        assert ended == {"ready": len(ids)} and site.shown() == len(ids)
        until(site.done, what="the rest of the work")
        assert not list((site.folder / "store").glob("chunks/*/*"))
    return (
        f"{len(ids)} images under {struck.total()} kills {dict(struck)}, {deleted} keys of RQ deleted: {dict(ended)},"
        f" {len(ids)} pictures, {took:.0f} s, leases let pass {passed} times"
    )


def away(seconds: float = 60, killed: bool = True, count: int = 40) -> str:
    """Takes Redis away during work. Work goes on when Redis is back, with the same worker."""
    with working(converters=2) as site:
        ids = site.publish(real_images(count))
        worker = site.worker()
        ready = until(lambda: site.statuses(ids)["ready"], what="the first image")
        assert ready < count, "all images were ready before Redis was taken away"
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
        until(lambda: site.statuses(new)["ready"], 60, "an image of a post created after Redis came back")
        again = time.monotonic() - back
        until(site.idle, 60, "the end of the jobs that had begun")
        site.let_leases_pass()
        until(lambda: "processing" not in site.statuses(ids), 60, "all images")
        ended = site.statuses(ids + new)
        assert ended == {"ready": count + 1} and site.shown() == count + 1 and worker.poll() is None
    how = "killed" if killed else "stopped"
    return f"Redis {how} for {seconds} s: {dict(ended)}, a new post ready {again:.1f} s after it was back, same worker"


def mutated(count: int = 1000, seed: int = 7) -> str:
    chance = random.Random(seed)
    answers: Counter[int] = Counter()
    kinds = [golden.data for golden in goldens().values() if len(golden.data) < 400_000]
    with working(converters=2, processing=count) as site:
        api, worker = site.api(), site.worker()
        until(lambda: len(family(psutil.Process(worker.pid))[1]) == 2, what="the RQ workers")
        parents = family(psutil.Process(worker.pid))[:2]
        began = time.monotonic()
        ids: list[str] = []
        with site.client("alice") as alice:
            for _ in range(count):
                data = mutate(chance.choice(kinds), chance)
                answer = alice.post("/v1/posts", files={"image": ("photo", data)}, data={"caption": ""})
                answers[answer.status_code] += 1
                if answer.status_code == 201:
                    ids.append(answer.json()["id"])
            assert set(answers) <= {201, 415, 422}
            until(lambda: "processing" not in site.statuses(ids), 120 + count / 4, "the end of every image")
            took = time.monotonic() - began
            ended = site.statuses(ids)
            codes = Counter(site.server.client.hget(keys.post(post), "code") for post in ids)
            assert site.shown() == ended["ready"] and "exhausted" not in codes
            assert httpx.get(f"{site.url}/readyz").status_code == 200 and api.poll() is None
        assert family(psutil.Process(worker.pid))[:2] == parents and ended.keys() == {"ready", "failed"}
    del codes[None]
    return (
        f"{count} mutated images: answers {dict(answers)}, ends {dict(ended)}, {dict(codes)}, no process died,"
        f" {took:.0f} s"
    )


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
