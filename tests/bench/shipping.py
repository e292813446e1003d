"""Measures what shipping the append-only file costs: comments to the API with the shipper running and stopped."""

import contextlib
import signal
import tempfile
from pathlib import Path

from storage import settings
from storage.backup import state as shipper_state
from tests.bench import fill
from tests.bench.drive import Load, Run, in_turns, ratio
from tests.bench.parts import Api, Redis
from tests.bench.requests import BODY, COMMENTS, POSTS
from tests.bench.table import Row, of_runs
from tests.conftest import until


def measure(rounds: int, seconds: float) -> list[Row]:
    with contextlib.ExitStack() as stack:
        redis = Redis()
        stack.callback(redis.close)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ig-")))
        (folder / "redis").symlink_to(redis.folder.name)
        ids = fill.fill(redis, fill.counts(POSTS, COMMENTS))
        api = Api(redis, folder)
        stack.callback(api.close)
        paths = [f"/v1/posts/{post}/comments" for post in ids]
        load = Load(api.url, paths, "POST", api.bearer("commenter1"), BODY)
        shipper = api.start("storage", "ship")
        chosen = settings.load(api.environment)
        lags: list[float] = []  # seconds, at the end of each run with the shipper

        def lag() -> float:
            value = shipper_state.read(chosen)["lag"]
            return float("inf") if value is None else value

        def with_shipper() -> Run:
            shipper.send_signal(signal.SIGCONT)
            until(lambda: lag() < 2, 60, "the shipper has caught up")
            run = load.run(seconds)
            lags.append(lag())
            return run

        def without_shipper() -> Run:
            shipper.send_signal(signal.SIGSTOP)
            return load.run(seconds)

        with_shipper()  # warms the caches
        runs = in_turns({"without": without_shipper, "with": with_shipper}, rounds)
        shipper.send_signal(signal.SIGCONT)  # so that it can end
        value = ratio(runs["with"], runs["without"])
        note = f"value: ÷ with the shipper stopped; the shipper was at most {max(lags):.1f} s behind"
        return [
            of_runs("comment, the shipper stopped", runs["without"]),
            of_runs("comment, while the file is shipped", runs["with"], value, 0.95, note),
        ]
