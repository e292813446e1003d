"""The short forms of `make drill-images`: whatever is killed, goes away or is damaged, every post ends."""

import os
import signal

import psutil
import pytest
from conftest import photograph, until
from drills import images
from drills.images import family, working
from making import jpeg

from storage import keys


def test_a_backlog_is_worked_off_and_nothing_is_made_twice():
    print(images.backlog(60, converters=4, seconds=0.1))


@pytest.mark.parametrize("partitions", [1, 3])
def test_a_user_waits_for_at_most_two_images_however_many_another_has_queued(partitions):
    print(images.turns(12, 0.4, partitions))


def test_every_image_is_made_whatever_is_killed():
    print(images.kills(20, strikes=10))


def test_workers_go_on_when_redis_is_back():
    print(images.away(3, killed=True, count=10))


def test_workers_go_on_when_redis_answers_again():
    print(images.away(3, killed=False, count=10))


def test_every_damaged_image_ends_and_nothing_dies_of_it():
    print(images.mutated(40))


def test_a_fork_that_is_killed_costs_one_attempt_and_nothing_else():
    """As the kernel does when memory is short."""
    with working() as site:
        (post,) = site.publish([jpeg()])
        counted = site.stand_in(seconds=1)
        worker = psutil.Process(site.start("tests.drills.standin").pid)
        fork = int(until(counted.read_text, what="a conversion"))
        before = family(worker)[:2]
        os.kill(fork, signal.SIGKILL)
        until(lambda: not psutil.pid_exists(fork) and site.idle(), what="its end")
        client = site.server.client
        assert client.hmget(keys.post(post), "status", "attempt") == ["processing", "1"]
        site.let_leases_pass()
        until(lambda: site.statuses([post])["ready"], what="the image")
        assert len(counted.read_text().splitlines()) == 2 and family(worker)[:2] == before


def test_a_worker_whose_log_nobody_reads_works_and_ends():
    with working() as site:
        whole = jpeg()
        made = site.publish([whole, whole[: len(whole) // 2]])
        read, write = os.pipe()
        os.close(read)
        worker = site.start("workers", stdout=write, stderr=write)
        os.close(write)
        until(lambda: site.statuses(made) == {"ready": 1, "failed": 1}, what="both images")
        worker.terminate()
        assert worker.wait(15) == 0


def test_a_converter_that_dies_is_replaced():
    with working() as site:
        worker = psutil.Process(site.worker().pid)
        (first,) = until(lambda: family(worker)[1], what="the converter")
        first.kill()
        until(lambda: family(worker)[1] not in ([], [first]), what="another")
        made = site.publish([photograph()])
        until(lambda: site.statuses(made)["ready"], what="the image")
        site.close()
        assert not [part for part in (worker, *family(worker)[1]) if part.is_running()]


def test_no_converter_outlives_its_worker():
    """Also where that is killed while the converter is only about to start."""
    with working() as site:
        for moment in (lambda: 1, lambda: site.server.client.exists("rq:workers:images")):
            worker = site.worker()
            (converter,) = until(lambda worker=worker: family(psutil.Process(worker.pid))[1], what="the converter")
            until(moment)
            worker.kill()
            worker.wait()
            until(lambda converter=converter: not converter.is_running(), what="its end")
