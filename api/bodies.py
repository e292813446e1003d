"""Request bodies that stream into an upload. Every byte that arrived is kept, however the request ends.

| the request ends | what is kept | the answer |
|---|---|---|
| at the end of the body | everything | the route's own |
| the client goes away or stalls | everything that the server has received | nobody reads it |
| this process stops | everything that the server has received | 503 `stopping` |
| the body's framing is broken | everything before the broken part | 400 |
| storage refuses the bytes | what was committed before | the refusal |
"""

import asyncio
from contextlib import suppress

from sanic.exceptions import SanicException

from api.problems import Problem
from storage.errors import Refusal
from storage.objects import Unavailable
from storage.uploads import Appender

READ_BUFFERED = 0.1  # seconds. Data in the buffer is read at once; an incomplete chunk header would wait for more


async def append(request, image: Appender) -> None:
    """Write a request's body into an upload and commit it.

    Raises what Appender raises, Problem 503 if the server stops, and SanicException if the body's framing is broken.
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
        # The request is over, but its bytes count. A separate task commits them, because this one may be cancelled
        # again.
        committing = asyncio.ensure_future(_commit_received(request.stream, image))
        ctx.committing.add(committing)
        committing.add_done_callback(ctx.committing.discard)
        await asyncio.shield(committing)
        if ctx.stopping:
            task.uncancel()
            raise stopped() from None
        raise
    except SanicException:  # the framing is broken from here on; the bytes before it count
        await image.commit()
        raise
    except BaseException:
        await image.abandon()  # after an error response, commit nothing more
        raise
    finally:
        ctx.receiving.discard(task)


async def _commit_received(stream, image: Appender) -> None:
    """Read what is left in the receive buffer, then commit everything.

    Errors are dropped, because nobody reads the answer: another request has continued the upload, or Redis or object
    storage is unavailable.
    """
    with suppress(Refusal, Unavailable):
        while stream.request_body and stream.recv_buffer:
            try:
                data = await asyncio.wait_for(stream.read(), READ_BUFFERED)
            # AttributeError: Sanic reads from a transport that is closed.
            except (TimeoutError, SanicException, AttributeError):
                break
            await image.write(data or b"")
        await image.commit()
    await image.abandon()


def stopped() -> Problem:
    return Problem(503, "stopping", "this server stops; go on with another")


def stop(app) -> None:
    """End all uploads in progress. Each commits what it has received, and its client gets 503."""
    app.ctx.stopping = True
    for task in app.ctx.receiving:
        task.cancel()


async def wait_for_commits(app) -> None:
    """Wait until all received bytes are committed, also those of clients that have gone."""
    if app.ctx.committing:
        await asyncio.wait(app.ctx.committing)
