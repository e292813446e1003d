"""Why no picture can be made of an image."""

# One sentence for each code. `exhausted` has its own in lua/start_image.lua.
SENTENCES = {
    "wrong_format": "the file is not a PNG, JPEG or BMP image",
    "unsupported": "the file is {what}, which is not supported",
    "too_many_pixels": "the image has {width} x {height} pixels; at most {megapixels} million pixels and {side} pixels"
    " a side are accepted",
    "too_many_scans": "the JPEG has {scans} scans; at most {most} are accepted",
    "too_costly": "decoding the image takes too much processor time or memory",
    "truncated": "the file ends before the image is complete",
    "undecodable": "the image is damaged and cannot be decoded",
}


class Unusable(Exception):
    """A fault that another attempt does not mend.

    `code` is for programs, `detail` is a sentence for the author of the post. `cause` is for the log: what the
    decoding library said, which clients are not shown.
    """

    def __init__(self, code: str, detail: str, cause: str = ""):
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail
        self.cause = cause


def unusable(code: str, cause: str = "", what: str = "", **values: object) -> Unusable:
    """The fault with the written sentence of its code. `values` fill the sentence's gaps.

    `what` says what is wrong in this image, in written words: in the sentence's gap for it, else behind a colon.
    """
    sentence = SENTENCES[code]
    if what and "{what}" not in sentence:
        sentence += ": {what}"
    return Unusable(code, sentence.format(what=what, **values), cause)
