"""The one configuration of logging, for every command of ours that runs for long."""

import logging


def configure() -> None:
    """Log from INFO on to stderr, as `INFO imagegram.ship: …`. The time is left to Docker, Kubernetes or journald.

    Sanic logs each start and stop of a server; only its warnings are of use.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    for name in ("sanic.server", "sanic.root"):
        logging.getLogger(name).setLevel(logging.WARNING)
