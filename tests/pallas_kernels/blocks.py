"""Random compressed blocks, and decode attention over them by its definition in float64 numpy."""

import dataclasses
import math
from itertools import zip_longest

import jax
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


def random_side(rng, place, tokens, groups, code, joint):
    """(planes by group, codebooks, scales by group, vectors [pages, K, T, H] in float64).

    `groups`: (channels, bits) of each, or (channels, codebook); `place`: (pages, K). A `joint`
    scale is that of all.
    """
    planes, books, scales, dense = [], [], [], []
    for channels, book in groups:
        if isinstance(book, int):
            book = random_codebook(rng, book, code)
            if joint:  # steps of their own: no two groups alike
                book = dataclasses.replace(book, step=book.step * rng.uniform(0.2, 1.0))
        codes = rng.integers(0, 2**book.bits, (*place, tokens, channels))
        if not (joint and scales):
            found = np.exp(rng.uniform(-2, 1, (*place, tokens))).astype(ml_dtypes.bfloat16)
            found[0, 0, :3] = 0.0  # a zero vector is a value like any other
            scales.append(found)
        scale = scales[-1].astype(np.float64)[..., None]
        dense.append(levels_of(book, codes) * book.step * scale)
        planes.append(codes.swapaxes(0, 1))
        books.append(book)
    return planes, tuple(books), scales, np.concatenate(dense, axis=-1)


def random_pool(rng, pages, kv_heads, tokens, sides, codes, joint):
    """(Blocks, keys, values [pages, K, T, H] in float64); `sides`: groups of keys and of values."""
    key, value = (
        random_side(rng, (pages, kv_heads), tokens, groups, code, one)
        for groups, code, one in zip(sides, codes, joint, strict=True)
    )
    words = []
    for pair in zip_longest(key[2], value[2]):
        low, high = (0 if s is None else s.view(np.uint16).astype(np.uint32) for s in pair)
        words.append((low | high << np.uint32(16)).swapaxes(0, 1))
    blocks = BlocksOperand(
        keys=tuple(pack(x, book.widths) for x, book in zip(*key[:2], strict=True)),
        values=tuple(
            pack(x.swapaxes(2, 3), book.widths) for x, book in zip(*value[:2], strict=True)
        ),
        scales=tuple(words),
        key_codebooks=key[1],
        value_codebooks=value[1],
        joint=joint,
    )
    return blocks, key[3], value[3]


def random_blocks(rng, pages, kv_heads, tokens, channels, bits, codes=("scalar", "scalar")):
    """`random_pool` of one group of so many bits of keys, and of values."""
    sides = tuple(((channels, b),) for b in bits)
    return random_pool(rng, pages, kv_heads, tokens, sides, codes, (False, False))


def poison(blocks, table, lengths):
    """The blocks with random codes and NaN scales wherever no sequence has a token."""
    _, pages, tokens = blocks.scales[0].shape
    used = np.zeros((pages, tokens), bool)
    for row, length in zip(table, lengths, strict=True):
        for i in range(-(-int(length) // tokens)):
            used[row[i]] |= np.arange(tokens) < length - i * tokens
    clear = ~used.any(axis=1)[None, :, None, None]
    return dataclasses.replace(
        blocks,
        **jax.tree.map(
            lambda p: np.where(clear, np.uint8(0xA7), p),
            {"keys": blocks.keys, "values": blocks.values},
        ),
        scales=tuple(np.where(used[None], x, np.uint32(0x7FC07FC0)) for x in blocks.scales),
    )


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
    return jax.tree.map(jnp.asarray, tree)
