"""Why no picture can be created of an image."""

# One sentence for each code. The code `exhausted` has its sentence in lua/start_image.lua.
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
    """The image itself is the fault, so another attempt would fail too.

    | attribute | for | content |
    |---|---|---|
    | `code` | programs | a key of SENTENCES |
    | `detail` | the author of the post | one sentence |
    | `cause` | the log only; clients never see it | the text of the decoding library, or empty |
    """

    def __init__(self, code: str, detail: str, cause: str = ""):
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail
        self.cause = cause


def unusable(code: str, cause: str = "", what: str = "", **values: object) -> Unusable:
    """Returns the fault with the sentence of `code` from SENTENCES. `values` fill the gaps of the sentence.

    `what` names the problem of this image in our own words, never in a library's: clients read it. If the sentence has
    a gap `{what}`, it goes there. Otherwise it follows the sentence after a colon:

        >>> unusable("undecodable", what="a PNG without pixels").detail
        'the image is damaged and cannot be decoded: a PNG without pixels'

    Raises KeyError where the code has no sentence, or a gap has no value.
    """
    sentence = SENTENCES[code]
    if what and "{what}" not in sentence:
        sentence += ": {what}"
    return Unusable(code, sentence.format(what=what, **values), cause)
