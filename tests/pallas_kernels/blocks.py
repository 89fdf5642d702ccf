"""Random compressed blocks, and decode attention over them by its definition in float64 numpy."""

import math

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pallas_kernels.codebook import PLANE_WIDTHS, Codebook, level_limits
from pallas_kernels.decode_attention import Blocks


def pack(codes, bits):
    """[..., N] codes -> planes [..., N*w/8], element i in byte i mod M at bit w * (i // M)."""
    planes, done = [], 0
    for width in PLANE_WIDTHS[bits]:
        field = (codes >> done) & (2**width - 1)
        per_byte = 8 // width
        split = field.reshape(*field.shape[:-1], per_byte, -1)
        shifts = (width * np.arange(per_byte))[:, None]
        planes.append((split << shifts).sum(axis=-2).astype(np.uint8))
        done += width
    return tuple(planes)


def random_codebook(rng, bits, step=0.04):
    """Sorted distinct levels within the limits, not symmetric."""
    low, high = level_limits(bits)
    if bits > 4:
        low, high, step = low, high, step * 64 / high
    levels = np.sort(rng.choice(np.arange(low, high + 1), 2**bits, replace=False))
    return Codebook(bits=bits, levels=tuple(int(x) for x in levels), step=step)


def random_blocks(rng, pages, kv_heads, tokens, channels, bits):
    """(Blocks, keys [pages, K, T, H], values [pages, K, T, H]) in float64."""
    books = [random_codebook(rng, b) for b in bits]
    codes = [rng.integers(0, 2**b, (pages, kv_heads, tokens, channels)) for b in bits]
    scales = [
        rng.uniform(0.5, 1.5, (pages, kv_heads, tokens)).astype(ml_dtypes.bfloat16) for _ in bits
    ]
    dense = [
        np.array(book.levels)[code] * book.step * scale.astype(np.float64)[..., None]
        for book, code, scale in zip(books, codes, scales, strict=True)
    ]
    key_scale, value_scale = (s.view(np.uint16).astype(np.uint32) for s in scales)
    blocks = Blocks(
        keys=tuple(jnp.asarray(p) for p in pack(codes[0], bits[0])),
        values=tuple(jnp.asarray(p) for p in pack(codes[1].swapaxes(2, 3), bits[1])),
        scales=jnp.asarray(key_scale | value_scale << np.uint32(16)),
        key_codebook=books[0],
        value_codebook=books[1],
    )
    return blocks, dense[0], dense[1]


def definition(
    q,
    keys,
    values,
    table,
    lengths,
    sm_scale,
    starts=None,
    soft_cap=None,
    sinks=None,
    bias=None,
    extra=None,
):
    """q [B, N, H], keys and values [pages, K, T, H] -> output [B, N, H], log-sum-exp [B, N]; float64.

    `extra` [pages, K, T, B, N]: further terms of q.k.
    """
    batch, heads, _ = q.shape
    _, kv_heads, tokens, _ = keys.shape
    out, lse = np.zeros(q.shape[:2] + values.shape[-1:]), np.full((batch, heads), -np.inf)
    for b in range(batch):
        used = table[b, : -(-int(lengths[b]) // tokens)]
        for n in range(heads):
            h = n // (heads // kv_heads)
            first = 0 if starts is None else int(starts[b])
            k = keys[used, h].reshape(-1, keys.shape[-1])[first : lengths[b]]
            v = values[used, h].reshape(-1, values.shape[-1])[first : lengths[b]]
            score = k @ q[b, n].astype(np.float64)
            if extra is not None:
                score = score + extra[used, h, :, b, n].reshape(-1)[first : lengths[b]]
            score = score * sm_scale + (0.0 if bias is None else bias[b, n])
            if soft_cap is not None:
                score = soft_cap * np.tanh(score / soft_cap)
            weights = np.exp(score)
            total = weights.sum() + (0.0 if sinks is None else math.exp(sinks[n]))
            if total > 0:
                out[b, n], lse[b, n] = weights @ v / total, math.log(total)
    return out, lse
