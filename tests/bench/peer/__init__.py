"""The peer: the same API as it is usually written, with FastAPI, asyncpg and PostgreSQL, tuned as their users do."""
