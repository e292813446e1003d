"""Measures the site over an emulated slow line: `make line`, which is `unshare --net python -m tests.line`.

This program, the site and its front are in one network namespace. Each measurement has a client in a namespace of its
own, and a line of its own to it:

    client ── TUN ── emulator.py: rate, queue, loss, delay ── TUN ── front, site
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent))  # the modules of tests import each other by their plain names
