"""A proxy that makes a network line bad: it loses, delays, throttles and cuts what passes, and counts the bytes.

It runs in a thread of its own, so that blocking tests and asyncio tests can both use it.
"""

import asyncio
import socket
import struct
import tempfile
import threading
from collections.abc import Callable

PIECE = 64 * 1024  # bytes read at once


class Proxy:
    """Listens on a socket file and on a port of 127.0.0.1. Passes on to `target`: the path of a socket, or a port."""

    def __init__(self, target: str | int):
        self.target = target
        self.delay = 0.0  # seconds that each piece waits, in both directions
        self.lag = 0.0  # the same, for a connection by which a replica of Redis follows its primary, the target
        self.rate: float | None = None  # bytes a second, in each direction; None: no limit
        self.up = 0  # bytes passed on to the server
        self.down = 0  # bytes passed on to the client
        self.lost = threading.Event()  # set when the loss that `lose` ordered has happened
        self.before: dict[bytes, Callable] = {}  # bytes → what to call before they reach the server
        self._losing: tuple[int, str] | None = None
        self._connections: set[Connection] = set()
        self._folder = tempfile.TemporaryDirectory(prefix="ig-")
        self.path = f"{self._folder.name}/proxy.sock"
        self.url = f"unix://{self.path}"
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._run(self._listen())

    def lose(self, after: int = 0, how: str = "fin") -> None:
        """Passes on `after` more bytes of the server's answer, loses the rest of that piece, and cuts the connection.

        `how` is "fin", "rst" or "silence". After "silence" the connection stays open, and no more bytes pass. The
        connection of a replica is spared.
        """
        self.lost.clear()
        self._losing = after, how

    def cut(self, how: str = "fin") -> int:
        """Cuts all connections now, and returns how many there were."""

        async def cut() -> int:
            connections = list(self._connections)
            for connection in connections:
                connection.cut(how)
            return len(connections)

        return self._run(cut())

    def close(self) -> None:
        self.cut("rst")

        async def end():
            for server in self._servers:
                server.close()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        self._run(end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._folder.cleanup()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def _run(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    async def _listen(self):
        self._servers = [
            await asyncio.start_unix_server(self._accept, self.path),
            await asyncio.start_server(self._accept, "127.0.0.1", 0),
        ]
        self.port = self._servers[1].sockets[0].getsockname()[1]

    async def _accept(self, reader, writer):
        try:
            if isinstance(self.target, str):
                server = await asyncio.open_unix_connection(self.target)
            else:
                server = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        connection = Connection(self, writer, server[1])
        self._connections.add(connection)
        try:
            await asyncio.gather(connection.pump(reader, server[1], "up"), connection.pump(server[0], writer, "down"))
        finally:
            self._connections.discard(connection)


class Connection:
    """The two connections that the proxy joins: from the client, and to the server."""

    def __init__(self, proxy: Proxy, client: asyncio.StreamWriter, server: asyncio.StreamWriter):
        self.proxy = proxy
        self.ends = client, server
        self.silent = self.ended = False
        self.replica = False  # whether a replica of Redis opened it, to follow its primary

    async def pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: str) -> None:
        """Passes on the bytes of one direction: "up" to the server, or "down" to the client."""
        proxy = self.proxy
        try:
            while data := await reader.read(PIECE):
                for needle in [needle for needle in proxy.before if way == "up" and needle in data]:
                    await asyncio.to_thread(proxy.before.pop(needle))
                if way == "up" and b"REPLCONF" in data:
                    self.replica = True
                if delay := proxy.lag if self.replica else proxy.delay:
                    await asyncio.sleep(delay)
                if proxy.rate:
                    await asyncio.sleep(len(data) / proxy.rate)
                if self.ended:
                    return
                if self.silent:
                    continue
                how = None
                if way == "down" and not self.replica and proxy._losing and len(data) > proxy._losing[0]:
                    (after, how), proxy._losing = proxy._losing, None
                    data = data[:after]
                writer.write(data)
                setattr(proxy, way, getattr(proxy, way) + len(data))
                if how:
                    await asyncio.sleep(0)
                    self.cut(how)
                    proxy.lost.set()
                else:
                    await writer.drain()
            if not self.silent:
                writer.write_eof()
        except OSError:
            self.cut("rst")

    def cut(self, how: str) -> None:
        """Cuts the client's connection by `how`. The server sees its connection closed, except after "silence"."""
        if how == "silence":
            self.silent = True
            return
        self.ended = True
        client, server = self.ends
        if how == "rst":
            end = client.get_extra_info("socket")
            if end is not None and end.fileno() != -1 and end.family != socket.AF_UNIX:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.transport.abort()
        else:
            client.close()
        server.close()
