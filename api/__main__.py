"""`imagegram-api`, or `python -m api`, serves.

`imagegram-api token alice` mints a development token; `imagegram-api welcome` says how to make the first call.
"""

import argparse
import dataclasses
import errno
import logging
import os
import shlex
import signal
import socket
import sys
import threading
from contextlib import suppress
from functools import partial
from queue import SimpleQueue

from sanic import Sanic

from api import tokens
from api.app import create
from api.protocol import Protocol
from storage import logs, processes, watchdog
from storage import settings as environment
from storage.objects import require_stores

log = logging.getLogger("imagegram.api")

START_STEP = 0.01  # seconds, more than the last step of Sanic's start takes

WELCOME = """
Imagegram answers at http://{host}:{port} in a moment. In another terminal:

  TOKEN={token}
  curl -H "Authorization: Bearer $TOKEN" -F image=@photo.jpg -F caption=Hello http://{host}:{port}/v1/posts
  curl http://{host}:{port}/v1/posts

To look into the database (redis-cli is in Debian's package redis-tools: apt-get install redis-tools):

  redis-cli -s {socket}

Ctrl-C ends it; the data stays in {data}.
"""


def listen(settings) -> list[socket.socket]:
    """One listening socket for each process, all on the same port; the kernel spreads connections over them.

    SO_REUSEPORT lets every server of this user join a port, also that of another site, which would then get a share of
    the requests. So the first socket listens without it, which fails if anybody listens there, and also if two sites
    start at the same moment. Only then the port is opened for the other sockets. Raises SystemExit.
    """
    try:
        found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError):  # UnicodeError: a label of more than 63 characters
        raise environment.refused("HOST", settings.host, "wanted an address or a name of this machine") from None
    try:
        first = _listen(found[0], found[4], shared=False)
        first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        others = [_listen(found[0], first.getsockname(), shared=True) for _ in range(settings.api_processes - 1)]
    except OSError as error:
        variable = "IMAGEGRAM_HOST" if error.errno == errno.EADDRNOTAVAIL else "IMAGEGRAM_PORT"
        reason = f"api: cannot listen on {settings.host}:{settings.port}: {error.strerror}"
        if error.errno == errno.EADDRINUSE:
            who = " and ".join(map(str, processes.listening(settings.port)))
            raise SystemExit(f"{reason}{f' by process {who}' if who else ''}. End it or set {variable}.") from None
        raise SystemExit(f"{reason}. Set {variable}.") from None
    return [first, *others]


def _listen(family: int, address: tuple, shared: bool) -> socket.socket:
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of the last run may be in TIME_WAIT
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(shared))
    listening.bind(address)
    listening.listen(1024)
    return listening


def serve_one(settings, listening: socket.socket) -> None:
    """Serve on a socket until SIGTERM, which the caller has blocked.

    A thread waits for the signal from the first. Sanic ignores it for a moment while it starts, and a process that
    was told to stop then would never stop.
    """
    watchdog.start(settings.watchdog)
    loops = SimpleQueue()  # of one event loop, once it serves

    def stop_at_sigterm() -> None:
        signal.sigwait({signal.SIGTERM})
        loops.get().call_soon_threadsafe(partial(app.stop, terminate=False))

    threading.Thread(target=stop_at_sigterm, daemon=True).start()
    app = create(settings)

    @app.after_server_start
    async def started(app):
        # By a timer, because this is still a step of the start, in the midst of which a stop is an error.
        app.loop.call_later(START_STEP, loops.put, app.loop)
        watchdog.watch_loop(app.loop)

    app.prepare(sock=listening, protocol=Protocol, single_process=True, access_log=False, motd=False)
    Sanic.serve_single(primary=app)


def serve(settings) -> None:
    """Fork as many processes as are set, and serve until a signal stops them.

    A process that ends by itself, whatever its status, stops the others: fewer processes would serve with part of
    the capacity, or none at all, and nobody would notice. Raises SystemExit with status 1 then, else with 0.
    """
    logs.configure()
    require_stores(settings, "STORE")
    environment.signing_secret(settings)  # made once, before there are several who want it
    # Bound in the parent, so that a port that is taken is reported once, and a port of 0 is one port for all.
    sockets = listen(settings)
    settings = dataclasses.replace(settings, port=sockets[0].getsockname()[1])
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # until it is handled here; in the children for good
    parent, children = os.getpid(), set()
    for listening in sockets:
        child = os.fork()
        if child == 0:
            processes.die_with_parent(signal.SIGTERM, parent)  # no orphan goes on serving
            # A group of its own: who signals all of ours at once would interrupt, by the parent's second signal, an
            # orderly end that has begun.
            os.setpgid(0, 0)
            for other in sockets:
                if other is not listening:
                    other.close()
            serve_one(settings, listening)
            os._exit(0)
        children.add(child)
    for listening in sockets:
        listening.close()
    log.info("http://%s:%d, %d processes", settings.host, settings.port, len(children))

    stopping = False

    def stop(signum=None, frame=None):
        nonlocal stopping
        if not stopping:
            stopping = True
            for child in children:
                with suppress(ProcessLookupError):  # it has ended, and `wait` has just returned
                    os.kill(child, signal.SIGTERM)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    status = 0
    while children:
        child, code = os.wait()
        children.remove(child)
        code = os.waitstatus_to_exitcode(code)
        if code or not stopping:
            how = f"was ended by signal {-code}" if code < 0 else f"ended with status {code}"
            log.error("process %d %s", child, how)
            status = 1
            stop()
    raise SystemExit(status)


def main() -> None:
    parser = argparse.ArgumentParser(prog="imagegram-api", description=__doc__)
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("token").add_argument("user")
    commands.add_parser("welcome")
    asked = parser.parse_args()
    settings = environment.load()
    if asked.command == "token":
        if not tokens.USER.fullmatch(asked.user):
            raise SystemExit("api token: the user must be 1 to 255 visible ASCII characters")
        secret = settings.data / "jwt-secret"
        new = not settings.jwt_secret and not secret.exists()
        print(tokens.mint(settings, asked.user))
        if new:  # maybe in the wrong folder: a site that runs has made its own
            print(f"made a new signing secret, {secret}", file=sys.stderr)
    elif asked.command == "welcome":
        token = tokens.mint(settings, "alice")
        socket_file = shlex.quote(f"{settings.data}/redis/redis.sock")
        print(WELCOME.format(**dataclasses.asdict(settings), token=token, socket=socket_file))
    else:
        serve(settings)


if __name__ == "__main__":
    main()
