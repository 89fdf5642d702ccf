"""Random compressed blocks, and decode attention over them by its definition in float64 numpy."""

import math

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pallas_kernels.decode_attention import BlocksOperand
from pallas_kernels.primitives.codebook import CodebookOperand, level_limits


def pack(codes, widths):
    """[..., N] codes -> planes [..., N*w/8], element i in byte i mod M at bit w * (i // M)."""
    planes, done = [], 0
    for width in widths:
        field = (codes >> done) & (2**width - 1)
        split = field.reshape(*field.shape[:-1], 8 // width, -1)
        shifts = (width * np.arange(8 // width))[:, None]
        planes.append((split << shifts).sum(axis=-2).astype(np.uint8))
        done += width
    return tuple(planes)


def random_codebook(rng, bits, code="scalar"):
    """Distinct levels in no order, with the smallest and the largest that fit among them."""
    low, high = level_limits(bits, code)
    count = 2 ** (bits + (code == "trellis"))
    inner = rng.choice(np.arange(low + 1, high), count - 2, replace=False)
    levels = rng.permutation([low, high, *inner.tolist()])
    if (bits, code) == (3, "trellis"):  # 8 negative ones first
        negative = rng.permutation([low, *rng.choice(np.arange(low + 1, 0), 7, replace=False)])
        levels = [*negative, *rng.permutation([high, *rng.choice(high, 7, replace=False)])]
    return CodebookOperand(bits, tuple(int(x) for x in levels), 2.0 / high, code)


def levels_of(book, codes):
    """Integer levels of codes [..., channels]; the path of a trellis runs along the channels."""
    levels = np.array(book.levels)
    if book.code == "scalar":
        return levels[codes]
    w, u = codes % 2 ** (book.bits - 1), codes >> (book.bits - 1)
    number = np.empty(codes.shape, int)
    state = np.zeros((*codes.shape[:-1], 3), int)  # u[t-1], u[t-2], u[t-3]
    for t in range(codes.shape[-1]):
        now = u[..., t]
        odd = now ^ state[..., 0] ^ state[..., 2]
        number[..., t] = 4 * w[..., t] + 2 * odd + state[..., 1]
        state = np.stack([now, state[..., 0], state[..., 1]], axis=-1)
    return levels[number]


def random_blocks(rng, pages, kv_heads, tokens, channels, bits, codes=("scalar", "scalar")):
    """(Blocks, keys [pages, K, T, H], values [pages, K, T, H]) in float64."""
    books = [random_codebook(rng, b, code) for b, code in zip(bits, codes, strict=True)]
    codes = [rng.integers(0, 2**b, (pages, kv_heads, tokens, channels)) for b in bits]
    scales = [
        np.exp(rng.uniform(-2, 1, (pages, kv_heads, tokens))).astype(ml_dtypes.bfloat16)
        for _ in bits
    ]
    scales[1][0, 0, :3] = 0.0  # a zero vector is a value like any other
    dense = [
        levels_of(book, code) * book.step * scale.astype(np.float64)[..., None]
        for book, code, scale in zip(books, codes, scales, strict=True)
    ]
    key_scale, value_scale = (s.view(np.uint16).astype(np.uint32) for s in scales)
    blocks = BlocksOperand(
        keys=pack(codes[0].swapaxes(0, 1), books[0].widths),
        values=pack(codes[1].swapaxes(0, 1).swapaxes(2, 3), books[1].widths),
        scales=(key_scale | value_scale << np.uint32(16)).swapaxes(0, 1),
        key_codebook=books[0],
        value_codebook=books[1],
    )
    return blocks, dense[0], dense[1]


def poison(blocks, table, lengths):
    """The blocks with random codes and NaN scales wherever no sequence has a token."""
    _, pages, tokens = blocks.scales.shape
    used = np.zeros((pages, tokens), bool)
    for row, length in zip(table, lengths, strict=True):
        for i in range(-(-int(length) // tokens)):
            used[row[i]] |= np.arange(tokens) < length - i * tokens
    scales = np.where(used[None], blocks.scales, np.uint32(0x7FC07FC0))
    clear = ~used.any(axis=1)
    keys, values = (
        tuple(np.where(clear[None, :, None, None], np.uint8(0xA7), p) for p in planes)
        for planes in (blocks.keys, blocks.values)
    )
    return BlocksOperand(keys, values, scales, blocks.key_codebook, blocks.value_codebook)


def definition(
    q, keys, values, table, lengths, sm_scale, *, soft_cap=None, sink_logits=None, extra=None
):  # fmt: skip
    """q [B, N, H], keys and values [pages, K, T, H] -> output [B, N, H], log-sum-exp [B, N].

    `extra` [pages, K, T, B, N]: further terms of q.k. All in float64.
    """
    batch, heads, _ = q.shape
    _, kv_heads, tokens, _ = keys.shape
    out, lse = np.zeros((batch, heads, values.shape[-1])), np.full((batch, heads), -np.inf)
    for b, n in np.ndindex(batch, heads):
        h = n // (heads // kv_heads)
        used = table[b, : -(-int(lengths[b]) // tokens)]
        seen = slice(int(lengths[b]))
        k, v = (x[used, h].reshape(-1, x.shape[-1])[seen] for x in (keys, values))
        score = k @ q[b, n].astype(np.float64)
        if extra is not None:
            score = score + extra[used, h, :, b, n].reshape(-1)[seen]
        score = score * sm_scale
        if soft_cap is not None:
            score = soft_cap * np.tanh(score / soft_cap)
        weights = np.exp(score)
        total = weights.sum() + (0.0 if sink_logits is None else math.exp(sink_logits[n]))
        if total > 0:
            out[b, n], lse[b, n] = weights @ v / total, math.log(total)
    return out, lse


def arrays(tree):
    """numpy -> jax, through any structure."""
    import jax

    return jax.tree.map(jnp.asarray, tree)
