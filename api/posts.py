"""Posts: created from a form or from a finished upload, read, listed, deleted."""

from sanic import Blueprint
from sanic.response import empty

from api import limits, reading, rendering
from api.answers import READ, VARY, Answer, json_answer
from api.flights import awaited_read, owned_read, shared_read
from api.forms import publish
from api.headers import list_header
from api.problems import Problem
from storage import changes, posts
from storage.errors import Precondition

routes = Blueprint("posts")


@routes.post("/v1/posts", stream=True)
async def create(request):
    user = await limits.admit(request, "post")
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        post, caption, replayed = await publish(request, user)
        body = rendering.new_post(post, user, caption)
    elif kind == "application/json":
        body, replayed = await create_from_upload(request, user)
    else:
        raise Problem(415, "type", "a post is sent as multipart/form-data, or as JSON that names an upload")
    return rendering.created(body, f"/v1/posts/{body['id']}", replayed)


async def create_from_upload(request, user: str) -> tuple[dict, bool]:
    """Make a post of a finished upload. Returns its JSON, and whether the request was a repetition.

    An upload that is a post already gives that post as it is now.
    """
    await reading.receive_json(request)
    fields = reading.fields(request)
    upload = reading.string(fields.get("upload"), "upload")
    caption = reading.text(fields.get("caption", ""), "caption")
    ctx = request.app.ctx
    idempotency = reading.idempotency_key(request, request.body)
    post, outcome = await posts.create(ctx.db, user, upload, caption, idempotency, ctx.settings.processing)
    if outcome == posts.CREATED:
        return rendering.new_post(post, user, caption), False
    row = await posts.read(ctx.db, post)
    if outcome == posts.EXISTING:
        return rendering.post(row), False
    return rendering.new_post(post, user, row.caption), True


@routes.route("/v1/posts", methods=READ)
@shared_read
async def feed(request) -> Answer:
    ctx, cursor, limit = request.app.ctx, reading.feed_cursor(request), reading.limit(request)
    page = await posts.feed(ctx.db, ctx.settings.partitions, limit, cursor)
    links = () if cursor else (f'</v1/changes?since={changes.issue(ctx.db, page.seen)}>; rel="changes"',)
    row_json, template = rendering.post_json, "{row.comment_count}:{row.id}"
    return rendering.page(request.path, limit, page.posts, page.more, row_json, template, links, ranks=page.ranks)


@routes.route("/v1/users/<user>/posts", methods=READ)
@owned_read
async def of_user(request, user: str, owns: bool) -> Answer:
    ctx, status, limit = request.app.ctx, reading.status(request), reading.limit(request)
    visible = posts.STATUSES if owns else ("ready",)
    statuses = tuple(name for name in visible if status in ("", name))
    page = await posts.of_user(ctx.db, ctx.settings.partitions, user, statuses, limit, reading.post_cursor(request))
    query = f"status={status}&" if status else ""
    row_json, template = rendering.post_json, "{row.id}"
    return rendering.page(request.path, limit, page.posts, False, row_json, template, query=query, end=page.next)


@routes.route("/v1/changes", methods=READ)
@awaited_read
async def changed(request) -> Answer:
    ctx, since, limit = request.app.ctx, reading.parameters(request).get("since"), reading.limit(request)
    page = await changes.since(ctx.db, ctx.settings.partitions, limit, changes.parse(since) if since else None)
    items = [{"id": row, "deleted": True} if isinstance(row, str) else rendering.post(row) for row in page.posts]
    awaited = page.token.seen if since and not items and not page.more else None
    return json_answer({"items": items, "next": str(page.token), "more": page.more}, VARY, awaited)


@routes.route("/v1/posts/<post>", methods=READ)
@awaited_read
async def read(request, post: str) -> Answer:
    row = await posts.read_row(request.app.ctx.db, post)
    return rendering.ready_post(row) if isinstance(row, str) else answer(posts.post_from_row(row))


def answer(row: posts.Post) -> Answer:
    if row.status != "processing":
        return Answer(rendering.post_json(row), VARY)
    return Answer(rendering.post_json(row), {**VARY, "Retry-After": "1"}, awaited=row.id)


@routes.delete("/v1/posts/<post>")
async def delete(request, post: str):
    user, ctx = await limits.admit(request, "post"), request.app.ctx
    if_match, seen = list_header(request, "if-match"), ""
    if if_match and if_match != "*":  # `*` matches any post, and `delete` needs one anyway
        row = await posts.read(ctx.db, post)
        # Another user's post is refused as that: a precondition counts only for a request that would otherwise succeed
        # (RFC 9110, section 13.2.1).
        if row.author == user and not answer(row).matches(if_match):
            raise Precondition("the post has changed: If-Match lists none of its ETags")
        seen = row.seen()
    await posts.delete(ctx.db, ctx.objects, user, post, ctx.settings.backup_reach_ms, seen)
    return empty()
