"""Teacher forcing layer by layer: hundreds of settings of a cache, a handful of compilations.

What a query sees is the library's `attend_split`, here in tiles of queries, so that the scores of a
long text never exist at once; window, sinks and block are arrays, the layers are driven from the
host, and what keys and values go through is any function of arrays, compiled for itself. On a GPU,
where products are in TensorFloat-32, a kernel does the same (`forced_attention`). Tests hold both
to the library's teacher forcing, and so to the real cache.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from experiments.fidelity.forced_attention import forced_attention
from experiments.fidelity.rule import Rule
from turboquant_jax.attention.segments import PLAIN, Scores
from turboquant_jax.attention.teacher_forcing import Places, attend_split, center_keys
from turboquant_jax.cache import CacheConfig, pre_rope
from turboquant_jax.models.evaluate import Comparison, compare
from turboquant_jax.models.model import Layer, Llama, rms_norm, unstack
from turboquant_jax.models.rope import inverse_frequencies, rotation_angles

Trip = Callable[[Float[Array, "B T K H"]], Float[Array, "B T K H"]]
"""Keys (centred), or values, of a layer through compression and back, float32."""

Trips = Callable[[int], tuple[Trip | None, Trip | None]]
"""Layer -> what its keys and its values go through; None leaves them in full precision."""

# XLA may otherwise drop the roundings to 16 bits that are the point of the exercise.
ROUNDING = {"xla_allow_excess_precision": False}


@dataclass(frozen=True)
class Tiling:
    """Static sizes: queries of a tile, most of window + block, most sinks, all in tokens."""

    queries: int = 1024
    reach: int = 1024
    sinks: int = 64


_TILES = Tiling()


@dataclass(frozen=True)
class Pass:
    """What one pass over texts leaves.

    Attributes:
      hidden: final hidden vectors, after the last norm.
      attention_error: |o - o*| / |o*| of each layer and text, o* attention in full precision to the
        same queries, keys and values, those of this pass; None where it was not asked for.
      entering: hidden vectors before each layer, where they were kept.
    """

    hidden: Float[Array, "B T D"]
    attention_error: Float[np.ndarray, "layers B"] | None = None
    entering: tuple[Float[Array, "B T D"], ...] = ()


@dataclass(frozen=True)
class Forcing:
    """A decoder cut into its layers, how exactly to multiply, and whether by the GPU kernel."""

    model: Llama
    layers: Sequence[Layer]
    precision: str
    dtype: str
    tiling: Tiling
    fused: bool

    def full(self, tokens: Int[np.ndarray, "B T"], keep: bool = False) -> Pass:
        """A cache in full precision, `dtype`; `keep` what enters each layer."""
        rule = Rule(0, 0, 8, False)
        with jax.default_matmul_precision(self.precision):
            hidden = _embed(self.model, jnp.asarray(tokens, jnp.int32))
            return self._run(hidden, 0, rule, lambda layer: (None, None), False, keep)

    def run(
        self,
        tokens: Int[np.ndarray, "B T"],
        rule: Rule,
        trips: Trips,
        errors: bool = False,
        resume: tuple[int, Float[Array, "B T D"]] | None = None,
    ) -> Pass:
        """One pass over texts of the same length.

        Args:
          tokens: the texts.
          rule: which tokens are compressed when.
          trips: what keys and values go through.
          errors: whether to measure attention errors.
          resume: a layer and what enters it, where all before it is in full precision.

        Raises:
          ValueError: a rule beyond the reach of the tiles.
        """
        if rule.window + rule.block > self.tiling.reach or rule.sinks > self.tiling.sinks:
            raise ValueError(
                f"window + block and sinks must be at most {self.tiling.reach} and "
                f"{self.tiling.sinks}, got {rule.window} + {rule.block} and {rule.sinks}"
            )
        with jax.default_matmul_precision(self.precision):
            if resume is None:
                resume = 0, _embed(self.model, jnp.asarray(tokens, jnp.int32))
            first, hidden = resume
            return self._run(hidden, first, rule, trips, errors)

    def compare(self, tokens: Int[np.ndarray, "B T"], exact: Pass, other: Pass) -> Comparison:
        """Predictions of tokens[:, 1:] from two passes, arrays [B, T - 1]."""
        with jax.default_matmul_precision(self.precision):
            made = compare(self.model, jnp.asarray(tokens, jnp.int32), exact.hidden, other.hidden)
        shape = tokens.shape[1] - 1, tokens.shape[0]
        return Comparison(*(x.reshape(shape).T for x in (made.nll, made.kl, made.agrees)))

    def _run(
        self, hidden: Array, first: int, rule: Rule, trips: Trips, errors: bool, keep: bool = False
    ) -> Pass:
        config, found, entering = self.model.config, [], []
        phases, numbers = self._phases(rule, hidden.shape[1]), rule.arrays()
        positions = jnp.arange(hidden.shape[1], dtype=jnp.int32)[None, :]
        angles = rotation_angles(config, jnp.broadcast_to(positions, hidden.shape[:2]))
        for index, layer in enumerate(self.layers[first:], first):
            entering += [hidden] * keep
            q, k, v = _project(layer, hidden, angles, self.dtype)
            key_trip, value_trip = trips(index)
            approximate_k = k
            if key_trip is not None and rule.centred:
                centred, taken = _center(k, numbers.sinks, rule.block, phases)
                approximate_k = _add(key_trip(centred), taken)
            elif key_trip is not None:
                approximate_k = key_trip(k.astype(jnp.float32))
            approximate_v = v if value_trip is None else value_trip(v.astype(jnp.float32))
            out = self._attend(q, k, v, approximate_k, approximate_v, numbers)
            if errors:
                found.append(_error(out, self._attend(q, k, v, k, v, numbers)))
            hidden = _finish(layer, hidden, angles, out)
        return Pass(
            rms_norm(hidden, self.model.norm[...], config.rms_norm_eps),
            np.stack([np.asarray(error) for error in found]) if errors else None,
            tuple(entering),
        )

    def _phases(self, rule: Rule, count: int) -> pre_rope.Phases | None:
        """The angles of the mean in a cache of this rule and of so many tokens."""
        if not rule.pre_rope:
            return None
        frequencies = tuple(inverse_frequencies(self.model.config))
        dim = self.model.config.head_dim
        config = CacheConfig(1, 1, dim, sinks=rule.sinks, rope_frequencies=frequencies)
        return pre_rope.create(config, count)

    def _attend(self, q, k, v, approximate_k, approximate_v, rule: Rule) -> Array:
        if self.fused:
            return _attend_fused(q, k, v, approximate_k, approximate_v, rule)
        return _attend(q, k, v, approximate_k, approximate_v, rule, self.tiling)


def cut(
    model: Llama,
    precision: str = "highest",
    dtype: str = "bfloat16",
    tiling: Tiling = _TILES,
) -> Forcing:
    """Cut a decoder into layers with arrays of their own.

    Args:
      model: the decoder.
      precision: of float32 products, see `jax.default_matmul_precision`.
      dtype: of what the cache holds in full precision.
      tiling: static sizes.

    Raises:
      ValueError: a model with a window, or a scale or caps of its scores.
    """
    config = model.config
    scores = Scores(config.attention_scale, config.attention_softcap)
    if scores != PLAIN or config.sliding_window is not None:
        raise ValueError(f"model: got {scores}, {config.sliding_window=}, expected neither")
    fused = precision == "tensorfloat32" and jax.default_backend() == "gpu"
    apart = unstack(model) if isinstance(model.layers, Layer) else model
    return Forcing(model, tuple(apart.layers), precision, dtype, tiling, fused)


@jax.jit
def _embed(model, tokens):
    return model.embedding[...][tokens]


def _no_attention(state, index, projection):
    q, k, v = projection.heads()
    return jnp.zeros_like(q), (q, k, v)


@partial(jax.jit, static_argnums=3, compiler_options=ROUNDING)
def _project(layer, hidden, angles, dtype):
    q, k, v = layer(hidden, *angles, jnp.int32(0), (), _no_attention)[1]
    return q, k.astype(dtype), v.astype(dtype)


@jax.jit
def _finish(layer, hidden, angles, out):
    def attend(state, index, projection):
        return out, state

    return layer(hidden, *angles, jnp.int32(0), (), attend)[0]


@partial(jax.jit, static_argnums=2)
def _center(k: Float[Array, "B T K H"], sinks: Int[Array, ""], block: int, phases):
    """The library's, with sinks as an array."""
    first = lax.dynamic_slice_in_dim(k, sinks, block, axis=1)
    return center_keys(k, first, sinks, phases)


@jax.jit
def _add(x, mean):
    return x + mean


@jax.jit
def _attend_fused(q, k, v, approximate_k, approximate_v, rule: Rule):
    return forced_attention(q, k, v, approximate_k, approximate_v, rule)


@partial(jax.jit, static_argnums=6)
def _attend(q, k, v, approximate_k, approximate_v, rule: Rule, tiling: Tiling):
    """In tiles of queries; of the exact keys only sinks and reach can be seen."""
    outputs = []
    for start in range(0, q.shape[1], tiling.queries):
        stop = min(start + tiling.queries, q.shape[1])
        low = max(0, start - tiling.reach)
        low = low if low > tiling.sinks else 0
        near = np.r_[0 : tiling.sinks if low else 0, low:stop].astype(np.int32)
        exact_k, exact_v = (
            jnp.concatenate([x[:, : tiling.sinks], x[:, low:stop]], 1) if low else x[:, :stop]
            for x in (k, v)
        )
        decoded = approximate_k[:, :stop], approximate_v[:, :stop]
        query = jnp.arange(start, stop, dtype=jnp.int32)
        places = Places(query, jnp.asarray(near), jnp.arange(stop, dtype=jnp.int32))
        part, exact = q[:, start:stop], (exact_k, exact_v)
        outputs.append(attend_split(part, exact, decoded, places, rule))
    return jnp.concatenate(outputs, axis=1)


@jax.jit
def _error(out, exact) -> Float[Array, " B"]:
    axes = (1, 2, 3)
    return jnp.sqrt(jnp.sum((out - exact) ** 2, axis=axes) / jnp.sum(exact**2, axis=axes))
