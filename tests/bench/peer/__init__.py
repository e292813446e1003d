"""What one would write instead: FastAPI, asyncpg and PostgreSQL, as its own users would tune it."""
