"""ICC profiles: which are applied, and how one is made for colours that a file describes by numbers.

PNG (gAMA, cHRM, cICP) and BMP (LCS_CALIBRATED_RGB) describe an RGB space by its chromaticities and its transfer
function. littlecms converts such a space like any other once it has a profile, and Pillow cannot make one.
"""

import struct
from collections.abc import Callable, Sequence

PROFILE = 1024 * 1024  # bytes; printers' largest profiles come near, cameras and screens have some thousands
DEVICES = (b"scnr", b"mntr", b"prtr", b"spac")  # not links between devices, abstract or named colours
AS_SRGB = b""  # the profile of an image whose values are already sRGB, or so near that nobody sees the difference

Curve = Callable[[float], float]  # from the encoded value to light, both 0 to 1
Point = tuple[float, float]  # CIE x and y

D65: Point = (0.3127, 0.3290)
SRGB_SPACE = (D65, (0.64, 0.33), (0.30, 0.60), (0.15, 0.06))  # white, red, green, blue (IEC 61966-2-1)
NEAR_POINT = 0.01  # of x or y; libpng's tolerance for primaries that are called sRGB's
NEAR_GAMMA = 0.05  # of the exponent's share; libpng's threshold for a correction that is worth its cost
GAMMA = 2.2  # the exponent that comes nearest to sRGB's transfer function
GAMMAS = (0.1, 10.0)  # exponents beyond are no description of an image


def fits(profile: bytes | None, space: bytes) -> bool:
    """Whether a profile is of a device and of this colour space (ICC.1, 7.2), and not too large.

    Where the space is not the image's, Pillow to 12.1 reads past its buffers (CVE-2026-59205).
    """
    return bool(profile) and len(profile) <= PROFILE and profile[12:16] in DEVICES and profile[16:20] == space


def described(space: Sequence[Point] | None, gammas: Sequence[float] | None, grey: bool) -> bytes | None:
    """The profile of white, red, green and blue, and of the exponents of the three: sRGB's where one is None.

    AS_SRGB where they come near sRGB, and None where they are no possible space.
    """
    if gammas and not all(GAMMAS[0] <= gamma <= GAMMAS[1] for gamma in gammas):
        return None
    near = not gammas or all(abs(gamma / GAMMA - 1) <= NEAR_GAMMA for gamma in gammas)
    curves = [srgb] * 3 if near else [lambda value, gamma=gamma: value**gamma for gamma in gammas]
    if near and (grey or not space or _near_srgb(space)):
        return AS_SRGB
    return profile(space or SRGB_SPACE, curves, grey)


def _near_srgb(space: Sequence[Point]) -> bool:
    return all(
        abs(here - there) <= NEAR_POINT
        for point, wanted in zip(space, SRGB_SPACE, strict=True)
        for here, there in zip(point, wanted, strict=True)
    )


def profile(space: Sequence[Point], curves: Sequence[Curve], grey: bool) -> bytes | None:
    """A profile of ICC.1:2001-04 for an RGB space, or for its neutral colours alone; None where it is no space."""
    if grey:
        return _written(b"GRAY", {b"kTRC": _curve(curves[0])})
    columns = _columns(space)
    if not columns:
        return None
    tags = {name + b"XYZ": _xyz(column) for name, column in zip((b"r", b"g", b"b"), columns, strict=True)}
    tags |= {name + b"TRC": _curve(curve) for name, curve in zip((b"r", b"g", b"b"), curves, strict=True)}
    return _written(b"RGB ", tags)


D50 = (0.9642, 1.0, 0.8249)  # XYZ of the white that profiles refer to
# Bradford's transform, by which profiles carry colours from another white to theirs, and its inverse (ICC.1:2010,
# annex E).
BRADFORD = ((0.8951, 0.2664, -0.1614), (-0.7502, 1.7135, 0.0367), (0.0389, -0.0685, 1.0296))
UNDONE = ((0.9869929, -0.1470543, 0.1599627), (0.4323053, 0.5183603, 0.0492912), (-0.0085287, 0.0400428, 0.9684867))


def _columns(space: Sequence[Point]) -> list[tuple[float, ...]] | None:
    """XYZ of full red, green and blue for D50; None where they span no space."""
    white, *primaries = ((x, y, 1 - x - y) for x, y in space)
    volume = _determinant(*primaries)
    if white[1] <= 0 or abs(volume) < 1e-4:  # of sRGB 0.11
        return None
    white = [part / white[1] for part in white]
    # How much of each makes white, by Cramer's rule.
    shares = [_determinant(*(white if at == place else one for at, one in enumerate(primaries))) / volume
              for place in range(3)]  # fmt: skip
    came, shown = _times(BRADFORD, white), _times(BRADFORD, D50)
    if any(abs(part) < 1e-4 for part in came):
        return None
    scale = [there / here for here, there in zip(came, shown, strict=True)]
    columns = []
    for share, primary in zip(shares, primaries, strict=True):
        cones = _times(BRADFORD, [share * part for part in primary])
        columns.append(_times(UNDONE, [part * more for part, more in zip(cones, scale, strict=True)]))
    return columns if all(abs(part) < 8 for column in columns for part in column) else None


def _times(matrix, vector) -> tuple[float, ...]:
    return tuple(sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix)


def _determinant(a, b, c) -> float:
    return sum(a[i] * (b[(i + 1) % 3] * c[(i + 2) % 3] - b[(i + 2) % 3] * c[(i + 1) % 3]) for i in range(3))


def _curve(curve: Curve) -> bytes:
    """One value of 16 bits for each of 8: pictures are converted with 8 bits."""
    values = (round(65535 * min(1.0, max(0.0, curve(value / 255)))) for value in range(256))
    return b"curv" + bytes(4) + struct.pack(">I256H", 256, *values)


def _xyz(xyz: Sequence[float]) -> bytes:
    return b"XYZ " + bytes(4) + _fixed(xyz)


def _fixed(values: Sequence[float]) -> bytes:
    return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))


def _written(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    tags = {b"wtpt": _xyz(D50), **tags}
    table, body, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, tag in tags.items():
        table += name + struct.pack(">II", start + len(body), len(tag))
        body += tag  # each has a multiple of 4 bytes
    head = struct.pack(">I4xI4s4s4s12x4s28x", start + len(body), 0x02400000, b"mntr", space, b"XYZ ", b"acsp")
    return (head + _fixed(D50)).ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


# Code points of ITU-T H.273, as PNG's cICP has them.


def srgb(value: float) -> float:
    return value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4


def bt709(value: float) -> float:
    return value / 4.5 if value < 0.081 else ((value + 0.099) / 1.099) ** (1 / 0.45)


WHITE = 203  # cd/m2 of a white sheet in HDR (ITU-R BT.2408); it becomes white, and what is brighter too


def pq(value: float) -> float:
    """SMPTE ST 2084 and ITU-R BT.2100: up to 10,000 cd/m2."""
    power = value ** (32 / 2523)
    return 10_000 / WHITE * (max(0.0, power - 3424 / 4096) / (2413 / 128 - 2392 / 128 * power)) ** (16384 / 2610)


def hlg(value: float) -> float:
    """ITU-R BT.2100 on a screen of 1,000 cd/m2, whose exponent is taken of each colour and not of their luminance."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    scene = value**2 / 3 if value <= 0.5 else (2.718281828459045 ** ((value - c) / a) + b) / 12
    return 1000 / WHITE * scene**1.2


TRANSFERS: dict[int, Curve] = {
    **dict.fromkeys((1, 6, 14, 15), bt709),
    4: lambda value: value**2.2,
    5: lambda value: value**2.8,
    8: lambda value: value,
    13: srgb,
    16: pq,
    18: hlg,
}
PRIMARIES = {
    1: SRGB_SPACE,
    5: (D65, (0.64, 0.33), (0.29, 0.60), (0.15, 0.06)),
    **dict.fromkeys((6, 7), (D65, (0.630, 0.340), (0.310, 0.595), (0.155, 0.070))),
    9: (D65, (0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),  # BT.2020
    11: ((0.314, 0.351), (0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),  # DCI-P3
    12: (D65, (0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),  # Display P3
}


def coded(primaries: int, transfer: int, matrix: int, full: int, grey: bool) -> bytes | None:
    """The profile of four code points; None for those that are not RGB or not in the tables above."""
    if matrix != 0 or full not in (0, 1) or primaries not in PRIMARIES or transfer not in TRANSFERS:
        return None
    if transfer == 13 and full and (grey or primaries == 1):
        return AS_SRGB
    curve = TRANSFERS[transfer]
    # The narrow range of 8 bits is 16 to 235.
    used = curve if full else lambda value: curve(min(1.0, max(0.0, (value * 255 - 16) / 219)))
    return profile(PRIMARIES[primaries], [used] * 3, grey)
