"""A cache decoded by its documented layout, with nothing of the library but the levels."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from scipy import linalg, special

from turboquant_jax import cache
from turboquant_jax.cache.calibration import Calibration
from turboquant_jax.quantizers.channels import Basis

CODEC = cache.CodecConfig
SMALL = dict(num_layers=2, num_kv_heads=2, block=8, window=5, sinks=2, dtype="float32")
CAPACITY = 70
QUICK = {"xla_backend_optimization_level": 0}  # halves the time to compile; the results stay


def calibration(config):
    """Bases for the sides that have one scale, or None: a reflection of each head, stretched.

    In float64 and without LAPACK, whose signs are its own. Not far from the identity: what tests
    draw is isotropic.
    """
    rng, sides = np.random.default_rng(8), {}
    for side in ("key", "value"):
        v = rng.normal(0, 1, (config.num_layers, config.num_kv_heads, config.head_dim))
        v = v / np.sqrt(np.sum(v * v, axis=-1, keepdims=True))
        reflection = np.eye(config.head_dim) - 2 * v[..., :, None] * v[..., None, :]
        stretch = np.geomspace(1.3, 0.7, config.head_dim)
        variance = np.broadcast_to(stretch**2, v.shape)
        made = (reflection * stretch, reflection / stretch[:, None], variance)
        if getattr(config, side).scales != "group":
            sides[f"{side}s"] = Basis(*(jnp.asarray(x, jnp.float32) for x in made))
    return Calibration(**sides) if sides else None


def empty_cache(config, batch, **options):
    options |= {"calibration": calibration(config)}
    make = lambda: cache.create(config, batch, CAPACITY, key=jax.random.key(2), **options)  # noqa: E731
    return jax.jit(make, compiler_options=QUICK)()


def random_parts(state, rng):
    """Any bytes in every segment of a cache, with scales that are plausible."""

    def filled(leaf):
        if leaf.dtype == jnp.uint32:  # two bfloat16 scales between 0.5 and 2
            scales = rng.uniform(0.5, 2, (2, *leaf.shape)).astype(jnp.bfloat16).view(np.uint16)
            return jnp.asarray(scales[0].astype(np.uint32) << 16 | scales[1])
        if leaf.dtype in (jnp.uint8, jnp.uint16) and leaf.ndim == 3:  # codes of scales
            high, low = (rng.integers(200, 255, leaf.shape) for _ in range(2))
            return jnp.asarray(high << 8 | low if leaf.dtype == jnp.uint16 else low, leaf.dtype)
        if leaf.dtype == jnp.uint8:
            return jnp.asarray(rng.integers(0, 256, leaf.shape, dtype=np.uint8))
        if leaf.dtype == jnp.bfloat16 and leaf.ndim < 4:  # norms of sketches, by H**0.5 a scale
            return jnp.asarray(rng.uniform(1, 4, leaf.shape), leaf.dtype)
        return jnp.asarray(rng.normal(0, 1, leaf.shape), leaf.dtype)

    names = ("sinks", "window", "key_mean")
    parts = [replace(part, pool=jax.tree.map(filled, part.pool)) for part in state.parts]
    return {name: jax.tree.map(filled, getattr(state, name)) for name in names} | {
        "parts": tuple(parts)
    }


def unpack(planes, bits, count):
    """Element i of a plane of width w over m bytes sits in byte i mod m at bit w (i // m)."""
    i, value, shift = np.arange(count), 0, 0
    for plane, width in zip(planes, bits, strict=True):
        plane = np.asarray(plane).astype(np.int64)
        m = plane.shape[-1]
        value = value + ((plane[..., i % m] >> (width * (i // m))) % 2**width << shift)
        shift += width
    return value


def levels_of(group, index):
    """Levels of unpacked indices; of a trellis by the equations of its docstring."""
    levels = np.asarray(group.levels, np.float64)
    if group.code == "scalar":
        return levels[index]
    level_bits = group.bits - 1
    w, u = index % 2**level_bits, index >> level_bits
    padded = np.concatenate([np.zeros((*u.shape[:-1], 3), u.dtype), u], axis=-1)
    u1, u2, u3 = (padded[..., 3 - k : padded.shape[-1] - k] for k in (1, 2, 3))
    return levels[4 * w + 2 * (u ^ u1 ^ u3) + u2]


def matrix(rotation):
    """Pi, dense."""
    dim = rotation.dim
    if hasattr(rotation, "matrix"):
        return np.asarray(rotation.matrix, np.float64)
    if not hasattr(rotation, "signs"):
        return np.eye(dim)
    block = linalg.hadamard(rotation.block) / np.sqrt(rotation.block)
    signs = np.asarray(rotation.signs, np.float64)
    return linalg.block_diag(*[block] * (dim // rotation.block)) * signs[None, :]


def widths(group):
    total = group.bits if group.code == "scalar" else group.bits - 1
    digits = [w for w in (8, 4, 2, 1) if total & w]
    return digits if group.code == "scalar" else [*digits, 1]


def row_of_head(state, layer, head):
    """(part, row) of a head: the rows of a part are its layers' heads, one after another."""
    places = [
        own * state.config.num_kv_heads if len(own) == 1 else own for own in state.config.places
    ]
    part = places[layer][head]
    before = [p for own in places[:layer] for p in own] + list(places[layer][:head])
    return state.parts[part], before.count(part)


def decoded_page(state, layer, page, values):
    """Keys, or values, of a page: [K, T, H] in the natural order of channels, not rotated."""
    heads = range(state.config.num_kv_heads)
    return np.stack(
        [decoded_row(state, *row_of_head(state, layer, head), page, values) for head in heads]
    )


def decoded_row(state, part, row, page, values):
    """Keys, or values, of a page of one head: [T, H]."""
    codec, block = part.codecs[int(values)], state.config.block
    if codec.uncoded is not None:  # the vectors themselves
        ((plane,),) = part.pool.values if values else part.pool.keys
        return np.asarray(plane[row, page], np.float64)
    parts = []
    for g, group in enumerate(codec.groups):
        held = part.pool.values if values else part.pool.keys
        planes = [np.asarray(p)[row, page] for p in held[g]]
        index = unpack(planes, widths(group), block if values else group.dim)
        index = np.swapaxes(index, -1, -2) if values else index
        scale = scale_of(part.pool, g if codec.transform is None else 0, (row, page), values)
        parts.append(scale[..., None] * levels_of(group, index))
    turned = np.concatenate(parts, axis=-1)
    if codec.sketch is not None:
        turned = turned + of_signs(codec.sketch, part.pool.sketches, row, page)
    turns = [matrix(group.rotation) for group in codec.groups]
    ordered = turned @ linalg.block_diag(*turns)
    if codec.transform is not None:  # x~ = T^-1 s c
        return ordered @ np.linalg.inv(np.asarray(codec.transform.matrix, np.float64)[row]).T
    if codec.order is None:
        return ordered
    natural = np.empty_like(ordered)
    natural[:, np.asarray(codec.order)[row]] = ordered
    return natural


def scale_of(pool, number, place, values):
    """Scales of keys, or of values: two bfloat16 in a word, or one that stands alone; or codes c of

    8 bits, base 2^((c - 254) / 32).
    """

    def half(x):
        x = np.asarray(x)
        if x.dtype not in (np.uint16, np.uint32):
            return x
        width = 4 * x.dtype.itemsize
        x = x >> width if values else x & (2**width - 1)
        return x.astype(np.uint16).view(jnp.bfloat16) if width == 16 else x

    found = half(pool.scales[number][place]).astype(np.float64)
    if not pool.bases:
        return found
    return half(pool.bases[number][place]).astype(np.float64) * 2 ** ((found - 254) / 32)


def of_signs(sketch, held, row, page):
    """What signs say of the residual in the rotated space, [T, H]: f |r| S^T sign(S r).

    f = sqrt(pi / 2) / (H kappa), and kappa = 1 for entries of variance 1, or for H orthogonal rows
    of length sqrt(H) that which makes E |s_1| of one of them sqrt(2 / pi).
    """
    rows = np.asarray(sketch.matrix, np.float64)
    count = rows.shape[1]
    signs = 2.0 * unpack([np.asarray(held.signs)[row, page]], [1], count) - 1
    kappa = 1.0
    if sketch.kind == "orthogonal":
        half = special.gammaln(count / 2) - special.gammaln((count + 1) / 2)
        kappa = np.sqrt(count / 2) * np.exp(half)
    norms = np.asarray(held.norms)[row, page].astype(np.float64)
    return np.sqrt(np.pi / 2) / (count * kappa) * norms[..., None] * (signs @ rows)


def rounded(x):
    """To 13 significant bits."""
    fraction, exponent = np.frexp(x)
    return np.ldexp(np.round(fraction * 2**13), exponent - 13)


def mean_at(config, mean, positions):
    """The mean keys [K, H] as they were taken from keys at these positions: [K, T, H].

    Pairs of channels are complex numbers, turned by three angles: of every 64th period of 64
    tokens, of the period, of the token in it. Sines and cosines of the first two have the precision
    of float16; those of the last are integers in units of 1 / 127, a factor that the first have.
    Before the last one the numbers have 13 bits.
    """
    if config.rope_frequencies is None:
        return mean[:, None, :]
    channels, rotary = np.arange(config.head_dim), 2 * len(config.rope_frequencies)
    halves = [np.split(part, 2) for part in np.split(channels, [rotary])]
    first, second = (np.concatenate(part) for part in zip(*halves, strict=True))
    frequencies = np.pad(config.rope_frequencies, (0, len(first) - rotary // 2))
    behind = positions - config.sinks
    found = mean[:, None, first] + 1j * mean[:, None, second]
    for angle, unit, dtype in (
        (config.sinks + behind // 4096 * 4096, 1 / 127, np.float16),
        (behind % 4096 // 64 * 64, 1, np.float16),
        (behind % 64, 127, np.int8),
    ):
        turned = unit * np.exp(1j * np.outer(angle, frequencies))
        parts = turned.real, turned.imag
        if dtype == np.int8:
            found = rounded(found.real) + 1j * rounded(found.imag)
            parts = map(np.rint, parts)
        real, imaginary = (part.astype(dtype).astype(float) for part in parts)
        found = found * (real + 1j * imaginary)
    whole = np.empty((*found.shape[:2], config.head_dim))
    whole[..., first], whole[..., second] = found.real, found.imag
    return whole


def decoded(state, layer, row):
    """Position -> (key, value), each [K, H], of everything the cache holds of a sequence."""
    config, length = state.config, int(state.lengths[row])
    slots = state.table.page_table.shape[1]
    count = max(0, length - config.sinks - config.window) // config.block
    tokens, edge = {}, config.sinks + count * config.block
    ring = state.window.keys.shape[2]
    for p in range(length):
        if p < config.sinks:
            segment, slot = state.sinks, p
        elif p >= edge:
            segment, slot = state.window, (p - config.sinks) % ring
        else:
            continue
        tokens[p] = [
            np.asarray(x)[layer, row, slot].astype(float) for x in jax.tree.leaves(segment)
        ]
    for block in range(max(0, count - slots), count):
        page = int(np.asarray(state.table.page_table)[row, block % slots])
        key, value = (decoded_page(state, layer, page, values) for values in (False, True))
        if state.key_mean is not None:
            start = config.sinks + block * config.block
            mean = np.asarray(state.key_mean)[layer, row].astype(float)
            key = key + mean_at(config, mean, start + np.arange(config.block))
        for t in range(config.block):
            tokens[config.sinks + block * config.block + t] = [key[:, t], value[:, t]]
    return tokens


def random_tokens(config, count, heads):
    shape = (config.num_layers, 2, count, config.num_kv_heads, config.head_dim)
    rng = np.random.default_rng(9)
    k, v = (jnp.asarray(rng.normal(1, 1, shape), jnp.float32) for _ in range(2))
    q = jnp.asarray(rng.normal(0, 1, (2, count, heads, config.head_dim)), jnp.float32)
    return q, k, v
