"""HTTP. Checks the shape of a request, makes one call into storage, answers.

The only room that imports sanic. Names no Redis key, no Redis command and no object.
"""
