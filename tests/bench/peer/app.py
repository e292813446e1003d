"""The feed, a post and adding a comment, with the same JSON as the API. uvicorn runs it with uvloop and httptools.

It has no response model and no dependency injection: pydantic would take a third of the feed's time. It verifies a
token once and caches the result, as our API does.
"""

import os
from contextlib import asynccontextmanager
from datetime import datetime
from functools import lru_cache

import asyncpg
import jwt
import orjson
from fastapi import FastAPI, HTTPException, Request, Response

POSTS = """
    SELECT p.id, p.author, p.caption, p.status, p.thumbhash, p.created_at, p.comment_count,
           c.id AS comment_id, c.author AS comment_author, c.text AS comment_text, c.created_at AS comment_at
    FROM ({posts}) p
    LEFT JOIN LATERAL (
        SELECT id, author, text, created_at FROM comments WHERE post_id = p.id ORDER BY id DESC LIMIT 2
    ) c ON true
    ORDER BY p.comment_count DESC, p.id DESC, c.id DESC
"""
FIRST_PAGE = POSTS.format(
    posts="SELECT * FROM posts WHERE status = 'ready' ORDER BY comment_count DESC, id DESC LIMIT $1"
)
NEXT_PAGE = POSTS.format(
    posts="SELECT * FROM posts WHERE status = 'ready' AND (comment_count, id) < ($2, $3)"
    " ORDER BY comment_count DESC, id DESC LIMIT $1"
)
ONE_POST = POSTS.format(posts="SELECT * FROM posts WHERE id = $1")
ADD_COMMENT = """
    WITH post AS (
        UPDATE posts SET comment_count = comment_count + 1 WHERE id = $1 AND status = 'ready' RETURNING id
    )
    INSERT INTO comments (post_id, author, text) SELECT id, $2, $3 FROM post RETURNING id, created_at
"""


@asynccontextmanager
async def lifespan(app: FastAPI):
    connections = int(os.environ["PEER_CONNECTIONS"])
    app.state.db = await asyncpg.create_pool(os.environ["PEER_DATABASE"], min_size=connections, max_size=connections)
    yield
    await app.state.db.close()


app = FastAPI(lifespan=lifespan, openapi_url=None)


def rfc3339(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03d}Z"


def posts_from_rows(rows) -> list[dict]:
    """Posts as JSON. A post has a row for each of its latest comments, or one row if it has none."""
    posts: list[dict] = []
    for row in rows:
        if not posts or posts[-1]["id"] != row["id"]:
            posts.append(
                {
                    "id": row["id"],
                    "author": row["author"],
                    "caption": row["caption"],
                    "created_at": rfc3339(row["created_at"]),
                    "status": row["status"],
                    "image": {
                        "url": f"/v1/images/{row['id']}.jpg",
                        "width": 600,
                        "height": 600,
                        "thumbhash": row["thumbhash"],
                    },
                    "comment_count": row["comment_count"],
                    "latest_comments": [],
                }
            )
        if row["comment_id"] is not None:
            posts[-1]["latest_comments"].append(
                {
                    "id": str(row["comment_id"]),
                    "author": row["comment_author"],
                    "text": row["comment_text"],
                    "created_at": rfc3339(row["comment_at"]),
                }
            )
    return posts


def json_response(body, status: int = 200) -> Response:
    return Response(orjson.dumps(body), status, media_type="application/json")


@app.get("/v1/posts")
async def feed(request: Request, limit: int = 20, cursor: str | None = None):
    if cursor:
        count, _, post = cursor.partition(":")
        rows = await request.app.state.db.fetch(NEXT_PAGE, limit + 1, int(count), post)
    else:
        rows = await request.app.state.db.fetch(FIRST_PAGE, limit + 1)
    posts = posts_from_rows(rows)
    more = len(posts) > limit
    posts = posts[:limit]
    next_cursor = f"{posts[-1]['comment_count']}:{posts[-1]['id']}" if more else None
    return json_response({"items": posts, "next": next_cursor})


@app.get("/v1/posts/{post}")
async def read(request: Request, post: str):
    rows = await request.app.state.db.fetch(ONE_POST, post)
    if not rows:
        raise HTTPException(404)
    return json_response(posts_from_rows(rows)[0])


@lru_cache(10_000)
def user(authorization: str) -> str:
    return jwt.decode(authorization.removeprefix("Bearer "), os.environ["PEER_SECRET"], ["HS256"])["sub"]


@app.post("/v1/posts/{post}/comments")
async def comment(request: Request, post: str):
    author = user(request.headers["authorization"])
    text = orjson.loads(await request.body())["text"]
    if not isinstance(text, str) or not 0 < len(text) <= 2200:
        raise HTTPException(422)
    row = await request.app.state.db.fetchrow(ADD_COMMENT, post, author, text)
    if row is None:
        raise HTTPException(404)
    created_at = rfc3339(row["created_at"])
    return json_response({"id": str(row["id"]), "author": author, "text": text, "created_at": created_at}, 201)
