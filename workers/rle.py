"""Run-length encoded BMP. Pillow's own decoder loses a pixel at every odd stretch of 4-bit values, and refuses files
that leave out rows, which the format allows."""

from PIL import Image, ImageFile

from workers.errors import unusable


class RunLength(ImageFile.PyDecoder):
    """BI_RLE8 and BI_RLE4, as Microsoft's "Bitmap Compression" describes them. Pixels never set are of colour 0."""

    _pulls_fd = True

    def decode(self, buffer) -> tuple[int, int]:
        width, height = self.state.xsize, self.state.ysize
        narrow, direction = self.args[1:]
        data, pixels = self.fd.read(), bytearray(width * height)
        at = x = y = 0
        while y < height and not (y == height - 1 and x >= width):
            if at + 2 > len(data):
                raise unusable("truncated", what=f"the run lengths end in row {y + 1} of {height}")
            count, value = data[at : at + 2]
            at += 2
            if count:
                run = (bytes([value >> 4, value & 15]) * 128 if narrow else bytes([value]) * count)[:count]
            elif value == 0:  # end of the row
                x, y = 0, y + 1
                continue
            elif value == 1:  # end of the image
                break
            elif value == 2:  # a leap
                x, y = x + sum(data[at : at + 1]), y + sum(data[at + 1 : at + 2])
                at += 2
                continue
            else:  # a stretch of so many values as they are, filled to a whole number of 16 bits
                size = -(-value // 2) if narrow else value
                run = data[at : at + size]
                if narrow:
                    run = bytes(half for byte in run for half in (byte >> 4, byte & 15))[:value]
                at += size + size % 2
            run = run[: max(0, width - x)]
            pixels[y * width + x : y * width + x + len(run)] = run
            x += len(run)
        self.set_as_raw(bytes(pixels), self.mode, (0, direction))
        return -1, 0


Image.register_decoder("bmp_rle", RunLength)
