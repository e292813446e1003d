"""A progressive JPEG whose first scan is small, and what its scans show (ITU T.81, annex G).

A client that has only the first bytes of a progressive JPEG can show the whole picture as far as its complete scans go.
mozjpeg's first scan has the mean of each block of 8x8 pixels (the DC coefficient) with all of its bits. That is a fifth
of a photograph's bytes, and half of those of a smooth one. `shrink_first_scan` leaves the lowest bits to scans of their
own, which follow after the first details. No coefficient changes, so the whole file shows the same pixels.

| scan | before | after |
|---|---|---|
| 1 | DC, all bits | DC without its 1 to 3 lowest bits |
| 2 | the first details of the brightness | the same |
| 3 to 5 | | DC, one bit each |
| the others | the other details | the same, but the first details of the colours first |

mozjpeg writes all of the brightness before all details of the colours. `move_colours_forward` changes that: the best
look within 75 % of the bytes had 50 points of SSIMULACRA2 then, instead of 36 (median of nine photographs).
"""

import heapq
import struct
from operator import itemgetter
from typing import NamedTuple

import numpy as np

# What the first scan may take, with all that precedes it: this share of the file's bytes, or these bytes if they are
# more. In the small file of a smooth picture the scans of single bits take up to 20 %, and 4 KiB arrive soon anyway.
FIRST_SHARE, FIRST_BYTES = 0.15, 4096
MAX_LEFT_OUT = 3  # lowest bits of DC. Steps of 8 times the quantizer are visible as bands, but a first look stays one
UNUSED = 256  # no symbol; it takes the code of 1 bits only, which T.81 forbids (annex C)
BITS = np.frexp(np.arange(4096.0))[1].astype(np.int32)  # bits of each number; differences of DC have up to 11

# Of the scans' ends, those are listed where a person sees a difference: the first, the last ones within these shares of
# the file, and the whole. A list of all would be read on slow lines and not used.
LOOKS = (0.4, 0.75)
GROWTH = 1.3  # how many times as long as the look before a look is at least. Less adds a bit of DC, which nobody sees
MAX_LOOKS = 2 + len(LOOKS)

SOF2, DHT, EOI, SOS = 0xC2, 0xC4, 0xD9, 0xDA  # markers


class Segment(NamedTuple):
    """A marker segment, with the scan's data behind it if it is an SOS."""

    marker: int
    start: int  # bytes from the start of the file
    end: int
    body: bytes  # without marker and length


def shrink_first_scan(jpeg: bytes) -> bytes:
    """Returns a JPEG of the same coefficients whose first scan ends as early as FIRST_SHARE says, if that is possible.

    `jpeg`: a progressive JPEG without restart intervals, whose first scan has the DC of all components. Another is
    returned as it is.
    """
    parts = segments(jpeg)
    scans = [part for part in parts if part.marker == SOS]
    frame = next((part.body for part in parts if part.marker == SOF2), b"")
    if len(scans) < 2 or len(frame) != 15 or scans[0].body[0] != 3 or scans[0].body[7:10] != bytes(3):
        return jpeg
    height, width = struct.unpack_from(">HH", frame, 1)
    sampling = [(frame[7 + 3 * n] >> 4, frame[7 + 3 * n] & 15) for n in range(3)]
    mcus = -(-height // (8 * sampling[0][1])) * -(-width // (8 * sampling[0][0]))
    most = max(FIRST_SHARE * len(jpeg), FIRST_BYTES)
    if scans[0].end <= most:
        return jpeg
    counts = [across * down for across, down in sampling]  # blocks of each component in an MCU
    header = next(part.start for part in parts if part.marker == DHT)
    tables = _tables(part.body for part in parts if part.marker == DHT and part.end <= scans[0].start)
    chosen = [tables[scans[0].body[2 + 2 * n] >> 4] for n in range(3)]
    values = _decode(jpeg[scans[0].start + 2 + 2 + len(scans[0].body) : scans[0].end], chosen, counts, mcus)
    for left_out in range(1, MAX_LEFT_OUT + 1):
        first = FirstScan(values, left_out)
        if header + first.size() <= most:
            break
    refinements = b"".join(_refinement(values, bit) for bit in reversed(range(left_out)))
    return jpeg[:header] + first.encoded() + jpeg[scans[0].end : scans[1].end] + refinements + jpeg[scans[1].end :]


def move_colours_forward(jpeg: bytes) -> bytes:
    """Returns the same scans, the first details of the colours before the last ones of the brightness.

    `jpeg`: a progressive JPEG each of whose scans has its own tables in front of it, as libjpeg writes them.
    """
    scans: list[tuple[int, bytes]] = []
    start = header = 0
    for part in segments(jpeg):
        if part.marker not in (DHT, SOS):
            start = header = part.end
        if part.marker == SOS:
            count = part.body[0]
            component, (first, last, bits) = part.body[1], part.body[1 + 2 * count : 4 + 2 * count]
            refines = bits >> 4  # a scan that adds one bit to what earlier scans have
            if first == 0 or (component == 1 and first == 1 and not refines):
                rank = 0
            else:
                rank = 1 if last < 63 and not refines else 2
            scans.append((rank, jpeg[start : part.end]))
            start = part.end
    return jpeg[:header] + b"".join(scan for _, scan in sorted(scans, key=itemgetter(0))) + jpeg[start:]


def looks(jpeg: bytes) -> tuple[int, ...]:
    """Returns how many bytes from the start show the whole picture, at most MAX_LOOKS numbers, ascending.

    Each shows it better than the one before. The last is the length of the file. It is the only one if the scans are no
    steps to the whole picture, as in a baseline JPEG, and of a file of at most FIRST_BYTES.
    """
    ends, with_dc, components = [], set(), 3
    for part in segments(jpeg):
        if part.marker == SOF2:
            components = part.body[5]
        if part.marker == SOS:
            count = part.body[0]
            if part.body[1 + 2 * count] == 0:  # the scan has DC
                with_dc.update(part.body[1 : 1 + 2 * count : 2])
            if len(with_dc) == components:
                ends.append(part.end)
    chosen = [0]
    for most in (*ends[:1], *(share * len(jpeg) for share in LOOKS)):
        end = max((end for end in ends if end <= most), default=0)
        if GROWTH * chosen[-1] < end <= LOOKS[-1] * len(jpeg):
            chosen.append(end)
    return (*chosen[1:], len(jpeg)) if len(jpeg) > FIRST_BYTES else (len(jpeg),)


def segments(jpeg: bytes) -> list[Segment]:
    """Returns the marker segments between SOI and EOI."""
    found, at = [], 2
    while jpeg[at + 1] != EOI:
        marker, length = struct.unpack_from(">xBH", jpeg, at)
        end = at + 2 + length
        body = jpeg[at + 4 : end]
        if marker == SOS:
            end = jpeg.index(0xFF, end)
            while jpeg[end + 1] == 0:  # a byte 0xFF of the data
                end = jpeg.index(0xFF, end + 1)
        found.append(Segment(marker, at, end, body))
        at = end
    return found


def _tables(bodies) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Returns the Huffman tables for DC by their number (T.81, B.2.4.2 and C.2).

    Each is two arrays, which have for any 16 bits the length of the code at their start, and its symbol.
    """
    tables = {}
    for body in bodies:
        while body:
            lengths, symbols = np.zeros(65536, np.uint8), np.zeros(65536, np.uint8)
            code, at = 0, 17
            for length in range(1, 17):
                for _ in range(body[length]):
                    upto = code + (1 << 16 - length)
                    lengths[code:upto], symbols[code:upto] = length, body[at]
                    code, at = upto, at + 1
            tables[body[0]], body = (lengths, symbols), body[at:]
    return tables


def _decode(data: bytes, tables: list[tuple[np.ndarray, np.ndarray]], counts: list[int], mcus: int) -> list[np.ndarray]:
    """Returns the DC coefficients of each component: a row for each MCU, a column for each of its blocks."""
    data = data.replace(b"\xff\0", b"\xff")
    padded = np.frombuffer(data + bytes(4), np.uint8).astype(np.int32)
    three = padded[:-2] << 16 | padded[1:-1] << 8 | padded[2:]
    places = np.arange(8 * len(three), dtype=np.int32)
    next_16 = np.repeat(three, 8) >> np.tile(np.arange(8, 0, -1, np.int32), len(three)) & 0xFFFF  # from each bit on
    # From each bit on, as if a value began there: the bit behind the value. One view for each block of an MCU.
    behind = {
        id(lengths): memoryview(np.minimum(places + (lengths + symbols)[next_16], places[-1]))
        for lengths, symbols in tables
    }
    steps = [behind[id(lengths)] for (lengths, _), count in zip(tables, counts, strict=True) for _ in range(count)]
    starts, at = [], 0
    for _ in range(mcus):
        for after in steps:
            starts.append(at)
            at = after[at]
    grid, values, column = np.array(starts).reshape(mcus, -1), [], 0
    for (lengths, symbols), count in zip(tables, counts, strict=True):
        start = grid[:, column : column + count].ravel()
        column += count
        size = symbols[next_16[start]].astype(np.int32)
        bits = next_16[start + lengths[next_16[start]]] >> 16 - size
        differences = np.where(bits << 1 >> size, bits, bits - (1 << size) + 1)  # T.81, F.2.2.1
        values.append(np.cumsum(differences, dtype=np.int32).reshape(mcus, count))
    return values


class FirstScan:
    """A first scan for DC coefficients without their `low` lowest bits."""

    def __init__(self, values: list[np.ndarray], low: int):
        self.low = low
        self.differences = [np.diff(value.ravel() >> low, prepend=0).reshape(value.shape) for value in values]
        self.bits = [BITS[np.abs(difference)] for difference in self.differences]
        counted = [np.bincount(bits.ravel(), minlength=16) for bits in self.bits]
        self.counted = [counted[0], counted[1] + counted[2]]  # one table for brightness, one for colour
        self.tables = [_huffman(counts.tolist()) for counts in self.counted]

    def size(self) -> int:
        """Returns about how many bytes it takes."""
        pairs = zip(self.counted, self.tables, strict=True)
        return 60 + sum(int(counts @ (lengths + np.arange(16))) for counts, (_, _, lengths) in pairs) // 8

    def encoded(self) -> bytes:
        """Returns its DHT, SOS and data."""
        body, codes, lengths = b"", [], []
        for number, (table, _, _) in enumerate(self.tables):
            body += bytes([number]) + table
        for difference, bits, number in zip(self.differences, self.bits, (0, 1, 1), strict=True):
            _, code, length = self.tables[number]
            extra = np.where(difference > 0, difference, difference + (1 << bits) - 1)  # T.81, F.1.2.1.1
            codes.append(code[bits] << bits | extra)
            lengths.append(length[bits] + bits)
        data = _packed(np.concatenate(codes, 1).ravel(), np.concatenate(lengths, 1).ravel())
        dht = struct.pack(">BBH", 0xFF, DHT, 2 + len(body)) + body
        return dht + _sos((0x00, 0x10, 0x10), self.low) + data


def _refinement(values: list[np.ndarray], bit: int) -> bytes:
    """Returns SOS of a scan with this bit of all DC coefficients (T.81, G.1.2.1.1)."""
    bits = np.concatenate([value >> bit & 1 for value in values], 1).ravel()
    return _sos((0, 0, 0), (bit + 1) << 4 | bit) + _scan_data(bits)


def _sos(tables: tuple[int, int, int], bits: int) -> bytes:
    """Returns the header of a scan of all DC. `bits`: successive approximation, high and low (T.81, B.2.3)."""
    body = bytes([3, 1, tables[0], 2, tables[1], 3, tables[2], 0, 0, bits])
    return struct.pack(">BBH", 0xFF, SOS, 2 + len(body)) + body


def _huffman(counted: list[int]) -> tuple[bytes, np.ndarray, np.ndarray]:
    """Returns the best table for symbols that occur so often, as in a DHT, and code and its length by symbol.

    At most 12 symbols occur, so no code is longer than 12 bits.
    """
    heap = [(0, [UNUSED])] + [(count, [symbol]) for symbol, count in enumerate(counted) if count]
    heapq.heapify(heap)
    depth = dict.fromkeys([symbol for _, symbols in heap for symbol in symbols], 0)
    while len(heap) > 1:
        (one, some), (other, more) = heapq.heappop(heap), heapq.heappop(heap)
        for symbol in some + more:
            depth[symbol] += 1
        heapq.heappush(heap, (one + other, some + more))
    order = sorted((length, symbol) for symbol, length in depth.items())
    codes, lengths, per_length = np.zeros(16, np.int32), np.zeros(16, np.int32), bytearray(16)
    code = 0
    for length, symbol in order[:-1]:  # without UNUSED
        codes[symbol], lengths[symbol] = code >> 16 - length, length
        per_length[length - 1] += 1
        code += 1 << 16 - length
    return bytes(per_length) + bytes(symbol for _, symbol in order[:-1]), codes, lengths


def _packed(codes: np.ndarray, lengths: np.ndarray) -> bytes:
    """Returns codes of these lengths in bits as a scan's data."""
    shifts = lengths[:, None] - np.arange(1, lengths.max() + 1, dtype=np.int32)
    return _scan_data((codes[:, None] >> np.maximum(shifts, 0) & 1)[shifts >= 0])


def _scan_data(bits: np.ndarray) -> bytes:
    """Returns bits as a scan's data: filled up with 1, and a 0 after each byte of 1 bits (T.81, F.1.2.3)."""
    filled = np.concatenate([bits.astype(np.uint8), np.ones(-len(bits) % 8, np.uint8)])
    return np.packbits(filled).tobytes().replace(b"\xff", b"\xff\0")
