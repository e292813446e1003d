"""Bodies that stream into an upload, of which every byte that arrived counts, however the request ends."""

import asyncio

from api.problems import Problem
from storage.uploads import Appender


async def append(request, image: Appender) -> None:
    """Write a request's body, and commit what came also when the client goes away, stalls, or the server stops.

    Raises what Appender raises, and Problem 503 when the server stops.
    """
    receiving = request.app.ctx.receiving
    task = asyncio.current_task()
    receiving.add(task)
    try:
        async for data in request.stream:
            await image.write(data)
        await image.commit()
    except asyncio.CancelledError:
        # The request is over; the bytes are not. A task of its own, for this one may be cancelled again.
        await asyncio.shield(asyncio.ensure_future(_keep(request.stream, image)))
        if request.app.ctx.stopping:
            task.uncancel()
            raise Problem(503, "stopping", "this server stops; go on with another", {"Connection": "close"}) from None
        raise
    finally:
        receiving.discard(task)


async def _keep(stream, image: Appender) -> None:
    """What was received and not yet read, up to the last byte, then everything that is buffered."""
    while stream.request_body and stream.recv_buffer:
        try:
            # Reading what lies there does not wait; a chunk's header that came only in part would.
            data = await asyncio.wait_for(stream.read(), 0.1)
        except (TimeoutError, AttributeError):  # Sanic asks a transport for more that is gone
            break
        await image.write(data or b"")
    await image.commit()


def stop(app) -> None:
    """End the uploads under way: each keeps what came and says so."""
    app.ctx.stopping = True
    for task in app.ctx.receiving:
        task.cancel()
