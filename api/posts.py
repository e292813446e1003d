"""Posts: published by a form, read, listed, deleted."""

from sanic import Blueprint
from sanic.response import empty

from api import shapes, tokens
from api.forms import publish
from storage import posts

routes = Blueprint("posts")


@routes.post("/v1/posts", stream=True)
async def create(request):
    user = tokens.user(request)
    post, caption = await publish(request, user)
    return shapes.answer(shapes.created(post, user, caption), 201, {"Location": f"/v1/posts/{post}"})


@routes.get("/v1/posts")
async def feed(request):
    ctx = request.app.ctx
    page = await posts.feed(ctx.db, ctx.settings.partitions, shapes.limit(request), shapes.place(request))
    return shapes.page(request, [shapes.post(row) for row in page.posts], page.more, "{comment_count}:{id}")


@routes.get("/v1/posts/<post>")
async def read(request, post: str):
    row = await posts.read(request.app.ctx.db, post)
    return shapes.answer(shapes.post(row), headers={"Retry-After": "1"} if row.status == "processing" else None)


@routes.delete("/v1/posts/<post>")
async def delete(request, post: str):
    user = tokens.user(request)
    await posts.delete(request.app.ctx.db, request.app.ctx.objects, user, post)
    return empty()
