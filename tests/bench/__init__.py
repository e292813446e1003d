"""Measures the system beside bare Sanic and beside a peer: `python -m tests.bench`, which is `make bench`."""
