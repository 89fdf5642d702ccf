"""Values of GGML's quantized blocks, one by one, from the layouts of `ggml-common.h`.

Scalar code in double precision, as slow as it is plain: each function takes the bytes of one block
and lists its values in order. https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

import struct

# The 16 levels of IQ4_NL and IQ4_XS, and of E2M1 (OCP microscaling formats 1.0, section 5.3.3).
IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6)


def half(raw):
    return struct.unpack("<e", raw)[0]


def signed(byte):
    return byte - 256 if byte > 127 else byte


def nibbles(qs):
    """Low nibbles of all bytes, then the high ones."""
    return [q & 15 for q in qs] + [q >> 4 for q in qs]


def bf16(b):
    return [struct.unpack("<f", b"\0\0" + b)[0]]


def q4_0(b):
    return [half(b[:2]) * (q - 8) for q in nibbles(b[2:])]


def q4_1(b):
    return [half(b[:2]) * q + half(b[2:4]) for q in nibbles(b[4:])]


def _fifth(raw):
    bits = int.from_bytes(raw, "little")
    return [16 * (bits >> i & 1) for i in range(32)]


def q5_0(b):
    fives = zip(nibbles(b[6:]), _fifth(b[2:6]), strict=True)
    return [half(b[:2]) * (low + high - 16) for low, high in fives]


def q5_1(b):
    fives = zip(nibbles(b[8:]), _fifth(b[4:8]), strict=True)
    return [half(b[:2]) * (low + high) + half(b[2:4]) for low, high in fives]


def q8_0(b):
    return [half(b[:2]) * signed(q) for q in b[2:]]


def _two_bits(qs):
    """64 bytes as 256 numbers: the four pairs of bits of 32 bytes, one pair after the other."""
    return [qs[32 * n + i] >> 2 * pair & 3 for n in (0, 1) for pair in range(4) for i in range(32)]


def q2_k(b):
    scales, d, low = b[:16], half(b[80:82]), half(b[82:84])
    return [
        d * (scales[i // 16] & 15) * q - low * (scales[i // 16] >> 4)
        for i, q in enumerate(_two_bits(b[16:80]))
    ]


def q3_k(b):
    mask, packed, d = b[:32], b[96:108], half(b[108:110])
    fours = nibbles(packed[:8])
    scales = [fours[i] + 16 * (packed[8 + i % 4] >> 2 * (i // 4) & 3) - 32 for i in range(16)]
    high = [mask[i % 32] >> i // 32 & 1 for i in range(256)]
    return [
        d * scales[i // 16] * (q - 4 * (1 - high[i])) for i, q in enumerate(_two_bits(b[32:96]))
    ]


def _scales_and_minima(p):
    """12 bytes as 8 scales and 8 minima of 6 bits."""
    scales = [p[i] & 63 for i in range(4)] + [p[8 + i] & 15 | p[i] >> 6 << 4 for i in range(4)]
    minima = [p[4 + i] & 63 for i in range(4)] + [
        p[8 + i] >> 4 | p[4 + i] >> 6 << 4 for i in range(4)
    ]
    return scales, minima


def _affine(b, numbers):
    d, low = half(b[:2]), half(b[2:4])
    scales, minima = _scales_and_minima(b[4:16])
    return [d * scales[i // 32] * q - low * minima[i // 32] for i, q in enumerate(numbers)]


def _by_nibbles(qs):
    return [q for start in range(0, 128, 32) for q in nibbles(qs[start : start + 32])]


def q4_k(b):
    return _affine(b, _by_nibbles(b[16:]))


def q5_k(b):
    high = [b[16 + i % 32] >> i // 32 & 1 for i in range(256)]
    return _affine(b, [q + 16 * h for q, h in zip(_by_nibbles(b[48:]), high, strict=True)])


def q6_k(b):
    low = nibbles(b[:64]) + nibbles(b[64:128])
    scales, d = [signed(s) for s in b[192:208]], half(b[208:210])
    return [
        d * scales[i // 16] * (q + 16 * h - 32)
        for i, (q, h) in enumerate(zip(low, _two_bits(b[128:192]), strict=True))
    ]


def tq1_0(b):
    """Five digits to the base 3 in a byte, the first the largest, as a fraction of 256."""
    values = []
    for start, width, digits in ((0, 32, 5), (32, 16, 5), (48, 4, 4)):
        for n in range(digits):
            values += [(q * 3**n % 256) * 3 // 256 for q in b[start : start + width]]
    return [half(b[52:54]) * (value - 1) for value in values]


def tq2_0(b):
    return [half(b[64:66]) * (q - 1) for q in _two_bits(b[:64])]


def iq4_nl(b):
    return [half(b[:2]) * IQ4[q] for q in nibbles(b[2:])]


def iq4_xs(b):
    d, high = half(b[:2]), int.from_bytes(b[2:4], "little")
    values = []
    for i in range(8):
        scale = (b[4 + i // 2] >> 4 * (i % 2) & 15) + 16 * (high >> 2 * i & 3) - 32
        values += [d * scale * IQ4[q] for q in nibbles(b[8 + 16 * i : 24 + 16 * i])]
    return values


def mxfp4(b):
    return [2.0 ** (b[0] - 127) * E2M1[q] for q in nibbles(b[1:])]


def nvfp4(b):
    """Four groups of 16, each with a scale of 4 bits of exponent and 3 of mantissa."""
    values = []
    for i, byte in enumerate(b[:4]):
        exponent, mantissa = byte >> 3, byte & 7
        scale = 2.0 ** (exponent - 7) * (1 + mantissa / 8) if exponent else mantissa * 2.0**-9
        values += [scale * E2M1[q] for q in nibbles(b[4 + 8 * i : 12 + 8 * i])]
    return values
