"""Short forms of `make drill-images`. Every post ends, whatever is killed, unreachable or damaged."""

import os
import signal

import psutil
import pytest
from conftest import photograph, until
from drills import images
from drills.images import family, working
from making import jpeg

from storage import keys


def test_a_backlog_is_worked_off_and_no_picture_is_created_twice():
    print(images.backlog(60, converters=4, seconds=0.1))


@pytest.mark.parametrize("partitions", [1, 3])
def test_a_user_waits_for_at_most_two_images_however_many_another_has_queued(partitions):
    print(images.turns(12, 0.4, partitions))


def test_every_picture_is_created_whatever_is_killed():
    print(images.kills(20, strikes=10))


def test_workers_go_on_after_redis_was_killed_and_started_again():
    print(images.away(3, killed=True, count=10))


def test_workers_go_on_after_redis_was_stopped_and_continued():
    print(images.away(3, killed=False, count=10))


def test_every_post_with_a_damaged_image_ends_and_no_process_dies():
    print(images.mutated(40))


def test_a_job_that_is_killed_costs_one_attempt_and_nothing_else():
    """The kernel kills a process when memory is short."""
    with working() as site:
        (post,) = site.publish([jpeg()])
        counted = site.stand_in(seconds=1)
        worker = psutil.Process(site.start("tests.drills.standin").pid)
        job = int(until(counted.read_text, what="a conversion"))
        before = family(worker)[:2]
        os.kill(job, signal.SIGKILL)
        until(lambda: not psutil.pid_exists(job) and site.idle(), what="its end")
        client = site.server.client
        assert client.hmget(keys.post(post), "status", "attempt") == ["processing", "1"]
        site.let_leases_pass()
        until(lambda: site.statuses([post])["ready"], what="the image")
        assert len(counted.read_text().splitlines()) == 2 and family(worker)[:2] == before


def test_a_worker_whose_log_goes_to_a_closed_pipe_works_and_ends():
    with working() as site:
        whole = jpeg()
        published = site.publish([whole, whole[: len(whole) // 2]])
        read, write = os.pipe()
        os.close(read)
        worker = site.start("workers", stdout=write, stderr=write)
        os.close(write)
        until(lambda: site.statuses(published) == {"ready": 1, "failed": 1}, what="both images")
        worker.terminate()
        assert worker.wait(15) == 0


def test_a_converter_that_dies_is_replaced():
    with working() as site:
        worker = psutil.Process(site.worker().pid)
        (first,) = until(lambda: family(worker)[1], what="the converter")
        first.kill()
        until(lambda: family(worker)[1] not in ([], [first]), what="another")
        published = site.publish([photograph()])
        until(lambda: site.statuses(published)["ready"], what="the image")
        site.close()
        assert not [part for part in (worker, *family(worker)[1]) if part.is_running()]


def test_no_converter_outlives_its_worker():
    """Not even where the worker is killed while its converter is starting."""
    with working() as site:
        for moment in (lambda: 1, lambda: site.server.client.exists("rq:workers:images")):
            worker = site.worker()
            (converter,) = until(lambda worker=worker: family(psutil.Process(worker.pid))[1], what="the converter")
            until(moment)
            worker.kill()
            worker.wait()
            until(lambda converter=converter: not converter.is_running(), what="its end")
