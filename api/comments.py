"""Comments of a post: added, read, listed, deleted by their author."""

from sanic import Blueprint
from sanic.response import empty

from api import limits, reading, rendering
from api.answers import READ, Answer, json_answer
from api.flights import shared_read
from api.headers import list_header
from storage import comments, keys
from storage.errors import Precondition

routes = Blueprint("comments")


@routes.post("/v1/posts/<post>/comments", stream=True)
async def add(request, post: str):
    user, limit = await limits.begin_write(request, "comment")
    try:
        await reading.receive_json(request)
        text = reading.text(reading.fields(request).get("text"), "text")
        if not reading.VISIBLE.search(text):
            raise reading.invalid("text must not be blank", pointer="#/text")
        idempotency = reading.idempotency_key(request, request.body)
        if limit and limit.charge.partition != keys.partition_of_post(post):  # one script cannot write in both
            paid, limit = limit, None
            await limits.take(request, paid.charge)
        comment, replayed = await comments.add(
            request.app.ctx.db, user, post, text, idempotency, limit, request.app.ctx.settings.seal_at
        )
    except Exception as error:
        await limits.end_write(request, limit, error)
        raise
    if limit:
        await limits.end_write(request, limit)
    return rendering.created(rendering.comment(comment), f"/v1/posts/{post}/comments/{comment.id}", replayed)


@routes.route("/v1/posts/<post>/comments", methods=READ)
@shared_read
async def page(request, post: str) -> Answer:
    limit, before = reading.limit(request), reading.comment_cursor(request)
    rows = await comments.page(request.app.ctx.db, request.app.ctx.segments, post, limit, before)
    return rendering.page(request.path, limit, tuple(rows.comments), rows.more, rendering.comment_json, "{row.id}")


@routes.route("/v1/posts/<post>/comments/<comment>", methods=READ)
@shared_read
async def read(request, post: str, comment: str) -> Answer:
    return answer(await comments.read(request.app.ctx.db, request.app.ctx.segments, post, comment))


def answer(row: comments.Comment) -> Answer:
    return json_answer(rendering.comment(row))


@routes.delete("/v1/posts/<post>/comments/<comment>")
async def delete(request, post: str, comment: str):
    user = await limits.admit(request, "comment")
    db, segments, if_match = request.app.ctx.db, request.app.ctx.segments, list_header(request, "if-match")
    if if_match and if_match != "*":
        # A comment never changes. So the one compared here is the one deleted below.
        row = await comments.read(db, segments, post, comment)
        if row.author == user and not answer(row).matches(if_match):
            raise Precondition("If-Match lists none of the comment's ETags")
    await comments.delete(db, segments, user, post, comment)
    return empty()
