"""The configuration of logging, for every command of this project that runs for long."""

import logging


def configure() -> None:
    """Log INFO and above to stderr, as `INFO imagegram.ship: …`.

    The lines have no time, because Docker, Kubernetes and journald add one. Of Sanic only warnings are logged: it also
    logs each start and stop of a server, which is of no use here.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    for name in ("sanic.server", "sanic.root"):
        logging.getLogger(name).setLevel(logging.WARNING)
