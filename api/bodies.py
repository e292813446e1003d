"""Bodies that stream into an upload, of which every byte that arrived counts, however the request ends."""

import asyncio
from contextlib import suppress

from sanic.exceptions import SanicException

from api.problems import Problem
from storage.errors import Refusal
from storage.objects import Unavailable
from storage.uploads import Appender


async def append(request, image: Appender) -> None:
    """Write a request's body, and commit what came also when the client goes away, stalls, or the server stops.

    Raises what Appender raises, Problem 503 when the server stops, and Sanic's error where the body is malformed.
    """
    ctx, task = request.app.ctx, asyncio.current_task()
    if ctx.stopping:
        raise stopped()
    ctx.receiving.add(task)
    try:
        async for data in request.stream:
            await image.write(data)
        await image.commit()
    except asyncio.CancelledError:
        # The request is over; the bytes are not. A task of its own, for this one may be cancelled again.
        keeping = asyncio.ensure_future(_commit_received(request.stream, image))
        ctx.committing.add(keeping)
        keeping.add_done_callback(ctx.committing.discard)
        await asyncio.shield(keeping)
        if ctx.stopping:
            task.uncancel()
            raise stopped() from None
        raise
    except SanicException:  # the body's framing is broken from here on; what came before it counts
        await image.commit()
        raise
    except BaseException:
        await image.abandon()  # nothing is committed any more once the client was told no
        raise
    finally:
        ctx.receiving.discard(task)


async def _commit_received(stream, image: Appender) -> None:
    """What was received and not yet read, up to the last byte, then everything that is buffered.

    Nobody hears a refusal any more: another request has gone on with the upload, or Redis or the store is away.
    """
    with suppress(Refusal, Unavailable):
        while stream.request_body and stream.recv_buffer:
            try:
                # Reading what lies there does not wait; a chunk's header that came only in part would.
                data = await asyncio.wait_for(stream.read(), 0.1)
            except (TimeoutError, SanicException, AttributeError):  # Sanic asks a transport for more that is gone
                break
            await image.write(data or b"")
        await image.commit()


def stopped() -> Problem:
    return Problem(503, "stopping", "this server stops; go on with another")


def stop(app) -> None:
    """End the uploads under way: each keeps what came and says so."""
    app.ctx.stopping = True
    for task in app.ctx.receiving:
        task.cancel()


async def wait_for_commits(app) -> None:
    """Wait until what came is kept, also of clients that went away."""
    if app.ctx.committing:
        await asyncio.wait(app.ctx.committing)
