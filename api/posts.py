"""Posts: made of a form or of a finished upload, read, listed, deleted."""

from sanic import Blueprint
from sanic.response import empty

from api import reading, rendering, tokens
from api.answers import READ, Answer, json_answer, shared_read
from api.forms import publish
from api.headers import list_header
from api.problems import Problem
from storage import changes, posts
from storage.errors import Precondition

routes = Blueprint("posts")


@routes.post("/v1/posts", stream=True)
async def create(request):
    user = tokens.user(request)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        post, caption, replayed = await publish(request, user)
        body = rendering.new_post(post, user, caption)
    elif kind == "application/json":
        body, replayed = await adopt(request, user)
    else:
        raise Problem(415, "type", "a post is sent as multipart/form-data, or as JSON that names an upload")
    return rendering.created(body, f"/v1/posts/{body['id']}", replayed)


async def adopt(request, user: str) -> tuple[dict, bool]:
    """Make a post of a finished upload, or find the post that it has become."""
    await reading.receive_json(request)
    fields = reading.fields(request)
    upload = reading.string(fields.get("upload"), "upload")
    caption = reading.text(fields.get("caption", ""), "caption")
    db = request.app.ctx.db
    processing = request.app.ctx.settings.processing
    idempotency = reading.idempotency_key(request, request.body)
    post, how = await posts.create(db, user, upload, caption, idempotency, processing)
    if how == posts.MADE:
        return rendering.new_post(post, user, caption), False
    row = await posts.read(db, post)
    if how == posts.KNOWN:
        return rendering.post(row), False
    return rendering.new_post(post, user, row.caption), True


@routes.route("/v1/posts", methods=READ)
@shared_read
async def feed(request) -> Answer:
    db, after, limit = request.app.ctx.db, reading.feed_cursor(request), reading.limit(request)
    found = await posts.feed(db, request.app.ctx.settings.partitions, limit, after)
    links = () if after else (f'</v1/changes?since={changes.issue(db, found.seen)}>; rel="changes"',)
    place = "{row.comment_count}:{row.id}"
    return rendering.page(request.path, limit, found.posts, found.more, rendering.post_json, place, links)


@routes.route("/v1/changes", methods=READ)
@shared_read
async def changed(request) -> Answer:
    ctx, since = request.app.ctx, reading.parameters(request).get("since")
    found = await changes.since(
        ctx.db, ctx.settings.partitions, reading.limit(request), changes.parse(since) if since else None
    )
    items = [{"id": row, "deleted": True} if isinstance(row, str) else rendering.post(row) for row in found.posts]
    return json_answer({"items": items, "next": str(found.token), "more": found.more})


@routes.route("/v1/posts/<post>", methods=READ)
@shared_read
async def read(request, post: str) -> Answer:
    return answer(await posts.read(request.app.ctx.db, post))


def answer(row: posts.Post) -> Answer:
    return Answer(rendering.post_json(row), {"Retry-After": "1"} if row.status == "processing" else None)


@routes.delete("/v1/posts/<post>")
async def delete(request, post: str):
    user = tokens.user(request)
    ctx, wanted, seen = request.app.ctx, list_header(request, "if-match"), ""
    if wanted and wanted != "*":  # any is all that `delete` takes anyway
        row = await posts.read(ctx.db, post)
        # Somebody else's is refused as that: a precondition counts where all else is well (RFC 9110, section 13.2.1).
        if row.author == user and not answer(row).matches(wanted):
            raise Precondition("the post has changed: If-Match lists none of its ETags")
        seen = row.seen()
    await posts.delete(ctx.db, ctx.objects, user, post, ctx.settings.backup_reach_ms, seen)
    return empty()
