"""Why no picture can be made of an image."""


class Unusable(Exception):
    """A fault that trying again does not mend. `code` is for programs, `detail` is one sentence for people."""

    def __init__(self, code: str, detail: str):
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail
