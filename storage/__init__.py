"""Everything that must survive: keys, scripts, objects and settings.

Knows no HTTP. The only room that names a Redis key, an object or an environment variable.
"""
