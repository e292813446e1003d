"""The API with a slow object store: `python -m tests.slowstore`. A chunk's last byte selects how long its put takes."""

import asyncio

from api.__main__ import main
from storage.objects import Folder

SECONDS = [0.0, 0.3, 1.2, 2.5, 6.0]  # selected by the last byte: 0 to 4

if __name__ == "__main__":
    put = Folder.put

    async def slow_put(self, name: str, data: list[bytes]) -> None:
        await asyncio.sleep(SECONDS[b"".join(data)[-1]])
        await put(self, name, data)

    Folder.put = slow_put
    main()
