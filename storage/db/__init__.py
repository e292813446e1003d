"""Redis: the client that runs the Lua scripts, and the embedded server with its configuration."""
