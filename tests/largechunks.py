"""The API with chunks that grow to 8 MiB however slow the line and the store are: `python -m tests.largechunks`."""

from api.__main__ import main
from storage import uploads

if __name__ == "__main__":
    uploads.QUICK_SECONDS = uploads.PUT_SECONDS = 60.0
    uploads.growth.largest = uploads.LARGE_CHUNK
    main()
