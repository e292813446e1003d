"""Colours and ICC profiles, computed from their definitions only.

The tests derive from them what a picture must show. Nothing here uses the code under test.
"""

import struct
from itertools import product
from math import atan2, cos, degrees, exp, hypot, radians, sin

Colour = tuple[int, int, int]

# Matrices from RGB to XYZ. The columns are red, green and blue as the space's profile states them for D50 (ICC.1,
# annex E; Apple's and Adobe's published profiles).
SRGB = [(0.43607, 0.38515, 0.14307), (0.22249, 0.71687, 0.06061), (0.01392, 0.09708, 0.71410)]
P3 = [(0.51512, 0.29198, 0.15710), (0.24120, 0.69225, 0.06657), (-0.00105, 0.04189, 0.78407)]
ADOBE = [(0.60974, 0.20528, 0.14919), (0.31111, 0.62567, 0.06322), (0.01947, 0.06087, 0.74457)]
# Elle Stone's published profile.
BT2020 = [(0.67346, 0.16566, 0.12505), (0.27904, 0.67534, 0.04561), (-0.00192, 0.02998, 0.79684)]
D50 = (0.9642, 1.0, 0.8249)
ADOBE_GAMMA = 0x233 / 256


def linear(value: float) -> float:
    """From a value of sRGB to light, both 0 to 1 (IEC 61966-2-1)."""
    return value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4


def encoded(value: float) -> float:
    """From light to a value of sRGB."""
    return value * 12.92 if value <= 0.0031308 else 1.055 * value ** (1 / 2.4) - 0.055


def times(matrix, vector):
    return tuple(sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix)


def inverse(m):
    """Of a matrix of 3x3, by its adjugate."""
    cross = [[m[(j + 1) % 3][(i + 1) % 3] * m[(j + 2) % 3][(i + 2) % 3] for j in range(3)] for i in range(3)]
    other = [[m[(j + 1) % 3][(i + 2) % 3] * m[(j + 2) % 3][(i + 1) % 3] for j in range(3)] for i in range(3)]
    adjugate = [[a - b for a, b in zip(one, two, strict=True)] for one, two in zip(cross, other, strict=True)]
    determinant = sum(m[0][k] * adjugate[k][0] for k in range(3))
    return [[value / determinant for value in row] for row in adjugate]


def from_xyz(xyz) -> Colour:
    """A colour of sRGB with 8 bits from XYZ for D50."""
    return tuple(round(255 * encoded(min(1, max(0, part)))) for part in times(inverse(SRGB), xyz))


def to_xyz(colour: Colour):
    return times(SRGB, [linear(value / 255) for value in colour])


def to_lab(colour: Colour):
    """CIE Lab for D50 of a colour of sRGB."""

    def f(t):
        return t ** (1 / 3) if t > 216 / 24389 else (24389 / 27 * t + 16) / 116

    x, y, z = (f(part / white) for part, white in zip(to_xyz(colour), D50, strict=True))
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def from_lab(lab) -> Colour:
    y = (lab[0] + 16) / 116

    def f(t):
        return t**3 if t > 6 / 29 else (116 * t - 16) * 27 / 24389

    return from_xyz([f(t) * white for t, white in zip((y + lab[1] / 500, y, y - lab[2] / 200), D50, strict=True)])


def ciede2000(one, other) -> float:
    """The difference of two colours in Lab (CIE 142; Sharma, Wu and Dalal 2005). The eye can see 1."""
    chroma7 = ((hypot(*one[1:]) + hypot(*other[1:])) / 2) ** 7
    g = 0.5 * (1 - (chroma7 / (chroma7 + 25**7)) ** 0.5)
    c1, c2 = (hypot((1 + g) * a, b) for _, a, b in (one, other))
    h1, h2 = (degrees(atan2(b, (1 + g) * a)) % 360 if a or b else 0 for _, a, b in (one, other))
    turn = (h2 - h1 + 180) % 360 - 180 if c1 * c2 else 0
    if turn == -180:
        turn = 180
    light, c = (one[0] + other[0]) / 2, (c1 + c2) / 2
    h = (h1 + h2) / 2 + (180 * (abs(h1 - h2) > 180) if c1 * c2 else (h1 + h2) / 2)
    t = 1 - 0.17 * cos(radians(h - 30)) + 0.24 * cos(radians(2 * h))
    t += 0.32 * cos(radians(3 * h + 6)) - 0.2 * cos(radians(4 * h - 63))
    lighter = (other[0] - one[0]) / (1 + 0.015 * (light - 50) ** 2 / (20 + (light - 50) ** 2) ** 0.5)
    strong = (c2 - c1) / (1 + 0.045 * c)
    hue = 2 * (c1 * c2) ** 0.5 * sin(radians(turn / 2)) / (1 + 0.015 * c * t)
    rotation = -2 * (c**7 / (c**7 + 25**7)) ** 0.5 * sin(radians(60 * exp(-(((h - 275) / 25) ** 2))))
    return (lighter**2 + strong**2 + hue**2 + rotation * strong * hue) ** 0.5


# Profiles of ICC.1:2001-04 (version 2)


def profile(device_class: bytes, space: bytes, pcs: bytes, tags: dict[bytes, bytes]) -> bytes:
    """A profile from its device class, its colour space, its profile connection space and its tags."""
    tags = {b"desc": b"desc" + bytes(4) + struct.pack(">I", 5) + b"card\0" + bytes(78), **tags}
    tags = {b"cprt": b"text" + bytes(4) + b"none\0", b"wtpt": xyz_tag(D50), **tags}
    table, body, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, tag in tags.items():
        table += name + struct.pack(">II", start + len(body), len(tag))
        body += tag + bytes(-len(tag) % 4)
    head = struct.pack(">I4sI4s4s4s12x4s", start + len(body), b"none", 0x02400000, device_class, space, pcs, b"acsp")
    return (head + bytes(28) + fixed(D50)).ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def fixed(values) -> bytes:
    return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))


def xyz_tag(xyz) -> bytes:
    return b"XYZ " + bytes(4) + fixed(xyz)


def curve(*values: int) -> bytes:
    """curveType. One value is an exponent times 256. More values are a table, each 0 to 65,535."""
    return b"curv" + bytes(4) + struct.pack(f">I{len(values)}H", len(values), *values)


def rgb_profile(space, tone: bytes) -> bytes:
    """A profile from a matrix as above, with the same curve for all three colours."""
    columns = zip((b"rXYZ", b"gXYZ", b"bXYZ"), zip(*space, strict=True), strict=True)
    colourants = {name: xyz_tag(column) for name, column in columns}
    return profile(b"mntr", b"RGB ", b"XYZ ", {**colourants, b"rTRC": tone, b"gTRC": tone, b"bTRC": tone})


SRGB_TONE = curve(*(round(65535 * linear(i / 1023)) for i in range(1024)))
P3_PROFILE = rgb_profile(P3, SRGB_TONE)
ADOBE_PROFILE = rgb_profile(ADOBE, curve(0x233))
GREY_GAMMA = 0x1CD / 256
GREY_PROFILE = profile(b"mntr", b"GRAY", b"XYZ ", {b"kTRC": curve(0x1CD)})

# The colours of cyan, magenta and yellow inks, each printed fully or not at all. They differ from what subtracting the
# inks from white would give, so that the tests notice a profile that is not applied.
INKS = {
    (0, 0, 0): (255, 255, 255),
    (1, 0, 0): (40, 150, 200),
    (0, 1, 0): (190, 50, 120),
    (0, 0, 1): (240, 220, 60),
    (1, 1, 0): (60, 60, 140),
    (0, 1, 1): (200, 70, 50),
    (1, 0, 1): (50, 140, 80),
    (1, 1, 1): (80, 70, 60),
}


def ink_lab(c: int, m: int, y: int, k: int) -> tuple[int, int, int]:
    """The colour of inks in Lab with 8 bits, as lut8Type encodes it."""
    light, a, b = (0, 0, 0) if k else to_lab(INKS[c, m, y])
    return min(255, round(light * 2.55)), round(a) + 128, round(b) + 128


def cmyk_profile() -> bytes:
    """A profile of a printer: a table (lut8Type) with two points for each ink."""
    identity = b"".join(fixed(row) for row in ((1, 0, 0), (0, 1, 0), (0, 0, 1)))
    ramp = bytes(range(256))
    nodes = b"".join(bytes(ink_lab(*inks)) for inks in product((0, 1), repeat=4))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + identity + ramp * 4 + nodes + ramp * 3
    return profile(b"prtr", b"CMYK", b"Lab ", {b"A2B0": table})
