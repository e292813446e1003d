"""ICC profiles: which profiles are applied, and profiles created for colour spaces that a file describes by numbers.

PNG (gAMA, cHRM, cICP) and BMP (LCS_CALIBRATED_RGB) describe an RGB space by its chromaticities and its transfer
function. Once such a space has a profile, littlecms converts it like any other. Pillow cannot create a profile, so this
module does.

A space is a sequence of four points: white, red, green and blue, each as CIE x and y.
"""

import struct
from collections.abc import Callable, Sequence

# Maximum size of a profile in bytes. The largest profiles of printers come near. Those of cameras and screens have some
# thousand bytes.
MAX_PROFILE_BYTES = 1024 * 1024
DEVICES = (b"scnr", b"mntr", b"prtr", b"spac")  # not device links, abstract profiles or named colours (ICC.1, 7.2.5)
AS_SRGB = b""  # the profile of an image whose values are sRGB already, or so near that the eye sees no difference

Curve = Callable[[float], float]  # from the encoded value to light, both 0 to 1
Point = tuple[float, float]  # CIE x and y

D65: Point = (0.3127, 0.3290)
SRGB_SPACE = (D65, (0.64, 0.33), (0.30, 0.60), (0.15, 0.06))  # white, red, green, blue (IEC 61966-2-1)
NEAR_POINT = 0.01  # of x or y; libpng's tolerance for primaries that it takes for sRGB's
NEAR_GAMMA = 0.05  # of the exponent, as a ratio; libpng's threshold below which it does not correct
GAMMA = 2.2  # the exponent that is nearest to sRGB's transfer function
GAMMAS = (0.1, 10.0)  # lowest and highest exponent; others do not describe an image


def fits(profile: bytes | None, space: bytes) -> bool:
    """Whether a profile is of a device, of this colour space (ICC.1, 7.2.6) and not larger than MAX_PROFILE_BYTES.

    `space` is a signature of 4 bytes, as b"RGB ". It must be the image's space. Otherwise Pillow up to 12.1 reads past
    its buffers (CVE-2026-59205).
    """
    return bool(profile) and len(profile) <= MAX_PROFILE_BYTES and profile[12:16] in DEVICES and profile[16:20] == space


def described(space: Sequence[Point] | None, gammas: Sequence[float] | None, grey: bool) -> bytes | None:
    """Returns the profile of a space and of the exponents of red, green and blue. None as an argument means sRGB's.

    `grey`: of neutral colours only. Returns AS_SRGB where the values are near sRGB, and None where they cannot be a
    colour space.
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
        abs(value - reference) <= NEAR_POINT
        for point, srgb_point in zip(space, SRGB_SPACE, strict=True)
        for value, reference in zip(point, srgb_point, strict=True)
    )


def profile(space: Sequence[Point], curves: Sequence[Curve], grey: bool) -> bytes | None:
    """Returns a profile of ICC.1:2001-04 for an RGB space, or with `grey` for its neutral colours only.

    `curves` are those of red, green and blue. Returns None where the four points do not span a space.
    """
    if grey:
        return _encoded_profile(b"GRAY", {b"kTRC": _curve_tag(curves[0])})
    columns = _columns(space)
    if not columns:
        return None
    tags = {name + b"XYZ": _xyz_tag(column) for name, column in zip((b"r", b"g", b"b"), columns, strict=True)}
    tags |= {name + b"TRC": _curve_tag(curve) for name, curve in zip((b"r", b"g", b"b"), curves, strict=True)}
    return _encoded_profile(b"RGB ", tags)


D50 = (0.9642, 1.0, 0.8249)  # XYZ of the white that profiles refer to
# Bradford's transform and its inverse. Profiles use it to adapt colours of another white to D50 (ICC.1:2010, annex E).
BRADFORD = ((0.8951, 0.2664, -0.1614), (-0.7502, 1.7135, 0.0367), (0.0389, -0.0685, 1.0296))
BRADFORD_INVERSE = (
    (0.9869929, -0.1470543, 0.1599627),
    (0.4323053, 0.5183603, 0.0492912),
    (-0.0085287, 0.0400428, 0.9684867),
)


def _columns(space: Sequence[Point]) -> list[tuple[float, ...]] | None:
    """Returns XYZ of full red, green and blue, adapted to D50; None where the four points do not span a space."""
    white, *primaries = ((x, y, 1 - x - y) for x, y in space)
    volume = _determinant(*primaries)
    if white[1] <= 0 or abs(volume) < 1e-4:  # sRGB's volume is 0.11
        return None
    white = [part / white[1] for part in white]
    # How much of each primary gives white, by Cramer's rule.
    shares = [
        _determinant(*(white if at == place else primary for at, primary in enumerate(primaries))) / volume
        for place in range(3)
    ]
    cones_of_white = _times(BRADFORD, white)
    cones_of_d50 = _times(BRADFORD, D50)
    if any(abs(part) < 1e-4 for part in cones_of_white):
        return None
    scale = [after / before for before, after in zip(cones_of_white, cones_of_d50, strict=True)]
    columns = []
    for share, primary in zip(shares, primaries, strict=True):
        cones = _times(BRADFORD, [share * part for part in primary])
        columns.append(_times(BRADFORD_INVERSE, [part * factor for part, factor in zip(cones, scale, strict=True)]))
    return columns if all(abs(part) < 8 for column in columns for part in column) else None


def _times(matrix: Sequence[Sequence[float]], vector: Sequence[float]) -> tuple[float, ...]:
    return tuple(sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix)


def _determinant(a: Sequence[float], b: Sequence[float], c: Sequence[float]) -> float:
    return sum(a[i] * (b[(i + 1) % 3] * c[(i + 2) % 3] - b[(i + 2) % 3] * c[(i + 1) % 3]) for i in range(3))


def _curve_tag(curve: Curve) -> bytes:
    """curveType (ICC.1:2001-04): a value of 16 bits for each value of 8 bits, as the pictures have 8 bits."""
    values = (round(65535 * min(1.0, max(0.0, curve(value / 255)))) for value in range(256))
    return b"curv" + bytes(4) + struct.pack(">I256H", 256, *values)


def _xyz_tag(xyz: Sequence[float]) -> bytes:
    return b"XYZ " + bytes(4) + _fixed_point(xyz)


def _fixed_point(values: Sequence[float]) -> bytes:
    """s15Fixed16Number: signed, with 16 fractional bits."""
    return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))


def _encoded_profile(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    """Header, tag table and tags (ICC.1:2001-04, section 6), with the white point D50."""
    tags = {b"wtpt": _xyz_tag(D50), **tags}
    table, body, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, tag in tags.items():
        table += name + struct.pack(">II", start + len(body), len(tag))
        body += tag  # each tag has a multiple of 4 bytes
    head = struct.pack(">I4xI4s4s4s12x4s28x", start + len(body), 0x02400000, b"mntr", space, b"XYZ ", b"acsp")
    return (head + _fixed_point(D50)).ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


# Transfer functions and primaries of ITU-T H.273, by the code points that PNG's cICP holds


def srgb(value: float) -> float:
    """sRGB (IEC 61966-2-1)."""
    return value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4


def bt709(value: float) -> float:
    """ITU-R BT.709; those of BT.601 and BT.2020 are the same."""
    return value / 4.5 if value < 0.081 else ((value + 0.099) / 1.099) ** (1 / 0.45)


WHITE = 203  # cd/m2 of a white sheet in HDR (ITU-R BT.2408). It becomes white, and all that is brighter does too


def pq(value: float) -> float:
    """SMPTE ST 2084 and ITU-R BT.2100: up to 10,000 cd/m2. 1 is WHITE."""
    power = value ** (32 / 2523)
    return 10_000 / WHITE * (max(0.0, power - 3424 / 4096) / (2413 / 128 - 2392 / 128 * power)) ** (16384 / 2610)


def hlg(value: float) -> float:
    """ITU-R BT.2100 on a screen of 1,000 cd/m2. 1 is WHITE.

    The screen's exponent 1.2 is applied to each colour, not to the luminance: a profile has one curve for each colour.
    """
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


def coded(primaries: int, transfer: int, matrix: int, full_range: int, grey: bool) -> bytes | None:
    """Returns the profile of four code points (ITU-T H.273; PNG 11.3.2.6).

    Returns AS_SRGB for sRGB, and None where the code points do not mean RGB or are not in the tables above.
    """
    if matrix != 0 or full_range not in (0, 1) or primaries not in PRIMARIES or transfer not in TRANSFERS:
        return None
    if transfer == 13 and full_range and (grey or primaries == 1):
        return AS_SRGB
    curve = TRANSFERS[transfer]

    def narrow_range(value: float) -> float:
        """Of 8 bits, 16 is black and 235 is white."""
        return curve(min(1.0, max(0.0, (value * 255 - 16) / 219)))

    return profile(PRIMARIES[primaries], [curve if full_range else narrow_range] * 3, grey)
