"""What shipping the append-only file costs: comments by the API, with the shipper at work and with it stopped."""

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
        known, lags = settings.load(api.environment), []

        def behind() -> float:
            lag = shipper_state.read(known)["lag"]
            return float("inf") if lag is None else lag

        def shipped() -> Run:
            shipper.send_signal(signal.SIGCONT)
            until(lambda: behind() < 2, 60, "what was written meanwhile is shipped")
            run = load.run(seconds)
            lags.append(behind())
            return run

        def stopped() -> Run:
            shipper.send_signal(signal.SIGSTOP)
            return load.run(seconds)

        shipped()  # warms what remembers
        runs = in_turns({"stopped": stopped, "shipped": shipped}, rounds)
        shipper.send_signal(signal.SIGCONT)  # so that it can be ended
        value = ratio(runs["shipped"], runs["stopped"])
        note = f"value: ÷ with the shipper stopped, which was at most {max(lags):.1f} s behind"
        shipping = of_runs("comment, while the file is shipped", runs["shipped"], value, 0.95, note)
        return [of_runs("comment, the shipper stopped", runs["stopped"]), shipping]
