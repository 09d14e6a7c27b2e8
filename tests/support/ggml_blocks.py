"""What the bytes of a quantized block mean, number by number: a slow reference in plain Python.

Written from the layouts that https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
declares, and not from the `gguf` package, whose results it is to check. Only the lattices of the IQ
kinds are taken from there (`lattice`); SHA256 holds them against ggml's own tables.
"""

import hashlib
import struct

import numpy as np
from gguf import quants

# Of each lattice as bytes, row by row: computed from the tables `iq*_grid` in ggml-common.h.
SHA256 = {
    "IQ2_XXS": "05826b5d3e472a3a",
    "IQ2_XS": "06e47aaca60b4dc1",
    "IQ2_S": "e1aa1473412b0552",
    "IQ3_XXS": "46e35f5a997efdee",
    "IQ3_S": "bd1af4945a1717c6",
    "IQ1_S": "07540ffc1aeaf6ad",
}
_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_FP4 = (0, 0.5, 1, 1.5, 2, 3, 4, 6)  # E2M1 of the OCP microscaling formats


def lattice(kind):
    """The points that an IQ kind's indices name: [points, numbers] int8."""
    table = getattr(quants, kind)
    table.init_grid()
    return table.grid.reshape(table.grid_shape).astype(np.int8)


def checksum(kind):
    return hashlib.sha256(lattice(kind).tobytes()).hexdigest()[:16]


def half(block, at):
    return struct.unpack_from("<e", block, at)[0]


def word(block, at, form="<H"):
    return struct.unpack_from(form, block, at)[0]


def nibble(block, at, high):
    return block[at] >> 4 if high else block[at] & 15


def sign(bits, at):
    return -1 if bits >> at & 1 else 1


def seven_signs(bits):
    """Eight signs in seven bits: their number of minuses is even."""
    return bits | (bits.bit_count() & 1) << 7


# Blocks of 32: the low nibbles of 16 bytes, then the high ones.


def q4_0(b):
    return [half(b, 0) * (nibble(b, 2 + i % 16, i >= 16) - 8) for i in range(32)]


def q4_1(b):
    return [half(b, 0) * nibble(b, 4 + i % 16, i >= 16) + half(b, 2) for i in range(32)]


def q5_0(b):
    fifth = word(b, 2, "<I")
    fives = [nibble(b, 6 + i % 16, i >= 16) + 16 * (fifth >> i & 1) for i in range(32)]
    return [half(b, 0) * (five - 16) for five in fives]


def q5_1(b):
    fifth = word(b, 4, "<I")
    fives = [nibble(b, 8 + i % 16, i >= 16) + 16 * (fifth >> i & 1) for i in range(32)]
    return [half(b, 0) * five + half(b, 2) for five in fives]


def q8_0(b):
    return [half(b, 0) * word(b, 2 + i, "<b") for i in range(32)]


def iq4_nl(b):
    return [half(b, 0) * _IQ4[nibble(b, 2 + i % 16, i >= 16)] for i in range(32)]


def mxfp4(b):
    fours = [nibble(b, 1 + i % 16, i >= 16) for i in range(32)]
    return [2.0 ** (b[0] - 127) * sign(four, 3) * _FP4[four & 7] for four in fours]


# Blocks of 256. Of element i: n is its half, j which 32 of that half, and r its place in those.


def places():
    return [(i, i // 128, i % 128 // 32, i % 32) for i in range(256)]


def q2_k(b):
    values = []
    for _, n, j, r in places():
        scale = b[8 * n + 2 * j + r // 16]
        two = b[16 + 32 * n + r] >> 2 * j & 3
        values.append(half(b, 80) * (scale & 15) * two - half(b, 82) * (scale >> 4))
    return values


def q3_k(b):
    values = []
    for _, n, j, r in places():
        k = 8 * n + 2 * j + r // 16
        scale = nibble(b, 96 + k % 8, k >= 8) | (b[104 + k % 4] >> 2 * (k // 4) & 3) << 4
        three = (b[32 + 32 * n + r] >> 2 * j & 3) - (0 if b[r] >> 4 * n + j & 1 else 4)
        values.append(half(b, 108) * (scale - 32) * three)
    return values


def k4_scales(packed, k):
    """Scale and minimum, six bits each, of the k-th 32 of a block."""
    if k < 4:
        return packed[k] & 63, packed[k + 4] & 63
    low = packed[k + 4]
    return low & 15 | packed[k - 4] >> 6 << 4, low >> 4 | packed[k] >> 6 << 4


def q4_k(b):
    values = []
    for i, _, _, r in places():
        scale, least = k4_scales(b[4:16], i // 32)
        four = nibble(b, 16 + 32 * (i // 64) + r, i % 64 >= 32)
        values.append(half(b, 0) * scale * four - half(b, 2) * least)
    return values


def q5_k(b):
    values = []
    for i, _, _, r in places():
        scale, least = k4_scales(b[4:16], i // 32)
        five = nibble(b, 48 + 32 * (i // 64) + r, i % 64 >= 32) + 16 * (b[16 + r] >> i // 32 & 1)
        values.append(half(b, 0) * scale * five - half(b, 2) * least)
    return values


def q6_k(b):
    values = []
    for _, n, j, r in places():
        low = nibble(b, 64 * n + 32 * (j % 2) + r, j >= 2)
        six = (low | (b[128 + 32 * n + r] >> 2 * j & 3) << 4) - 32
        values.append(half(b, 208) * word(b, 192 + 8 * n + 2 * j + r // 16, "<b") * six)
    return values


def tq1_0(b):
    bytes_and_powers = [(r, n) for n in range(5) for r in range(32)]
    bytes_and_powers += [(32 + r, n) for n in range(5) for r in range(16)]
    bytes_and_powers += [(48 + r, n) for n in range(4) for r in range(4)]
    return [half(b, 52) * ((b[at] * 3**n % 256 * 3 >> 8) - 1) for at, n in bytes_and_powers]


def tq2_0(b):
    return [half(b, 64) * ((b[32 * n + r] >> 2 * j & 3) - 1) for _, n, j, r in places()]


def iq4_xs(b):
    values = []
    for i, _, _, r in places():
        k = i // 32
        scale = nibble(b, 4 + k // 2, k % 2) | (word(b, 2) >> 2 * k & 3) << 4
        values.append(half(b, 0) * (scale - 32) * _IQ4[nibble(b, 8 + 16 * k + r % 16, r >= 16)])
    return values


# IQ kinds with a lattice, by 8 numbers: k is which 32 of the block, r which 8 of those.


def eights():
    return [(k, r) for k in range(8) for r in range(4)]


def iq2_xxs(b):
    values, points = [], lattice("IQ2_XXS").tolist()
    for k, r in eights():
        packed = word(b, 6 + 8 * k, "<I")
        scale = half(b, 0) * (0.5 + (packed >> 28)) / 4
        signs = seven_signs(packed >> 7 * r & 127)
        point = points[b[2 + 8 * k + r]]
        values += [scale * point[m] * sign(signs, m) for m in range(8)]
    return values


def iq2_xs(b):
    values, points = [], lattice("IQ2_XS").tolist()
    for k, r in eights():
        packed = word(b, 2 + 8 * k + 2 * r)
        scale = half(b, 0) * (0.5 + nibble(b, 66 + k, r >= 2)) / 4
        signs = seven_signs(packed >> 9)
        values += [scale * points[packed & 511][m] * sign(signs, m) for m in range(8)]
    return values


def iq2_s(b):
    values, points = [], lattice("IQ2_S").tolist()
    for k, r in eights():
        point = points[b[2 + 4 * k + r] | (b[66 + k] >> 2 * r & 3) << 8]
        scale = half(b, 0) * (0.5 + nibble(b, 74 + k, r >= 2)) / 4
        values += [scale * point[m] * sign(b[34 + 4 * k + r], m) for m in range(8)]
    return values


def iq3_xxs(b):
    values, points = [], lattice("IQ3_XXS").tolist()
    for k, r in eights():
        packed = word(b, 66 + 4 * k, "<I")
        scale = half(b, 0) * (0.5 + (packed >> 28)) / 2
        signs = seven_signs(packed >> 7 * r & 127)
        point = points[b[2 + 8 * k + 2 * r]] + points[b[3 + 8 * k + 2 * r]]
        values += [scale * point[m] * sign(signs, m) for m in range(8)]
    return values


def iq3_s(b):
    values, points = [], lattice("IQ3_S").tolist()
    for k, r in eights():
        scale = half(b, 0) * (1 + 2 * nibble(b, 106 + k // 2, k % 2))
        fours = [2 * r, 2 * r + 1]
        point = [
            x for four in fours for x in points[b[2 + 8 * k + four] | (b[66 + k] >> four & 1) << 8]
        ]
        values += [scale * point[m] * sign(b[74 + 4 * k + r], m) for m in range(8)]
    return values


def iq1_s(b):
    values, points = [], lattice("IQ1_S").tolist()
    for k, r in eights():
        packed = word(b, 34 + 2 * k)
        scale = half(b, 0) * (2 * (packed >> 12 & 7) + 1)
        point = points[b[2 + 4 * k + r] | (packed >> 3 * r & 7) << 8]
        values += [scale * (x + 0.125 * sign(packed, 15)) for x in point]
    return values


def iq1_m(b):
    values, points = [], lattice("IQ1_S").tolist()
    packed = [word(b, 48 + 2 * k) for k in range(4)]
    bits = sum((each >> 12) << 4 * k for k, each in enumerate(packed))
    whole = half(struct.pack("<H", bits), 0)
    for k, r in eights():
        scale = whole * (2 * (packed[k // 2] >> 6 * (k % 2) + 3 * (r // 2) & 7) + 1)
        more = nibble(b, 32 + 2 * k + r // 2, r % 2)
        point = points[b[4 * k + r] | (more & 7) << 8]
        values += [scale * (x + 0.125 * sign(more, 3)) for x in point]
    return values


def f32(b):
    return list(struct.unpack("<f", b))


def f16(b):
    return [half(b, 0)]


def bf16(b):
    return list(struct.unpack("<f", b"\0\0" + b))


REFERENCES = {
    function.__name__.upper(): function
    for function in (
        *(f32, f16, bf16, q4_0, q4_1, q5_0, q5_1, q8_0, q2_k, q3_k, q4_k, q5_k, q6_k, tq1_0, tq2_0),
        *(mxfp4, iq1_s, iq1_m, iq2_xxs, iq2_xs, iq2_s, iq3_xxs, iq3_s, iq4_nl, iq4_xs),
    )
}
"""Kind -> the numbers of one block of bytes."""

# Where the 16-bit floats of a block stand.
HALVES = {
    **dict.fromkeys(("F16", "BF16", "Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS"), (0,)),
    **dict.fromkeys(("IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    **{"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,), "TQ1_0": (52,), "TQ2_0": (64,)},
}
