"""`imagegram-api`, or `python -m api`: serves the API.

    imagegram-api                serves until SIGTERM or SIGINT
    imagegram-api token alice    prints a token for development
    imagegram-api welcome        prints how to make the first call
"""

import argparse
import asyncio
import dataclasses
import errno
import gc
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
from storage import logs, metrics, processes, watchdog
from storage import settings as environment
from storage.db import topology
from storage.db.cluster import Cluster
from storage.objects import require_stores

log = logging.getLogger("imagegram.api")

# New objects, in a few MB, after which the garbage collector runs. Python's default is 700. The requests in progress
# alone have more, and the collector then takes a fifteenth of the time of a request.
GARBAGE = 10_000
START_STEP = 0.01  # seconds, longer than the last step of Sanic's start takes

WELCOME = """
Imagegram answers at http://{host}:{port} in a moment. In another terminal:

  TOKEN={token}
  curl -H "Authorization: Bearer $TOKEN" -F image=@photo.jpg -F caption=Hello http://{host}:{port}/v1/posts
  curl http://{host}:{port}/v1/posts

To look into the database (redis-cli is in Debian's package redis-tools: apt-get install redis-tools):

  {look}

Ctrl-C ends it; the data stays in {data}.
"""


def listen(settings) -> list[socket.socket]:
    """One listening socket for each process, all on the same port. The kernel spreads connections over them.

    SO_REUSEPORT lets every server of this user join a port. Another site on the same port would get some of our
    requests. So the first socket listens without the option. This fails if any server listens there, also if two sites
    start at the same moment. Then the first socket gets the option, and the others join it.

    Raises SystemExit if the address or the port cannot be used.
    """
    try:
        family, *_, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError):  # UnicodeError: a label of more than 63 characters
        raise environment.refused("HOST", settings.host, "expected an address or a name of this machine") from None
    try:
        first = _listen(family, address, shared=False)
        first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        others = [_listen(family, first.getsockname(), shared=True) for _ in range(settings.api_processes - 1)]
    except OSError as error:
        variable = "IMAGEGRAM_HOST" if error.errno == errno.EADDRNOTAVAIL else "IMAGEGRAM_PORT"
        reason = f"api: cannot listen on {settings.host}:{settings.port}: {error.strerror}"
        if error.errno == errno.EADDRINUSE:
            holders = " and ".join(map(str, processes.listening(settings.port)))
            reason += f" by process {holders}" if holders else ""
            raise SystemExit(f"{reason}. End it or set {variable}.") from None
        raise SystemExit(f"{reason}. Set {variable}.") from None
    return [first, *others]


def _listen(family: int, address: tuple, shared: bool) -> socket.socket:
    listening = socket.socket(family, socket.SOCK_STREAM)
    # Connections of the last run may still be in TIME_WAIT.
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(shared))
    listening.bind(address)
    listening.listen(1024)
    return listening


def serve_one(settings, listening: socket.socket) -> None:
    """Serve on a socket until SIGTERM. The caller has blocked this signal.

    A thread waits for the signal from the very beginning. Sanic ignores it for a moment while it starts. A process that
    gets it in this moment would never stop.
    """
    watchdog.start(settings.watchdog)
    loops = SimpleQueue()  # gets the event loop as soon as it serves

    def stop_at_sigterm() -> None:
        signal.sigwait({signal.SIGTERM})
        loops.get().call_soon_threadsafe(partial(app.stop, terminate=False))

    threading.Thread(target=stop_at_sigterm, daemon=True).start()
    app = create(settings)

    @app.after_server_start
    async def started(app):
        # This is still a step of Sanic's start, and a stop during the start is an error. Hence the timer.
        app.loop.call_later(START_STEP, loops.put, app.loop)
        watchdog.watch_loop(app.loop)
        # Each run of the garbage collector visits what requests hold at this moment, and what lives for ever.
        gc.freeze()
        gc.set_threshold(GARBAGE)

    app.prepare(sock=listening, protocol=Protocol, single_process=True, access_log=False, motd=False)
    Sanic.serve_single(primary=app)


def serve(settings) -> None:
    """Fork IMAGEGRAM_WORKERS processes, and serve until a signal stops them.

    If a process ends by itself, the others are stopped, whatever its status: otherwise fewer processes would serve, or
    none, and nobody would notice. Raises SystemExit with status 1 in this case, with 0 after a signal.
    """
    logs.configure(settings.log, environment.secret_values())
    require_stores(settings, "STORE")
    asyncio.run(topology.warn(settings))
    if not settings.jwks_url:
        environment.signing_secret(settings)  # made here, before several processes need it
    # The parent binds the sockets. So a port in use is reported once, and port 0 becomes one port for all processes.
    sockets = listen(settings)
    settings = dataclasses.replace(settings, port=sockets[0].getsockname()[1])
    # Blocked in the parent until it has a handler, and in the children for good: they wait for it in a thread.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    parent, children = os.getpid(), set()
    memory = metrics.share(len(sockets))
    for number, listening in enumerate(sockets):
        child = os.fork()
        if child == 0:
            processes.die_with_parent(signal.SIGTERM, parent)  # an orphan would go on serving
            # A process group of its own. A signal to the parent's whole group would reach the child twice: the second
            # one, from the parent, would interrupt the orderly end that the first has begun.
            os.setpgid(0, 0)
            for other in sockets:
                if other is not listening:
                    other.close()
            metrics.attach(memory, number)
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
                with suppress(ProcessLookupError):  # it has just ended
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
    arguments = parser.parse_args()
    settings = environment.load()
    if arguments.command == "token":
        if not tokens.USER.fullmatch(arguments.user):
            raise SystemExit("api token: the user must be 1 to 255 visible ASCII characters")
        if settings.jwks_url:
            raise SystemExit("api token: with IMAGEGRAM_JWKS_URL only the identity provider can sign tokens")
        secret = settings.data / "jwt-secret"
        is_new = not settings.jwt_secret and not secret.exists()
        print(tokens.mint(settings, arguments.user))
        if is_new:  # maybe in the wrong folder: a running site has made its secret in its own
            print(f"made a new signing secret, {secret}", file=sys.stderr)
    elif arguments.command == "welcome":
        token = "… # a token of your identity provider" if settings.jwks_url else tokens.mint(settings, "alice")
        look = f"redis-cli -s {shlex.quote(f'{settings.data}/redis/redis.sock')}"
        if "+cluster:" in settings.redis_url:
            host, _, port = Cluster(settings.redis_url).nodes()[0].place.rpartition(":")
            look = f"redis-cli -c -h {host} -p {port}"
        print(WELCOME.format(**dataclasses.asdict(settings), token=token, look=look))
    else:
        serve(settings)


if __name__ == "__main__":
    main()
