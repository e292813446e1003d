"""`python -m storage redis` starts the embedded Redis."""

import argparse
import os

from storage import server
from storage.settings import load


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m storage", description=__doc__)
    parser.add_argument("command", choices=["redis"])
    parser.parse_args()
    command = server.command(load())
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
