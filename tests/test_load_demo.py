"""`make demo` fills a site, and a second run adds nothing."""

import io
import os
import random
import subprocess
import sys

from conftest import ROOT, running_site
from PIL import Image
from state import contents

from tests.load import demo
from tests.load.drawing import DRAWINGS, picture

POSTS = 8


def posts_and_comments(server) -> dict:
    kept = {key: value for key, value in contents(server.client).items() if key.startswith(("post:", "comments:"))}
    assert len(kept) >= POSTS
    return kept


def test_a_demo_fills_a_site_and_a_second_run_adds_nothing(embedded, tmp_path):
    embedded.client.flushall()
    with running_site(embedded, tmp_path) as site:
        site.worker()

        def run() -> str:
            command = [sys.executable, "-m", "tests.load.demo", "--posts", str(POSTS)]
            environment = {**site.environment, "PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]}
            return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout

        plans = list(demo.plans(POSTS))
        comments = sum(len(plan.comments) for plan in plans)
        assert comments and run().startswith(f"{POSTS} posts and {comments} comments added.")
        with site.client() as client:
            items = client.get("/v1/posts?limit=100").json()["items"]
        assert {(post["author"], post["caption"], post["comment_count"]) for post in items} == {
            (plan.author, plan.caption, len(plan.comments)) for plan in plans
        }
        before = posts_and_comments(embedded)
        assert run().startswith("0 posts and 0 comments added.")
        assert posts_and_comments(embedded) == before


def test_the_pictures_of_a_demo_differ_and_all_kinds_and_formats_are_among_them():
    drawn = [picture(random.Random(n)) for n in range(24)]
    assert {kind for kind, _, _ in drawn} == {draw.__name__ for draw in DRAWINGS}
    assert {ending for _, ending, _ in drawn} == {"jpg", "png", "bmp"}
    assert len({data for *_, data in drawn}) == 24
    assert picture(random.Random(0)) == drawn[0]
    for *_, data in drawn:
        extremes = Image.open(io.BytesIO(data)).convert("L").getextrema()
        assert extremes[1] - extremes[0] > 60
