"""Compares the system with bare Sanic and with a peer: `python -m tests.bench`, which is `make bench`."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent))  # the modules of tests import each other by their plain names
