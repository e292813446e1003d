"""The HTTP API. A handler reads the request, makes one call into storage, and renders the answer.

Only this package imports Sanic. It names no Redis key, no Redis command and no object.
"""
