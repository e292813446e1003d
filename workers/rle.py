"""Decodes run-length encoded BMP files.

Pillow's own decoder is not used. It loses a pixel where an odd number of 4-bit values is stored as it is, and it
refuses files that leave out rows, which the format allows.
"""

from PIL import Image, ImageFile

from workers.errors import unusable


class RunLength(ImageFile.PyDecoder):
    """BI_RLE8 and BI_RLE4, as Microsoft's "Bitmap Compression" describes them. Pixels that are never set are colour 0.

    Arguments, as Pillow passes them in `args`: the raw mode; whether a value has 4 bits instead of 8; 1 where the first
    row is the top one, -1 where it is the bottom one.

    | two bytes | meaning |
    |---|---|
    | 1 to 255, value | a run of this value, as long as the first byte says; with 4 bits its two halves alternate |
    | 0, 0 | end of the row |
    | 0, 1 | end of the image |
    | 0, 2 | move right and on by the next two bytes |
    | 0, 3 to 255 | the second byte is a number of values. They follow unchanged, padded to a multiple of 16 bits |
    """

    _pulls_fd = True

    def decode(self, buffer) -> tuple[int, int]:
        """Raises Unusable with truncated. Returns (-1, 0), Pillow's sign for "done"."""
        width, height = self.state.xsize, self.state.ysize
        four_bits, direction = self.args[1:]
        data = self.fd.read()
        pixels = bytearray(width * height)
        at = x = y = 0
        while y < height and not (y == height - 1 and x >= width):
            if at + 2 > len(data):
                raise unusable("truncated", what=f"the run lengths end in row {y + 1} of {height}")
            count, value = data[at : at + 2]
            at += 2
            if count:
                run = (bytes([value >> 4, value & 15]) * 128 if four_bits else bytes([value]) * count)[:count]
            elif value == 0:
                x, y = 0, y + 1
                continue
            elif value == 1:
                break
            elif value == 2:
                x += sum(data[at : at + 1])  # 0 where the data has ended
                y += sum(data[at + 1 : at + 2])
                at += 2
                continue
            else:
                size = -(-value // 2) if four_bits else value
                run = data[at : at + size]
                if four_bits:
                    run = bytes(half for byte in run for half in (byte >> 4, byte & 15))[:value]
                at += size + size % 2
            run = run[: max(0, width - x)]
            pixels[y * width + x : y * width + x + len(run)] = run
            x += len(run)
        self.set_as_raw(bytes(pixels), self.mode, (0, direction))
        return -1, 0


Image.register_decoder("bmp_rle", RunLength)
