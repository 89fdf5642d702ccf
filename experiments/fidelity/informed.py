"""Peers that read a model before they code: OSCAR and Block-GTQ, as their papers and code say.

OSCAR (arXiv:2605.17757) codes in 2 bits, and keeps 64 sinks and a window of 256. A head's keys turn
by U H, U the eigenvectors of its queries' second moment and H a Hadamard; its values by those of
sum_t w_t v_t v_t', w_t = k_t' (sum q q') k_t. A turned vector is clipped at a quantile of its own
absolute values, 0.96 for keys and 0.92 for values, and has min-max levels, zero and step in 16
bits. The permutation behind H only matters for groups smaller than a head. The matrix of the keys
counts, in 16 bits; that of the values can be multiplied into the weights.

Block-GTQ (arXiv:2606.24033) gives the pairs of channels that RoPE turns together bits of their own:
of each head, one bit after the other, to the pair with the largest s 4^-b, s half the sum of the
mean squares of its queries and keys, from 1 bit to 8. Pairs of equal bits are a group with its own
norm, in 16 bits, a rotation and the scalar levels of TurboQuant; values are TurboQuant's. It has
neither sinks nor a window. Neither method centres keys.

Both are given the texts that choose settings. `w128 sinks4` has our window and sinks around them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy import linalg

from experiments.fidelity.codecs import Mean, Turbo, min_max
from experiments.fidelity.forcing import ROUNDING, Trip, Trips
from experiments.fidelity.settings import Setting
from turboquant_jax.cache import CacheConfig, CodecConfig
from turboquant_jax.models import Llama, LlamaConfig
from turboquant_jax.models.sensitivity import read
from turboquant_jax.quantizers.codebook import lloyd_max, thresholds

CLIPS = (0.96, 0.92)
MOST_BITS = 8
Matrices = Float[np.ndarray, "layers K H H"]
Sides = tuple[Sequence[Trip], Sequence[Trip]]
"""What the keys, and the values, of every layer go through."""


@dataclass(frozen=True)
class Moments:
    """Of every head, sums over tokens: of queries and keys, and of values weighted as OSCAR does.

    `queries` also sums over the query heads of a kv head, of which there are `share`.
    """

    queries: Matrices
    keys: Matrices
    values: Matrices
    share: int


def moments(model: Llama, texts: Int[np.ndarray, "n T"]) -> Moments:
    """What both methods ask of a model."""
    sizes = model.config
    shape = (sizes.num_layers, sizes.num_kv_heads, sizes.head_dim)
    config = CacheConfig(*shape, center_keys=False)
    read_of = [
        [seen for seen, _ in read(model, jnp.asarray(tokens, jnp.int32), config)]
        for tokens in texts
    ]
    found = []
    for layer in zip(*read_of, strict=True):
        whole = [jnp.concatenate([getattr(seen, name) for seen in layer]) for name in "qkv"]
        found.append(np.asarray(_moments(*whole), np.float64))
    queries, keys, values = np.moveaxis(np.stack(found), 1, 0)
    return Moments(queries, keys, values, sizes.num_heads // sizes.num_kv_heads)


@dataclass(frozen=True)
class Informed(Setting):
    """A setting of which every layer has its own; `made` says what of a seed.

    `matrices` are bytes that no token adds to.
    """

    made: Callable[[int], Sides] = field(kw_only=True, compare=False, repr=False)
    has_seeds: bool = field(kw_only=True)
    matrices: int = 0

    def trips(self, seed: int, model: LlamaConfig) -> Trips:
        """Keys and values of a layer through what it has of its own."""
        key, value = self.made(seed)
        return lambda layer: (key[layer], value[layer])

    @property
    def is_random(self) -> bool:
        """Whether seeds make a difference."""
        return self.has_seeds

    def bytes_per_token(self, model: LlamaConfig, context: int) -> float:
        """With the matrices."""
        return super().bytes_per_token(model, context) + self.matrices / context


def informed(known: Moments) -> list[Setting]:
    """Both peers as they are, and with our window and sinks."""
    ours: dict[str, Any] = dict(window=128, sinks=4, block=64, centred=False)
    code = Mean(2, "OSCAR", 4)
    turned: dict[str, Any] = dict(
        made=partial(_oscar, known), has_seeds=False, matrices=2 * known.queries.size
    )  # in 16 bits
    theirs: dict[str, Any] = dict(window=256, sinks=64, block=8, centred=False)
    found: list[Setting] = [
        Informed("OSCAR int2", code, code, **theirs, **turned),
        Informed("OSCAR int2 w128 sinks4", code, code, **ours, **turned),
    ]
    alone: dict[str, Any] = dict(window=0, sinks=0, block=8, centred=False)
    for k, v in ((2, 2), (3, 2), (3, 3)):
        bits = greedy(scores(known), k)
        groups = np.mean([len(np.unique(head)) for layer in bits for head in layer])
        keys, values = Mean(k, "Block-GTQ", 2 * float(groups)), Mean(v, "TurboQuant", 2)
        by_group: dict[str, Any] = dict(made=partial(_block_gtq, bits, v), has_seeds=True)
        name = f"Block-GTQ K{k} V{v}"
        found.append(Informed(name, keys, values, **alone, **by_group))
        found.append(Informed(f"{name} w128 sinks4", keys, values, **ours, **by_group))
    return found


def _oscar(known: Moments, seed: int) -> Sides:
    """Nothing of it is random."""
    dim = known.queries.shape[-1]
    hadamard = linalg.hadamard(dim) / np.sqrt(dim)
    found = []
    for moment, clip in zip((known.queries, known.values), CLIPS, strict=True):
        turns = jnp.asarray(np.linalg.eigh(moment)[1] @ hadamard, jnp.float32)
        found.append([partial(_clipped, turn=turn, index=int(clip * dim)) for turn in turns])
    return found[0], found[1]


def _block_gtq(pairs: Int[np.ndarray, "layers K pairs"], value_bits: int, seed: int) -> Sides:
    """Bits of every pair of channels of the keys, and those of the values."""
    rng, steps = np.random.default_rng(seed), 2 ** int(pairs.max()) - 1
    keys: list[Trip] = []
    for layer in pairs:
        parts = zip(*(_grouped(head, rng, steps) for head in layer), strict=True)
        turn, same, low, edges, jumps = (jnp.asarray(np.stack(x), jnp.float32) for x in parts)
        keys.append(partial(_by_group, turn=turn, same=same, low=low, edges=edges, jumps=jumps))
    codec = CodecConfig(value_bits, "haar", scale="norm")
    value = Turbo(codec).trip(jax.random.key(seed), 2 * pairs.shape[-1])
    return keys, [value] * len(keys)


def scores(known: Moments) -> Float[np.ndarray, "layers K pairs"]:
    """Of every pair of channels: half the mean squares of its queries and of its keys, summed."""
    queries, keys = (
        np.diagonal(x, axis1=-2, axis2=-1) for x in (known.queries / known.share, known.keys)
    )
    half = queries.shape[-1] // 2
    both = (queries + keys) / 2
    return both[..., :half] + both[..., half:]


def greedy(score: Float[np.ndarray, "*heads pairs"], mean: int) -> Int[np.ndarray, "*heads pairs"]:
    """Bits of every pair, `mean` on average in each head: each to the largest score 4^-bits."""
    bits = np.ones(score.shape, np.int64)
    for _ in range((mean - 1) * score.shape[-1]):
        gain = np.where(bits < MOST_BITS, score * 4.0**-bits, -1.0)
        best = np.argmax(gain, axis=-1, keepdims=True)
        np.put_along_axis(bits, best, np.take_along_axis(bits, best, -1) + 1, -1)
    return bits


def _grouped(bits: Int[np.ndarray, " pairs"], rng: np.random.Generator, steps: int):
    """Arrays of a head: its rotation, which coordinates share a norm, and the levels of each.

    Levels are the lowest and the jumps to the next, on the scale of the norm.
    """
    dim = 2 * len(bits)
    turn, same = np.zeros((dim, dim)), np.zeros((dim, dim))
    low, edges, jumps = np.zeros(dim), np.full((steps, dim), np.inf), np.zeros((steps, dim))
    for own in np.unique(bits):
        which = np.flatnonzero(np.tile(bits == own, 2))
        size = len(which)
        q, r = np.linalg.qr(rng.normal(size=(size, size)))
        turn[np.ix_(which, which)] = q * np.sign(np.diag(r))
        same[np.ix_(which, which)] = 1
        levels = lloyd_max(int(own), size if size > 2 else None) / np.sqrt(size)
        low[which] = levels[0]
        edges[: len(levels) - 1, which] = thresholds(levels)[:, None]
        jumps[: len(levels) - 1, which] = np.diff(levels)[:, None]
    return turn, same, low, edges, jumps


_compiled = partial(jax.jit, compiler_options=ROUNDING)
_product = partial(jnp.einsum, precision="highest")


@jax.jit
def _moments(q: Float[Array, "T N H"], k: Float[Array, "T K H"], v) -> Float[Array, "3 K H H"]:
    grouped = q.reshape(q.shape[0], k.shape[1], -1, q.shape[2])
    of_q = _product("tkgi,tkgj->kij", grouped, grouped)
    weight = _product("tki,kij,tkj->tk", k, of_q, k)
    weighted = _product("tk,tki,tkj->kij", weight, v, v)
    return jnp.stack([of_q, _product("tki,tkj->kij", k, k), weighted])


@partial(_compiled, static_argnames="index")
def _clipped(x: Float[Array, "B T K H"], turn: Float[Array, "K H H"], index: int):
    turned = _product("btki,kij->btkj", x, turn)
    limit = jnp.sort(jnp.abs(turned), axis=-1)[..., index, None]
    back = min_max(jnp.clip(turned, -limit, limit), 2)
    return _product("btkj,kij->btki", back, turn)


@_compiled
def _by_group(x: Float[Array, "B T K H"], turn, same, low, edges, jumps) -> Float[Array, "B T K H"]:
    turned = _product("btki,kij->btkj", x, turn)
    norm = jnp.sqrt(_product("btki,kij->btkj", turned**2, same))
    norm = norm.astype(jnp.float16).astype(jnp.float32)
    unit = turned / jnp.where(norm > 0, norm, 1.0)

    def add(level, step):
        edge, jump = (x[None, None] for x in step)
        return level + jnp.where(unit > edge, jump, 0.0), None

    steps = jnp.swapaxes(edges, 0, 1), jnp.swapaxes(jumps, 0, 1)
    level = jax.lax.scan(add, jnp.broadcast_to(low[None, None], x.shape), steps)[0]
    return _product("btkj,kij->btki", level * norm, turn)
